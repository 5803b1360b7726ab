// What kernels of one rank alone take: no peer has a part in them.
//
// T tokens, K top-k, E experts, M expert rows. All arrays are row-major and contiguous.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace deepep_moe {

enum class DataType : int { kFloat32, kBFloat16, kFloat16 };

// Rows times weights, and the gradients of that.
struct WeighArgs {
    const char* x;         // [M] rows
    const char* rows;      // [M] rows, or null
    const float* weights;  // [M]
    const int* row_recv;   // [M], negative: padding, where out and sums are 0; null: there is none
    char* out;             // [M] rows x * weights, or null; may be x
    float* sums;           // [M] sums of x * rows over the row; unused without rows
    int num_rows, row_bytes;
};

// From a routing map to indices: ascending, -1 where a row has fewer routes. A row with more than K gets the index
// num_experts + their number, which a plan refuses.
struct RoutesArgs {
    const bool* routing_map;  // [T, E]; unused by the backward
    void* probs;              // [T, E]: read; by the backward written, the gradient
    int num_tokens, num_experts, num_topk;
    int64_t* topk_idx;  // [T, K]: written; by the backward read
    float* weights;     // [T, K]: written, 0 where there is no route; by the backward read, their gradient
};

// Launches; `stream` orders them. Each is defined beside its kernel and returns the launch's status.
cudaError_t launch_routes(const RoutesArgs& args, DataType probs, bool backward, cudaStream_t stream);
cudaError_t launch_weigh(const WeighArgs& args, DataType dtype, cudaStream_t stream);

}  // namespace deepep_moe
