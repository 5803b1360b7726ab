// deepep_moe._C: the runtime as Python sees it. Typed in deepep_moe/_C.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "runtime/buffer.h"

namespace py = pybind11;
using deepep_moe::Address;
using deepep_moe::Buffer;

PYBIND11_MODULE(_C, m) {
    m.doc() = "CUDA runtime of deepep_moe: one Buffer per rank and process group.";
    m.attr("MAX_RANKS") = deepep_moe::kMaxRanks;
    m.attr("MAX_TOPK") = deepep_moe::kMaxTopk;
    m.attr("MAX_EXPERTS") = deepep_moe::kMaxExperts;
    m.attr("ARCHITECTURES") = DEEPEP_MOE_ARCHITECTURES;  // from setup.py

    m.def("routes", [](Address routing_map, Address probs, int dtype, int num_tokens, int num_experts, int num_topk,
                       Address topk_idx, Address weights, bool backward, Address stream) {
        const deepep_moe::RoutesArgs args{reinterpret_cast<const bool*>(routing_map),
                                          reinterpret_cast<void*>(probs),
                                          num_tokens,
                                          num_experts,
                                          num_topk,
                                          reinterpret_cast<int64_t*>(topk_idx),
                                          reinterpret_cast<float*>(weights)};
        const cudaError_t status = deepep_moe::launch_routes(args, static_cast<deepep_moe::DataType>(dtype), backward,
                                                             reinterpret_cast<cudaStream_t>(stream));
        if (status != cudaSuccess) throw std::runtime_error(std::string("routes: ") + cudaGetErrorString(status));
    });

    py::class_<Buffer>(m, "Buffer")
        .def(py::init<int, int, int, double, bool>(), py::arg("rank"), py::arg("num_ranks"), py::arg("device"),
             py::arg("timeout_seconds"), py::arg("record_waits"))
        .def_static("control_bytes", &Buffer::control_bytes)
        .def_static("staging_bytes", &Buffer::staging_bytes)
        .def("set_control", &Buffer::set_control)
        .def("set_staging", &Buffer::set_staging)
        .def("layout", &Buffer::layout)
        .def("begin_plan", &Buffer::begin_plan)
        .def("wait_plan",
             [](Buffer& self, Address expert_counts) -> py::object {
                 std::optional<deepep_moe::PlanNumbers> numbers;
                 {
                     py::gil_scoped_release release;
                     numbers = self.wait_plan(expert_counts);
                 }
                 if (!numbers) return py::none();
                 return py::make_tuple(numbers->num_recv, numbers->num_rows, numbers->max_tokens, numbers->failed);
             })
        .def("place_plan", &Buffer::place_plan)
        .def("set_route", &Buffer::set_route)
        .def("dispatch", &Buffer::dispatch)
        .def("combine", &Buffer::combine)
        .def("take_failure",
             [](Buffer& self, bool lasting_only) -> py::object {
                 const auto report = self.take_failure(lasting_only);
                 if (!report) return py::none();
                 return py::make_tuple(report->failure, report->phase, report->peer, report->field, report->expected,
                                       report->seen);
             })
        .def("wait_seconds", &Buffer::wait_seconds);

    m.def("weigh", [](Address x, Address rows, Address weights, Address row_recv, Address out, Address sums, int dtype,
                      int num_rows, int row_bytes, Address stream) {
        const deepep_moe::WeighArgs args{reinterpret_cast<const char*>(x),
                                         reinterpret_cast<const char*>(rows),
                                         reinterpret_cast<const float*>(weights),
                                         reinterpret_cast<const int*>(row_recv),
                                         reinterpret_cast<char*>(out),
                                         reinterpret_cast<float*>(sums),
                                         num_rows,
                                         row_bytes};
        const cudaError_t status = deepep_moe::launch_weigh(args, static_cast<deepep_moe::DataType>(dtype),
                                                            reinterpret_cast<cudaStream_t>(stream));
        if (status != cudaSuccess) throw std::runtime_error(std::string("weigh: ") + cudaGetErrorString(status));
    });
}
