// Pack: each row to its places in a send buffer, with its scales and weights beside it; BF16 may become FP8 on the way.
//
// A warp per row: it is loaded once, whatever the number of its places.
#include "device/rows.cuh"
#include "local/args.h"

namespace deepep_moe {

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ PackArgs args) {
    const int lane = threadIdx.x % kWarpSize;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarpSize;
    if (row >= args.num_rows) return;
    const PackedRows& out = args.out;
    const char* x = args.x + row * (args.quantise ? 2 : 1) * out.row_bytes;
    const int* scales = args.scales.data ? args.scales.data + row * args.scales.row_stride : nullptr;
    for (int first = 0; first < args.places.width; first += kWarpSize) {
        const int place = first + lane < args.places.width ? args.places.of(row, first + lane) : -1;
        const unsigned mask = __ballot_sync(kFullMask, place >= 0);
        if (mask == 0) continue;
        const Destination to{out.row(place), out.scales(place), 1};
        if (args.quantise)
            quantise_row<false>(x, to, mask, out.row_bytes);
        else
            copy_row({x, scales, args.scales.channel_stride}, to, mask, out.row_bytes, out.num_scales);
        for (int k = lane; k - lane < out.num_weights; k += kWarpSize) {
            const float weight = k < out.num_weights ? args.weights[row * out.num_weights + k] : 0.0f;
            for (unsigned m = mask; m; m &= m - 1) {
                int* beside = of_lane(to.scales, __ffs(m) - 1) + out.num_scales;
                if (k < out.num_weights) reinterpret_cast<float*>(beside)[k] = weight;
            }
        }
    }
}

}  // namespace

cudaError_t launch_pack(const PackArgs& args, cudaStream_t stream) {
    if (args.num_rows == 0) return cudaSuccess;
    pack_kernel<<<(args.num_rows + kThreads / kWarpSize - 1) / (kThreads / kWarpSize), kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
