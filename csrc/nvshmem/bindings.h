// The functions with which each part adds its bindings to deepep_moe._nvshmem.
#pragma once

#include <pybind11/pybind11.h>

namespace deepep_moe {

void bind_latency(pybind11::module_& m);

}  // namespace deepep_moe
