// The plan kernels of csrc/nodes for Python's ctypes. Numbers and addresses come as one array of int64, in the order in
// which kernels.py lists them.
#include "cuda.h"
#include "nodes/args.h"

namespace {

using namespace deepep_moe;

struct Reader {
    const int64_t* next;

    operator int64_t() { return *next++; }
    operator int() { return static_cast<int>(*next++); }
    operator bool() { return *next++ != 0; }
    template <typename T>
    operator T*() {
        return reinterpret_cast<T*>(*next++);
    }
};

NodeMap map_of(const int64_t* numbers) {
    Reader read{numbers};
    NodeMap map{};
    map.node_of = read, map.place_of = read, map.rail_members = read, map.rail_nodes = read, map.rail_before = read;
    map.runs = read, map.num_ranks = read, map.num_nodes = read, map.node_size = read, map.rank = read;
    map.node = read, map.place = read, map.rail_rank = read;
    return map;
}

NodeMessages messages_of(const NodeMap& map, Reader& read) {
    NodeMessages messages{};
    messages.data = read, messages.experts = read, messages.room = read;
    messages.rail_before = map.rail_before, messages.num_ranks = map.num_ranks, messages.num_nodes = map.num_nodes;
    return messages;
}

// Launch from a program, as cuda.h wants it.
void run(const std::function<void()>& launch) {
    static unsigned seed = 0;
    emulation::start_program(0, launch, true);
    emulation::run_programs(seed++);
}

}  // namespace

extern "C" {

void summarize(const int64_t* map, const int64_t* numbers, const int64_t* header) {
    Reader read{numbers};
    SummarizeArgs args{};
    args.map = map_of(map);
    args.topk_idx = read, args.num_tokens = read, args.num_topk = read, args.num_experts = read;
    args.max_recv = read, args.max_rows = read;
    std::copy_n(header, Messages::kAgreedWords, args.header.words);
    args.messages = messages_of(args.map, read);
    args.send_slot = read, args.send_position = read;
    run([&] { launch_summarize(args, nullptr); });
}

void digest(const int64_t* map, const int64_t* numbers) {
    Reader read{numbers};
    DigestArgs args{};
    args.map = map_of(map);
    args.messages = messages_of(args.map, read);
    args.num_experts = args.messages.experts;
    args.alignment = read, args.most_tokens = read, args.found = read, args.counted = read, args.moved = read;
    args.rail_tokens = read, args.bad = read;
    run([&] { launch_digest(args, nullptr); });
}

void batch(const int64_t* map, const int64_t* numbers) {
    Reader read{numbers};
    BatchArgs args{};
    args.map = map_of(map);
    args.messages = messages_of(args.map, read);
    args.num_experts = args.messages.experts;
    args.bad = read, args.room = read, args.num_topk = read, args.routes = read, args.recv_position = read;
    run([&] { launch_batch(args, nullptr); });
}

void place(const int64_t* map, const int64_t* numbers) {
    Reader read{numbers};
    PlaceNodesArgs args{};
    args.map = map_of(map);
    args.messages = messages_of(args.map, read);
    args.local_experts = args.messages.experts / args.map.num_ranks;
    args.node_received = read, args.node_counted = read, args.moved = read, args.num_recv = read;
    args.num_rows = read, args.room = read, args.num_topk = read, args.received = read, args.row_recv = read;
    args.arrived = read;
    run([&] { launch_place_nodes(args, nullptr); });
}

void parts(const int64_t* map, const int64_t* numbers) {
    Reader read{numbers};
    PartsArgs args{};
    args.map = map_of(map);
    args.num_tokens = read, args.num_recv = read, args.num_topk = read, args.room = read, args.chunks = read;
    args.exact = read, args.most_of_share = read, args.by_expert = read, args.sent = read, args.received = read;
    args.rail_tokens = read, args.send_position = read, args.recv_position = read, args.slots = read;
    args.node_counted = read, args.counted_size = read, args.experts = read, args.experts_stride = read;
    args.arrived = read, args.counted = read, args.batch_counts = read, args.arrived_counts = read;
    args.no_padding = read, args.chunk_slots = read, args.placed = read, args.own_slots = read;
    args.send_moves = read, args.recv_moves = read, args.recv_starts = read, args.send_used = read;
    args.recv_used = read, args.send_rows = read, args.home_rows = read;
    run([&] { launch_parts(args, nullptr); });
}

}  // extern "C"
