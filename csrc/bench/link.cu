// Stores to all peers at once: the bandwidth of the links, which is the upper limit for kernels that send rows.
//
// A thread stores sixteen bytes to each peer in turn, so that all links are busy. There are no loads, waits or flags.
#include "bench/link.h"
#include "device/ptx.cuh"

namespace deepep_moe {

namespace {

constexpr int kThreads = 1024;

__global__ void __launch_bounds__(kThreads) fill_peers_kernel(const __grid_constant__ FillPeersArgs args) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const int4 value = make_int4(threadIdx.x, blockIdx.x, 0, 0);
    for (int64_t i = first; i < args.num_vectors; i += static_cast<int64_t>(gridDim.x) * kThreads)
        for (int peer = 0; peer < args.num_targets; ++peer) store_streaming(args.target[peer] + i, value);
}

}  // namespace

cudaError_t launch_fill_peers(const FillPeersArgs& args, int num_blocks, cudaStream_t stream) {
    fill_peers_kernel<<<num_blocks, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
