// Layout: which rank and which expert gets which token, counted on this rank alone (get_dispatch_layout).
#include "device/tile.cuh"

namespace deepep_moe {

namespace {

__global__ void __launch_bounds__(kTileEntries) layout_kernel(const __grid_constant__ LayoutArgs args) {
    __shared__ Tile tile;
    __shared__ int routes[kMaxExperts];
    const int ranks = args.runtime.num_ranks;
    tile.read(args.runtime, args.topk_idx, nullptr, args.num_tokens, args.num_topk, args.num_experts, true);
    count_routes(tile, args.num_topk, args.num_experts, routes);

    for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x)
        if (routes[e]) atomicAdd(&args.num_tokens_per_expert[e], routes[e]);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
    for (int r = warp; r < ranks; r += warps) {
        const int tokens = tile.count_tokens_to(1u << r);
        if (lane == 0) atomicAdd(&args.num_tokens_per_rank[r], tokens);
    }
    if (args.num_tokens_per_node) {
        const unsigned node = args.ranks_per_node < 32 ? (1u << args.ranks_per_node) - 1 : ~0u;
        for (int n = warp; n < ranks / args.ranks_per_node; n += warps) {
            const int tokens = tile.count_tokens_to(node << (n * args.ranks_per_node));
            if (lane == 0) atomicAdd(&args.num_tokens_per_node[n], tokens);
        }
    }
    for (int i = threadIdx.x; i < tile.count * ranks; i += blockDim.x)
        args.is_token_in_rank[static_cast<int64_t>(tile.first) * ranks + i] = tile.member[i / ranks] >> (i % ranks) & 1;
}

}  // namespace

cudaError_t launch_layout(const LayoutArgs& args, cudaStream_t stream) {
    const int per_tile = tile_tokens(args.num_topk);
    const int tiles = (args.num_tokens + per_tile - 1) / per_tile;
    if (tiles == 0) return cudaSuccess;
    layout_kernel<<<tiles, kTileEntries, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
