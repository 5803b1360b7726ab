#include "latency/engine.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace deepep_moe::DEEPEP_MOE_WIDTH::latency {

namespace {

int64_t align(int64_t bytes) { return (bytes + 127) / 128 * 128; }

Arena layout(int num_ranks, int max_tokens, int hidden) {
    Arena arena{};
    arena.num_ranks = num_ranks;
    arena.max_tokens = max_tokens;
    arena.hidden = hidden;
    const int64_t packet = sizeof(int4);
    arena.counts_offset = align(max_tokens * kMaxRoutePackets * packet);
    arena.weights_offset = arena.counts_offset + align(kMaxExperts * sizeof(Tagged));
    arena.signals_offset = arena.weights_offset + align(max_tokens * kMaxWeightPackets * packet);
    arena.rows_offset = arena.signals_offset + align(kNumKinds * max_tokens * sizeof(uint64_t));
    arena.block_packets = align(arena.rows_offset + kNumKinds * max_tokens * arena.row_bytes()) / packet;
    return arena;
}

}  // namespace

LatencyEngine::LatencyEngine(std::shared_ptr<DomainRuntime> domain, int num_blocks, bool masks)
    : domain_(std::move(domain)), num_blocks_(num_blocks) {
    runtime_.domain = domain_->view();
    runtime_.masks = masks;
    const int fewest = fewest_blocks(runtime_.domain.num_ranks);
    if (num_blocks < fewest || num_blocks > kMaxBlocks)
        throw std::invalid_argument("num_blocks = " + std::to_string(num_blocks) + ": must be " +
                                    std::to_string(fewest) + " to " + std::to_string(kMaxBlocks));
    check(cudaMalloc(&runtime_.local, sizeof(LocalState)), "allocating device state");
    check(cudaMemset(runtime_.local, 0, sizeof(LocalState)), "clearing device state");
    check(cudaDeviceSynchronize(), "clearing device state");
}

LatencyEngine::~LatencyEngine() {  // errors are ignored: at interpreter exit the driver may have shut down already
    cudaFree(runtime_.local);
    cudaFree(arenas_on_device_);
}

int LatencyEngine::fewest_blocks(int num_ranks) { return kRankWords == 1 ? num_ranks + 1 : 4; }

int64_t LatencyEngine::arena_bytes(int num_ranks, int max_tokens, int hidden) {
    return layout(num_ranks, max_tokens, hidden).bytes();
}

int64_t LatencyEngine::places_words(int num_ranks, int max_tokens, int num_topk) {
    return Places::kHead + static_cast<int64_t>(num_ranks) * max_tokens * num_topk;
}

void LatencyEngine::set_control(const std::vector<Address>& addresses) {
    for (int r = 0; r < runtime_.domain.num_ranks; ++r) runtime_.control[r] = at<Control>(addresses.at(r));
}

Arena LatencyEngine::add_arena(const std::vector<Address>& addresses, int max_tokens, int hidden) {
    Arena arena = layout(static_cast<int>(addresses.size()), max_tokens, hidden);
    for (int r = 0; r < arena.num_ranks; ++r) arena.base[r] = at<char>(addresses[r]);
    arenas_.push_back(arena);
    const size_t bytes = arenas_.size() * sizeof(Arena);
    Arena* copy = nullptr;
    check(cudaMalloc(&copy, bytes), "allocating device state");
    check(cudaMemcpy(copy, arenas_.data(), bytes, cudaMemcpyHostToDevice), "copying to device state");
    cudaFree(std::exchange(arenas_on_device_, copy));  // waits for kernels that read it
    return arena;
}

Told LatencyEngine::told() const {
    if (domain_->broken()) return kBroken;
    return domain_->failure() || domain_->notice() ? kSomething : kNothing;
}

Told LatencyEngine::dispatch(DispatchArgs& args, Half half, Address stream) {
    const Told before = told();
    if (before == kBroken) return before;
    args.runtime = runtime_;
    check(launch_dispatch(args, half, num_blocks_, as_stream(stream)), "low-latency dispatch");
    return before;
}

Told LatencyEngine::combine(CombineArgs& args, Half half, Address stream) {
    const Told before = told();
    if (before == kBroken) return before;
    args.runtime = runtime_;
    check(launch_combine(args, half, num_blocks_, as_stream(stream)), "low-latency combine");
    return before;
}

void LatencyEngine::announce(const Facts& facts, bool withdrawn, Address stream) {
    check(launch_announce(runtime_, facts, withdrawn, as_stream(stream)), "announcing a low-latency dispatch");
}

void LatencyEngine::announce_refusal(Address others, Address stream) {
    check(launch_announce_refusal(runtime_, at<int>(others), as_stream(stream)), "announcing a refusal");
}

void LatencyEngine::refuse(Kind kind, Address passed_on, Address source, Address stream) {
    const RefusalArgs args{runtime_,           kind,           arenas_on_device_, static_cast<int>(arenas_.size()),
                           at<int>(passed_on), at<int>(source)};
    check(launch_refusal(args, num_blocks_, as_stream(stream)), "refusing a low-latency call");
}

void LatencyEngine::set_mask(int rank, Address stream) {
    check(launch_set_mask(runtime_, rank, as_stream(stream)), "masking a rank");
}

void LatencyEngine::query_mask(Address status, Address stream) {
    check(launch_query_mask(runtime_, at<int>(status), as_stream(stream)), "reading masks");
}

void LatencyEngine::clear_rows(Address stream) {
    for (const Arena& arena : arenas_)
        check(cudaMemset2DAsync(arena.base[runtime_.domain.rank] + arena.rows_offset, arena.block_bytes(), 0,
                                arena.block_bytes() - arena.rows_offset, 2 * arena.num_ranks, as_stream(stream)),
              "ending masks");
}

void LatencyEngine::lift_masks(const RankSet& lift, Address stream) {
    const cudaStream_t on = as_stream(stream);
    check(launch_meet(runtime_, false, lift, on), "ending masks");
    clear_rows(stream);
    check(launch_meet(runtime_, true, RankSet{}, on), "ending masks");
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH::latency
