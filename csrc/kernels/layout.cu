// Layout: which rank and which expert gets which token, counted per tile of tokens and in total.
#include "device/flags.cuh"
#include "device/membership.cuh"

namespace deepep_moe {

__global__ void __launch_bounds__(kTileEntries) layout_kernel(const __grid_constant__ LayoutArgs args) {
    __shared__ unsigned member[kTileTokens];  // bit r: the token goes to rank r
    __shared__ int routes[kMaxExperts];
    const int per_tile = tile_tokens(args.num_topk);
    const int first = blockIdx.x * per_tile;
    const int count = min(per_tile, args.num_tokens - first);

    for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x) routes[e] = 0;
    read_membership(args.topk_idx, args.given_membership, first, count, args.num_topk, args.num_experts,
                    args.num_ranks, member);
    for (int i = threadIdx.x; i < count * args.num_topk; i += blockDim.x) {
        const int64_t e = args.topk_idx[static_cast<int64_t>(first) * args.num_topk + i];
        if (e >= 0 && e < args.num_experts) {
            atomicAdd(&routes[e], 1);
        } else if (e != -1) {
            args.runtime.local->bad_input = 1;
            report_problem(args.runtime, kBadExpert, kPlanCounts, args.runtime.rank, 0, args.num_experts,
                           static_cast<int>(e));
        }
    }
    __syncthreads();

    for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x) {
        if (args.tile_experts) args.tile_experts[static_cast<int64_t>(blockIdx.x) * args.num_experts + e] = routes[e];
        if (args.num_tokens_per_expert && routes[e]) atomicAdd(&args.num_tokens_per_expert[e], routes[e]);
    }
    for (int r = threadIdx.x; r < args.num_ranks; r += blockDim.x) {
        int tokens = 0;
        for (int t = 0; t < count; ++t) tokens += member[t] >> r & 1;
        if (args.tile_ranks) args.tile_ranks[blockIdx.x * args.num_ranks + r] = tokens;
        if (args.num_tokens_per_rank && tokens) atomicAdd(&args.num_tokens_per_rank[r], tokens);
    }
    if (args.num_tokens_per_node) {
        const unsigned node_mask = args.ranks_per_node < 32 ? (1u << args.ranks_per_node) - 1 : ~0u;
        for (int n = threadIdx.x; n < args.num_ranks / args.ranks_per_node; n += blockDim.x) {
            int tokens = 0;
            for (int t = 0; t < count; ++t) tokens += (member[t] >> (n * args.ranks_per_node) & node_mask) != 0;
            if (tokens) atomicAdd(&args.num_tokens_per_node[n], tokens);
        }
    }
    if (args.is_token_in_rank) {
        for (int i = threadIdx.x; i < count * args.num_ranks; i += blockDim.x)
            args.is_token_in_rank[static_cast<int64_t>(first) * args.num_ranks + i] =
                member[i / args.num_ranks] >> (i % args.num_ranks) & 1;
    }
}

cudaError_t launch_layout(const LayoutArgs& args, cudaStream_t stream) {
    const int per_tile = tile_tokens(args.num_topk);
    const int tiles = (args.num_tokens + per_tile - 1) / per_tile;
    if (tiles == 0) return cudaSuccess;
    layout_kernel<<<tiles, kTileEntries, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
