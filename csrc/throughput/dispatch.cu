// Dispatch: every token crosses the link once per destination rank, and is copied to its final rows there.
//
//   send      a warp per token: load the row once, store it into the staging of each destination, set its flag
//   receive   a warp per row: own rows from x, peers' rows from staging once their flag is set; load once, store to the
//             row's place (rank layout) or to the row of each of its experts (expert layout)
//
// Between load and store, BF16 may be converted to FP8 (send, own rows) and back to BF16 (own rows, peers' rows).
//
// The first blocks send, then receive too. The others receive from the start, own rows first, so that link and memory
// are busy at the same time. Senders never wait, so every wait of a receiver ends.
#include "device/rows.cuh"
#include "throughput/operation.cuh"
#include "throughput/staging.cuh"

namespace deepep_moe {

namespace {

constexpr int kThreads = 1024;
constexpr int kTokensPerFence = 2;  // a fence waits for the link, so this many tokens share one

// Whether BF16 rows are converted to FP8 before they are sent, and back to BF16 by the receiver.
template <Format kFormat>
constexpr bool kQuantises = kFormat != Format::kAsGiven;
template <Format kFormat>
constexpr bool kDequantises = kFormat == Format::kThroughFp8;

// Copy a token of this rank: in the format that is sent if kCrosses, else in the format of the output.
template <Format kFormat, bool kCrosses>
__device__ __forceinline__ void copy_token(const DispatchArgs& args, int token, const Destination& to, unsigned mask) {
    const char* row = args.x + token * args.x_stride;
    if (kQuantises<kFormat>) {
        quantise_row<kDequantises<kFormat> && !kCrosses>(row, to, mask, args.row_bytes);
    } else {
        const int* scales = args.scales.data ? args.scales.data + token * args.scales.row_stride : nullptr;
        copy_row({row, scales, args.scales.channel_stride}, to, mask, args.row_bytes, args.num_scales);
    }
}

// Store one token into the staging of each destination rank. Returns the flag that this lane must set, if any.
template <Format kFormat>
__device__ __forceinline__ int* send_token(const DispatchArgs& args, int epoch, int token) {
    const Runtime& rt = args.runtime;
    const int lane = threadIdx.x % kWarpSize, topk = args.route.num_topk;
    int slot = -1;  // of the token at rank `lane`
    if (token < args.route.num_tokens && lane < rt.domain.num_ranks && lane != rt.domain.rank)
        slot = args.route.send_slot[static_cast<int64_t>(token) * rt.domain.num_ranks + lane];
    const unsigned mask = __ballot_sync(kFullMask, slot >= 0);
    if (mask == 0) return nullptr;

    Destination to{nullptr, nullptr, 1};
    if (slot >= 0) {
        to.row = staged_row(rt, args.staging, epoch, lane, rt.domain.rank, slot, args.pitch);
        to.scales = reinterpret_cast<int*>(to.row + args.row_bytes);
    }
    copy_token<kFormat, true>(args, token, to, mask);
    if (args.with_weights) {
        const float weight = lane < topk ? args.weights[token * args.weights_stride + lane] : 0.0f;
        for (unsigned m = mask; m; m &= m - 1) {
            int* scales = of_lane(to.scales, __ffs(m) - 1);
            if (lane < topk) reinterpret_cast<float*>(scales + args.num_scales)[lane] = weight;
        }
    }
    return slot >= 0 ? arrived_flag(rt, args.staging, epoch, lane, rt.domain.rank, slot) : nullptr;
}

template <Format kFormat>
__device__ __forceinline__ void send(const DispatchArgs& args, int epoch) {
    const int warp = blockIdx.x * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    const int warps = args.num_send_blocks * (kThreads / kWarpSize);
    for (int token = warp; token < args.route.num_tokens; token += warps * kTokensPerFence) {
        int* flags[kTokensPerFence];
        bool any = false;
#pragma unroll
        for (int i = 0; i < kTokensPerFence; ++i) {
            flags[i] = send_token<kFormat>(args, epoch, token + i * warps);
            any |= flags[i] != nullptr;
        }
        __syncwarp();  // all lanes have written their part of the rows before flags are set
        if (any) __threadfence_system();
#pragma unroll
        for (int i = 0; i < kTokensPerFence; ++i)
            if (flags[i]) store_relaxed_system(flags[i], epoch);
    }
}

template <Format kFormat, bool kGrouped>
__device__ __forceinline__ void receive(const DispatchArgs& args, int epoch) {
    const Runtime& rt = args.runtime;
    const Route& route = args.route;
    const int lane = threadIdx.x % kWarpSize, topk = route.num_topk;
    const PeerRows arrivals(rt, route.rank_prefix);
    const int peer_items = arrivals.items(rt);
    const int out_row_bytes = kDequantises<kFormat> ? 2 * args.row_bytes : args.row_bytes;
    const int out_scales = kDequantises<kFormat> ? 0 : args.num_scales;
    const int padding_items = kGrouped ? (route.max_rows + kWarpSize - 1) / kWarpSize : 0;

    WorkQueue queue(&rt.local->next_item);
    for (int item = queue.take(); item < arrivals.own_count + peer_items + padding_items; item = queue.take()) {
        if (item >= arrivals.own_count + peer_items) {  // an item of 32 expert rows: zero the padding rows
            const int first = (item - arrivals.own_count - peer_items) * kWarpSize;
            const bool padding = first + lane < route.max_rows && route.row_recv[first + lane] < 0;
            if (padding && args.out_weights) args.out_weights[first + lane] = 0.0f;
            for (unsigned m = __ballot_sync(kFullMask, padding); m; m &= m - 1) {
                const int64_t row = first + __ffs(m) - 1;
                int4* to = reinterpret_cast<int4*>(args.out + row * out_row_bytes);
                for (int i = lane; i < out_row_bytes / static_cast<int>(sizeof(int4)); i += kWarpSize)
                    store_streaming(to + i, make_int4(0, 0, 0, 0));
                for (int c = lane; c < out_scales; c += kWarpSize)
                    args.out_scales.data[row * args.out_scales.row_stride + c * args.out_scales.channel_stride] = 0;
            }
            continue;
        }

        const bool own = item < arrivals.own_count;
        const typename PeerRows::Row row = own ? typename PeerRows::Row{rt.domain.rank, 0, arrivals.own_start + item}
                                               : arrivals.at(rt, item - arrivals.own_count);
        const int n = row.index;
        if (n < 0 || n >= route.max_recv) continue;

        int place = -1;  // of this lane's copy
        if (kGrouped) {
            if (lane < topk) place = route.expert_row(n, lane);
        } else if (lane == 0) {
            place = n;
        }
        const unsigned mask = __ballot_sync(kFullMask, place >= 0);
        const Destination to{args.out + static_cast<int64_t>(place) * out_row_bytes,
                             args.out_scales.data + static_cast<int64_t>(place) * args.out_scales.row_stride,
                             args.out_scales.channel_stride};
        const float* weights;
        if (own) {
            const int token = route.source_token(n);
            copy_token<kFormat, false>(args, token, to, mask);
            weights = args.weights + token * args.weights_stride;
        } else {
            if (lane == 0)
                wait_row(rt, arrived_flag(rt, args.staging, epoch, rt.domain.rank, row.source, row.slot), epoch,
                         kDispatchRows, row.source);
            __syncwarp();
            const char* staged = staged_row(rt, args.staging, epoch, rt.domain.rank, row.source, row.slot, args.pitch);
            const int* scales = reinterpret_cast<const int*>(staged + args.row_bytes);
            if (kDequantises<kFormat>)
                dequantise_row({staged, scales, 1}, to, mask, args.row_bytes);
            else
                copy_row({staged, scales, 1}, to, mask, args.row_bytes, args.num_scales);
            weights = reinterpret_cast<const float*>(scales + args.num_scales);
        }
        if (args.out_weights && lane < topk) {
            if (!kGrouped) {
                const bool owned = route.local_expert(n, lane) >= 0;
                args.out_weights[static_cast<int64_t>(n) * topk + lane] = owned ? weights[lane] : 0.0f;
            } else if (place >= 0) {
                args.out_weights[place] = weights[lane];
            }
        }
    }
}

template <Format kFormat>
__device__ __noinline__ void poison_outputs(const DispatchArgs& args) {
    const int64_t rows = args.route.num_out();
    poison(args.out, rows * (kDequantises<kFormat> ? 2 : 1) * args.row_bytes);
    if (args.out_scales.data)  // up to the last element
        poison(args.out_scales.data, rows == 0
                                         ? 0
                                         : sizeof(int) * ((rows - 1) * args.out_scales.row_stride +
                                                          (args.num_scales - 1) * args.out_scales.channel_stride + 1));
    if (args.out_weights)
        poison(args.out_weights, sizeof(float) * rows * (args.route.grouped ? 1 : args.route.num_topk));
}

// One kernel for each format and layout, because registers limit the loads in flight.
template <Format kFormat, bool kGrouped>
__global__ void __launch_bounds__(kThreads, 1) dispatch_kernel(const __grid_constant__ DispatchArgs args) {
    const Runtime& rt = args.runtime;
    if (is_stopped(rt.domain) || !is_usable(args.route.rank_prefix)) {
        if (last_block_done<false>(&rt.local->blocks_done)) poison_outputs<kFormat>(args);
        return;
    }
    const int epoch = next_epoch(rt.local->data_epoch);
    const Operation operation{Operation::kDispatch | (kGrouped ? Operation::kByExpert : 0) |
                                  (args.with_weights ? Operation::kWithWeights : 0),
                              args.route.plan, args.format_code, args.pitch};
    enter_operation(rt, epoch, operation);
    if (blockIdx.x < args.num_send_blocks) send<kFormat>(args, epoch);
    receive<kFormat, kGrouped>(args, epoch);
    if (leave_operation(rt, epoch, kDispatchStart)) poison_outputs<kFormat>(args);
}

template <Format kFormat>
cudaError_t launch(const DispatchArgs& args, int num_blocks, cudaStream_t stream) {
    if (args.route.grouped)
        dispatch_kernel<kFormat, true><<<num_blocks, kThreads, 0, stream>>>(args);
    else
        dispatch_kernel<kFormat, false><<<num_blocks, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_dispatch(const DispatchArgs& args, Format format, int num_blocks, cudaStream_t stream) {
    switch (format) {
        case Format::kAsGiven: return launch<Format::kAsGiven>(args, num_blocks, stream);
        case Format::kToFp8: return launch<Format::kToFp8>(args, num_blocks, stream);
        case Format::kThroughFp8: return launch<Format::kThroughFp8>(args, num_blocks, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace deepep_moe
