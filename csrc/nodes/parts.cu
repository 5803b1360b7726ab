// The parts in which the rows of a plan of several nodes move: count the rows of each part, number them within it, and
// write the plan of each part.
#include "device/block.cuh"
#include "nodes/args.h"

namespace deepep_moe {

namespace {

constexpr int kThreads = 1024;
constexpr int kRowThreads = 256;

// Add 1 to a counter for each thread of the warp that calls with one, together where counters are equal.
__device__ __forceinline__ void count(int* counters, int index) {
    const unsigned active = __activemask();
    const unsigned same = __match_any_sync(active, index);
    if ((threadIdx.x % kWarpSize) == __ffs(same) - 1) atomicAdd(&counters[index], __popc(same));
}

__device__ __forceinline__ int share_in_batch(const PartsArgs& args, int rail_rank, int token) {
    return share_of(token, static_cast<int>(args.rail_tokens[rail_rank]));
}

// The part of a token in the batch of the node.
__device__ __forceinline__ int part_in_batch(const PartsArgs& args, int rail_rank, int token) {
    return rail_rank == args.map.rail_rank ? 0 : 1 + args.chunk_of(share_in_batch(args, rail_rank, token));
}

__device__ __forceinline__ bool crosses(const PartsArgs& args, int run) {
    return args.map.node_of[args.map.runs[run]] != args.map.node;
}

__device__ __forceinline__ int part_of_arrived(const PartsArgs& args, const int* about) {
    return crosses(args, about[PlaceNodesArgs::kRun]) ? 1 + args.chunk_of(about[PlaceNodesArgs::kShare]) : 0;
}

__device__ __forceinline__ const int* arrived_row(const PartsArgs& args, int n) {
    return args.arrived + static_cast<int64_t>(n) * (PlaceNodesArgs::kNumArrived + args.num_topk);
}

// 1. Count.

__global__ void __launch_bounds__(kRowThreads) count_parts(const __grid_constant__ PartsArgs args) {
    const int ranks = args.map.node_size, batch = args.map.num_nodes * args.room;
    const int i = blockIdx.x * kRowThreads + threadIdx.x;
    if (i < batch) {
        const int rail_rank = i / args.room;
        const int run = rail_rank * args.parts() + part_in_batch(args, rail_rank, i % args.room);
        for (int r = 0; r < ranks; ++r)
            if (args.slots[static_cast<int64_t>(i) * ranks + r] >= 0) count(args.batch_counts, run * ranks + r);
    }
    if (i < args.num_recv) {
        const int* about = arrived_row(args, i);
        const int run = about[PlaceNodesArgs::kRun];
        if (run >= 0) count(args.arrived_counts, run * args.parts() + part_of_arrived(args, about));
    }
}

// 2. One block: the blocks of the buffers, and how far rows move from their number among all rows to that in their
// part.

// From the counts of each rank of the rail and share: rows used in each block, how far positions move, first rows.
__device__ __forceinline__ void lay_out(const PartsArgs& args, const int64_t* shares, int* used, int* moves,
                                        int* starts, int* warp_sums) {
    const int nodes = args.map.num_nodes, each = kShares / args.chunks, blocks = args.chunks * nodes;
    int first = 0;
    for (int base = 0; base < blocks; base += kThreads) {
        const int i = base + threadIdx.x, chunk = i / nodes, rail_rank = i % nodes;
        int before = 0, rows = 0;
        if (i < blocks) {
            for (int s = 0; s < chunk * each; ++s) before += static_cast<int>(shares[rail_rank * kShares + s]);
            for (int s = chunk * each; s < (chunk + 1) * each; ++s)
                rows += static_cast<int>(shares[rail_rank * kShares + s]);
        }
        const int size = i >= blocks                       ? 0
                         : args.exact                      ? rows
                         : rail_rank == args.map.rail_rank ? 0
                                                           : args.most_of_share * each;
        int all;
        const int start = first + block_exclusive_sum(size, warp_sums, all);
        if (i < blocks) {
            used[i] = rows;
            moves[i] = start - before;
            if (starts && rail_rank == 0) starts[chunk] = start;
        }
        first += all;
    }
}

__global__ void __launch_bounds__(kThreads) number_parts(const __grid_constant__ PartsArgs args) {
    __shared__ int warp_sums[kThreads / kWarpSize];
    const int nodes = args.map.num_nodes, ranks = args.map.node_size, parts = args.parts(), thread = threadIdx.x;
    lay_out(args, args.sent, args.send_used, args.send_moves, nullptr, warp_sums);
    lay_out(args, args.received, args.recv_used, args.recv_moves, args.recv_starts, warp_sums);

    // The counts between the ranks of the node, first as rows from each source.
    const bool failed = args.node_counted[0] < 0;
    for (int i = thread; i < parts * args.counted_size; i += kThreads) {
        const int part = i / args.counted_size, entry = i % args.counted_size;
        int64_t value = entry < ranks * ranks ? 0 : args.node_counted[entry];
        if (entry < ranks * ranks) {
            const int source = entry / ranks, destination = entry % ranks;
            if (source == args.map.place) {
                for (int p = 0; p < nodes; ++p) value += args.batch_counts[(p * parts + part) * ranks + destination];
            } else if (destination == args.map.place) {
                for (int p = 0; p < nodes; ++p) value += args.arrived_counts[(source * nodes + p) * parts + part];
            }
        }
        args.counted[i] = value;
    }
    __syncthreads();
    for (int i = thread; i < parts * ranks; i += kThreads) {
        int64_t* column = args.counted + static_cast<int64_t>(i / ranks) * args.counted_size + i % ranks;
        int64_t rows = 0;
        for (int source = 0; source < ranks; ++source) {
            rows += column[source * ranks];
            column[source * ranks] = failed ? -1 : rows;
        }
    }

    // A warp's first thread for each column of counts: those before in the order of all rows, less those before in the
    // part.
    const int column = thread / kWarpSize;
    if (thread % kWarpSize != 0) return;
    for (int c = column; c < ranks + 1; c += kThreads / kWarpSize) {
        int* counts = c < ranks ? args.batch_counts : args.arrived_counts;
        const int width = c < ranks ? ranks : 1, offset = c < ranks ? c : 0, runs = c < ranks ? nodes : ranks * nodes;
        int in_part[1 + kShares] = {};
        int all = 0;
        for (int run = 0; run < runs; ++run) {
            for (int part = 0; part < parts; ++part) {
                int* entry = counts + (run * parts + part) * width + offset;
                const int rows = *entry;
                *entry = all - in_part[part];
                all += rows;
                in_part[part] += rows;
            }
        }
    }
}

// 3. Write.

__device__ __forceinline__ int recv_row(const PartsArgs& args, int rail_rank, int token) {
    const int position = args.recv_position[static_cast<int64_t>(rail_rank) * args.room + token];
    const int chunk = args.chunk_of(share_in_batch(args, rail_rank, token));
    return position < 0 ? -1 : position + args.recv_moves[chunk * args.map.num_nodes + rail_rank];
}

__device__ __forceinline__ void write_token(const PartsArgs& args, int i) {
    const int nodes = args.map.num_nodes, token = i / nodes, rail_rank = i % nodes;
    const int chunk = args.chunk_of(share_of(token, args.num_tokens)), position = args.send_position[i];
    const int row = position < 0 ? -1 : position + args.send_moves[chunk * nodes + rail_rank];
    args.send_rows[i] = row;
    args.home_rows[static_cast<int64_t>(token) * nodes + args.map.rail_nodes[rail_rank]] =
        rail_rank == args.map.rail_rank ? token
        : row < 0                       ? -1
                                        : row + args.room;
}

__device__ __forceinline__ void write_batch(const PartsArgs& args, int i) {
    const int ranks = args.map.node_size, rail_rank = i / args.room, token = i % args.room;
    const int* moves = args.batch_counts + (rail_rank * args.parts() + part_in_batch(args, rail_rank, token)) * ranks;
    const int* slots = args.slots + static_cast<int64_t>(i) * ranks;
    int* out = nullptr;
    if (rail_rank == args.map.rail_rank) {
        if (token < args.num_tokens) out = args.own_slots + static_cast<int64_t>(token) * ranks;
    } else {
        const int row = recv_row(args, rail_rank, token);
        if (row >= 0) out = args.chunk_slots + static_cast<int64_t>(row) * ranks;
    }
    if (out == nullptr) return;
    for (int r = 0; r < ranks; ++r) out[r] = slots[r] < 0 ? -1 : slots[r] - moves[r];
}

__device__ __forceinline__ void write_arrived(const PartsArgs& args, int n) {
    const int* about = arrived_row(args, n);
    const int run = about[PlaceNodesArgs::kRun], topk = args.num_topk;
    if (run < 0) return;
    const int part = part_of_arrived(args, about);
    const int index = n - args.arrived_counts[run * args.parts() + part];
    int source = 0;  // this rank's own rows are read where they are in the part
    if (run / args.map.num_nodes == args.map.place) {
        const int rail_rank = run % args.map.num_nodes, token = about[PlaceNodesArgs::kBatchIndex] % args.room;
        source = part == 0 ? token : recv_row(args, rail_rank, token) - args.recv_starts[part - 1];
    }
    int* out = args.placed + (static_cast<int64_t>(part) * args.num_recv + index) * args.words();
    out[0] = source;
    if (!args.by_expert) {
        out[1] = 0;
        out[2] = about[PlaceNodesArgs::kPosition];
        return;
    }
    const int* experts = args.experts + static_cast<int64_t>(n) * args.experts_stride;
    for (int k = 0; k < topk; ++k) {
        out[1 + k] = experts[k];
        out[1 + topk + k] = about[PlaceNodesArgs::kNumArrived + k];
    }
}

__global__ void __launch_bounds__(kRowThreads) write_parts(const __grid_constant__ PartsArgs args) {
    const int i = blockIdx.x * kRowThreads + threadIdx.x;
    if (i < args.num_tokens * args.map.num_nodes) write_token(args, i);
    if (i < args.map.num_nodes * args.room) write_batch(args, i);
    if (i < args.num_recv) write_arrived(args, i);
}

}  // namespace

cudaError_t launch_parts(const PartsArgs& args, cudaStream_t stream) {
    const int batch = args.map.num_nodes * args.room, tokens = args.num_tokens * args.map.num_nodes;
    const int rows = batch > args.num_recv ? batch : args.num_recv, entries = rows > tokens ? rows : tokens;
    const auto blocks = [](int threads) { return (threads + kRowThreads - 1) / kRowThreads; };
    const auto set = [&](int* from, const int* to, int value) {
        return cudaMemsetAsync(from, value, (to - from) * sizeof(int), stream);
    };
    if (const cudaError_t error = set(args.batch_counts, args.chunk_slots, 0); error != cudaSuccess) return error;
    if (const cudaError_t error = set(args.chunk_slots, args.own_slots, -1); error != cudaSuccess) return error;
    count_parts<<<blocks(rows), kRowThreads, 0, stream>>>(args);
    number_parts<<<1, kThreads, 0, stream>>>(args);
    write_parts<<<blocks(entries), kRowThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
