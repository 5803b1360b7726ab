// Copying one row to several places, sixteen bytes at a time, in the form given, as FP8, or as BF16 again. A warp per
// row.
#pragma once

#include "device/fp8.cuh"

namespace deepep_moe {

constexpr int kVectorsInFlight = 4;  // of each row, that a lane loads before it stores

// Source of a row.
struct Source {
    const char* row;
    const int* scales;  // of the row
    int64_t channel_stride;
};

// Destination of a lane's copy of the row; valid for lanes in the mask.
struct Destination {
    char* row;
    int* scales;
    int64_t channel_stride;
};

template <typename T>
__device__ __forceinline__ T* of_lane(T* pointer, int lane) {
    return reinterpret_cast<T*>(__shfl_sync(kFullMask, reinterpret_cast<unsigned long long>(pointer), lane));
}

// Store a lane's vectors `first + u * 32` of a row, as far as they are below `vectors`, to all destinations.
template <typename Vector>
__device__ __forceinline__ void store_copies(const Vector (&v)[kVectorsInFlight], int first, int vectors, char* to,
                                             unsigned mask) {
    for (unsigned m = mask; m; m &= m - 1) {
        Vector* row = reinterpret_cast<Vector*>(of_lane(to, __ffs(m) - 1)) + first;
#pragma unroll
        for (int u = 0; u < kVectorsInFlight; ++u)
            if (first + u * kWarpSize < vectors) store_streaming(row + u * kWarpSize, v[u]);
    }
}

// Copy one row and its scales to the destinations of all lanes in `mask`. Call with the whole warp.
__device__ __forceinline__ void copy_row(const Source& from, const Destination& to, unsigned mask, int row_bytes,
                                         int num_scales) {
    const int lane = threadIdx.x % kWarpSize, vectors = row_bytes / static_cast<int>(sizeof(int4));
    const int4* source = reinterpret_cast<const int4*>(from.row);
    for (int base = lane; base - lane < vectors; base += kWarpSize * kVectorsInFlight) {
        int4 v[kVectorsInFlight];
#pragma unroll
        for (int u = 0; u < kVectorsInFlight; ++u)
            if (base + u * kWarpSize < vectors) v[u] = load_streaming(source + base + u * kWarpSize);
        store_copies(v, base, vectors, to.row, mask);
    }
    for (int c = lane; c - lane < num_scales; c += kWarpSize) {
        const int scale = c < num_scales ? from.scales[c * from.channel_stride] : 0;
        for (unsigned m = mask; m; m &= m - 1) {
            int* scales = of_lane(to.scales, __ffs(m) - 1);
            if (c < num_scales) scales[c * to.channel_stride] = scale;
        }
    }
}

// The same for a BF16 row, converted to FP8 of `row_bytes` channels and, if kBack, back to BF16.
template <bool kBack>
__device__ __forceinline__ void quantise_row(const char* from, const Destination& to, unsigned mask, int row_bytes) {
    const int lane = threadIdx.x % kWarpSize, vectors = row_bytes / 8;
    const int4* source = reinterpret_cast<const int4*>(from);
    for (int base = lane; base - lane < vectors; base += kWarpSize * kVectorsInFlight) {
        int4 v[kVectorsInFlight];
        int2 bytes[kVectorsInFlight];
        float scale[kVectorsInFlight];
#pragma unroll
        for (int u = 0; u < kVectorsInFlight; ++u) {
            const int i = base + u * kWarpSize;
            v[u] = i < vectors ? load_streaming(source + i) : make_int4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < kVectorsInFlight; ++u) {
            bytes[u] = quantise_block(v[u], kAmaxFloor, scale[u]);
            if (kBack) v[u] = dequantise(bytes[u], scale[u]);
        }
        if (kBack) {
            store_copies(v, base, vectors, to.row, mask);
            continue;
        }
        store_copies(bytes, base, vectors, to.row, mask);
        for (unsigned m = mask; m; m &= m - 1) {
            int* scales = of_lane(to.scales, __ffs(m) - 1);
#pragma unroll
            for (int u = 0; u < kVectorsInFlight; ++u) {
                const int i = base + u * kWarpSize;
                if (i < vectors && i % kScaleVectors == 0)
                    scales[i / kScaleVectors * to.channel_stride] = __float_as_int(scale[u]);
            }
        }
    }
}

// The same for an FP8 row with its scales, converted to BF16.
__device__ __forceinline__ void dequantise_row(const Source& from, const Destination& to, unsigned mask,
                                               int row_bytes) {
    constexpr int kAtOnce = kVectorsInFlight * kWarpSize, kScalesAtOnce = kAtOnce / kScaleVectors;
    const int lane = threadIdx.x % kWarpSize, vectors = row_bytes / 8;
    const int2* source = reinterpret_cast<const int2*>(from.row);
    const float* scales = reinterpret_cast<const float*>(from.scales);
    for (int base = lane, block = lane % kScalesAtOnce; base - lane < vectors;
         base += kAtOnce, block += kScalesAtOnce) {
        int2 bytes[kVectorsInFlight];
        int4 v[kVectorsInFlight];
        const float scale = block * kScaleVectors < vectors ? scales[block] : 0.0f;
#pragma unroll
        for (int u = 0; u < kVectorsInFlight; ++u)
            if (base + u * kWarpSize < vectors) bytes[u] = load_streaming(source + base + u * kWarpSize);
#pragma unroll
        for (int u = 0; u < kVectorsInFlight; ++u)
            v[u] = dequantise(bytes[u], __shfl_sync(kFullMask, scale, (u * kWarpSize + lane) / kScaleVectors));
        store_copies(v, base, vectors, to.row, mask);
    }
}

}  // namespace deepep_moe
