// Rows between nodes: puts with signals, and waits for the signals. An operation is one dispatch or combine.
// Its kernels run in stream order: begin, then for each chunk put, and later wait.
//
// A put writes directly to where the receiver reads, so it must not overwrite rows that are still in use. When a rank
// begins operation n + 1 it has finished reading the rows of operation n, because its kernels run in order, and it
// tells all peers (`begun`). An operation that uses the region last used by operation m first waits until all peers
// have begun operation m + 1. Eager operations alternate between two regions, so this condition usually holds already.
// In a CUDA graph the region is fixed, and the wait may take one network latency.
//
// `begun` also covers the send buffer: a peer that has begun operation m + 1 has received all rows of operation m. So
// nothing calls nvshmem_quiet, whose wait has no limit.
//
// Operation numbers are kept in device memory, so that graphs can be replayed.
#include "device/wait.cuh"
#include "nvshmem/signal.cuh"

namespace deepep_moe {

namespace {

constexpr int kPutThreads = 512, kWaitThreads = 256;

__device__ __forceinline__ Waiting waiting(const RailArgs& args) {
    return {args.record, &args.state->failed, args.timeout_nanoseconds};
}

// Conversion between ranks of the rail and their numbers among the peers of rank `without`.
__device__ __forceinline__ int peer_number(int rank, int without) { return rank - (rank > without ? 1 : 0); }
__device__ __forceinline__ int peer_rank(int number, int without) { return number + (number >= without ? 1 : 0); }

__device__ __forceinline__ uint64_t* arrival(const RailArgs& args, int chunk, int peer, int piece) {
    const int64_t row = (static_cast<int64_t>(args.region) * kMaxChunks + chunk) * (args.num_ranks - 1) + peer;
    return args.signals.arrived + row * kPiecesPerBlock + piece;
}

__device__ __forceinline__ void tell_failure(const RailArgs& args) {
    for (int peer = 0; peer < args.num_ranks - 1; ++peer) {
        const int rank = peer_rank(peer, args.rank);
        nvshmemx_signal_op(&args.signals.given_up[peer_number(args.rank, rank)], 1, NVSHMEM_SIGNAL_SET, args.pes[rank]);
    }
}

// wait_for_signal for signals of the rail: ends when a peer has given up, and reports a failure to all peers.
__device__ __forceinline__ bool wait_for_peer(const RailArgs& args, uint64_t* signal, uint64_t expected, int phase,
                                              int peer) {
    const auto any_given_up = [&] {
        for (int p = 0; p < args.num_ranks - 1; ++p)
            if (load_acquire_system(&args.signals.given_up[p]) != 0) return peer_rank(p, args.rank);
        return -1;
    };
    return wait_for_signal(waiting(args), signal, expected, phase, peer_rank(peer, args.rank), any_given_up,
                           [&] { tell_failure(args); });
}

__global__ void __launch_bounds__(kWaitThreads) begin_kernel(const __grid_constant__ RailArgs args) {
    if (args.state->failed != 0) return;
    const int peers = args.num_ranks - 1;
    for (int peer = threadIdx.x; peer < peers; peer += blockDim.x) {
        const int rank = peer_rank(peer, args.rank);
        // Additions, because two of these signals may arrive in either order.
        nvshmemx_signal_op(&args.signals.begun[peer_number(args.rank, rank)], 1, NVSHMEM_SIGNAL_ADD, args.pes[rank]);
    }
    const long long last_use = args.state->last_use[args.region];
    if (last_use == 0) return;
    for (int peer = threadIdx.x; peer < peers; peer += blockDim.x)
        if (!wait_for_peer(args, &args.signals.begun[peer], last_use + 1, kRailStart, peer)) return;
}

__global__ void __launch_bounds__(kPutThreads)
    put_kernel(const __grid_constant__ RailArgs args, const __grid_constant__ RailChunk chunk) {
    if (args.state->failed != 0) return;
    const int peers = args.num_ranks - 1;
    const int peer = static_cast<int>(blockIdx.x) % peers, piece = static_cast<int>(blockIdx.x) / peers;
    const int rank = peer_rank(peer, args.rank), self = peer_number(args.rank, rank);
    int count = chunk.block_rows;
    if (chunk.used != nullptr) count = max(0, min(chunk.used[rank], count));
    const int64_t first = static_cast<int64_t>(count) * piece / kPiecesPerBlock;
    const int64_t rows = static_cast<int64_t>(count) * (piece + 1) / kPiecesPerBlock - first;
    const int64_t block_bytes = static_cast<int64_t>(chunk.block_rows) * chunk.row_bytes;
    uint64_t* signal = arrival(args, chunk.chunk, self, piece);
    const uint64_t number = args.state->done + 1;
    delay_put();
    if (rows == 0) {
        if (threadIdx.x == 0) nvshmemx_signal_op(signal, number, NVSHMEM_SIGNAL_SET, args.pes[rank]);
        return;
    }
    nvshmemx_putmem_signal_nbi_block(chunk.received + self * block_bytes + first * chunk.row_bytes,
                                     chunk.sent + peer * block_bytes + first * chunk.row_bytes, rows * chunk.row_bytes,
                                     signal, number, NVSHMEM_SIGNAL_SET, args.pes[rank]);
}

__global__ void __launch_bounds__(kWaitThreads)
    wait_kernel(const __grid_constant__ RailArgs args, const __grid_constant__ RailChunk chunk) {
    const int peers = args.num_ranks - 1;
    const uint64_t number = args.state->done + 1;
    bool failed = args.state->failed != 0;
    for (int word = threadIdx.x; word < peers * kPiecesPerBlock && !failed; word += blockDim.x) {
        const int peer = word / kPiecesPerBlock;
        failed =
            !wait_for_peer(args, arrival(args, chunk.chunk, peer, word % kPiecesPerBlock), number, kRailRows, peer);
    }
    failed = __syncthreads_or(failed) != 0;
    if (failed) {
        poison(chunk.received, static_cast<int64_t>(peers) * chunk.block_rows * chunk.row_bytes);
    } else if (threadIdx.x == 0) {
        data_visible(arrival(args, chunk.chunk, 0, 0), number);
        if (chunk.last) {
            args.state->done = static_cast<long long>(number);
            args.state->last_use[args.region] = static_cast<long long>(number);
        }
    }
}

__global__ void give_up_kernel(const __grid_constant__ RailArgs args) {
    if (atomicExch(&args.state->failed, 1) == 0) tell_failure(args);
}

}  // namespace

cudaError_t launch_rail_begin(const RailArgs& args, cudaStream_t stream) {
    begin_kernel<<<1, kWaitThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t launch_rail_put(const RailArgs& args, const RailChunk& chunk, cudaStream_t stream) {
    put_kernel<<<(args.num_ranks - 1) * kPiecesPerBlock, kPutThreads, 0, stream>>>(args, chunk);
    return cudaGetLastError();
}

cudaError_t launch_rail_wait(const RailArgs& args, const RailChunk& chunk, cudaStream_t stream) {
    wait_kernel<<<1, kWaitThreads, 0, stream>>>(args, chunk);
    return cudaGetLastError();
}

cudaError_t launch_rail_give_up(const RailArgs& args, cudaStream_t stream) {
    give_up_kernel<<<1, 1, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
