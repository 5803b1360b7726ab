#include "throughput/engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace deepep_moe {

namespace {

int64_t align(int64_t bytes) { return (bytes + 127) / 128 * 128; }

int64_t flag_bytes(int num_ranks, int max_tokens) {
    return align(2 * static_cast<int64_t>(num_ranks) * max_tokens * kFlagsPerRow * sizeof(int));
}

int64_t place_bytes(int num_ranks, int max_tokens, int num_topk) {
    return align(static_cast<int64_t>(num_ranks) * max_tokens * received_words(num_topk) * sizeof(int));
}

constexpr int kTotals = kMaxRanks + kMaxExperts;  // counts of this rank's tokens and routes, at the start of scratch

int64_t num_tiles(int num_tokens, int num_topk) {
    const int per_tile = tile_tokens(num_topk);
    return std::max((num_tokens + per_tile - 1) / per_tile, 1);
}

// Read value and tag at once, as the device wrote them.
Tagged read_at_once(const Tagged& number) {
    const uint64_t both = *reinterpret_cast<const volatile uint64_t*>(&number);
    return {static_cast<int>(static_cast<uint32_t>(both)), static_cast<int>(both >> 32)};
}

}  // namespace

ThroughputEngine::ThroughputEngine(std::shared_ptr<DomainRuntime> domain) : domain_(std::move(domain)) {
    runtime_.domain = domain_->view();
    check(cudaMalloc(&runtime_.local, sizeof(LocalState)), "allocating device state");
    check(cudaMemset(runtime_.local, 0, sizeof(LocalState)), "clearing device state");
    check(cudaMalloc(&counted_, Counted::kMaxSize * sizeof(int64_t)), "allocating device state");
    check(cudaHostAlloc(&runtime_.host, sizeof(HostCounts), cudaHostAllocMapped), "allocating pinned memory");
    *runtime_.host = HostCounts{};
    check(cudaDeviceSynchronize(), "clearing device state");
}

ThroughputEngine::~ThroughputEngine() {
    // Errors are ignored: at interpreter exit the driver may have shut down already.
    cudaFree(runtime_.local);
    cudaFree(counted_);
    cudaFree(scratch_);
    for (int* scratch : kept_scratch_) cudaFree(scratch);
    cudaFreeHost(runtime_.host);
}

int64_t ThroughputEngine::scratch_for(int num_tokens, int num_topk, int num_experts) const {
    return kTotals + num_experts + num_tiles(num_tokens, num_topk) * (runtime_.domain.num_ranks + num_experts);
}

void ThroughputEngine::reserve_scratch(int64_t ints) {
    if (ints <= scratch_ints_) return;
    if (keep_scratch_)
        kept_scratch_.push_back(scratch_);
    else
        check(cudaFree(scratch_), "freeing scratch");
    scratch_ = nullptr;
    scratch_ints_ = 0;
    check(cudaMalloc(&scratch_, ints * sizeof(int)), "allocating scratch");
    check(cudaMemset(scratch_, 0, ints * sizeof(int)), "clearing scratch");  // totals are zero between plans
    check(cudaDeviceSynchronize(), "clearing scratch");
    scratch_ints_ = ints;
}

int64_t ThroughputEngine::staging_bytes(int num_ranks, int max_tokens, int num_topk, int64_t pitch) {
    const int64_t half = align(static_cast<int64_t>(num_ranks - 1) * max_tokens * pitch);
    return flag_bytes(num_ranks, max_tokens) + place_bytes(num_ranks, max_tokens, num_topk) + 2 * half;
}

void ThroughputEngine::set_control(const std::vector<Address>& addresses) {
    runtime_.domain = domain_->view();
    for (int r = 0; r < runtime_.domain.num_ranks; ++r) runtime_.control[r] = at<Control>(addresses.at(r));
}

