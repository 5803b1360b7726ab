// Destinations: counts of this rank's tokens for each rank and expert, without communication (get_dispatch_layout). An
// index out of range counts as dropped; the plan made from it reports the error on all ranks.
#include "throughput/tile.cuh"

namespace deepep_moe {

namespace {

__global__ void __launch_bounds__(kTileEntries) destinations_kernel(const __grid_constant__ DestinationsArgs args) {
    __shared__ Tile tile;
    __shared__ int routes[kMaxExperts];
    const int ranks = args.runtime.domain.num_ranks;
    tile.read(args.runtime, args.topk_idx, nullptr, args.num_tokens, args.num_topk, args.num_experts, false);
    count_routes(tile, args.num_topk, args.num_experts, routes);

    for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x)
        if (routes[e]) atomicAdd(&args.num_tokens_per_expert[e], routes[e]);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
    for (int r = warp; r < ranks; r += warps) {
        const int tokens = tile.count_tokens_to(RankMask{1} << r);
        if (lane == 0) atomicAdd(&args.num_tokens_per_rank[r], tokens);
    }
    for (int i = threadIdx.x; i < tile.count * ranks; i += blockDim.x)
        args.is_token_in_rank[static_cast<int64_t>(tile.first) * ranks + i] = tile.member[i / ranks] >> (i % ranks) & 1;
}

}  // namespace

cudaError_t launch_destinations(const DestinationsArgs& args, cudaStream_t stream) {
    const int per_tile = tile_tokens(args.num_topk);
    const int tiles = (args.num_tokens + per_tile - 1) / per_tile;
    if (tiles == 0) return cudaSuccess;
    destinations_kernel<<<tiles, kTileEntries, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
