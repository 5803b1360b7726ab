// Bounded waits for a peer; error reports; epochs.
#pragma once

#include "device/ptx.cuh"
#include "runtime/domain.h"

namespace deepep_moe {

// -- epochs: numbers of calls, which wrap around ------------------------------------------------------------

// No call has epoch 0, the initial value of memory. The epoch after 2^32 - 1 is 2, which is even, so that consecutive
// calls never use the same half of a double buffer.
__device__ __forceinline__ int next_epoch(int epoch) {
    const unsigned next = static_cast<unsigned>(epoch) + 1u;
    return static_cast<int>(next == 0u ? 2u : next);
}

// Whether a counter that only increases, modulo 2^32, is at `expected` or past it.
__device__ __forceinline__ bool reached(int seen, int expected) {
    return static_cast<unsigned>(seen) - static_cast<unsigned>(expected) < 0x80000000u;
}

// -- error reports -------------------------------------------------------

__device__ __forceinline__ void write_report(volatile FailureReport* record, const FailureReport& report) {
    record->phase = report.phase;
    record->peer = report.peer;
    record->field = report.field;
    record->expected = report.expected;
    record->seen = report.seen;
    __threadfence_system();
    record->failure = report.failure;
}

// Report a temporary error. The first report is kept until the host has read it.
__device__ __forceinline__ void report_problem(const Domain& domain, const FailureReport& report) {
    if (atomicCAS(&domain.state->reported, 0, 1) == 0) write_report(&domain.record->problem, report);
}

// Report an error that does not stop the call, which leaves out the invalid part. Other ranks are not told.
__device__ __forceinline__ void report_notice(const Domain& domain, const FailureReport& report) {
    if (atomicCAS(&domain.state->noticed, 0, 1) == 0) write_report(&domain.record->notice, report);
}

// Report a permanent failure, to the host and to every peer, so that none of them waits for this rank.
__device__ __forceinline__ void report_failure(const Domain& domain, const FailureReport& report) {
    if (atomicExch(&domain.state->failed, 1) != 0) return;
    write_report(&domain.record->failure, report);
    for (int r = 0; r < domain.num_ranks; ++r)
        store_release_system(&domain.mailbox[r]->failed[domain.rank], report.failure);
}

// Whether kernels do nothing: for good after a permanent failure, else until the host has raised the error. All ranks
// skip calls from the same one on, however far their hosts have run ahead, and execute calls made after the error.
__device__ __forceinline__ bool is_stopped(const Domain& domain) {
    return domain.state->failed != 0 || domain.state->frozen != 0;
}

// Whether a peer, or another warp of this rank, has failed.
__device__ __forceinline__ bool any_rank_failed(const Domain& domain, int phase, int expected) {
    const Mailbox* own = domain.mailbox[domain.rank];
    for (int r = 0; r < domain.num_ranks; ++r) {
        const int failure = load_relaxed_system(&own->failed[r]);
        if (failure == kNoFailure) continue;
        report_failure(domain, {kPeerFailed, phase, r, 0, expected, failure});
        return true;
    }
    return false;
}

// -- waits ------------------------------------------------------------

// Spin until arrived(value of the flag). Returns false after the timeout, after a failure of any rank, or if
// disturbed() returns true, having reported why the wait cannot end. The caller then continues without the data, the
// kernel ends, and the host raises.
template <typename Arrived, typename Disturbed>
__device__ __forceinline__ bool wait_for(const Domain& domain, const int* flag, int expected, int phase, int peer,
                                         const Arrived& arrived, const Disturbed& disturbed) {
    int seen = load_acquire_system(flag);
    if (arrived(seen)) return true;
    const uint64_t start = global_nanoseconds();
    while (true) {
#pragma unroll 1
        for (int spin = 0; spin < 64; ++spin) {
            seen = load_acquire_system(flag);
            if (arrived(seen)) {
                if (domain.record_waits) atomicAdd(&domain.state->wait_nanoseconds[peer], global_nanoseconds() - start);
                return true;
            }
        }
        if (any_rank_failed(domain, phase, expected) || disturbed()) return false;
        if (global_nanoseconds() - start > domain.timeout_nanoseconds) {
            report_failure(domain, {kTimeout, phase, peer, 0, expected, seen});
            return false;
        }
    }
}

// -- the end of a kernel ------------------------------------------------------------

// Returns true in all threads of the last block to arrive, and resets the counter. The writes of the other blocks to
// this rank's memory are then visible, with kPeers also their writes to the memory of peers.
template <bool kPeers>
__device__ __forceinline__ bool last_block_done(int* blocks_done) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        if (kPeers)
            __threadfence_system();
        else
            __threadfence();
        last = atomicAdd(blocks_done, 1) == static_cast<int>(gridDim.x) - 1;
        if (last) *blocks_done = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// Fill the outputs of a failed call with 0xff, which is NaN in fp32, bf16, fp16, e4m3 and e8m0. Call with all threads
// of the block.
__device__ __forceinline__ void poison(void* memory, int64_t bytes) {
    for (int64_t i = threadIdx.x; i < bytes; i += blockDim.x) static_cast<signed char*>(memory)[i] = -1;
}

}  // namespace deepep_moe
