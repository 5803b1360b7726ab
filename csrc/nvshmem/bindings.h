// The functions with which each part adds its bindings to deepep_moe._nvshmem.
#pragma once

#include <pybind11/pybind11.h>

#include "runtime/ranks.h"

namespace deepep_moe {

// See csrc/runtime/ranks.h.
namespace narrow {
void bind_latency(pybind11::module_& m);
}
namespace wide {
void bind_latency(pybind11::module_& m);
}

}  // namespace deepep_moe
