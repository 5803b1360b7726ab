// Arguments of the kernels that run on one rank alone, without peers.
//
// T tokens, K top-k, E experts, R ranks, L experts of one rank, N received rows, M expert rows, H hidden size. All
// arrays are row-major and contiguous.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace deepep_moe {

enum class DataType : int { kFloat32, kBFloat16, kFloat16 };

// Rows times weights, and the gradients of that.
struct ScaleRowsArgs {
    const char* x;         // [M] rows
    const char* rows;      // [M] rows, or null
    const float* weights;  // [M]
    const int* row_recv;   // [M], negative: padding, where out and sums are 0; null: there is none
    char* out;             // [M] rows x * weights, or null; may be x
    float* sums;           // [M] sums of x * rows over the row; unused without rows
    int num_rows, row_bytes;
};

// From a routing map to indices: ascending, -1 where a row has fewer routes. A row with more than K gets the index
// num_experts + their number, which a plan refuses.
struct RoutesArgs {
    const bool* routing_map;  // [T, E]; unused by the backward
    void* probs;              // [T, E]: read; by the backward written, the gradient
    int num_tokens, num_experts, num_topk;
    int64_t* topk_idx;  // [T, K]: written; by the backward read
    float* weights;     // [T, K]: written, 0 where there is no route; by the backward read, their gradient
};

// What the ranks of a group send each other in one exchange: a header, which all must agree on but for its last words,
// and in a plan the counts of the batch and the routes of the rows that follow. There is one message for each rank.
//   header [kHeaderWords], tokens for each rank [R], routes to each expert [expert_words], the token and the experts of
//   each row for the receiving rank [row_words]
struct Messages {
    static constexpr int kAgreedWords = 19;  // compared by headers.py and by agree.cuh
    // The lowest and the highest expert index of this rank's batch, and the rows for which it has room.
    static constexpr int kLowest = kAgreedWords, kHighest = kLowest + 1, kMaxRecv = kHighest + 1,
                         kMaxRows = kMaxRecv + 1;
    static constexpr int kHeaderWords = kMaxRows + 1;

    int64_t* data;
    int num_ranks;
    int expert_words, row_words;  // room; what does not fit is left out

    __host__ __device__ int words() const { return kHeaderWords + num_ranks + expert_words + row_words; }
    __host__ __device__ int64_t* of(int rank) const { return data + static_cast<int64_t>(rank) * words(); }
    __host__ __device__ int64_t& tokens(int rank, int destination) const {
        return of(rank)[kHeaderWords + destination];
    }
    __host__ __device__ int64_t& routes(int rank, int expert) const {
        return of(rank)[kHeaderWords + num_ranks + expert];
    }
    // Row i for or from the rank: the number of its token at the source, and K experts.
    __host__ __device__ int* row(int rank, int i, int topk) const {
        return reinterpret_cast<int*>(of(rank) + kHeaderWords + num_ranks + expert_words) +
               static_cast<int64_t>(i) * (1 + topk);
    }
    __host__ __device__ int max_rows(int topk) const { return 2 * row_words / (1 + topk); }
};

struct Header {
    int64_t words[Messages::kAgreedWords];
};

// Count a batch, number the tokens for each rank, and write one message for each rank.
struct CountArgs {
    const int64_t* topk_idx;         // [T, K], -1 or below E; other indices count as dropped
    const bool* given_membership;    // [T, R], used when K = 0
    const int* given_expert_counts;  // [E], used when K = 0
    int num_tokens, num_topk, num_experts;
    int max_recv, max_rows;
    Header header;
    Messages messages;
    int* send_slot;  // [T, R] number of the token among those for the rank, or -1
};

// One header for each rank, and room for those that arrive.
struct AnnounceArgs {
    Header header;
    int num_ranks;
    int64_t* out;  // [2 * R, kAgreedWords]
};

// Rows in flight lie in one array of segments: rows for the other ranks in rank order, rows that stay on this rank,
// rows from the other ranks in rank order. A sender writes the first two parts ("own last") and a receiver reads the
// last two ("own first"), so rows that stay are never copied.
struct Segments {
    int own_first, num_own;  // the rank's own rows among those received, in source order

    // Where received row n is read, from the first own row on.
    __host__ __device__ int own_first_row(int n) const {
        return n < own_first ? num_own + n : n < own_first + num_own ? n - own_first : n;
    }
    // Where it is written when it goes back to its source. `num_rows`: all rows received.
    __host__ __device__ int own_last_row(int n, int num_rows) const {
        return n < own_first ? n : n < own_first + num_own ? num_rows - num_own + n - own_first : n - num_own;
    }
};

// Where the rows for each rank begin among those sent, and among those that come back.
struct StartsArgs {
    Messages messages;  // to the ranks, as launch_count writes them
    int rank;
    int* starts;  // [2, R] first row of each rank: own last, then own first
};

