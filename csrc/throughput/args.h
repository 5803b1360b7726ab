// What kernels of the throughput engine take: one struct each, plain pointers and sizes, filled by name in engine.cpp.
//
// Symbols in shapes are those of deepep_moe/backends/base.py: T tokens, K top-k, R ranks, E experts, L local
// experts, N received rows, M expert rows. All arrays are row-major and contiguous unless a stride is given.
#pragma once

#include "device/tagged.h"
#include "local/args.h"
#include "runtime/domain.h"

namespace deepep_moe {

constexpr int kMaxTopk = 32;  // one lane of a warp per route of a token
constexpr int kMaxExperts = 1024;
constexpr int kTileEntries = 512;  // routes that one block of the plan kernels orders
constexpr int kTileTokens = 64;    // and tokens at most
constexpr int kMaxBiases = 2;      // rows added to what combine gives
constexpr int kFlagsPerRow = 4;    // combine sends long rows in pieces

// Tokens of one tile: blocks of the plan kernels cut the batch alike.
inline __host__ __device__ int tile_tokens(int num_topk) {
    const int fit = kTileEntries / (num_topk > 0 ? num_topk : 1);
    return fit < kTileTokens ? fit : kTileTokens;
}

// What ranks tell each other about one batch before any row moves.
struct PeerCounts {
    // What ranks must agree on, then what they may differ in.
    enum Word : int {
        kExperts,
        kTopk,
        kAlign,
        kNumAgreed,
        kTokens = kNumAgreed,
        kInput,    // enum Input
        kMaxRecv,  // room for rows in source order and in expert order; INT_MAX: as much as it takes
        kMaxRows,
        kNumWords
    };
    enum Input : int { kGood, kBadRoutes, kRefusedInput };  // kBadRoutes: routes that no expert has, taken as dropped

    int header[kNumWords];
    int tokens_to_rank[kMaxRanks];
    int routes_to_expert[kMaxExperts];

    static constexpr int kHeadWords = kNumWords + kMaxRanks;
};

// What ranks must agree on in every dispatch and combine. Written at once: 16 bytes.
struct alignas(16) Operation {
    enum Kind : int { kDispatch, kCombine, kGrow, kRefuse, kPlan };
    enum Flag : int { kByExpert = 1 << 8, kWithWeights = 1 << 9 };

    int kind;    // Kind, with flags
    int plan;    // number of the plan that rows move by; of kGrow the tokens per rank
    int format;  // dtype, form, scales, backward, encoded by Python and only compared here; of kGrow top-k
    int pitch;   // bytes of a staged row
};

// Symmetric memory that never grows: written by peers, read by its owner.
struct Control {
    int entered[kMaxRanks];             // [source] epoch of the last operation that the peer has started
    int placed[kMaxRanks];              // [source] epoch of the last plan whose places in staging are complete
    Operation operation[2][kMaxRanks];  // [data epoch % 2][source]
    // [plan epoch % 2][source] words of PeerCounts, tagged with the plan epoch
    Tagged counts[2][kMaxRanks][sizeof(PeerCounts) / sizeof(int)];
};

// Where the last plan stands, the same on every rank.
enum PlanState : int {
    kPlaceable,
    kNeedsRoom,  // a rank has more tokens than staging holds: the host makes it grow and places rows then
    kInvalid,    // refused, or without a host to mend what kNeedsRoom asks for: nothing moves by this plan
};

// Device memory of this rank alone. Counters live here, not in launch arguments, so that a captured graph can be
// replayed; the last block of a kernel advances them.
struct LocalState {
    int plan_epoch;
    int data_epoch;  // of dispatches, combines and growths
    int blocks_done;
    int next_item;  // work that the receiving warps of the running kernel take one by one
    int bad_routes;
    int spoiled;     // rows of the running operation will not come
    int plan_state;  // enum PlanState
};

// Pinned host memory, written by the device: numbers of the last plan that the host waits for, tagged with its ticket.
struct HostCounts {
    Tagged num_recv;    // N
    Tagged num_rows;    // M
    Tagged max_tokens;  // most tokens of any rank, or kPlanFailed; comes last

