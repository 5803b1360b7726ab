// Arguments of the kernels of the throughput engine: one struct each, with plain pointers and sizes.
//
// Symbols in shapes are those of deepep_moe/backends/base.py: T tokens, K top-k, R ranks, E experts, L local
// experts, N received rows, M expert rows. All arrays are row-major and contiguous unless a stride is given.
#pragma once

#include "device/tagged.h"
#include "local/args.h"
#include "runtime/domain.h"

namespace deepep_moe {

constexpr int kMaxTopk = 32;  // one lane of a warp per route of a token
using RankMask = unsigned;    // a bit per rank
static_assert(8 * sizeof(RankMask) >= kMaxRanks, "a bit per rank");
constexpr int kMaxExperts = 1024;
constexpr int kTileEntries = 512;  // most routes that one block of the plan kernels orders
constexpr int kTileTokens = 64;    // most tokens of one block
constexpr int kMaxBiases = 2;      // tensors added to the result of combine
constexpr int kFlagsPerRow = 4;    // combine sends long rows in pieces, with a flag each

// Tokens of one tile. All plan kernels cut the batch into the same tiles.
inline __host__ __device__ int tile_tokens(int num_topk) {
    const int fit = kTileEntries / (num_topk > 0 ? num_topk : 1);
    return fit < kTileTokens ? fit : kTileTokens;
}

// The counts of one batch that ranks exchange before any row moves.
struct PeerCounts {
    // First the values that must be equal on all ranks, then the others.
    enum Word : int {
        kExperts,
        kTopk,
        kAlign,
        kNumAgreed,
        kTokens = kNumAgreed,
        kInput,    // enum Input
        kMaxRecv,  // room for rows in rank layout, and in expert layout; INT_MAX: allocated as needed
        kMaxRows,
        kNumWords
    };
    enum Input : int { kGood, kBadRoutes, kRefusedInput };  // kBadRoutes: indices out of range, treated as dropped

    int header[kNumWords];
    int tokens_to_rank[kMaxRanks];
    int routes_to_expert[kMaxExperts];

    static constexpr int kHeadWords = kNumWords + kMaxRanks;
};

// The values that must be equal on all ranks in every dispatch and combine. Written by one 16-byte store.
struct alignas(16) Operation {
    enum Kind : int { kDispatch, kCombine, kGrow, kRefuse, kPlan };
    enum Flag : int { kByExpert = 1 << 8, kWithWeights = 1 << 9 };

    int kind;    // Kind, with flags
    int plan;    // number of the plan; for kGrow tokens per rank
    int format;  // dtype, wire format, scales and backward, encoded by Python; for kGrow top-k
    int pitch;   // bytes of a staged row
};

// Symmetric memory of fixed size: written by peers, read by its owner.
struct Control {
    int entered[kMaxRanks];             // [source] epoch of the last operation that the peer has started
    int placed[kMaxRanks];              // [source] epoch of the last plan whose places the source has written
    Operation operation[2][kMaxRanks];  // [data epoch % 2][source]
    // [plan epoch % 2][source] words of PeerCounts, tagged with the plan epoch
    Tagged counts[2][kMaxRanks][sizeof(PeerCounts) / sizeof(int)];
};

// State of the last plan, equal on every rank.
enum PlanState : int {
    kPlaceable,
    kNeedsRoom,  // a rank has more tokens than staging holds: the host grows staging, then places rows
    kInvalid,    // refused, or kNeedsRoom without a host that waits: no rows move by this plan
};

// Device memory that only this rank accesses. Counters are here and not in launch arguments, so that a captured graph
// can be replayed; the last block of a kernel advances them.
struct LocalState {
    int plan_epoch;
    int data_epoch;  // of dispatches, combines and growths
    int blocks_done;
    int next_item;  // next work item for the receiving warps of the running kernel
    int bad_routes;
    int spoiled;     // some rows of the running operation will not arrive
    int plan_state;  // enum PlanState
};

// Pinned host memory, written by the device: the sizes of the last plan, tagged with its ticket. The host waits for
// them.
struct HostCounts {
    Tagged num_recv;    // N
    Tagged num_rows;    // M
    Tagged max_tokens;  // most tokens of any rank, or kPlanFailed; written last

