// PTX instructions without a CUDA C++ equivalent, and loads and stores with the memory orders used between ranks.
#pragma once

#include <cstdint>

#include "device/tagged.h"

namespace deepep_moe {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Rows are read once and written once, so these accesses do not allocate in L1.
__device__ __forceinline__ int4 load_streaming(const int4* p) {
    int4 v;
#ifdef DISABLE_AGGRESSIVE_PTX_INSTRS
    v = *p;
#else
    asm volatile("ld.global.L1::no_allocate.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
#endif
    return v;
}

__device__ __forceinline__ void store_streaming(int4* p, int4 v) {
#ifdef DISABLE_AGGRESSIVE_PTX_INSTRS
    *p = v;
#else
    asm volatile("st.global.L1::no_allocate.v4.s32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w)
                 : "memory");
#endif
}

__device__ __forceinline__ void store_streaming(int2* p, int2 v) {
#ifdef DISABLE_AGGRESSIVE_PTX_INSTRS
    *p = v;
#else
    asm volatile("st.global.L1::no_allocate.v2.s32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
#endif
}

__device__ __forceinline__ int2 load_streaming(const int2* p) {
    int2 v;
#ifdef DISABLE_AGGRESSIVE_PTX_INSTRS
    v = *p;
#else
    asm volatile("ld.global.L1::no_allocate.v2.s32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
#endif
    return v;
}

// Acquire and release at system scope: writes before the release are visible after an acquire of the value.
__device__ __forceinline__ int load_acquire_system(const int* p) {
    int v;
    asm volatile("ld.acquire.sys.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t* p) {
    uint64_t v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void store_release_system(int* p, int v) {
    asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ void store_relaxed_system(int* p, int v) {
    asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

__device__ __forceinline__ int load_relaxed_system(const int* p) {
    int v;
    asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}

__device__ __forceinline__ void store_tagged_system(Tagged* p, int value, int tag) {
    const uint64_t both = static_cast<uint64_t>(static_cast<uint32_t>(tag)) << 32 | static_cast<uint32_t>(value);
    asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(p), "l"(both) : "memory");
}

__device__ __forceinline__ Tagged load_tagged_system(const Tagged* p) {
    uint64_t both;
    asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(both) : "l"(p) : "memory");
    return {static_cast<int>(static_cast<uint32_t>(both)), static_cast<int>(both >> 32)};
}

// Sixteen bytes, read or written by one instruction.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 4)
__device__ __forceinline__ int4 load_packet(const int4* p) {
    union {
        uint64_t half[2];
        int4 all;
    } v;
    asm volatile("{\n.reg .b128 q;\nld.relaxed.sys.global.b128 q, [%2];\nmov.b128 {%0, %1}, q;\n}"
                 : "=l"(v.half[0]), "=l"(v.half[1])
                 : "l"(p)
                 : "memory");
    return v.all;
}

__device__ __forceinline__ void store_packet(int4* p, int4 packet) {
    union {
        int4 all;
        uint64_t half[2];
    } v{packet};
    asm volatile("{\n.reg .b128 q;\nmov.b128 q, {%1, %2};\nst.relaxed.sys.global.b128 [%0], q;\n}" ::"l"(p),
                 "l"(v.half[0]), "l"(v.half[1])
                 : "memory");
}
#else  // the same machine instructions on every GPU since Volta
__device__ __forceinline__ int4 load_packet(const int4* p) {
    int4 v;
    asm volatile("ld.volatile.global.v4.s32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

__device__ __forceinline__ void store_packet(int4* p, int4 v) {
    asm volatile("st.volatile.global.v4.s32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}
#endif

__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// 1 / x with an error of at most one unit in the last place; subnormal inputs and results are flushed to zero.
__device__ __forceinline__ float reciprocal_approximate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Nanoseconds of the clock shared by all SMs.
__device__ __forceinline__ uint64_t global_nanoseconds() {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
}

}  // namespace deepep_moe
