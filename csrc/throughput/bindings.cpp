// Python bindings of the throughput engine. Arguments are keyword-only, because there are many of the same type.
#include "bindings.h"

#include <pybind11/stl.h>

#include "throughput/engine.h"

namespace py = pybind11;

namespace deepep_moe {

namespace {

void bind_limits(py::module_& m) {
    m.attr("MAX_TOPK") = kMaxTopk;
    m.attr("MAX_EXPERTS") = kMaxExperts;
    m.attr("NO_EXPERT_ROWS") = PlanArgs::kNoExpertRows;
    py::enum_<Format>(m, "Format")
        .value("AS_GIVEN", Format::kAsGiven)
        .value("TO_FP8", Format::kToFp8)
        .value("THROUGH_FP8", Format::kThroughFp8);
    py::enum_<Operation::Kind>(m, "OperationKind", py::arithmetic())
        .value("DISPATCH", Operation::kDispatch)
        .value("COMBINE", Operation::kCombine)
        .value("GROW", Operation::kGrow)
        .value("REFUSE", Operation::kRefuse)
        .value("PLAN", Operation::kPlan);
    m.attr("OPERATION_BY_EXPERT") = static_cast<int>(Operation::kByExpert);
    m.attr("OPERATION_WITH_WEIGHTS") = static_cast<int>(Operation::kWithWeights);
}

void bind_route(py::module_& m) {
    py::class_<Route>(m, "Route")
        .def(py::init([](int plan, int num_tokens, int num_topk, int max_recv, int max_rows, Address send_slot,
                         Address counted, Address received, Address row_recv, bool grouped) {
                 Route route{};
                 route.plan = plan;
                 route.num_tokens = num_tokens;
                 route.num_topk = num_topk;
                 route.max_recv = max_recv;
                 route.max_rows = max_rows;
                 route.send_slot = at<int>(send_slot);
                 route.rank_prefix = at<int64_t>(counted);  // its first part
                 route.received = at<int>(received);
                 route.row_recv = at<int>(row_recv);
                 route.grouped = grouped;
                 return route;
             }),
             py::kw_only(), py::arg("plan"), py::arg("num_tokens"), py::arg("num_topk"), py::arg("max_recv"),
             py::arg("max_rows"), py::arg("send_slot"), py::arg("counted"), py::arg("received"), py::arg("row_recv"),
             py::arg("grouped"));
}

void begin_plan(ThroughputEngine& self, Address topk_idx, Address given_membership, Address given_expert_counts,
                int num_tokens, int num_topk, int num_experts, int alignment, bool wait, int max_recv, int max_rows,
                Address stream) {
    PlanRequest request{};
    request.topk_idx = topk_idx;
    request.given_membership = given_membership;
    request.given_expert_counts = given_expert_counts;
    request.num_tokens = num_tokens;
    request.num_topk = num_topk;
    request.num_experts = num_experts;
    request.alignment = alignment;
    request.wait = wait;
    request.max_recv = max_recv;
    request.max_rows = max_rows;
    self.begin_plan(request, stream);
}

void place_plan(ThroughputEngine& self, Address send_slot, Address counted, Address received, Address row_recv,
                int max_recv, int max_rows, int num_blocks, Address stream) {
    PlanMemory memory{};
    memory.send_slot = send_slot;
    memory.counted = counted;
    memory.received = received;
    memory.row_recv = row_recv;
    memory.max_recv = max_recv;
    memory.max_rows = max_rows;
    self.place_plan(memory, num_blocks, stream);
}

py::object wait_plan(ThroughputEngine& self, Address expert_counts) {
    std::optional<PlanNumbers> numbers;
    {
        py::gil_scoped_release release;
        numbers = self.wait_plan(expert_counts);
    }
    if (!numbers) return py::none();
    return py::make_tuple(numbers->num_recv, numbers->num_rows, numbers->max_tokens, numbers->failed);
}

void dispatch(ThroughputEngine& self, const Route& route, Format format, int format_code, int row_bytes, int pitch,
              Address x, int64_t x_stride, Address scales, int64_t scale_row_stride, int64_t scale_channel_stride,
              int num_scales, bool with_weights, Address weights, int64_t weights_stride, Address out,
              Address out_scales, int64_t out_scale_row_stride, int64_t out_scale_channel_stride, Address out_weights,
              int num_blocks, int num_send_blocks, Address stream) {
    DispatchRequest request{};
    request.format = static_cast<int>(format);
    request.format_code = format_code;
    request.row_bytes = row_bytes;
    request.pitch = pitch;
    request.x = x;
    request.x_stride = x_stride;
    request.scales = scales;
    request.scale_row_stride = scale_row_stride;
    request.scale_channel_stride = scale_channel_stride;
    request.num_scales = num_scales;
    request.with_weights = with_weights;
    request.weights = weights;
    request.weights_stride = weights_stride;
    request.out = out;
    request.out_scales = out_scales;
    request.out_scale_row_stride = out_scale_row_stride;
    request.out_scale_channel_stride = out_scale_channel_stride;
    request.out_weights = out_weights;
    request.num_blocks = num_blocks;
    request.num_send_blocks = num_send_blocks;
    self.dispatch(route, request, stream);
}

void combine(ThroughputEngine& self, const Route& route, DataType dtype, int format_code, int row_bytes, int pitch,
             Address x, Address weights, bool apply_weights, bool carry_weights, Address bias0, Address bias1,
             Address out, int64_t out_stride, Address out_weights, int64_t out_weights_stride, int num_blocks,
             int num_send_blocks, Address stream) {
    CombineRequest request{};
    request.dtype = static_cast<int>(dtype);
    request.format_code = format_code;
    request.row_bytes = row_bytes;
    request.pitch = pitch;
    request.x = x;
    request.weights = weights;
    request.apply_weights = apply_weights;
    request.carry_weights = carry_weights;
    request.bias0 = bias0;
    request.bias1 = bias1;
    request.out = out;
    request.out_stride = out_stride;
    request.out_weights = out_weights;
    request.out_weights_stride = out_weights_stride;
    request.num_blocks = num_blocks;
    request.num_send_blocks = num_send_blocks;
    self.combine(route, request, stream);
}

}  // namespace

void bind_throughput(py::module_& m) {
    bind_limits(m);
    bind_route(m);
    using Engine = ThroughputEngine;
    py::class_<Engine>(m, "ThroughputEngine")
        .def(py::init<std::shared_ptr<DomainRuntime>>(), py::arg("domain"))
        .def_static("control_bytes", &Engine::control_bytes)
        .def_static("staging_bytes", &Engine::staging_bytes)
        .def("set_control", &Engine::set_control)
        .def("set_staging", &Engine::set_staging)
        .def("destinations", &Engine::destinations, py::kw_only(), py::arg("topk_idx"), py::arg("num_tokens"),
             py::arg("num_topk"), py::arg("num_experts"), py::arg("num_tokens_per_rank"),
             py::arg("num_tokens_per_expert"), py::arg("is_token_in_rank"), py::arg("stream"))
        .def("begin_plan", &begin_plan, py::kw_only(), py::arg("topk_idx"), py::arg("given_membership"),
             py::arg("given_expert_counts"), py::arg("num_tokens"), py::arg("num_topk"), py::arg("num_experts"),
             py::arg("alignment"), py::arg("wait"), py::arg("max_recv"), py::arg("max_rows"), py::arg("stream"))
        .def("refuse_plan", &Engine::refuse_plan)
        .def("wait_plan", &wait_plan)
        .def("place_plan", &place_plan, py::kw_only(), py::arg("send_slot"), py::arg("counted"), py::arg("received"),
             py::arg("row_recv"), py::arg("max_recv"), py::arg("max_rows"), py::arg("num_blocks"), py::arg("stream"))
        .def("dispatch", &dispatch, py::arg("route"), py::kw_only(), py::arg("format"), py::arg("format_code"),
             py::arg("row_bytes"), py::arg("pitch"), py::arg("x"), py::arg("x_stride"), py::arg("scales"),
             py::arg("scale_row_stride"), py::arg("scale_channel_stride"), py::arg("num_scales"),
             py::arg("with_weights"), py::arg("weights"), py::arg("weights_stride"), py::arg("out"),
             py::arg("out_scales"), py::arg("out_scale_row_stride"), py::arg("out_scale_channel_stride"),
             py::arg("out_weights"), py::arg("num_blocks"), py::arg("num_send_blocks"), py::arg("stream"))
        .def("combine", &combine, py::arg("route"), py::kw_only(), py::arg("dtype"), py::arg("format_code"),
             py::arg("row_bytes"), py::arg("pitch"), py::arg("x"), py::arg("weights"), py::arg("apply_weights"),
             py::arg("carry_weights"), py::arg("bias0"), py::arg("bias1"), py::arg("out"), py::arg("out_stride"),
             py::arg("out_weights"), py::arg("out_weights_stride"), py::arg("num_blocks"), py::arg("num_send_blocks"),
             py::arg("stream"))
        .def("refuse_operation", &Engine::refuse_operation)
        .def("meet_to_grow", &Engine::meet_to_grow)
        .def("keep_scratch", &Engine::keep_scratch)
        .def("scratch_serves", &Engine::scratch_serves)
        .def("set_epochs", &Engine::set_epochs);
}

}  // namespace deepep_moe