void ThroughputEngine::set_staging(const std::vector<Address>& addresses, int max_tokens, int num_topk, int64_t bytes,
                                   Address stream) {
    const int ranks = runtime_.domain.num_ranks;
    for (int r = 0; r < ranks; ++r) staging_.base[r] = at<char>(addresses.at(r));
    staging_.max_tokens = max_tokens;
    staging_.places_offset = flag_bytes(ranks, max_tokens);
    staging_.data_offset = staging_.places_offset + place_bytes(ranks, max_tokens, num_topk);
    staging_.data_bytes = (bytes - staging_.data_offset) / 2 / 128 * 128;
    // A plan in state kNeedsRoom now has room. Staging never grows for an invalid plan.
    const int state = kPlaceable;
    check(
        cudaMemcpyAsync(&runtime_.local->plan_state, &state, sizeof(state), cudaMemcpyHostToDevice, as_stream(stream)),
        "growing staging");
}

void ThroughputEngine::destinations(Address topk_idx, int num_tokens, int num_topk, int num_experts,
                                    Address num_tokens_per_rank, Address num_tokens_per_expert,
                                    Address is_token_in_rank, Address stream) {
    DestinationsArgs args{};
    args.runtime = runtime_;
    args.topk_idx = at<int64_t>(topk_idx);
    args.num_tokens = num_tokens;
    args.num_topk = num_topk;
    args.num_experts = num_experts;
    args.num_tokens_per_rank = at<int>(num_tokens_per_rank);
    args.num_tokens_per_expert = at<int>(num_tokens_per_expert);
    args.is_token_in_rank = at<bool>(is_token_in_rank);
    check(launch_destinations(args, as_stream(stream)), "counting destinations");
}

void ThroughputEngine::begin_plan(const PlanRequest& request, bool refused, Address stream) {
    const int ranks = runtime_.domain.num_ranks, experts = request.num_experts;
    const int64_t tiles = num_tiles(request.num_tokens, request.num_topk);
    reserve_scratch(scratch_for(request.num_tokens, request.num_topk, experts));

    plan_ = PlanArgs{};
    plan_.runtime = runtime_;
    plan_.staging = staging_;
    plan_.topk_idx = at<int64_t>(request.topk_idx);
    plan_.given_membership = at<bool>(request.given_membership);
    plan_.given_expert_counts = at<int>(request.given_expert_counts);
    plan_.num_tokens = request.num_tokens;
    plan_.num_topk = request.num_topk;
    plan_.num_experts = experts;
    plan_.alignment = request.alignment;
    plan_.refused = refused;
    if (request.wait) plan_.ticket = ticket_ = ticket_ % 0x7ffffff0 + 1;
    plan_.rank_totals = scratch_;
    plan_.expert_totals = scratch_ + kMaxRanks;
    plan_.row_base = scratch_ + kTotals;
    plan_.tile_ranks = plan_.row_base + experts;
    plan_.tile_experts = plan_.tile_ranks + tiles * ranks;
    plan_.counted = {counted_, ranks, experts / ranks};
    plan_.max_recv = request.max_recv;
    plan_.max_rows = request.max_rows;
    check(launch_exchange_counts(plan_, as_stream(stream)), "exchanging counts");
}

void ThroughputEngine::refuse_plan(Address stream) {
    PlanRequest request{};
    request.num_experts = runtime_.domain.num_ranks;
    request.alignment = 1;
    request.wait = true;
    begin_plan(request, true, stream);
}

std::optional<PlanNumbers> ThroughputEngine::wait_plan(Address expert_counts) {
    // A kernel that times out publishes the failure. This longer limit is for a kernel that never runs.
    const auto bound = std::chrono::nanoseconds(runtime_.domain.timeout_nanoseconds) + std::chrono::seconds(10);
    const auto start = std::chrono::steady_clock::now();
    const auto await = [&](const Tagged& number) -> std::optional<int> {
        for (unsigned spin = 1;; ++spin) {
            const Tagged seen = read_at_once(number);
            if (seen.tag == ticket_) return seen.value;
            if (spin % 4096 == 0 && std::chrono::steady_clock::now() - start > bound) return std::nullopt;
        }
    };
    const HostCounts& host = *runtime_.host;
    for (int l = 0; l < plan_.num_experts / runtime_.domain.num_ranks; ++l) {
        const auto rows = await(host.expert_counts[l]);
        if (!rows) return std::nullopt;
        if (expert_counts) at<int64_t>(expert_counts)[l] = *rows;
    }
    const auto num_recv = await(host.num_recv);
    const auto num_rows = num_recv ? await(host.num_rows) : std::nullopt;
    const auto max_tokens = num_rows ? await(host.max_tokens) : std::nullopt;
    if (!max_tokens) return std::nullopt;
    std::atomic_thread_fence(std::memory_order_acquire);
    return PlanNumbers{*num_recv, *num_rows, *max_tokens, *max_tokens == HostCounts::kPlanFailed};
}

