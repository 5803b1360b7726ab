// The host side of one rank: what kernels need to know, kept between calls, and their launches.
//
// No libtorch: pointers, sizes and a stream come in. PyTorch allocates what users see and the symmetric memory.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/args.h"

namespace deepep_moe {

using Address = std::uintptr_t;  // of device memory, as tensor.data_ptr() gives it

struct FailureReport {
    int failure, phase, peer, field, expected, seen;
};

struct PlanNumbers {
    int num_recv, num_rows, max_tokens;
    bool failed;  // take_failure() says more
};

class Buffer {
  public:
    Buffer(int rank, int num_ranks, int device, double timeout_seconds, bool record_waits);
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    static int64_t control_bytes() { return sizeof(Control); }
    // Bytes of staging, and of its part before the rows, for `max_tokens` per rank.
    static std::tuple<int64_t, int64_t> staging_bytes(int num_ranks, int max_tokens, int num_topk, int64_t pitch);

    // Symmetric memory, as mapped by this rank: one address per rank, zeroed before any rank uses it.
    void set_control(const std::vector<Address>& addresses);
    void set_staging(const std::vector<Address>& addresses, int max_tokens, int num_topk, int64_t bytes);

    void layout(Address topk_idx, int num_tokens, int num_topk, int num_experts, int ranks_per_node,
                Address num_tokens_per_rank, Address num_tokens_per_node, Address num_tokens_per_expert,
                Address is_token_in_rank, Address stream);

    // Count and exchange; `refused` only tells the peers that this rank cannot go on. With `wait`, wait_plan() may be
    // called next. max_recv, max_rows: room, without `wait`.
    void begin_plan(Address topk_idx, Address given_membership, Address given_expert_counts, int num_tokens,
                    int num_topk, int num_experts, int alignment, bool refused, bool wait, int max_recv, int max_rows,
                    Address stream);
    // Spin until the counts of the last begin_plan() are here, and write the rows of each local expert to expert_counts
    // [L] in host memory, unless it is null. Nothing when they did not come in time.
    std::optional<PlanNumbers> wait_plan(Address expert_counts);
    // Tell the peers the places of this rank's rows and copy what they tell into the plan's own memory. max_recv,
    // max_rows: room in `received` and `row_recv`. Does nothing where staging is too small, which wait_plan() shows;
    // then it is to be called again with larger staging.
    void place_plan(Address send_slot, Address counted, Address received, Address row_recv, int max_recv, int max_rows,
                    int num_blocks, Address stream);

    void set_route(int num_tokens, int num_topk, int max_recv, int max_rows, Address send_slot, Address counted,
                   Address received, Address row_recv, bool grouped);
    void dispatch(Address x, int format, int row_bytes, int pitch, Address scales, int64_t scale_row_stride,
                  int64_t scale_channel_stride, int num_scales, Address weights, Address out, Address out_scales,
                  int64_t out_scale_row_stride, int64_t out_scale_channel_stride, Address out_weights, int num_blocks,
                  int num_send_blocks, Address stream);
    void combine(Address x, int dtype, int row_bytes, int pitch, Address weights, bool apply_weights,
                 bool carry_weights, Address bias0, Address bias1, Address out, Address out_weights, int num_blocks,
                 int num_send_blocks, Address stream);

    // What a kernel reported, if anything; a report of bad input is handed out once, a broken protocol for ever.
    std::optional<FailureReport> take_failure(bool lasting_only);
    // Seconds that warps of this rank spent waiting for each rank so far. Waits for the device.
    std::vector<double> wait_seconds() const;

  private:
    void reserve_scratch(int64_t ints);

    int device_;
    Runtime runtime_{};
    Staging staging_{};
    PlanArgs plan_{};
    Route route_{};
    int64_t* counted_ = nullptr;
    int* scratch_ = nullptr;  // totals, row bases, tile counts
    int64_t scratch_ints_ = 0;
    int ticket_ = 0;
};

}  // namespace deepep_moe
