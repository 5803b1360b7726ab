// The domain as Python sees it.
#include "bindings.h"

#include <pybind11/stl.h>

#include <memory>

#include "runtime/domain.h"

namespace py = pybind11;

namespace deepep_moe::DEEPEP_MOE_WIDTH {

namespace {

py::object report_tuple(const std::optional<FailureReport>& report) {
    if (!report) return py::none();
    return py::make_tuple(report->failure, report->phase, report->peer, report->field, report->expected, report->seen);
}

}  // namespace

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

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH
