// Place: the last step of a plan, once the messages of all ranks have arrived: the expert row of each route, by expert,
// then received row, then top-k position. A block for each local expert goes over all received rows; one more block
// writes the counts.
//
// Places depend on counts and positions alone, so the order of rows is a function of the routing.
#include "device/block.cuh"
#include "local/args.h"

namespace deepep_moe {

namespace {

constexpr int kThreads = 1024;
constexpr int kLoads = 8;  // expert indices of a row that a thread loads at once

// Rows received from the ranks before each, [R + 1]. All threads of the block call.
__device__ __forceinline__ void sum_sources(const PlaceArgs& args, int* before, int* warp_sums) {
    const int ranks = args.messages.num_ranks;
    int sum = 0;
    for (int base = 0; base < ranks; base += kThreads) {
        const int source = base + threadIdx.x;
        int all;
        const int first =
            sum + block_exclusive_sum(source < ranks ? static_cast<int>(args.messages.tokens(source, args.rank)) : 0,
                                      warp_sums, all);
        if (source < ranks) before[source] = first;
        sum += all;
    }
    if (threadIdx.x == 0) before[ranks] = sum;
    __syncthreads();
}

// Received row n as its source wrote it: the token and K experts.
__device__ __forceinline__ const int* received_row(const PlaceArgs& args, const int* before, int n) {
    int source = 0, end = args.messages.num_ranks;  // the last source with at most n rows before it
    while (end - source > 1) {
        const int middle = (source + end) / 2;
        (before[middle] <= n ? source : end) = middle;
    }
    return args.messages.row(source, n - before[source], args.num_topk);
}

// Rows of a local expert, and rounded up to the alignment.
__device__ __forceinline__ int routes_to(const PlaceArgs& args, int expert) {
    int routes = 0;
    const int global = args.rank * args.local_experts + expert;
    for (int r = 0; r < args.messages.num_ranks; ++r) routes += static_cast<int>(args.messages.routes(r, global));
    return routes;
}

__device__ __forceinline__ int padded(const PlaceArgs& args, int routes) {
    return (routes + args.alignment - 1) / args.alignment * args.alignment;
}

// Everything but expert rows; the route's local expert, or -1. The threads of all blocks share the work.
__device__ __forceinline__ void copy_received(const PlaceArgs& args, const int* before) {
    const int topk = args.num_topk, words = 1 + 2 * topk, first_expert = args.rank * args.local_experts;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
    for (int64_t i = thread; i < static_cast<int64_t>(args.max_recv) * words; i += threads) {
        const int n = static_cast<int>(i / words), word = static_cast<int>(i % words);
        int value = -1;
        if (n < args.num_received) {
            const int* row = received_row(args, before, n);
            if (word == 0) {
                value = row[0];
            } else {
                const int local = row[1 + (word - 1) % topk] - first_expert;
                const bool owned = local >= 0 && local < args.local_experts;
                if (word > topk && owned) continue;  // place_expert writes it
                if (owned) value = local;
            }
        }
        args.received[i] = value;
    }
}

// Expert rows of one local expert.
__device__ __forceinline__ void place_expert(const PlaceArgs& args, const int* before, int expert, int* warp_sums) {
    int rows = 0, first;  // of the experts before this one
    for (int e = threadIdx.x; e < expert; e += kThreads) rows += padded(args, routes_to(args, e));
    block_exclusive_sum(rows, warp_sums, first);
    const int topk = args.num_topk, words = 1 + 2 * topk, global = args.rank * args.local_experts + expert;
    int next = first;
    for (int base = 0; base < args.num_received; base += kThreads) {
        const int n = base + threadIdx.x;
        const int* routes = nullptr;
        int found = 0, all;
        if (n < args.num_received) {
            routes = received_row(args, before, n) + 1;
            for (int first_k = 0; first_k < topk; first_k += kLoads) {
                int expert[kLoads];
#pragma unroll
                for (int u = 0; u < kLoads; ++u) expert[u] = first_k + u < topk ? routes[first_k + u] : -1;
#pragma unroll
                for (int u = 0; u < kLoads; ++u) found += expert[u] == global;
            }
        }
        int row = next + block_exclusive_sum(found, warp_sums, all);
        if (found) {
            for (int k = 0; k < topk; ++k) {
                if (routes[k] != global) continue;
                args.received[static_cast<int64_t>(n) * words + 1 + topk + k] = row;
                args.row_recv[row++] = n;
            }
        }
        next += all;
    }
    const int end = first + padded(args, next - first);
    for (int row = next + threadIdx.x; row < end; row += kThreads) args.row_recv[row] = -1;
}

// Plan.counted, and the rows behind the last group.
__device__ __forceinline__ void write_counts(const PlaceArgs& args, int* warp_sums) {
    const int ranks = args.messages.num_ranks, experts = args.local_experts;
    for (int destination = threadIdx.x; destination < ranks; destination += kThreads) {
        int64_t rows = 0;
        for (int source = 0; source < ranks; ++source) {
            rows += args.messages.tokens(source, destination);
            args.counted[static_cast<int64_t>(source) * ranks + destination] = rows;
        }
    }
    int64_t* counts = args.counted + static_cast<int64_t>(ranks) * ranks;
    int64_t* offsets = counts + experts;
    int end = 0;
    for (int base = 0; base < experts; base += kThreads) {
        const int e = base + threadIdx.x;
        const int routes = e < experts ? routes_to(args, e) : 0;
        int all;
        const int rows = args.num_topk > 0 && e < experts ? padded(args, routes) : 0;
        const int offset = end + block_exclusive_sum(rows, warp_sums, all);
        if (e < experts) {
            counts[e] = routes;
            offsets[e] = offset;
        }
        end += all;
    }
    if (threadIdx.x == 0) offsets[experts] = end;
    for (int row = end + threadIdx.x; row < args.max_rows; row += kThreads) args.row_recv[row] = -1;
}

__global__ void __launch_bounds__(kThreads) place_kernel(const __grid_constant__ PlaceArgs args) {
    __shared__ int warp_sums[kThreads / kWarpSize];
    extern __shared__ int before[];  // [R + 1]
    sum_sources(args, before, warp_sums);
    copy_received(args, before);
    if (static_cast<int>(blockIdx.x) == args.local_experts)
        write_counts(args, warp_sums);
    else if (args.num_topk > 0)
        place_expert(args, before, blockIdx.x, warp_sums);
}

}  // namespace

cudaError_t launch_place(const PlaceArgs& args, cudaStream_t stream) {
    const size_t shared = (args.messages.num_ranks + 1) * sizeof(int);
    place_kernel<<<args.local_experts + 1, kThreads, shared, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