    static constexpr int kPlanFailed = -1;
    Tagged expert_counts[kMaxExperts];  // [L]
};

// Symmetric memory for rows in flight; grown collectively when a batch needs more.
//   arrived [2][R][max_tokens][kFlagsPerRow] int: epoch of the row in the slot, or of each of its pieces; a row that is
//           sent whole uses the first
//   places  [R][max_tokens][received_words] int: token, experts and expert rows of each row
//   data    [2][R - 1][max_tokens] rows of `pitch` bytes: the row, its scales, its weights
struct Staging {
    char* base[kMaxRanks];  // [rank] address in this process
    int max_tokens;
    int64_t places_offset;
    int64_t data_offset;
    int64_t data_bytes;  // of one of the two halves
};

// The arguments that all kernels of the engine share.
struct Runtime {
    Domain domain;
    Control* control[kMaxRanks];  // [rank] address in this process
    LocalState* local;
    HostCounts* host;
};

// The part of a plan that follows from the counts, in one array: rank prefix [R, R], rows of each local expert [L],
// first row of each local expert and the end of the last [L + 1]. An invalid plan has -1 in its prefix, and no rows.
struct Counted {
    int64_t* data;
    int num_ranks, local_experts;

    static constexpr int kMaxSize = kMaxRanks * kMaxRanks + 2 * kMaxExperts + 1;
    __host__ __device__ int size() const { return num_ranks * num_ranks + 2 * local_experts + 1; }
    __host__ __device__ int64_t& prefix(int source, int owner) const { return data[source * num_ranks + owner]; }
    __host__ __device__ int64_t& rows(int expert) const { return data[num_ranks * num_ranks + expert]; }
    __host__ __device__ int64_t& offset(int expert) const {
        return data[num_ranks * num_ranks + local_experts + expert];
    }
};

// Words per received row: its token at the source, the local expert of each route, the expert row of each route; -1 for
// none.
inline __host__ __device__ int received_words(int num_topk) { return 1 + 2 * num_topk; }

// Counts of this rank's tokens for each rank and expert.
struct DestinationsArgs {
    Runtime runtime;
    const int64_t* topk_idx;  // [T, K]
    int num_tokens, num_topk, num_experts;
    int* num_tokens_per_rank;    // [R] added to
    int* num_tokens_per_expert;  // [E] added to
    bool* is_token_in_rank;      // [T, R]
};

struct PlanArgs {
    Runtime runtime;
    Staging staging;
    const int64_t* topk_idx;         // [T, K]
    const bool* given_membership;    // [T, R] or null: overrides the ranks that follow from topk_idx
    const int* given_expert_counts;  // [E] or null: used when K = 0
    int num_tokens, num_topk, num_experts, alignment;
    int ticket;            // if not 0, publish the sizes to the host, tagged with this number
    bool refused;          // this rank's input is bad: it takes part only to tell the others
    int* tile_ranks;       // [tiles, R]
    int* tile_experts;     // [tiles, E]
    int* rank_totals;      // [R], zero between plans
    int* expert_totals;    // [E], zero between plans
    int* row_base;         // [E] expert row at its owner of this rank's first route to the expert
    Counted counted;       // memory of the engine; copied to out_counted
    int max_recv;          // room in the outputs below; without a ticket, the size of the outputs
    int max_rows;          // the same; kNoExpertRows: the expert layout is not needed
    int* send_slot;        // [T, R]
    int64_t* out_counted;  // as Counted
    int* received;         // [max_recv, received_words]
    int* row_recv;         // [max_rows]

    static constexpr int kNoExpertRows = -1;
};

// The part of a plan that dispatch and combine need.
struct Route {
    int plan;  // its number
    int num_tokens, num_topk;
    int max_recv, max_rows;
    const int* send_slot;        // [T, R]
    const int64_t* rank_prefix;  // [R, R]
    const int* received;         // [N, received_words]
    const int* row_recv;         // [M]
    bool grouped;                // expert layout, else rank layout

