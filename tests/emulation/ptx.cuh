// Stands in for csrc/device/ptx.cuh, whose functions are PTX instructions.
#pragma once

#include "cuda.h"
#include "device/tagged.h"

namespace deepep_moe {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = ~0u;

// Nothing else runs between two switches of fibers, so any access is atomic.
template <typename T>
T load_shared(const T* p) {
    emulation::yield();
    return *p;
}
template <typename T>
void store_shared(T* p, T value) {
    emulation::disturb();
    *p = value;
}
inline int load_acquire_system(const int* p) { return load_shared(p); }
inline uint64_t load_acquire_system(const uint64_t* p) { return load_shared(p); }
inline int load_relaxed_system(const int* p) { return load_shared(p); }
inline void store_release_system(int* p, int value) { store_shared(p, value); }
inline void store_relaxed_system(int* p, int value) { store_shared(p, value); }
inline Tagged load_tagged_system(const Tagged* p) { return load_shared(p); }
inline void store_tagged_system(Tagged* p, int value, int tag) { store_shared(p, Tagged{value, tag}); }
inline int4 load_packet(const int4* p) {
    if (emulation::fault != emulation::Fault::kHalfPackets) return load_shared(p);
    const int2 low = load_shared(reinterpret_cast<const int2*>(p));
    emulation::disturb();
    return {low.x, low.y, p->z, p->w};
}
inline void store_packet(int4* p, int4 packet) { store_shared(p, packet); }
inline void prefetch_l2(const void*) {}
inline int4 load_streaming(const int4* p) { return *p; }
inline void store_streaming(int4* p, int4 value) { *p = value; }
inline int2 load_streaming(const int2* p) { return *p; }
inline void store_streaming(int2* p, int2 value) { *p = value; }
inline float reciprocal_approximate(float value) { return 1.0f / value; }
inline uint64_t global_nanoseconds() { return emulation::now() * 1000; }

}  // namespace deepep_moe
