// Dispatch: a token's row crosses once per rank that has one of its experts, at a place known beforehand; the receiver
// copies it to its experts' rows.
//
//   tables   block d < R: where rank d will find the routes of each token in its experts' rows, counted on this rank
//   rows     all other blocks, a warp per 512 channels of a token: load, quantise, store a packet per lane and rank
//   receive  all blocks: first rows of each source and expert from the counts, then a warp per 1024 bytes of a row:
//            read the token's routes and the packets, store them to each route's row, clear the packets
//
// Own tokens go the same way, through own memory: so that x may change once it is sent, and an expert gets the same
// bits from everywhere.
#include <cuda_bf16.h>

#include "device/fp8.cuh"
#include "latency/packets.cuh"

namespace deepep_moe::latency {

namespace {

constexpr int kTableRoutes = 2048;  // routes that a block orders at a time
constexpr int kLaneChannels = 16;   // of a row that is sent, per lane
constexpr int kSendChannels = kLaneChannels * kWarpSize;
constexpr int kSendBlocks = kSendChannels / kScaleChannels;  // of channels that share a scale: one packet of scales
constexpr int kLanesPerScale = kScaleChannels / kLaneChannels;
constexpr int kSourcesAtOnce = 4;   // whose counts are loaded together
constexpr int kReceivePackets = 2;  // of a row that is received, per lane
constexpr int kReceiveBytes = kReceivePackets * sizeof(int4) * kWarpSize;
constexpr float kFloor = 1e-4f;  // of a block's largest value, part of this format

static_assert(kSendBlocks == 4, "four scales make a packet");

struct Tables {
    uint16_t seen[kWarps][kMaxExperts];  // [warp][local expert] routes; then routes before this warp
    int base[kMaxExperts];               // [local expert] routes of this tile and earlier ones
    int route[kTableRoutes];  // local expert of each route of the tile, -1: another rank's; then its word in a packet
};

struct Receiving {
    Ranks ranks;
    int first[kMaxExperts];  // [R][L] rows of the source for the expert; then the first of these rows. Not in all
                             // blocks
};

template <int kHalf>
union Shared {
    Tables tables;
    Receiving receiving;
};
template <>
union Shared<kReceive> {
    Receiving receiving;
};

__device__ __forceinline__ Facts facts_of(const DispatchArgs& args) {
    return {{args.arena.max_tokens, args.arena.hidden, args.num_topk, args.num_experts, static_cast<int>(args.format),
             0, args.refused ? 0 : args.num_tokens, args.refused, 0}};
}

// -- tables --------------------------------------------------------------------------------------------------

// Tokens whose routes a block orders at a time.
__device__ __forceinline__ int tile_of(const DispatchArgs& args, int first) {
    const int tokens = args.refused ? 0 : args.num_tokens;
    return min(kTableRoutes / args.num_topk, tokens - first);
}

// Local experts of the tile's routes at `peer`; -1 for other ranks' routes, and for invalid ones, which are reported.
__device__ __forceinline__ void read_routes(const DispatchArgs& args, Tables& tables, int peer, int first, int routes) {
    const int local_experts = args.num_experts / args.runtime.domain.num_ranks;
    for (int i = threadIdx.x; i < routes; i += kThreads) {
        const int64_t at = static_cast<int64_t>(first) * args.num_topk + i;
        const int64_t expert = args.topk_idx.at(at);
        bool valid = expert >= 0 && expert < args.num_experts;
        if (!valid && expert != -1)
            report_notice(args.runtime.domain, {kBadExpert, kLowLatencyDispatch, args.runtime.domain.rank, 0,
                                                args.num_experts, static_cast<int>(expert)});
        valid = valid && static_cast<int>(expert) / local_experts == peer;
        for (int k = 1; valid && k <= i % args.num_topk; ++k) {
            if (args.topk_idx.at(at - k) != expert) continue;
            report_notice(args.runtime.domain, {kRepeatedExpert, kLowLatencyDispatch, args.runtime.domain.rank, 0,
                                                first + i / args.num_topk, static_cast<int>(expert)});
            valid = false;
        }
        tables.route[i] = valid ? static_cast<int>(expert) - peer * local_experts : -1;
    }
}

// Number the tile's routes to each expert in order, and write what the packets carry of each. All threads of the block
// call.
__device__ __forceinline__ void number_routes(const DispatchArgs& args, Tables& tables, int peer, int first) {
    constexpr int kPerLane = kTableRoutes / kThreads;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int local_experts = args.num_experts / args.runtime.domain.num_ranks;
    const int routes = tile_of(args, first) * args.num_topk;
    const int per_warp = ceil_div(ceil_div(routes, kWarps), kWarpSize) * kWarpSize;
    uint16_t* seen = tables.seen[warp];
    read_routes(args, tables, peer, first, routes);
    for (int l = lane; l < local_experts; l += kWarpSize) seen[l] = 0;
    if (first == 0)
        for (int l = threadIdx.x; l < local_experts; l += kThreads) tables.base[l] = 0;
    __syncthreads();
    int expert[kPerLane], place[kPerLane];
#pragma unroll
    for (int n = 0; n < kPerLane; ++n) {
        const int in_warp = n * kWarpSize + lane, i = warp * per_warp + in_warp;
        expert[n] = in_warp < per_warp && i < routes ? tables.route[i] : -1;
        if (n * kWarpSize >= per_warp) continue;
        const unsigned same = __match_any_sync(kFullMask, expert[n]);
        const int before = __popc(same & ((1u << lane) - 1));
        place[n] = expert[n] >= 0 ? seen[expert[n]] + before : 0;
        __syncwarp();
        if (expert[n] >= 0 && before == 0) seen[expert[n]] = static_cast<uint16_t>(place[n] + __popc(same));
        __syncwarp();
    }
    __syncthreads();
    for (int l = threadIdx.x; l < local_experts; l += kThreads) {
        int of_warp[kWarps], count = tables.base[l];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) of_warp[w] = tables.seen[w][l];
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            tables.seen[w][l] = static_cast<uint16_t>(count);
            count += of_warp[w];
        }
        tables.base[l] = count;
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < kPerLane; ++n)
        if (expert[n] >= 0)
            tables.route[warp * per_warp + n * kWarpSize + lane] = expert[n] << 16 | (seen[expert[n]] + place[n]);
    __syncthreads();
}