    static constexpr int kPlanFailed = -1;
    Tagged expert_counts[kMaxExperts];  // [L]
};

// Symmetric memory for rows in flight, grown when a batch needs more (collectively).
//   arrived [2][R][max_tokens][kFlagsPerRow] int: epoch of the row that lies in the slot, or of each of its pieces;
//           rows that come whole use the first
//   places  [R][max_tokens][received_words] int: what the destination is told about each row
//   data    [2][R - 1][max_tokens] rows of `pitch` bytes: the row, its scales, its weights
struct Staging {
    char* base[kMaxRanks];  // [rank] as mapped here
    int max_tokens;
    int64_t places_offset;
    int64_t data_offset;
    int64_t data_bytes;  // of one of the two halves
};

// What every kernel of the engine knows.
struct Runtime {
    Domain domain;
    Control* control[kMaxRanks];  // [rank] as mapped here
    LocalState* local;
    HostCounts* host;
};

// The part of a plan that follows from the counts alone, in one array: rank prefix [R, R], rows of each local expert
// [L], first row of each local expert and the end of the last [L + 1]. A plan that nothing may move by has -1 in its
// prefix, and no rows.
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

// What a rank knows about each row it receives: its token at the source, the local expert of each route, the expert
// row of each route; -1 for none.
inline __host__ __device__ int received_words(int num_topk) { return 1 + 2 * num_topk; }

// Where tokens go, counted on this rank.
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
    const bool* given_membership;    // [T, R] or null: overrides what topk_idx says
    const int* given_expert_counts;  // [E] or null: used when K = 0
    int num_tokens, num_topk, num_experts, alignment;
    int ticket;            // not 0: publish the counts to the host under this number
    bool refused;          // this rank's input is bad: it takes part only to say so
    int* tile_ranks;       // [tiles, R]
    int* tile_experts;     // [tiles, E]
    int* rank_totals;      // [R], zero between plans
    int* expert_totals;    // [E], zero between plans
    int* row_base;         // [E] expert row at its owner of this rank's first route to the expert
    Counted counted;       // what follows from the counts, until it is copied to out_counted
    int max_recv;          // room in the outputs below; without a ticket all of it is used
    int max_rows;          // the same; kNoExpertRows: expert rows are not asked for
    int* send_slot;        // [T, R]
    int64_t* out_counted;  // as Counted
    int* received;         // [max_recv, received_words]
    int* row_recv;         // [max_rows]

    static constexpr int kNoExpertRows = -1;
};

// The part of a plan that moving rows needs.
struct Route {
    int plan;  // its number
    int num_tokens, num_topk;
    int max_recv, max_rows;
    const int* send_slot;        // [T, R]
    const int64_t* rank_prefix;  // [R, R]
    const int* received;         // [N, received_words]
    const int* row_recv;         // [M]
    bool grouped;                // expert layout, else rank layout

    // Rows in the layout.
    __host__ __device__ __forceinline__ int num_out() const { return grouped ? max_rows : max_recv; }

    // Of received row n and its route k.
    __device__ __forceinline__ int source_token(int n) const { return entry(n, 0); }
    __device__ __forceinline__ int local_expert(int n, int k) const { return entry(n, 1 + k); }
    __device__ __forceinline__ int expert_row(int n, int k) const { return entry(n, 1 + num_topk + k); }

    __device__ __forceinline__ int entry(int n, int word) const {
        return received[static_cast<int64_t>(n) * received_words(num_topk) + word];
    }
};

// 4-byte scales beside rows, with any strides (in elements).
struct Scales {
    int* data;  // null: none
    int64_t row_stride, channel_stride;
};

// What becomes of rows on their way (Wire of deepep_moe/backends/base.py).
enum class Format : int {
    kAsGiven,     // nothing; with scales, if there are any
    kToFp8,       // BF16 comes, FP8 and its scales cross and are delivered
    kThroughFp8,  // BF16 comes, FP8 and its scales cross, BF16 is delivered
};

struct DispatchArgs {
    Runtime runtime;
    Staging staging;
    Route route;
    int format_code;       // Operation::format
    int row_bytes;         // as sent; BF16 that crosses as FP8 has twice as many
    int num_scales;        // per row, as sent
    int pitch;             // bytes of a staged row: row, scales, weights, rounded up to 16
    const char* x;         // [T] rows
    Scales scales;         // given with them
    bool with_weights;     // they travel; a rank without tokens has none to point to
    const float* weights;  // [T, K]
    char* out;             // [N or M] rows
    Scales out_scales;     // one of the strides is 1
    float* out_weights;    // [N, K] or [M], or null
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
    bool apply_weights;            // multiply them into the rows (expert layout) ...
    bool carry_weights;            // ... or send them home beside the rows; neither without weights
    const char* bias[kMaxBiases];  // [T] rows each
    int num_biases;
    char* out;           // [T] rows
    float* out_weights;  // [T, K] when weights are carried
    int num_send_blocks;
};

// Launches; `stream` orders them. Each is defined beside its kernel and returns the launch's status.
cudaError_t launch_destinations(const DestinationsArgs& args, cudaStream_t stream);
cudaError_t launch_exchange_counts(const PlanArgs& args, cudaStream_t stream);
cudaError_t launch_place_rows(const PlanArgs& args, cudaStream_t stream);
// At most num_blocks: they wait for the peers, whose kernels may need room on the same GPU.
cudaError_t launch_collect_places(const PlanArgs& args, int num_blocks, cudaStream_t stream);
cudaError_t launch_dispatch(const DispatchArgs& args, Format format, int num_blocks, cudaStream_t stream);
cudaError_t launch_combine(const CombineArgs& args, DataType dtype, int num_blocks, cudaStream_t stream);
// An operation that moves nothing: its ranks meet, and learn whether all are in it. It takes the place of one by the
// plan that `rank_prefix` is of (null: of one that every rank can use).
cudaError_t launch_meet(const Runtime& runtime, const Operation& operation, const int64_t* rank_prefix,
                        cudaStream_t stream);
// For tests: the next plan and operation get the numbers after these.
cudaError_t launch_set_epochs(const Runtime& runtime, int plan_epoch, int data_epoch, cudaStream_t stream);

}  // namespace deepep_moe
