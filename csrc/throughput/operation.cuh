// Begin and end of an operation (dispatch, combine, meet): ranks enter it, check that all are in the same one, and
// leave.
#pragma once

#include "device/wait.cuh"
#include "throughput/args.h"

namespace deepep_moe {

// Tell the peers that this rank has entered the operation.
__device__ __forceinline__ void enter_operation(const Runtime& rt, int epoch, const Operation& operation) {
    if (blockIdx.x == 0 && threadIdx.x < rt.domain.num_ranks) {
        Control* peer = rt.control[threadIdx.x];
        *reinterpret_cast<int4*>(&peer->operation[epoch & 1][rt.domain.rank]) =
            *reinterpret_cast<const int4*>(&operation);
        store_release_system(&peer->entered[rt.domain.rank], epoch);
    }
}

// Whether a peer that has entered this epoch is in the same operation. Reports an error if not.
__device__ __forceinline__ bool same_operation(const Runtime& rt, int epoch, const Operation& own, int peer,
                                               int phase) {
    const volatile Operation& theirs = rt.control[rt.domain.rank]->operation[epoch & 1][peer];
    const int kind = theirs.kind;
    if (own.kind == Operation::kRefuse) return true;  // this rank moves no rows, so it need not match
    if (kind == Operation::kRefuse) {
        rt.local->spoiled = 1;
        report_problem(rt.domain, {kBadPeerInput, kRefused, peer, 0, 0, 0});
        return false;
    }
    FailureReport report{kMismatch, kDispatchStart, peer, kNumFields, 0, 0};
    const auto compare = [&](Field field, int mine, int seen) {
        if (report.field == kNumFields && mine != seen) report = {kMismatch, phase, peer, field, mine, seen};
    };
    compare(kOperation, own.kind, kind);
    const bool grows = own.kind == Operation::kGrow;
    compare(grows ? kMaxTokens : kPlanNumber, own.plan, theirs.plan);
    compare(kRowBytes, own.pitch, theirs.pitch);
    compare(grows ? kNumTopk : kFormat, own.format, theirs.format);
    if (report.field == kNumFields) return true;
    report_failure(rt.domain, report);
    return false;
}

// Whether the peer is in another operation or will not enter this one, so that what this rank waits for will not
// arrive. Called while waiting, so that ranks in different calls find out before the timeout.
__device__ __forceinline__ bool out_of_step(const Runtime& rt, int epoch, int peer, int phase) {
    const Control* own = rt.control[rt.domain.rank];
    if (load_acquire_system(&own->entered[rt.domain.rank]) != epoch)
        return false;  // block 0 has not published this rank's operation yet
    const Operation mine = own->operation[epoch & 1][rt.domain.rank];
    const auto has_entered = [&] { return reached(load_acquire_system(&own->entered[peer]), epoch); };
    if (has_entered()) return !same_operation(rt, epoch, mine, peer, phase);
    // The peer exchanges the counts of a plan that this rank has not begun.
    const int plan = next_epoch(rt.local->plan_epoch);
    if (load_tagged_system(&own->counts[plan & 1][peer][0]).tag != plan) return false;
    if (has_entered()) return false;  // it entered this operation in the meantime
    report_failure(rt.domain, {kMismatch, phase, peer, kOperation, mine.kind, Operation::kPlan});
    return true;
}

// Whether the plan is valid. All ranks get the same answer, so none of them waits in an operation that others skip.
__device__ __forceinline__ bool is_usable(const int64_t* rank_prefix) { return rank_prefix[0] >= 0; }

// The waits are not inlined: their code is long, and would take registers and instruction cache from the loops that
// move rows.
inline __device__ __noinline__ void keep_waiting(const Runtime& rt, const int* flag, int epoch, int phase, int peer) {
    wait_for(
        rt.domain, flag, epoch, phase, peer, [&](int seen) { return seen == epoch; },
        [&] { return out_of_step(rt, epoch, peer, phase); });
}

// Wait for a row that a peer sends in this operation: its flag then equals this epoch. If the row does not arrive, the
// caller continues without it, and leave_operation() marks the outputs as wrong.
__device__ __forceinline__ void wait_row(const Runtime& rt, const int* flag, int epoch, Phase phase, int peer) {
    if (load_acquire_system(flag) != epoch) keep_waiting(rt, flag, epoch, phase, peer);
}

// Wait until the peer has entered this operation, and compare.
inline __device__ __noinline__ void meet_peer(const Runtime& rt, int epoch, int phase, int peer) {
    const bool entered = wait_for(
        rt.domain, &rt.control[rt.domain.rank]->entered[peer], epoch, phase, peer,
        [&](int seen) { return reached(seen, epoch); }, [&] { return out_of_step(rt, epoch, peer, phase); });
    if (entered)
        same_operation(rt, epoch, rt.control[rt.domain.rank]->operation[epoch & 1][rt.domain.rank], peer, phase);
}

// End of an operation: waits until every peer has entered it, and compares. A peer that has entered this operation has
// finished the one before, so the half of staging that the next operation writes is free, without another barrier.
// Returns true in all threads of one block if the outputs are wrong.
__device__ __forceinline__ bool leave_operation(const Runtime& rt, int epoch, Phase phase) {
    if (blockIdx.x == 0) {
        __syncthreads();  // after enter_operation(), whose values are compared
        if (threadIdx.x < rt.domain.num_ranks) meet_peer(rt, epoch, phase, threadIdx.x);
    }
    if (!last_block_done<false>(&rt.local->blocks_done)) return false;
    const bool wrong = rt.domain.state->failed || rt.local->spoiled;
    __syncthreads();
    if (threadIdx.x == 0) {
        if (rt.local->spoiled) rt.domain.state->frozen = 1;
        rt.local->spoiled = 0;
        rt.local->next_item = 0;
        rt.local->data_epoch = epoch;
    }
    return wrong;
}

}  // namespace deepep_moe