void ThroughputEngine::place_plan(const PlanMemory& memory, int num_blocks, Address stream) {
    plan_.staging = staging_;
    plan_.send_slot = at<int>(memory.send_slot);
    plan_.out_counted = at<int64_t>(memory.counted);
    plan_.received = at<int>(memory.received);
    plan_.row_recv = at<int>(memory.row_recv);
    plan_.max_recv = memory.max_recv;
    plan_.max_rows = memory.max_rows;
    check(launch_place_rows(plan_, as_stream(stream)), "placing rows");
    check(launch_collect_places(plan_, num_blocks, as_stream(stream)), "collecting places");
}

void ThroughputEngine::dispatch(const Route& route, const DispatchRequest& request, Address stream) {
    DispatchArgs args{};
    args.runtime = runtime_;
    args.staging = staging_;
    args.route = route;
    args.format_code = request.format_code;
    args.row_bytes = request.row_bytes;
    args.num_scales = request.num_scales;
    args.pitch = request.pitch;
    args.x = at<char>(request.x);
    args.x_stride = request.x_stride;
    args.scales = {at<int>(request.scales), request.scale_row_stride, request.scale_channel_stride};
    args.with_weights = request.with_weights;
    args.weights = at<float>(request.weights);
    args.weights_stride = request.weights_stride;
    args.out = at<char>(request.out);
    args.out_scales = {at<int>(request.out_scales), request.out_scale_row_stride, request.out_scale_channel_stride};
    args.out_weights = at<float>(request.out_weights);
    args.num_send_blocks = request.num_send_blocks;
    check(launch_dispatch(args, static_cast<Format>(request.format), request.num_blocks, as_stream(stream)),
          "dispatch");
}

void ThroughputEngine::combine(const Route& route, const CombineRequest& request, Address stream) {
    CombineArgs args{};
    args.runtime = runtime_;
    args.staging = staging_;
    args.route = route;
    args.format_code = request.format_code;
    args.row_bytes = request.row_bytes;
    args.pitch = request.pitch;
    args.x = at<char>(request.x);
    args.weights = at<float>(request.weights);
    args.apply_weights = request.apply_weights;
    args.carry_weights = request.carry_weights;
    args.bias[0] = at<char>(request.bias0);
    args.bias[1] = at<char>(request.bias1);
    args.num_biases = (request.bias0 != 0) + (request.bias1 != 0);
    args.out = at<char>(request.out);
    args.out_stride = request.out_stride;
    args.out_weights = at<float>(request.out_weights);
    args.out_weights_stride = request.out_weights_stride;
    args.num_send_blocks = request.num_send_blocks;
    check(launch_combine(args, static_cast<DataType>(request.dtype), request.num_blocks, as_stream(stream)), "combine");
}

void ThroughputEngine::refuse_operation(Address counted, Address stream) {
    check(launch_meet(runtime_, Operation{Operation::kRefuse, 0, 0, 0}, at<int64_t>(counted), as_stream(stream)),
          "refusing a call");
}

void ThroughputEngine::meet_to_grow(int max_tokens, int num_topk, int pitch, Address stream) {
    const Operation operation{Operation::kGrow, max_tokens, num_topk, pitch};
    check(launch_meet(runtime_, operation, nullptr, as_stream(stream)), "meeting to grow staging");
}

void ThroughputEngine::set_epochs(int plan_epoch, int data_epoch, Address stream) {
    check(launch_set_epochs(runtime_, plan_epoch, data_epoch, as_stream(stream)), "setting epochs");
}

}  // namespace deepep_moe
