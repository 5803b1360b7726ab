// Python bindings for the benchmarks.
#include "bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bench/link.h"

namespace py = pybind11;

namespace deepep_moe {

namespace {

void fill_peers(const std::vector<Address>& targets, int64_t num_bytes, int num_blocks, Address stream) {
    if (targets.empty() || targets.size() > static_cast<size_t>(kMaxRanks))
        throw std::invalid_argument("fill_peers: targets must be 1 to " + std::to_string(kMaxRanks) + ", not " +
                                    std::to_string(targets.size()));
    constexpr int64_t kVectorBytes = sizeof(int4);
    if (num_bytes < 0 || num_bytes % kVectorBytes)
        throw std::invalid_argument("fill_peers: num_bytes must be a multiple of 16, not " + std::to_string(num_bytes));
    FillPeersArgs args{};
    for (const Address target : targets) args.target[args.num_targets++] = at<int4>(target);
    args.num_vectors = num_bytes / kVectorBytes;
    check(launch_fill_peers(args, num_blocks, as_stream(stream)), "fill_peers");
}

}  // namespace

void bind_bench(py::module_& m) {
    m.def("fill_peers", &fill_peers, py::arg("targets"), py::arg("num_bytes"), py::arg("num_blocks"),
          py::arg("stream"));
}

}  // namespace deepep_moe
