// Packets, waits for packets, and the start of every kernel of this engine.
#pragma once

#include "device/wait.cuh"
#include "latency/args.h"

namespace deepep_moe::DEEPEP_MOE_WIDTH::latency {

// -- packets ---------------------------------------------------------------------------------------------------------

// Part of a row <-> a packet. A last word with all bits set is NaN in every format; it becomes another NaN.
__device__ __forceinline__ int4 seal(int4 v) {
    v.w = v.w == -1 ? 1 : ~v.w;
    return v;
}
__device__ __forceinline__ bool is_sealed(const int4& packet) { return packet.w != 0; }
__device__ __forceinline__ int4 unseal(int4 packet) {
    packet.w = ~packet.w;
    return packet;
}

// -- waits ---------------------------------------------------------------------------------------------------

// The slow paths below are not inlined, and loops contain one copy of what they wait for: a kernel of a few
// microseconds executes most of its instructions once, so fetching them is part of its time.

inline __device__ __noinline__ void report_notice(const Domain& domain, Failure kind, int phase, int peer, int expected,
                                                  int seen) {
    deepep_moe::report_notice(domain, {kind, phase, peer, 0, expected, seen});
}

inline __device__ __noinline__ void report_mismatch(const Domain& domain, int phase, int peer, int field, int own,
                                                    int theirs) {
    report_failure(domain, {kMismatch, phase, peer, field, own, theirs});
}

// Whether to stop waiting for `peer` in call `epoch`, since `start`.
inline __device__ __noinline__ bool give_up(const Runtime& rt, int phase, int epoch, int peer, int seen,
                                            uint64_t start) {
    const Domain& domain = rt.domain;
    const bool late = global_nanoseconds() - start > domain.timeout_nanoseconds;
    if (rt.masks) {
        volatile int* masked = &rt.local->masked[peer];
        const bool failed = load_relaxed_system(&domain.mailbox[domain.rank]->failed[peer]) != kNoFailure;
        if (late || failed) *masked = 1;
        return late || failed || *masked != 0;
    }
    if (any_rank_failed(domain, phase, epoch)) return true;
    if (late) report_failure(domain, {kTimeout, phase, peer, 0, epoch, seen});
    return late;
}

struct Waiting {
    const Runtime& runtime;
    Kind kind;
    int epoch;
    bool crowded = false;  // so many warps wait for rows that polling by all lanes would saturate the L2 cache

    static constexpr unsigned kTries = 64;  // between two looks at the clock

    __device__ __forceinline__ bool is_masked(int rank) const {
        return runtime.masks && *static_cast<const volatile int*>(&runtime.local->masked[rank]) != 0;
    }

    __device__ __forceinline__ int phase() const {
        return kind == kDispatch ? kLowLatencyDispatch : kLowLatencyCombine;
    }

    // One thread waits until arrived(). `seen` goes into the report of a timeout.
    template <typename Arrived>
    __device__ __forceinline__ bool thread(int peer, const Arrived& arrived, const int& seen) const {
        uint64_t start = 0;
#pragma unroll 1
        for (unsigned tries = 0;; ++tries) {
            if (arrived()) return true;
            if (tries == 0)
                start = global_nanoseconds();
            else if (tries % kTries == 0 && give_up(runtime, phase(), epoch, peer, seen, start))
                return false;
        }
    }

    // A warp waits until arrived() in all lanes; disturbed(), evaluated by the first lane, ends the wait as well.
    template <typename Arrived, typename Disturbed>
    __device__ __forceinline__ bool warp(int peer, const Arrived& arrived, const Disturbed& disturbed) const {
        const int lane = threadIdx.x % kWarpSize;
        uint64_t start = 0;
        bool all_look = true;  // else only the last lane does
#pragma unroll 1
        for (unsigned tries = 0;; ++tries) {
            const bool all = __all_sync(kFullMask, (!all_look && lane != kWarpSize - 1) || arrived());
            if (all && all_look) return true;
            all_look = !crowded || all;
            if (tries == 0) {
                start = global_nanoseconds();
            } else if (tries % kTries == 0) {
                const bool end = lane == 0 && (disturbed() || give_up(runtime, phase(), epoch, peer, 0, start));
                if (__any_sync(kFullMask, end)) return false;
            }
        }
    }
    template <typename Arrived>
    __device__ __forceinline__ bool warp(int peer, const Arrived& arrived) const {
        return warp(peer, arrived, [] { return false; });
    }

