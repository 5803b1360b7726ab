#include "runtime/domain.h"

#include <atomic>
#include <cstddef>

namespace deepep_moe::DEEPEP_MOE_WIDTH {

DomainRuntime::DomainRuntime(int rank, int num_ranks, int device, double timeout_seconds, bool record_waits) {
    if (num_ranks < 1 || num_ranks > kMaxRanks)
        throw std::invalid_argument("num_ranks = " + std::to_string(num_ranks) + ": must be 1 to " +
                                    std::to_string(kMaxRanks));
    domain_.rank = rank;
    domain_.num_ranks = num_ranks;
    domain_.timeout_nanoseconds = static_cast<uint64_t>(timeout_seconds * 1e9);
    domain_.record_waits = record_waits;
    check(cudaSetDevice(device), "cudaSetDevice");
    check(cudaMalloc(&domain_.state, sizeof(DomainState)), "allocating device state");
    check(cudaMemset(domain_.state, 0, sizeof(DomainState)), "clearing device state");
    check(cudaHostAlloc(&domain_.record, sizeof(FailureRecord), cudaHostAllocMapped), "allocating pinned memory");
    *domain_.record = FailureRecord{};
    check(cudaDeviceSynchronize(), "clearing device state");
}

DomainRuntime::~DomainRuntime() {
    // Errors are ignored: at interpreter exit the driver may have shut down already.
    cudaFree(domain_.state);
    cudaFreeHost(domain_.record);
}

void DomainRuntime::set_mailboxes(const std::vector<Address>& addresses) {
    for (int r = 0; r < domain_.num_ranks; ++r) domain_.mailbox[r] = at<Mailbox>(addresses.at(r));
}

namespace {

std::optional<FailureReport> read(const volatile FailureReport& report) {
    const int failure = report.failure;
    if (failure == kNoFailure) return std::nullopt;
    std::atomic_thread_fence(std::memory_order_acquire);
    return FailureReport{failure, report.phase, report.peer, report.field, report.expected, report.seen};
}

}  // namespace

std::optional<FailureReport> DomainRuntime::failure() const {
    const auto lasting = read(domain_.record->failure);
    return lasting ? lasting : read(domain_.record->problem);
}

bool DomainRuntime::broken() const { return read(domain_.record->failure).has_value(); }

void DomainRuntime::resume(Address stream) {
    static_cast<volatile FailureReport&>(domain_.record->problem).failure = kNoFailure;
    constexpr size_t kBytes = offsetof(DomainState, reported) + sizeof(int) - offsetof(DomainState, frozen);
    check(cudaMemsetAsync(&domain_.state->frozen, 0, kBytes, as_stream(stream)), "resuming after a problem");
}

std::optional<FailureReport> DomainRuntime::notice() const { return read(domain_.record->notice); }

void DomainRuntime::take_notice(Address stream) {
    static_cast<volatile FailureReport&>(domain_.record->notice).failure = kNoFailure;
    check(cudaMemsetAsync(&domain_.state->noticed, 0, sizeof(int), as_stream(stream)), "taking a notice");
}

void DomainRuntime::give_up(Address stream) { check(launch_give_up(domain_, as_stream(stream)), "giving up"); }

std::vector<double> DomainRuntime::wait_seconds() const {
    DomainState state;
    check(cudaMemcpy(&state, domain_.state, sizeof(state), cudaMemcpyDeviceToHost), "reading wait times");
    std::vector<double> seconds;
    for (int r = 0; r < domain_.num_ranks; ++r) seconds.push_back(state.wait_nanoseconds[r] * 1e-9);
    return seconds;
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH
