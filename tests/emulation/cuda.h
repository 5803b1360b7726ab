// CUDA for tests without a GPU: kernels of csrc/latency, csrc/nvshmem and csrc/nodes run on the CPU, in one thread of
// the operating system. Programs of the ranks, blocks and links of the network are tasks, threads of a block are fibers
// of its task, and all blocks of a grid are resident. Fibers are switched in loads and stores of memory that ranks
// share, in atomic operations, fences and collectives. A generator of pseudo-random numbers chooses which fiber runs
// next, so a seed always gives the same order, and any order may occur that is sequentially consistent.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <emmintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

namespace emulation {

struct Warp {
    int arrived = 0;
    unsigned phase = 0;
    uint64_t values[2][32];  // what the lanes brought to a collective, in alternate phases
};

// A block, or a program or link with one fiber.
struct Task {
    int rank;
    std::function<void()> body;
    std::vector<void*> stacks;  // [fiber] its stack pointer
    std::vector<int> ready;     // fibers that can run
    size_t place;               // in the list of tasks that can run
    char* memory;
    int current = 0, alive;
    // of a block
    Task* launcher = nullptr;
    unsigned number = 0, grid = 0;
    std::vector<Warp> warps;
    std::vector<std::pair<const void*, std::unique_ptr<char, void (*)(void*)>>> shared;
    int arrived = 0;
    unsigned phase = 0;
    int any[2] = {0, 0};
    // of a program
    int running = 0;  // blocks of the kernel that it waits for
};

extern Task* task;  // that runs
extern int rank;    // whose task this is

// Faults of the machine, which a run must notice.
enum class Fault { kNone, kHalfPackets /* eight bytes at a time */, kEarlySignals /* before the data of their puts */ };
extern Fault fault;

uint64_t random();
uint64_t now();             // grows by one whenever a fiber yields
void yield();               // other fibers may run
void park();                // until wake() or the end of a collective
void wake(Task* of);        // a program or link
void sleep(uint64_t time);  // of a program or link
inline void disturb() {
    if (random() % 4 == 0) yield();
}
// A fiber that is not part of a kernel. run_programs() returns when all those have ended that `ends` is true of.
Task* start_program(int rank, const std::function<void()>& body, bool ends);
void run_programs(unsigned seed);

uint64_t* meet_warp(uint64_t value);  // the values of all lanes
int meet_block(bool value);           // whether it was true in any thread
void launch(int blocks, int threads, const std::function<void()>& body);

void* shared_memory(const void* key, size_t bytes, size_t alignment);
// Shared memory of the current block.
template <typename T>
T& shared(const void* key) {
    return *static_cast<T*>(shared_memory(key, sizeof(T), alignof(T)));
}

inline unsigned lane() { return task->current % 32; }
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

#define threadIdx (emulation::Index{static_cast<unsigned>(emulation::task->current)})
#define blockIdx (emulation::Index{emulation::task->number})
#define gridDim (emulation::Index{emulation::task->grid})
#define blockDim (emulation::Index{static_cast<unsigned>(emulation::task->stacks.size())})
#undef __forceinline__
#define __forceinline__ inline
#undef __noinline__
#define __noinline__
#undef __grid_constant__
#define __grid_constant__
#undef __launch_bounds__
#define __launch_bounds__(...)

// For test programs.
#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            std::fprintf(stderr, "rank %d, line %d: %s\n", emulation::rank, __LINE__, #condition); \
            std::_Exit(1);                                                                         \
        }                                                                                          \
    } while (false)

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
template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned distance) {
    return emulation::shuffle(value, emulation::lane() < distance ? emulation::lane() : emulation::lane() - distance);
}
// As if every thread came alone.
inline unsigned __activemask() { return 1u << emulation::lane(); }
inline unsigned __match_any_sync(unsigned, int) { return 1u << emulation::lane(); }
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
inline void __threadfence() { emulation::disturb(); }
inline void __threadfence_system() { emulation::disturb(); }
// What `change` returns is stored; returns the value before.
template <typename T, typename Change>
T atomically(T* p, const Change& change) {
    emulation::disturb();
    volatile T* at = p;
    const T before = *at;
    *at = change(before);
    return before;
}
inline int atomicCAS(int* p, int expected, int value) {
    return atomically(p, [=](int before) { return before == expected ? value : before; });
}
template <typename T>
T atomicExch(T* p, T value) {
    return atomically(p, [=](T) { return value; });
}
template <typename T, typename V>
T atomicAdd(T* p, V value) {
    return atomically(p, [=](T before) { return before + static_cast<T>(value); });
}
template <typename T>
T atomicMax(T* p, T value) {
    return atomically(p, [=](T before) { return std::max(before, value); });
}
template <typename T>
T atomicMin(T* p, T value) {
    return atomically(p, [=](T before) { return std::min(before, value); });
}
template <typename T>
T atomicOr(T* p, T value) {
    return atomically(p, [=](T before) { return before | value; });
}