// All threads of a block call, with the first tile's routes numbered.
__device__ void send_tables(const DispatchArgs& args, Tables& tables, int epoch, int peer, bool writable) {
    const Arena& arena = args.arena;
    const int rank = args.runtime.domain.rank;
    const int local_experts = args.num_experts / args.runtime.domain.num_ranks;
    const int tokens = args.refused ? 0 : args.num_tokens;
    const int packets = ceil_div(args.num_topk, kRoutesPerPacket);
    if (writable && threadIdx.x < kWarpSize) send_facts(args.runtime, kDispatch, epoch, peer, facts_of(args));
    for (int first = 0, in_tile = 0; first < tokens; first += in_tile) {
        in_tile = tile_of(args, first);
        if (first > 0) {
            __syncthreads();
            number_routes(args, tables, peer, first);
        }
        for (int i = threadIdx.x; writable && i < in_tile * packets; i += kThreads) {
            const int token = i / packets, j = i % packets;
            int words[kRoutesPerPacket];
#pragma unroll
            for (int n = 0; n < kRoutesPerPacket; ++n) {
                const int k = j * kRoutesPerPacket + n;
                words[n] = k < args.num_topk ? tables.route[token * args.num_topk + k] : -1;
            }
            store_packet(arena.routes(peer, epoch, rank, first + token, packets) + j,
                         {words[0], words[1], words[2], epoch});
        }
    }
    for (int l = threadIdx.x; writable && l < local_experts; l += kThreads)
        store_tagged_system(arena.counts(peer, epoch, rank) + l, tables.base[l], epoch);
    __syncthreads();  // the memory of tables is used again
}

