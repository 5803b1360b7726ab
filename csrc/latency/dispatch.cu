// Dispatch: a row crosses once to each rank that has one of the token's experts. Its place there is known beforehand;
// the receiver copies it to its experts' rows.
//
//   tables   block d < R (see table_blocks()): the routes of this rank's tokens at rank d (tables.cuh)
//   rows     the next kSenders blocks, a warp per 512 channels of a token: load, quantise, store a packet per lane and
//            rank
//   receive  all blocks, those without other work first, a warp per 1024 bytes of a row: read the packets, the token's
//            routes and the counts that its places need, store the row for each route, clear the packets
//
// Own tokens take the same way, through own memory: x may change once it is sent, and an expert gets the same bits from
// every rank.
#include <cuda_bf16.h>

#include "device/fp8.cuh"
#include "latency/tables.cuh"

namespace deepep_moe::DEEPEP_MOE_WIDTH::latency {

namespace {

constexpr int kLaneChannels = 16;  // of a row that is sent, per lane
constexpr int kSendChannels = kLaneChannels * kWarpSize;
constexpr int kSendBlocks = kSendChannels / kScaleChannels;  // of channels that share a scale: one packet of scales
constexpr int kLanesPerScale = kScaleChannels / kLaneChannels;
constexpr int kSourcesAtOnce = 4;  // whose counts are loaded together
constexpr int kSenders = 48;  // blocks: enough to fill the links. More stores only queue, with all loads behind them
constexpr int kReceivePackets = 2;  // of a row that is received, per lane
constexpr int kReceiveBytes = kReceivePackets * sizeof(int4) * kWarpSize;
constexpr float kFloor = 1e-4f;  // of a block's largest value, part of this format

static_assert(kSendBlocks == 4, "four scales make a packet");

struct Receiving {
    Ranks ranks;
    // [R][L] rows of the source for the expert; then the first of these rows. Only where all counts are read.
    int first[kMaxExperts];
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

// The unit of work of a sending warp: 512 channels of a token.
struct Piece {
    int4 a, b;  // of this lane
    RankSet ranks;
    int begin;  // the rank that it is sent to first: pieces begin with different ones, so that all links are busy

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
        const Domain& domain = args.runtime.domain;
        ranks = ranks_of(args.topk_idx, token, args.num_topk, args.num_experts, args.num_experts / domain.num_ranks);
        begin = (domain.rank + 1 + item) % domain.num_ranks;
    }

