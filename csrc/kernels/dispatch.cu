// Dispatch: every token crosses the link once per rank that wants it and lands in its final rows.
//
//   send      a warp per token: load the row once, store it into the staging of each destination, raise the flag
//   receive   a warp per row: own rows straight from x, peers' rows from staging once their flag is up;
//             load once, store to the row's place (rank layout) or to each of its experts' rows (expert layout)
//
// The first blocks send and then help to receive; the others receive from the start, own rows first, so the link
// and the memory work at the same time. Senders never wait, hence nobody waits for something that cannot come.
#include "device/flags.cuh"
#include "device/fp8.cuh"
#include "device/staging.cuh"

namespace deepep_moe {

namespace {

constexpr int kThreads = 1024;
constexpr int kVectors = 4;         // 16-byte loads that a lane keeps in flight
constexpr int kTokensPerFence = 2;  // a fence waits for the link; one serves the flags of this many tokens

struct Source {
    const char* row;
    const int* scales;  // of this row
    int64_t channel_stride;
};

// Where a lane's copy of the row goes; lanes outside the mask have none.
struct Destination {
    char* row;
    int* scales;
    int64_t channel_stride;
};

// Copy one row, and its scales, to the destinations of all lanes in `mask`. The whole warp calls.
__device__ __forceinline__ void copy_row(const Source& from, const Destination& to, unsigned mask, int row_bytes,
                                         int num_scales) {
    const int lane = threadIdx.x % kWarpSize, vectors = row_bytes / static_cast<int>(sizeof(int4));
    const int4* source = reinterpret_cast<const int4*>(from.row);
    for (int base = lane; base - lane < vectors; base += kWarpSize * kVectors) {
        int4 v[kVectors];
#pragma unroll
        for (int u = 0; u < kVectors; ++u)
            if (base + u * kWarpSize < vectors) v[u] = load_streaming(source + base + u * kWarpSize);
        for (unsigned m = mask; m; m &= m - 1) {
            char* row = reinterpret_cast<char*>(
                __shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(to.row), __ffs(m) - 1));
#pragma unroll
            for (int u = 0; u < kVectors; ++u)
                if (base + u * kWarpSize < vectors)
                    store_streaming(reinterpret_cast<int4*>(row) + base + u * kWarpSize, v[u]);
        }
    }
    for (int c = lane; c - lane < num_scales; c += kWarpSize) {
        const int scale = c < num_scales ? from.scales[c * from.channel_stride] : 0;
        for (unsigned m = mask; m; m &= m - 1) {
            int* scales = reinterpret_cast<int*>(
                __shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(to.scales), __ffs(m) - 1));
            if (c < num_scales) scales[c * to.channel_stride] = scale;
        }
    }
}

// The same for a BF16 row that leaves as FP8 of `row_bytes` channels.
__device__ __forceinline__ void quantise_row(const char* from, const Destination& to, unsigned mask, int row_bytes) {
    constexpr int kAtOnce = 4;
    const int lane = threadIdx.x % kWarpSize, vectors = row_bytes / 8;
    const int4* source = reinterpret_cast<const int4*>(from);
    for (int base = lane; base - lane < vectors; base += kWarpSize * kAtOnce) {
        int4 v[kAtOnce];
        int2 bytes[kAtOnce];
        float scale[kAtOnce];
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) {
            const int i = base + u * kWarpSize;
            v[u] = i < vectors ? load_streaming(source + i) : make_int4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < kAtOnce; ++u) bytes[u] = quantise_block(v[u], scale[u]);
        for (unsigned m = mask; m; m &= m - 1) {
            const int k = __ffs(m) - 1;
            char* row =
                reinterpret_cast<char*>(__shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(to.row), k));
            int* scales =
                reinterpret_cast<int*>(__shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(to.scales), k));
