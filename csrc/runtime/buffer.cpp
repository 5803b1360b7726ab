#include "runtime/buffer.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <string>

namespace deepep_moe {

namespace {

void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

cudaStream_t as_stream(Address stream) { return at<CUstream_st>(stream); }

int64_t align(int64_t bytes) { return (bytes + 127) / 128 * 128; }

int64_t flag_bytes(int num_ranks, int max_tokens) {
    return align(2 * static_cast<int64_t>(num_ranks) * max_tokens * kFlagsPerRow * sizeof(int));
}

}  // namespace

Buffer::Buffer(int rank, int num_ranks, int device, double timeout_seconds, bool record_waits) : device_(device) {
    if (num_ranks < 1 || num_ranks > kMaxRanks)
        throw std::invalid_argument("num_ranks = " + std::to_string(num_ranks) + ": must be 1 to " +
                                    std::to_string(kMaxRanks));
    runtime_.rank = rank;
    runtime_.num_ranks = num_ranks;
    runtime_.timeout_nanoseconds = static_cast<uint64_t>(timeout_seconds * 1e9);
    runtime_.record_waits = record_waits;
    check(cudaSetDevice(device), "cudaSetDevice");
    check(cudaMalloc(&runtime_.local, sizeof(LocalState)), "allocating device state");
    check(cudaMemset(runtime_.local, 0, sizeof(LocalState)), "clearing device state");
    check(cudaMalloc(&counted_, Counted::kMaxSize * sizeof(int64_t)), "allocating device state");
    check(cudaHostAlloc(&runtime_.status, sizeof(HostStatus), cudaHostAllocMapped), "allocating pinned memory");
    *runtime_.status = HostStatus{};
    check(cudaDeviceSynchronize(), "clearing device state");
}

Buffer::~Buffer() {
    // At interpreter exit the driver may be gone already; there is nobody left to tell.
    cudaFree(runtime_.local);
    cudaFree(counted_);
    cudaFree(scratch_);
    cudaFreeHost(runtime_.status);
}

void Buffer::reserve_scratch(int64_t ints) {
    if (ints <= scratch_ints_) return;
    check(cudaFree(scratch_), "freeing scratch");
    scratch_ = nullptr;
    check(cudaMalloc(&scratch_, ints * sizeof(int)), "allocating scratch");
    check(cudaMemset(scratch_, 0, ints * sizeof(int)), "clearing scratch");  // totals are zero between plans
    check(cudaDeviceSynchronize(), "clearing scratch");
    scratch_ints_ = ints;
}

std::tuple<int64_t, int64_t> Buffer::staging_bytes(int num_ranks, int max_tokens, int num_topk, int64_t pitch) {
    const int64_t slots = static_cast<int64_t>(num_ranks) * max_tokens;
    const int64_t flags = flag_bytes(num_ranks, max_tokens);
    const int64_t places = align(slots * received_words(num_topk) * sizeof(int));
    const int64_t half = align(static_cast<int64_t>(num_ranks - 1) * max_tokens * pitch);
    return {flags + places + 2 * half, flags + places};
}

void Buffer::set_control(const std::vector<Address>& addresses) {
    for (int r = 0; r < runtime_.num_ranks; ++r) runtime_.control[r] = at<Control>(addresses.at(r));
}

void Buffer::set_staging(const std::vector<Address>& addresses, int max_tokens, int num_topk, int64_t bytes) {
    // A plan that waited for more room has it now.
    const int fits = 1;
    check(cudaMemcpy(&runtime_.local->staging_fits, &fits, sizeof(fits), cudaMemcpyHostToDevice), "growing staging");
    const int64_t head = std::get<1>(staging_bytes(runtime_.num_ranks, max_tokens, num_topk, 0));
    for (int r = 0; r < runtime_.num_ranks; ++r) staging_.base[r] = at<char>(addresses.at(r));
    staging_.max_tokens = max_tokens;
    staging_.places_offset = flag_bytes(runtime_.num_ranks, max_tokens);
    staging_.data_offset = head;
    staging_.data_bytes = (bytes - head) / 2 / 128 * 128;
}

void Buffer::layout(Address topk_idx, int num_tokens, int num_topk, int num_experts, int ranks_per_node,
                    Address num_tokens_per_rank, Address num_tokens_per_node, Address num_tokens_per_expert,
                    Address is_token_in_rank, Address stream) {
    LayoutArgs args{};
    args.runtime = runtime_;
    args.topk_idx = at<int64_t>(topk_idx);
    args.num_tokens = num_tokens;
    args.num_topk = num_topk;
    args.num_experts = num_experts;
    args.num_tokens_per_rank = at<int>(num_tokens_per_rank);
    args.num_tokens_per_node = at<int>(num_tokens_per_node);
    args.ranks_per_node = ranks_per_node;
    args.num_tokens_per_expert = at<int>(num_tokens_per_expert);
    args.is_token_in_rank = at<bool>(is_token_in_rank);
    check(launch_layout(args, as_stream(stream)), "layout");
}

void Buffer::begin_plan(Address topk_idx, Address given_membership, Address given_expert_counts, int num_tokens,
                        int num_topk, int num_experts, int alignment, bool refused, bool wait, int max_recv,
                        int max_rows, Address stream) {
    const int per_tile = tile_tokens(num_topk);
    const int64_t tiles = std::max((num_tokens + per_tile - 1) / per_tile, 1);
    const int totals = kMaxRanks + kMaxExperts;
    reserve_scratch(totals + num_experts + tiles * (runtime_.num_ranks + num_experts));

    plan_ = PlanArgs{};
    plan_.runtime = runtime_;
    plan_.staging = staging_;
    plan_.topk_idx = at<int64_t>(topk_idx);
    plan_.given_membership = at<bool>(given_membership);
    plan_.given_expert_counts = at<int>(given_expert_counts);
    plan_.num_tokens = num_tokens;
    plan_.num_topk = num_topk;
    plan_.num_experts = num_experts;
    plan_.alignment = alignment;
    plan_.refused = refused;
    if (wait) plan_.ticket = ticket_ = ticket_ % 0x7ffffff0 + 1;
    plan_.rank_totals = scratch_;
    plan_.expert_totals = scratch_ + kMaxRanks;
    plan_.row_base = scratch_ + totals;
    plan_.tile_ranks = plan_.row_base + num_experts;
    plan_.tile_experts = plan_.tile_ranks + tiles * runtime_.num_ranks;
    plan_.counted = {counted_, runtime_.num_ranks, num_experts / runtime_.num_ranks};
    plan_.max_recv = max_recv;
    plan_.max_rows = max_rows;
    check(launch_exchange_counts(plan_, as_stream(stream)), "exchanging counts");
}

std::optional<PlanNumbers> Buffer::wait_plan(Address expert_counts) {
    // The kernel gives up first and then publishes what it has; this bound is for a kernel that never runs.
    const auto bound = std::chrono::nanoseconds(runtime_.timeout_nanoseconds) + std::chrono::seconds(10);
    const auto start = std::chrono::steady_clock::now();
    const auto await = [&](const volatile Tagged& number) {
        for (unsigned spin = 1; number.tag != ticket_; ++spin)
            if (spin % 4096 == 0 && std::chrono::steady_clock::now() - start > bound) return false;
        return true;
    };
    const volatile HostStatus& status = *runtime_.status;
    for (int l = 0; l < plan_.num_experts / runtime_.num_ranks; ++l) {
        if (!await(status.expert_counts[l])) return std::nullopt;
        if (expert_counts) at<int64_t>(expert_counts)[l] = status.expert_counts[l].value;
    }
    if (!await(status.num_recv) || !await(status.num_rows) || !await(status.max_tokens)) return std::nullopt;
    std::atomic_thread_fence(std::memory_order_acquire);
    return PlanNumbers{status.num_recv.value, status.num_rows.value, status.max_tokens.value,
                       status.failure != kNoFailure};
}

void Buffer::place_plan(Address send_slot, Address counted, Address received, Address row_recv, int max_recv,
                        int max_rows, int num_blocks, Address stream) {
    plan_.staging = staging_;
    plan_.send_slot = at<int>(send_slot);
    plan_.out_counted = at<int64_t>(counted);
    plan_.received = at<int>(received);
    plan_.row_recv = at<int>(row_recv);
    plan_.max_recv = max_recv;
    plan_.max_rows = max_rows;
    check(launch_place_rows(plan_, as_stream(stream)), "placing rows");
    check(launch_collect_places(plan_, num_blocks, as_stream(stream)), "collecting places");
}

void Buffer::set_route(int num_tokens, int num_topk, int max_recv, int max_rows, Address send_slot, Address counted,
                       Address received, Address row_recv, bool grouped) {
    route_.num_tokens = num_tokens;
    route_.num_topk = num_topk;
    route_.max_recv = max_recv;
    route_.max_rows = max_rows;
    route_.send_slot = at<int>(send_slot);
    route_.rank_prefix = at<int64_t>(counted);  // which comes first
    route_.received = at<int>(received);
    route_.row_recv = at<int>(row_recv);
    route_.grouped = grouped;
}

void Buffer::dispatch(Address x, int format, int row_bytes, int pitch, Address scales, int64_t scale_row_stride,
                      int64_t scale_channel_stride, int num_scales, Address weights, Address out, Address out_scales,
                      int64_t out_scale_row_stride, int64_t out_scale_channel_stride, Address out_weights,
                      int num_blocks, int num_send_blocks, Address stream) {
    DispatchArgs args{};
    args.runtime = runtime_;
    args.staging = staging_;
    args.route = route_;
    args.row_bytes = row_bytes;
    args.num_scales = num_scales;
    args.pitch = pitch;
    args.x = at<char>(x);
    args.scales = {at<int>(scales), scale_row_stride, scale_channel_stride};
    args.weights = at<float>(weights);
    args.out = at<char>(out);
    args.out_scales = {at<int>(out_scales), out_scale_row_stride, out_scale_channel_stride};
    args.out_weights = at<float>(out_weights);
    args.num_send_blocks = num_send_blocks;
    check(launch_dispatch(args, static_cast<Format>(format), num_blocks, as_stream(stream)), "dispatch");
}

void Buffer::combine(Address x, int dtype, int row_bytes, int pitch, Address weights, bool apply_weights,
                     bool carry_weights, Address bias0, Address bias1, Address out, Address out_weights, int num_blocks,
                     int num_send_blocks, Address stream) {
    CombineArgs args{};
    args.runtime = runtime_;
    args.staging = staging_;
    args.route = route_;
    args.row_bytes = row_bytes;
    args.pitch = pitch;
    args.x = at<char>(x);
    args.weights = at<float>(weights);
    args.apply_weights = apply_weights;
    args.carry_weights = carry_weights;
    args.bias[0] = at<char>(bias0);
    args.bias[1] = at<char>(bias1);
    args.num_biases = (bias0 != 0) + (bias1 != 0);
    args.out = at<char>(out);
    args.out_weights = at<float>(out_weights);
    args.num_send_blocks = num_send_blocks;
    check(launch_combine(args, static_cast<DataType>(dtype), num_blocks, as_stream(stream)), "combine");
}

std::optional<FailureReport> Buffer::take_failure(bool lasting_only) {
    volatile HostStatus* status = runtime_.status;
    const int failure = status->failure;
    if (failure == kNoFailure) return std::nullopt;
    std::atomic_thread_fence(std::memory_order_acquire);
    FailureReport report{failure, status->phase, status->peer, status->field, status->expected, status->seen};
    const bool lasting = failure == kTimeout || failure == kPeerFailed || failure == kStaging ||
                         (failure == kMismatch && report.phase != kPlanCounts);
    if (lasting) return report;
    if (lasting_only) return std::nullopt;
    status->failure = kNoFailure;
    return report;
}

std::vector<double> Buffer::wait_seconds() const {
    LocalState local;
    check(cudaMemcpy(&local, runtime_.local, sizeof(local), cudaMemcpyDeviceToHost), "reading wait times");
    std::vector<double> seconds;
    for (int r = 0; r < runtime_.num_ranks; ++r) seconds.push_back(local.wait_nanoseconds[r] * 1e-9);
    return seconds;
}

}  // namespace deepep_moe