    // Take the next rank out of `left`.
    __device__ __forceinline__ int next(RankSet& left) const {
        const RankSet behind = left.from(begin);
        const int rank = first_of(behind.any() ? behind : left);
        left.remove(rank);
        return rank;
    }
};

template <bool kFp8>
__device__ __forceinline__ void store_piece(const DispatchArgs& args, int epoch, int item, int pieces,
                                            const Piece& piece, const RankSet& ranks) {
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
        for (RankSet left = ranks; left.any();) {
            int4* row = arena.row(kDispatch, piece.next(left), epoch, args.runtime.domain.rank, token);
            if (at < packets) store_packet(row + at, packet);
            if (lane == 0) store_packet(row + packets + number, seal(scales));
        }
    } else {
        const int packets = arena.hidden / 8, at = number * 2 * kWarpSize + lane;
        const int4 a = seal(piece.a), b = seal(piece.b);
#pragma unroll 1
        for (RankSet left = ranks; left.any();) {
            int4* row = arena.row(kDispatch, piece.next(left), epoch, args.runtime.domain.rank, token);
            if (at < packets) store_packet(row + at, a);
            if (at + kWarpSize < packets) store_packet(row + at + kWarpSize, b);
        }
    }
}

// -- receive -------------------------------------------------------------------------------------------------

// Reads the facts and counts of all sources, in different warps so that all loads are in flight together, and computes
// the first row of each source and expert. Called by all threads of the block.
__device__ void place_sources(const DispatchArgs& args, Receiving& shared, const Waiting& waiting, bool report) {
    const Runtime& rt = args.runtime;
    const int ranks = rt.domain.num_ranks, local_experts = args.num_experts / ranks;
    const auto read_count = [&](int i, bool masked) {
        const int source = i / local_experts;
        const Tagged* from = args.arena.counts(rt.domain.rank, waiting.epoch, source) + i % local_experts;
        Tagged count{0, 0};
        const auto arrived = [&] { return (count = load_tagged_system(from)).tag == waiting.epoch; };
        const bool came = !masked && waiting.thread(source, arrived, count.tag);
        shared.first[i] = came ? count.value : -1;
    };
    if (threadIdx.x / kMaxRanks == kThreads / kMaxRanks - 1)
        shared.ranks.read(waiting, facts_of(args), report ? args.wait_stats : nullptr);
#pragma unroll 1
    for (int i = threadIdx.x; i < args.num_experts; i += kThreads) read_count(i, waiting.is_masked(i / local_experts));
    __syncthreads();
    if (rt.masks) {
#pragma unroll 1
        for (int i = threadIdx.x; i < args.num_experts; i += kThreads)
            if (shared.first[i] < 0) shared.ranks.lost[i / local_experts] = 1;
        __syncthreads();
        if (threadIdx.x < ranks) shared.ranks.agree_on_lost(waiting, facts_of(args), threadIdx.x);
        __syncthreads();
#pragma unroll 1
        for (int i = threadIdx.x; i < args.num_experts; i += kThreads)  // the counts are there: another block saw them
            if (shared.first[i] < 0 && !shared.ranks.lost[i / local_experts]) read_count(i, false);
        __syncthreads();
    }
    if (report && threadIdx.x < ranks) args.places.tokens(threadIdx.x) = shared.ranks.tokens[threadIdx.x];
#pragma unroll 1
    for (int l = threadIdx.x; l < local_experts; l += kThreads) {
        int first = 0;
#pragma unroll 1
        for (int s = 0; s < ranks; ++s) {
            const int count = shared.ranks.lost[s] ? 0 : max(0, shared.first[s * local_experts + l]);
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
    __syncthreads();
}

// The index of the first row of `source` for this lane's expert (-1: none), from the counts of earlier sources for that
// expert alone. False if they do not arrive.
__device__ __forceinline__ bool first_row(const DispatchArgs& args, const Waiting& waiting, int source, int expert,
                                          int& first) {
    first = 0;
    for (int begin = 0; begin < source; begin += kSourcesAtOnce) {
        Tagged count[kSourcesAtOnce];
        const auto load = [&](int n) {  // loaded together, then waited for in order
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

// The unit of work of a receiving warp: 1024 bytes of a row, their scales, and the routes of the token. Loads are
// issued before it is known that the packets have arrived, and repeated for those that have not.
template <bool kFp8>
struct Arriving {
    int source, token, number;
    int4 v[kReceivePackets], scales, routes;  // of this lane: of the row; lane i: packet i of the scales, of the routes

    static __device__ __forceinline__ int pieces_of_row(const DispatchArgs& args) {
        return ceil_div(kFp8 ? args.arena.hidden : 2 * args.arena.hidden, kReceiveBytes);
    }
    __device__ __forceinline__ int row_packets(const DispatchArgs& args) const {
        return kFp8 ? args.arena.hidden / 16 : args.arena.hidden / 8;
    }
    __device__ __forceinline__ int at() const { return number * kReceivePackets * kWarpSize + threadIdx.x % kWarpSize; }
    __device__ __forceinline__ bool has(const DispatchArgs& args, int i) const {
        return at() + i * kWarpSize < row_packets(args);
    }
    __device__ __forceinline__ int4* staged(const DispatchArgs& args, int epoch) const {
        return args.arena.row(kDispatch, args.runtime.domain.rank, epoch, source, token);
    }
    // Packet of scales of this lane, counted from the row.
    __device__ __forceinline__ int scales_at(const DispatchArgs& args) const {
        return row_packets(args) + number * kReceivePackets + static_cast<int>(threadIdx.x) % kWarpSize;
    }
    __device__ __forceinline__ bool has_scales(const DispatchArgs& args) const {
        const int scale_packets = ceil_div(row_packets(args), kWarpSize);  // as they were sent: one for 512 channels
        return kFp8 && static_cast<int>(threadIdx.x) % kWarpSize < kReceivePackets &&
               scales_at(args) < row_packets(args) + scale_packets;
    }

    __device__ __forceinline__ bool rows_arrived(const DispatchArgs& args, int epoch) {
        const int4* from = staged(args, epoch);
        bool all = true;
#pragma unroll
        for (int i = 0; i < kReceivePackets; ++i) {
            if (!is_sealed(v[i])) v[i] = load_packet(from + at() + i * kWarpSize);
            all = all && is_sealed(v[i]);
        }
        if (kFp8 && !is_sealed(scales)) scales = load_packet(from + scales_at(args));
        return all && is_sealed(scales);
    }
    __device__ __forceinline__ bool routes_arrived(const DispatchArgs& args, int epoch) {
        const int lane = threadIdx.x % kWarpSize, packets = ceil_div(args.num_topk, kRoutesPerPacket);
        if (routes.w != epoch)
            routes = load_packet(args.arena.routes(args.runtime.domain.rank, epoch, source, token, packets) + lane);
        return routes.w == epoch;
    }

    __device__ __forceinline__ void begin(const DispatchArgs& args, int item) {
        const int ranks = args.runtime.domain.num_ranks, pieces = pieces_of_row(args), row = item / pieces;
        number = item % pieces;
        source = row % ranks;
        token = row / ranks;
    }
    __device__ __forceinline__ void load(const DispatchArgs& args, int epoch) {
        const bool exists = token < args.arena.max_tokens;
        const int packets = ceil_div(args.num_topk, kRoutesPerPacket);
#pragma unroll
        for (int i = 0; i < kReceivePackets; ++i) v[i] = {0, 0, 0, exists && has(args, i) ? 0 : 1};
        scales = {0, 0, 0, exists && has_scales(args) ? 0 : 1};
        const bool has_routes = exists && static_cast<int>(threadIdx.x) % kWarpSize < packets;
        routes = {-1, -1, -1, has_routes ? ~epoch : epoch};
        routes_arrived(args, epoch);
        rows_arrived(args, epoch);
    }
};

// Local expert of this lane's route (-1: none) and its index among the expert's rows. False if they do not arrive.
template <bool kFp8>
__device__ __forceinline__ bool read_place(const DispatchArgs& args, const Receiving& shared, bool counted,
                                           const Waiting& waiting, Arriving<kFp8>& piece, int& expert, int& place) {
    const int lane = threadIdx.x % kWarpSize, source = piece.source;
    expert = -1;
    if (!waiting.warp(source, [&] { return piece.routes_arrived(args, waiting.epoch); })) return false;
    const int of = lane / kRoutesPerPacket, word = lane % kRoutesPerPacket;
    const int x = __shfl_sync(kFullMask, piece.routes.x, of), y = __shfl_sync(kFullMask, piece.routes.y, of);
    const int z = __shfl_sync(kFullMask, piece.routes.z, of);
    const int route = lane >= args.num_topk ? -1 : word == 0 ? x : word == 1 ? y : z;
    const int chosen = route == -1 ? -1 : route >> 16;
    int first = 0;
    if (counted)
        first = chosen < 0 ? 0 : shared.first[source * (args.num_experts / args.runtime.domain.num_ranks) + chosen];
    else if (!first_row(args, waiting, source, chosen, first))
        return false;
    expert = chosen;
    place = first + (route & 0xffff);
    return true;
}

// Stores the scales of a piece, column-major. Lane i holds packet i: four scales.
__device__ __forceinline__ void store_scales(const DispatchArgs& args, int4 packet, int number, int expert, int place,
                                             unsigned routes) {
    const int lane = threadIdx.x % kWarpSize, blocks = args.arena.hidden / kScaleChannels;
    const int slots = static_cast<int>(args.arena.slots());
    int columns = blocks, column = 0, value = 0;
    bool has = false;
    if (args.format == Format::kFp8Ue8m0) {
        columns = ceil_div(blocks, 4);
        column = number * kReceivePackets + lane;
        has = lane < kReceivePackets;
        value = (packet.x >> 23 & 0xff) | (packet.y >> 23 & 0xff) << 8 | (packet.z >> 23 & 0xff) << 16 |
                (packet.w >> 23 & 0xff) << 24;
    } else {
        constexpr int kScales = kReceivePackets * 4;
        const int of = lane % kScales / 4, word = lane % 4;
        const int x = __shfl_sync(kFullMask, packet.x, of), y = __shfl_sync(kFullMask, packet.y, of);
        const int z = __shfl_sync(kFullMask, packet.z, of), w = __shfl_sync(kFullMask, packet.w, of);
        column = number * kScales + lane;
        has = lane < kScales;
        value = word == 0 ? x : word == 1 ? y : word == 2 ? z : w;
    }
    has = has && column < columns;
    // An int is large enough: there is one scale per 128 bytes of rows.
    const int begin = expert * columns * slots + place;
    int* const scales = static_cast<int*>(args.scales) + column * slots;
    for (unsigned left = routes; left; left &= left - 1) {
        const int at = __shfl_sync(kFullMask, begin, __ffs(left) - 1);
        if (has) scales[at] = value;
    }
}

template <bool kFp8>
__device__ __forceinline__ void receive_piece(const DispatchArgs& args, const Receiving& shared, bool counted,
                                              const Waiting& waiting, Arriving<kFp8>& piece) {
    const Arena& arena = args.arena;
    const int lane = threadIdx.x % kWarpSize, source = piece.source, token = piece.token;
    int expert, place;
    const bool known = read_place(args, shared, counted, waiting, piece, expert, place);
    const int row = expert < 0 ? -1 : expert * static_cast<int>(arena.slots()) + place;
    const unsigned routes = __ballot_sync(kFullMask, row >= 0);
    if (piece.number == 0 && lane < args.num_topk) {
        args.places.row(arena, args.num_topk, source, token, lane) = row;
        if (row >= 0) args.src_info[row] = token;
    }
    if (!known || routes == 0) return;
    // Rows of a rank that is lost after it sent its tables are zero if it is masked, NaN if this is a failure.
    const int lost = args.runtime.masks ? 0 : -1;
    const bool whole = waiting.warp(source, [&] { return piece.rows_arrived(args, waiting.epoch); });
    int4* const staged = piece.staged(args, waiting.epoch);
#pragma unroll
    for (int i = 0; i < kReceivePackets; ++i) piece.v[i] = whole ? unseal(piece.v[i]) : int4{lost, lost, lost, lost};
    const int64_t row_bytes = static_cast<int64_t>(piece.row_packets(args)) * sizeof(int4);
    for (unsigned left = routes; left; left &= left - 1) {
        const int to = __shfl_sync(kFullMask, row, __ffs(left) - 1);
        int4* out = reinterpret_cast<int4*>(args.rows + to * row_bytes) + piece.at();
#pragma unroll
        for (int i = 0; i < kReceivePackets; ++i)
            if (piece.has(args, i)) store_streaming(out + i * kWarpSize, piece.v[i]);
    }
    if (kFp8) store_scales(args, whole ? unseal(piece.scales) : int4{}, piece.number, expert, place, routes);
    if (!whole) return;
#pragma unroll
    for (int i = 0; i < kReceivePackets; ++i)
        if (piece.has(args, i)) store_packet(staged + piece.at() + i * kWarpSize, {0, 0, 0, 0});
    if (piece.has_scales(args)) store_packet(staged + piece.scales_at(args), {0, 0, 0, 0});
}

// Called by all threads of the block. `piece`: the first of this warp, begun; it is item number `item`, and the next
// one `step` further.
template <bool kFp8, int kHalf>
__device__ __forceinline__ void receive(const DispatchArgs& args, Receiving& shared, Waiting waiting, bool reports,
                                        Arriving<kFp8>& piece, int item, int step) {
    const Runtime& rt = args.runtime;
    const int ranks = rt.domain.num_ranks, pieces = piece.pieces_of_row(args);
    piece.load(args, waiting.epoch);
    // Each warp reads only the counts that its routes need: those of other sources may arrive much later. Exceptions:
    // with masks all blocks must treat a lost rank alike; and a kernel that only receives, with several pieces per
    // warp, reads all counts together with the first rows, before its stores delay loads. A wide kernel reads all as
    // well: one route may need the counts of 127 sources.
    const bool several = kHalf == kReceive && ranks * args.arena.max_tokens * pieces > step;
    const bool counted = reports || rt.masks || several || kRankWords > 1;
    if (counted) {
        place_sources(args, shared, waiting, reports);
    } else {
        if (threadIdx.x < kMaxRanks) shared.ranks.read(waiting, facts_of(args), nullptr);
        __syncthreads();
    }
    int most = 0;
    for (int s = 0; s < ranks; ++s) most = max(most, shared.ranks.tokens[s]);
    const int items = ranks * most * pieces;
    waiting.crowded = items > kCrowd;
    while (item < items) {
        if (piece.token < shared.ranks.tokens[piece.source]) receive_piece(args, shared, counted, waiting, piece);
        item += step;
        if (item >= items) break;
        piece.begin(args, item);
        piece.load(args, waiting.epoch);
    }
}

// -- the kernel ----------------------------------------------------------------------------------------------

template <bool kFp8, int kHalf>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) dispatch_kernel(const __grid_constant__ DispatchArgs args) {
    __shared__ Shared<kHalf> shared;
    const Runtime& rt = args.runtime;
    const int ranks = rt.domain.num_ranks, warp = threadIdx.x / kWarpSize;
    const int tables = table_blocks(ranks);
    const bool reports = reports_here(), sends_tables = static_cast<int>(blockIdx.x) < tables;
    const int send_blocks = min(static_cast<int>(gridDim.x) - tables, kSenders), senders = send_blocks * kWarps;
    const int block = static_cast<int>(blockIdx.x), pieces = ceil_div(args.arena.hidden, kSendChannels);
    const int packets = ceil_div(args.num_topk, kRoutesPerPacket);
    const int items = args.num_tokens * pieces;
    int peer = (rt.domain.rank + blockIdx.x) % ranks;
    int item = sends_tables || block >= tables + send_blocks ? items : (block - tables) * kWarps + warp;
    Piece piece;
    PacketRoutes routes;
    Arriving<kFp8> arriving;
    // A kernel that only receives: neighbouring items in different blocks, so that all SMs have equally many; none in
    // the last block, which starts with something slow. Else: blocks without other work first.
    const int grid = static_cast<int>(gridDim.x), receivers = kHalf == kReceive ? grid - 1 : grid;
    const int busy = tables + send_blocks, turn = block - busy + (block < busy ? grid : 0);
    const int received = kHalf == kReceive ? warp * receivers + block : turn * kWarps + warp;
    const auto load = [&] {  // what does not depend on the call's number
        if constexpr (kHalf == kReceive) arriving.begin(args, received);
        if constexpr ((kHalf & kSend) != 0) {
            if (sends_tables) routes = read_tile(args, shared.tables, peer, 0, packets);
            if (item < items) piece.load<kFp8>(args, item, pieces);
        }
    };
    const Entered entered = enter<kHalf>(rt, kDispatch, &args.places.epoch(), nullptr, load);
    const int epoch = entered.epoch;
    if (epoch == 0) {
        if ((kHalf & kReceive) && reports) {  // nothing came
            for (int l = threadIdx.x; l < args.num_experts / ranks; l += kThreads) args.counts[l] = 0;
            if (threadIdx.x < ranks) args.places.tokens(threadIdx.x) = 0;
        }
        return;
    }
    const Waiting waiting{rt, kDispatch, epoch};
    if constexpr ((kHalf & kSend) != 0) {
        for (int next = block + tables; sends_tables; next += tables) {
            send_tables(args, shared.tables, routes, epoch, peer, entered.writable.has(peer));
            if (kRankWords == 1 || next >= ranks) break;
            peer = (rt.domain.rank + next) % ranks;
            routes = read_tile(args, shared.tables, peer, 0, packets);
            __syncthreads();
        }
        while (item < items) {
            Piece next = piece;
            if (item + senders < items) next.load<kFp8>(args, item + senders, pieces);
            store_piece<kFp8>(args, epoch, item, pieces, piece, piece.ranks & entered.writable);
            piece = next;
            item += senders;
        }
    }
    if constexpr ((kHalf & kReceive) != 0) {
        if (block >= receivers) return;
        if constexpr (kHalf != kReceive) arriving.begin(args, received);
        receive<kFp8, kHalf>(args, shared.receiving, waiting, reports, arriving, received, receivers * kWarps);
    }
}

template <bool kFp8>
cudaError_t launch(const DispatchArgs& args, Half half, int num_blocks, cudaStream_t stream) {
    switch (half) {
        case kSend: dispatch_kernel<kFp8, kSend><<<num_blocks, kThreads, 0, stream>>>(args); break;
        case kReceive: dispatch_kernel<kFp8, kReceive><<<num_blocks, kThreads, 0, stream>>>(args); break;
        case kBoth: dispatch_kernel<kFp8, kBoth><<<num_blocks, kThreads, 0, stream>>>(args); break;
        default: return cudaErrorInvalidValue;  // tables and rows are sent together
    }
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_dispatch(const DispatchArgs& args, Half half, int num_blocks, cudaStream_t stream) {
    return args.format == Format::kBf16 ? launch<false>(args, half, num_blocks, stream)
                                        : launch<true>(args, half, num_blocks, stream);
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH::latency
