// Waiting for a peer, with a bound; the record of the first failure; epochs.
#pragma once

#include "device/ptx.cuh"
#include "runtime/domain.h"

namespace deepep_moe {

// -- epochs: numbers of calls, which wrap around ------------------------------------------------------------

// 0 is what memory holds before any call, so no call has it. What follows the last odd number is even: two calls in a
// row never use the same half of a double buffer.
__device__ __forceinline__ int next_epoch(int epoch) {
    const unsigned next = static_cast<unsigned>(epoch) + 1u;
    return static_cast<int>(next == 0u ? 2u : next);
}

// Whether a counter that only moves forward has come to `expected` (or further), by distance.
__device__ __forceinline__ bool reached(int seen, int expected) {
    return static_cast<unsigned>(seen) - static_cast<unsigned>(expected) < 0x80000000u;
}

// -- failures ------------------------------------------------------------

__device__ __forceinline__ void write_report(volatile FailureReport* record, const FailureReport& report) {
    record->phase = report.phase;
    record->peer = report.peer;
    record->field = report.field;
    record->expected = report.expected;
    record->seen = report.seen;
    __threadfence_system();
    record->failure = report.failure;
}

// Something is wrong that ranks can go on after. The first report stays until the host takes it.
__device__ __forceinline__ void report_problem(const Domain& domain, const FailureReport& report) {
    if (atomicCAS(&domain.state->reported, 0, 1) == 0) write_report(&domain.record->problem, report);
}

// Something was wrong that this call could leave out. No rank stops for it, and other ranks need not know.
__device__ __forceinline__ void report_notice(const Domain& domain, const FailureReport& report) {
    if (atomicCAS(&domain.state->noticed, 0, 1) == 0) write_report(&domain.record->notice, report);
}

// Nothing after this can be trusted: say so to the host and to every peer, so that none of them waits in vain.
__device__ __forceinline__ void report_failure(const Domain& domain, const FailureReport& report) {
    if (atomicExch(&domain.state->failed, 1) != 0) return;
    write_report(&domain.record->failure, report);
    for (int r = 0; r < domain.num_ranks; ++r)
        store_release_system(&domain.mailbox[r]->failed[domain.rank], report.failure);
}

// Kernels do nothing any more, or until the host has raised what went wrong. That way it does not matter how far a host
// has run ahead: calls are skipped from the same one on, on every rank, and work again from the first that follows the
// error.
__device__ __forceinline__ bool is_stopped(const Domain& domain) {
    return domain.state->failed != 0 || domain.state->frozen != 0;
}

// A peer, or another warp of this rank, has given up.
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

// Spin until arrived(value of the flag). False after the timeout, once any rank has failed, or once disturbed() says
// that what is waited for will not come and has reported it: the caller then goes on without, its kernel ends, the host
// raises.
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

// True in all threads of the last block to arrive, which leaves the counter as it was: what the others have written in
// this rank's memory is then complete, with kPeers also what they have written in peers' memory.
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

// Outputs of a call that failed, which must not pass for results: a byte of 0xff makes NaN in fp32, bf16, fp16, e4m3
// and e8m0. All threads of the block call.
__device__ __forceinline__ void poison(void* memory, int64_t bytes) {
    for (int64_t i = threadIdx.x; i < bytes; i += blockDim.x) static_cast<signed char*>(memory)[i] = -1;
}

}  // namespace deepep_moe
