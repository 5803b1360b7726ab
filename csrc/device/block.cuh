// Sums over the threads of a block.
#pragma once

#include "device/ptx.cuh"

namespace deepep_moe {

// Exclusive sum over the threads of the block, and the sum of all in `total`. All threads call; `warp_sums` holds one
// int per warp, in shared memory.
__device__ __forceinline__ int block_exclusive_sum(int value, int* warp_sums, int& total) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int warps = (blockDim.x + kWarpSize - 1) / kWarpSize;
    int sum = value;
    for (int d = 1; d < kWarpSize; d *= 2) {
        const int other = __shfl_up_sync(kFullMask, sum, d);
        if (lane >= d) sum += other;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = sum;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < warps; ++w) {
        if (w == warp) before = total;
        total += warp_sums[w];
    }
    __syncthreads();
    return before + sum - value;
}

}  // namespace deepep_moe
