// Which ranks a token goes to, as one bit per rank.
#pragma once

#include "kernels/args.h"

namespace deepep_moe {

// Fill member[0..count) for the tokens first..first+count. Call with all threads of the block; ends in a barrier.
__device__ __forceinline__ void read_membership(const int64_t* topk_idx, const bool* given, int first, int count,
                                                int num_topk, int num_experts, int num_ranks, unsigned* member) {
    const int experts_per_rank = num_experts / num_ranks;
    for (int t = threadIdx.x; t < count; t += blockDim.x) {
        unsigned bits = 0;
        if (given) {
            for (int r = 0; r < num_ranks; ++r)
                bits |= static_cast<unsigned>(given[static_cast<int64_t>(first + t) * num_ranks + r]) << r;
        } else {
            for (int k = 0; k < num_topk; ++k) {
                const int64_t e = topk_idx[static_cast<int64_t>(first + t) * num_topk + k];
                if (e >= 0 && e < num_experts) bits |= 1u << (static_cast<int>(e) / experts_per_rank);
            }
        }
        member[t] = bits;
    }
    __syncthreads();
}

}  // namespace deepep_moe
