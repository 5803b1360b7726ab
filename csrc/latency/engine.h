// The host side of the latency engine on one rank: what its kernels need to know, kept between calls, and their
// launches.
//
// No libtorch: pointers, sizes and a stream come in. PyTorch allocates what users see and the symmetric memory.
#pragma once

#include <memory>
#include <vector>

#include "latency/args.h"

namespace deepep_moe::DEEPEP_MOE_WIDTH::latency {

// What kernels had reported when a launch was asked for.
enum Told : int {
    kNothing,
    kSomething,  // to be raised once this rank has taken part in the call
    kBroken,     // a failure that lasts: nothing was launched
};

class LatencyEngine {
  public:
    // `num_blocks`: of every kernel that moves rows; at least fewest_blocks().
    LatencyEngine(std::shared_ptr<DomainRuntime> domain, int num_blocks, bool masks);
    ~LatencyEngine();
    LatencyEngine(const LatencyEngine&) = delete;
    LatencyEngine& operator=(const LatencyEngine&) = delete;

    static int fewest_blocks(int num_ranks);
    static int64_t control_bytes() { return sizeof(Control); }
    static int64_t arena_bytes(int num_ranks, int max_tokens, int hidden);
    // int32 words that a dispatch leaves for its combine.
    static int64_t places_words(int num_ranks, int max_tokens, int num_topk);

    // Symmetric memory, as mapped by this rank: one address per rank, zeroed before any rank uses it.
    void set_control(const std::vector<Address>& addresses);
    Arena add_arena(const std::vector<Address>& addresses, int max_tokens, int hidden);

    // Launch; the engine fills in `runtime`. The result is what had been reported before.
    Told dispatch(DispatchArgs& args, Half half, Address stream);
    Told combine(CombineArgs& args, Half half, Address stream);

    void announce(const Facts& facts, bool withdrawn, Address stream);
    // See launch_announce_refusal() and RefusalArgs.
    void announce_refusal(Address others, Address stream);
    void refuse(Kind kind, Address passed_on, Address source, Address stream);
    void set_mask(int rank, Address stream);
    void query_mask(Address status, Address stream);
    // End the masks of the ranks in `lift`, as far as they come. Collective; clears rows that were not read from all
    // arenas.
    void lift_masks(const RankSet& lift, Address stream);
    // Clear the rows of all sources in this rank's memory.
    void clear_rows(Address stream);

    const Runtime& runtime() const { return runtime_; }

  private:
    Told told() const;

    std::shared_ptr<DomainRuntime> domain_;
    Runtime runtime_{};
    std::vector<Arena> arenas_;
    Arena* arenas_on_device_ = nullptr;  // a copy
    int num_blocks_;
};

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH::latency
