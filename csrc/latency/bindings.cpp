// The latency engine as Python sees it.
#include "bindings.h"

#include <pybind11/stl.h>

#include "latency/engine.h"
#include "tensors.h"

namespace py = pybind11;

namespace deepep_moe::DEEPEP_MOE_WIDTH {

namespace {

using namespace latency;

// The bytes of a struct, for the kernels of another module.
template <typename T>
py::bytes pack(const T& value) {
    return {reinterpret_cast<const char*>(&value), sizeof(T)};
}

// What the calls of a shape have in common.
struct Shape {
    Arena arena;
    Format format;
    int num_tokens, num_topk, num_experts;
    bool wide_idx;                          // of the dispatch
    int ranges_at, src_info_at, counts_at;  // in the call's memory, in words; its places come first
};

// Arguments are positional: looking up a name costs as much as passing the value.
int dispatch(LatencyEngine& self, const Shape& shape, int half, py::handle x, py::handle topk_idx, py::handle memory,
             py::handle rows, py::handle scales, py::handle stats, py::handle wait_stats, Address stream) {
    int* const words = at<int>(address_of(memory));
    DispatchArgs args{};
    args.arena = shape.arena;
    args.x = at<char>(address_of(x));
    args.topk_idx = {at<void>(address_of(topk_idx)), shape.wide_idx};
    args.num_tokens = shape.num_tokens;
    args.num_topk = shape.num_topk;
    args.num_experts = shape.num_experts;
    args.format = shape.format;
    args.places = {words};
    args.rows = at<char>(address_of(rows));
    args.scales = at<void>(address_of(scales));
    args.counts = words + shape.counts_at;
    args.src_info = words + shape.src_info_at;
    args.layout_range = reinterpret_cast<int64_t*>(words + shape.ranges_at);
    args.stats = at<int>(address_of(stats));
    args.wait_stats = at<unsigned long long>(address_of(wait_stats));
    return self.dispatch(args, static_cast<Half>(half), stream);
}

int combine(LatencyEngine& self, const Shape& shape, int half, py::handle x, py::handle topk_idx, bool wide_idx,
            py::handle weights, py::handle memory, py::handle epoch, py::handle out, py::handle wait_stats,
            Address stream) {
    CombineArgs args{};
    args.arena = shape.arena;
    args.x = at<char>(address_of(x));
    args.topk_idx = {at<void>(address_of(topk_idx)), wide_idx};
    args.weights = at<float>(address_of(weights));
    args.num_tokens = shape.num_tokens;
    args.num_topk = shape.num_topk;
    args.num_experts = shape.num_experts;
    args.format = shape.format;
    args.places = {at<int>(address_of(memory))};
    args.epoch = at<int>(address_of(epoch));
    args.out = at<char>(address_of(out));
    args.wait_stats = at<unsigned long long>(address_of(wait_stats));
    return self.combine(args, static_cast<Half>(half), stream);
}

void announce(LatencyEngine& self, int max_tokens, int hidden, int num_topk, int num_experts, int format,
              bool withdrawn, Address stream) {
    Facts facts{};
    facts.max_tokens = max_tokens;
    facts.key = hidden;
    facts.num_topk = num_topk;
    facts.num_experts = num_experts;
    facts.format = format;
    facts.announced = true;
    self.announce(facts, withdrawn, stream);
}

}  // namespace

void bind_latency(py::module_& m) {
    m.attr("LATENCY_BLOCKS_PER_SM") = kBlocksPerSm;
    m.attr("LATENCY_MAX_BLOCKS") = kMaxBlocks;
    m.attr("LATENCY_BROKEN") = static_cast<int>(kBroken);
    m.attr("LATENCY_ALLOCATING") = static_cast<int>(kAllocating);
    py::enum_<Kind>(m, "LatencyKind", py::arithmetic()).value("DISPATCH", kDispatch).value("COMBINE", kCombine);
    py::class_<Arena>(m, "LatencyArena")
        .def("pack", &pack<Arena>)
        .def_readonly("max_tokens", &Arena::max_tokens)
        .def_readonly("hidden", &Arena::hidden);
    py::class_<Shape>(m, "LatencyShape")
        .def(py::init([](const Arena& arena, int format, int num_tokens, int num_topk, int num_experts, bool wide_idx,
                         int ranges_at, int src_info_at, int counts_at) {
                 return Shape{arena,       static_cast<Format>(format),
                              num_tokens,  num_topk,
                              num_experts, wide_idx,
                              ranges_at,   src_info_at,
                              counts_at};
             }),
             py::kw_only(), py::arg("arena"), py::arg("format"), py::arg("num_tokens"), py::arg("num_topk"),
             py::arg("num_experts"), py::arg("wide_idx"), py::arg("ranges_at"), py::arg("src_info_at"),
             py::arg("counts_at"));
    using Engine = LatencyEngine;
    py::class_<Engine>(m, "LatencyEngine")
        .def(py::init<std::shared_ptr<DomainRuntime>, int, bool>(), py::arg("domain"), py::arg("num_blocks"),
             py::arg("masks"))
        .def_static("fewest_blocks", &Engine::fewest_blocks)
        .def_static("control_bytes", &Engine::control_bytes)
        .def_static("arena_bytes", &Engine::arena_bytes)
        .def_static("places_words", &Engine::places_words)
        .def("set_control", &Engine::set_control)
        .def("pack_runtime", [](const Engine& self) { return pack(self.runtime()); })
        .def("clear_rows", &Engine::clear_rows)
        .def("dispatch", &dispatch)
        .def("combine", &combine)
        .def("announce", &announce, py::kw_only(), py::arg("max_tokens"), py::arg("hidden"), py::arg("num_topk"),
             py::arg("num_experts"), py::arg("format"), py::arg("withdrawn"), py::arg("stream"))
        .def("add_arena", &Engine::add_arena)
        .def("announce_refusal", &Engine::announce_refusal)
        .def(
            "refuse",
            [](Engine& self, int kind, Address passed_on, Address source, Address stream) {
                self.refuse(static_cast<Kind>(kind), passed_on, source, stream);
            },
            py::kw_only(), py::arg("kind"), py::arg("passed_on"), py::arg("source"), py::arg("stream"))
        .def("set_mask", &Engine::set_mask)
        .def("query_mask", &Engine::query_mask)
        .def("lift_masks",
             [](Engine& self, const std::vector<int>& lift, Address stream) { self.lift_masks(set_of(lift), stream); });
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH
