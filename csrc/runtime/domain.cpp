#include "runtime/domain.h"

#include <atomic>

namespace deepep_moe {

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
    // At interpreter exit the driver may be gone already; there is nobody left to tell.
    cudaFree(domain_.state);
    cudaFreeHost(domain_.record);
}

void DomainRuntime::set_mailboxes(const std::vector<Address>& addresses) {
    for (int r = 0; r < domain_.num_ranks; ++r) domain_.mailbox[r] = at<Mailbox>(addresses.at(r));
}

std::optional<FailureReport> DomainRuntime::take_failure(bool lasting_only, Address stream) {
    volatile FailureRecord* record = domain_.record;
    const volatile FailureReport& report = record->report;
    const int failure = report.failure;
    const bool lasting = record->lasting != 0;
    if (failure == kNoFailure) {
        // A failure that lasts may follow one that was taken before the device could record another.
        if (lasting && last_taken_.failure != kNoFailure) return last_taken_;
        return std::nullopt;
    }
    if (lasting_only && !lasting) return std::nullopt;
    std::atomic_thread_fence(std::memory_order_acquire);
    last_taken_ = {failure, report.phase, report.peer, report.field, report.expected, report.seen};
    if (lasting) return last_taken_;
    record->report.failure = kNoFailure;
    check(cudaMemsetAsync(&domain_.state->reported, 0, sizeof(int), as_stream(stream)), "clearing a failure");
    return last_taken_;
}

bool DomainRuntime::failed() const {
    const volatile FailureRecord* record = domain_.record;
    return record->report.failure != kNoFailure || record->lasting != 0;
}

bool DomainRuntime::broken() const {
    const volatile FailureRecord* record = domain_.record;
    return record->lasting != 0;
}

std::vector<double> DomainRuntime::wait_seconds() const {
    DomainState state;
    check(cudaMemcpy(&state, domain_.state, sizeof(state), cudaMemcpyDeviceToHost), "reading wait times");
    std::vector<double> seconds;
    for (int r = 0; r < domain_.num_ranks; ++r) seconds.push_back(state.wait_nanoseconds[r] * 1e-9);
    return seconds;
}

}  // namespace deepep_moe