#pragma unroll
            for (int u = 0; u < kAtOnce; ++u) {
                const int i = base + u * kWarpSize;
                if (i >= vectors) continue;
                store_streaming(reinterpret_cast<int2*>(row) + i, bytes[u]);
                if (i % 16 == 0) scales[i / 16 * to.channel_stride] = __float_as_int(scale[u]);
            }
        }
    }
}

template <bool kQuantise>
__device__ __forceinline__ Source token_source(const DispatchArgs& args, int token) {
    const int64_t row_bytes = kQuantise ? 2 * args.row_bytes : args.row_bytes;
    return {args.x + token * row_bytes, args.scales.data ? args.scales.data + token * args.scales.row_stride : nullptr,
            args.scales.channel_stride};
}

template <bool kQuantise>
__device__ __forceinline__ void copy_token(const DispatchArgs& args, int token, const Destination& to, unsigned mask) {
    const Source from = token_source<kQuantise>(args, token);
    if (kQuantise)
        quantise_row(from.row, to, mask, args.row_bytes);
    else
        copy_row(from, to, mask, args.row_bytes, args.scales.count);
}

// Store one token into the staging of each rank that wants it. Returns the flag that this lane has to raise, if any.
template <bool kQuantise>
__device__ __forceinline__ int* send_token(const DispatchArgs& args, int epoch, int token) {
    const Runtime& rt = args.runtime;
    const int lane = threadIdx.x % kWarpSize, topk = args.route.num_topk;
    int slot = -1;  // of the token at rank `lane`
    if (token < args.route.num_tokens && lane < rt.num_ranks && lane != rt.rank)
        slot = args.route.send_slot[static_cast<int64_t>(token) * rt.num_ranks + lane];
    const unsigned mask = __ballot_sync(kFullMask, slot >= 0);
    if (mask == 0) return nullptr;

    Destination to{nullptr, nullptr, 1};
    if (slot >= 0) {
        to.row = staged_row(rt, args.staging, epoch, lane, rt.rank, slot, args.pitch);
        to.scales = reinterpret_cast<int*>(to.row + args.row_bytes);
    }
    copy_token<kQuantise>(args, token, to, mask);
    if (args.weights) {
        const float weight = lane < topk ? args.weights[static_cast<int64_t>(token) * topk + lane] : 0.0f;
        for (unsigned m = mask; m; m &= m - 1) {
            int* scales = reinterpret_cast<int*>(
                __shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(to.scales), __ffs(m) - 1));
            if (lane < topk) reinterpret_cast<float*>(scales + args.out_scales.count)[lane] = weight;
        }
    }
    return slot >= 0 ? arrived_flag(rt, args.staging, epoch, lane, rt.rank, slot) : nullptr;
}

template <bool kQuantise>
__device__ __forceinline__ void send(const DispatchArgs& args, int epoch) {
    const int warp = blockIdx.x * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    const int warps = args.num_send_blocks * (kThreads / kWarpSize);
    for (int token = warp; token < args.route.num_tokens; token += warps * kTokensPerFence) {
        int* flags[kTokensPerFence];
        bool any = false;
#pragma unroll
        for (int i = 0; i < kTokensPerFence; ++i) {
            flags[i] = send_token<kQuantise>(args, epoch, token + i * warps);
            any |= flags[i] != nullptr;
        }
        __syncwarp();  // whole rows are written before any lane says so
        if (any) __threadfence_system();
#pragma unroll
        for (int i = 0; i < kTokensPerFence; ++i)
            if (flags[i]) store_relaxed_system(flags[i], epoch);
    }
}

