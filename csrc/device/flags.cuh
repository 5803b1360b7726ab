// Waiting for a peer, with a bound, and saying so when the bound is reached.
#pragma once

#include "device/ptx.cuh"
#include "kernels/args.h"

namespace deepep_moe {

// Tell the host what is wrong with the input. The protocol goes on.
__device__ __forceinline__ void report_problem(const Runtime& rt, Failure failure, int phase, int peer, int field,
                                               int expected, int seen) {
    volatile HostStatus* status = rt.status;
    status->phase = phase;
    status->peer = peer;
    status->field = field;
    status->expected = expected;
    status->seen = seen;
    __threadfence_system();
    status->failure = failure;
}

// Nothing after this can be trusted: keep the first failure of this rank for the host and tell every peer, so that
// none of them waits in vain.
__device__ __forceinline__ void report_failure(const Runtime& rt, Failure failure, int phase, int peer, int field,
                                               int expected, int seen) {
    if (atomicCAS(&rt.local->failed, 0, 1) != 0) return;
    report_problem(rt, failure, phase, peer, field, expected, seen);
    for (int r = 0; r < rt.num_ranks; ++r) store_release_system(&rt.control[r]->failed[rt.rank], 1);
}

// Epochs wrap around; compare them by distance.
__device__ __forceinline__ bool reached(int seen, int expected) { return seen - expected >= 0; }

// Spin until `flag` reaches `epoch`. False after the timeout or once any rank has failed: the caller then carries
// on without waiting, the kernel ends, and the host raises.
__device__ __forceinline__ bool wait_flag(const Runtime& rt, const int* flag, int epoch, Phase phase, int peer) {
    int seen = load_acquire_system(flag);
    if (reached(seen, epoch)) return true;
    const uint64_t start = global_nanoseconds();
    const Control* own = rt.control[rt.rank];
    while (true) {
#pragma unroll 1
        for (int spin = 0; spin < 64; ++spin) {
            seen = load_acquire_system(flag);
            if (reached(seen, epoch)) {
                if (rt.record_waits) atomicAdd(&rt.local->wait_nanoseconds[peer], global_nanoseconds() - start);
                return true;
            }
        }
        for (int r = 0; r < rt.num_ranks; ++r) {
            if (load_relaxed_system(&own->failed[r]) != 0) {
                report_failure(rt, kPeerFailed, phase, r, 0, epoch, seen);
                return false;
            }
        }
        if (global_nanoseconds() - start > rt.timeout_nanoseconds) {
            report_failure(rt, kTimeout, phase, peer, 0, epoch, seen);
            return false;
        }
    }
}

// A dispatch or combine opens by telling the peers that this rank is in it, and with what.
__device__ __forceinline__ void enter_operation(const Runtime& rt, int epoch, Operation operation) {
    if (blockIdx.x == 0 && threadIdx.x < rt.num_ranks) {
        Control* peer = rt.control[threadIdx.x];
        peer->operation[epoch & 1][rt.rank] = operation;
        store_release_system(&peer->entered[rt.rank], epoch);
    }
}

// ... and ends only when every peer is in it too. A peer that has entered this operation has finished the one
// before, so the half of staging which the next operation writes is free: no other barrier is needed.
__device__ __forceinline__ void await_peers(const Runtime& rt, int epoch, Operation operation, Phase phase) {
    if (blockIdx.x == 0 && threadIdx.x < rt.num_ranks) {
        const int peer = threadIdx.x;
        const Control* own = rt.control[rt.rank];
        if (!wait_flag(rt, &own->entered[peer], epoch, phase, peer)) return;
        const volatile Operation* theirs = &own->operation[epoch & 1][peer];
        if (theirs->kind != operation.kind)
            report_failure(rt, kMismatch, phase, peer, Operation::kKind, operation.kind, theirs->kind);
        else if (theirs->row_bytes != operation.row_bytes)
            report_failure(rt, kMismatch, phase, peer, Operation::kRowBytes, operation.row_bytes, theirs->row_bytes);
    }
}

// True in all threads of the last block to arrive: what the others have written in this rank's memory is then complete,
// with kPeers also what they have written in peers' memory.
template <bool kPeers>
__device__ __forceinline__ bool last_block_done(LocalState* local) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        if (kPeers)
            __threadfence_system();
        else
            __threadfence();
        last = atomicAdd(&local->blocks_done, 1) == static_cast<int>(gridDim.x) - 1;
        if (last) local->blocks_done = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// The end of a dispatch or combine: make the counters ready for the next one.
__device__ __forceinline__ void leave_operation(const Runtime& rt, int epoch) {
    if (last_block_done<false>(rt.local) && threadIdx.x == 0) {
        rt.local->next_item = 0;
        rt.local->data_epoch = epoch;
    }
}

}  // namespace deepep_moe
