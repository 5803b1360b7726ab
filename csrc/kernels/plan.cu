// Plan: from routing to the final place of every row, in three kernels.
//
//   layout_kernel (layout.cu)  counts of every tile of tokens, on this rank
//   exchange_counts            totals go to every peer; all ranks then know all counts, hence where everything lies
//   place_rows                 each source writes the places of its rows into the destination's staging
//   collect_places             each destination copies them into the plan, which outlives staging
//
// Places depend on counts and positions only, so rows need no queue and their order is always the same.
#include <climits>

#include "device/flags.cuh"
#include "device/membership.cuh"

namespace deepep_moe {

namespace {

constexpr int kExchangeThreads = 1024;
static_assert(kExchangeThreads >= kMaxExperts, "one thread per expert");

__device__ __forceinline__ int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

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

// Turn the counts of one column [tiles] into exclusive sums; returns the total.
__device__ __forceinline__ int scan_tiles(int* column, int tiles, int stride) {
    constexpr int kAhead = 16;  // independent loads in flight
    int total = 0;
    for (int first = 0; first < tiles; first += kAhead) {
        int count[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            count[i] = first + i < tiles ? column[static_cast<int64_t>(first + i) * stride] : 0;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            if (first + i < tiles) column[static_cast<int64_t>(first + i) * stride] = total;
            total += count[i];
        }
    }
    return total;
}

__global__ void __launch_bounds__(kExchangeThreads, 1) exchange_counts(const __grid_constant__ PlanArgs args) {
    __shared__ PeerCounts own;
    __shared__ int padded_start[kMaxExperts + 1];
    __shared__ int warp_sums[kExchangeThreads / kWarpSize];
    __shared__ int max_tokens, disagree;
    const Runtime& rt = args.runtime;
    const int thread = threadIdx.x, ranks = rt.num_ranks, experts = args.num_experts;
    const int experts_per_rank = experts / ranks;
    const int epoch = rt.local->plan_epoch + 1;
    const int per_tile = tile_tokens(args.num_topk);
    const int tiles = (args.num_tokens + per_tile - 1) / per_tile;

    // What this rank sends, in total and before each tile.
    if (thread < experts)
        own.routes_to_expert[thread] =
            args.num_topk > 0 ? scan_tiles(args.tile_experts + thread, tiles, experts) : args.given_expert_counts[thread];
    if (thread >= kExchangeThreads - ranks) {  // other warps than the first experts' where there are few
        const int r = kExchangeThreads - 1 - thread;
        own.tokens_to_rank[r] = scan_tiles(args.tile_ranks + r, tiles, ranks);
    }
    if (thread == 0) {
        own.header[PeerCounts::kNumExperts] = experts;
        own.header[PeerCounts::kNumTopk] = args.num_topk;
        own.header[PeerCounts::kAlignment] = args.alignment;
        own.header[PeerCounts::kNumTokens] = args.num_tokens;
        own.header[PeerCounts::kBadInput] = rt.local->bad_input;
        max_tokens = disagree = 0;
    }
    __syncthreads();

    // Tell every peer (and oneself), then wait until all have told.
    constexpr int kHead = sizeof(own.header) / sizeof(int) + kMaxRanks;
    const int words = kHead + experts;
    for (int i = thread; i < ranks * words; i += blockDim.x) {
        PeerCounts* theirs = &rt.control[i / words]->counts[epoch & 1][rt.rank];
        reinterpret_cast<int*>(theirs)[i % words] = reinterpret_cast<const int*>(&own)[i % words];
    }
    __syncthreads();
    const Control* control = rt.control[rt.rank];
    const PeerCounts* counts = control->counts[epoch & 1];
    if (thread < ranks) {
        store_release_system(&rt.control[thread]->counted[rt.rank], epoch);
        if (wait_flag(rt, &control->counted[thread], epoch, kPlanCounts, thread)) {
            const int* header = counts[thread].header;
            for (int field = 0; field < PeerCounts::kNumAgreed; ++field) {
                if (header[field] == own.header[field]) continue;
                disagree = 1;
                report_problem(rt, kMismatch, kPlanCounts, thread, field, own.header[field], header[field]);
            }
            if (header[PeerCounts::kBadInput] && thread != rt.rank)
                report_problem(rt, kBadExpert, kPlanCounts, thread, 0, experts, 0);
            atomicMax(&max_tokens, header[PeerCounts::kNumTokens]);
        }
    }
    __syncthreads();

    // Where everything lies: rank layout ...
    for (int d = thread; d < ranks; d += blockDim.x) {
        int rows = 0;
        for (int s = 0; s < ranks; ++s) {
            rows += counts[s].tokens_to_rank[d];
            args.rank_prefix[s * ranks + d] = rows;
        }
    }
    // ... and expert layout. Groups are padded; every owner's rows start at 0.
    int rows = 0, before = 0;
    if (thread < experts) {
        for (int s = 0; s < ranks; ++s) {
            const int routes = counts[s].routes_to_expert[thread];
            if (s < rt.rank) before += routes;
            rows += routes;
        }
    }
    const int padded = round_up(rows, args.alignment);
    const int room = args.ticket ? INT_MAX : args.max_rows;  // the host will make room, or has
    const int start = block_exclusive_sum(padded, warp_sums);
    if (thread < experts) padded_start[thread] = start;
    if (thread == experts - 1) padded_start[experts] = start + padded;
    __syncthreads();
    if (thread < experts) {
        const int owner = thread / experts_per_rank, local = thread % experts_per_rank;
        const int offset = start - padded_start[owner * experts_per_rank];
        args.row_base[thread] = offset + before;
        if (owner == rt.rank) {
            args.expert_counts[local] = rows;
            args.expert_offsets[local] = args.num_topk > 0 ? min(offset, room) : 0;
            if (args.ticket) rt.status->expert_counts[local] = rows;
        }
    }
    if (thread == 0) {
        int received = 0;
        for (int s = 0; s < ranks; ++s) received += counts[s].tokens_to_rank[rt.rank];
        const int expanded = padded_start[(rt.rank + 1) * experts_per_rank] - padded_start[rt.rank * experts_per_rank];
        args.expert_offsets[experts_per_rank] = args.num_topk > 0 ? min(expanded, room) : 0;
        rt.local->plan_epoch = epoch;
        rt.local->bad_input = 0;
        volatile HostStatus* status = rt.status;
        if (args.ticket) {
            status->num_recv = received;
            status->num_rows = expanded;
            status->max_tokens = max_tokens;
        } else {  // nobody waits: what does not fit is reported, and left out below
            if (received > args.max_recv)
                report_problem(rt, kRecvOverflow, kPlanCounts, rt.rank, 0, args.max_recv, received);
            else if (expanded > args.max_rows && args.max_rows > 0)
                report_problem(rt, kRowsOverflow, kPlanCounts, rt.rank, 0, args.max_rows, expanded);
            if (disagree)
                report_failure(rt, kMismatch, kPlanCounts, status->peer, status->field, status->expected, status->seen);
            if (max_tokens > args.staging.max_tokens)
                report_failure(rt, kStaging, kPlanCounts, rt.rank, 0, args.staging.max_tokens, max_tokens);
        }
    }
    __threadfence_system();
    __syncthreads();
    if (thread == 0 && args.ticket) {
        volatile int* done = &rt.status->plan_ticket;
        *done = args.ticket;
    }
}

__device__ __forceinline__ int* places_of(const Staging& staging, int owner, int source, int words) {
    return reinterpret_cast<int*>(staging.base[owner] + staging.places_offset) +
           static_cast<int64_t>(source) * staging.max_tokens * words;
}

__global__ void __launch_bounds__(kTileEntries) place_rows(const __grid_constant__ PlanArgs args) {
    __shared__ unsigned member[kTileTokens];
    __shared__ int expert[kTileEntries];  // of each route, or -1
    __shared__ int row[kTileEntries];     // of each route, or -1
    __shared__ int earlier[kMaxExperts];  // routes of this tile numbered so far
    const Runtime& rt = args.runtime;
    if (rt.local->failed) return;
    const int ranks = rt.num_ranks, topk = args.num_topk;
    const int experts_per_rank = args.num_experts / ranks;
    const int per_tile = tile_tokens(topk);
    const int first = blockIdx.x * per_tile;
    const int count = min(per_tile, args.num_tokens - first);

    // A thread per route. The routes of one expert are numbered in order, warp after warp.
    for (int e = threadIdx.x; e < args.num_experts; e += blockDim.x) earlier[e] = 0;
    const int lane = threadIdx.x % kWarpSize, routes = count * topk;
    int e = -1;
    if (threadIdx.x < routes) {
        const int64_t given = args.topk_idx[static_cast<int64_t>(first) * topk + threadIdx.x];
        if (given >= 0 && given < args.num_experts) e = static_cast<int>(given);
    }
    read_membership(args.topk_idx, args.given_membership, first, count, topk, args.num_experts, ranks, member);
    for (int turn = 0; turn * kWarpSize < routes; ++turn) {
        if (threadIdx.x / kWarpSize == turn) {
            const unsigned same = __match_any_sync(kFullMask, e);
            const int index = __popc(same & ((1u << lane) - 1));
            expert[threadIdx.x] = e;
            row[threadIdx.x] =
                e < 0 ? -1
                      : args.row_base[e] + args.tile_experts[static_cast<int64_t>(blockIdx.x) * args.num_experts + e] +
                            earlier[e] + index;
            __syncwarp();
            if (e >= 0 && index == 0) earlier[e] += __popc(same);
        }
        __syncthreads();
    }

    // One row of places per (token, rank), written by consecutive threads.
    const int words = 1 + 2 * topk;
    for (int i = threadIdx.x; i < count * ranks * words; i += blockDim.x) {
        const int word = i % words, r = i / words % ranks, t = i / words / ranks;
        const bool goes = member[t] >> r & 1;
        int slot = -1;
        if (goes) {
            slot = args.tile_ranks[blockIdx.x * ranks + r];
            for (int u = 0; u < t; ++u) slot += member[u] >> r & 1;
        }
        if (word == 0) args.send_slot[static_cast<int64_t>(first + t) * ranks + r] = slot;
        if (!goes) continue;
        int value = first + t;
        if (word > 0) {
            const int k = (word - 1) % topk, e = expert[t * topk + k];
            const bool owned = e >= 0 && e / experts_per_rank == r;
            value = !owned ? -1 : word <= topk ? e - r * experts_per_rank : row[t * topk + k];
        }
        places_of(args.staging, r, rt.rank, words)[static_cast<int64_t>(slot) * words + word] = value;
    }
    __threadfence_system();
    if (last_block_done(rt.local)) {
        __threadfence_system();
        for (int r = 0; r < ranks; ++r) store_release_system(&rt.control[r]->placed[rt.rank], rt.local->plan_epoch);
    }
}

constexpr int kCollectThreads = 256;

__global__ void __launch_bounds__(kCollectThreads) collect_places(const __grid_constant__ PlanArgs args) {
    const Runtime& rt = args.runtime;
    if (rt.local->failed) return;
    const int ranks = rt.num_ranks, topk = args.num_topk, words = 1 + 2 * topk;
    const int experts_per_rank = args.num_experts / ranks;
    if (threadIdx.x < ranks)
        wait_flag(rt, &rt.control[rt.rank]->placed[threadIdx.x], rt.local->plan_epoch, kPlanPlaces, threadIdx.x);
    __syncthreads();

    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = thread; i < static_cast<int64_t>(args.max_recv) * words; i += threads) {
        const int n = static_cast<int>(i / words), word = static_cast<int>(i % words);
        int source = 0, start = 0;
        while (source < ranks && n >= args.rank_prefix[source * ranks + rt.rank])
            start = args.rank_prefix[source++ * ranks + rt.rank];
        int value = -1;  // of a row that is not used
        if (source < ranks) value = places_of(args.staging, rt.rank, source, words)[static_cast<int64_t>(n - start) * words + word];
        if (word == 0) {
            args.recv_src_idx[n] = value;
        } else if (word <= topk) {
            args.recv_topk_idx[static_cast<int64_t>(n) * topk + word - 1] = value;
        } else {
            if (value >= args.max_rows) value = -1;
            args.recv_rows[static_cast<int64_t>(n) * topk + word - 1 - topk] = value;
            if (value >= 0) args.row_recv[value] = n;
        }
    }
    // Rows that nothing was copied to: the padding of each group, and what lies behind the last one.
    for (int l = blockIdx.x; l <= experts_per_rank; l += gridDim.x) {
        const int64_t begin = args.expert_offsets[l] + (l < experts_per_rank ? args.expert_counts[l] : 0);
        const int64_t end = l < experts_per_rank ? args.expert_offsets[l + 1] : args.max_rows;
        for (int64_t m = begin + threadIdx.x; m < end && m < args.max_rows; m += blockDim.x) args.row_recv[m] = -1;
    }
}

}  // namespace

cudaError_t launch_exchange_counts(const PlanArgs& args, cudaStream_t stream) {
    exchange_counts<<<1, kExchangeThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t launch_place_rows(const PlanArgs& args, cudaStream_t stream) {
    const int per_tile = tile_tokens(args.num_topk);
    const int tiles = max((args.num_tokens + per_tile - 1) / per_tile, 1);  // a rank without tokens signals too
    place_rows<<<tiles, kTileEntries, 0, stream>>>(args);
    const int64_t entries = static_cast<int64_t>(args.max_recv) * (1 + 2 * args.num_topk);
    const int blocks = static_cast<int>(min(max((entries + kCollectThreads * 4 - 1) / (kCollectThreads * 4), int64_t{1}), int64_t{128}));
    collect_places<<<blocks, kCollectThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