// -- rows ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ __nv_bfloat162 largest_of(int4 bf16) {
    const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&bf16);
    __nv_bfloat162 largest = __habs2(pairs[0]);
#pragma unroll
    for (int i = 1; i < 4; ++i) largest = __hmax2_nan(largest, __habs2(pairs[i]));
    return largest;
}

__device__ __forceinline__ int2 to_e4m3(int4 bf16, float inverse) {
    const int words[4] = {bf16.x, bf16.y, bf16.z, bf16.w};
    int2 bytes;
    __nv_fp8x2_storage_t* out = reinterpret_cast<__nv_fp8x2_storage_t*>(&bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float low = __int_as_float(words[i] << 16), high = __int_as_float(words[i] & 0xffff0000);
        out[i] = __nv_cvt_float2_to_fp8x2(make_float2(low * inverse, high * inverse), __NV_SATFINITE, __NV_E4M3);
    }
    return bytes;
}

// Sixteen channels of this lane; the eight lanes of a block of 128 call together.
__device__ __forceinline__ int4 quantise(int4 a, int4 b, bool rounded, float& scale) {
    __nv_bfloat162 largest = __hmax2_nan(largest_of(a), largest_of(b));
#pragma unroll
    for (int d = kLanesPerScale / 2; d > 0; d /= 2)
        largest = __hmax2_nan(largest, __shfl_xor_sync(kFullMask, largest, d));
    const float of_block = __bfloat162float(__hmax_nan(largest.x, largest.y));
    const float amax = of_block < kFloor ? kFloor : of_block;
    scale = scale_of(amax);
    float inverse = inverse_scale_of(amax);
    if (rounded) {
        // powers of two by their exponents; what is no number (255) stays none
        const int bits = __float_as_int(scale);
        const int exponent = min(255, ((bits >> 23) & 0xff) + ((bits & 0x7fffff) != 0));
        scale = exponent == 255 ? __int_as_float(0x7fffffff) : __int_as_float(exponent << 23);
        inverse = exponent == 255 ? scale : __int_as_float((254 - exponent) << 23);
    }
    const int2 low = to_e4m3(a, inverse), high = to_e4m3(b, inverse);
    return {low.x, low.y, high.x, high.y};
}

// What a warp sends at a time: 512 channels of a token.
struct Piece {
    int4 a, b;  // of this lane
    RankMask ranks;

    template <bool kFp8>
    __device__ __forceinline__ void load(const DispatchArgs& args, int item, int pieces) {
        const int token = item / pieces, lane = threadIdx.x % kWarpSize;
        const int hidden = args.arena.hidden, vectors = hidden / 8;
        const int first = item % pieces * (2 * kWarpSize);
        const int4* row = reinterpret_cast<const int4*>(args.x) + static_cast<int64_t>(token) * vectors;
        // FP8 needs a lane's channels side by side, plain rows are stored as they are loaded
        const int at = first + (kFp8 ? 2 * lane : lane), step = kFp8 ? 1 : kWarpSize;
        a = at < vectors ? row[at] : int4{};
        b = at + step < vectors ? row[at + step] : int4{};
        ranks = ranks_of(args.topk_idx, token, args.num_topk, args.num_experts,
                         args.num_experts / args.runtime.domain.num_ranks);
    }
};

