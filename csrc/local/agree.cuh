// Whether the ranks' headers of one call agree, and what outputs hold where they do not.
#pragma once

#include "device/ptx.cuh"
#include "local/args.h"

namespace deepep_moe {

// All threads of the block call.
__device__ __forceinline__ bool headers_differ(const Headers& headers) {
    if (headers.data == nullptr) return false;
    bool differs = false;
    for (int i = threadIdx.x; i < headers.num_ranks * Messages::kAgreedWords; i += blockDim.x)
        differs |= headers.data[i] != headers.data[i % Messages::kAgreedWords];
    return __syncthreads_or(differs);
}

// Set `words` words to all ones, NaN in every dtype. The threads of all blocks share the work.
__device__ __forceinline__ void set_to_nan(void* data, int64_t words) {
    const int64_t threads = static_cast<int64_t>(gridDim.x) * gridDim.y * blockDim.x;
    int64_t i = (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i < words; i += threads) static_cast<int*>(data)[i] = -1;
}

}  // namespace deepep_moe
