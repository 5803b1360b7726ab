// BF16 -> FP8 e4m3 with one fp32 scale per 128 channels, and back. Bit-identical to deepep_moe/fp8.py.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "device/ptx.cuh"

namespace deepep_moe {

constexpr int kScaleChannels = 128;
constexpr int kScaleVectors = kScaleChannels / 8;  // lanes that hold one block, eight channels each
constexpr float kFp8Max = 448.0f;                  // largest e4m3 value

// The smallest scale is the smallest normal number, so that a scale and its inverse are normal. Since e4m3 reaches down
// to 2^-9, blocks of smaller numbers lose no precision: the relative error of every BF16 number is at most 1/16.
constexpr float kAmaxFloor = kFp8Max * 0x1p-126f;

// amax / 448 and 448 / amax, correctly rounded, without the branches of a division for values that amax cannot have.
// Exact for every BF16 number from kAmaxFloor up (tests/gpu/test_fp8.py tests all of them), even if the approximate
// reciprocal is off by one unit in the last place. An infinity gives NaN.
__device__ __forceinline__ float scale_of(float amax) {
    constexpr float kInverse = 1.0f / kFp8Max;
    const float q = amax * kInverse;
    return fmaf(fmaf(-kFp8Max, q, amax), kInverse, q);
}

__device__ __forceinline__ float inverse_scale_of(float amax) {
    // reciprocal_approximate flushes subnormal numbers. t and its reciprocal are normal for the smallest and the
    // largest amax: t is in [2^-121.2, 2^124).
    constexpr float kShift = 1.0f / 16;
    const float t = amax * kShift, reciprocal = reciprocal_approximate(t);
    const float q = kFp8Max * kShift * reciprocal;
    return fmaf(fmaf(-t, q, kFp8Max * kShift), reciprocal, q);
}

// Quantise eight consecutive channels. The sixteen lanes that hold one block of 128 channels must call together; lane 0
// of the sixteen holds the first eight channels. Returns e4m3 bytes, and in `scale` the factor that restores the
// values. If the largest absolute value of a block is below `amax_floor` (at least kAmaxFloor), the floor is used in
// its place. A NaN or an infinity makes its whole block NaN.
__device__ __forceinline__ int2 quantise_block(int4 bf16, float amax_floor, float& scale) {
    const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&bf16);
    __nv_bfloat162 largest = __habs2(pairs[0]);
#pragma unroll
    for (int i = 1; i < 4; ++i) largest = __hmax2_nan(largest, __habs2(pairs[i]));
#pragma unroll
    for (int d = kScaleVectors / 2; d > 0; d /= 2)
        largest = __hmax2_nan(largest, __shfl_xor_sync(kFullMask, largest, d));
    const float of_block = __bfloat162float(__hmax_nan(largest.x, largest.y));
    const float amax = of_block < amax_floor ? amax_floor : of_block;
    scale = scale_of(amax);
    const float inverse = inverse_scale_of(amax);
    const int words[4] = {bf16.x, bf16.y, bf16.z, bf16.w};
    int2 bytes;
    __nv_fp8x2_storage_t* out = reinterpret_cast<__nv_fp8x2_storage_t*>(&bytes);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        // equal to __bfloat1622float2, with one instruction less
        const float low = __int_as_float(words[i] << 16), high = __int_as_float(words[i] & 0xffff0000);
        out[i] = __nv_cvt_float2_to_fp8x2(make_float2(low * inverse, high * inverse), __NV_SATFINITE, __NV_E4M3);
    }
    return bytes;
}

// Convert eight channels back: multiplied by the scale in fp32 and rounded once.
__device__ __forceinline__ int4 dequantise(int2 bytes, float scale) {
    const __nv_fp8x2_storage_t* pairs = reinterpret_cast<const __nv_fp8x2_storage_t*>(&bytes);
    int4 bf16;
    __nv_bfloat162* out = reinterpret_cast<__nv_bfloat162*>(&bf16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 v = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(pairs[i], __NV_E4M3)));
        out[i] = __floats2bfloat162_rn(v.x * scale, v.y * scale);
    }
    return bf16;
}

}  // namespace deepep_moe
