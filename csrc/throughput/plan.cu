// Plan: from the routing to the place of every row, in three kernels.
//
//   count_and_exchange  count every tile of tokens; the last block sends the totals to every peer and waits for theirs,
//                       so that all ranks have all counts and can compute all places
//   place_rows          each source writes the places of its rows into the destination's staging
//   collect_places      each destination copies them into the plan, which outlives staging
//
// Places depend on counts and positions only, so the order of rows is deterministic.
#include <climits>

#include "device/block.cuh"
#include "device/wait.cuh"
#include "throughput/args.h"
#include "throughput/tile.cuh"

namespace deepep_moe {

namespace {

constexpr int kExchangeThreads = 1024;
static_assert(kExchangeThreads >= kMaxExperts, "one thread per expert");

__device__ __forceinline__ int round_up(int value, int multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// The received counts of one rank.
struct ArrivedCounts {
    const Tagged* words;
    __device__ __forceinline__ int header(int word) const { return load_tagged_system(&words[word]).value; }
    __device__ __forceinline__ int tokens_to(int rank) const { return header(PeerCounts::kNumWords + rank); }
    __device__ __forceinline__ int routes_to(int expert) const { return header(PeerCounts::kHeadWords + expert); }
};

__device__ __forceinline__ ArrivedCounts counts_of(const Runtime& rt, int epoch, int source) {
    return {rt.control[rt.domain.rank]->counts[epoch & 1][source]};
}

// Result of the exchange, shared by the block.
struct Verdict {
    int failed;      // counts are missing or inconsistent: none of them may be used
    int unusable;    // the plan is invalid: no rows move by it
    int max_tokens;  // of any rank
};

// 1. Read the totals of all blocks, and reset them for the next plan.
__device__ __forceinline__ void take_totals(const PlanArgs& args, PeerCounts& own) {
    const int thread = threadIdx.x;
    if (thread < args.num_experts) {
        own.routes_to_expert[thread] = args.num_topk == 0 && args.given_expert_counts
                                           ? args.given_expert_counts[thread]
                                           : load_relaxed_system(&args.expert_totals[thread]);
        args.expert_totals[thread] = 0;
    }
    if (thread < args.runtime.domain.num_ranks) {
        own.tokens_to_rank[thread] = load_relaxed_system(&args.rank_totals[thread]);
        args.rank_totals[thread] = 0;
    }
    if (thread == 0) {
        own.header[PeerCounts::kExperts] = args.num_experts;
        own.header[PeerCounts::kTopk] = args.num_topk;
        own.header[PeerCounts::kAlign] = args.alignment;
        own.header[PeerCounts::kTokens] = args.num_tokens;
        own.header[PeerCounts::kInput] = args.refused                     ? PeerCounts::kRefusedInput
                                         : args.runtime.local->bad_routes ? PeerCounts::kBadRoutes
                                                                          : PeerCounts::kGood;
        const bool counted_rows = args.num_topk > 0 && args.max_rows != PlanArgs::kNoExpertRows;
        own.header[PeerCounts::kMaxRecv] = args.ticket ? INT_MAX : args.max_recv;
        own.header[PeerCounts::kMaxRows] = args.ticket || !counted_rows ? INT_MAX : args.max_rows;
    }
    __syncthreads();
}

// 2. Send them to every rank, including this one.
__device__ __forceinline__ void send_counts(const Runtime& rt, const PeerCounts& own, int epoch, int words) {
    for (int i = threadIdx.x; i < rt.domain.num_ranks * words; i += blockDim.x) {
        const int word = i % words;
        store_tagged_system(&rt.control[i / words]->counts[epoch & 1][rt.domain.rank][word],
                            reinterpret_cast<const int*>(&own)[word], epoch);
    }
}

// Whether the peer is in a dispatch or combine that this rank has not begun, without having sent its counts: then it
// will not send them.
__device__ __forceinline__ bool skipped_plan(const Runtime& rt, int peer, const Tagged& count, int plan_epoch) {
    const Control* own = rt.control[rt.domain.rank];
    const int epoch = next_epoch(rt.local->data_epoch);
    if (!reached(load_acquire_system(&own->entered[peer]), epoch)) return false;
    if (load_tagged_system(&count).tag == plan_epoch) return false;
    const int kind = *static_cast<const volatile int*>(&own->operation[epoch & 1][peer].kind);
    report_failure(rt.domain, {kMismatch, kPlanCounts, peer, kOperation, Operation::kPlan, kind});
    return true;
}

// 3. Wait for words `begin` to `end` of every rank. Call with all threads; returns false in all if some did not arrive.
__device__ __forceinline__ bool await_counts(const Runtime& rt, int epoch, int begin, int end) {
    bool arrived = true;
    for (int i = threadIdx.x; i < rt.domain.num_ranks * (end - begin); i += blockDim.x) {
        const int source = i / (end - begin), word = begin + i % (end - begin);
        const Tagged* counts = rt.control[rt.domain.rank]->counts[epoch & 1][source];
        arrived = arrived &&
                  wait_for(
                      rt.domain, &counts[word].tag, epoch, kPlanCounts, source, [&](int seen) { return seen == epoch; },
                      [&] { return skipped_plan(rt, source, counts[word], epoch); });
    }
    return __syncthreads_and(arrived);
}

// 4. Compare the values that must be equal. A thread per rank; all ranks get the same verdict.
__device__ __forceinline__ void compare_heads(const PlanArgs& args, const PeerCounts& own, int epoch,
                                              Verdict& verdict) {
    constexpr Field kFields[PeerCounts::kNumAgreed] = {kNumExperts, kNumTopk, kAlignment};
    const Runtime& rt = args.runtime;
    const int peer = threadIdx.x;
    if (peer < rt.domain.num_ranks) {
        const ArrivedCounts counts = counts_of(rt, epoch, peer);
        const int input = counts.header(PeerCounts::kInput);
        if (input != PeerCounts::kGood) {
            verdict.unusable = 1;
            if (peer != rt.domain.rank) report_problem(rt.domain, {kBadPeerInput, kPlanCounts, peer, 0, 0, 0});
        }
        if (input == PeerCounts::kRefusedInput) {
            verdict.failed = 1;
        } else if (!args.refused) {
            for (int word = 0; word < PeerCounts::kNumAgreed; ++word) {
                const int theirs = counts.header(word);
                if (theirs == own.header[word]) continue;
                verdict.failed = 1;
                report_problem(rt.domain, {kMismatch, kPlanCounts, peer, kFields[word], own.header[word], theirs});
            }
        }
        atomicMax(&verdict.max_tokens, counts.header(PeerCounts::kTokens));
        // A peer that sent its counts may have failed since, waiting for another rank.
        const int failure = load_relaxed_system(&rt.domain.mailbox[rt.domain.rank]->failed[peer]);
        if (failure != kNoFailure) {
            verdict.failed = 1;
            report_failure(rt.domain, {kPeerFailed, kPlanCounts, peer, 0, epoch, failure});
        }
    }
    __syncthreads();
}

// 5. Rank layout: the rank prefix. A thread per destination, so every rank detects an overflow of any rank.
__device__ __forceinline__ void number_by_source(const PlanArgs& args, int epoch, Verdict& verdict) {
    const Runtime& rt = args.runtime;
    const int destination = threadIdx.x;
    if (destination >= rt.domain.num_ranks) return;
    int rows = 0;
    for (int source = 0; source < rt.domain.num_ranks; ++source) {
        rows += counts_of(rt, epoch, source).tokens_to(destination);
        args.counted.prefix(source, destination) = rows;
    }
    if (destination == rt.domain.rank && args.ticket) store_tagged_system(&rt.host->num_recv, rows, args.ticket);
    const int room = counts_of(rt, epoch, destination).header(PeerCounts::kMaxRecv);
    if (rows > room) {
        verdict.unusable = 1;
        report_problem(rt.domain, {kRecvOverflow, kPlanCounts, destination, 0, room, rows});
    }
}

// 6. Expert layout: groups are padded, and the rows of each owner start at 0. A thread per expert, then one per owner.
__device__ __forceinline__ void number_by_expert(const PlanArgs& args, int epoch, Verdict& verdict, int* group_start,
                                                 int* warp_sums) {
    const Runtime& rt = args.runtime;
    const int thread = threadIdx.x, ranks = rt.domain.num_ranks, experts = args.num_experts;
    const int experts_per_rank = experts / ranks;
    int rows = 0, before = 0;
    if (thread < experts) {
        for (int source = 0; source < ranks; ++source) {
            const int routes = counts_of(rt, epoch, source).routes_to(thread);
            if (source < rt.domain.rank) before += routes;
            rows += routes;
        }
    }
    const int padded = round_up(rows, args.alignment);
    int all;
    const int start = block_exclusive_sum(padded, warp_sums, all);
    if (thread < experts) group_start[thread] = start;
    if (thread == experts - 1) group_start[experts] = start + padded;
    __syncthreads();
    if (thread < experts) {
        const int owner = thread / experts_per_rank, local = thread % experts_per_rank;
        const int offset = start - group_start[owner * experts_per_rank];
        args.row_base[thread] = offset + before;
        if (owner == rt.domain.rank) {
            args.counted.rows(local) = rows;
            args.counted.offset(local) = args.num_topk > 0 ? offset : 0;  // no expert rows without routes
            if (args.ticket) store_tagged_system(&rt.host->expert_counts[local], rows, args.ticket);
        }
    }
    if (thread < ranks) {
        const int total = group_start[(thread + 1) * experts_per_rank] - group_start[thread * experts_per_rank];
        const int room = counts_of(rt, epoch, thread).header(PeerCounts::kMaxRows);
        if (total > room) {
            verdict.unusable = 1;
            report_problem(rt.domain, {kRowsOverflow, kPlanCounts, thread, 0, room, total});
        }
        if (thread == rt.domain.rank) {
            args.counted.offset(experts_per_rank) = args.num_topk > 0 ? total : 0;
            if (args.ticket) store_tagged_system(&rt.host->num_rows, args.num_topk > 0 ? total : 0, args.ticket);
        }
    }
}

__device__ __forceinline__ void invalidate(const PlanArgs& args) {
    const int ranks = args.runtime.domain.num_ranks;
    if (threadIdx.x == 0) args.runtime.local->plan_state = kInvalid;
    for (int i = threadIdx.x; i < args.counted.size(); i += blockDim.x)
        args.counted.data[i] = i < ranks * ranks ? -1 : 0;
}

// 7. Set the state for later kernels. Without a host that waits, staging cannot grow, and a plan that needs it is
// invalid on all ranks.
__device__ __forceinline__ void conclude(const PlanArgs& args, int epoch, const Verdict& verdict) {
    const Runtime& rt = args.runtime;
    const bool fits = verdict.max_tokens <= args.staging.max_tokens;
    bool invalid = verdict.failed || verdict.unusable;
    if (!args.ticket && !fits && !invalid) {
        invalid = true;
        if (threadIdx.x == 0)
            report_problem(rt.domain,
                           {kStaging, kPlanCounts, rt.domain.rank, 0, args.staging.max_tokens, verdict.max_tokens});
    }
    if (threadIdx.x == 0) {
        rt.local->plan_epoch = epoch;
        rt.local->bad_routes = 0;
        rt.local->plan_state = fits ? kPlaceable : kNeedsRoom;
    }
    if (!invalid) return;
    if (threadIdx.x == 0) rt.domain.state->frozen = 1;
    invalidate(args);
}

// 8. Publish the verdict to the host that waits; steps 5 and 6 have published the sizes. The host looks for failures
// once it has max_tokens, so that is written last.
__device__ __forceinline__ void publish(const PlanArgs& args, const Verdict& verdict) {
    HostCounts* host = args.runtime.host;
    const int experts_per_rank = args.num_experts / args.runtime.domain.num_ranks;
    if (verdict.failed) {
        for (int e = threadIdx.x; e < experts_per_rank; e += blockDim.x)
            store_tagged_system(&host->expert_counts[e], 0, args.ticket);
        if (threadIdx.x == 0) {
            store_tagged_system(&host->num_recv, 0, args.ticket);
            store_tagged_system(&host->num_rows, 0, args.ticket);
        }
    }
    const bool failed = verdict.failed || verdict.unusable;
    if (failed) __threadfence_system();  // before max_tokens, after which the host reads the error report
    __syncthreads();
    if (threadIdx.x == 0)
        store_tagged_system(&host->max_tokens, failed ? HostCounts::kPlanFailed : verdict.max_tokens, args.ticket);
}

// Send the totals of this rank to every peer, wait for theirs, and compute the offsets of all rows.
__device__ __forceinline__ void exchange_counts(const PlanArgs& args, PeerCounts& own, int* group_start,
                                                int* warp_sums) {
    __shared__ Verdict verdict;
    const Runtime& rt = args.runtime;
    const int epoch = next_epoch(rt.local->plan_epoch);
    const int words = PeerCounts::kHeadWords + args.num_experts;
    if (threadIdx.x == 0) verdict = Verdict{};
    take_totals(args, own);
    send_counts(rt, own, epoch, words);
    // Heads first: ranks that disagree on the number of experts send different numbers of words.
    if (await_counts(rt, epoch, 0, PeerCounts::kHeadWords))
        compare_heads(args, own, epoch, verdict);
    else
        verdict.failed = 1;
    __syncthreads();
    if (!verdict.failed && !await_counts(rt, epoch, PeerCounts::kHeadWords, words)) verdict.failed = 1;
    if (!verdict.failed) {
        number_by_source(args, epoch, verdict);
        number_by_expert(args, epoch, verdict, group_start, warp_sums);
    }
    __syncthreads();
    conclude(args, epoch, verdict);
    if (args.ticket) publish(args, verdict);
}

__global__ void __launch_bounds__(kExchangeThreads, 1) count_and_exchange(const __grid_constant__ PlanArgs args) {
    __shared__ Tile tile;
    __shared__ int routes[kMaxExperts + 1];
    __shared__ int warp_sums[kExchangeThreads / kWarpSize];
    __shared__ PeerCounts own;
    const int experts = args.num_experts, ranks = args.runtime.domain.num_ranks;
    if (is_stopped(args.runtime.domain)) {
        if (last_block_done<false>(&args.runtime.local->blocks_done)) {
            invalidate(args);
            if (args.ticket) publish(args, Verdict{1, 1, 0});
        }
        return;
    }
    tile.read(args.runtime, args.topk_idx, args.given_membership, args.num_tokens, args.num_topk, experts, true);
    count_routes(tile, args.num_topk, experts, routes);
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        args.tile_experts[static_cast<int64_t>(blockIdx.x) * experts + e] = routes[e];
        if (routes[e]) atomicAdd(&args.expert_totals[e], routes[e]);
    }
    for (int r = threadIdx.x / kWarpSize; r < ranks; r += blockDim.x / kWarpSize) {
        const int tokens = tile.count_tokens_to(RankMask{1} << r);
        if (threadIdx.x % kWarpSize == 0) {
            args.tile_ranks[blockIdx.x * ranks + r] = tokens;
            atomicAdd(&args.rank_totals[r], tokens);
        }
    }
    if (last_block_done<false>(&args.runtime.local->blocks_done)) exchange_counts(args, own, routes, warp_sums);
}

// Sum of the first `tiles` counts of one column [tiles].
__device__ __forceinline__ int sum_before(const int* column, int tiles, int stride) {
    int sum = 0;
#pragma unroll 16  // independent loads in flight
    for (int i = 0; i < tiles; ++i) sum += column[static_cast<int64_t>(i) * stride];
    return sum;
}

__device__ __forceinline__ int* places_of(const Staging& staging, int owner, int source, int words) {
    return reinterpret_cast<int*>(staging.base[owner] + staging.places_offset) +
           static_cast<int64_t>(source) * staging.max_tokens * words;
}

__global__ void __launch_bounds__(kTileEntries) place_rows(const __grid_constant__ PlanArgs args) {
    __shared__ Tile tile;
    __shared__ int row[kTileEntries];               // of each route, or -1
    __shared__ int next_row[kMaxExperts];           // of each expert
    __shared__ int first_slot[kMaxRanks];           // of the tile, at each rank
    __shared__ int slots[kTileTokens * kMaxRanks];  // of each token at each rank, or -1
    const Runtime& rt = args.runtime;
    const int ranks = rt.domain.num_ranks, topk = args.num_topk, experts = args.num_experts;
    if (is_stopped(rt.domain) || rt.local->plan_state != kPlaceable) {  // all ranks agree
        const int first = blockIdx.x * tile_tokens(topk), tokens = min(tile_tokens(topk), args.num_tokens - first);
        for (int i = threadIdx.x; i < tokens * ranks; i += blockDim.x)
            args.send_slot[static_cast<int64_t>(first) * ranks + i] = -1;
        return;
    }
    const int experts_per_rank = experts / ranks;

    // The rows of this tile begin after those of the tiles before it.
    for (int c = threadIdx.x; c < experts + ranks; c += blockDim.x) {
        if (c < experts)
            next_row[c] = args.row_base[c] + sum_before(args.tile_experts + c, blockIdx.x, experts);
        else
            first_slot[c - experts] = sum_before(args.tile_ranks + c - experts, blockIdx.x, ranks);
    }
    tile.read(rt, args.topk_idx, args.given_membership, args.num_tokens, topk, experts, false);
    const int first = tile.first, count = tile.count, routes = count * topk;
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
    for (int r = warp; r < ranks; r += warps) {  // the tokens of one rank are numbered in order
        int next_slot = first_slot[r];
        for (int begin = 0; begin < count; begin += kWarpSize) {
            const unsigned going = tile.tokens_to(RankMask{1} << r, begin);
            const int t = begin + lane, slot = next_slot + __popc(going & ((1u << lane) - 1));
            if (t < count) slots[t * ranks + r] = going >> lane & 1 ? slot : -1;
            next_slot += __popc(going);
        }
    }

    // A thread per route. The routes of one expert are numbered in order, warp after warp.
    const int e = threadIdx.x < routes ? tile.expert[threadIdx.x] : -1;
    const unsigned same = __match_any_sync(kFullMask, e);
    const int index = __popc(same & ((1u << lane) - 1));
    for (int turn = 0; turn * kWarpSize < routes; ++turn) {
        if (warp == turn) {
            row[threadIdx.x] = e < 0 ? -1 : next_row[e] + index;
            __syncwarp();
            if (e >= 0 && index == 0) next_row[e] += __popc(same);
        }
        __syncthreads();
    }
    __syncthreads();

    for (int i = threadIdx.x; i < count * ranks; i += blockDim.x)
        args.send_slot[static_cast<int64_t>(first) * ranks + i] = slots[i];

    // One row of places per (token, rank), written by consecutive threads.
    const int words = received_words(topk);
    for (int i = threadIdx.x; i < count * ranks * words; i += blockDim.x) {
        const int word = i % words, r = i / words % ranks, t = i / words / ranks;
        const int slot = slots[t * ranks + r];
        if (slot < 0) continue;
        int value = first + t;
        if (word > 0) {
            const int k = (word - 1) % topk, e = tile.expert[t * topk + k];
            const bool owned = e >= 0 && e / experts_per_rank == r;
            value = !owned ? -1 : word <= topk ? e - r * experts_per_rank : row[t * topk + k];
        }
        places_of(args.staging, r, rt.domain.rank, words)[static_cast<int64_t>(slot) * words + word] = value;
    }
    if (last_block_done<true>(&rt.local->blocks_done) && threadIdx.x < ranks)
        store_release_system(&rt.control[threadIdx.x]->placed[rt.domain.rank], rt.local->plan_epoch);
}

constexpr int kCollectThreads = 1024;

// Write an invalid plan: no rows, and -1 in its prefix (see Counted).
__device__ __forceinline__ void empty_plan(const PlanArgs& args) {
    const int ranks = args.runtime.domain.num_ranks;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    const int64_t received = static_cast<int64_t>(args.max_recv) * received_words(args.num_topk);
    for (int64_t i = thread; i < args.counted.size(); i += threads) args.out_counted[i] = i < ranks * ranks ? -1 : 0;
    for (int64_t i = thread; i < received; i += threads) args.received[i] = -1;
    for (int64_t i = thread; i < args.max_rows; i += threads) args.row_recv[i] = -1;
}

__global__ void __launch_bounds__(kCollectThreads) collect_places(const __grid_constant__ PlanArgs args) {
    const Runtime& rt = args.runtime;
    const int ranks = rt.domain.num_ranks, topk = args.num_topk, words = received_words(topk);
    const int experts_per_rank = args.num_experts / ranks, epoch = rt.local->plan_epoch;
    bool usable = !is_stopped(rt.domain) && rt.local->plan_state == kPlaceable;
    if (usable && threadIdx.x < ranks)
        usable = wait_for(
            rt.domain, &rt.control[rt.domain.rank]->placed[threadIdx.x], epoch, kPlanPlaces, threadIdx.x,
            [&](int seen) { return reached(seen, epoch); }, [] { return false; });
    if (!__syncthreads_and(usable)) {
        empty_plan(args);
        return;
    }

    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const Counted& counted = args.counted;
    // With a ticket, sizes follow from the counts, and the outputs may have room for more rows than are used.
    const int recv = args.ticket ? static_cast<int>(counted.prefix(ranks - 1, rt.domain.rank)) : args.max_recv;
    const int rows = topk == 0     ? 0
                     : args.ticket ? static_cast<int>(counted.offset(experts_per_rank))
                                   : max(args.max_rows, 0);
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = thread; i < counted.size(); i += threads) args.out_counted[i] = counted.data[i];
    for (int64_t i = thread; i < static_cast<int64_t>(recv) * words; i += threads) {
        const int n = static_cast<int>(i / words), word = static_cast<int>(i % words);
        int source = 0, start = 0;
        while (source < ranks && n >= counted.prefix(source, rt.domain.rank))
            start = counted.prefix(source++, rt.domain.rank);
        int value = -1;  // of a row that is not used
        if (source < ranks)
            value =
                places_of(args.staging, rt.domain.rank, source, words)[static_cast<int64_t>(n - start) * words + word];
        if (word > topk) {  // an expert row
            if (value >= rows) value = -1;
            if (value >= 0) args.row_recv[value] = n;
        }
        args.received[i] = value;
    }
    // Rows that are not a copy: the padding of each group, and the rows after the last group.
    for (int l = blockIdx.x; l <= experts_per_rank; l += gridDim.x) {
        const int64_t begin = counted.offset(l) + (l < experts_per_rank ? counted.rows(l) : 0);
        const int64_t end = l < experts_per_rank ? counted.offset(l + 1) : rows;
        for (int64_t m = begin + threadIdx.x; m < end && m < rows; m += blockDim.x) args.row_recv[m] = -1;
    }
}

}  // namespace

static int num_tiles(const PlanArgs& args) {  // at least one: a rank without tokens takes part in the exchange
    const int per_tile = tile_tokens(args.num_topk);
    return max((args.num_tokens + per_tile - 1) / per_tile, 1);
}

cudaError_t launch_exchange_counts(const PlanArgs& args, cudaStream_t stream) {
    count_and_exchange<<<num_tiles(args), kExchangeThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t launch_place_rows(const PlanArgs& args, cudaStream_t stream) {
    place_rows<<<num_tiles(args), kTileEntries, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t launch_collect_places(const PlanArgs& args, int num_blocks, cudaStream_t stream) {
    const int64_t entries = static_cast<int64_t>(args.max_recv) * received_words(args.num_topk);
    const int64_t wanted = (entries + kCollectThreads * 4 - 1) / (kCollectThreads * 4);
    const int blocks = static_cast<int>(max(min(wanted, static_cast<int64_t>(num_blocks)), int64_t{1}));
    collect_places<<<blocks, kCollectThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
