// Give up: a host that cannot continue marks its rank as failed and tells the peers.
#include "device/wait.cuh"

namespace deepep_moe::DEEPEP_MOE_WIDTH {

namespace {

__global__ void give_up_kernel(const __grid_constant__ Domain domain) {
    report_failure(domain, {kBadPeerInput, kRefused, domain.rank, 0, 0, 0});
}

}  // namespace

cudaError_t launch_give_up(const Domain& domain, cudaStream_t stream) {
    give_up_kernel<<<1, 1, 0, stream>>>(domain);
    return cudaGetLastError();
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH
