// Packets, waits for them, and what every kernel of this engine begins with.
#pragma once

#include "device/wait.cuh"
#include "latency/args.h"

namespace deepep_moe::latency {

// -- packets: sixteen bytes, written and read at once --------------------------------------------------------

#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 4)
__device__ __forceinline__ int4 load_packet(const int4* p) {
    union {
        uint64_t half[2];
        int4 all;
    } v;
    asm volatile("{\n.reg .b128 q;\nld.relaxed.sys.global.b128 q, [%2];\nmov.b128 {%0, %1}, q;\n}"
                 : "=l"(v.half[0]), "=l"(v.half[1])
                 : "l"(p)
                 : "memory");
    return v.all;
}

__device__ __forceinline__ void store_packet(int4* p, int4 packet) {
    union {
        int4 all;
        uint64_t half[2];
    } v{packet};
    asm volatile("{\n.reg .b128 q;\nmov.b128 q, {%1, %2};\nst.relaxed.sys.global.b128 [%0], q;\n}" ::"l"(p),
                 "l"(v.half[0]), "l"(v.half[1])
                 : "memory");
}
#else  // what that becomes on every GPU since Volta
__device__ __forceinline__ int4 load_packet(const int4* p) {
    int4 v;
    asm volatile("ld.volatile.global.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_packet(int4* p, int4 v) {
    asm volatile("st.volatile.global.v4.s32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
#endif

// Part of a row <-> a packet. All bits set in the last word are NaNs in any format: one of them has other bits then.
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

struct Waiting {
    const Runtime& runtime;
    int phase, epoch;
    bool crowded = false;  // so many warps wait for rows that their loads alone would keep the L2 cache busy

    __device__ __forceinline__ bool is_masked(int rank) const {
        return runtime.masks && *static_cast<const volatile int*>(&runtime.local->masked[rank]) != 0;
    }

    // The slow part of a wait. True: `peer` will not be waited for any longer.
    __device__ __forceinline__ bool give_up(int peer, int seen, uint64_t start) const {
        const Domain& domain = runtime.domain;
        const bool late = global_nanoseconds() - start > domain.timeout_nanoseconds;
        if (runtime.masks) {
            const bool failed = load_relaxed_system(&domain.mailbox[domain.rank]->failed[peer]) != kNoFailure;
            if (late || failed) *static_cast<volatile int*>(&runtime.local->masked[peer]) = 1;
            return late || failed || is_masked(peer);
        }
        if (any_rank_failed(domain, phase, epoch)) return true;
        if (late) report_failure(domain, {kTimeout, phase, peer, 0, epoch, seen});
        return late;
    }

    // A thread's wait, until arrived() says so; seen() is for the report.
    template <typename Arrived>
    __device__ __forceinline__ bool thread(int peer, const Arrived& arrived, const int& seen) const {
        if (arrived()) return true;
        const uint64_t start = global_nanoseconds();
        while (true) {
#pragma unroll 1
            for (int spin = 0; spin < 64; ++spin)
                if (arrived()) return true;
            if (give_up(peer, seen, start)) return false;
        }
    }

    // A warp's wait, until arrived() says so in all its lanes; disturbed(), of the first lane, ends it too.
    template <typename Arrived, typename Disturbed>
    __device__ __forceinline__ bool warp(int peer, const Arrived& arrived, const Disturbed& disturbed) const {
        if (__all_sync(kFullMask, arrived())) return true;
        const uint64_t start = global_nanoseconds();
        while (true) {
#pragma unroll 1
            for (int spin = 0; spin < 64; ++spin) {
                if (crowded) {  // one lane looks first
                    const bool looks = threadIdx.x % kWarpSize == kWarpSize - 1;
                    if (!__all_sync(kFullMask, !looks || arrived())) continue;
                }
                if (__all_sync(kFullMask, arrived())) return true;
            }
            const bool end = threadIdx.x % kWarpSize == 0 && (disturbed() || give_up(peer, 0, start));
            if (__any_sync(kFullMask, end)) return false;
        }
    }
    template <typename Arrived>
    __device__ __forceinline__ bool warp(int peer, const Arrived& arrived) const {
        return warp(peer, arrived, [] { return false; });
    }
};

// -- the beginning of a kernel -------------------------------------------------------------------------------

struct Entered {
    int epoch;          // of this call; 0: it is skipped, on all ranks alike, or they are out of step for good
    RankMask writable;  // ranks whose half of the double buffer this call may write; not those that are masked or lost
};

// Tell all peers which calls this rank has finished reading: those of earlier kernels. A warp calls.
__device__ __forceinline__ void post_consumed(const Runtime& rt) {
    constexpr int kWords = kNumKinds * 2;
    __threadfence_system();
    for (int i = threadIdx.x % kWarpSize; i < kWords * rt.domain.num_ranks; i += kWarpSize)
        store_relaxed_system(&rt.control[i / kWords]->consumed[rt.domain.rank][i % kWords],
                             rt.local->consumed[i % kWords]);
    __syncwarp();
}

// The block that writes what is said once of a call. Not the last one, whose post_consumed() takes long.
__device__ __forceinline__ bool reports_here() { return blockIdx.x == gridDim.x - 2; }

// All threads call. `passed_on`: where the sending half leaves the epoch for the receiving one, or null. What the
// kernel is to begin with is loaded first and waited for last, and meanwhile() runs between. `source`: the epoch of the
// call whose results this one needs, or null.
//
// While kernels are frozen no call begins, and none follows one that did not begin. But a receiving half does what its
// sending half was answered with: rows that nobody takes would be taken for those of a later call.
//
// Relaxed loads of `consumed` suffice: what depends on them are stores, which cannot run ahead of them.
template <int kHalf, typename Meanwhile>
__device__ __forceinline__ Entered enter(const Runtime& rt, Kind kind, int phase, int* passed_on, const int* source,
                                         const Meanwhile& meanwhile) {
    __shared__ Entered shared;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const bool posts = blockIdx.x == gridDim.x - 1 && warp == kWarps - 1;
    if (posts) post_consumed(rt);  // before any wait
    int stopped = 0, epoch = 0, consumed[2] = {0, 0};
    int* counter = kHalf & kSend ? &rt.local->epochs[kind][blockIdx.x] : passed_on;
    const int* of_peer = rt.control[rt.domain.rank]->consumed[lane] + 2 * kind;
    if (warp == 0) {
        stopped = *static_cast<const volatile int*>(&rt.domain.state->failed);
        if (kHalf & kSend) {
            stopped |= *static_cast<const volatile int*>(&rt.domain.state->frozen);
            if (source) stopped |= *static_cast<const volatile int*>(source) == 0;
        }
        epoch = *static_cast<const volatile int*>(counter);
        if ((kHalf & kSend) && lane < rt.domain.num_ranks)
            for (int i = 0; i < 2; ++i) consumed[i] = load_relaxed_system(of_peer + i);
    }
    meanwhile();
    if (warp == 0) {
        RankMask writable = 0;
        if (kHalf & kSend) {
            epoch = next_epoch(epoch);
            const Waiting waiting{rt, phase, epoch};
            const int before = epoch == 2 ? -2 : epoch - 2;  // 0 comes before 2 at first, later the last even number
            int seen = epoch & 1 ? consumed[1] : consumed[0];
            bool mine = !stopped && lane < rt.domain.num_ranks && !waiting.is_masked(lane);
            if (mine && !reached(seen, before))
                mine = waiting.thread(
                    lane, [&] { return reached(seen = load_relaxed_system(of_peer + (epoch & 1)), before); }, seen);
            writable = __ballot_sync(kFullMask, mine);
            if (lane == 0 && !stopped) *counter = epoch;
            if (lane == 0 && blockIdx.x == 0 && passed_on) *passed_on = stopped ? 0 : epoch;
        }
        if (lane == 0) shared = {stopped ? 0 : epoch, writable};
    }
    __syncthreads();
    if ((kHalf & kReceive) && posts && lane == 0 && shared.epoch != 0)
        rt.local->consumed[2 * kind + (shared.epoch & 1)] = shared.epoch;
    return shared;
}

// Three lanes or more call. Withdrawn: as if nothing had been said about this call.
__device__ __forceinline__ void send_facts(const Runtime& rt, Kind kind, int epoch, int peer, const Facts& facts,
                                           bool withdrawn = false) {
    const int i = threadIdx.x % kWarpSize;
    if (i < Facts::kPackets)
        store_packet(&rt.control[peer]->facts[kind][epoch & 1][rt.domain.rank][i],
                     {facts.word[3 * i], facts.word[3 * i + 1], facts.word[3 * i + 2], withdrawn ? 0 : epoch});
}

// The first word that must agree and does not, or -1.
__device__ __forceinline__ int first_difference(const Facts& own, const Facts& theirs) {
    int word = -1;
#pragma unroll
    for (int i = Facts::kNumAgreed - 1; i >= 0; --i)
        if (own.word[i] != theirs.word[i]) word = i;
    return word;
}

// What one thread reads of `peer`; false: it did not come. An announcement is an answer only where it differs
// from `own`.
__device__ __forceinline__ bool read_facts(const Waiting& waiting, Kind kind, int peer, const Facts& own,
                                           Facts& facts) {
    const Runtime& rt = waiting.runtime;
    const int4* from = rt.control[rt.domain.rank]->facts[kind][waiting.epoch & 1][peer];
    int4 packets[Facts::kPackets];
    const auto arrived = [&] {
        bool all = true;
#pragma unroll
        for (int i = 0; i < Facts::kPackets; ++i) packets[i] = load_packet(from + i);
#pragma unroll
        for (int i = 0; i < Facts::kPackets; ++i) {
            all = all && packets[i].w == waiting.epoch;
            facts.word[3 * i] = packets[i].x;
            facts.word[3 * i + 1] = packets[i].y;
            facts.word[3 * i + 2] = packets[i].z;
        }
        return all && (!facts.word[Facts::kFactAnnounced] || first_difference(own, facts) >= 0);
    };
    return waiting.thread(peer, arrived, packets[0].w);
}

// False, and the end of it all, where facts that must agree do not.
__device__ __forceinline__ bool agree(const Waiting& waiting, int peer, const Facts& own, const Facts& theirs) {
    constexpr int kFields[] = {kMaxTokens, kHidden, kNumTopk, kNumExperts, kRowFormat, kHandle};
    const int word = first_difference(own, theirs);
#pragma unroll
    for (int i = 0; i < Facts::kNumAgreed; ++i)
        if (i == word)
            report_failure(waiting.runtime.domain,
                           {kMismatch, waiting.phase, peer, kFields[i], own.word[i], theirs.word[i]});
    return word < 0;
}

// The same answer for all blocks of a call, should a rank be lost to some of them only. Needed with masks alone.
__device__ __forceinline__ bool all_lose(const Runtime& rt, Kind kind, int epoch, int rank, bool lost) {
    int* decided = &rt.local->decided[2 * kind + (epoch & 1)][rank];
    const int mine = static_cast<int>(2u * static_cast<unsigned>(epoch) + lost);
    const int before = *static_cast<volatile int*>(decided);
    const auto is_decided = [&](int value) { return (value & ~1) == (mine & ~1); };
    if (is_decided(before)) return before & 1;
    const int found = atomicCAS(decided, before, mine);
    return is_decided(found) ? found & 1 : lost;
}

// What a block knows about the ranks of a call before it receives, in shared memory.
struct Ranks {
    int tokens[kMaxRanks];  // of each rank; 0 where it is lost or refused its input
    int lost[kMaxRanks];
    int refused[kMaxRanks];

    // A warp calls, a lane per rank. Times go to wait_stats if that is not null.
    __device__ __forceinline__ void read(const Waiting& waiting, Kind kind, const Facts& own,
                                         unsigned long long* wait_stats) {
        const Runtime& rt = waiting.runtime;
        const int r = threadIdx.x % kWarpSize;
        if (r >= rt.domain.num_ranks) return;
        const uint64_t start = wait_stats ? global_nanoseconds() : 0;
        Facts facts{};
        const bool came = !waiting.is_masked(r) && read_facts(waiting, kind, r, own, facts);
        if (wait_stats) atomicAdd(&wait_stats[r], static_cast<unsigned long long>(global_nanoseconds() - start));
        refused[r] = came && facts.word[Facts::kFactRefused];
        if (refused[r] && r != rt.domain.rank) report_notice(rt.domain, {kBadPeerInput, waiting.phase, r, 0, 0, 0});
        lost[r] = !came || (!refused[r] && !agree(waiting, r, own, facts));
        tokens[r] = lost[r] || refused[r] ? 0 : facts.word[Facts::kFactTokens];
    }
};

// The ranks that own experts of a token, a bit each. The whole warp calls. Indices out of range count as dropped.
__device__ __forceinline__ RankMask ranks_of(const TopkIdx& topk_idx, int64_t token, int num_topk, int num_experts,
                                             int local_experts) {
    const int lane = threadIdx.x % kWarpSize;
    RankMask bit = 0;
    if (lane < num_topk) {
        const int64_t expert = topk_idx.at(token * num_topk + lane);
        if (expert >= 0 && expert < num_experts) bit = RankMask{1} << (static_cast<int>(expert) / local_experts);
    }
    return __reduce_or_sync(kFullMask, bit);
}

}  // namespace deepep_moe::latency
