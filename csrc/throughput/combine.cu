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
#include "device/row_sum.cuh"
#include "throughput/operation.cuh"
#include "throughput/staging.cuh"

namespace deepep_moe {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPieceVectors = 448;  // smallest piece of a row of the expert layout

// The rows that are added to one result, in order: rows of lower ranks, then the rows on this rank (parts), then rows
// of higher ranks, then biases.
struct Parts : RowList<kMaxTopk + kMaxRanks + kMaxBiases> {
    int before, parts, arrived;  // rows of lower ranks; rows on this rank; rows of all ranks
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
__device__ __forceinline__ void send(const CombineArgs& args, int epoch, Parts& list) {
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
__device__ __forceinline__ void gather(const CombineArgs& args, int epoch, Parts& list) {
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
        const int64_t bias_offset = static_cast<int64_t>(token) * args.row_bytes;
        const LaneRows bias{args.bias[lane % kMaxBiases] + bias_offset, 1.0f, (1u << args.num_biases) - 1};
        append(list, count, bias, bias.mask);
        list.count = count;
        __syncwarp();

        sum_rows<T>(list, pieces.span(piece), args.out + token * args.out_stride);
        if (args.carry_weights && piece == 0 && lane < route.num_topk) {  // sent with the first piece
            const auto carried = [&](int i) {
                return reinterpret_cast<const float*>(list.row[i] + args.row_bytes)[lane];
            };
            float total = 0.0f;
            for (int i = 0; i < list.before; ++i) total += carried(i);
            total += own_weight;
            for (int i = list.before + list.parts; i < list.arrived; ++i) total += carried(i);
            args.out_weights[token * args.out_weights_stride + lane] = total;
        }
    }
}

__device__ __noinline__ void poison_outputs(const CombineArgs& args) {
    const int64_t tokens = args.route.num_tokens;
    poison(args.out, tokens * args.out_stride);
    if (args.carry_weights) poison(args.out_weights, tokens * args.route.num_topk * sizeof(float));
}

// One kernel for each layout, because registers limit the loads in flight.
template <typename T, bool kGrouped>
__global__ void __launch_bounds__(kThreads, 1) combine_kernel(const __grid_constant__ CombineArgs args) {
    __shared__ Parts lists[kWarps];
    const Runtime& rt = args.runtime;
    if (is_stopped(rt.domain) || !is_usable(args.route.rank_prefix)) {
        if (last_block_done<false>(&rt.local->blocks_done)) poison_outputs(args);
        return;
    }
    Parts& list = lists[threadIdx.x / kWarpSize];
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
