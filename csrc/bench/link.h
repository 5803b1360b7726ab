// The kernel with which the benchmarks measure link bandwidth.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "runtime/domain.h"

namespace deepep_moe {

struct FillPeersArgs {
    int4* target[kMaxRanks];  // memory of peers, [num_vectors] each
    int num_targets;
    int64_t num_vectors;
};

cudaError_t launch_fill_peers(const FillPeersArgs& args, int num_blocks, cudaStream_t stream);

}  // namespace deepep_moe