// The place of every received row.
struct PlaceArgs {
    Messages messages;       // from each rank
    int num_received;        // N
    int max_recv, max_rows;  // rows of `received` and `row_recv`; those not used get -1
    int num_topk, local_experts, alignment, rank;
    int64_t* counted;  // [R * R + 2 * L + 1] as Plan.counted
    int* received;     // [max_recv, 1 + 2 * K] as Plan.received
    int* row_recv;     // [max_rows]
};

// A row in flight: the row, its scales, its weights, rounded up to 16 bytes.
struct PackedRows {
    char* data;
    int pitch;       // bytes from row to row
    int row_bytes;   // a multiple of 16
    int num_scales;  // 4-byte words
    int num_weights;

    __host__ __device__ char* row(int64_t i) const { return data + i * pitch; }
    __host__ __device__ int* scales(int64_t i) const { return reinterpret_cast<int*>(row(i) + row_bytes); }
    __host__ __device__ float* weights(int64_t i) const { return reinterpret_cast<float*>(scales(i) + num_scales); }
};

// 4-byte scales beside rows, with any strides (in elements).
struct Scales {
    int* data;  // null: none
    int64_t row_stride, channel_stride;
};

// Which rows belong together: entry d of item i is the number of a row, or negative. With `starts` it counts from
// there.
struct Places {
    const int* data;    // null: row i belongs to item i
    int width, stride;  // entries of an item, and the distance between items in elements
    const int* starts;  // [width] or null

    __device__ __forceinline__ int of(int64_t item, int entry) const {
        if (data == nullptr) return entry == 0 ? static_cast<int>(item) : -1;
        const int row = data[item * stride + entry];
        return row < 0 || starts == nullptr ? row : row + starts[entry];
    }
};

// Headers that arrived [R, kAgreedWords], or null where nothing is compared. Where they differ, outputs are set to NaN.
struct Headers {
    const int64_t* data;
    int num_ranks;
};

// Copy each row, with its scales and weights, to its places among packed rows; BF16 may become FP8 on the way.
struct PackArgs {
    const char* x;         // [T] rows
    Scales scales;         // [T, num_scales]; none where rows become FP8
    const float* weights;  // [T, num_weights]
    int num_rows;          // T
    bool quantise;         // x is BF16, out is FP8 with scales
    Places places;         // [T, R]
    PackedRows out;
};

// Copy each packed row to its places in the layout of a dispatch.
struct ExpandArgs {
    PackedRows rows;  // own first
    Segments segments;
    int num_received;     // N
    bool dequantise;      // rows are FP8 with scales, out is BF16
    Places places;        // [N, K] expert rows; null data: out row n is row n
    const int* row_recv;  // [num_out] negative: the row is padding and is zeroed; null: no row is
    const int* owned;     // [N, K] with the stride of `received`, negative: the weight is zeroed (source order only)
    int owned_stride;
    int num_out;  // rows of out; those in source order from N on are zeroed
    char* out;
    Scales out_scales;
    float* out_weights;  // [num_out] (expert layout) or [num_out, K], or null
    Headers headers;
};

constexpr int kMaxSummedRows = 66;  // of one item, biases included

// Sum the rows of each item in fp32, in the order of its places, then biases. Item i is stored as row own_last_row(i).
struct SumArgs {
    const char* x;  // rows
    int64_t pitch;  // bytes from row to row
    int row_bytes;  // a multiple of 16
    Places places;  // [num_items, any]
    int num_items;
    const char* bias[2];  // [num_items] rows each
    int num_biases;
    char* out;
    int64_t out_pitch;
    Segments segments;
    const float* row_weights;  // one of each row of x, or null
    bool apply_weights;        // multiply row_weights into the rows
    // Weights carried beside the sums, num_weights of each item; null: none. They are the sums of the rows' own vectors
    // of weights, or, without these, row_weights by place.
    const char* vectors;
    int64_t vectors_pitch;
    char* out_vectors;
    int64_t out_vectors_pitch;
    int num_weights;
    Headers headers;
};

// Launches; `stream` orders them. Each is defined beside its kernel and returns the launch's status.
cudaError_t launch_routes(const RoutesArgs& args, DataType probs, bool backward, cudaStream_t stream);
cudaError_t launch_scale_rows(const ScaleRowsArgs& args, DataType dtype, cudaStream_t stream);
cudaError_t launch_count(const CountArgs& args, cudaStream_t stream);
cudaError_t launch_announce(const AnnounceArgs& args, cudaStream_t stream);
cudaError_t launch_starts(const StartsArgs& args, cudaStream_t stream);
cudaError_t launch_place(const PlaceArgs& args, cudaStream_t stream);
cudaError_t launch_pack(const PackArgs& args, cudaStream_t stream);
cudaError_t launch_expand(const ExpandArgs& args, cudaStream_t stream);
cudaError_t launch_sum(const SumArgs& args, DataType dtype, cudaStream_t stream);

}  // namespace deepep_moe
