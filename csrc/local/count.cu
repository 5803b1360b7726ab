// Count: the first step of a plan, before anything is exchanged. A block for each rank numbers the tokens that go there
// in token order, counts the routes to that rank's experts and writes the routes of each row; one more block writes
// what concerns all ranks. Then `starts` adds up the rows for each rank.
#include <climits>

#include "device/block.cuh"
#include "local/args.h"

namespace deepep_moe {

namespace {

constexpr int kThreads = 1024;
constexpr int kLoads = 8;  // expert indices of a token that a thread loads at once

__device__ __forceinline__ void count_for_rank(const CountArgs& args, int rank) {
    __shared__ int warp_sums[kThreads / kWarpSize];
    const Messages& messages = args.messages;
    const int ranks = messages.num_ranks, local_experts = args.num_experts / ranks, topk = args.num_topk;
    const int first_expert = rank * local_experts;
    const bool counted = args.num_experts <= messages.expert_words;
    int64_t* routes = &messages.routes(rank, first_expert);  // to its experts, first in the message for itself
    const int max_rows = messages.max_rows(topk);
    for (int e = threadIdx.x; counted && e < local_experts; e += kThreads)
        routes[e] = topk > 0 ? 0 : args.given_expert_counts[first_expert + e];
    __syncthreads();
    int before = 0;  // tokens for this rank, of earlier iterations
    for (int base = 0; base < args.num_tokens; base += kThreads) {
        const int token = base + threadIdx.x;
        bool goes = false;
        if (token < args.num_tokens && topk == 0)
            goes = args.given_membership[static_cast<int64_t>(token) * ranks + rank];
        if (token < args.num_tokens) {
            const int64_t* experts = args.topk_idx + static_cast<int64_t>(token) * topk;
            for (int first = 0; first < topk; first += kLoads) {
                int64_t expert[kLoads];
#pragma unroll
                for (int u = 0; u < kLoads; ++u) expert[u] = first + u < topk ? experts[first + u] - first_expert : -1;
#pragma unroll
                for (int u = 0; u < kLoads; ++u) {
                    if (expert[u] < 0 || expert[u] >= local_experts) continue;
                    goes = true;
                    if (counted) atomicAdd(reinterpret_cast<unsigned long long*>(&routes[expert[u]]), 1ull);
                }
            }
        }
        int all;
        const int slot = before + block_exclusive_sum(goes, warp_sums, all);
        if (token < args.num_tokens) args.send_slot[static_cast<int64_t>(token) * ranks + rank] = goes ? slot : -1;
        if (goes && slot < max_rows) {
            int* row = messages.row(rank, slot, topk);
            *row = token;
            for (int k = 0; k < topk; ++k)
                row[1 + k] = static_cast<int>(args.topk_idx[static_cast<int64_t>(token) * topk + k]);
        }
        before += all;
    }
    for (int r = threadIdx.x; r < ranks; r += kThreads) messages.tokens(r, rank) = before;
    __syncthreads();
    for (int i = threadIdx.x; counted && i < ranks * local_experts; i += kThreads) {
        const int to = i / local_experts, e = i % local_experts;
        if (to != rank) messages.routes(to, first_expert + e) = routes[e];
    }
}

// The header, and between which expert indices the batch lies.
__device__ __forceinline__ void write_headers(const CountArgs& args) {
    __shared__ long long lowest, highest;
    if (threadIdx.x == 0) {
        lowest = LLONG_MAX;
        highest = LLONG_MIN;
    }
    __syncthreads();
    long long low = LLONG_MAX, high = LLONG_MIN;  // of this thread
    for (int64_t i = threadIdx.x; i < static_cast<int64_t>(args.num_tokens) * args.num_topk; i += kThreads) {
        const long long expert = args.topk_idx[i];
        low = expert < low ? expert : low;
        high = expert > high ? expert : high;
    }
#pragma unroll
    for (int d = kWarpSize / 2; d > 0; d /= 2) {
        const long long other_low = __shfl_xor_sync(kFullMask, low, d),
                        other_high = __shfl_xor_sync(kFullMask, high, d);
        low = other_low < low ? other_low : low;
        high = other_high > high ? other_high : high;
    }
    if (threadIdx.x % kWarpSize == 0) {
        atomicMin(&lowest, low);
        atomicMax(&highest, high);
    }
    __syncthreads();
    const bool any = lowest <= highest;
    for (int i = threadIdx.x; i < args.messages.num_ranks * Messages::kHeaderWords; i += kThreads) {
        const int rank = i / Messages::kHeaderWords, word = i % Messages::kHeaderWords;
        args.messages.of(rank)[word] = word == Messages::kLowest    ? (any ? lowest : -1)
                                       : word == Messages::kHighest ? (any ? highest : -1)
                                       : word == Messages::kMaxRecv ? args.max_recv
                                       : word == Messages::kMaxRows ? args.max_rows
                                                                    : args.header.words[word];
    }
}

__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ CountArgs args) {
    if (static_cast<int>(blockIdx.x) < args.messages.num_ranks)
        count_for_rank(args, blockIdx.x);
    else
        write_headers(args);
}

__global__ void __launch_bounds__(kThreads) starts_kernel(const __grid_constant__ StartsArgs args) {
    __shared__ int warp_sums[kThreads / kWarpSize];
    const int ranks = args.messages.num_ranks;
    const int own_rows = static_cast<int>(args.messages.tokens(args.rank, args.rank));
    int before = 0;  // rows for ranks of earlier iterations
    for (int base = 0; base < ranks; base += kThreads) {
        const int rank = base + threadIdx.x;
        const bool other = rank < ranks && rank != args.rank;
        int all;
        const int start =
            before +
            block_exclusive_sum(other ? static_cast<int>(args.messages.tokens(args.rank, rank)) : 0, warp_sums, all);
        if (other) {
            args.starts[rank] = start;
            args.starts[ranks + rank] = start + own_rows;
        }
        before += all;
    }
    if (threadIdx.x == 0) {
        args.starts[args.rank] = before;
        args.starts[ranks + args.rank] = 0;
    }
}

}  // namespace

cudaError_t launch_starts(const StartsArgs& args, cudaStream_t stream) {
    starts_kernel<<<1, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t launch_count(const CountArgs& args, cudaStream_t stream) {
    count_kernel<<<args.messages.num_ranks + 1, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
