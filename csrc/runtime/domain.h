// A domain: ranks that map each other's memory, with the state that all engines on it share: the peers, the error
// reports, the limit of waits.
//
// Nothing here depends on an engine. An engine has its own symmetric memory, epochs and argument structs, each of which
// contains a Domain.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/ranks.h"

namespace deepep_moe {

using Address = std::uintptr_t;  // of device memory, as returned by tensor.data_ptr()

enum Failure : int {
    kNoFailure,
    kTimeout,         // peer, phase; expected and seen epoch
    kPeerFailed,      // peer: the rank that failed; seen = its Failure; phase: of this rank
    kMismatch,        // peer, field; expected = own value, seen = the peer's value
    kBadExpert,       // expected = number of experts, seen = the index
    kRecvOverflow,    // peer: the rank without room; expected = its room for received rows, seen = rows it needs
    kRowsOverflow,    // the same for expert rows
    kStaging,         // expected = tokens per rank that staging holds, seen = tokens of a rank
    kBadPeerInput,    // peer: the rank that refused its input
    kRepeatedExpert,  // expected = the token, seen = the expert it chose twice
    kChangedRoute,    // peer: the token's rank; expected = the token, seen = the route that differs from the dispatch
};

// What a rank was doing. One list for all engines.
enum Phase : int {
    kPlanCounts,
    kPlanPlaces,
    kDispatchStart,
    kDispatchRows,
    kCombineStart,
    kCombineRows,
    kGrowStaging,
    kRefused,
    kLowLatencyDispatch,
    kLowLatencyCombine
};

// Values that ranks compare. One list for all engines.
enum Field : int {
    kNumExperts,
    kNumTopk,
    kAlignment,
    kOperation,
    kPlanNumber,
    kFormat,
    kRowBytes,
    kMaxTokens,
    kHidden,
    kRowFormat,
    kHandle,
    kNumFields
};

struct FailureReport {
    int failure, phase, peer, field, expected, seen;
};

// Pinned host memory, written by the device. The field `failure` of each report is written last. Each holds the first
// error of its kind.
struct FailureRecord {
    FailureReport problem;  // temporary: calls work again once the host has read it
    FailureReport notice;   // did not stop its call, which left out the invalid part
    FailureReport failure;  // permanent: no later call on this domain can work
};

inline namespace DEEPEP_MOE_WIDTH {

// Symmetric memory: written by peers, read by its owner.
struct Mailbox {
    int failed[kMaxRanks];  // [source] the Failure of that rank, or 0
};

// Device memory that only this rank accesses. `frozen` and `reported` are adjacent, because resume() clears both.
struct DomainState {
    int failed;    // a permanent failure was reported
    int frozen;    // a call ended with a problem, on all ranks: kernels do nothing until the host has read it
    int reported;  // FailureRecord::problem is in use
    int noticed;   // FailureRecord::notice is in use
    unsigned long long wait_nanoseconds[kMaxRanks];  // [source] total time that warps spent waiting
};

// The part of a kernel's arguments that describes its ranks.
struct Domain {
    int rank, num_ranks;
    Mailbox* mailbox[kMaxRanks];  // [rank] address in this process
    DomainState* state;
    FailureRecord* record;
    uint64_t timeout_nanoseconds;
    bool record_waits;
};

// The host side of the domain on one rank.
class DomainRuntime {
  public:
    DomainRuntime(int rank, int num_ranks, int device, double timeout_seconds, bool record_waits);
    ~DomainRuntime();
    DomainRuntime(const DomainRuntime&) = delete;
    DomainRuntime& operator=(const DomainRuntime&) = delete;

    static int64_t mailbox_bytes() { return sizeof(Mailbox); }
    // Symmetric memory: the address of each rank's part in this process. Must be zeroed before any rank uses it.
    void set_mailboxes(const std::vector<Address>& addresses);

    const Domain& view() const { return domain_; }

    // The permanent failure if there is one, else the problem if there is one.
    std::optional<FailureReport> failure() const;
    bool broken() const;  // whether there is a permanent failure
    std::optional<FailureReport> notice() const;
    // Clear the problem: kernels enqueued on `stream` after this work again.
    void resume(Address stream);
    // Clear the notice, so that kernels enqueued on `stream` after this can report another.
    void take_notice(Address stream);
    // Fail permanently and tell the peers.
    void give_up(Address stream);
    std::vector<double> wait_seconds() const;

  private:
    Domain domain_{};
};

cudaError_t launch_give_up(const Domain& domain, cudaStream_t stream);

}  // namespace DEEPEP_MOE_WIDTH

// -- helpers for the host code of engines ----------------------------------------------------------------------------

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

inline cudaStream_t as_stream(Address stream) { return at<CUstream_st>(stream); }

inline namespace DEEPEP_MOE_WIDTH {

inline RankSet set_of(const std::vector<int>& ranks) {
    RankSet set{};
    for (const int rank : ranks) {
        if (rank < 0 || rank >= kMaxRanks)
            throw std::invalid_argument("rank = " + std::to_string(rank) + ": must be 0 to " +
                                        std::to_string(kMaxRanks - 1));
        set.add(rank);
    }
    return set;
}

}  // namespace DEEPEP_MOE_WIDTH

}  // namespace deepep_moe
