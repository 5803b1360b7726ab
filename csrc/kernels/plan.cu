// Plan: from routing to the final place of every row, in three kernels.
//
//   count_and_exchange  count every tile of tokens; the last block sends the totals to every peer and waits for theirs:
//                       all ranks then know all counts, hence where everything lies
//   place_rows          each source writes the places of its rows into the destination's staging
//   collect_places      each destination copies them into the plan, which outlives staging
//
// Places depend on counts and positions only, so rows need no queue and their order is always the same.
#include <climits>

#include "device/flags.cuh"
#include "device/tile.cuh"

namespace deepep_moe {

namespace {

constexpr int kExchangeThreads = 1024;
static_assert(kExchangeThreads >= kMaxExperts, "one thread per expert");

__device__ __forceinline__ int round_up(int value, int multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Exclusive sum over the threads of the block; `warp_sums` holds one int per warp.
__device__ __forceinline__ int block_exclusive_sum(int value, int* warp_sums) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    int sum = value;
    for (int d = 1; d < kWarpSize; d *= 2) {
        const int other = __shfl_up_sync(kFullMask, sum, d);
        if (lane >= d) sum += other;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();
    int before = 0;
    for (int w = 0; w < warp; ++w) before += warp_sums[w];
    __syncthreads();
    return before + sum - value;
}

// The counts of one rank, as they arrive.
struct ArrivedCounts {
    const Tagged* words;
    __device__ __forceinline__ int header(int field) const { return load_relaxed_system(&words[field].value); }
    __device__ __forceinline__ int tokens_to(int rank) const {
        return load_relaxed_system(&words[PeerCounts::kNumFields + rank].value);
    }
    __device__ __forceinline__ int routes_to(int expert) const {
        return load_relaxed_system(&words[PeerCounts::kHeadWords + expert].value);
    }
};

// Wait for words `begin` to `end` of the counts of every rank. All threads call; false for all if some did not come.
__device__ __forceinline__ bool await_counts(const Runtime& rt, int epoch, int begin, int end) {
    bool arrived = true;
    for (int i = threadIdx.x; i < rt.num_ranks * (end - begin); i += blockDim.x) {
        const int source = i / (end - begin), word = begin + i % (end - begin);
        const Tagged* counts = rt.control[rt.rank]->counts[epoch & 1][source];
        arrived = arrived && wait_flag(rt, &counts[word].tag, epoch, kPlanCounts, source);
    }
    return __syncthreads_and(arrived);
}

// Send the totals of this rank to every peer, wait for theirs, and work out where everything lies.
__device__ void exchange_counts(const PlanArgs& args, PeerCounts& own, int* group_start, int* warp_sums) {
    __shared__ int max_tokens, disagree;
    const Runtime& rt = args.runtime;
    const int thread = threadIdx.x, ranks = rt.num_ranks, experts = args.num_experts;
    const int experts_per_rank = experts / ranks;
    const int epoch = rt.local->plan_epoch + 1;

    // The totals were added up by all blocks; leave them as the next plan wants them.
    if (thread < experts) {
        own.routes_to_expert[thread] = args.num_topk == 0 && args.given_expert_counts
                                           ? args.given_expert_counts[thread]
                                           : load_relaxed_system(&args.expert_totals[thread]);
        args.expert_totals[thread] = 0;
    }
    if (thread < ranks) {
        own.tokens_to_rank[thread] = load_relaxed_system(&args.rank_totals[thread]);
        args.rank_totals[thread] = 0;
    }
    const int bad_input = rt.local->bad_input;
    if (thread == 0) {
        own.header[PeerCounts::kNumExperts] = experts;
        own.header[PeerCounts::kNumTopk] = args.num_topk;
        own.header[PeerCounts::kAlignment] = args.alignment;
        own.header[PeerCounts::kNumTokens] = args.num_tokens;
        own.header[PeerCounts::kBadInput] = args.refused ? 2 : bad_input;
        own.header[PeerCounts::kMaxRecv] = args.ticket ? INT_MAX : args.max_recv;
        own.header[PeerCounts::kMaxRows] = args.ticket || args.num_topk == 0 ? INT_MAX : args.max_rows;
        max_tokens = disagree = 0;
    }
    __syncthreads();

    const int words = PeerCounts::kHeadWords + experts;
    for (int i = thread; i < ranks * words; i += blockDim.x) {
        const int word = i % words;
        store_tagged_system(&rt.control[i / words]->counts[epoch & 1][rt.rank][word],
                            reinterpret_cast<const int*>(&own)[word], epoch);
    }
    const auto counts = [&](int source) { return ArrivedCounts{rt.control[rt.rank]->counts[epoch & 1][source]}; };
    // The heads first: ranks that disagree on the number of experts do not send the same number of words.
    const bool heads_arrived = await_counts(rt, epoch, 0, PeerCounts::kHeadWords);
    bool problem = bad_input != 0;
    if (!heads_arrived) {
        disagree = 1;
    } else if (thread < ranks) {
        const int bad = counts(thread).header(PeerCounts::kBadInput);
        if (bad && thread != rt.rank) report_problem(rt, kBadPeerInput, kPlanCounts, thread, 0, 0, 0);
        if (bad == 2) disagree = 1;
        for (int field = 0; field < PeerCounts::kNumAgreed && bad != 2 && !args.refused; ++field) {
            const int theirs = counts(thread).header(field);
            if (theirs == own.header[field]) continue;
            disagree = 1;
            report_problem(rt, kMismatch, kPlanCounts, thread, field, own.header[field], theirs);
        }
        problem = problem || bad;
        atomicMax(&max_tokens, counts(thread).header(PeerCounts::kNumTokens));
    }
    __syncthreads();
    if (!disagree && !await_counts(rt, epoch, PeerCounts::kHeadWords, words)) disagree = 1;
    problem = problem || disagree;

    // Rank layout: rows by source.
    for (int d = thread; d < ranks; d += blockDim.x) {
        int rows = 0;
        for (int s = 0; s < ranks; ++s) {
            rows += counts(s).tokens_to(d);
            args.counted.prefix(s, d) = rows;
        }
        // What does not fit is left out. Every rank learns of it, so that all raise.
        const int room = counts(d).header(PeerCounts::kMaxRecv);
        if (rows > room) report_problem(rt, kRecvOverflow, kPlanCounts, d, 0, room, rows);
        if (d == rt.rank && args.ticket) store_tagged_system(&rt.status->num_recv, rows, args.ticket);
    }
    // Expert layout: groups are padded; every owner's rows start at 0.
    int rows = 0, before = 0;
    if (thread < experts) {
        for (int s = 0; s < ranks; ++s) {
            const int routes = counts(s).routes_to(thread);
            if (s < rt.rank) before += routes;
            rows += routes;
        }
    }
    const int padded = round_up(rows, args.alignment);
    const int start = block_exclusive_sum(padded, warp_sums);
    if (thread < experts) group_start[thread] = start;
    if (thread == experts - 1) group_start[experts] = start + padded;
    __syncthreads();
    const int own_room = args.num_topk > 0 ? own.header[PeerCounts::kMaxRows] : 0;
    if (thread < experts) {
        const int owner = thread / experts_per_rank, local = thread % experts_per_rank;
        const int offset = start - group_start[owner * experts_per_rank];
        args.row_base[thread] = offset + before;
        if (owner == rt.rank) {
            args.counted.rows(local) = rows;
            args.counted.offset(local) = min(offset, own_room);
            if (args.ticket) store_tagged_system(&rt.status->expert_counts[local], rows, args.ticket);
        }
    }
    if (thread < ranks) {
        const int total = group_start[(thread + 1) * experts_per_rank] - group_start[thread * experts_per_rank];
        const int room = counts(thread).header(PeerCounts::kMaxRows);
        if (total > room) report_problem(rt, kRowsOverflow, kPlanCounts, thread, 0, room, total);
        if (thread == rt.rank) {
            args.counted.offset(experts_per_rank) = min(total, own_room);
            if (args.ticket) store_tagged_system(&rt.status->num_rows, min(total, own_room), args.ticket);
        }
    }
    if (thread == 0) {
        rt.local->plan_epoch = epoch;
        rt.local->bad_input = 0;
        rt.local->staging_fits = !disagree && max_tokens <= args.staging.max_tokens;
        if (!args.ticket) {  // no host to stop what follows
            const volatile HostStatus* status = rt.status;
            if (disagree && status->failure)
                report_failure(rt, static_cast<Failure>(status->failure), kPlanCounts, status->peer, status->field,
                               status->expected, status->seen);
            if (max_tokens > args.staging.max_tokens)
                report_failure(rt, kStaging, kPlanCounts, rt.rank, 0, args.staging.max_tokens, max_tokens);
        }
    }
    // The host looks for failures once it has all numbers: those come first. (Overflow needs no host that waits.)
    if (__syncthreads_or(problem)) __threadfence_system();
    if (thread == 0 && args.ticket) store_tagged_system(&rt.status->max_tokens, max_tokens, args.ticket);
}

__global__ void __launch_bounds__(kExchangeThreads, 1) count_and_exchange(const __grid_constant__ PlanArgs args) {
    __shared__ Tile tile;
    __shared__ int routes[kMaxExperts + 1];
    __shared__ int warp_sums[kExchangeThreads / kWarpSize];
    __shared__ PeerCounts own;
    const int experts = args.num_experts, ranks = args.runtime.num_ranks;
    tile.read(args.runtime, args.topk_idx, args.given_membership, args.num_tokens, args.num_topk, experts, true);
    count_routes(tile, args.num_topk, experts, routes);
    for (int e = threadIdx.x; e < experts; e += blockDim.x) {
        args.tile_experts[static_cast<int64_t>(blockIdx.x) * experts + e] = routes[e];
        if (routes[e]) atomicAdd(&args.expert_totals[e], routes[e]);
    }
    for (int r = threadIdx.x / kWarpSize; r < ranks; r += blockDim.x / kWarpSize) {
        const int tokens = tile.count_tokens_to(1u << r);
        if (threadIdx.x % kWarpSize == 0) {
            args.tile_ranks[blockIdx.x * ranks + r] = tokens;
            atomicAdd(&args.rank_totals[r], tokens);
        }
    }
    if (last_block_done<false>(args.runtime.local)) exchange_counts(args, own, routes, warp_sums);
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
    if (rt.local->failed || !rt.local->staging_fits) return;  // all ranks agree on the latter; the host mends it
    const int ranks = rt.num_ranks, topk = args.num_topk, experts = args.num_experts;
    const int experts_per_rank = experts / ranks;

    // Where this tile's rows begin: behind those of the tiles before it.
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
            const unsigned going = tile.tokens_to(1u << r, begin);
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
        places_of(args.staging, r, rt.rank, words)[static_cast<int64_t>(slot) * words + word] = value;
    }
    if (last_block_done<true>(rt.local) && threadIdx.x < ranks)
        store_release_system(&rt.control[threadIdx.x]->placed[rt.rank], rt.local->plan_epoch);
}

constexpr int kCollectThreads = 1024;

__global__ void __launch_bounds__(kCollectThreads) collect_places(const __grid_constant__ PlanArgs args) {
    const Runtime& rt = args.runtime;
    if (rt.local->failed || !rt.local->staging_fits) return;
    const int ranks = rt.num_ranks, topk = args.num_topk, words = received_words(topk);
    const int experts_per_rank = args.num_experts / ranks;
    if (threadIdx.x < ranks)
        wait_flag(rt, &rt.control[rt.rank]->placed[threadIdx.x], rt.local->plan_epoch, kPlanPlaces, threadIdx.x);
    __syncthreads();

    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const Counted& counted = args.counted;
    // Where sizes follow from the counts there is room for the most that fits into staging, and just this much is used.
    const int recv = args.ticket ? static_cast<int>(counted.prefix(ranks - 1, rt.rank)) : args.max_recv;
    const int rows = args.ticket ? static_cast<int>(counted.offset(experts_per_rank)) : args.max_rows;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = thread; i < counted.size(); i += threads) args.out_counted[i] = counted.data[i];
    for (int64_t i = thread; i < static_cast<int64_t>(recv) * words; i += threads) {
        const int n = static_cast<int>(i / words), word = static_cast<int>(i % words);
        int source = 0, start = 0;
        while (source < ranks && n >= counted.prefix(source, rt.rank)) start = counted.prefix(source++, rt.rank);
        int value = -1;  // of a row that is not used
        if (source < ranks)
            value = places_of(args.staging, rt.rank, source, words)[static_cast<int64_t>(n - start) * words + word];
        if (word > topk) {  // an expert row
            if (value >= rows) value = -1;
            if (value >= 0) args.row_recv[value] = n;
        }
        args.received[i] = value;
    }
    // Rows that nothing was copied to: the padding of each group, and what lies behind the last one.
    for (int l = blockIdx.x; l <= experts_per_rank; l += gridDim.x) {
        const int64_t begin = counted.offset(l) + (l < experts_per_rank ? counted.rows(l) : 0);
        const int64_t end = l < experts_per_rank ? counted.offset(l + 1) : rows;
        for (int64_t m = begin + threadIdx.x; m < end && m < rows; m += blockDim.x) args.row_recv[m] = -1;
    }
}

}  // namespace

static int num_tiles(const PlanArgs& args) {  // at least one: a rank without tokens has its say too
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
