// Combine: each rank sums the rows of a token and sends the sum to the token's source rank, which adds the sums of all
// ranks.
//
//   send      a warp per row received from a peer: sum its expert rows (expert layout) or take the row itself (rank
//             layout), store the sum into the staging of the source rank, set its flag
//   gather    a warp per token of this rank: once the flags of its ranks are set, add their sums in rank order; rows of
//             this rank are added directly, without staging
//
// Long rows of the expert layout are sent and gathered in pieces, each with its own flag and warp.
//
// Sums are fp32 in a fixed order; a sum that is sent to another rank is rounded to the dtype of the rows.
#include "device/sum.cuh"
#include "throughput/operation.cuh"
#include "throughput/staging.cuh"

namespace deepep_moe {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPieceVectors = 448;  // smallest piece of a row of the expert layout

// The rows that are added to one result, in order: rows of lower ranks, then the rows on this rank (parts), then rows
// of higher ranks, then biases. One list per warp, in shared memory.
struct RowList {
    const char* row[kMaxTopk + kMaxRanks + kMaxBiases];
    float factor[kMaxTopk + kMaxRanks + kMaxBiases];
    int before, parts, arrived;  // rows of lower ranks; rows on this rank; rows of all ranks
    int count;
};

// Lane k holds the k-th row, if its bit is in the mask.
struct LaneRows {
    const char* row;
    float factor;
    unsigned mask;
};

__device__ __forceinline__ void append(RowList& list, int& count, const LaneRows& from, unsigned mask) {
    const int lane = threadIdx.x % kWarpSize;
    if (mask >> lane & 1) {
        const int index = count + __popc(mask & ((1u << lane) - 1));
        list.row[index] = from.row;
        list.factor[index] = from.factor;
    }
    count += __popc(mask);
}

// The vectors [first, end) of a row.
struct Span {
    int first, end;
};

// The pieces of a row, in vectors. Summing the expert rows of one long row takes a warp tens of microseconds, a large
// part of the kernel's time. Pieces distribute the work more evenly, and the receiver can add the first piece while the
// next is in flight. Smaller pieces, and pieces of rows that are only copied, are slower (docs/benchmarks.md). All
// ranks use the same pieces, because these follow from values of Operation, which ranks compare.
template <bool kGrouped>
struct Pieces {
    int vectors, size, count;

    __device__ __forceinline__ explicit Pieces(const CombineArgs& args)
        : vectors(args.row_bytes / static_cast<int>(sizeof(int4))) {
        size = kGrouped ? max(kPieceVectors, (vectors + kFlagsPerRow - 1) / kFlagsPerRow) : vectors;
        count = kGrouped ? (vectors + size - 1) / size : 1;
    }
    __device__ __forceinline__ Span span(int piece) const { return {piece * size, min(vectors, (piece + 1) * size)}; }
};

// Sum the vectors `first + u * 32` of exactly kRows rows; all of them must exist.
template <typename T, int kRows, int kVectors>
__device__ __forceinline__ void sum_vectors(const RowList& list, int first, char* out) {
    int4 v[kRows][kVectors];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int4* row = reinterpret_cast<const int4*>(list.row[r]) + first;
#pragma unroll
        for (int u = 0; u < kVectors; ++u) v[r][u] = load_streaming(row + u * kWarpSize);
    }
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
        Vector<T> total;
        total.clear();
#pragma unroll
        for (int r = 0; r < kRows; ++r) total.add_scaled(v[r][u], list.factor[r]);
        store_streaming(reinterpret_cast<int4*>(out) + first + u * kWarpSize, total.pack());
    }
}

// Sum exactly kRows rows, with about eight loads in flight.
template <typename T, int kRows>
__device__ __forceinline__ void sum_few(const RowList& list, Span span, char* out) {
    constexpr int kVectors = kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1;
    const int lane = threadIdx.x % kWarpSize;
    int base = span.first;
    for (; base + kVectors * kWarpSize <= span.end; base += kVectors * kWarpSize)
        sum_vectors<T, kRows, kVectors>(list, base + lane, out);
    for (base += lane; base < span.end; base += kWarpSize) sum_vectors<T, kRows, 1>(list, base, out);
}

