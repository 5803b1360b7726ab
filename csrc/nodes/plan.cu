// The plan of several nodes, step by step: count the batch, digest the counts of all ranks, make the batch of the node,
// place the rows that the node's plan delivers.
#include <climits>

#include "device/block.cuh"
#include "nodes/args.h"
#include "throughput/args.h"

namespace deepep_moe {

namespace {

constexpr int kThreads = 1024;
constexpr int kRowThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLoads = 8;  // experts of a token that a thread loads at once

// Call `use(k, expert)` for the `topk` experts at `experts`.
template <typename T, typename Use>
__device__ __forceinline__ void for_each_expert(const T* experts, int topk, Use use) {
    for (int first = 0; first < topk; first += kLoads) {
        T loaded[kLoads];
#pragma unroll
        for (int u = 0; u < kLoads; ++u) loaded[u] = first + u < topk ? experts[first + u] : T{-1};
#pragma unroll
        for (int u = 0; u < kLoads; ++u)
            if (first + u < topk) use(first + u, loaded[u]);
    }
}

__device__ __forceinline__ void add(int64_t* to, int64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
}

// 1. Count. A block for each rank, one for each rank of the rail, and one for what concerns the whole batch.

// Number the tokens for a rank, and count the routes to its experts.
__device__ __forceinline__ void count_for_rank(const SummarizeArgs& args, int rank, int* warp_sums) {
    __shared__ int routes[kMaxExperts];
    const NodeMessages& messages = args.messages;
    const int ranks = args.map.num_ranks, local = args.num_experts / ranks, first = rank * local;
    for (int e = threadIdx.x; e < local; e += kThreads) routes[e] = 0;
    __syncthreads();
    int before = 0;
    for (int base = 0; base < args.num_tokens; base += kThreads) {
        const int token = base + threadIdx.x;
        bool goes = false;
        const int topk = token < args.num_tokens ? args.num_topk : 0;
        for_each_expert(args.topk_idx + static_cast<int64_t>(token) * args.num_topk, topk, [&](int, int64_t expert) {
            if (expert < first || expert >= first + local) return;
            goes = true;
            atomicAdd(&routes[expert - first], 1);
        });
        int all;
        const int slot = before + block_exclusive_sum(goes, warp_sums, all);
        if (token < args.num_tokens) args.send_slot[static_cast<int64_t>(token) * ranks + rank] = goes ? slot : -1;
        before += all;
    }
    __syncthreads();
    for (int to = threadIdx.x; to < ranks; to += kThreads) messages.to_rank(to, rank) = before;
    if (messages.experts != args.num_experts) return;
    for (int i = threadIdx.x; i < ranks * local; i += kThreads)
        messages.to_expert(i / local, first + i % local) = routes[i % local];
}

// Number the tokens for a rank of the rail, count them by share, and write it the routes of all tokens.
__device__ __forceinline__ void count_for_node(const SummarizeArgs& args, int rail_rank, int* warp_sums) {
    __shared__ int shares[kShares];
    if (threadIdx.x < kShares) shares[threadIdx.x] = 0;
    __syncthreads();
    const NodeMessages& messages = args.messages;
    const int node = static_cast<int>(args.map.rail_nodes[rail_rank]), local = args.num_experts / args.map.num_ranks;
    const bool fits = static_cast<int64_t>(args.num_tokens) * args.num_topk <= 2 * static_cast<int64_t>(messages.room);
    int* told = messages.routes(static_cast<int>(args.map.rail_members[rail_rank]));
    int before = 0;
    for (int base = 0; base < args.num_tokens; base += kThreads) {
        const int token = base + threadIdx.x;
        bool goes = false;
        const int topk = token < args.num_tokens ? args.num_topk : 0;
        const int64_t first = static_cast<int64_t>(token) * args.num_topk;
        for_each_expert(args.topk_idx + first, topk, [&](int k, int64_t expert) {
            const bool exists = expert >= 0 && expert < args.num_experts;
            goes |= exists && args.map.node_of[static_cast<int>(expert) / local] == node;
            if (fits) told[first + k] = exists ? static_cast<int>(expert) : -1;
        });
        int all;
        const int position = before + block_exclusive_sum(goes, warp_sums, all);
        if (token < args.num_tokens)
            args.send_position[static_cast<int64_t>(token) * args.map.num_nodes + rail_rank] =
                goes && rail_rank != args.map.rail_rank ? position : -1;
        if (goes) atomicAdd(&shares[share_of(token, args.num_tokens)], 1);
        before += all;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < args.map.num_ranks * kShares; i += kThreads)
        messages.to_node(i / kShares, node, i % kShares) = shares[i % kShares];
}

// Only indices that no expert has leave their trace in the lowest and the highest: 1 more than the index, else 0.
__device__ __forceinline__ void count_batch(const SummarizeArgs& args) {
    __shared__ long long lowest, highest;
    if (threadIdx.x == 0) lowest = highest = 0;
    __syncthreads();
    const int64_t routes = static_cast<int64_t>(args.num_tokens) * args.num_topk;
    for (int64_t i = threadIdx.x; i < routes; i += kThreads) {
        const long long expert = args.topk_idx[i];
        if (expert < -1) atomicMin(&lowest, expert + 1);
        if (expert >= args.num_experts) atomicMax(&highest, min(expert, LLONG_MAX - 1) + 1);
    }
    __syncthreads();
    const NodeMessages& messages = args.messages;
    for (int i = threadIdx.x; i < args.map.num_ranks * NodeMessages::kHeaderWords; i += kThreads) {
        const int word = i % NodeMessages::kHeaderWords;
        messages.of(i / NodeMessages::kHeaderWords)[word] = args.header.words[word];
    }
    for (int to = threadIdx.x; to < args.map.num_ranks; to += kThreads) {
        messages.head(to, NodeMessages::kTokens) = args.num_tokens;
        messages.head(to, NodeMessages::kLowest) = lowest;
        messages.head(to, NodeMessages::kHighest) = highest;
        messages.head(to, NodeMessages::kMaxRecv) = args.max_recv;
        messages.head(to, NodeMessages::kMaxRows) = args.max_rows;
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
        count_batch(args);
}

// 2. Digest. One block.

// What the host reads about each rank; returns in every thread whether headers differ.
__device__ __forceinline__ bool describe_ranks(const DigestArgs& args) {
    const NodeMessages& messages = args.messages;
    const int ranks = args.map.num_ranks, local = args.num_experts / ranks;
    constexpr int kCopied = NodeMessages::kHeaderWords + NodeMessages::kNumHead;
    bool differ = false;
    for (int i = threadIdx.x; i < ranks * kCopied; i += kThreads) {
        const int rank = i / kCopied, word = i % kCopied;
        const int64_t value = messages.of(rank)[word];
        args.about(rank)[word] = value;
        differ |= word < NodeMessages::kHeaderWords && value != messages.of(0)[word];
        differ |= word == 0 && value != 0;  // the rank refuses
    }
    for (int rank = threadIdx.x; rank < ranks; rank += kThreads) {
        int64_t rows = 0;
        for (int source = 0; source < ranks; ++source) rows += messages.to_rank(source, rank);
        args.about(rank)[DigestArgs::kReceived] = rows;
        args.about(rank)[DigestArgs::kRows] = 0;
    }
    differ = __syncthreads_or(differ);
    for (int expert = threadIdx.x; expert < args.num_experts; expert += kThreads) {
        int64_t rows = 0;
        for (int source = 0; source < ranks; ++source) rows += messages.to_expert(source, expert);
        add(&args.about(expert / local)[DigestArgs::kRows],
            (rows + args.alignment - 1) / args.alignment * args.alignment);
    }
    __syncthreads();
    return differ;
}

// `Plan.counted`, and the rows of this rank's experts for the host.
__device__ __forceinline__ void add_up(const DigestArgs& args, int* warp_sums) {
    const NodeMap& map = args.map;
    const NodeMessages& messages = args.messages;
    const int ranks = map.num_ranks, local = args.num_experts / ranks, thread = threadIdx.x;
    for (int destination = thread; destination < ranks; destination += kThreads) {
        int64_t rows = 0;
        for (int source = 0; source < ranks; ++source)
            args.counted[static_cast<int64_t>(source) * ranks + destination] = rows +=
                messages.to_rank(source, destination);
    }
    int first = 0;  // of the padded group
    int64_t* expert_rows = args.counted + static_cast<int64_t>(ranks) * ranks;
    for (int base = 0; base < local; base += kThreads) {
        const int expert = base + thread;
        int64_t rows = 0;
        for (int source = 0; expert < local && source < ranks; ++source)
            rows += messages.to_expert(source, map.rank * local + expert);
        const int padded = static_cast<int>((rows + args.alignment - 1) / args.alignment * args.alignment);
        int all;
        const int offset = first + block_exclusive_sum(expert < local ? padded : 0, warp_sums, all);
        if (expert < local) {
            expert_rows[expert] = args.expert_rows()[expert] = rows;
            expert_rows[local + expert] = offset;
        }
        first += all;
    }
    if (thread == 0) expert_rows[2 * local] = first;
}

__device__ __forceinline__ void find_moves(const DigestArgs& args) {
    const NodeMap& map = args.map;
    const NodeMessages& messages = args.messages;
    const int ranks = map.num_ranks, local = args.num_experts / ranks, columns = 1 + local;
    const auto rows_of = [&](int source, int column) {
        return column == 0 ? messages.to_rank(source, map.rank)
                           : messages.to_expert(source, map.rank * local + column - 1);
    };
    for (int column = threadIdx.x; column < columns; column += kThreads) {
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
}

// What crosses this rank's rail, and the most that crosses any.
__device__ __forceinline__ void find_crossing(const DigestArgs& args, int* most, int* most_of_share,
                                              int* most_received) {
    const NodeMap& map = args.map;
    const NodeMessages& messages = args.messages;
    const int nodes = map.num_nodes, thread = threadIdx.x;
    for (int i = thread; i < nodes * kShares; i += kThreads) {
        const int rail_rank = i / kShares, share = i % kShares;
        const bool own = rail_rank == map.rail_rank;
        args.sent()[i] = own ? 0 : messages.to_node(map.rank, static_cast<int>(map.rail_nodes[rail_rank]), share);
        args.received()[i] = own ? 0 : messages.to_node(static_cast<int>(map.rail_members[rail_rank]), map.node, share);
    }
    for (int i = thread; i < nodes; i += kThreads)
        args.rail_tokens[i] = messages.head(static_cast<int>(map.rail_members[i]), NodeMessages::kTokens);
    for (int rank = thread; rank < map.num_ranks; rank += kThreads) {
        int rows = 0;
        for (int i = 0; i < nodes * kShares; ++i) {
            if (i / kShares == map.node_of[rank]) continue;
            const int of_share = static_cast<int>(messages.to_node(rank, i / kShares, i % kShares));
            atomicMax(most_of_share, of_share);
            rows += of_share;
        }
        atomicMax(most, rows);
    }
    for (int i = thread; i < map.node_size * nodes * kShares; i += kThreads) {
        const int place = i / (nodes * kShares), node = i / kShares % nodes, share = i % kShares;
        int rows = 0;
        for (int run = place * nodes; run < (place + 1) * nodes; ++run) {
            const int source = static_cast<int>(map.runs[run]);
            if (map.node_of[source] != node) rows += static_cast<int>(messages.to_node(source, node, share));
        }
        atomicMax(most_received, rows);
    }
}

__global__ void __launch_bounds__(kThreads) digest_kernel(const __grid_constant__ DigestArgs args) {
    __shared__ int warp_sums[kWarps];
    __shared__ int num_bad, most_tokens, most, most_of_share, most_received;
    if (threadIdx.x == 0) num_bad = most_tokens = most = most_of_share = most_received = 0;
    const bool differ = describe_ranks(args);
    add_up(args, warp_sums);
    find_moves(args);
    find_crossing(args, &most, &most_of_share, &most_received);
    for (int rank = threadIdx.x; rank < args.map.num_ranks; rank += kThreads) {
        const int64_t *about = args.about(rank), *head = about + NodeMessages::kHeaderWords;
        atomicMax(&most_tokens, static_cast<int>(head[NodeMessages::kTokens]));
        if (head[NodeMessages::kTokens] > args.most_tokens || head[NodeMessages::kLowest] != 0 ||
            head[NodeMessages::kHighest] != 0 || about[DigestArgs::kReceived] > head[NodeMessages::kMaxRecv] ||
            about[DigestArgs::kRows] > head[NodeMessages::kMaxRows])
            atomicAdd(&num_bad, 1);
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    const int64_t* mine = args.about(args.map.rank);
    args.found[DigestArgs::kDiffer] = differ;
    args.found[DigestArgs::kNumBad] = num_bad;
    args.found[DigestArgs::kMostTokens] = most_tokens;
    args.found[DigestArgs::kNumRecv] = mine[DigestArgs::kReceived];
    args.found[DigestArgs::kNumRows] = mine[DigestArgs::kRows];
    args.found[DigestArgs::kMost] = most;
    args.found[DigestArgs::kMostOfShare] = most_of_share;
    args.found[DigestArgs::kMostReceived] = most_received;
    *args.bad = differ || num_bad > 0;
}

// 3. The batch of the node. A block for each rank of the rail.

__global__ void __launch_bounds__(kThreads) batch_kernel(const __grid_constant__ BatchArgs args) {
    __shared__ int warp_sums[kWarps];
    const NodeMap& map = args.map;
    const int rail_rank = blockIdx.x, topk = args.num_topk, local = args.num_experts / map.num_ranks;
    const int member = static_cast<int>(map.rail_members[rail_rank]);
    const int64_t told_tokens = args.messages.head(member, NodeMessages::kTokens);
    const int tokens = *args.bad != 0 ? 0 : static_cast<int>(told_tokens < args.room ? told_tokens : args.room);
    const int* told = args.messages.routes(member);
    int before = 0;
    for (int base = 0; base < args.room; base += kThreads) {
        const int token = base + threadIdx.x;
        const int64_t row = static_cast<int64_t>(rail_rank) * args.room + token;
        bool here = false;
        const auto write = [&](int k, int expert) {
            int64_t in_node = -1;
            if (expert >= 0 && map.node_of[expert / local] == map.node)
                in_node = map.place_of[expert / local] * local + expert % local;
            args.routes[row * topk + k] = in_node;
            here |= in_node >= 0;
        };
        if (token < tokens) {
            for_each_expert(told + static_cast<int64_t>(token) * topk, topk, write);
        } else if (token < args.room) {
            for (int k = 0; k < topk; ++k) write(k, -1);
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
    int place = 0;  // of the rank that forwarded the row
    while (place < map.node_size - 1 && n >= args.node_counted[place * map.node_size + map.place]) ++place;
    const int run = place * map.num_nodes + batch_index / args.room, token = batch_index % args.room;
    const int source = static_cast<int>(map.runs[run]);
    const int64_t* moved = args.moved + static_cast<int64_t>(source) * columns;
    const int position = n + static_cast<int>(moved[0]);
    int* to = args.received + static_cast<int64_t>(position) * words;
    to[0] = token;
    about[PlaceNodesArgs::kRun] = run;
    about[PlaceNodesArgs::kShare] =
        share_of(token, static_cast<int>(args.messages.head(source, NodeMessages::kTokens)));
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
    const int blocks = args.map.num_ranks + args.map.num_nodes + 1;
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
    const cudaError_t error = cudaMemsetAsync(args.row_recv, -1, args.num_rows * sizeof(int), stream);
    if (error != cudaSuccess) return error;
    if (args.num_recv == 0) return cudaSuccess;
    place_kernel<<<(args.num_recv + kRowThreads - 1) / kRowThreads, kRowThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
