// Meet: an operation that moves nothing. Ranks that are about to do something together on the host find out whether all
// of them are; a rank that refused a dispatch or combine takes its place in it, so that the others do not wait.
#include "throughput/operation.cuh"

namespace deepep_moe {

namespace {

__global__ void __launch_bounds__(kWarpSize)
    meet_kernel(const __grid_constant__ Runtime rt, Operation operation, const int64_t* rank_prefix) {
    if (is_stopped(rt.domain) || (rank_prefix && !is_usable(rank_prefix))) return;
    const int epoch = next_epoch(rt.local->data_epoch);
    enter_operation(rt, epoch, operation);
    const Phase phase = operation.kind == Operation::kRefuse ? kRefused : kGrowStaging;
    leave_operation(rt, epoch, phase);
    // Who has been here may have given up since, waiting for somebody else.
    if (threadIdx.x == 0) any_rank_failed(rt.domain, phase, epoch);
}

__global__ void set_epochs_kernel(const __grid_constant__ Runtime rt, int plan_epoch, int data_epoch) {
    rt.local->plan_epoch = plan_epoch;
    rt.local->data_epoch = data_epoch;
    Control* own = rt.control[rt.domain.rank];
    for (int r = 0; r < rt.domain.num_ranks; ++r) {  // as if all calls up to there had been made
        own->entered[r] = data_epoch;
        own->placed[r] = plan_epoch;
    }
}

}  // namespace

cudaError_t launch_meet(const Runtime& runtime, const Operation& operation, const int64_t* rank_prefix,
                        cudaStream_t stream) {
    meet_kernel<<<1, kWarpSize, 0, stream>>>(runtime, operation, rank_prefix);
    return cudaGetLastError();
}

cudaError_t launch_set_epochs(const Runtime& runtime, int plan_epoch, int data_epoch, cudaStream_t stream) {
    set_epochs_kernel<<<1, 1, 0, stream>>>(runtime, plan_epoch, data_epoch);
    return cudaGetLastError();
}

}  // namespace deepep_moe