template <bool kFp8>
__device__ __forceinline__ void store_piece(const DispatchArgs& args, int epoch, int item, int pieces,
                                            const Piece& piece, RankMask ranks) {
    const Arena& arena = args.arena;
    const int token = item / pieces, lane = threadIdx.x % kWarpSize, number = item % pieces;
    if (kFp8) {
        const int packets = arena.hidden / kLaneChannels, at = number * kWarpSize + lane;
        float scale;
        const int4 packet = seal(quantise(piece.a, piece.b, args.format != Format::kFp8, scale));
        if (at >= packets) scale = 0.0f;
        int4 scales;
        scales.x = __float_as_int(__shfl_sync(kFullMask, scale, 0));
        scales.y = __float_as_int(__shfl_sync(kFullMask, scale, kLanesPerScale));
        scales.z = __float_as_int(__shfl_sync(kFullMask, scale, 2 * kLanesPerScale));
        scales.w = __float_as_int(__shfl_sync(kFullMask, scale, 3 * kLanesPerScale));
#pragma unroll 1
        for (RankMask left = ranks; left; left &= left - 1) {
            int4* row = arena.row(kDispatch, __ffs(left) - 1, epoch, args.runtime.domain.rank, token);
            if (at < packets) store_packet(row + at, packet);
            if (lane == 0) store_packet(row + packets + number, seal(scales));
        }
    } else {
        const int packets = arena.hidden / 8, at = number * 2 * kWarpSize + lane;
        const int4 a = seal(piece.a), b = seal(piece.b);
        for (RankMask left = ranks; left; left &= left - 1) {
            int4* row = arena.row(kDispatch, __ffs(left) - 1, epoch, args.runtime.domain.rank, token);
            if (at < packets) store_packet(row + at, a);
            if (at + kWarpSize < packets) store_packet(row + at + kWarpSize, b);
        }
    }
}

// -- receive -------------------------------------------------------------------------------------------------

// Counts of all sources to the first row of each source and expert. All threads of the block call.
__device__ void place_sources(const DispatchArgs& args, Receiving& shared, const Waiting& waiting, bool report) {
    const Runtime& rt = args.runtime;
    const int ranks = rt.domain.num_ranks, local_experts = args.num_experts / ranks;
    if (threadIdx.x < kWarpSize)
        shared.ranks.read(waiting, kDispatch, facts_of(args), report ? args.wait_stats : nullptr);
    for (int i = threadIdx.x; i < args.num_experts; i += kThreads) {
        const int source = i / local_experts;
        const Tagged* from = args.arena.counts(rt.domain.rank, waiting.epoch, source) + i % local_experts;
        Tagged count{0, 0};
        const auto arrived = [&] { return (count = load_tagged_system(from)).tag == waiting.epoch; };
        const bool came = !waiting.is_masked(source) && waiting.thread(source, arrived, count.tag);
        shared.first[i] = came ? count.value : -1;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < args.num_experts; i += kThreads)
        if (shared.first[i] < 0) shared.ranks.lost[i / local_experts] = 1;
    __syncthreads();
    if (rt.masks) {
        if (threadIdx.x < ranks) {
            const bool mine = shared.ranks.lost[threadIdx.x] != 0;
            shared.ranks.lost[threadIdx.x] = all_lose(rt, kDispatch, waiting.epoch, threadIdx.x, mine);
        }
        __syncthreads();
    }
    for (int l = threadIdx.x; l < local_experts; l += kThreads) {
        int first = 0;
        for (int s = 0; s < ranks; ++s) {
            const int count = shared.ranks.lost[s] ? 0 : shared.first[s * local_experts + l];
            shared.first[s * local_experts + l] = first;
            if (report)
                args.layout_range[static_cast<int64_t>(l) * ranks + s] = static_cast<int64_t>(first) << 32 | count;
            first += count;
        }
        if (report) {
            args.counts[l] = first;
            if (args.stats) args.stats[l] += first;
        }
    }
    if (threadIdx.x < ranks) {
        if (shared.ranks.lost[threadIdx.x]) shared.ranks.tokens[threadIdx.x] = 0;
        if (report) args.places.tokens(threadIdx.x) = shared.ranks.tokens[threadIdx.x];
    }
    __syncthreads();
}

