// Announce: one copy for each rank of the header of a dispatch or combine. Headers reach the device as arguments,
// because a copy from the host's memory would make the host wait.
#include "local/args.h"

namespace deepep_moe {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) announce_kernel(const __grid_constant__ AnnounceArgs args) {
    for (int i = threadIdx.x; i < args.num_ranks * Messages::kAgreedWords; i += kThreads)
        args.out[i] = args.header.words[i % Messages::kAgreedWords];
}

}  // namespace

cudaError_t launch_announce(const AnnounceArgs& args, cudaStream_t stream) {
    announce_kernel<<<1, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
