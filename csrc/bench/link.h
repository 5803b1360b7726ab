// What the benchmark measures the link with.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "runtime/domain.h"

namespace deepep_moe {

struct FillPeersArgs {
    int4* target[kMaxRanks];  // in memory of peers, [num_vectors] each
    int num_targets;
    int64_t num_vectors;
};

cudaError_t launch_fill_peers(const FillPeersArgs& args, int num_blocks, cudaStream_t stream);

}  // namespace deepep_moe