    // Number of rows in the layout.
    __host__ __device__ __forceinline__ int num_out() const { return grouped ? max_rows : max_recv; }

    // Of received row n, and its route k.
    __device__ __forceinline__ int source_token(int n) const { return entry(n, 0); }
    __device__ __forceinline__ int local_expert(int n, int k) const { return entry(n, 1 + k); }
    __device__ __forceinline__ int expert_row(int n, int k) const { return entry(n, 1 + num_topk + k); }

    __device__ __forceinline__ int entry(int n, int word) const {
        return received[static_cast<int64_t>(n) * received_words(num_topk) + word];
    }
};

// Conversion of rows (Wire of deepep_moe/backends/base.py).
enum class Format : int {
    kAsGiven,     // none; scales are sent too, if there are any
    kToFp8,       // BF16 input; FP8 with scales is sent and returned
    kThroughFp8,  // BF16 input; FP8 with scales is sent, BF16 is returned
};

struct DispatchArgs {
    Runtime runtime;
    Staging staging;
    Route route;
    int format_code;         // Operation::format
    int row_bytes;           // as sent; BF16 that is sent as FP8 has twice as many in x
    int num_scales;          // per row, as sent
    int pitch;               // bytes of a staged row: row, scales, weights, rounded up to 16
    const char* x;           // [T] rows
    int64_t x_stride;        // bytes from row to row
    Scales scales;           // of x
    bool with_weights;       // whether weights are sent; a rank without tokens has no pointer to them
    const float* weights;    // [T, K]
    int64_t weights_stride;  // elements from row to row
    char* out;               // [N or M] rows
    Scales out_scales;       // one of the strides is 1
    float* out_weights;      // [N, K] or [M], or null
    int num_send_blocks;
};

struct CombineArgs {
    Runtime runtime;
    Staging staging;
    Route route;
    int format_code;  // Operation::format
    int row_bytes;
    int pitch;                     // bytes of a staged row: row, weights, rounded up to 16
    const char* x;                 // [N or M] rows
    const float* weights;          // [N, K] or [M], or null
    bool apply_weights;            // multiply the rows by them (expert layout) ...
    bool carry_weights;            // ... or send them beside the rows; neither without weights
    const char* bias[kMaxBiases];  // [T] rows each
    int num_biases;
    char* out;                   // [T] rows
    int64_t out_stride;          // bytes from row to row
    float* out_weights;          // [T, K] when weights are carried
    int64_t out_weights_stride;  // elements from row to row
    int num_send_blocks;
};

// Launches on `stream`. Each is defined in the file of its kernel and returns the status of the launch.
cudaError_t launch_destinations(const DestinationsArgs& args, cudaStream_t stream);
cudaError_t launch_exchange_counts(const PlanArgs& args, cudaStream_t stream);
cudaError_t launch_place_rows(const PlanArgs& args, cudaStream_t stream);
// Uses at most num_blocks blocks: they wait for the peers, whose kernels may need SMs of the same GPU.
cudaError_t launch_collect_places(const PlanArgs& args, int num_blocks, cudaStream_t stream);
cudaError_t launch_dispatch(const DispatchArgs& args, Format format, int num_blocks, cudaStream_t stream);
cudaError_t launch_combine(const CombineArgs& args, DataType dtype, int num_blocks, cudaStream_t stream);
// An operation without rows, in which ranks find out whether all of them are in it. It replaces a dispatch or combine
// by the plan of `rank_prefix` (null: by a valid plan).
cudaError_t launch_meet(const Runtime& runtime, const Operation& operation, const int64_t* rank_prefix,
                        cudaStream_t stream);
// For tests: set the epochs, so that the next plan and operation get the numbers after these.
cudaError_t launch_set_epochs(const Runtime& runtime, int plan_epoch, int data_epoch, cudaStream_t stream);

}  // namespace deepep_moe
