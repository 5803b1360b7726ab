// Bounded waits for NVSHMEM signals.
#pragma once

#include <nvshmem.h>
#include <nvshmemx.h>

#include "device/ptx.cuh"
#include "nvshmem/args.h"

namespace deepep_moe {

// In a debug build: a random delay of up to 64 us before a put, to provoke rare interleavings.
__device__ __forceinline__ void delay_put() {
#ifdef DEEPEP_MOE_DELAY_PUTS
    unsigned mixed = static_cast<unsigned>(clock64()) * 2654435761u ^ blockIdx.x * 40503u;
    mixed ^= mixed >> 15;
    const uint64_t start = global_nanoseconds();
    while (global_nanoseconds() - start < (mixed & 0xffffu)) __nanosleep(200);
#endif
}

// Record a failure of this rank. Its kernels do nothing afterwards. Returns true for the first failure only.
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

// Wait until `signal`, which only grows, has reached `expected`. Returns false after the timeout, when given_up()
// returns the number of a peer that has given up (otherwise -1), or when this rank has failed elsewhere. The thread
// that records the failure calls tell(). Before the data that was put with the signal is read, see data_visible().
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
    return true;
}

// Make the data of all signals that have been seen visible: with some transports data written by a NIC may become
// visible after its signal. One thread calls this after the waits of its block, with any signal that has arrived. It
// does not wait for the signal: nvshmem_uint64_test is used for what it does on the transport in use.
__device__ __forceinline__ void data_visible(uint64_t* signal, uint64_t arrived) {
    nvshmem_uint64_test(signal, NVSHMEM_CMP_GE, arrived);
}

}  // namespace deepep_moe