// The first of the rows of `source` for this lane's expert, -1: none, from the counts of earlier sources, as far as
// this lane needs them. False if they do not come.
__device__ __forceinline__ bool first_row(const DispatchArgs& args, const Waiting& waiting, int source, int expert,
                                          int& first) {
    first = 0;
    for (int begin = 0; begin < source; begin += kSourcesAtOnce) {
        Tagged count[kSourcesAtOnce];
        const auto load = [&](int n) {  // all at once, waited for one by one
            if (expert >= 0 && begin + n < source)
                count[n] =
                    load_tagged_system(args.arena.counts(args.runtime.domain.rank, waiting.epoch, begin + n) + expert);
        };
#pragma unroll
        for (int n = 0; n < kSourcesAtOnce; ++n) {
            count[n] = {0, waiting.epoch};
            load(n);
        }
#pragma unroll
        for (int n = 0; n < kSourcesAtOnce; ++n) {
            const auto arrived = [&] {
                if (count[n].tag != waiting.epoch) load(n);
                return count[n].tag == waiting.epoch;
            };
            if (!waiting.warp(begin + n, arrived)) return false;
            first += count[n].value;
        }
    }
    return true;
}

// Row in [L * R * M] of this lane's route of a token, or -1. False if the token's routes do not come.
__device__ __forceinline__ bool read_places(const DispatchArgs& args, const Receiving& shared, bool counted,
                                            const Waiting& waiting, int source, int token, int& row) {
    const Arena& arena = args.arena;
    const int lane = threadIdx.x % kWarpSize, packets = ceil_div(args.num_topk, kRoutesPerPacket);
    const int4* from = arena.routes(args.runtime.domain.rank, waiting.epoch, source, token, packets) + lane;
    int4 packet{-1, -1, -1, waiting.epoch};
    const auto arrived = [&] {
        if (lane < packets) packet = load_packet(from);
        return packet.w == waiting.epoch;
    };
    row = -1;
    if (!waiting.warp(source, arrived)) return false;
    const int of = lane / kRoutesPerPacket, word = lane % kRoutesPerPacket;
    const int x = __shfl_sync(kFullMask, packet.x, of), y = __shfl_sync(kFullMask, packet.y, of);
    const int z = __shfl_sync(kFullMask, packet.z, of);
    const int route = lane >= args.num_topk ? -1 : word == 0 ? x : word == 1 ? y : z;
    const int expert = route == -1 ? -1 : route >> 16;
    int first = 0;
    if (counted)
        first = expert < 0 ? 0 : shared.first[source * (args.num_experts / args.runtime.domain.num_ranks) + expert];
    else if (!first_row(args, waiting, source, expert, first))
        return false;
    if (expert >= 0) row = static_cast<int>(expert * arena.slots()) + first + (route & 0xffff);
    return true;
}

// The scales beside a piece, column-major: lane i holds packet i of them, four scales.
__device__ __forceinline__ void store_scales(const DispatchArgs& args, int4 packet, int number, int row,
                                             unsigned routes) {
    const int lane = threadIdx.x % kWarpSize, blocks = args.arena.hidden / kScaleChannels;
    const int slots = static_cast<int>(args.arena.slots());
    if (args.format == Format::kFp8Ue8m0) {
        const int words = ceil_div(blocks, 4), column = number * kReceivePackets + lane;
        const int exponents = (packet.x >> 23 & 0xff) | (packet.y >> 23 & 0xff) << 8 | (packet.z >> 23 & 0xff) << 16 |
                              (packet.w >> 23 & 0xff) << 24;
        for (unsigned left = routes; left; left &= left - 1) {
            const int to = __shfl_sync(kFullMask, row, __ffs(left) - 1);
            if (lane < kReceivePackets && column < words)
                static_cast<int*>(
                    args.scales)[(static_cast<int64_t>(to / slots) * words + column) * slots + to % slots] = exponents;
        }
        return;
    }
    constexpr int kScales = kReceivePackets * 4;
    const int of = lane % kScales / 4, word = lane % 4, column = number * kScales + lane;
    const int x = __shfl_sync(kFullMask, packet.x, of), y = __shfl_sync(kFullMask, packet.y, of);
    const int z = __shfl_sync(kFullMask, packet.z, of), w = __shfl_sync(kFullMask, packet.w, of);
    const int scale = word == 0 ? x : word == 1 ? y : word == 2 ? z : w;
    for (unsigned left = routes; left; left &= left - 1) {
        const int to = __shfl_sync(kFullMask, row, __ffs(left) - 1);
        if (lane < kScales && column < blocks)
            static_cast<int*>(args.scales)[(static_cast<int64_t>(to / slots) * blocks + column) * slots + to % slots] =
                scale;
    }
}

