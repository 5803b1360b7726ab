// Functions that add the bindings of each part to deepep_moe._C.
#pragma once

#include <pybind11/pybind11.h>

namespace deepep_moe {

void bind_nodes(pybind11::module_& m);
void bind_local(pybind11::module_& m);
void bind_throughput(pybind11::module_& m);
void bind_bench(pybind11::module_& m);
void bind_latency(pybind11::module_& m);

}  // namespace deepep_moe
