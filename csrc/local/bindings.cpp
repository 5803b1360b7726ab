// The kernels of one rank alone as Python sees them. Arguments go by name.
#include "bindings.h"

#include "local/args.h"
#include "runtime/domain.h"

namespace py = pybind11;

namespace deepep_moe {

namespace {

void bind_parts(py::module_& m) {
    m.attr("AGREED_WORDS") = Messages::kAgreedWords;
    m.attr("HEADER_WORDS") = Messages::kHeaderWords;
    m.attr("MAX_SUMMED_ROWS") = kMaxSummedRows;
    py::class_<Messages>(m, "Messages")
        .def(py::init([](Address data, int num_ranks, int expert_words, int row_words) {
                 return Messages{at<int64_t>(data), num_ranks, expert_words, row_words};
             }),
             py::arg("data"), py::arg("num_ranks"), py::arg("expert_words"), py::arg("row_words"));
    py::class_<Headers>(m, "Headers")
        .def(py::init([](Address data, int num_ranks) { return Headers{at<int64_t>(data), num_ranks}; }),
             py::arg("data"), py::arg("num_ranks"));
    py::class_<Segments>(m, "Segments")
        .def(py::init([](int own_first, int num_own) { return Segments{own_first, num_own}; }), py::arg("own_first"),
             py::arg("num_own"));
    py::class_<Places>(m, "Places")
        .def(py::init([](Address data, int width, int stride, Address starts) {
                 return Places{at<int>(data), width, stride, at<int>(starts)};
             }),
             py::arg("data"), py::arg("width"), py::arg("stride"), py::arg("starts"));
    py::class_<Scales>(m, "Scales")
        .def(py::init([](Address data, int64_t row_stride, int64_t channel_stride) {
                 return Scales{at<int>(data), row_stride, channel_stride};
             }),
             py::arg("data"), py::arg("row_stride"), py::arg("channel_stride"));
    py::class_<PackedRows>(m, "PackedRows")
        .def(py::init([](Address data, int pitch, int row_bytes, int num_scales, int num_weights) {
                 return PackedRows{at<char>(data), pitch, row_bytes, num_scales, num_weights};
             }),
             py::arg("data"), py::arg("pitch"), py::arg("row_bytes"), py::arg("num_scales"), py::arg("num_weights"));
}

void bind_plan(py::module_& m) {
    m.def(
        "count",
        [](Address topk_idx, Address given_membership, Address given_expert_counts, int num_tokens, int num_topk,
           int num_experts, int max_recv, int max_rows, const HeaderWords& header, const Messages& messages,
           Address send_slot, Address stream) {
            CountArgs args{};
            args.topk_idx = at<int64_t>(topk_idx);
            args.given_membership = at<bool>(given_membership);
            args.given_expert_counts = at<int>(given_expert_counts);
            args.num_tokens = num_tokens;
            args.num_topk = num_topk;
            args.num_experts = num_experts;
            args.max_recv = max_recv;
            args.max_rows = max_rows;
            args.header = header_of(header);
            args.messages = messages;
            args.send_slot = at<int>(send_slot);
            check(launch_count(args, as_stream(stream)), "count");
        },
        py::kw_only(), py::arg("topk_idx"), py::arg("given_membership"), py::arg("given_expert_counts"),
        py::arg("num_tokens"), py::arg("num_topk"), py::arg("num_experts"), py::arg("max_recv"), py::arg("max_rows"),
        py::arg("header"), py::arg("messages"), py::arg("send_slot"), py::arg("stream"));
    m.def(
        "announce",
        [](const HeaderWords& header, int num_ranks, Address out, Address stream) {
            AnnounceArgs args{};
            args.header = header_of(header);
            args.num_ranks = num_ranks;
            args.out = at<int64_t>(out);
            check(launch_announce(args, as_stream(stream)), "announce");
        },
        py::kw_only(), py::arg("header"), py::arg("num_ranks"), py::arg("out"), py::arg("stream"));
    m.def(
        "starts",
        [](const Messages& messages, int rank, Address starts, Address stream) {
            StartsArgs args{};
            args.messages = messages;
            args.rank = rank;
            args.starts = at<int>(starts);
            check(launch_starts(args, as_stream(stream)), "starts");
        },
        py::kw_only(), py::arg("messages"), py::arg("rank"), py::arg("starts"), py::arg("stream"));
    m.def(
        "place",
        [](const Messages& messages, int num_received, int max_recv, int max_rows, int num_topk, int local_experts,
           int alignment, int rank, Address counted, Address received, Address row_recv, Address stream) {
            PlaceArgs args{};
            args.messages = messages;
            args.num_received = num_received;
            args.max_recv = max_recv;
            args.max_rows = max_rows;
            args.num_topk = num_topk;
            args.local_experts = local_experts;
            args.alignment = alignment;
            args.rank = rank;
            args.counted = at<int64_t>(counted);
            args.received = at<int>(received);
            args.row_recv = at<int>(row_recv);
            check(launch_place(args, as_stream(stream)), "place");
        },
        py::kw_only(), py::arg("messages"), py::arg("num_received"), py::arg("max_recv"), py::arg("max_rows"),
        py::arg("num_topk"), py::arg("local_experts"), py::arg("alignment"), py::arg("rank"), py::arg("counted"),
        py::arg("received"), py::arg("row_recv"), py::arg("stream"));
}

void bind_rows(py::module_& m) {
    m.def(
        "pack",
        [](Address x, const Scales& scales, Address weights, int num_rows, bool quantise, const Places& places,
           const PackedRows& out, Address stream) {
            PackArgs args{};
            args.x = at<char>(x);
            args.scales = scales;
            args.weights = at<float>(weights);
            args.num_rows = num_rows;
            args.quantise = quantise;
            args.places = places;
            args.out = out;
            check(launch_pack(args, as_stream(stream)), "pack");
        },
        py::kw_only(), py::arg("x"), py::arg("scales"), py::arg("weights"), py::arg("num_rows"), py::arg("quantise"),
        py::arg("places"), py::arg("out"), py::arg("stream"));
    m.def(
        "expand",
        [](const PackedRows& rows, const Segments& segments, int num_received, bool dequantise, const Places& places,
           Address row_recv, Address owned, int owned_stride, int num_out, Address out, const Scales& out_scales,
           Address out_weights, const Headers& headers, Address stream) {
            ExpandArgs args{};
            args.rows = rows;
            args.segments = segments;
            args.num_received = num_received;
            args.dequantise = dequantise;
            args.places = places;
            args.row_recv = at<int>(row_recv);
            args.owned = at<int>(owned);
            args.owned_stride = owned_stride;
            args.num_out = num_out;
            args.out = at<char>(out);
            args.out_scales = out_scales;
            args.out_weights = at<float>(out_weights);
            args.headers = headers;
            check(launch_expand(args, as_stream(stream)), "expand");
        },
        py::kw_only(), py::arg("rows"), py::arg("segments"), py::arg("num_received"), py::arg("dequantise"),
        py::arg("places"), py::arg("row_recv"), py::arg("owned"), py::arg("owned_stride"), py::arg("num_out"),
        py::arg("out"), py::arg("out_scales"), py::arg("out_weights"), py::arg("headers"), py::arg("stream"));
    m.def(
        "sum",
        [](Address x, int64_t pitch, int row_bytes, DataType dtype, const Places& places, int num_items,
           const std::vector<Address>& bias, Address out, int64_t out_pitch, const Segments& segments,
           Address row_weights, bool apply_weights, Address vectors, int64_t vectors_pitch, Address out_vectors,
           int64_t out_vectors_pitch, int num_weights, const Headers& headers, Address stream) {
            SumArgs args{};
            args.x = at<char>(x);
            args.pitch = pitch;
            args.row_bytes = row_bytes;
            args.places = places;
            args.num_items = num_items;
            for (Address added : bias) args.bias[args.num_biases++] = at<char>(added);
            args.out = at<char>(out);
            args.out_pitch = out_pitch;
            args.segments = segments;
            args.row_weights = at<float>(row_weights);
            args.apply_weights = apply_weights;
            args.vectors = at<char>(vectors);
            args.vectors_pitch = vectors_pitch;
            args.out_vectors = at<char>(out_vectors);
            args.out_vectors_pitch = out_vectors_pitch;
            args.num_weights = num_weights;
            args.headers = headers;
            check(launch_sum(args, dtype, as_stream(stream)), "sum");
        },
        py::kw_only(), py::arg("x"), py::arg("pitch"), py::arg("row_bytes"), py::arg("dtype"), py::arg("places"),
        py::arg("num_items"), py::arg("bias"), py::arg("out"), py::arg("out_pitch"), py::arg("segments"),
        py::arg("row_weights"), py::arg("apply_weights"), py::arg("vectors"), py::arg("vectors_pitch"),
        py::arg("out_vectors"), py::arg("out_vectors_pitch"), py::arg("num_weights"), py::arg("headers"),
        py::arg("stream"));
}

void bind_routing_and_scaling(py::module_& m) {
    m.def(
        "routes",
        [](Address routing_map, Address probs, DataType dtype, int num_tokens, int num_experts, int num_topk,
           Address topk_idx, Address weights, bool backward, Address stream) {
            RoutesArgs args{};
            args.routing_map = at<bool>(routing_map);
            args.probs = at<void>(probs);
            args.num_tokens = num_tokens;
            args.num_experts = num_experts;
            args.num_topk = num_topk;
            args.topk_idx = at<int64_t>(topk_idx);
            args.weights = at<float>(weights);
            check(launch_routes(args, dtype, backward, as_stream(stream)), "routes");
        },
        py::arg("routing_map"), py::arg("probs"), py::arg("dtype"), py::arg("num_tokens"), py::arg("num_experts"),
        py::arg("num_topk"), py::arg("topk_idx"), py::arg("weights"), py::arg("backward"), py::arg("stream"));
    m.def(
        "scale_rows",
        [](Address x, Address rows, Address weights, Address row_recv, Address out, Address sums, DataType dtype,
           int num_rows, int row_bytes, Address stream) {
            ScaleRowsArgs args{};
            args.x = at<char>(x);
            args.rows = at<char>(rows);
            args.weights = at<float>(weights);
            args.row_recv = at<int>(row_recv);
            args.out = at<char>(out);
            args.sums = at<float>(sums);
            args.num_rows = num_rows;
            args.row_bytes = row_bytes;
            check(launch_scale_rows(args, dtype, as_stream(stream)), "scale_rows");
        },
        py::arg("x"), py::arg("rows"), py::arg("weights"), py::arg("row_recv"), py::arg("out"), py::arg("sums"),
        py::arg("dtype"), py::arg("num_rows"), py::arg("row_bytes"), py::arg("stream"));
}

}  // namespace

void bind_local(py::module_& m) {
    bind_parts(m);
    bind_plan(m);
    bind_rows(m);
    bind_routing_and_scaling(m);
}

}  // namespace deepep_moe
