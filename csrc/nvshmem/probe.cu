// Self-test of the transport: sends chunks with one signal each to one PE while receiving as many from another. A chunk
// is checked as soon as its signal is seen, and sent again once the receiver has acknowledged it.
#include <algorithm>

#include "nvshmem/signal.cuh"

namespace deepep_moe {

namespace {

constexpr int kBlocks = 16, kThreads = 512;

// wait_for_signal for all threads of a block.
__device__ __forceinline__ bool wait_block(const ProbeArgs& args, uint64_t* signal, uint64_t round, ProbePhase phase,
                                           int peer) {
    bool arrived = false;
    if (threadIdx.x == 0) {
        arrived = wait_for_signal(args.waiting, signal, round, phase, peer, [] { return -1; }, [] {});
        if (arrived) data_visible(signal, round);
    }
    return __syncthreads_or(arrived) != 0;
}

__device__ __forceinline__ uint64_t pattern(int rank, uint64_t round, int chunk, int word) {
    uint64_t mixed = (static_cast<uint64_t>(rank) << 48) ^ (round << 24) ^ (static_cast<uint64_t>(chunk) << 16) ^ word;
    mixed *= 0x9e3779b97f4a7c15ull;
    return mixed ^ mixed >> 29;
}

__global__ void __launch_bounds__(kThreads) probe_kernel(const __grid_constant__ ProbeArgs args) {
    const int words = args.chunk_bytes / 8;
    for (int round = 0; round < args.rounds; ++round) {
        const uint64_t number = args.first_round + round;
        for (int chunk = blockIdx.x; chunk < args.chunks; chunk += gridDim.x) {
            // The first round of a launch needs no acknowledgement: the hosts have synchronised before it.
            if (round > 0 && !wait_block(args, &args.taken[chunk], number - 1, kProbeAnswer, args.to)) return;
            uint64_t* out = reinterpret_cast<uint64_t*>(args.sent + static_cast<int64_t>(chunk) * args.chunk_bytes);
            if (args.check) {
                for (int word = threadIdx.x; word < words; word += blockDim.x)
                    out[word] = pattern(args.rank, number, chunk, word);
                __threadfence_system();
            }
            __syncthreads();
            delay_put();
            nvshmemx_putmem_signal_nbi_block(args.received + static_cast<int64_t>(chunk) * args.chunk_bytes, out,
                                             args.chunk_bytes, &args.arrived[chunk], number, NVSHMEM_SIGNAL_SET,
                                             args.to_pe);
        }
        for (int chunk = blockIdx.x; chunk < args.chunks; chunk += gridDim.x) {
            if (!wait_block(args, &args.arrived[chunk], number, kProbeRows, args.from)) return;
            if (args.check) {
                const uint64_t* in =
                    reinterpret_cast<const uint64_t*>(args.received + static_cast<int64_t>(chunk) * args.chunk_bytes);
                unsigned wrong = 0;
                for (int word = threadIdx.x; word < words; word += blockDim.x)
                    wrong += __ldcv(&in[word]) != pattern(args.from, number, chunk, word);
                if (wrong != 0) atomicAdd(args.wrong, static_cast<unsigned long long>(wrong));
            }
            __syncthreads();
            if (threadIdx.x == 0) nvshmemx_signal_op(&args.taken[chunk], number, NVSHMEM_SIGNAL_SET, args.from_pe);
        }
    }
}

}  // namespace

cudaError_t launch_probe(const ProbeArgs& args, cudaStream_t stream) {
    const int blocks = std::min(args.chunks, kBlocks);
    probe_kernel<<<blocks, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
