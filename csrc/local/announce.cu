// Announce: one copy for each rank of the header of a dispatch or combine, and room for those of the ranks, which
// differ until they have arrived. Headers reach the device as arguments, because a copy from the host's memory would
// make the host wait.
#include "local/args.h"

namespace deepep_moe {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) announce_kernel(const __grid_constant__ AnnounceArgs args) {
    const int sent = args.num_ranks * Messages::kAgreedWords;
    for (int i = threadIdx.x; i < 2 * sent; i += kThreads)
        args.out[i] = i < sent ? args.header.words[i % Messages::kAgreedWords] : -i;
}

}  // namespace

cudaError_t launch_announce(const AnnounceArgs& args, cudaStream_t stream) {
    announce_kernel<<<1, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
