// Combine: the rank that computed a token's rows sums them with their weights and sends one row to the token's rank
// (its home), which adds the rows of all ranks.
//
//   tables   block d < R (see table_blocks()): weights and local experts of this rank's tokens, for rank d
//   rows     all other blocks, a warp per 512 channels of a token of any rank: wait for the weights, sum the experts'
//            rows in top-k order in fp32, round to BF16, store a packet per lane
//   receive  all blocks, a warp per 256 channels of a token of this rank: wait for the packets of each rank that owns
//            one of its experts, add them in rank order in fp32, clear them
//
// A rank's sums for its own tokens take the same path, so results do not depend on where an expert is. Which ranks send
// for a token and which are waited for both follow from the indices given to this combine, so they always agree.
#include <cuda_bf16.h>

#include "device/sum.cuh"
#include "latency/packets.cuh"

namespace deepep_moe::DEEPEP_MOE_WIDTH::latency {

namespace {

using Bf16x8 = Vector<__nv_bfloat16>;

constexpr int kSendVectors = 2;   // sixteen bytes each, of a row, per lane
constexpr int kRoutesAtOnce = 2;  // rows of one token whose loads are in flight together
constexpr int kRanksAtOnce = 4;   // rows that come home
constexpr int kNoExpert = 0xffff;

__device__ __forceinline__ Facts facts_of(const CombineArgs& args) {
    return {args.arena.max_tokens,         args.num_topk,       args.num_experts,
            static_cast<int>(args.format), args.places.epoch(), args.num_tokens};
}

// -- tables --------------------------------------------------------------------------------------------------

// Packet j of a token for `peer`, without its epoch; i = token * packets + j.
__device__ __forceinline__ int4 weights_packet(const CombineArgs& args, int peer, int i, int packets) {
    const Domain& domain = args.runtime.domain;
    const int local_experts = args.num_experts / domain.num_ranks, token = i / packets, j = i % packets;
    int weights[kWeightsPerPacket], experts[kWeightsPerPacket];
#pragma unroll
    for (int n = 0; n < kWeightsPerPacket; ++n) {
        const int k = j * kWeightsPerPacket + n;
        const int64_t at = static_cast<int64_t>(token) * args.num_topk + k;
        const int64_t expert = k < args.num_topk ? args.topk_idx.at(at) : -1;
        const bool valid = expert >= 0 && expert < args.num_experts;
        if (!valid && expert != -1)
            report_notice(domain, kBadExpert, kLowLatencyCombine, domain.rank, args.num_experts,
                          static_cast<int>(expert));
        const bool there = valid && static_cast<int>(expert) / local_experts == peer;
        weights[n] = there ? __float_as_int(args.weights[at]) : 0;
        experts[n] = there ? static_cast<int>(expert) - peer * local_experts : kNoExpert;
    }
    return {weights[0], weights[1], experts[0] | experts[1] << 16, 0};
}

// -- rows ----------------------------------------------------------------------------------------------------

// The unit of work of a sending warp: 512 channels of a token of some rank. Neighbouring warps take tokens of different
// ranks, to use all links at once.
struct Piece {
    int home, token, first;  // first: of the vectors
    bool exists;
    int row;  // of this lane's route, in [L * R * M], or -1

