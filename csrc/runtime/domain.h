// A domain: ranks that map each other's memory, and what every engine on it shares. Who the peers are, the record of
// the first failure, how long a wait may take.
//
// Nothing here knows an engine. An engine keeps its own symmetric memory, its own epochs and its own argument structs,
// and puts a Domain into each of these.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace deepep_moe {

using Address = std::uintptr_t;  // of device memory, as tensor.data_ptr() gives it

// Ranks of one domain. Kernels give each rank a lane of a warp and a bit of a RankMask; a larger domain needs a wider
// mask and loops over lanes, and no other place.
constexpr int kMaxRanks = 32;
using RankMask = unsigned;
static_assert(8 * sizeof(RankMask) >= kMaxRanks, "a bit per rank");

enum Failure : int {
    kNoFailure,
    kTimeout,         // peer, phase; expected and seen epoch
    kPeerFailed,      // peer: it gave up; seen = its Failure; phase is where this rank was
    kMismatch,        // peer, field; expected = own value, seen = the peer's
    kBadExpert,       // expected = number of experts, seen = the index
    kRecvOverflow,    // peer: whose; expected = rows there is room for, seen = rows that came (by source)
    kRowsOverflow,    // the same by expert
    kStaging,         // expected = tokens per rank that staging holds, seen = tokens of a rank
    kBadPeerInput,    // peer: it refused its input; its own error says why
    kRepeatedExpert,  // expected = the token, seen = the expert it chose twice
    kChangedRoute,    // peer: whose; expected = its token, seen = the route that went elsewhere in the dispatch
};

// Where a rank was. One list, so that the record of a failure means the same whichever engine wrote it.
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

// What ranks compare. Like phases, one list.
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

// Pinned host memory, written by the device, of each report `failure` last.
struct FailureRecord {
    FailureReport problem;  // the first that the ranks can go on after, once the host has taken it
    FailureReport notice;   // the first that stops nothing: its call was carried out without what was wrong
    FailureReport failure;  // the first after which no call on this domain can work
};

// Symmetric memory: written by peers, read by its owner.
struct Mailbox {
    int failed[kMaxRanks];  // [source] why that rank gave up (Failure), or 0
};

// Device memory of this rank alone. `frozen` and `reported` lie together: resume() clears both at once.
struct DomainState {
    int failed;    // this rank gave up
    int frozen;    // a call ended with a problem, on all ranks alike: kernels do nothing until the host has taken it
    int reported;  // FailureRecord::problem is in use
    int noticed;   // FailureRecord::notice is in use
    unsigned long long wait_nanoseconds[kMaxRanks];  // [source] total time that warps spent waiting
};

// What a kernel knows of its ranks.
struct Domain {
    int rank, num_ranks;
    Mailbox* mailbox[kMaxRanks];  // [rank] as mapped here
    DomainState* state;
    FailureRecord* record;
    uint64_t timeout_nanoseconds;
    bool record_waits;
};

// The host's side of one rank's domain.
class DomainRuntime {
  public:
    DomainRuntime(int rank, int num_ranks, int device, double timeout_seconds, bool record_waits);
    ~DomainRuntime();
    DomainRuntime(const DomainRuntime&) = delete;
    DomainRuntime& operator=(const DomainRuntime&) = delete;

    static int64_t mailbox_bytes() { return sizeof(Mailbox); }
    // Symmetric memory as mapped by this rank, one address per rank, zeroed before any rank uses it.
    void set_mailboxes(const std::vector<Address>& addresses);

    const Domain& view() const { return domain_; }

    // What went wrong, if anything: a failure that lasts, else a problem.
    std::optional<FailureReport> failure() const;
    bool broken() const;  // by a failure that lasts
    std::optional<FailureReport> notice() const;
    // The host knows of the problem: from this place of `stream` on kernels work again.
    void resume(Address stream);
    // The host knows of the notice: from this place of `stream` on there is room for another.
    void take_notice(Address stream);
    // This rank cannot take part in what its peers wait for.
    void give_up(Address stream);
    std::vector<double> wait_seconds() const;

  private:
    Domain domain_{};
};

cudaError_t launch_give_up(const Domain& domain, cudaStream_t stream);

// -- what the host code of every engine needs ------------------------------------------------------------------------

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

inline cudaStream_t as_stream(Address stream) { return at<CUstream_st>(stream); }

}  // namespace deepep_moe
