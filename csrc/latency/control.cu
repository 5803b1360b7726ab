// Announcements, masks, and the barrier that ends masks.
#include "latency/packets.cuh"

namespace deepep_moe::latency {

namespace {

__global__ void __launch_bounds__(kWarpSize)
    announce_kernel(const __grid_constant__ Runtime rt, const __grid_constant__ Facts facts, bool withdrawn) {
    if (!is_stopped(rt.domain)) send_early(rt, next_epoch(rt.local->epochs[kDispatch][0]), facts, withdrawn);
}

__global__ void set_mask_kernel(const __grid_constant__ Runtime rt, int rank) { rt.local->masked[rank] = 1; }

__global__ void query_mask_kernel(const __grid_constant__ Runtime rt, int* status) {
    if (threadIdx.x < rt.domain.num_ranks) status[threadIdx.x] = rt.local->masked[threadIdx.x] != 0;
}

// A barrier in two halves. Each rank sends its epochs and continues with the largest of all. When a rank's first half
// is seen, its earlier kernels have ended, so none of their rows is in flight. Rows left by masked ranks are cleared
// between the halves; no rank sends new rows before all have reached the second.
__global__ void __launch_bounds__(kWarpSize)
    meet_kernel(const __grid_constant__ Runtime rt, bool second, RankMask lift) {
    const Domain& domain = rt.domain;
    LocalState* local = rt.local;
    const int r = threadIdx.x, number = next_epoch(local->meetings);
    const Waiting waiting{rt, kDispatch, number};
    int epochs[kNumKinds] = {local->epochs[kDispatch][0], local->epochs[kCombine][0]};
    const bool invited = r < domain.num_ranks && (!waiting.is_masked(r) || (lift >> r & 1));
    __syncwarp();
    if (invited) {
        local->masked[r] = 0;  // so that it is waited for
        __threadfence_system();
        store_packet(&rt.control[r]->meeting[second][domain.rank], {epochs[kDispatch], epochs[kCombine], 0, number});
        const int4* from = &rt.control[domain.rank]->meeting[second][r];
        int4 packet;
        const auto arrived = [&] { return (packet = load_packet(from)).w == number; };
        if (waiting.thread(r, arrived, packet.w)) {
            __threadfence_system();
            epochs[kDispatch] = packet.x;
            epochs[kCombine] = packet.y;
        }
    }
    __syncwarp();
    if (!second) return;
    for (int kind = 0; kind < kNumKinds; ++kind) {
        int furthest = epochs[kind];
#pragma unroll
        for (int d = kWarpSize / 2; d > 0; d /= 2) {
            const int other = __shfl_xor_sync(kFullMask, furthest, d);
            if (reached(other, furthest)) furthest = other;
        }
        for (int b = r; b < kMaxBlocks; b += kWarpSize) local->epochs[kind][b] = furthest;
        if (r < 2) local->consumed[2 * kind + ((furthest - r) & 1)] = furthest - r;
    }
    if (r == 0) local->meetings = number;
}

}  // namespace

cudaError_t launch_announce(const Runtime& runtime, const Facts& facts, bool withdrawn, cudaStream_t stream) {
    announce_kernel<<<1, kWarpSize, 0, stream>>>(runtime, facts, withdrawn);
    return cudaGetLastError();
}

cudaError_t launch_set_mask(const Runtime& runtime, int rank, cudaStream_t stream) {
    set_mask_kernel<<<1, 1, 0, stream>>>(runtime, rank);
    return cudaGetLastError();
}

cudaError_t launch_query_mask(const Runtime& runtime, int* status, cudaStream_t stream) {
    query_mask_kernel<<<1, kMaxRanks, 0, stream>>>(runtime, status);
    return cudaGetLastError();
}

cudaError_t launch_meet(const Runtime& runtime, bool second, RankMask lift, cudaStream_t stream) {
    meet_kernel<<<1, kWarpSize, 0, stream>>>(runtime, second, lift);
    return cudaGetLastError();
}

}  // namespace deepep_moe::latency
