#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstring>

#include "nvshmem/world.h"

namespace deepep_moe {

namespace {

bool started_host_library = false;

void check_nvshmem(int status, const char* what) {
    if (status != 0)
        throw std::runtime_error(std::string(what) + " failed with NVSHMEM status " + std::to_string(status) +
                                 "; NVSHMEM_DEBUG=WARN prints the reason");
}

}  // namespace

std::string new_unique_id() {
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    check_nvshmem(nvshmemx_get_uniqueid(&id), "nvshmemx_get_uniqueid");
    return std::string(reinterpret_cast<const char*>(&id), sizeof(id));
}

bool is_started() {
    const int status = nvshmemx_init_status();
    return status >= NVSHMEM_STATUS_IS_INITIALIZED && status != NVSHMEM_STATUS_INVALID;
}

void start(int rank, int num_ranks, const std::string& id, int device) {
    nvshmemx_uniqueid_t unique_id = NVSHMEMX_UNIQUEID_INITIALIZER;
    if (id.size() != sizeof(unique_id))
        throw std::invalid_argument("id has " + std::to_string(id.size()) + " bytes, not " +
                                    std::to_string(sizeof(unique_id)));
    std::memcpy(&unique_id, id.data(), sizeof(unique_id));
    check(cudaSetDevice(device), "cudaSetDevice");
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    check_nvshmem(nvshmemx_set_attr_uniqueid_args(rank, num_ranks, &unique_id, &attributes),
                  "nvshmemx_set_attr_uniqueid_args");
    // nvshmemx_init_attr exits the process on failure, so the host library is initialised by a separate call first.
    started_host_library = !is_started();
    if (started_host_library) {
        const int status = nvshmemx_hostlib_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes);
        check_nvshmem(status, "nvshmemx_hostlib_init_attr");
        if (!is_started())
            throw std::runtime_error("NVSHMEM did not start: status " + std::to_string(nvshmemx_init_status()));
    }
    // Each shared library with NVSHMEM kernels has its own device state; this initialises the one of this module.
    check_nvshmem(nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes), "nvshmemx_init_attr");
}

void finish() {
    nvshmem_finalize();
    if (started_host_library) nvshmemx_hostlib_finalize();
}

int this_pe() { return nvshmem_my_pe(); }

int num_pes() { return nvshmem_n_pes(); }

Address allocate(int64_t bytes) { return reinterpret_cast<Address>(nvshmem_calloc(1, static_cast<size_t>(bytes))); }

Address mapped_address(Address address, int pe) {
    return reinterpret_cast<Address>(nvshmem_ptr(at<void>(address), pe));
}

std::string remote_transport() {
    // NVSHMEM has no public call for this. The layout of the structure is versioned.
    nvshmemi_device_host_state_t state;
    check(cudaMemcpyFromSymbol(&state, nvshmemi_device_state_d, sizeof(state)), "reading NVSHMEM's device state");
    if (state.ibgda_is_initialized) return "ibgda";
    return state.job_connectivity >= NVSHMEMI_JOB_GPU_PROXY ? "proxy" : "none";
}

std::array<int, 3> built_version() {
    return {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};
}

std::array<int, 3> loaded_version() {
    std::array<int, 3> version{};
    nvshmemx_vendor_get_version_info(&version[0], &version[1], &version[2]);
    return version;
}

}  // namespace deepep_moe