// Sum any number of rows, four at a time.
template <typename T>
__device__ __forceinline__ void sum_many(const RowList& list, Span span, char* out) {
    constexpr int kRows = 4;
    for (int i = span.first + threadIdx.x % kWarpSize; i < span.end; i += kWarpSize) {
        Vector<T> total;
        total.clear();
        int row = 0;
        for (; row + kRows <= list.count; row += kRows) {
            int4 v[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) v[r] = load_streaming(reinterpret_cast<const int4*>(list.row[row + r]) + i);
#pragma unroll
            for (int r = 0; r < kRows; ++r) total.add_scaled(v[r], list.factor[row + r]);
        }
        for (; row < list.count; ++row)
            total.add_scaled(load_streaming(reinterpret_cast<const int4*>(list.row[row]) + i), list.factor[row]);
        store_streaming(reinterpret_cast<int4*>(out) + i, total.pack());
    }
}

// Sum the rows of the list over the span, in order. Call with the whole warp.
template <typename T>
__device__ __forceinline__ void sum_rows(const RowList& list, Span span, char* out) {
    switch (list.count) {
        case 1: return sum_few<T, 1>(list, span, out);
        case 2: return sum_few<T, 2>(list, span, out);
        case 3: return sum_few<T, 3>(list, span, out);
        case 4: return sum_few<T, 4>(list, span, out);
        case 5: return sum_few<T, 5>(list, span, out);
        case 6: return sum_few<T, 6>(list, span, out);
        case 7: return sum_few<T, 7>(list, span, out);
        case 8: return sum_few<T, 8>(list, span, out);
        default: return sum_many<T>(list, span, out);
    }
}

// The rows on this rank that belong to received row n, and the weight of route `lane`. Empty if n is out of range: such
// rows did not fit into the plan (the host raises), but their source rank still waits for them.
template <bool kGrouped>
__device__ __forceinline__ LaneRows parts_of(const CombineArgs& args, int n, bool exists, float& weight) {
    const int lane = threadIdx.x % kWarpSize, topk = args.route.num_topk;
    int64_t row = -1;
    float factor = 1.0f;
    weight = 0.0f;
    if (exists && n < args.route.max_recv) {
        if (kGrouped) {
            if (lane < topk) row = args.route.expert_row(n, lane);
            if (row >= 0 && args.weights) weight = args.weights[row];
            if (args.apply_weights) factor = weight;
        } else {
            if (lane == 0) row = n;
            if (lane < topk && args.weights) weight = args.weights[static_cast<int64_t>(n) * topk + lane];
        }
    }
    return {args.x + row * args.row_bytes, factor, __ballot_sync(kFullMask, row >= 0)};
}

template <typename T, bool kGrouped>
__device__ __forceinline__ void send(const CombineArgs& args, int epoch, RowList& list) {
    const Runtime& rt = args.runtime;
    const int lane = threadIdx.x % kWarpSize;
    const int warp = blockIdx.x * kWarps + threadIdx.x / kWarpSize, warps = args.num_send_blocks * kWarps;
    const PeerRows arrivals(rt, args.route.rank_prefix);
    const Pieces<kGrouped> pieces(args);
    for (int item = warp; item < arrivals.items(rt) * pieces.count; item += warps) {
        const int piece = item % pieces.count;
        const PeerRows::Row row = arrivals.at(rt, item / pieces.count);
        if (row.index < 0) continue;
        float weight;
        const LaneRows parts = parts_of<kGrouped>(args, row.index, true, weight);
        __syncwarp();  // all lanes have finished with the previous list
        int count = 0;
        append(list, count, parts, parts.mask);
        list.before = 0;
        list.parts = list.count = count;
        __syncwarp();

        char* staged = staged_row(rt, args.staging, epoch, row.source, rt.domain.rank, row.slot, args.pitch);
        sum_rows<T>(list, pieces.span(piece), staged);
        if (args.carry_weights && piece == 0 && lane < args.route.num_topk)
            reinterpret_cast<float*>(staged + args.row_bytes)[lane] = weight;
        __syncwarp();  // all lanes have written before lane 0 sets the flag
        if (lane == 0)
            store_release_system(arrived_flag(rt, args.staging, epoch, row.source, rt.domain.rank, row.slot, piece),
                                 epoch);
    }
}