    __device__ __forceinline__ void load(const CombineArgs& args, int item, int pieces) {
        const int ranks = args.runtime.domain.num_ranks, lane = threadIdx.x % kWarpSize;
        const int rest = item / ranks;
        home = (args.runtime.domain.rank + 1 + item % ranks) % ranks;
        token = rest / pieces;
        first = rest % pieces * (kSendVectors * kWarpSize);
        exists = token < args.places.tokens(home);
        row = exists && lane < args.num_topk ? args.places.row(args.arena, args.num_topk, home, token, lane) : -1;
    }
};

// Prefetch the rows while their weights are in flight.
__device__ __forceinline__ void prefetch(const CombineArgs& args, const Piece& piece) {
    const int lane = threadIdx.x % kWarpSize, vectors = args.arena.hidden / 8;
    for (unsigned left = __ballot_sync(kFullMask, piece.row >= 0); left; left &= left - 1) {
        const int row = __shfl_sync(kFullMask, piece.row, __ffs(left) - 1), at = piece.first + lane * kSendVectors;
        if (at < vectors) prefetch_l2(reinterpret_cast<const int4*>(args.x) + static_cast<int64_t>(row) * vectors + at);
    }
}

// Weight and local expert (kNoExpert: not on this rank) of this lane's route. False if they do not arrive.
__device__ __forceinline__ bool read_weights(const CombineArgs& args, const Waiting& waiting, const Piece& piece,
                                             float& weight, int& expert) {
    const Runtime& rt = args.runtime;
    const int lane = threadIdx.x % kWarpSize, packets = ceil_div(args.num_topk, kWeightsPerPacket);
    const int4* from = args.arena.weights(rt.domain.rank, waiting.epoch, piece.home, piece.token, packets) + lane;
    int4 packet{0, 0, 0, waiting.epoch};
    const auto arrived = [&] {
        if (lane < packets) packet = load_packet(from);
        return packet.w == waiting.epoch;
    };
    // a rank that refused its input sends no weights, only that fact
    const auto refused = [&] {
        const int4 told = load_packet(&rt.control[rt.domain.rank]->facts[kCombine][waiting.epoch & 1][piece.home]);
        return told.w == waiting.epoch && Facts::unpack(told).refused;
    };
    if (!waiting.warp(piece.home, arrived, refused)) return false;
    const int of = lane / kWeightsPerPacket;
    const int x = __shfl_sync(kFullMask, packet.x, of), y = __shfl_sync(kFullMask, packet.y, of);
    const int z = __shfl_sync(kFullMask, packet.z, of);
    weight = __int_as_float(lane % 2 ? y : x);
    expert = lane < args.num_topk ? (lane % 2 ? z >> 16 : z) & 0xffff : kNoExpert;
    return true;
}

__device__ __forceinline__ void send_piece(const CombineArgs& args, const Waiting& waiting, const Piece& piece) {
    const Arena& arena = args.arena;
    const int lane = threadIdx.x % kWarpSize, vectors = arena.hidden / 8;
    float weight;
    int expert;
    if (!read_weights(args, waiting, piece, weight, expert)) return;
    const bool wanted = expert != kNoExpert;
    if (!__any_sync(kFullMask, wanted)) return;
    const bool found = wanted && piece.row >= 0 && piece.row / static_cast<int>(arena.slots()) == expert;
    if (wanted && !found)
        report_notice(args.runtime.domain, kChangedRoute, kLowLatencyCombine, piece.home, piece.token, lane);

    Bf16x8 sum[kSendVectors];
#pragma unroll
    for (int v = 0; v < kSendVectors; ++v) sum[v].clear();
    const int4* x = reinterpret_cast<const int4*>(args.x) + piece.first + lane;
    const auto has = [&](int v) { return piece.first + v * kWarpSize + lane < vectors; };
    for (unsigned left = __ballot_sync(kFullMask, found); left;) {
        int4 loaded[kRoutesAtOnce][kSendVectors];
        float factor[kRoutesAtOnce];
#pragma unroll
        for (int n = 0; n < kRoutesAtOnce; ++n) {
            const int route = __ffs(left) - 1;  // -1: the last lane is read, in vain
            const int row = __shfl_sync(kFullMask, piece.row, route & 31);
            factor[n] = __shfl_sync(kFullMask, weight, route & 31);
            const bool any = left != 0;
            left &= left - 1;
#pragma unroll
            for (int v = 0; v < kSendVectors; ++v)
                loaded[n][v] =
                    any && has(v) ? load_streaming(x + static_cast<int64_t>(row) * vectors + v * kWarpSize) : int4{};
            if (!any) factor[n] = 0.0f;
        }
#pragma unroll
        for (int n = 0; n < kRoutesAtOnce; ++n)
#pragma unroll
            for (int v = 0; v < kSendVectors; ++v) sum[v].add_scaled(loaded[n][v], factor[n]);
    }
    int4* out =
        arena.row(kCombine, piece.home, waiting.epoch, args.runtime.domain.rank, piece.token) + piece.first + lane;
#pragma unroll
    for (int v = 0; v < kSendVectors; ++v)
        if (has(v)) store_packet(out + v * kWarpSize, seal(sum[v].pack()));
}

// -- receive -------------------------------------------------------------------------------------------------

__device__ __forceinline__ RankSet ranks_of(const CombineArgs& args, int token) {
    return latency::ranks_of(args.topk_idx, token, args.num_topk, args.num_experts,
                             args.num_experts / args.runtime.domain.num_ranks);
}

// The unit of work of a receiving warp: 256 channels of a token of this rank. Packets of several ranks are loaded
// together, and loaded again if they had not arrived.
struct Sums {
    int token, at;  // at: of this lane's packet in the row
    RankSet left;   // ranks that send for the token and have not been added
    int4 v[kRanksAtOnce];

