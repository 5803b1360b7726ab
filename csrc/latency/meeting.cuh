// The barrier that ends masks.
#pragma once

#include "latency/packets.cuh"

namespace deepep_moe::DEEPEP_MOE_WIDTH::latency {

// A barrier in two halves, by a block of kMaxRanks threads, one per rank. Each rank sends its epochs and continues with
// the largest of all. When a rank's first half is seen, its earlier kernels have ended, so none of their rows is in
// flight. Rows left by masked ranks are cleared between the halves; no rank sends new rows before all have reached the
// second.
//
// tell(rank, packet) stores a packet into Control::meeting of that rank; come(rank, number, packet) reads the packet of
// that rank and returns whether it belongs to meeting `number`.
template <typename Tell, typename Come>
__device__ __forceinline__ void meet(const Runtime& rt, bool second, const RankSet& lift, const Tell& tell,
                                     const Come& come) {
    __shared__ int of_ranks[kNumKinds * kMaxRanks];  // epochs: [kind][rank]
    const Domain& domain = rt.domain;
    LocalState* local = rt.local;
    const int r = threadIdx.x, number = next_epoch(local->meetings);
    const Waiting waiting{rt, kDispatch, number};
    int epochs[kNumKinds] = {local->epochs[kDispatch][0], local->epochs[kCombine][0]};
    const bool invited = r < domain.num_ranks && (!waiting.is_masked(r) || lift.has(r));
    __syncthreads();
    if (invited) {
        local->masked[r] = 0;  // so that it is waited for
        __threadfence_system();
        tell(r, int4{epochs[kDispatch], epochs[kCombine], 0, number});
        int4 packet{};
        if (waiting.thread(r, [&] { return come(r, number, packet); }, packet.w)) {
            __threadfence_system();
            epochs[kDispatch] = packet.x;
            epochs[kCombine] = packet.y;
        }
    }
    for (int kind = 0; kind < kNumKinds; ++kind) of_ranks[kind * kMaxRanks + r] = epochs[kind];
    __syncthreads();
    if (!second) return;
    for (int kind = 0; kind < kNumKinds; ++kind) {
        int furthest = of_ranks[kind * kMaxRanks];
        for (int other = 1; other < domain.num_ranks; ++other)
            if (const int epoch = of_ranks[kind * kMaxRanks + other]; reached(epoch, furthest)) furthest = epoch;
        for (int b = r; b < kMaxBlocks; b += kMaxRanks) local->epochs[kind][b] = furthest;
        if (r < 2) local->consumed[2 * kind + ((furthest - r) & 1)] = furthest - r;
    }
    if (r == 0) local->meetings = number;
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH::latency
