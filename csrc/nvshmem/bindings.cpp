// deepep_moe._nvshmem: kernels that put rows into other nodes' memory, as Python sees them. Typed in
// deepep_moe/_nvshmem.pyi. A module of its own, so that deepep_moe._C needs no NVSHMEM.
#include "nvshmem/bindings.h"

#include <pybind11/stl.h>

#include "nvshmem/args.h"
#include "nvshmem/world.h"

namespace py = pybind11;
using namespace deepep_moe;

namespace {

void bind_world(py::module_& m) {
    using Released = py::call_guard<py::gil_scoped_release>;
    m.def("new_unique_id", [] { return py::bytes(new_unique_id()); });
    m.def("is_started", &is_started);
    m.def("start", &start, py::arg("rank"), py::arg("num_ranks"), py::arg("id"), py::arg("device"), Released());
    m.def("finish", &finish, Released());
    m.def("this_pe", &this_pe);
    m.def("num_pes", &num_pes);
    m.def("allocate", &allocate, py::arg("num_bytes"), Released());
    m.def("mapped_address", &mapped_address, py::arg("address"), py::arg("pe"));
    m.def("remote_transport", &remote_transport);
    m.def("built_version", &built_version);
    m.def("loaded_version", &loaded_version);
}

Waiting waiting(Address record, Address failed, double timeout_seconds) {
    return {at<RailFailure>(record), at<int>(failed), static_cast<uint64_t>(timeout_seconds * 1e9)};
}

void bind_probe(py::module_& m) {
    m.def(
        "probe",
        [](Address record, Address failed, double timeout_seconds, int rank, int to, int from, int to_pe, int from_pe,
           Address sent, Address received, Address arrived, Address taken, uint64_t first_round, int rounds, int chunks,
           int chunk_bytes, bool check, Address wrong, Address stream) {
            ProbeArgs args{};
            args.waiting = waiting(record, failed, timeout_seconds);
            args.rank = rank;
            args.to = to;
            args.from = from;
            args.to_pe = to_pe;
            args.from_pe = from_pe;
            args.sent = at<char>(sent);
            args.received = at<char>(received);
            args.arrived = at<uint64_t>(arrived);
            args.taken = at<uint64_t>(taken);
            args.first_round = first_round;
            args.rounds = rounds;
            args.chunks = chunks;
            args.chunk_bytes = chunk_bytes;
            args.check = check;
            args.wrong = at<unsigned long long>(wrong);
            deepep_moe::check(launch_probe(args, as_stream(stream)), "probe");
        },
        py::kw_only(), py::arg("record"), py::arg("failed"), py::arg("timeout_seconds"), py::arg("rank"), py::arg("to"),
        py::arg("from_"), py::arg("to_pe"), py::arg("from_pe"), py::arg("sent"), py::arg("received"),
        py::arg("arrived"), py::arg("taken"), py::arg("first_round"), py::arg("rounds"), py::arg("chunks"),
        py::arg("chunk_bytes"), py::arg("check"), py::arg("wrong"), py::arg("stream"));
}

RailArgs rail_args(Address record, Address state, Address signals, Address pes, int rank, int num_ranks, int region,
                   double timeout_seconds) {
    const int peers = num_ranks - 1;
    RailArgs args{};
    args.record = at<RailFailure>(record);
    args.state = at<RailState>(state);
    args.signals.begun = at<uint64_t>(signals);
    args.signals.given_up = args.signals.begun + peers;
    args.signals.arrived = args.signals.given_up + peers;
    args.pes = at<int>(pes);
    args.rank = rank;
    args.num_ranks = num_ranks;
    args.region = region;
    args.timeout_nanoseconds = static_cast<uint64_t>(timeout_seconds * 1e9);
    return args;
}

void bind_rail(py::module_& m) {
    m.attr("MAX_CHUNKS") = kMaxChunks;
    m.attr("RAIL_REGIONS") = kRailRegions;
    m.attr("RAIL_STATE_BYTES") = sizeof(RailState);
    m.attr("RAIL_FAILURE_WORDS") = sizeof(RailFailure) / sizeof(long long);
    py::enum_<RailPhase>(m, "RailPhase", py::arithmetic())
        .value("START", kRailStart)
        .value("ROWS", kRailRows)
        .value("GIVEN_UP", kRailGivenUp);
    m.def(
        "rail_signal_bytes",
        [](int num_ranks) {
            const int64_t arrived = int64_t{kRailRegions} * kMaxChunks * kPiecesPerBlock;
            return (num_ranks - 1) * (2 + arrived) * static_cast<int64_t>(sizeof(uint64_t));
        },
        py::arg("num_ranks"));
    py::class_<RailArgs>(m, "RailArgs")
        .def(py::init(&rail_args), py::kw_only(), py::arg("record"), py::arg("state"), py::arg("signals"),
             py::arg("pes"), py::arg("rank"), py::arg("num_ranks"), py::arg("region"), py::arg("timeout_seconds"));
    py::class_<RailChunk>(m, "RailChunk")
        .def(py::init(
                 [](int chunk, bool last, int block_rows, int row_bytes, Address used, Address sent, Address received) {
                     return RailChunk{chunk,         last,           block_rows,        row_bytes,
                                      at<int>(used), at<char>(sent), at<char>(received)};
                 }),
             py::kw_only(), py::arg("chunk"), py::arg("last"), py::arg("block_rows"), py::arg("row_bytes"),
             py::arg("used"), py::arg("sent"), py::arg("received"));
    m.def("rail_begin", [](const RailArgs& args, Address stream) {
        check(launch_rail_begin(args, as_stream(stream)), "beginning an operation between nodes");
    });
    m.def("rail_put", [](const RailArgs& args, const RailChunk& chunk, Address stream) {
        check(launch_rail_put(args, chunk, as_stream(stream)), "sending rows between nodes");
    });
    m.def("rail_wait", [](const RailArgs& args, const RailChunk& chunk, Address stream) {
        check(launch_rail_wait(args, chunk, as_stream(stream)), "waiting for rows between nodes");
    });
    m.def("rail_give_up", [](const RailArgs& args, Address stream) {
        check(launch_rail_give_up(args, as_stream(stream)), "giving up between nodes");
    });
}

}  // namespace

PYBIND11_MODULE(_nvshmem, m) {
    m.doc() = "Rows between nodes by NVSHMEM: puts with signals from kernels.";
    m.attr("ARCHITECTURES") = DEEPEP_MOE_ARCHITECTURES;  // from setup.py
    bind_world(m);
    bind_probe(m);
    bind_rail(m);
    narrow::bind_latency(m);
    py::module_ submodule = m.def_submodule("wide", "The latency engine for more ranks.");
    wide::bind_latency(submodule);
}
