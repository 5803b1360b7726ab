// Arguments of the kernels that make plans of several nodes. They run on one rank alone, without peers.
//
// T tokens, K top-k, E experts, R ranks, L experts of one rank, N nodes, G ranks of a node, C tokens of each rank of
// the rail in the batch of the node, M received rows. deepep_moe/backends/hierarchical_*.py says what the numbers mean,
// and has the same in PyTorch's operators. All arrays are row-major and contiguous unless a stride is given.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace deepep_moe {

constexpr int kShares = 8;  // of the tokens of a rank

// The share of a token among `num_tokens`.
__host__ __device__ __forceinline__ int share_of(int token, int num_tokens) {
    const int share = static_cast<int>(static_cast<int64_t>(token) * kShares / (num_tokens > 0 ? num_tokens : 1));
    return share < kShares ? share : kShares - 1;
}

// Nodes and rails as one rank sees them (Geometry).
struct NodeMap {
    const int64_t* node_of;       // [R]
    const int64_t* place_of;      // [R]
    const int64_t* rail_members;  // [N] ranks
    const int64_t* rail_nodes;    // [N] node of each of them
    const int64_t* runs;          // [G * N] source ranks in the order in which the node's backend delivers their rows
    int num_ranks, num_nodes, node_size;
    int rank, node, place, rail_rank;  // of this rank
};

// What a rank tells all ranks about its batch: a row of the table [R, stride].
struct Summary {
    enum Head : int { kTokens, kLowest, kHighest, kMaxRecv, kMaxRows, kNumHead };

    int64_t* data;
    int64_t stride;  // from rank to rank
    int num_ranks, num_nodes;

    __host__ __device__ int64_t& head(int rank, int word) const { return data[rank * stride + word]; }
    __host__ __device__ int64_t& to_rank(int rank, int destination) const {
        return data[rank * stride + kNumHead + destination];
    }
    __host__ __device__ int64_t& to_node(int rank, int node, int share) const {
        return data[rank * stride + kNumHead + num_ranks + node * kShares + share];
    }
    __host__ __device__ int64_t& to_expert(int rank, int expert) const {
        return data[rank * stride + kNumHead + num_ranks + num_nodes * kShares + expert];
    }
};

// Count a batch, and number its tokens for each rank and for each rank of the rail.
struct SummarizeArgs {
    NodeMap map;
    const int64_t* topk_idx;  // [T, K]
    int num_tokens, num_topk, num_experts;
    int64_t max_recv, max_rows;
    Summary out;         // of one rank, zero beforehand
    int* send_slot;      // [T, R]
    int* send_position;  // [T, N]
};

// What follows from the summaries of all ranks.
struct DigestArgs {
    NodeMap map;
    Summary table;
    int num_experts, alignment;
    int64_t* counted;      // [R * R + 2 * L + 1] as Plan.counted
    int64_t* moved;        // [R, 1 + L] how far the rows of each source move, in rank order and in each expert's group
    int64_t* sent;         // [N, kShares]
    int64_t* received;     // [N, kShares]
    int64_t* rail_tokens;  // [N]
};

// The batch of the node, from the routes that the ranks of the rail told each other.
struct BatchArgs {
    NodeMap map;
    const int* told;  // [N, C, K] experts
    const int* bad;   // [1] or null: not 0: all tokens are dropped
    int room;         // C
    int num_topk, num_experts;
    int64_t* routes;     // [N * C, K] experts of the node, or -1
    int* recv_position;  // [N, C]
};

// The final places of the rows that reached this rank, from the node's plan.
struct PlaceNodesArgs {
    NodeMap map;
    Summary table;
    const int* node_received;     // [M, 1 + 2 * K]
    const int64_t* node_counted;  // [G, G, ...]
    const int64_t* moved;
    int num_recv, num_rows, room, num_topk, local_experts;
    int* received;  // [M, 1 + 2 * K]
    int* row_recv;  // [num_rows], -1 beforehand
    int* arrived;   // [M, kNumArrived + K]

    enum Arrived : int { kRun, kShare, kPosition, kBatchIndex, kNumArrived };
};

// The parts in which rows move: this rank's own tokens, then chunks. P = 1 + chunks.
struct PartsArgs {
    NodeMap map;
    int num_tokens, num_recv, num_topk, room, chunks;
    bool exact;  // blocks have no unused rows, else `most_of_share` rows for each share
    int most_of_share;
    bool by_expert;           // layout
    const int64_t* sent;      // [N, kShares]
    const int64_t* received;  // [N, kShares]
    const int64_t* rail_tokens;
    const int* send_position;  // [T, N]
    const int* recv_position;  // [N, C]
    const int* slots;          // [N * C, G]
    const int64_t* node_counted;
    int counted_size;
    const int* experts;  // [M, K], rows `experts_stride` apart
    int experts_stride;
    const int* arrived;  // [M, kNumArrived + K]

    int* batch_counts;    // [N * P, G], zero beforehand; then how far slots move
    int* arrived_counts;  // [G * N * P], zero beforehand; then how far rows move
    int* send_moves;      // [chunks, N] from position to row of the send buffer
    int* recv_moves;      // the same of the receive buffer
    int* recv_starts;     // [chunks] first row of each

    int* send_used;    // [chunks, N]
    int* recv_used;    // [chunks, N]
    int* send_rows;    // [T, N]
    int* home_rows;    // [T, N]
    int64_t* counted;  // [P, counted_size]
    int* own_slots;    // [T, G]
    int* chunk_slots;  // [rows of the receive buffer, G], -1 beforehand
    int* placed;       // [P, M, words], -1 beforehand

    __host__ __device__ int parts() const { return 1 + chunks; }
    __host__ __device__ int words() const { return by_expert ? 1 + 2 * num_topk : 3; }
    __host__ __device__ int chunk_of(int share) const { return share * chunks / kShares; }
};

// Launches; `stream` orders them.
cudaError_t launch_summarize(const SummarizeArgs& args, cudaStream_t stream);
cudaError_t launch_digest(const DigestArgs& args, cudaStream_t stream);
cudaError_t launch_batch(const BatchArgs& args, cudaStream_t stream);
cudaError_t launch_place_nodes(const PlaceNodesArgs& args, cudaStream_t stream);
cudaError_t launch_parts(const PartsArgs& args, cudaStream_t stream);

}  // namespace deepep_moe
