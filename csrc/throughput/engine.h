// The host side of the throughput engine on one rank: what its kernels need to know, kept between calls, and their
// launches.
//
// No libtorch: pointers, sizes and a stream come in. PyTorch allocates what users see and the symmetric memory.
#pragma once

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "throughput/args.h"

namespace deepep_moe {

// What a plan is made from and in. Zero addresses: none.
struct PlanRequest {
    Address topk_idx, given_membership, given_expert_counts;
    int num_tokens, num_topk, num_experts, alignment;
    bool wait;               // wait_plan() will be called; else max_recv and max_rows are fixed
    int max_recv, max_rows;  // PlanArgs::kNoExpertRows: expert rows are not asked for
};

// Where place_plan() puts a plan. max_recv, max_rows: room in `received` and `row_recv`.
struct PlanMemory {
    Address send_slot, counted, received, row_recv;
    int max_recv, max_rows;
};

struct PlanNumbers {
    int num_recv, num_rows, max_tokens;
    bool failed;  // the domain's record says why
};

struct DispatchRequest {
    int format;  // enum Format
    int format_code, row_bytes, pitch;
    Address x, scales;
    int64_t scale_row_stride, scale_channel_stride;
    int num_scales;
    bool with_weights;
    Address weights, out;
    Address out_scales;
    int64_t out_scale_row_stride, out_scale_channel_stride;
    Address out_weights;
    int num_blocks, num_send_blocks;
};

struct CombineRequest {
    int dtype;  // enum DataType
    int format_code, row_bytes, pitch;
    Address x, weights;
    bool apply_weights, carry_weights;
    Address bias0, bias1, out, out_weights;
    int num_blocks, num_send_blocks;
};

class ThroughputEngine {
  public:
    explicit ThroughputEngine(std::shared_ptr<DomainRuntime> domain);
    ~ThroughputEngine();
    ThroughputEngine(const ThroughputEngine&) = delete;
    ThroughputEngine& operator=(const ThroughputEngine&) = delete;

    static int64_t control_bytes() { return sizeof(Control); }
    // Bytes of staging for `max_tokens` per rank.
    static int64_t staging_bytes(int num_ranks, int max_tokens, int num_topk, int64_t pitch);

    // Symmetric memory, as mapped by this rank: one address per rank, zeroed before any rank uses it.
    void set_control(const std::vector<Address>& addresses);
    void set_staging(const std::vector<Address>& addresses, int max_tokens, int num_topk, int64_t bytes,
                     Address stream);

    void destinations(Address topk_idx, int num_tokens, int num_topk, int num_experts, Address num_tokens_per_rank,
                      Address num_tokens_per_expert, Address is_token_in_rank, Address stream);

    // Count and exchange.
    void begin_plan(const PlanRequest& request, Address stream) { begin_plan(request, false, stream); }
    // Only tell the peers, who are on their way into the exchange, that this rank cannot go on; wait_plan() follows.
    void refuse_plan(Address stream);
    // Spin until the counts of the last begin_plan() are here, and write the rows of each local expert to expert_counts
    // [L] in host memory, unless it is null. Nothing when they did not come in time.
    std::optional<PlanNumbers> wait_plan(Address expert_counts);
    // Tell the peers the places of this rank's rows and copy what they tell into the plan's own memory. Leaves an empty
    // plan where staging is too small, which wait_plan() shows; then it is to be called again with larger staging.
    void place_plan(const PlanMemory& memory, int num_blocks, Address stream);

    void dispatch(const Route& route, const DispatchRequest& request, Address stream);
    void combine(const Route& route, const CombineRequest& request, Address stream);
    // In place of a dispatch or combine that this rank refused: its peers raise instead of waiting. `counted`: of its
    // plan, or 0.
    void refuse_operation(Address counted, Address stream);
    // Before staging grows: fails on all ranks unless all of them are here, for the same size.
    void meet_to_grow(int max_tokens, int num_topk, int pitch, Address stream);

    // Scratch that a captured graph may use is never given back before the engine is.
    void keep_scratch() { keep_scratch_ = true; }
    // Whether a plan of this size does without more scratch, which cannot be had while a graph is captured.
    bool scratch_serves(int num_tokens, int num_topk, int num_experts) const {
        return scratch_for(num_tokens, num_topk, num_experts) <= scratch_ints_;
    }
    void set_epochs(int plan_epoch, int data_epoch, Address stream);

  private:
    void begin_plan(const PlanRequest& request, bool refused, Address stream);
    int64_t scratch_for(int num_tokens, int num_topk, int num_experts) const;
    void reserve_scratch(int64_t ints);

    std::shared_ptr<DomainRuntime> domain_;
    Runtime runtime_{};
    Staging staging_{};
    PlanArgs plan_{};
    int64_t* counted_ = nullptr;
    int* scratch_ = nullptr;  // totals, row bases, tile counts
    int64_t scratch_ints_ = 0;
    std::vector<int*> kept_scratch_;
    bool keep_scratch_ = false;
    int ticket_ = 0;
};

}  // namespace deepep_moe
