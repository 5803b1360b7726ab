// The latency engine over several nodes: arguments of the kernels that carry a call to ranks of other nodes. Does not
// depend on NVSHMEM's headers.
//
// The control block, the mailboxes and the arenas of such a group are in the symmetric heap. Ranks of this node are
// mapped, ranks of other nodes (remote ranks) are not: their entries in the tables of pointers lead to staging memory
// of this rank. So the kernels of csrc/latency run unchanged, and what they store for a remote rank is put into its
// memory afterwards, at the same place of the structure.
//
// The order of a call on the stream, with `exchange` = put what was sent, then wait for what remote ranks have sent:
//   dispatch   send, exchange, receive
//   combine    send tables, exchange, send rows, exchange, receive
// With a hook the last exchange is two kernels, the second of which belongs to the receiving half.
//
// When staging memory and the remote half may be written again. Both are covered by Control::consumed, as between
// mapped ranks: a remote rank that has received call e - 2 has received all puts of that call. Before a remote rank
// sends call e, this rank must have confirmed call e - 2 to it, and the kernel that sends cannot do this: it only
// stores into staging memory. So each exchange confirms what earlier kernels have received, and `post` does it after a
// receiving half; without a hook, the exchange of call e - 1 comes after the receiving half of call e - 2 and before
// call e. Two calls in flight may be received in either order: they use different halves, signals and confirmations.
//
// When data is complete. Every table and every row is a put with a signal of its own, a word that is set to the epoch.
// A receiver waits for the tables, which say which rows will come, and then for the signal of each row. So no put has
// to be ordered after another: nothing calls nvshmem_fence or nvshmem_quiet, which may wait for all puts of this rank,
// also those to a lost rank. (Exceptions: announcements and the barrier that ends masks.) No store that is larger than
// a word is assumed to arrive whole.
//
// No two puts of a word or signal to one rank are in flight at a time: a half is written again only after the rank has
// received all of the call before, and confirmations are sent only when they change. So signals are set, not added to.
#pragma once

#include "latency/args.h"

namespace deepep_moe::DEEPEP_MOE_WIDTH::latency {

constexpr int kPieces = kRankWords == 1 ? 8 : 2;  // blocks that send the rows for one rank

// What an exchange carries.
enum Step : int {
    kDispatchStep,  // tables and rows of a dispatch
    kTablesStep,    // tables of a combine
    kRowsStep,      // rows of a combine
};

// The tables that a rank sends to another; a combine has no counts.
enum Table : int { kFactsTable, kRoutesTable /* or weights */, kCountsTable, kNumTables };

// Symmetric memory. Each word contains the epoch, or the number of the meeting, for which it was set last.
struct Signals {
    uint64_t tables[kNumKinds][2][kMaxRanks][kNumTables];  // [kind][epoch % 2][source][table]
    uint64_t met[2][kMaxRanks];                            // [first, second half][source]
    uint64_t early[2][kMaxRanks];                          // [epoch % 2][source] of a dispatch that was announced
    int4 early_facts[2][kMaxRanks];                        // [epoch % 2][source] what was announced
};

// Device memory of this rank: the words that remote ranks were sent last.
struct Posted {
    int consumed[kMaxRanks][kNumKinds * 2];
    int failed[kMaxRanks];
};

struct Remote {
    Runtime runtime;
    RankSet ranks;  // remote ranks
    int pes[kMaxRanks];
    Signals* signals;
    Posted* posted;
};

struct ExchangeArgs {
    Remote remote;
    Arena arena;
    TopkIdx topk_idx;  // dispatch
    int num_tokens, num_topk, num_experts;
    Format format;
    Places places;     // of the dispatch
    const int* epoch;  // of this call, 0: skipped
    bool puts, waits;
    // This rank refused the call: it waits for what remote ranks send it in `arena`, whose shapes it reads from them.
    bool refuses;
    unsigned long long* wait_stats;  // [R] nanoseconds, or null
};

// Put what this step sends, wait for what remote ranks send, or both.
cudaError_t launch_exchange(const ExchangeArgs& args, Step step, cudaStream_t stream);
// Put confirmations and failures that remote ranks have not been sent.
cudaError_t launch_post(const Remote& remote, cudaStream_t stream);
// Put what launch_announce() stored for remote ranks. It has memory of its own there, because it may arrive after the
// facts of the call itself.
cudaError_t launch_put_announcement(const Remote& remote, bool withdrawn, cudaStream_t stream);
// As launch_announce_refusal() of csrc/latency, for all ranks.
cudaError_t launch_remote_announce_refusal(const Remote& remote, int* others, cudaStream_t stream);
// Tell remote ranks that this rank refuses a call: facts, and the signals of the other tables. Writes the call's epoch,
// or 0 if it is skipped, and does not count it. `source`: as in RefusalArgs.
cudaError_t launch_remote_refusal(const Remote& remote, Kind kind, const int* source, int* epoch, cudaStream_t stream);
// As launch_meet() of csrc/latency.
cudaError_t launch_remote_meet(const Remote& remote, bool second, const RankSet& lift, cudaStream_t stream);

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH::latency