    // With masks: whether `rank` is lost for this call. `lost`: whether it is for this block. A rank that answers at
    // the moment of the timeout is in time for some blocks and late for others; the first block to vote decides for
    // all. If it is not lost, its packets have arrived, and a mask set by a late block is removed.
    __device__ __forceinline__ bool vote(Vote on, int rank, bool lost) const {
        int* decided = &runtime.local->decided[static_cast<int>(on)][2 * kind + (epoch & 1)][rank];
        const int mine = static_cast<int>(2u * static_cast<unsigned>(epoch) + lost);
        const auto is_decided = [&](int value) { return (value & ~1) == (mine & ~1); };
        int found = *static_cast<volatile int*>(decided);
        if (!is_decided(found)) {
            __threadfence();  // between the packets that this block has seen and its vote
            const int before = atomicCAS(decided, found, mine);
            found = before == found ? mine : before;
        }
        __threadfence();  // between the vote of another block and the packets that it has seen
        if (lost && !(found & 1)) *static_cast<volatile int*>(&runtime.local->masked[rank]) = 0;
        return found & 1;
    }
};

// -- the beginning of a kernel -------------------------------------------------------------------------------

struct Entered {
    int epoch;         // of this call; 0: the call is skipped, on all ranks or after a failure that lasts
    RankSet writable;  // ranks whose half of the double buffer this call may write: neither masked nor lost
};

// Tell all peers which calls this rank has finished reading: those of earlier kernels. Called by a warp.
__device__ __forceinline__ void post_consumed(const Runtime& rt) {
    constexpr int kWords = kNumKinds * 2;
    __threadfence_system();
    for (int i = threadIdx.x % kWarpSize; i < kWords * rt.domain.num_ranks; i += kWarpSize)
        store_relaxed_system(&rt.control[i / kWords]->consumed[rt.domain.rank][i % kWords],
                             rt.local->consumed[i % kWords]);
    __syncwarp();
}

// Blocks that send tables: the first ones of the grid, block d to rank d, d + tables, ... after this one. A narrow grid
// has a block per rank.
__device__ __forceinline__ int table_blocks(int ranks) {
    return kRankWords == 1 ? ranks : min(ranks, static_cast<int>(gridDim.x) / 2);
}

// Whether this block writes the results that exist once per call. Not the last block: its post_consumed() is slow.
__device__ __forceinline__ bool reports_here() { return blockIdx.x == gridDim.x - 2; }

// Whether a peer that has read the rows of call `seen` has read those of the call before `epoch` in the same half, so
// that `epoch` may write there. Epochs wrap from -1 to 2, so 2 and 3 follow -2 and -1, and 0 and 1 at first.
__device__ __forceinline__ bool half_is_free(int seen, int epoch) {
    if (epoch == 2) return reached(seen, -2);
    if (epoch == 3) return seen == -1 || reached(seen, 1);
    return reached(seen, epoch - 2);
}

// Called by all threads of a block. `passed_on`: where the first part of a call stores the epoch for later ones, or
// null. `source`: the epoch of the call whose results this one needs, or null. meanwhile() runs while the loads of this
// function are in flight.
//
// While kernels are frozen, no call starts, and no call starts that depends on one that did not. A receiving half still
// runs if its sending half ran: rows left in memory would be mistaken for those of a later call.
//
// Relaxed loads of `consumed` suffice: only stores depend on them, and stores are not executed speculatively.
template <int kHalf, typename Meanwhile>
__device__ __forceinline__ Entered enter(const Runtime& rt, Kind kind, int* passed_on, const int* source,
                                         const Meanwhile& meanwhile) {
    __shared__ Entered shared;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int peer = threadIdx.x % kMaxRanks;  // a lane of the first kRankWords warps for each
    const bool posts = blockIdx.x == gridDim.x - 1 && warp == kWarps - 1;
    if (posts) post_consumed(rt);  // before any wait
    int stopped = 0, epoch = 0, consumed[2] = {0, 0};
    constexpr bool kBegins = (kHalf & kTables) != 0;  // whether this is the first kernel of the call
    int* counter = kBegins ? &rt.local->epochs[kind][blockIdx.x] : passed_on;
    const int* of_peer = rt.control[rt.domain.rank]->consumed[peer] + 2 * kind;
    if (kRankWords == 1 ? warp == 0 : warp < kRankWords) {
        stopped = *static_cast<const volatile int*>(&rt.domain.state->failed);
        if (kBegins) {
            stopped |= *static_cast<const volatile int*>(&rt.domain.state->frozen);
            if (source) stopped |= *static_cast<const volatile int*>(source) == 0;
        }
        epoch = *static_cast<const volatile int*>(counter);
        if ((kHalf & kSend) && peer < rt.domain.num_ranks)
            for (int i = 0; i < 2; ++i) consumed[i] = load_relaxed_system(of_peer + i);
    }
    meanwhile();
    if (kRankWords == 1 ? warp == 0 : warp < kRankWords) {
        unsigned writable = 0;
        if (kHalf & kSend) {
            if (kBegins) epoch = next_epoch(epoch);
            const Waiting waiting{rt, kind, epoch};
            int seen = epoch & 1 ? consumed[1] : consumed[0];
            bool mine = !stopped && epoch != 0 && peer < rt.domain.num_ranks && !waiting.is_masked(peer);
            if (mine && !half_is_free(seen, epoch)) {
                mine = waiting.thread(
                    peer, [&] { return half_is_free(seen = load_relaxed_system(of_peer + (epoch & 1)), epoch); }, seen);
                if (rt.masks) mine = !waiting.vote(Vote::kWritable, peer, !mine);
            }
            writable = __ballot_sync(kFullMask, mine);
            if (kBegins && kRankWords == 1 && lane == 0 && !stopped) *counter = epoch;
            if (kBegins && warp == 0 && lane == 0 && blockIdx.x == 0 && passed_on) *passed_on = stopped ? 0 : epoch;
        }
        if (lane == 0) shared.writable.words[kRankWords == 1 ? 0 : warp] = writable;
        if (warp == 0 && lane == 0) shared.epoch = stopped ? 0 : epoch;
    }
    __syncthreads();
    if (kBegins && kRankWords > 1 && threadIdx.x == 0 && shared.epoch != 0)
        *counter = shared.epoch;  // all have read it
    if ((kHalf & kReceive) && posts && lane == 0 && shared.epoch != 0)
        rt.local->consumed[2 * kind + (shared.epoch & 1)] = shared.epoch;
    return shared;
}

// Called by a warp. `withdrawn`: as if nothing had been sent for this call.
__device__ __forceinline__ void send_facts(const Runtime& rt, Kind kind, int epoch, int peer, const Facts& facts,
                                           bool withdrawn = false) {
    if (threadIdx.x % kWarpSize == 0)
        store_packet(&rt.control[peer]->facts[kind][epoch & 1][rt.domain.rank], facts.pack(withdrawn ? 0 : epoch));
}

// Sends facts of the next dispatch, before the kernel that executes it. Called by a block of kMaxRanks threads.
__device__ __forceinline__ void send_early(const Runtime& rt, int epoch, const Facts& facts, bool withdrawn) {
    const int r = threadIdx.x, lane = r % kWarpSize;
    if (r < kWarpSize) post_consumed(rt);  // before any wait, as in enter()
    const Waiting waiting{rt, kDispatch, epoch};
    const int* consumed = &rt.control[rt.domain.rank]->consumed[r][2 * kDispatch + (epoch & 1)];
    int seen = 0;
    const auto is_free = [&] { return half_is_free(seen = load_acquire_system(consumed), epoch); };
    const bool mine = r < rt.domain.num_ranks && !waiting.is_masked(r) && waiting.thread(r, is_free, seen);
    for (unsigned left = __ballot_sync(kFullMask, mine); left; left &= left - 1)
        send_facts(rt, kDispatch, epoch, r - lane + __ffs(left) - 1, facts, withdrawn);
}

// The facts of a rank that refuses its input, which knows nothing of the call.
__device__ __forceinline__ Facts refusal_facts(bool announced) {
    Facts facts{};
    facts.refused = true;
    facts.announced = announced;
    return facts;
}

// Whether everything that must agree does.
__device__ __forceinline__ bool equal(const Facts& own, const Facts& theirs) {
    const int4 a = own.pack(0), b = theirs.pack(0);
    return a.x == b.x && a.y == b.y && ((a.z ^ b.z) & Facts::kAgreedBits) == 0;
}

// One thread waits for the facts of `peer`, and for more if enough(facts) is false; false: they did not arrive.
template <typename Enough>
__device__ __forceinline__ bool read_facts(const Waiting& waiting, int peer, Facts& facts, const Enough& enough) {
    const Runtime& rt = waiting.runtime;
    const int4* from = &rt.control[rt.domain.rank]->facts[waiting.kind][waiting.epoch & 1][peer];
    int4 packet;
    const auto arrived = [&] {
        packet = load_packet(from);
        facts = Facts::unpack(packet);
        return packet.w == waiting.epoch && enough(facts);
    };
    return waiting.thread(peer, arrived, packet.w);
}

// Reports the first of the facts that must agree and differ. Not inlined: see above.
inline __device__ __noinline__ void report_difference(const Domain& domain, int phase, int peer, int4 own_packet,
                                                      int4 packet) {
    const Facts own = Facts::unpack(own_packet), theirs = Facts::unpack(packet);
    const bool dispatches = phase == kLowLatencyDispatch;
    const auto differ = [&](int field, int mine, int other) {
        if (mine != other) report_mismatch(domain, phase, peer, field, mine, other);
        return mine != other;
    };
    if (differ(kMaxTokens, own.max_tokens, theirs.max_tokens)) return;
    if (dispatches && differ(kHidden, own.key, theirs.key)) return;
    if (differ(kNumTopk, own.num_topk, theirs.num_topk)) return;
    if (differ(kNumExperts, own.num_experts, theirs.num_experts)) return;
    if (differ(kRowFormat, own.format, theirs.format)) return;
    differ(kHandle, own.key, theirs.key);
}

// Reports a failure that lasts and returns false if facts that must agree differ.
__device__ __forceinline__ bool agree(const Waiting& waiting, int peer, const Facts& own, const Facts& theirs) {
    if (equal(own, theirs)) return true;
    report_difference(waiting.runtime.domain, waiting.phase(), peer, own.pack(0), theirs.pack(0));
    return false;
}

// Facts about the ranks of a call, in shared memory.
struct Ranks {
    int tokens[kMaxRanks];  // of each rank; 0 if it is lost or refused its input
    int lost[kMaxRanks];
    int refused[kMaxRanks];