template <bool kQuantise>
__device__ __forceinline__ void receive(const DispatchArgs& args, int epoch) {
    const Runtime& rt = args.runtime;
    const Route& route = args.route;
    const int lane = threadIdx.x % kWarpSize, topk = route.num_topk;
    const Received received(rt, route.rank_prefix);
    const int peer_items = received.items(rt);
    const int padding_items = route.grouped ? (route.max_rows + kWarpSize - 1) / kWarpSize : 0;

    WorkQueue queue(&rt.local->next_item);
    for (int item = queue.take(); item < received.own_count + peer_items + padding_items; item = queue.take()) {
        if (item >= received.own_count + peer_items) {  // 32 expert rows: zero those that are padding
            const int first = (item - received.own_count - peer_items) * kWarpSize;
            const bool padding = first + lane < route.max_rows && route.row_recv[first + lane] < 0;
            if (padding && args.out_weights) args.out_weights[first + lane] = 0.0f;
            for (unsigned m = __ballot_sync(kFullMask, padding); m; m &= m - 1) {
                const int64_t row = first + __ffs(m) - 1;
                int4* to = reinterpret_cast<int4*>(args.out + row * args.row_bytes);
                for (int i = lane; i < args.row_bytes / 16; i += kWarpSize)
                    store_streaming(to + i, make_int4(0, 0, 0, 0));
                for (int c = lane; c < args.out_scales.count; c += kWarpSize)
                    args.out_scales.data[row * args.out_scales.row_stride + c * args.out_scales.channel_stride] = 0;
            }
            continue;
        }

        const bool own = item < received.own_count;
        const typename Received::Row row = own ? typename Received::Row{rt.rank, 0, received.own_start + item}
                                               : received.at(rt, item - received.own_count);
        const int n = row.index;
        if (n < 0 || n >= route.max_recv) continue;

        int place = -1;  // of this lane's copy
        if (route.grouped) {
            if (lane < topk) place = route.expert_row(n, lane);
        } else if (lane == 0) {
            place = n;
        }
        const unsigned mask = __ballot_sync(kFullMask, place >= 0);
        const Destination to{args.out + static_cast<int64_t>(place) * args.row_bytes,
                             args.out_scales.data + static_cast<int64_t>(place) * args.out_scales.row_stride,
                             args.out_scales.channel_stride};
        const float* weights;
        if (own) {
            const int token = route.source_token(n);
            copy_token<kQuantise>(args, token, to, mask);
            weights = args.weights + static_cast<int64_t>(token) * topk;
        } else {
            if (lane == 0)
                wait_flag(rt, arrived_flag(rt, args.staging, epoch, rt.rank, row.source, row.slot), epoch,
                          kDispatchRows, row.source);
            __syncwarp();
            const char* staged = staged_row(rt, args.staging, epoch, rt.rank, row.source, row.slot, args.pitch);
            const int* scales = reinterpret_cast<const int*>(staged + args.row_bytes);
            copy_row({staged, scales, 1}, to, mask, args.row_bytes, args.out_scales.count);
            weights = reinterpret_cast<const float*>(scales + args.out_scales.count);
        }
        if (args.out_weights && lane < topk) {
            if (!route.grouped) {
                const bool owned = route.local_expert(n, lane) >= 0;
                args.out_weights[static_cast<int64_t>(n) * topk + lane] = owned ? weights[lane] : 0.0f;
            } else if (place >= 0) {
                args.out_weights[place] = weights[lane];
            }
        }
    }
}

template <bool kQuantise>
__global__ void __launch_bounds__(kThreads, 1) dispatch_kernel(const __grid_constant__ DispatchArgs args) {
    const Runtime& rt = args.runtime;
    if (rt.local->failed) return;
    const int epoch = rt.local->data_epoch + 1;
    const Operation operation{kDispatchStart | args.route.grouped << 8, args.pitch};
    enter_operation(rt, epoch, operation);
    if (blockIdx.x < args.num_send_blocks) send<kQuantise>(args, epoch);
    receive<kQuantise>(args, epoch);
    await_peers(rt, epoch, operation, kDispatchStart);
    leave_operation(rt, epoch);
}

}  // namespace

cudaError_t launch_dispatch(const DispatchArgs& args, bool quantise, int num_blocks, cudaStream_t stream) {
    if (quantise)
        dispatch_kernel<true><<<num_blocks, kThreads, 0, stream>>>(args);
    else
        dispatch_kernel<false><<<num_blocks, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