template <bool kFp8>
__device__ __forceinline__ void receive_piece(const DispatchArgs& args, const Receiving& shared, bool counted,
                                              const Waiting& waiting, int source, int token, int number) {
    const Arena& arena = args.arena;
    const int lane = threadIdx.x % kWarpSize;
    const int row_packets = kFp8 ? arena.hidden / 16 : arena.hidden / 8;
    const int scale_packets = ceil_div(row_packets, kWarpSize);  // as they were sent: one for each 512 channels
    int4* staged = arena.row(kDispatch, args.runtime.domain.rank, waiting.epoch, source, token);
    const int at = number * kReceivePackets * kWarpSize + lane, scales_at = number * kReceivePackets + lane;
    const auto has = [&](int i) { return at + i * kWarpSize < row_packets; };
    const bool has_scales = kFp8 && lane < kReceivePackets && scales_at < scale_packets;
    int4 v[kReceivePackets], scales{0, 0, 0, has_scales ? 0 : 1};
#pragma unroll
    for (int i = 0; i < kReceivePackets; ++i) v[i] = {0, 0, 0, has(i) ? 0 : 1};
    const auto arrived = [&] {
        bool all = true;
#pragma unroll
        for (int i = 0; i < kReceivePackets; ++i) {
            if (!is_sealed(v[i])) v[i] = load_packet(staged + at + i * kWarpSize);
            all = all && is_sealed(v[i]);
        }
        if (!is_sealed(scales)) scales = load_packet(staged + row_packets + scales_at);
        return all && is_sealed(scales);
    };
    arrived();  // on its way while the routes are read
    int row;
    const bool known = read_places(args, shared, counted, waiting, source, token, row);
    const unsigned routes = __ballot_sync(kFullMask, row >= 0);
    if (number == 0 && lane < args.num_topk) {
        args.places.row(arena, args.num_topk, source, token, lane) = row;
        if (row >= 0) args.src_info[row] = token;
    }
    if (!known || routes == 0) return;
    // a rank that is lost after it sent its tables leaves rows of zeros if it is masked then, of NaN if that is the end
    const int lost = args.runtime.masks ? 0 : -1;
    const bool whole = waiting.warp(source, arrived);
#pragma unroll
    for (int i = 0; i < kReceivePackets; ++i) {
        if (whole && has(i)) store_packet(staged + at + i * kWarpSize, {0, 0, 0, 0});
        v[i] = whole ? unseal(v[i]) : int4{lost, lost, lost, lost};
    }
    const int64_t row_bytes = static_cast<int64_t>(row_packets) * sizeof(int4);
    for (unsigned left = routes; left; left &= left - 1) {
        const int to = __shfl_sync(kFullMask, row, __ffs(left) - 1);
        int4* out = reinterpret_cast<int4*>(args.rows + to * row_bytes) + at;
#pragma unroll
        for (int i = 0; i < kReceivePackets; ++i)
            if (has(i)) store_streaming(out + i * kWarpSize, v[i]);
    }
    if (kFp8) {
        if (whole && has_scales) store_packet(staged + row_packets + scales_at, {0, 0, 0, 0});
        store_scales(args, whole ? unseal(scales) : int4{}, number, row, routes);
    }
}

