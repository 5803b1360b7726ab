// The plan of several nodes, step by step: count the batch, digest the counts of all ranks, make the batch of the node,
// place the rows that the node's plan delivers.
#include "device/block.cuh"
#include "nodes/args.h"

namespace deepep_moe {

namespace {

constexpr int kThreads = 1024;
constexpr int kRowThreads = 256;
constexpr int kHistogramBlocks = 16;
constexpr int kWarps = kThreads / kWarpSize;

// 1. Count. A block for each rank, one for each rank of the rail, and some for routes to experts.

__device__ __forceinline__ int owner_of(const SummarizeArgs& args, int64_t route) {
    const int64_t expert = args.topk_idx[route];
    return expert < 0 || expert >= args.num_experts
               ? -1
               : static_cast<int>(expert) / (args.num_experts / args.map.num_ranks);
}

__device__ __forceinline__ void count_for_rank(const SummarizeArgs& args, int rank, int* warp_sums) {
    int before = 0;
    for (int base = 0; base < args.num_tokens; base += kThreads) {
        const int token = base + threadIdx.x;
        bool goes = false;
        for (int k = 0; token < args.num_tokens && k < args.num_topk; ++k)
            goes |= owner_of(args, static_cast<int64_t>(token) * args.num_topk + k) == rank;
        int all;
        const int slot = before + block_exclusive_sum(goes, warp_sums, all);
        if (token < args.num_tokens)
            args.send_slot[static_cast<int64_t>(token) * args.map.num_ranks + rank] = goes ? slot : -1;
        before += all;
    }
    if (threadIdx.x == 0) args.out.to_rank(0, rank) = before;
}

__device__ __forceinline__ void count_for_node(const SummarizeArgs& args, int rail_rank, int* warp_sums) {
    __shared__ int shares[kShares];
    if (threadIdx.x < kShares) shares[threadIdx.x] = 0;
    __syncthreads();
    const int node = static_cast<int>(args.map.rail_nodes[rail_rank]);
    int before = 0;
    for (int base = 0; base < args.num_tokens; base += kThreads) {
        const int token = base + threadIdx.x;
        bool goes = false;
        for (int k = 0; token < args.num_tokens && k < args.num_topk; ++k) {
            const int owner = owner_of(args, static_cast<int64_t>(token) * args.num_topk + k);
            goes |= owner >= 0 && args.map.node_of[owner] == node;
        }
        int all;
        const int position = before + block_exclusive_sum(goes, warp_sums, all);
        if (token < args.num_tokens)
            args.send_position[static_cast<int64_t>(token) * args.map.num_nodes + rail_rank] =
                goes && rail_rank != args.map.rail_rank ? position : -1;
        if (goes) atomicAdd(&shares[share_of(token, args.num_tokens)], 1);
        before += all;
    }
    __syncthreads();
    if (threadIdx.x < kShares) args.out.to_node(0, node, threadIdx.x) = shares[threadIdx.x];
}

__device__ __forceinline__ void add(int64_t* to, long long value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// Only indices that no expert has leave their trace in the lowest and the highest: 1 more than the index, else 0.
__device__ __forceinline__ void count_routes(const SummarizeArgs& args, int block) {
    const int64_t routes = static_cast<int64_t>(args.num_tokens) * args.num_topk;
    for (int64_t i = block * kThreads + threadIdx.x; i < routes; i += kHistogramBlocks * kThreads) {
        const long long expert = args.topk_idx[i];
        if (expert < -1) atomicMin(reinterpret_cast<long long*>(&args.out.head(0, Summary::kLowest)), expert + 1);
        if (expert >= args.num_experts)
            atomicMax(reinterpret_cast<long long*>(&args.out.head(0, Summary::kHighest)), expert + 1);
        if (expert >= 0 && expert < args.num_experts) add(&args.out.to_expert(0, static_cast<int>(expert)), 1);
    }
    if (block == 0 && threadIdx.x == 0) {
        args.out.head(0, Summary::kTokens) = args.num_tokens;
        args.out.head(0, Summary::kMaxRecv) = args.max_recv;
        args.out.head(0, Summary::kMaxRows) = args.max_rows;
    }
}

__global__ void __launch_bounds__(kThreads) summarize_kernel(const __grid_constant__ SummarizeArgs args) {
    __shared__ int warp_sums[kWarps];
    const int block = blockIdx.x, ranks = args.map.num_ranks, nodes = args.map.num_nodes;
    if (block < ranks)
        count_for_rank(args, block, warp_sums);
    else if (block < ranks + nodes)
        count_for_node(args, block - ranks, warp_sums);
    else
        count_routes(args, block - ranks - nodes);
}

// 2. Digest. One block.

__global__ void __launch_bounds__(kThreads) digest_kernel(const __grid_constant__ DigestArgs args) {
    __shared__ int warp_sums[kWarps];
    const NodeMap& map = args.map;
    const Summary& table = args.table;
    const int ranks = map.num_ranks, local = args.num_experts / ranks, thread = threadIdx.x;
    for (int destination = thread; destination < ranks; destination += kThreads) {
        int64_t rows = 0;
        for (int source = 0; source < ranks; ++source)
            args.counted[static_cast<int64_t>(source) * ranks + destination] = rows +=
                table.to_rank(source, destination);
    }
    int first = 0;  // of the padded group
    int64_t* expert_rows = args.counted + static_cast<int64_t>(ranks) * ranks;
    for (int base = 0; base < local; base += kThreads) {
        const int expert = base + thread;
        int64_t rows = 0;
        for (int source = 0; expert < local && source < ranks; ++source)
            rows += table.to_expert(source, map.rank * local + expert);
        const int padded = static_cast<int>((rows + args.alignment - 1) / args.alignment * args.alignment);
        int all;
        const int offset = first + block_exclusive_sum(expert < local ? padded : 0, warp_sums, all);
        if (expert < local) {
            expert_rows[expert] = rows;
            expert_rows[local + expert] = offset;
        }
        first += all;
    }
    if (thread == 0) expert_rows[2 * local] = first;
    const int columns = 1 + local;
    const auto rows_of = [&](int source, int column) {
        return column == 0 ? table.to_rank(source, map.rank) : table.to_expert(source, map.rank * local + column - 1);
    };
    for (int column = thread; column < columns; column += kThreads) {
        int64_t before = 0;
        for (int source = 0; source < ranks; ++source) {
            args.moved[static_cast<int64_t>(source) * columns + column] = before;
            before += rows_of(source, column);
        }
        before = 0;
        for (int run = 0; run < ranks; ++run) {
            const int source = static_cast<int>(map.runs[run]);
            args.moved[static_cast<int64_t>(source) * columns + column] -= before;
            before += rows_of(source, column);
        }
    }
    for (int i = thread; i < map.num_nodes * kShares; i += kThreads) {
        const int rail_rank = i / kShares, share = i % kShares;
        const bool own = rail_rank == map.rail_rank;
        args.sent[i] = own ? 0 : table.to_node(map.rank, static_cast<int>(map.rail_nodes[rail_rank]), share);
        args.received[i] = own ? 0 : table.to_node(static_cast<int>(map.rail_members[rail_rank]), map.node, share);
    }
    for (int i = thread; i < map.num_nodes; i += kThreads)
        args.rail_tokens[i] = table.head(static_cast<int>(map.rail_members[i]), Summary::kTokens);
}

// 3. The batch of the node. A block for each rank of the rail.

__global__ void __launch_bounds__(kThreads) batch_kernel(const __grid_constant__ BatchArgs args) {
    __shared__ int warp_sums[kWarps];
    const NodeMap& map = args.map;
    const int rail_rank = blockIdx.x, topk = args.num_topk, local = args.num_experts / map.num_ranks;
    const bool dropped = args.bad != nullptr && args.bad[0] != 0;
    int before = 0;
    for (int base = 0; base < args.room; base += kThreads) {
        const int token = base + threadIdx.x;
        const int64_t row = static_cast<int64_t>(rail_rank) * args.room + token;
        bool here = false;
        for (int k = 0; token < args.room && k < topk; ++k) {
            const int expert = args.told[row * topk + k];
            int64_t in_node = -1;
            if (!dropped && expert >= 0 && expert < args.num_experts && map.node_of[expert / local] == map.node)
                in_node = map.place_of[expert / local] * local + expert % local;
            args.routes[row * topk + k] = in_node;
            here |= in_node >= 0;
        }
        int all;
        const int position = before + block_exclusive_sum(here, warp_sums, all);
        if (token < args.room) args.recv_position[row] = here && rail_rank != map.rail_rank ? position : -1;
        before += all;
    }
}

// 4. Place. A thread for each row.

__global__ void __launch_bounds__(kRowThreads) place_kernel(const __grid_constant__ PlaceNodesArgs args) {
    const NodeMap& map = args.map;
    const int topk = args.num_topk, words = 1 + 2 * topk, columns = 1 + args.local_experts;
    const int n = blockIdx.x * kRowThreads + threadIdx.x;
    if (n >= args.num_recv) return;
    const int* from = args.node_received + static_cast<int64_t>(n) * words;
    int* about = args.arrived + static_cast<int64_t>(n) * (PlaceNodesArgs::kNumArrived + topk);
    const int batch_index = from[0];
    if (batch_index < 0) {  // not used: used rows only change places among each other
        for (int w = 0; w < words; ++w) args.received[static_cast<int64_t>(n) * words + w] = -1;
        for (int w = 0; w < PlaceNodesArgs::kNumArrived + topk; ++w) about[w] = w == PlaceNodesArgs::kShare ? 0 : -1;
        return;
    }
    int place = 0;  // of the rank that handed the row on
    while (place < map.node_size - 1 && n >= args.node_counted[place * map.node_size + map.place]) ++place;
    const int run = place * map.num_nodes + batch_index / args.room, token = batch_index % args.room;
    const int source = static_cast<int>(map.runs[run]);
    const int64_t* moved = args.moved + static_cast<int64_t>(source) * columns;
    const int position = n + static_cast<int>(moved[0]);
    int* to = args.received + static_cast<int64_t>(position) * words;
    to[0] = token;
    about[PlaceNodesArgs::kRun] = run;
    about[PlaceNodesArgs::kShare] = share_of(token, static_cast<int>(args.table.head(source, Summary::kTokens)));
    about[PlaceNodesArgs::kPosition] = position;
    about[PlaceNodesArgs::kBatchIndex] = batch_index;
    for (int k = 0; k < topk; ++k) {
        const int expert = from[1 + k];
        const int row = expert < 0 ? -1 : from[1 + topk + k] + static_cast<int>(moved[1 + expert]);
        to[1 + k] = expert;
        to[1 + topk + k] = row;
        about[PlaceNodesArgs::kNumArrived + k] = row;
        if (row >= 0 && row < args.num_rows) args.row_recv[row] = position;
    }
}

}  // namespace

cudaError_t launch_summarize(const SummarizeArgs& args, cudaStream_t stream) {
    const int blocks = args.map.num_ranks + args.map.num_nodes + kHistogramBlocks;
    summarize_kernel<<<blocks, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t launch_digest(const DigestArgs& args, cudaStream_t stream) {
    digest_kernel<<<1, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t launch_batch(const BatchArgs& args, cudaStream_t stream) {
    batch_kernel<<<args.map.num_nodes, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t launch_place_nodes(const PlaceNodesArgs& args, cudaStream_t stream) {
    if (args.num_recv == 0) return cudaSuccess;
    place_kernel<<<(args.num_recv + kRowThreads - 1) / kRowThreads, kRowThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
