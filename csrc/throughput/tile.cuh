// One tile of tokens: the ranks and experts of each token, and their counts.
#pragma once

#include "device/wait.cuh"
#include "throughput/args.h"

namespace deepep_moe {

// In shared memory, for the tile of this block.
struct Tile {
    int first, count;              // tokens
    RankMask member[kTileTokens];  // bit r: the token goes to rank r
    int expert[kTileEntries];      // [count, K] expert of each route, or -1

    // Call with all threads of the block; a thread per route. Indices out of range are reported and count as dropped.
    __device__ __forceinline__ void read(const Runtime& rt, const int64_t* topk_idx, const bool* given_membership,
                                         int num_tokens, int num_topk, int num_experts, bool report) {
        const int ranks = rt.domain.num_ranks;
        const int per_tile = tile_tokens(num_topk), experts_per_rank = num_experts / ranks;
        const int start = blockIdx.x * per_tile, tokens = min(per_tile, num_tokens - start);
        if (threadIdx.x == 0) {
            first = start;
            count = tokens;
        }
        if (threadIdx.x < kTileTokens) member[threadIdx.x] = 0;
        __syncthreads();
        if (threadIdx.x < tokens * num_topk) {
            const int64_t given = topk_idx[static_cast<int64_t>(start) * num_topk + threadIdx.x];
            const bool routed = given >= 0 && given < num_experts;
            expert[threadIdx.x] = routed ? static_cast<int>(given) : -1;
            if (routed && !given_membership)
                atomicOr(&member[threadIdx.x / num_topk], RankMask{1} << (static_cast<int>(given) / experts_per_rank));
            if (report && !routed && given != -1) {
                rt.local->bad_routes = 1;
                report_problem(rt.domain,
                               {kBadExpert, kPlanCounts, rt.domain.rank, 0, num_experts, static_cast<int>(given)});
            }
        }
        if (given_membership) {
            for (int i = threadIdx.x; i < tokens * ranks; i += blockDim.x)
                if (given_membership[static_cast<int64_t>(start) * ranks + i])
                    atomicOr(&member[i / ranks], RankMask{1} << (i % ranks));
        }
        __syncthreads();
    }

    // A bit for each of the 32 tokens from `begin` that goes to any rank in `ranks`. Call with the whole warp.
    __device__ __forceinline__ unsigned tokens_to(RankMask ranks, int begin) const {
        const int t = begin + threadIdx.x % kWarpSize;
        return __ballot_sync(kFullMask, t < count && (member[t] & ranks) != 0);
    }
    // Number of tokens of the tile that go to any rank in `ranks`. Call with the whole warp.
    __device__ __forceinline__ int count_tokens_to(RankMask ranks) const {
        int tokens = 0;
        for (int begin = 0; begin < kTileTokens; begin += kWarpSize) tokens += __popc(tokens_to(ranks, begin));
        return tokens;
    }
};

// Count the routes of the tile to each expert into routes [E], in shared memory.
__device__ __forceinline__ void count_routes(const Tile& tile, int num_topk, int num_experts, int* routes) {
    for (int e = threadIdx.x; e < num_experts; e += blockDim.x) routes[e] = 0;
    __syncthreads();
    if (threadIdx.x < tile.count * num_topk && tile.expert[threadIdx.x] >= 0)
        atomicAdd(&routes[tile.expert[threadIdx.x]], 1);
    __syncthreads();
}

}  // namespace deepep_moe
