// NVSHMEM in this process: start, end, symmetric memory, and how a PE reaches another.
//
// Host code without NVSHMEM's headers, so that bindings.cpp needs none. A PE is a process as NVSHMEM numbers it.
#pragma once

#include <array>
#include <string>

#include "runtime/domain.h"

namespace deepep_moe {

// 128 bytes for the other processes, by which start() finds them. Needs no GPU.
std::string new_unique_id();

// Whether some library of this process has started NVSHMEM. Its PEs are then those of that start.
bool is_started();

// Start NVSHMEM, or only this module's device code where is_started(). Collective over all processes that have `id`.
void start(int rank, int num_ranks, const std::string& id, int device);

// Collective over all PEs.
void finish();

int this_pe();
int num_pes();

// Symmetric memory, zeroed. Collective over all PEs. 0 where NVSHMEM has too little.
Address allocate(int64_t bytes);

// Whether kernels store straight into the memory of `pe`, for symmetric memory at `address`.
bool is_mapped(Address address, int pe);

// What carries a put to a PE that is not mapped: "ibgda", "proxy" (a CPU thread posts it) or "none".
std::string remote_transport();

std::array<int, 3> built_version();
std::array<int, 3> loaded_version();

}  // namespace deepep_moe