    // `item`: at least `items` if there is none.
    __device__ __forceinline__ void begin(const CombineArgs& args, int item, int items, int pieces) {
        token = item / pieces;
        at = item % pieces * kWarpSize + threadIdx.x % kWarpSize;
        left = item < items ? ranks_of(args, token) : RankSet{};
    }
    __device__ __forceinline__ bool exists(const CombineArgs& args) const { return at < args.arena.hidden / 8; }
    __device__ __forceinline__ int4* from(const CombineArgs& args, int epoch, int rank) const {
        return args.arena.row(kCombine, args.runtime.domain.rank, epoch, 0, token) + at +
               static_cast<int64_t>(rank) * (2 * args.arena.block_packets);
    }
    __device__ __forceinline__ void load(const CombineArgs& args, int epoch) {
        RankSet loading = left;
#pragma unroll
        for (int n = 0; n < kRanksAtOnce; ++n) {
            v[n] = {0, 0, 0, 1};
            if (loading.any() && exists(args)) v[n] = load_packet(from(args, epoch, first_of(loading)));
            remove_first(loading);
        }
    }
    // Adds the rows of all ranks in order. The first have been loaded.
    __device__ __forceinline__ void finish(const CombineArgs& args, const Waiting& waiting, RankSet sending) {
        Bf16x8 sum;
        sum.clear();
        while (true) {
#pragma unroll
            for (int n = 0; n < kRanksAtOnce; ++n) {
                if (!left.any()) break;
                const int rank = first_of(left);
                remove_first(left);
                if (!sending.has(rank)) continue;
                const auto arrived = [&] {
                    if (!is_sealed(v[n])) v[n] = load_packet(from(args, waiting.epoch, rank));
                    return is_sealed(v[n]);
                };
                if (!waiting.warp(rank, arrived)) {
                    if (!args.runtime.masks) sum.add(int4{-1, -1, -1, -1});  // NaN: no result
                    continue;
                }
                if (exists(args)) store_packet(from(args, waiting.epoch, rank), {0, 0, 0, 0});
                sum.add(unseal(v[n]));
            }
            if (!left.any()) break;
            load(args, waiting.epoch);
        }
        int4* const out =
            reinterpret_cast<int4*>(args.out) + static_cast<int64_t>(token) * (args.arena.hidden / 8) + at;
        if (exists(args)) store_streaming(out, sum.pack());
    }
};

// Of a row.
__device__ __forceinline__ int receive_pieces(const CombineArgs& args) {
    return ceil_div(args.arena.hidden / 8, kWarpSize);
}

// Called by all threads of the block. `sums`: the first of this warp, begun; it is item number `item`, and the next one
// `step` further.
template <int kHalf>
__device__ __forceinline__ void receive(const CombineArgs& args, const Waiting& waiting, bool reports, Sums& sums,
                                        int item, int step) {
    __shared__ Ranks ranks;
    __shared__ RankSet sending;
    // Without a sending half the rows are usually there: they are loaded together with the facts.
    constexpr bool kEarly = kHalf == kReceive;
    const int pieces = receive_pieces(args), items = args.num_tokens * pieces;
    if (kEarly) sums.load(args, waiting.epoch);
    if (threadIdx.x < kMaxRanks) {
        const Facts own = facts_of(args);
        const int r = threadIdx.x;
        const bool exists = r < args.runtime.domain.num_ranks;
        ranks.read(waiting, own, reports ? args.wait_stats : nullptr);
        if (exists && args.runtime.masks) ranks.agree_on_lost(waiting, own, r);
        __syncwarp();
        const bool sends = exists && !ranks.lost[r] && !ranks.refused[r];
        const unsigned word = __ballot_sync(kFullMask, sends);
        if (kRankWords == 1 ? r == 0 : r % kWarpSize == 0) sending.words[kRankWords == 1 ? 0 : r / kWarpSize] = word;
    }
    __syncthreads();
    for (bool loaded = kEarly; item < items; loaded = false) {
        if (!loaded) sums.load(args, waiting.epoch);
        sums.finish(args, waiting, sending);
        item += step;
        sums.begin(args, item, items, pieces);
    }
}

// -- the kernel ----------------------------------------------------------------------------------------------

template <int kHalf>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) combine_kernel(const __grid_constant__ CombineArgs args) {
    const Runtime& rt = args.runtime;
    const int ranks = rt.domain.num_ranks, warp = threadIdx.x / kWarpSize;
    const int tables = table_blocks(ranks);
    const bool reports = reports_here(), sends_tables = static_cast<int>(blockIdx.x) < tables;
    const int pieces = ceil_div(args.arena.hidden / 8, kSendVectors * kWarpSize);
    const int senders = (gridDim.x - tables) * kWarps, peer = (rt.domain.rank + blockIdx.x) % ranks;
    const int packets = ceil_div(args.num_topk, kWeightsPerPacket);
    constexpr bool kSendsTables = (kHalf & kTables) != 0, kSendsRows = (kHalf & kRows) != 0;
    const int in_tables = sends_tables ? args.num_tokens * packets : 0;
    int items = 0, item = sends_tables ? 0 : (blockIdx.x - tables) * kWarps + warp;
    int4 packet{};
    Piece piece;
    Sums sums;
    // A kernel that only receives: neighbouring items in different blocks, so that all SMs have equally many; none in
    // the last block, which starts with something slow.
    const int grid = static_cast<int>(gridDim.x), receivers = kHalf == kReceive ? grid - 1 : grid;
    const int block = static_cast<int>(blockIdx.x), in_row = receive_pieces(args);
    const int received = kHalf == kReceive ? warp * receivers + block : block * kWarps + warp;
    const auto load = [&] {  // what does not depend on the call's number
        if constexpr (kHalf == kReceive) sums.begin(args, received, args.num_tokens * in_row, in_row);
        if constexpr (kSendsTables)
            if (static_cast<int>(threadIdx.x) < in_tables) packet = weights_packet(args, peer, threadIdx.x, packets);
        if constexpr (kSendsRows) {
            if (sends_tables) return;
            int most = 0;
            for (int s = 0; s < ranks; ++s) most = max(most, args.places.tokens(s));
            items = ranks * most * pieces;
            if (item >= items) return;
            piece.load(args, item, pieces);
            prefetch(args, piece);
        }
    };
    const Entered entered = enter<kHalf>(rt, kCombine, args.epoch, &args.places.epoch(), load);
    const int epoch = entered.epoch;
    if (epoch == 0) {
        if ((kHalf & kReceive) && reports) poison(args.out, 2ll * args.num_tokens * args.arena.hidden);
        return;
    }
    const Waiting waiting{rt, kCombine, epoch};
    if constexpr (kSendsTables) {
        const auto send_tables = [&](int rank, int made) {  // `made`: packets that this block has made before
            if (!entered.writable.has(rank)) return;
            if (warp == 0) send_facts(rt, kCombine, epoch, rank, facts_of(args));
            int4* to = args.arena.weights(rank, epoch, rt.domain.rank, 0, packets);
            for (int i = threadIdx.x; i < in_tables; i += kThreads) {
                if (i >= made) packet = weights_packet(args, rank, i, packets);
                packet.w = epoch;
                store_packet(to + i, packet);
            }
        };
        if (sends_tables) send_tables(peer, kThreads);
        for (int next = block + tables; kRankWords > 1 && sends_tables && next < ranks; next += tables)
            send_tables((rt.domain.rank + next) % ranks, 0);
    }
    if constexpr (kSendsRows) {
        while (item < items) {
            if (piece.exists && entered.writable.has(piece.home)) send_piece(args, waiting, piece);
            item += senders;
            if (item < items) piece.load(args, item, pieces);
        }
    }
    if constexpr ((kHalf & kReceive) != 0) {
        if (block >= receivers) return;
        if constexpr (kHalf != kReceive) sums.begin(args, received, args.num_tokens * in_row, in_row);
        receive<kHalf>(args, waiting, reports, sums, received, receivers * kWarps);
    }
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& args, Half half, int num_blocks, cudaStream_t stream) {
    switch (half) {
        case kTables: combine_kernel<kTables><<<num_blocks, kThreads, 0, stream>>>(args); break;
        case kRows: combine_kernel<kRows><<<num_blocks, kThreads, 0, stream>>>(args); break;
        case kSend: combine_kernel<kSend><<<num_blocks, kThreads, 0, stream>>>(args); break;
        case kReceive: combine_kernel<kReceive><<<num_blocks, kThreads, 0, stream>>>(args); break;
        case kBoth: combine_kernel<kBoth><<<num_blocks, kThreads, 0, stream>>>(args); break;
    }
    return cudaGetLastError();
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH::latency