template <typename T, bool kGrouped>
__device__ __forceinline__ void gather(const CombineArgs& args, int epoch, RowList& list) {
    const Runtime& rt = args.runtime;
    const Route& route = args.route;
    const int lane = threadIdx.x % kWarpSize;
    const PeerRows arrivals(rt, route.rank_prefix);

    const Pieces<kGrouped> pieces(args);
    WorkQueue queue(&rt.local->next_item);
    for (int item = queue.take(); item < route.num_tokens * pieces.count; item = queue.take()) {
        const int token = item / pieces.count, piece = item % pieces.count;
        int slot = -1;  // of the token at rank `lane`
        if (lane < rt.domain.num_ranks)
            slot = route.send_slot[static_cast<int64_t>(token) * rt.domain.num_ranks + lane];
        const int own_slot = __shfl_sync(kFullMask, slot, rt.domain.rank);
        float own_weight;
        const LaneRows parts = parts_of<kGrouped>(args, arrivals.own_start + own_slot, own_slot >= 0, own_weight);

        LaneRows ranks{nullptr, 1.0f, __ballot_sync(kFullMask, slot >= 0 && lane != rt.domain.rank)};
        if (ranks.mask >> lane & 1) {
            const int* flag = arrived_flag(rt, args.staging, epoch, rt.domain.rank, lane, slot, piece);
            wait_row(rt, flag, epoch, kCombineRows, lane);
            ranks.row = staged_row(rt, args.staging, epoch, rt.domain.rank, lane, slot, args.pitch);
        }
        const unsigned before = ranks.mask & ((1u << rt.domain.rank) - 1), after = ranks.mask & ~before;
        __syncwarp();  // all lanes have finished with the previous list, and all flags are set
        int count = 0;
        append(list, count, ranks, before);
        append(list, count, parts, parts.mask);
        append(list, count, ranks, after);
        list.before = __popc(before);
        list.parts = __popc(parts.mask);
        list.arrived = count;
        const int64_t offset = static_cast<int64_t>(token) * args.row_bytes;
        const LaneRows bias{args.bias[lane % kMaxBiases] + offset, 1.0f, (1u << args.num_biases) - 1};
        append(list, count, bias, bias.mask);
        list.count = count;
        __syncwarp();

        sum_rows<T>(list, pieces.span(piece), args.out + offset);
        if (args.carry_weights && piece == 0 && lane < route.num_topk) {  // sent with the first piece
            const auto carried = [&](int i) {
                return reinterpret_cast<const float*>(list.row[i] + args.row_bytes)[lane];
            };
            float total = 0.0f;
            for (int i = 0; i < list.before; ++i) total += carried(i);
            total += own_weight;
            for (int i = list.before + list.parts; i < list.arrived; ++i) total += carried(i);
            args.out_weights[static_cast<int64_t>(token) * route.num_topk + lane] = total;
        }
    }
}

__device__ __noinline__ void poison_outputs(const CombineArgs& args) {
    const int64_t tokens = args.route.num_tokens;
    poison(args.out, tokens * args.row_bytes);
    if (args.carry_weights) poison(args.out_weights, tokens * args.route.num_topk * sizeof(float));
}

// One kernel for each layout, because registers limit the loads in flight.
template <typename T, bool kGrouped>
__global__ void __launch_bounds__(kThreads, 1) combine_kernel(const __grid_constant__ CombineArgs args) {
    __shared__ RowList lists[kWarps];
    const Runtime& rt = args.runtime;
    if (is_stopped(rt.domain) || !is_usable(args.route.rank_prefix)) {
        if (last_block_done<false>(&rt.local->blocks_done)) poison_outputs(args);
        return;
    }
    RowList& list = lists[threadIdx.x / kWarpSize];
    const int epoch = next_epoch(rt.local->data_epoch);
    const Operation operation{Operation::kCombine | (kGrouped ? Operation::kByExpert : 0) |
                                  (args.carry_weights ? Operation::kWithWeights : 0),
                              args.route.plan, args.format_code, args.pitch};
    enter_operation(rt, epoch, operation);
    if (blockIdx.x < args.num_send_blocks) send<T, kGrouped>(args, epoch, list);
    gather<T, kGrouped>(args, epoch, list);
    if (leave_operation(rt, epoch, kCombineStart)) poison_outputs(args);
}

template <typename T>
cudaError_t launch(const CombineArgs& args, int num_blocks, cudaStream_t stream) {
    if (args.route.grouped)
        combine_kernel<T, true><<<num_blocks, kThreads, 0, stream>>>(args);
    else
        combine_kernel<T, false><<<num_blocks, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& args, DataType dtype, int num_blocks, cudaStream_t stream) {
    switch (dtype) {
        case DataType::kFloat32: return launch<float>(args, num_blocks, stream);
        case DataType::kBFloat16: return launch<__nv_bfloat16>(args, num_blocks, stream);
        case DataType::kFloat16: return launch<__half>(args, num_blocks, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace deepep_moe
