// BF16 -> FP8 e4m3 with one fp32 scale per 128 channels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "device/ptx.cuh"

namespace deepep_moe {

constexpr int kScaleChannels = 128;
constexpr float kFp8Max = 448.0f;    // largest e4m3 value
constexpr float kAmaxFloor = 1e-4f;  // keeps the scale of an all-zero block finite

// Quantise eight consecutive channels. The sixteen lanes that hold one block of 128 channels must call together
// and lane 0 of the sixteen holds the first eight channels. Returns e4m3 bytes; `scale` is what to multiply them by.
__device__ __forceinline__ int2 quantise_block(int4 bf16, float& scale) {
    const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&bf16);
    float2 v[4];
    float amax = kAmaxFloor;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[i] = __bfloat1622float2(pairs[i]);
        amax = fmaxf(amax, fmaxf(fabsf(v[i].x), fabsf(v[i].y)));
    }
#pragma unroll
    for (int d = 8; d > 0; d /= 2) amax = fmaxf(amax, __shfl_xor_sync(kFullMask, amax, d));
    scale = amax / kFp8Max;
    const float inverse = kFp8Max / amax;
    int2 bytes;
    __nv_fp8x2_storage_t* out = reinterpret_cast<__nv_fp8x2_storage_t*>(&bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i)
        out[i] = __nv_cvt_float2_to_fp8x2(make_float2(v[i].x * inverse, v[i].y * inverse), __NV_SATFINITE, __NV_E4M3);
    return bytes;
}

}  // namespace deepep_moe
