// Python bindings: the module deepep_moe._C. Its types are in deepep_moe/_C.pyi.
//
// This file binds the enumerations; the domain, each engine and the local kernels have bindings files of their own.
#include "bindings.h"

#include <pybind11/pybind11.h>

#include "local/args.h"
#include "runtime/domain.h"
#include "tensors.h"

namespace py = pybind11;
using namespace deepep_moe;

namespace {

void bind_enumerations(py::module_& m) {
    py::enum_<Failure>(m, "Failure", py::arithmetic())
        .value("TIMEOUT", kTimeout)
        .value("PEER_FAILED", kPeerFailed)
        .value("MISMATCH", kMismatch)
        .value("BAD_EXPERT", kBadExpert)
        .value("RECV_OVERFLOW", kRecvOverflow)
        .value("ROWS_OVERFLOW", kRowsOverflow)
        .value("STAGING", kStaging)
        .value("BAD_PEER_INPUT", kBadPeerInput)
        .value("REPEATED_EXPERT", kRepeatedExpert)
        .value("CHANGED_ROUTE", kChangedRoute);
    py::enum_<Phase>(m, "Phase", py::arithmetic())
        .value("PLAN_COUNTS", kPlanCounts)
        .value("PLAN_PLACES", kPlanPlaces)
        .value("DISPATCH_START", kDispatchStart)
        .value("DISPATCH_ROWS", kDispatchRows)
        .value("COMBINE_START", kCombineStart)
        .value("COMBINE_ROWS", kCombineRows)
        .value("GROW_STAGING", kGrowStaging)
        .value("REFUSED", kRefused)
        .value("LOW_LATENCY_DISPATCH", kLowLatencyDispatch)
        .value("LOW_LATENCY_COMBINE", kLowLatencyCombine);
    py::enum_<Field>(m, "Field", py::arithmetic())
        .value("NUM_EXPERTS", kNumExperts)
        .value("NUM_TOPK", kNumTopk)
        .value("ALIGNMENT", kAlignment)
        .value("OPERATION", kOperation)
        .value("PLAN_NUMBER", kPlanNumber)
        .value("FORMAT", kFormat)
        .value("ROW_BYTES", kRowBytes)
        .value("MAX_TOKENS", kMaxTokens)
        .value("HIDDEN", kHidden)
        .value("ROW_FORMAT", kRowFormat)
        .value("HANDLE", kHandle);
    py::enum_<DataType>(m, "DataType")
        .value("FLOAT32", DataType::kFloat32)
        .value("BFLOAT16", DataType::kBFloat16)
        .value("FLOAT16", DataType::kFloat16);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CUDA runtime of deepep_moe: a Domain per rank and process group, and the engines on it.";
    m.attr("ARCHITECTURES") = DEEPEP_MOE_ARCHITECTURES;  // from setup.py
    bind_enumerations(m);
    py::class_<TensorSignatures>(m, "TensorSignatures")
        .def(py::init<int, int>(), py::arg("device_type"), py::arg("device_index"))
        .def("of", &TensorSignatures::of<py::handle, py::handle, py::handle, py::handle>)
        .def("of", &TensorSignatures::of<py::handle, py::handle, py::handle, py::handle, py::handle>);
    narrow::bind_domain(m);
    bind_local(m);
    bind_nodes(m);
    bind_throughput(m);
    bind_bench(m);
    narrow::bind_latency(m);
    py::module_ submodule = m.def_submodule("wide", "A Domain of more ranks, and the latency engine on it.");
    wide::bind_domain(submodule);
    wide::bind_latency(submodule);
}
