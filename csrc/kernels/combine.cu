// Combine: each rank sums a token's rows and sends one row home, where the ranks' rows are summed.
//
//   send      a warp per received row of a peer: sum its expert rows (expert layout) or take the row itself (rank
//             layout), store into the staging of the token's home, raise the flag
//   gather    a warp per own token: once the flags of its ranks are up, sum their rows in rank order; the rows of
//             this rank are summed on the spot and never staged
//
// Sums are fp32 in a fixed order; what crosses between ranks is rounded to the row's type, also where "between"
// is the same rank, so that a result does not depend on where its experts live.
#include "device/flags.cuh"
#include "device/staging.cuh"
#include "device/sum.cuh"

namespace deepep_moe {

namespace {

#ifndef CTHREADS
#define CTHREADS 768
#endif
constexpr int kThreads = CTHREADS;

// How the loads that a lane keeps in flight are spread: over vectors of one row and over rows. Expert layout sums
// several rows per token, rank layout one per rank.
template <bool kGrouped>
struct Shape {
    static constexpr int kVectors = kGrouped ? 2 : 4;
    static constexpr int kRows = kGrouped ? 4 : 2;
};

// Rows to sum; lane k knows the k-th, if its bit is in the mask.
struct Sources {
    const char* row = nullptr;
    float factor = 1.0f;
    unsigned mask = 0;
};

// Add the vectors number `base + u * 32` of all rows in `mask`, in the order of lanes.
template <typename T, int kVectors, int kRows>
__device__ __forceinline__ void add_rows(Vector<T> (&total)[kVectors], const Sources& from, unsigned mask, int base,
                                         int vectors) {
    while (mask) {
        int4 v[kRows][kVectors];
        float factor[kRows];
        const int rows = min(kRows, __popc(mask));
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (r >= rows) continue;
            const int k = __ffs(mask) - 1;
            mask &= mask - 1;
            factor[r] = __shfl_sync(kFullMask, from.factor, k);
            const int4* row = reinterpret_cast<const int4*>(
                __shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(from.row), k));
#pragma unroll
            for (int u = 0; u < kVectors; ++u)
                if (base + u * kWarpSize < vectors) v[r][u] = load_streaming(row + base + u * kWarpSize);
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            if (r >= rows) continue;
#pragma unroll
            for (int u = 0; u < kVectors; ++u)
                if (base + u * kWarpSize < vectors) total[u].add_scaled(v[r][u], factor[r]);
        }
    }
}

// The rows on this rank that make up received row n, and the weight of route `lane`. Nothing where n is out of range:
// rows that did not fit were not kept (the host raises), but their home still waits for them.
template <bool kGrouped>
__device__ __forceinline__ Sources parts_of(const CombineArgs& args, int n, bool exists, float& weight) {
    const int lane = threadIdx.x % kWarpSize, topk = args.route.num_topk;
    Sources parts;
    weight = 0.0f;
    int64_t row = -1;
    if (exists && n < args.route.max_recv) {
        if (kGrouped) {
            if (lane < topk) row = args.route.recv_rows[static_cast<int64_t>(n) * topk + lane];
            if (row >= 0 && args.weights) weight = args.weights[row];
            if (args.apply_weights) parts.factor = weight;
        } else {
            if (lane == 0) row = n;
            if (lane < topk && args.weights) weight = args.weights[static_cast<int64_t>(n) * topk + lane];
        }
    }
    parts.row = args.x + row * args.row_bytes;
    parts.mask = __ballot_sync(kFullMask, row >= 0);
    return parts;
}

template <typename T, bool kGrouped>
__device__ __forceinline__ void send(const CombineArgs& args, int epoch) {
    constexpr int kVectors = Shape<kGrouped>::kVectors, kRows = Shape<kGrouped>::kRows;
    const Runtime& rt = args.runtime;
    const int lane = threadIdx.x % kWarpSize, vectors = args.row_bytes / static_cast<int>(sizeof(int4));
    const int warp = blockIdx.x * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
    const int warps = args.num_send_blocks * (kThreads / kWarpSize);
    const Received received(rt, args.route.rank_prefix);
    for (int item = warp; item < received.items(rt); item += warps) {
        const Received::Row row = received.at(rt, item);
        if (row.index < 0) continue;
        float weight;
        const Sources parts = parts_of<kGrouped>(args, row.index, true, weight);
        char* staged = staged_row(rt, args.staging, epoch, row.source, rt.rank, row.slot, args.pitch);
        for (int base = lane; base - lane < vectors; base += kWarpSize * kVectors) {
            Vector<T> total[kVectors];
#pragma unroll
            for (int u = 0; u < kVectors; ++u) total[u].clear();
            add_rows<T, kVectors, kRows>(total, parts, parts.mask, base, vectors);
#pragma unroll
            for (int u = 0; u < kVectors; ++u)
                if (base + u * kWarpSize < vectors)
                    store_streaming(reinterpret_cast<int4*>(staged) + base + u * kWarpSize, total[u].pack());
        }
        if (args.carry_weights && lane < args.route.num_topk)
            reinterpret_cast<float*>(staged + args.row_bytes)[lane] = weight;
        __syncwarp();  // the whole row is written before lane 0 says so
        if (lane == 0)
            store_release_system(arrived_flag(rt, args.staging, epoch, row.source, rt.rank, row.slot), epoch);
    }
}

