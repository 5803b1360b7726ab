// Sums and products of rows in fp32, sixteen bytes at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/ptx.cuh"

namespace deepep_moe {

// The channels of one 16-byte vector as floats.
template <typename T>
struct Vector {
    static constexpr int kChannels = sizeof(int4) / sizeof(T);
    float v[kChannels];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) v[i] = 0.0f;
    }
    __device__ __forceinline__ void add(int4 bits) {
        const Vector other = unpack(bits);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) v[i] += other.v[i];
    }
    __device__ __forceinline__ void add_scaled(int4 bits, float scale) {
        const Vector other = unpack(bits);
#pragma unroll
        for (int i = 0; i < kChannels; ++i) v[i] += other.v[i] * scale;
    }
    __device__ __forceinline__ void add_product(const Vector& a, const Vector& b) {
#pragma unroll
        for (int i = 0; i < kChannels; ++i) v[i] += a.v[i] * b.v[i];
    }
    __device__ __forceinline__ Vector scaled(float scale) const {
        Vector out;
#pragma unroll
        for (int i = 0; i < kChannels; ++i) out.v[i] = v[i] * scale;
        return out;
    }
    static __device__ __forceinline__ Vector unpack(int4 bits);
    __device__ __forceinline__ int4 pack() const;
};

template <>
__device__ __forceinline__ Vector<float> Vector<float>::unpack(int4 bits) {
    const float4 f = *reinterpret_cast<const float4*>(&bits);
    return {{f.x, f.y, f.z, f.w}};
}

template <>
__device__ __forceinline__ int4 Vector<float>::pack() const {
    const float4 f = make_float4(v[0], v[1], v[2], v[3]);
    return *reinterpret_cast<const int4*>(&f);
}

template <>
__device__ __forceinline__ Vector<__nv_bfloat16> Vector<__nv_bfloat16>::unpack(int4 bits) {
    Vector out;
    const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = __bfloat1622float2(pairs[i]);
        out.v[2 * i] = f.x;
        out.v[2 * i + 1] = f.y;
    }
    return out;
}

template <>
__device__ __forceinline__ int4 Vector<__nv_bfloat16>::pack() const {
    int4 bits;
    __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2bfloat162_rn(v[2 * i], v[2 * i + 1]);
    return bits;
}

template <>
__device__ __forceinline__ Vector<__half> Vector<__half>::unpack(int4 bits) {
    Vector out;
    const __half2* pairs = reinterpret_cast<const __half2*>(&bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 f = __half22float2(pairs[i]);
        out.v[2 * i] = f.x;
        out.v[2 * i + 1] = f.y;
    }
    return out;
}

template <>
__device__ __forceinline__ int4 Vector<__half>::pack() const {
    int4 bits;
    __half2* pairs = reinterpret_cast<__half2*>(&bits);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
    return bits;
}

}  // namespace deepep_moe
