// Routes: from a map of bool and probabilities, as routers of Megatron-Core give them, to the experts of each token and
// their weights; and back, for the gradient of the probabilities.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/ptx.cuh"
#include "local/args.h"

namespace deepep_moe {

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int token_of_warp() { return (blockIdx.x * kThreads + threadIdx.x) / kWarpSize; }

// A warp per token.
template <typename T>
__global__ void __launch_bounds__(kThreads) routes_kernel(const __grid_constant__ RoutesArgs args) {
    const int lane = threadIdx.x % kWarpSize, token = token_of_warp(), topk = args.num_topk, experts = args.num_experts;
    if (token >= args.num_tokens) return;
    const bool* row = args.routing_map + static_cast<int64_t>(token) * experts;
    const T* probs = static_cast<const T*>(args.probs) + static_cast<int64_t>(token) * experts;
    int64_t* out = args.topk_idx + static_cast<int64_t>(token) * topk;
    float* weights = args.weights + static_cast<int64_t>(token) * topk;
    int found = 0;
    for (int first = 0; first < experts; first += kWarpSize) {
        const int expert = first + lane;
        const bool routed = expert < experts && row[expert];
        const unsigned all = __ballot_sync(kFullMask, routed);
        const int k = found + __popc(all & ((1u << lane) - 1));
        if (routed && k < topk) {
            out[k] = expert;
            weights[k] = static_cast<float>(probs[expert]);
        }
        found += __popc(all);
    }
    __syncwarp();
    if (found > topk && lane == 0) out[0] = experts + found;
    for (int k = found + lane; k < topk; k += kWarpSize) {
        out[k] = -1;
        weights[k] = 0.0f;
    }
}

// A warp per token: the gradient of each expert's probability, 0 where there is no route.
template <typename T>
__global__ void __launch_bounds__(kThreads) routes_backward_kernel(const __grid_constant__ RoutesArgs args) {
    const int lane = threadIdx.x % kWarpSize, token = token_of_warp(), topk = args.num_topk, experts = args.num_experts;
    if (token >= args.num_tokens) return;
    const int64_t* index = args.topk_idx + static_cast<int64_t>(token) * topk;
    const float* grads = args.weights + static_cast<int64_t>(token) * topk;
    T* out = static_cast<T*>(args.probs) + static_cast<int64_t>(token) * experts;
    for (int expert = lane; expert < experts; expert += kWarpSize) {
        float grad = 0.0f;
        for (int k = 0; k < topk; ++k)
            if (index[k] == expert) grad = grads[k];
        out[expert] = static_cast<T>(grad);
    }
}

template <typename T>
void launch(const RoutesArgs& args, bool backward, cudaStream_t stream) {
    const int blocks = (args.num_tokens + kThreads / kWarpSize - 1) / (kThreads / kWarpSize);
    if (backward)
        routes_backward_kernel<T><<<blocks, kThreads, 0, stream>>>(args);
    else
        routes_kernel<T><<<blocks, kThreads, 0, stream>>>(args);
}

}  // namespace

cudaError_t launch_routes(const RoutesArgs& args, DataType probs, bool backward, cudaStream_t stream) {
    if (args.num_tokens == 0) return cudaSuccess;
    switch (probs) {
        case DataType::kFloat32: launch<float>(args, backward, stream); break;
        case DataType::kBFloat16: launch<__nv_bfloat16>(args, backward, stream); break;
        case DataType::kFloat16: launch<__half>(args, backward, stream); break;
        default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

}  // namespace deepep_moe
