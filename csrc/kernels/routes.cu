// Routes: from a map of bool, as routers of Megatron-Core give it, to the indices of each token's experts.
#include "device/ptx.cuh"
#include "kernels/args.h"

namespace deepep_moe {

namespace {

constexpr int kThreads = 256;

// A warp per token.
__global__ void __launch_bounds__(kThreads)
    routes_kernel(const bool* routing_map, int num_tokens, int num_experts, int num_topk, int64_t* topk_idx) {
    const int lane = threadIdx.x % kWarpSize;
    const int token = (blockIdx.x * kThreads + threadIdx.x) / kWarpSize;
    if (token >= num_tokens) return;
    const bool* row = routing_map + static_cast<int64_t>(token) * num_experts;
    int64_t* out = topk_idx + static_cast<int64_t>(token) * num_topk;
    int found = 0;
    for (int first = 0; first < num_experts; first += kWarpSize) {
        const bool routed = first + lane < num_experts && row[first + lane];
        const unsigned all = __ballot_sync(kFullMask, routed);
        const int k = found + __popc(all & ((1u << lane) - 1));
        if (routed && k < num_topk) out[k] = first + lane;
        found += __popc(all);
    }
    __syncwarp();
    if (found > num_topk && lane == 0) out[0] = num_experts + found;
    for (int k = found + lane; k < num_topk; k += kWarpSize) out[k] = -1;
}

}  // namespace

cudaError_t launch_routes(const bool* routing_map, int num_tokens, int num_experts, int num_topk, int64_t* topk_idx,
                          cudaStream_t stream) {
    if (num_tokens == 0) return cudaSuccess;
    const int blocks = (num_tokens + kThreads / kWarpSize - 1) / (kThreads / kWarpSize);
    routes_kernel<<<blocks, kThreads, 0, stream>>>(routing_map, num_tokens, num_experts, num_topk, topk_idx);
    return cudaGetLastError();
}

}  // namespace deepep_moe
