// NVSHMEM for tests without a GPU: its device calls that csrc/nvshmem uses, over a network that delivers late, out of
// order and word by word. Only fences order what one PE puts into another.
#pragma once

#include "cuda.h"

enum { NVSHMEM_SIGNAL_SET, NVSHMEM_SIGNAL_ADD, NVSHMEM_CMP_GE };

void nvshmem_int_p(int* to, int value, int pe);
void nvshmemx_putmem_signal_nbi_warp(void* to, const void* from, size_t bytes, uint64_t* signal, uint64_t value, int,
                                     int pe);
void nvshmemx_putmem_signal_nbi_block(void* to, const void* from, size_t bytes, uint64_t* signal, uint64_t value, int,
                                      int pe);
void nvshmem_putmem_signal(void* to, const void* from, size_t bytes, uint64_t* signal, uint64_t value, int, int pe);
void nvshmemx_signal_op(uint64_t* signal, uint64_t value, int operation, int pe);
void nvshmem_fence();
inline int nvshmem_uint64_test(uint64_t*, int, uint64_t) { return 1; }

namespace emulation {

// Symmetric memory of `pes` PEs, zeroed, and a task for each link between two of them. There is one for a process.
class Network {
  public:
    Network(int pes, size_t heap_bytes);
    char* heap(int pe) const;
};

}  // namespace emulation
