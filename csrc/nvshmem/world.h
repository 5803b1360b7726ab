// NVSHMEM on the host: initialisation, symmetric memory, and the transport to each PE. A PE is a process, as numbered
// by NVSHMEM. Does not depend on NVSHMEM's headers.
#pragma once

#include <array>
#include <string>

#include "runtime/domain.h"

namespace deepep_moe {

// A new unique id, 128 bytes, which all processes pass to start(). Needs no GPU.
std::string new_unique_id();

// Whether NVSHMEM is initialised in this process, by this module or another library.
bool is_started();

// Initialise NVSHMEM, or only this module's device state if is_started(): `id` is then not used and the PEs stay what
// they are. Collective over all processes that pass `id`.
void start(int rank, int num_ranks, const std::string& id, int device);

// Finalise NVSHMEM. Collective over all PEs.
void finish();

int this_pe();
int num_pes();

// Allocate zeroed symmetric memory. Collective over all PEs. Returns 0 on failure.
Address allocate(int64_t bytes);

// Where the memory of `pe` is mapped here, so that puts to it are stores (P2P), or 0. `address`: of symmetric memory.
Address mapped_address(Address address, int pe);

// The transport to PEs that are not mapped: "ibgda", "proxy" (a CPU thread posts transfers) or "none".
std::string remote_transport();

std::array<int, 3> built_version();
std::array<int, 3> loaded_version();

}  // namespace deepep_moe