// The weight of route `lane` beside the row from `rank`.
__device__ __forceinline__ float carried_weight(const CombineArgs& args, const Sources& ranks, int rank) {
    const int lane = threadIdx.x % kWarpSize;
    const char* row = reinterpret_cast<const char*>(
        __shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(ranks.row), rank));
    return lane < args.route.num_topk ? reinterpret_cast<const float*>(row + args.row_bytes)[lane] : 0.0f;
}

template <typename T, bool kGrouped>
__device__ __forceinline__ void gather(const CombineArgs& args, int epoch) {
    constexpr int kVectors = Shape<kGrouped>::kVectors, kRows = Shape<kGrouped>::kRows;
    const Runtime& rt = args.runtime;
    const Route& route = args.route;
    const int lane = threadIdx.x % kWarpSize, vectors = args.row_bytes / static_cast<int>(sizeof(int4));
    const Received received(rt, route.rank_prefix);

    WorkQueue queue(&rt.local->next_item);
    for (int token = queue.take(); token < route.num_tokens; token = queue.take()) {
        int slot = -1;  // of the token at rank `lane`
        if (lane < rt.num_ranks) slot = route.send_slot[static_cast<int64_t>(token) * rt.num_ranks + lane];
        const int own_slot = __shfl_sync(kFullMask, slot, rt.rank);
        float own_weight;
        const Sources parts = parts_of<kGrouped>(args, received.own_start + own_slot, own_slot >= 0, own_weight);

        Sources ranks;  // the row from rank `lane`; in rank layout this rank's row is one of them
        ranks.mask = __ballot_sync(kFullMask, slot >= 0);
        if (slot >= 0 && lane != rt.rank) {
            wait_flag(rt, arrived_flag(rt, args.staging, epoch, rt.rank, lane, slot), epoch, kCombineRows, lane);
            ranks.row = staged_row(rt, args.staging, epoch, rt.rank, lane, slot, args.pitch);
        }
        __syncwarp();
        const unsigned before = ranks.mask & ((1u << rt.rank) - 1);
        const unsigned after = ranks.mask & ~before & ~(1u << rt.rank);
        if (!kGrouped) {
            const char* own = reinterpret_cast<const char*>(
                __shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(parts.row), 0));
            if (lane == rt.rank) ranks.row = own;
            if (parts.mask == 0) ranks.mask &= ~(1u << rt.rank);
        }

        const int64_t offset = static_cast<int64_t>(token) * args.row_bytes;
        for (int base = lane; base - lane < vectors; base += kWarpSize * kVectors) {
            Vector<T> total[kVectors];
#pragma unroll
            for (int u = 0; u < kVectors; ++u) total[u].clear();
            if (kGrouped) {
                int4 own[kVectors];
                add_rows<T, kVectors, kRows>(total, parts, parts.mask, base, vectors);
#pragma unroll
                for (int u = 0; u < kVectors; ++u) {
                    own[u] = total[u].pack();
                    total[u].clear();
                }
                add_rows<T, kVectors, kRows>(total, ranks, before, base, vectors);
#pragma unroll
                for (int u = 0; u < kVectors; ++u) total[u].add(own[u]);
                add_rows<T, kVectors, kRows>(total, ranks, after, base, vectors);
            } else {
                add_rows<T, kVectors, kRows>(total, ranks, ranks.mask, base, vectors);
            }
#pragma unroll
            for (int u = 0; u < kVectors; ++u) {
                const int i = base + u * kWarpSize;
                if (i >= vectors) continue;
#pragma unroll
                for (int b = 0; b < 2; ++b)
                    if (args.bias[b])
                        total[u].add(load_streaming(reinterpret_cast<const int4*>(args.bias[b] + offset) + i));
                store_streaming(reinterpret_cast<int4*>(args.out + offset) + i, total[u].pack());
            }
        }
        if (args.carry_weights) {
            float total = 0.0f;
            for (unsigned m = before; m; m &= m - 1) total += carried_weight(args, ranks, __ffs(m) - 1);
            total += own_weight;
            for (unsigned m = after; m; m &= m - 1) total += carried_weight(args, ranks, __ffs(m) - 1);
            if (lane < route.num_topk) args.out_weights[static_cast<int64_t>(token) * route.num_topk + lane] = total;
        }
    }
}

template <typename T, bool kGrouped>
__global__ void __launch_bounds__(kThreads, 1) combine_kernel(const __grid_constant__ CombineArgs args) {
    const Runtime& rt = args.runtime;
    if (rt.local->failed) return;
    const int epoch = rt.local->data_epoch + 1;
    const Operation operation{kCombineStart | kGrouped << 8, args.pitch};
    enter_operation(rt, epoch, operation);
    if (blockIdx.x < args.num_send_blocks) send<T, kGrouped>(args, epoch);
    gather<T, kGrouped>(args, epoch);
    await_peers(rt, epoch, operation, kCombineStart);
    if (last_block_done(rt.local)) {
        rt.local->next_item = 0;
        rt.local->data_epoch = epoch;
    }
}

template <typename T>
void launch(const CombineArgs& args, int num_blocks, cudaStream_t stream) {
    if (args.route.grouped)
        combine_kernel<T, true><<<num_blocks, kThreads, 0, stream>>>(args);
    else
        combine_kernel<T, false><<<num_blocks, kThreads, 0, stream>>>(args);
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& args, DataType dtype, int num_blocks, cudaStream_t stream) {
    switch (dtype) {
        case DataType::kFloat32: launch<float>(args, num_blocks, stream); break;
        case DataType::kBFloat16: launch<__nv_bfloat16>(args, num_blocks, stream); break;
        case DataType::kFloat16: launch<__half>(args, num_blocks, stream); break;
    }
    return cudaGetLastError();
}

}  // namespace deepep_moe
