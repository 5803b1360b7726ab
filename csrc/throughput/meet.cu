// Meet: an operation without rows. Before a collective step of the hosts (growth of staging), it checks that all ranks
// are about to take that step. A rank that refuses a dispatch or combine runs it instead, so that its peers do not
// wait.
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
    // A peer that entered this operation may have failed since, waiting for another rank.
    if (threadIdx.x == 0) any_rank_failed(rt.domain, phase, epoch);
}

__global__ void set_epochs_kernel(const __grid_constant__ Runtime rt, int plan_epoch, int data_epoch) {
    rt.local->plan_epoch = plan_epoch;
    rt.local->data_epoch = data_epoch;
    Control* own = rt.control[rt.domain.rank];
    for (int r = 0; r < rt.domain.num_ranks; ++r) {  // as if all calls up to these epochs had been made
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
