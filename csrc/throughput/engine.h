// The host side of the throughput engine on one rank: the state kept between calls, and the launches.
//
// Without libtorch: arguments are pointers, sizes and a stream. PyTorch allocates outputs and symmetric memory.
#pragma once

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "throughput/args.h"

namespace deepep_moe {

// Input of a plan. An address of 0 means that the array does not exist.
struct PlanRequest {
    Address topk_idx, given_membership, given_expert_counts;
    int num_tokens, num_topk, num_experts, alignment;
    bool wait;               // whether wait_plan() will be called; else max_recv and max_rows are the sizes
    int max_recv, max_rows;  // max_rows may be PlanArgs::kNoExpertRows: the expert layout is not needed
};

// Output of place_plan(). max_recv, max_rows: room in `received` and `row_recv`.
struct PlanMemory {
    Address send_slot, counted, received, row_recv;
    int max_recv, max_rows;
};

struct PlanNumbers {
    int num_recv, num_rows, max_tokens;
    bool failed;  // the domain has the error report
};

struct DispatchRequest {
    int format;  // enum Format
    int format_code, row_bytes, pitch;
    Address x, scales;
    int64_t x_stride, scale_row_stride, scale_channel_stride;
    int num_scales;
    bool with_weights;
    Address weights;
    int64_t weights_stride;
    Address out, out_scales;
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
    int64_t out_stride, out_weights_stride;
    int num_blocks, num_send_blocks;
};

class ThroughputEngine {
  public:
    explicit ThroughputEngine(std::shared_ptr<DomainRuntime> domain);
    ~ThroughputEngine();
    ThroughputEngine(const ThroughputEngine&) = delete;
    ThroughputEngine& operator=(const ThroughputEngine&) = delete;

    static int64_t control_bytes() { return sizeof(Control); }
    // Bytes of staging memory for `max_tokens` per rank.
    static int64_t staging_bytes(int num_ranks, int max_tokens, int num_topk, int64_t pitch);

    // Symmetric memory: the address of each rank's part in this process. Must be zeroed before any rank uses it.
    void set_control(const std::vector<Address>& addresses);
    void set_staging(const std::vector<Address>& addresses, int max_tokens, int num_topk, int64_t bytes,
                     Address stream);

    void destinations(Address topk_idx, int num_tokens, int num_topk, int num_experts, Address num_tokens_per_rank,
                      Address num_tokens_per_expert, Address is_token_in_rank, Address stream);

    // Count tokens and exchange the counts.
    void begin_plan(const PlanRequest& request, Address stream) { begin_plan(request, false, stream); }
    // In place of begin_plan(): tell the peers that this rank refuses. Call wait_plan() after it.
    void refuse_plan(Address stream);
    // Spin until the sizes of the last begin_plan() have arrived, and write the rows of each local expert to
    // expert_counts [L] in host memory, unless it is null. Returns nothing after the timeout.
    std::optional<PlanNumbers> wait_plan(Address expert_counts);
    // Send the places of this rank's rows to the peers, and copy the places they send into the plan's memory. If
    // staging is too small (wait_plan() returns the tokens it needs), the plan is left empty: grow staging and call
    // this again.
    void place_plan(const PlanMemory& memory, int num_blocks, Address stream);

    void dispatch(const Route& route, const DispatchRequest& request, Address stream);
    void combine(const Route& route, const CombineRequest& request, Address stream);
    // In place of a dispatch or combine that this rank refuses: its peers raise instead of waiting. `counted`: address
    // of the plan's counts, or 0.
    void refuse_operation(Address counted, Address stream);
    // Before staging grows: fails on all ranks unless all of them make this call with the same sizes.
    void meet_to_grow(int max_tokens, int num_topk, int pitch, Address stream);

    // From now on keep replaced scratch memory, which a captured graph may use, until the engine is destroyed.
    void keep_scratch() { keep_scratch_ = true; }
    // Whether the scratch memory is large enough for a plan of this size. It cannot grow while a graph is captured.
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
