// The latency engine over several nodes as Python sees it: what deepep_moe._C has set up, and launches.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "nvshmem/bindings.h"
#include "nvshmem/latency.h"

namespace py = pybind11;

namespace deepep_moe::DEEPEP_MOE_WIDTH {

namespace {

using namespace latency;

// A struct that deepep_moe._C wrote into a bytes object. Both modules are built from the same headers.
template <typename T>
T unpack(const py::bytes& bytes, const char* name) {
    const std::string_view view = bytes;
    if (view.size() != sizeof(T))
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(view.size()) + " bytes, not " +
                                    std::to_string(sizeof(T)) + ": deepep_moe._C is of another build");
    T value;
    std::memcpy(&value, view.data(), sizeof(T));
    return value;
}

Remote remote(const py::bytes& runtime, const std::vector<int>& pes, const std::vector<int>& ranks, Address signals,
              Address posted) {
    Remote made{};
    made.runtime = unpack<Runtime>(runtime, "runtime");
    for (size_t r = 0; r < pes.size() && r < kMaxRanks; ++r) made.pes[r] = pes[r];
    made.ranks = set_of(ranks);
    made.signals = at<Signals>(signals);
    made.posted = at<Posted>(posted);
    return made;
}

void exchange(const Remote& remote, const py::bytes& arena, int step, bool puts, bool waits, bool refuses,
              int num_tokens, Address topk_idx, bool wide_idx, int num_topk, int num_experts, int format,
              Address places, Address epoch, Address wait_stats, Address stream) {
    ExchangeArgs args{};
    args.remote = remote;
    args.arena = unpack<Arena>(arena, "arena");
    args.topk_idx = {at<void>(topk_idx), wide_idx};
    args.num_tokens = num_tokens;
    args.num_topk = num_topk;
    args.num_experts = num_experts;
    args.format = static_cast<Format>(format);
    args.places = {at<int>(places)};
    args.epoch = at<int>(epoch);
    args.puts = puts;
    args.waits = waits;
    args.refuses = refuses;
    args.wait_stats = at<unsigned long long>(wait_stats);
    check(launch_exchange(args, static_cast<Step>(step), as_stream(stream)), "exchanging with ranks of other nodes");
}

}  // namespace

void bind_latency(py::module_& m) {
    m.attr("LATENCY_SIGNAL_BYTES") = sizeof(Signals);
    m.attr("LATENCY_POSTED_BYTES") = sizeof(Posted);
    py::enum_<Step>(m, "LatencyStep", py::arithmetic())
        .value("DISPATCH", kDispatchStep)
        .value("TABLES", kTablesStep)
        .value("ROWS", kRowsStep);
    py::class_<Remote>(m, "LatencyRemote")
        .def(py::init(&remote), py::kw_only(), py::arg("runtime"), py::arg("pes"), py::arg("ranks"), py::arg("signals"),
             py::arg("posted"))
        .def("exchange", &exchange, py::kw_only(), py::arg("arena"), py::arg("step"), py::arg("puts"), py::arg("waits"),
             py::arg("refuses"), py::arg("num_tokens"), py::arg("topk_idx"), py::arg("wide_idx"), py::arg("num_topk"),
             py::arg("num_experts"), py::arg("format"), py::arg("places"), py::arg("epoch"), py::arg("wait_stats"),
             py::arg("stream"))
        .def(
            "post",
            [](const Remote& self, Address stream) {
                check(launch_post(self, as_stream(stream)), "confirming to ranks of other nodes");
            },
            py::arg("stream"))
        .def(
            "announce",
            [](const Remote& self, bool withdrawn, Address stream) {
                check(launch_put_announcement(self, withdrawn, as_stream(stream)), "announcing a low-latency dispatch");
            },
            py::arg("withdrawn"), py::arg("stream"))
        .def(
            "announce_refusal",
            [](const Remote& self, Address others, Address stream) {
                check(launch_remote_announce_refusal(self, at<int>(others), as_stream(stream)), "announcing a refusal");
            },
            py::arg("others"), py::arg("stream"))
        .def(
            "refuse",
            [](const Remote& self, int kind, Address source, Address epoch, Address stream) {
                check(launch_remote_refusal(self, static_cast<Kind>(kind), at<int>(source), at<int>(epoch),
                                            as_stream(stream)),
                      "refusing a low-latency call");
            },
            py::arg("kind"), py::arg("source"), py::arg("epoch"), py::arg("stream"))
        .def(
            "meet",
            [](const Remote& self, bool second, const std::vector<int>& lift, Address stream) {
                check(launch_remote_meet(self, second, set_of(lift), as_stream(stream)), "ending masks");
            },
            py::arg("second"), py::arg("lift"), py::arg("stream"));
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH
