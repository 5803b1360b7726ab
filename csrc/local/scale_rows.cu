// Scale rows: rows times weights, and the gradients of that, in one pass over memory.
//
// A warp per row. Sums are fp32 in a fixed order: each lane adds its channels from left to right, then the lanes are
// added as a tree.
#include "device/sum.cuh"
#include "local/args.h"

namespace deepep_moe {

namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 4;  // 16-byte loads of one row that a lane keeps in flight

template <typename T, bool kSums>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(const __grid_constant__ ScaleRowsArgs args) {
    const int lane = threadIdx.x % kWarpSize, vectors = args.row_bytes / static_cast<int>(sizeof(int4));
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarpSize;
    if (row >= args.num_rows) return;
    const int4* x = reinterpret_cast<const int4*>(args.x) + row * vectors;
    const int4* other = reinterpret_cast<const int4*>(args.rows) + row * vectors;
    int4* out = args.out ? reinterpret_cast<int4*>(args.out) + row * vectors : nullptr;

    if (args.row_recv && args.row_recv[row] < 0) {
        if (out)
            for (int i = lane; i < vectors; i += kWarpSize) store_streaming(out + i, make_int4(0, 0, 0, 0));
        if (kSums && lane == 0) args.sums[row] = 0.0f;
        return;
    }

    const float weight = args.weights[row];
    Vector<T> total;  // of this lane, by place in the vector
    total.clear();
    for (int base = lane; base < vectors; base += kWarpSize * kVectors) {
        int4 v[kVectors], w[kVectors];
#pragma unroll
        for (int u = 0; u < kVectors; ++u)
            if (base + u * kWarpSize < vectors) {
                v[u] = load_streaming(x + base + u * kWarpSize);
                if (kSums) w[u] = load_streaming(other + base + u * kWarpSize);
            }
#pragma unroll
        for (int u = 0; u < kVectors; ++u)
            if (base + u * kWarpSize < vectors) {
                const Vector<T> value = Vector<T>::unpack(v[u]);
                if (kSums) total.add_product(value, Vector<T>::unpack(w[u]));
                if (out) store_streaming(out + base + u * kWarpSize, value.scaled(weight).pack());
            }
    }
    if (kSums) {
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < Vector<T>::kChannels; ++i) sum += total.v[i];
#pragma unroll
        for (int d = kWarpSize / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kFullMask, sum, d);
        if (lane == 0) args.sums[row] = sum;
    }
}

template <typename T>
cudaError_t launch(const ScaleRowsArgs& args, cudaStream_t stream) {
    const int blocks = (args.num_rows + kThreads / kWarpSize - 1) / (kThreads / kWarpSize);
    if (args.rows)
        scale_rows_kernel<T, true><<<blocks, kThreads, 0, stream>>>(args);
    else
        scale_rows_kernel<T, false><<<blocks, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_scale_rows(const ScaleRowsArgs& args, DataType dtype, cudaStream_t stream) {
    if (args.num_rows == 0) return cudaSuccess;
    switch (dtype) {
        case DataType::kFloat32: return launch<float>(args, stream);
        case DataType::kBFloat16: return launch<__nv_bfloat16>(args, stream);
        case DataType::kFloat16: return launch<__half>(args, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace deepep_moe
