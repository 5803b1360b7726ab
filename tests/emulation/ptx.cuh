// Stands in for csrc/device/ptx.cuh, whose functions are PTX instructions.
#pragma once

#include "cuda.h"
#include "device/tagged.h"

namespace deepep_moe {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = ~0u;

template <typename T>
T load_waiting(const T* p) {  // other fibers run, in case this one waits
    emulation::yield();
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
inline int load_acquire_system(const int* p) { return load_waiting(p); }
inline uint64_t load_acquire_system(const uint64_t* p) { return load_waiting(p); }
inline int load_relaxed_system(const int* p) { return load_waiting(p); }
inline void store_release_system(int* p, int value) { __atomic_store_n(p, value, __ATOMIC_SEQ_CST); }
inline void store_relaxed_system(int* p, int value) { store_release_system(p, value); }
inline Tagged load_tagged_system(const Tagged* p) {
    const uint64_t both = load_waiting(reinterpret_cast<const uint64_t*>(p));
    return {static_cast<int>(both), static_cast<int>(both >> 32)};
}
inline void store_tagged_system(Tagged* p, int value, int tag) {
    const uint64_t both = static_cast<uint64_t>(static_cast<uint32_t>(tag)) << 32 | static_cast<uint32_t>(value);
    __atomic_store_n(reinterpret_cast<uint64_t*>(p), both, __ATOMIC_SEQ_CST);
}
// Packets are loaded and stored by one instruction each, as on a GPU. Of an intrinsic g++ may make two instructions of
// eight bytes, and a packet would not arrive whole.
inline int4 load_packet(const int4* p) {
    emulation::yield();
    __m128i loaded;
    asm volatile("movdqa %1, %0" : "=x"(loaded) : "m"(*p));
    int4 packet;
    std::memcpy(&packet, &loaded, sizeof(packet));
    return packet;
}
inline void store_packet(int4* p, int4 packet) {
    __m128i stored;
    std::memcpy(&stored, &packet, sizeof(stored));
    asm volatile("movdqa %1, %0" : "=m"(*p) : "x"(stored));
}
inline void prefetch_l2(const void*) {}
inline int4 load_streaming(const int4* p) { return *p; }
inline void store_streaming(int4* p, int4 value) { *p = value; }
inline int2 load_streaming(const int2* p) { return *p; }
inline void store_streaming(int2* p, int2 value) { *p = value; }
inline float reciprocal_approximate(float value) { return 1.0f / value; }
inline uint64_t global_nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

}  // namespace deepep_moe
