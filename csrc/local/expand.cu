// Expand: each packed row that arrived to its rows of the layout asked for; FP8 may become BF16 again on the way.
//
// A warp per received row, which is loaded once. Further warps look at 32 rows of the layout each and zero those that
// no received row belongs to.
#include "device/rows.cuh"
#include "local/agree.cuh"

namespace deepep_moe {

namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ int out_row_bytes(const ExpandArgs& args) {
    return (args.dequantise ? 2 : 1) * args.rows.row_bytes;
}

__device__ __forceinline__ bool by_source(const ExpandArgs& args) { return args.places.data == nullptr; }

__device__ __forceinline__ void expand_row(const ExpandArgs& args, int n) {
    const int lane = threadIdx.x % kWarpSize, packed = args.segments.own_first_row(n);
    const PackedRows& rows = args.rows;
    const Source from{rows.row(packed), rows.scales(packed), 1};
    const float* weights = rows.weights(packed);
    const int width = by_source(args) ? 1 : args.places.width;
    for (int first = 0; first < width; first += kWarpSize) {
        const int place = first + lane < width ? args.places.of(n, first + lane) : -1;
        const unsigned mask = __ballot_sync(kFullMask, place >= 0);
        if (mask == 0) continue;
        const Destination to{args.out + static_cast<int64_t>(place) * out_row_bytes(args),
                             args.out_scales.data + place * args.out_scales.row_stride, args.out_scales.channel_stride};
        if (args.dequantise)
            dequantise_row(from, to, mask, rows.row_bytes);
        else
            copy_row(from, to, mask, rows.row_bytes, rows.num_scales);
        if (!by_source(args) && args.out_weights && place >= 0) args.out_weights[place] = weights[first + lane];
    }
    if (by_source(args) && args.out_weights)
        for (int k = lane; k < rows.num_weights; k += kWarpSize) {
            const bool owned = args.owned[static_cast<int64_t>(n) * args.owned_stride + k] >= 0;
            args.out_weights[static_cast<int64_t>(n) * rows.num_weights + k] = owned ? weights[k] : 0.0f;
        }
}

// Zero those of the 32 rows from `first` on that are padding. The whole warp calls.
__device__ __forceinline__ void zero_padding(const ExpandArgs& args, int first) {
    const int lane = threadIdx.x % kWarpSize, row_bytes = out_row_bytes(args);
    const int num_scales = args.dequantise ? 0 : args.rows.num_scales;
    const int num_weights = !args.out_weights ? 0 : by_source(args) ? args.rows.num_weights : 1;
    bool padding = false;
    if (first + lane < args.num_out)
        padding =
            args.row_recv ? args.row_recv[first + lane] < 0 : by_source(args) && first + lane >= args.num_received;
    for (unsigned m = __ballot_sync(kFullMask, padding); m; m &= m - 1) {
        const int64_t row = first + __ffs(m) - 1;
        int4* to = reinterpret_cast<int4*>(args.out + row * row_bytes);
        for (int i = lane; i < row_bytes / static_cast<int>(sizeof(int4)); i += kWarpSize)
            store_streaming(to + i, make_int4(0, 0, 0, 0));
        for (int c = lane; c < num_scales; c += kWarpSize)
            args.out_scales.data[row * args.out_scales.row_stride + c * args.out_scales.channel_stride] = 0;
        for (int k = lane; k < num_weights; k += kWarpSize) args.out_weights[row * num_weights + k] = 0.0f;
    }
}

__device__ __noinline__ void spoil(const ExpandArgs& args) {
    set_to_nan(args.out, static_cast<int64_t>(args.num_out) * out_row_bytes(args) / 4);
    if (args.out_scales.data && !args.dequantise)  // dense
        set_to_nan(args.out_scales.data, static_cast<int64_t>(args.num_out) * args.rows.num_scales);
    if (args.out_weights)
        set_to_nan(args.out_weights,
                   static_cast<int64_t>(args.num_out) * (by_source(args) ? args.rows.num_weights : 1));
}

__global__ void __launch_bounds__(kThreads) expand_kernel(const __grid_constant__ ExpandArgs args) {
    if (headers_differ(args.headers)) return spoil(args);
    const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarpSize;
    if (warp < args.num_received)
        expand_row(args, static_cast<int>(warp));
    else if ((warp - args.num_received) * kWarpSize < args.num_out)
        zero_padding(args, static_cast<int>(warp - args.num_received) * kWarpSize);
}

}  // namespace

cudaError_t launch_expand(const ExpandArgs& args, cudaStream_t stream) {
    const int64_t warps = static_cast<int64_t>(args.num_received) + (args.num_out + kWarpSize - 1) / kWarpSize;
    if (warps == 0) return cudaSuccess;
    const int64_t blocks = (warps + kThreads / kWarpSize - 1) / (kThreads / kWarpSize);
    expand_kernel<<<static_cast<int>(blocks), kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe
