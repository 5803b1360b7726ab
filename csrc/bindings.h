// Functions that add the bindings of each part to deepep_moe._C, and an argument that two of them take.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "local/args.h"
#include "runtime/ranks.h"

namespace deepep_moe {

using HeaderWords = std::array<int64_t, Messages::kAgreedWords>;

inline Header header_of(const HeaderWords& words) {
    Header header{};
    std::copy(words.begin(), words.end(), header.words);
    return header;
}

void bind_nodes(pybind11::module_& m);
void bind_local(pybind11::module_& m);
void bind_throughput(pybind11::module_& m);
void bind_bench(pybind11::module_& m);

// See csrc/runtime/ranks.h.
namespace narrow {
void bind_domain(pybind11::module_& m);
void bind_latency(pybind11::module_& m);
}  // namespace narrow
namespace wide {
void bind_domain(pybind11::module_& m);
void bind_latency(pybind11::module_& m);
}  // namespace wide

}  // namespace deepep_moe
