// Announcements, masks, and the barrier that ends masks.
#include "latency/meeting.cuh"

namespace deepep_moe::DEEPEP_MOE_WIDTH::latency {

namespace {

__global__ void __launch_bounds__(kMaxRanks)
    announce_kernel(const __grid_constant__ Runtime rt, const __grid_constant__ Facts facts, bool withdrawn) {
    if (!is_stopped(rt.domain)) send_early(rt, next_epoch(rt.local->epochs[kDispatch][0]), facts, withdrawn);
}

__global__ void set_mask_kernel(const __grid_constant__ Runtime rt, int rank) { rt.local->masked[rank] = 1; }

__global__ void query_mask_kernel(const __grid_constant__ Runtime rt, int* status) {
    if (threadIdx.x < rt.domain.num_ranks) status[threadIdx.x] = rt.local->masked[threadIdx.x] != 0;
}

__global__ void __launch_bounds__(kMaxRanks)
    meet_kernel(const __grid_constant__ Runtime rt, bool second, const __grid_constant__ RankSet lift) {
    const int self = rt.domain.rank;
    meet(
        rt, second, lift,
        [&](int rank, int4 packet) { store_packet(&rt.control[rank]->meeting[second][self], packet); },
        [&](int rank, int number, int4& packet) {
            packet = load_packet(&rt.control[self]->meeting[second][rank]);
            return packet.w == number;
        });
}

}  // namespace

cudaError_t launch_announce(const Runtime& runtime, const Facts& facts, bool withdrawn, cudaStream_t stream) {
    announce_kernel<<<1, kMaxRanks, 0, stream>>>(runtime, facts, withdrawn);
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

cudaError_t launch_meet(const Runtime& runtime, bool second, const RankSet& lift, cudaStream_t stream) {
    meet_kernel<<<1, kMaxRanks, 0, stream>>>(runtime, second, lift);
    return cudaGetLastError();
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH::latency
