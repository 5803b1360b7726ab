// Signals between PEs, and waiting for one with a bound.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include "device/ptx.cuh"
#include "nvshmem/args.h"

namespace deepep_moe {

__device__ __forceinline__ uint64_t load_acquire_system(const uint64_t* p) {
    uint64_t v;
    asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}

// A debug build waits up to 64 us before each put, a different time for each, so that orders that rarely happen do.
__device__ __forceinline__ void delay_put() {
#ifdef DEEPEP_MOE_DELAY_PUTS
    unsigned mixed = static_cast<unsigned>(clock64()) * 2654435761u ^ blockIdx.x * 40503u;
    mixed ^= mixed >> 15;
    const uint64_t start = global_nanoseconds();
    while (global_nanoseconds() - start < (mixed & 0xffffu)) __nanosleep(200);
#endif
}

// The first failure of this rank, for its host; kernels of this rank do nothing after it. True for the first caller.
__device__ __forceinline__ bool report_failure(const Waiting& waiting, int phase, int peer, uint64_t expected,
                                               uint64_t seen) {
    if (atomicExch(waiting.failed, 1) != 0) return false;
    volatile RailFailure* record = waiting.record;
    record->phase = phase;
    record->peer = peer;
    record->expected = static_cast<long long>(expected);
    record->seen = static_cast<long long>(seen);
    __threadfence_system();
    record->failed = 1;
    return true;
}

// Wait until `signal`, which only grows, has come to `expected`: the data that was put with it can then be read. False
// after the timeout, once given_up() returns the number of a peer that will not come (else -1), or once this rank has
// failed elsewhere. Whoever reports the failure calls tell().
template <typename GivenUp, typename Tell>
__device__ __forceinline__ bool wait_for_signal(const Waiting& waiting, uint64_t* signal, uint64_t expected, int phase,
                                                int peer, const GivenUp& given_up, const Tell& tell) {
    uint64_t seen = load_acquire_system(signal);
    const uint64_t start = global_nanoseconds();
    while (seen < expected) {
#pragma unroll 1
        for (int spin = 0; spin < 64 && seen < expected; ++spin) seen = load_acquire_system(signal);
        if (seen >= expected) break;
        if (*static_cast<volatile int*>(waiting.failed) != 0) return false;
        const int lost = given_up();
        if (lost >= 0) {
            if (report_failure(waiting, kRailGivenUp, lost, 0, 0)) tell();
            return false;
        }
        if (global_nanoseconds() - start > waiting.timeout_nanoseconds) {
            if (report_failure(waiting, phase, peer, expected, seen)) tell();
            return false;
        }
    }
    // Where a NIC writes this GPU's memory, data may become visible after its signal. The library's own test takes the
    // step that prevents this, on every transport, and returns at once as the condition holds.
    return nvshmem_uint64_test(signal, NVSHMEM_CMP_GE, expected) != 0;
}

}  // namespace deepep_moe