// All threads of the block call.
template <bool kFp8>
__device__ __forceinline__ void receive(const DispatchArgs& args, Receiving& shared, Waiting waiting, bool reports) {
    const Runtime& rt = args.runtime;
    const int ranks = rt.domain.num_ranks;
    // With masks a lost rank counts as none in all blocks alike, so they need the same answer about each of its counts.
    const bool counted = reports || rt.masks;
    if (counted) {
        place_sources(args, shared, waiting, reports);
    } else {
        if (threadIdx.x < kWarpSize) shared.ranks.read(waiting, kDispatch, facts_of(args), nullptr);
        __syncthreads();
    }
    const int row_bytes = kFp8 ? args.arena.hidden : 2 * args.arena.hidden;
    const int pieces = ceil_div(row_bytes, kReceiveBytes);
    int most = 0;
    for (int s = 0; s < ranks; ++s) most = max(most, shared.ranks.tokens[s]);
    const int warps = gridDim.x * kWarps, items = ranks * most * pieces;
    waiting.crowded = items > kCrowd;
    for (int item = blockIdx.x * kWarps + threadIdx.x / kWarpSize; item < items; item += warps) {
        const int number = item % pieces, row = item / pieces;
        const int source = row % ranks, token = row / ranks;
        if (token < shared.ranks.tokens[source])
            receive_piece<kFp8>(args, shared, counted, waiting, source, token, number);
    }
}

// -- the kernel ----------------------------------------------------------------------------------------------

template <bool kFp8, int kHalf>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) dispatch_kernel(const __grid_constant__ DispatchArgs args) {
    __shared__ Shared<kHalf> shared;
    const Runtime& rt = args.runtime;
    const int ranks = rt.domain.num_ranks, warp = threadIdx.x / kWarpSize;
    const bool reports = reports_here(), sends_tables = static_cast<int>(blockIdx.x) < ranks;
    const int pieces = ceil_div(args.arena.hidden, kSendChannels), senders = (gridDim.x - ranks) * kWarps;
    const int items = args.refused ? 0 : args.num_tokens * pieces, peer = (rt.domain.rank + blockIdx.x) % ranks;
    int item = sends_tables ? items : (blockIdx.x - ranks) * kWarps + warp;
    Piece piece;
    const auto load = [&] {  // what does not depend on the call's number
        if constexpr ((kHalf & kSend) != 0) {
            if (sends_tables) number_routes(args, shared.tables, peer, 0);
            if (item < items) piece.load<kFp8>(args, item, pieces);
        }
    };
    const Entered entered = enter<kHalf>(rt, kDispatch, kLowLatencyDispatch, &args.places.epoch(), nullptr, load);
    const int epoch = entered.epoch;
    if (epoch == 0) {
        if ((kHalf & kReceive) && reports) {  // nothing came
            for (int l = threadIdx.x; l < args.num_experts / ranks; l += kThreads) args.counts[l] = 0;
            if (threadIdx.x < ranks) args.places.tokens(threadIdx.x) = 0;
        }
        return;
    }
    const Waiting waiting{rt, kLowLatencyDispatch, epoch};
    if constexpr ((kHalf & kSend) != 0) {
        if (sends_tables) send_tables(args, shared.tables, epoch, peer, entered.writable >> peer & 1);
        while (item < items) {
            store_piece<kFp8>(args, epoch, item, pieces, piece, piece.ranks & entered.writable);
            item += senders;
            if (item < items) piece.load<kFp8>(args, item, pieces);
        }
    }
    if (kHalf & kReceive) receive<kFp8>(args, shared.receiving, waiting, reports);
}

template <bool kFp8>
cudaError_t launch(const DispatchArgs& args, Half half, int num_blocks, cudaStream_t stream) {
    switch (half) {
        case kSend: dispatch_kernel<kFp8, kSend><<<num_blocks, kThreads, 0, stream>>>(args); break;
        case kReceive: dispatch_kernel<kFp8, kReceive><<<num_blocks, kThreads, 0, stream>>>(args); break;
        case kBoth: dispatch_kernel<kFp8, kBoth><<<num_blocks, kThreads, 0, stream>>>(args); break;
    }
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_dispatch(const DispatchArgs& args, Half half, int num_blocks, cudaStream_t stream) {
    return args.format == Format::kBf16 ? launch<false>(args, half, num_blocks, stream)
                                        : launch<true>(args, half, num_blocks, stream);
}

}  // namespace deepep_moe::latency
