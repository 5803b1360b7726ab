// CUDA for tests without a GPU: kernels of csrc/latency and csrc/nvshmem run on the CPU. A block is a thread of the
// operating system, a thread of a block is a fiber, and all blocks of a grid are resident. Fibers are switched in warp
// and block collectives and in loads that wait for other ranks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <emmintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <ctime>
#include <functional>
#include <vector>

namespace emulation {

struct Fiber {
    void* stack;
    bool done;
};

struct Warp {
    int arrived = 0;
    unsigned phase = 0;
    uint64_t values[2][32];  // what the lanes brought to a collective, in alternate phases
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    unsigned number, grid;
    int current = 0, alive = 0, arrived = 0;
    unsigned phase = 0;
    int any[2] = {0, 0};
    void* caller;
    const std::function<void()>* body;
};

extern thread_local Block* block;  // that this thread executes
extern thread_local int rank;      // whose kernel this is

void yield();
uint64_t* meet_warp(uint64_t value);  // the values of all lanes
int meet_block(bool value);           // whether it was true in any thread
void launch(int blocks, int threads, std::function<void()> body);

inline unsigned lane() { return block->current % 32; }
struct Index {
    unsigned x;
};

template <typename T>
T shuffle(T value, unsigned from) {
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = meet_warp(bits)[from & 31];
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace emulation

#define threadIdx (emulation::Index{static_cast<unsigned>(emulation::block->current)})
#define blockIdx (emulation::Index{emulation::block->number})
#define gridDim (emulation::Index{emulation::block->grid})
#define blockDim (emulation::Index{static_cast<unsigned>(emulation::block->fibers.size())})
#undef __shared__
#define __shared__ static thread_local
#undef __forceinline__
#define __forceinline__ inline
#undef __grid_constant__
#define __grid_constant__
#undef __launch_bounds__
#define __launch_bounds__(...)

using std::fmaf;
using std::max;
using std::min;

inline void __syncthreads() { emulation::meet_block(false); }
inline int __syncthreads_or(int value) { return emulation::meet_block(value != 0); }
inline void __syncwarp(unsigned = ~0u) { emulation::meet_warp(0); }
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
    return emulation::shuffle(value, from);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::shuffle(value, emulation::lane() ^ mask);
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
    const uint64_t* values = emulation::meet_warp(value);
    unsigned all = 0;
    for (int i = 0; i < 32; ++i) all |= static_cast<unsigned>(values[i]);
    return all;
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
    return __reduce_or_sync(mask, value ? 1u << emulation::lane() : 0u);
}
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == ~0u; }
inline bool __any_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) != 0; }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __float_as_int(float value) {
    int bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float __int_as_float(int bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline void __threadfence_system() { __threadfence(); }
inline int atomicCAS(int* p, int expected, int value) {
    __atomic_compare_exchange_n(p, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;
}
template <typename T>
T atomicExch(T* p, T value) {
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);
}
template <typename T, typename V>
T atomicAdd(T* p, V value) {
    return __atomic_fetch_add(p, static_cast<T>(value), __ATOMIC_SEQ_CST);
}
inline unsigned long long atomicMax(unsigned long long* p, unsigned long long value) {
    unsigned long long before = *p;
    while (before < value &&
           !__atomic_compare_exchange_n(p, &before, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    return before;
}
template <typename T>
T atomicOr(T* p, T value) {
    return __atomic_fetch_or(p, value, __ATOMIC_SEQ_CST);
}
