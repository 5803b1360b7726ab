// Addresses of rows in the staging memory of their destination.
#pragma once

#include "device/ptx.cuh"
#include "throughput/args.h"

namespace deepep_moe {

__device__ __forceinline__ char* staged_row(const Runtime& rt, const Staging& staging, int epoch, int owner, int source,
                                            int slot, int pitch) {
    // A rank's own rows are not staged, so there are regions for the other R - 1 sources.
    int region = source - owner - 1;
    if (region < 0) region += rt.domain.num_ranks;
    return staging.base[owner] + staging.data_offset + (epoch & 1) * staging.data_bytes +
           (static_cast<int64_t>(region) * staging.max_tokens + slot) * pitch;
}

__device__ __forceinline__ int* arrived_flag(const Runtime& rt, const Staging& staging, int epoch, int owner,
                                             int source, int slot, int piece = 0) {
    const int64_t row = (static_cast<int64_t>(epoch & 1) * rt.domain.num_ranks + source) * staging.max_tokens + slot;
    return reinterpret_cast<int*>(staging.base[owner]) + row * kFlagsPerRow + piece;
}

// The rows that this rank receives, by source. Lane r of a warp holds the values of source r.
struct PeerRows {
    int start, count;  // first received row and number of rows of this lane's source
    int most;          // largest number of rows of a peer
    int own_start, own_count;

    __device__ __forceinline__ PeerRows(const Runtime& rt, const int64_t* rank_prefix) {
        const int lane = threadIdx.x % kWarpSize;
        start = count = 0;
        if (lane < rt.domain.num_ranks) {
            start = lane > 0 ? static_cast<int>(rank_prefix[(lane - 1) * rt.domain.num_ranks + rt.domain.rank]) : 0;
            count = static_cast<int>(rank_prefix[lane * rt.domain.num_ranks + rt.domain.rank]) - start;
        }
        own_start = __shfl_sync(kFullMask, start, rt.domain.rank);
        own_count = __shfl_sync(kFullMask, count, rt.domain.rank);
        most = lane == rt.domain.rank ? 0 : count;
#pragma unroll
        for (int d = kWarpSize / 2; d > 0; d /= 2) most = max(most, __shfl_xor_sync(kFullMask, most, d));
    }

    // Number of work items: they enumerate the rows of all peers in round-robin order. Some items have no row.
    __device__ __forceinline__ int items(const Runtime& rt) const { return most * (rt.domain.num_ranks - 1); }

    struct Row {
        int source, slot, index;  // index < 0: no row
    };
    __device__ __forceinline__ Row at(const Runtime& rt, int item) const {
        const int peers = rt.domain.num_ranks - 1;
        Row row;
        row.slot = item / peers;
        row.source = (rt.domain.rank + 1 + item % peers) % rt.domain.num_ranks;
        const int first = __shfl_sync(kFullMask, start, row.source);
        const bool exists = row.slot < __shfl_sync(kFullMask, count, row.source);
        row.index = exists ? first + row.slot : -1;
        return row;
    }
};

// Warps take work items from a counter. A warp fetches its next item while it works on the current one.
struct WorkQueue {
    int* counter;
    int next;

    __device__ __forceinline__ explicit WorkQueue(int* counter) : counter(counter) { fetch(); }
    __device__ __forceinline__ void fetch() {
        if (threadIdx.x % kWarpSize == 0) next = atomicAdd(counter, 1);
    }
    __device__ __forceinline__ int take() {
        const int item = __shfl_sync(kFullMask, next, 0);
        fetch();
        return item;
    }
};

}  // namespace deepep_moe
