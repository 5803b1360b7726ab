// Arguments of the kernels that make plans of several nodes. They run on one rank alone, without peers.
//
// T tokens, K top-k, E experts, R ranks, L experts of one rank, N nodes, G ranks of a node, C tokens of each rank of
// the rail in the batch of the node, M received rows. deepep_moe/backends/hierarchical_*.py says what the numbers mean,
// and has the same in PyTorch's operators. All arrays are row-major and contiguous unless a stride is given.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "local/args.h"

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
    const int64_t* rail_before;   // [R] ranks of the rail among the ranks before each
    const int64_t* runs;          // [G * N] source ranks in the order in which the node's backend delivers their rows
    int num_ranks, num_nodes, node_size;
    int rank, node, place, rail_rank;  // of this rank
};

// What ranks send each other before a plan: a message for each rank, in rank order. Each is `words` long and holds
//   the header that ranks must agree on [kHeaderWords] (headers.py), numbers of the sender's batch [kNumHead], its
//   tokens for each rank [R], for each node by share [N, kShares], its routes to each expert [experts].
// The ranks of a rail also send each other the experts of all tokens, [T, K] int32 in `room` more words.
struct NodeMessages {
    enum Head : int { kTokens, kLowest, kHighest, kMaxRecv, kMaxRows, kNumHead };
    static constexpr int kHeaderWords = Messages::kAgreedWords;

    int64_t* data;
    const int64_t* rail_before;  // [R] ranks of the rail among the ranks before each
    int num_ranks, num_nodes;
    int experts, room;  // for which there is room

    __host__ __device__ int words() const {
        return kHeaderWords + kNumHead + num_ranks + num_nodes * kShares + experts;
    }
    __host__ __device__ int64_t* of(int rank) const {
        return data + static_cast<int64_t>(rank) * words() + rail_before[rank] * room;
    }
    __host__ __device__ int64_t& head(int rank, int word) const { return of(rank)[kHeaderWords + word]; }
    __host__ __device__ int64_t& to_rank(int rank, int destination) const {
        return of(rank)[kHeaderWords + kNumHead + destination];
    }
    __host__ __device__ int64_t& to_node(int rank, int node, int share) const {
        return of(rank)[kHeaderWords + kNumHead + num_ranks + node * kShares + share];
    }
    __host__ __device__ int64_t& to_expert(int rank, int expert) const {
        return of(rank)[kHeaderWords + kNumHead + num_ranks + num_nodes * kShares + expert];
    }
    // Of a rank of the rail.
    __host__ __device__ int* routes(int rank) const { return reinterpret_cast<int*>(of(rank) + words()); }
};

// Count a batch, number its tokens for each rank and for each rank of the rail, and write the messages.
struct SummarizeArgs {
    NodeMap map;
    const int64_t* topk_idx;  // [T, K]
    int num_tokens, num_topk, num_experts;
    int64_t max_recv, max_rows;
    Header header;
    NodeMessages messages;  // what they have no room for is left out
    int* send_slot;         // [T, R]
    int* send_position;     // [T, N]
};

// What follows from the messages of all ranks.
struct DigestArgs {
    // What the host reads, in int64 words: these, `sent`, `received`, the rows of this rank's experts [L], and
    // kRankWords about each rank: its header, its head, the rows that it receives, its expert rows.
    enum Found : int {
        kDiffer,        // not 0 where headers differ or a rank refuses
        kNumBad,        // ranks whose part in the plan is an error
        kMostTokens,    // of a rank
        kNumRecv,       // rows that this rank receives
        kNumRows,       // expert rows of this rank
        kMost,          // rows that a rank sends over its rail, at most
        kMostOfShare,   // from one share of its tokens to one node
        kMostReceived,  // rows that a rank receives over its rail from one share of the tokens of all
        kNumFound
    };
    static constexpr int kReceived = NodeMessages::kHeaderWords + NodeMessages::kNumHead, kRows = kReceived + 1;
    static constexpr int kRankWords = kRows + 1;

    NodeMap map;
    NodeMessages messages;
    int num_experts, alignment;
    int64_t most_tokens;   // a rank with more is bad
    int64_t* found;        // [kNumFound + 2 * N * kShares + L + R * kRankWords]
    int64_t* counted;      // [R * R + 2 * L + 1] as Plan.counted
    int64_t* moved;        // [R, 1 + L] how far the rows of each source move, in rank order and in each expert's group
    int64_t* rail_tokens;  // [N]
    int* bad;              // [1] not 0 where headers differ or a rank's part is an error

    __host__ __device__ int64_t* sent() const { return found + kNumFound; }  // [N, kShares]
    __host__ __device__ int64_t* received() const { return sent() + map.num_nodes * kShares; }
    __host__ __device__ int64_t* expert_rows() const { return received() + map.num_nodes * kShares; }
    __host__ __device__ int64_t* about(int rank) const {
        return expert_rows() + num_experts / map.num_ranks + static_cast<int64_t>(rank) * kRankWords;
    }
};

// The batch of the node, from the routes in the messages within the rail.
struct BatchArgs {
    NodeMap map;
    NodeMessages messages;
    const int* bad;  // [1] not 0: all tokens are dropped
    int room;        // C
    int num_topk, num_experts;
    int64_t* routes;     // [N * C, K] experts of the node, or -1
    int* recv_position;  // [N, C]
};

// The final places of the rows that reached this rank, from the node's plan.
struct PlaceNodesArgs {
    NodeMap map;
    NodeMessages messages;
    const int* node_received;     // [M, 1 + 2 * K]
    const int64_t* node_counted;  // [G, G, ...]
    const int64_t* moved;
    int num_recv, num_rows, room, num_topk, local_experts;
    int* received;  // [M, 1 + 2 * K]
    int* row_recv;  // [num_rows]
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

    int64_t* counted;  // [P, counted_size]
    // The next are one piece of memory.
    int* batch_counts;    // [N * P, G], then how far slots move
    int* arrived_counts;  // [G * N * P], then how far rows move
    int* no_padding;      // [rows of the output] zeros
    int* chunk_slots;     // [rows of the receive buffer, G]
    int* placed;          // [P, M, words]
    int* own_slots;       // [T, G]

    int* send_moves;   // [chunks, N] from position to row of the send buffer
    int* recv_moves;   // the same of the receive buffer
    int* recv_starts;  // [chunks] first row of each

    int* send_used;  // [chunks, N]
    int* recv_used;  // [chunks, N]
    int* send_rows;  // [T, N]
    int* home_rows;  // [T, N]

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
