// The kernels that make plans of several nodes as Python sees them. Arguments go by name.
#include "bindings.h"

#include "nodes/args.h"
#include "runtime/domain.h"

namespace py = pybind11;

namespace deepep_moe {

namespace {

NodeMessages messages_of(const NodeMap& map, Address data, int experts, int room) {
    return {at<int64_t>(data), map.rail_before, map.num_ranks, map.num_nodes, experts, room};
}

void summarize(const NodeMap& map, Address topk_idx, int num_tokens, int num_topk, int num_experts, int64_t max_recv,
               int64_t max_rows, const HeaderWords& header, Address messages, int experts, int room, Address send_slot,
               Address send_position, Address stream) {
    SummarizeArgs args{};
    args.map = map;
    args.topk_idx = at<int64_t>(topk_idx);
    args.num_tokens = num_tokens;
    args.num_topk = num_topk;
    args.num_experts = num_experts;
    args.max_recv = max_recv;
    args.max_rows = max_rows;
    args.header = header_of(header);
    args.messages = messages_of(map, messages, experts, room);
    args.send_slot = at<int>(send_slot);
    args.send_position = at<int>(send_position);
    check(launch_summarize(args, as_stream(stream)), "summarize");
}

void digest(const NodeMap& map, Address messages, int experts, int room, int alignment, int64_t most_tokens,
            Address found, Address counted, Address moved, Address rail_tokens, Address bad, Address stream) {
    DigestArgs args{};
    args.map = map;
    args.messages = messages_of(map, messages, experts, room);
    args.num_experts = experts;
    args.alignment = alignment;
    args.most_tokens = most_tokens;
    args.found = at<int64_t>(found);
    args.counted = at<int64_t>(counted);
    args.moved = at<int64_t>(moved);
    args.rail_tokens = at<int64_t>(rail_tokens);
    args.bad = at<int>(bad);
    check(launch_digest(args, as_stream(stream)), "digest");
}

void batch(const NodeMap& map, Address messages, int experts, int message_room, Address bad, int room, int num_topk,
           Address routes, Address recv_position, Address stream) {
    BatchArgs args{};
    args.map = map;
    args.messages = messages_of(map, messages, experts, message_room);
    args.bad = at<int>(bad);
    args.room = room;
    args.num_topk = num_topk;
    args.num_experts = experts;
    args.routes = at<int64_t>(routes);
    args.recv_position = at<int>(recv_position);
    check(launch_batch(args, as_stream(stream)), "batch");
}

void place(const NodeMap& map, Address messages, int experts, int message_room, Address node_received,
           Address node_counted, Address moved, int num_recv, int num_rows, int room, int num_topk, Address received,
           Address row_recv, Address arrived, Address stream) {
    PlaceNodesArgs args{};
    args.map = map;
    args.messages = messages_of(map, messages, experts, message_room);
    args.node_received = at<int>(node_received);
    args.node_counted = at<int64_t>(node_counted);
    args.moved = at<int64_t>(moved);
    args.num_recv = num_recv;
    args.num_rows = num_rows;
    args.room = room;
    args.num_topk = num_topk;
    args.local_experts = experts / map.num_ranks;
    args.received = at<int>(received);
    args.row_recv = at<int>(row_recv);
    args.arrived = at<int>(arrived);
    check(launch_place_nodes(args, as_stream(stream)), "place");
}

void parts(const NodeMap& map, int num_tokens, int num_recv, int num_topk, int room, int chunks, bool exact,
           int most_of_share, bool by_expert, Address sent, Address received, Address rail_tokens,
           Address send_position, Address recv_position, Address slots, Address node_counted, int counted_size,
           Address experts, int experts_stride, Address arrived, Address counted, Address batch_counts,
           Address arrived_counts, Address no_padding, Address chunk_slots, Address placed, Address own_slots,
           Address send_moves, Address recv_moves, Address recv_starts, Address send_used, Address recv_used,
           Address send_rows, Address home_rows, Address stream) {
    PartsArgs args{};
    args.map = map;
    args.num_tokens = num_tokens;
    args.num_recv = num_recv;
    args.num_topk = num_topk;
    args.room = room;
    args.chunks = chunks;
    args.exact = exact;
    args.most_of_share = most_of_share;
    args.by_expert = by_expert;
    args.sent = at<int64_t>(sent);
    args.received = at<int64_t>(received);
    args.rail_tokens = at<int64_t>(rail_tokens);
    args.send_position = at<int>(send_position);
    args.recv_position = at<int>(recv_position);
    args.slots = at<int>(slots);
    args.node_counted = at<int64_t>(node_counted);
    args.counted_size = counted_size;
    args.experts = at<int>(experts);
    args.experts_stride = experts_stride;
    args.arrived = at<int>(arrived);
    args.batch_counts = at<int>(batch_counts);
    args.arrived_counts = at<int>(arrived_counts);
    args.no_padding = at<int>(no_padding);
    args.send_moves = at<int>(send_moves);
    args.recv_moves = at<int>(recv_moves);
    args.recv_starts = at<int>(recv_starts);
    args.send_used = at<int>(send_used);
    args.recv_used = at<int>(recv_used);
    args.send_rows = at<int>(send_rows);
    args.home_rows = at<int>(home_rows);
    args.counted = at<int64_t>(counted);
    args.own_slots = at<int>(own_slots);
    args.chunk_slots = at<int>(chunk_slots);
    args.placed = at<int>(placed);
    check(launch_parts(args, as_stream(stream)), "parts");
}

}  // namespace

void bind_nodes(py::module_& m) {
    py::class_<NodeMap>(m, "NodeMap")
        .def(py::init([](Address node_of, Address place_of, Address rail_members, Address rail_nodes,
                         Address rail_before, Address runs, int num_ranks, int num_nodes, int node_size, int rank,
                         int node, int place, int rail_rank) {
                 return NodeMap{at<int64_t>(node_of),
                                at<int64_t>(place_of),
                                at<int64_t>(rail_members),
                                at<int64_t>(rail_nodes),
                                at<int64_t>(rail_before),
                                at<int64_t>(runs),
                                num_ranks,
                                num_nodes,
                                node_size,
                                rank,
                                node,
                                place,
                                rail_rank};
             }),
             py::kw_only(), py::arg("node_of"), py::arg("place_of"), py::arg("rail_members"), py::arg("rail_nodes"),
             py::arg("rail_before"), py::arg("runs"), py::arg("num_ranks"), py::arg("num_nodes"), py::arg("node_size"),
             py::arg("rank"), py::arg("node"), py::arg("place"), py::arg("rail_rank"))
        .def("summarize", &summarize, py::kw_only(), py::arg("topk_idx"), py::arg("num_tokens"), py::arg("num_topk"),
             py::arg("num_experts"), py::arg("max_recv"), py::arg("max_rows"), py::arg("header"), py::arg("messages"),
             py::arg("experts"), py::arg("room"), py::arg("send_slot"), py::arg("send_position"), py::arg("stream"))
        .def("digest", &digest, py::kw_only(), py::arg("messages"), py::arg("experts"), py::arg("room"),
             py::arg("alignment"), py::arg("most_tokens"), py::arg("found"), py::arg("counted"), py::arg("moved"),
             py::arg("rail_tokens"), py::arg("bad"), py::arg("stream"))
        .def("batch", &batch, py::kw_only(), py::arg("messages"), py::arg("experts"), py::arg("message_room"),
             py::arg("bad"), py::arg("room"), py::arg("num_topk"), py::arg("routes"), py::arg("recv_position"),
             py::arg("stream"))
        .def("place", &place, py::kw_only(), py::arg("messages"), py::arg("experts"), py::arg("message_room"),
             py::arg("node_received"), py::arg("node_counted"), py::arg("moved"), py::arg("num_recv"),
             py::arg("num_rows"), py::arg("room"), py::arg("num_topk"), py::arg("received"), py::arg("row_recv"),
             py::arg("arrived"), py::arg("stream"))
        .def("parts", &parts, py::kw_only(), py::arg("num_tokens"), py::arg("num_recv"), py::arg("num_topk"),
             py::arg("room"), py::arg("chunks"), py::arg("exact"), py::arg("most_of_share"), py::arg("by_expert"),
             py::arg("sent"), py::arg("received"), py::arg("rail_tokens"), py::arg("send_position"),
             py::arg("recv_position"), py::arg("slots"), py::arg("node_counted"), py::arg("counted_size"),
             py::arg("experts"), py::arg("experts_stride"), py::arg("arrived"), py::arg("counted"),
             py::arg("batch_counts"), py::arg("arrived_counts"), py::arg("no_padding"), py::arg("chunk_slots"),
             py::arg("placed"), py::arg("own_slots"), py::arg("send_moves"), py::arg("recv_moves"),
             py::arg("recv_starts"), py::arg("send_used"), py::arg("recv_used"), py::arg("send_rows"),
             py::arg("home_rows"), py::arg("stream"));
}

}  // namespace deepep_moe