    // Called by kMaxRanks threads, the first of which has a multiple of kMaxRanks as its number. Adds the time waited
    // to wait_stats unless that is null.
    __device__ __forceinline__ void read(const Waiting& waiting, const Facts& own, unsigned long long* wait_stats) {
        const int r = threadIdx.x % kMaxRanks;
        if (r >= waiting.runtime.domain.num_ranks) return;
        const uint64_t start = wait_stats ? global_nanoseconds() : 0;
        if (waiting.is_masked(r))
            tokens[r] = refused[r] = 0, lost[r] = 1;
        else
            read_rank(waiting, own, r);
        if (wait_stats) atomicAdd(&wait_stats[r], static_cast<unsigned long long>(global_nanoseconds() - start));
    }

    // With masks: all blocks agree on which ranks are lost. Called by one thread for each rank, once `lost` says what
    // was lost for this block.
    __device__ __forceinline__ void agree_on_lost(const Waiting& waiting, const Facts& own, int r) {
        const bool mine = lost[r], all = waiting.vote(Vote::kTables, r, mine);
        if (mine && !all) read_rank(waiting, own, r);  // the facts are there
        lost[r] = all;
        if (all) tokens[r] = 0;
    }

  private:
    __device__ __forceinline__ void read_rank(const Waiting& waiting, const Facts& own, int r) {
        const Domain& domain = waiting.runtime.domain;
        Facts facts{};
        const bool came = read_facts(waiting, r, facts, [&](const Facts& theirs) {
            return !theirs.announced || (!theirs.refused && !equal(own, theirs));
        });
        refused[r] = came && facts.refused;
        if (refused[r]) report_notice(domain, kBadPeerInput, waiting.phase(), r, 0, 0);
        lost[r] = !came || (!refused[r] && !agree(waiting, r, own, facts));
        tokens[r] = lost[r] || refused[r] ? 0 : facts.tokens;
    }
};

// The ranks that own experts of a token. Called by a whole warp. Indices out of range count as dropped.
__device__ __forceinline__ RankSet ranks_of(const TopkIdx& topk_idx, int64_t token, int num_topk, int num_experts,
                                            int local_experts) {
    const int lane = threadIdx.x % kWarpSize;
    RankSet ranks{};
    if (lane < num_topk) {
        const int64_t expert = topk_idx.at(token * num_topk + lane);
        if (expert >= 0 && expert < num_experts) ranks.add(static_cast<int>(expert) / local_experts);
    }
#pragma unroll
    for (int w = 0; w < kRankWords; ++w) ranks.words[w] = __reduce_or_sync(kFullMask, ranks.words[w]);
    return ranks;
}

// -- sets of ranks ---------------------------------------------------------------------------------------------------

// The lowest rank of a set, -1 if there is none.
__device__ __forceinline__ int first_of(const RankSet& ranks) {
    int first = __ffs(ranks.words[0]) - 1;
#pragma unroll
    for (int w = 1; w < kRankWords; ++w)
        if (first < 0 && ranks.words[w] != 0) first = 32 * w + __ffs(ranks.words[w]) - 1;
    return first;
}

// Takes the lowest rank out of a set that has one.
__device__ __forceinline__ void remove_first(RankSet& ranks) {
    bool removed = false;
#pragma unroll
    for (int w = 0; w < kRankWords; ++w) {
        if (kRankWords == 1 || (!removed && ranks.words[w] != 0)) {
            ranks.words[w] &= ranks.words[w] - 1;
            removed = true;
        }
    }
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH::latency
