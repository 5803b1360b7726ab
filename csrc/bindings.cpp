// Python bindings: the module deepep_moe._C. Its types are in deepep_moe/_C.pyi.
//
// This file binds the domain and the enumerations; each engine and the local kernels have bindings files of their own.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "local/args.h"
#include "runtime/domain.h"

namespace py = pybind11;
using namespace deepep_moe;

namespace {

py::object report_tuple(const std::optional<FailureReport>& report) {
    if (!report) return py::none();
    return py::make_tuple(report->failure, report->phase, report->peer, report->field, report->expected, report->seen);
}

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

void bind_domain(py::module_& m) {
    m.attr("MAX_RANKS") = kMaxRanks;
    py::class_<DomainRuntime, std::shared_ptr<DomainRuntime>>(m, "Domain")
        .def(py::init<int, int, int, double, bool>(), py::arg("rank"), py::arg("num_ranks"), py::arg("device"),
             py::arg("timeout_seconds"), py::arg("record_waits"))
        .def_static("mailbox_bytes", &DomainRuntime::mailbox_bytes)
        .def("set_mailboxes", &DomainRuntime::set_mailboxes)
        .def_property_readonly("failure", [](const DomainRuntime& self) { return report_tuple(self.failure()); })
        .def_property_readonly("notice", [](const DomainRuntime& self) { return report_tuple(self.notice()); })
        .def_property_readonly("broken", &DomainRuntime::broken)
        .def("resume", &DomainRuntime::resume)
        .def("take_notice", &DomainRuntime::take_notice)
        .def("give_up", &DomainRuntime::give_up)
        .def("wait_seconds", &DomainRuntime::wait_seconds);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CUDA runtime of deepep_moe: a Domain per rank and process group, and the engines on it.";
    m.attr("ARCHITECTURES") = DEEPEP_MOE_ARCHITECTURES;  // from setup.py
    bind_enumerations(m);
    bind_domain(m);
    bind_local(m);
    bind_nodes(m);
    bind_throughput(m);
    bind_bench(m);
    bind_latency(m);
}
