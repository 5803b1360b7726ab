// Operations of a rail (csrc/nvshmem/rail.cu) between ranks that each have a node of their own: rows, chunks, regions
// that are used in turn or again and again as in a CUDA graph, a rank that does not come, a rank that gives up.
// Arguments: ranks, seed.
#include <random>

#include "nvshmem.h"
#include "nvshmem/args.h"

using namespace deepep_moe;

namespace {

constexpr int kMaxRows = 40, kMaxRowBytes = 64;
int num_ranks;

int peer_rank(int peer, int rank) { return peer + (peer >= rank ? 1 : 0); }

struct Rail {
    static constexpr size_t kRegionBytes = 1 << 20, kSignals = 1 << 14;
    char* memory;  // signals and regions, at the same place of every heap
    RailState state{};
    RailFailure record{};
    std::vector<int> pes;
    RailArgs args[kRailRegions]{};

    Rail(emulation::Network& network, size_t begin, int rank, uint64_t timeout_seconds)
        : memory(network.heap(rank) + begin) {
        for (int r = 0; r < num_ranks; ++r) pes.push_back(r);
        uint64_t* signals = reinterpret_cast<uint64_t*>(memory);
        for (int region = 0; region < kRailRegions; ++region) {
            RailArgs& one = args[region];
            one.record = &record;
            one.state = &state;
            one.signals = {signals + 2 * (num_ranks - 1), signals, signals + num_ranks - 1};
            one.pes = pes.data();
            one.rank = rank;
            one.num_ranks = num_ranks;
            one.region = region;
            one.timeout_nanoseconds = timeout_seconds * 1000000000;
        }
    }
    static size_t bytes() { return kSignals * sizeof(uint64_t) + kRailRegions * kRegionBytes; }
    char* region(int number) { return memory + kSignals * sizeof(uint64_t) + number * kRegionBytes; }
};

// What all ranks draw alike for an operation.
struct Operation {
    unsigned number;
    int region, row_bytes;
    std::vector<int> sizes;  // [chunk] rows of a block
    bool partly;             // not all rows of a block are used

    Operation(unsigned seed, unsigned number) : number(number) {
        std::mt19937 random(seed * 1000 + number);
        const bool replayed = number / 8 % 2;  // as a graph: always the same region
        region = replayed ? 0 : number % 2;
        row_bytes = 16 * (1 + random() % (kMaxRowBytes / 16));
        sizes.resize(1 + random() % 4);
        for (int& size : sizes) size = random() % (kMaxRows + 1);
        partly = random() % 2;
    }
    int used(int sender, int receiver, int chunk) const {
        return partly ? (sender * 31 + receiver * 17 + number * 7 + chunk * 3) % (sizes[chunk] + 1) : sizes[chunk];
    }
    char byte(int sender, int receiver, int chunk, int i) const {
        return static_cast<char>(sender * 83 + receiver * 41 + chunk * 23 + number * 57 + i * 5 + i / 251);
    }
};

struct Program {
    Rail& rail;
    int self;
    unsigned seed;

    // Returns whether all rows came.
    bool run(const Operation& operation) {
        const RailArgs& args = rail.args[operation.region];
        const int peers = num_ranks - 1, chunks = static_cast<int>(operation.sizes.size());
        launch_rail_begin(args, nullptr);
        char *sent = rail.region(operation.region), *received = sent + Rail::kRegionBytes / 2;
        std::vector<std::vector<int>> used(chunks);
        std::vector<RailChunk> made;
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const int size = operation.sizes[chunk], bytes = size * operation.row_bytes;
            for (int rank = 0; rank < num_ranks; ++rank)
                used[chunk].push_back(rank == self ? 0 : operation.used(self, rank, chunk));
            for (int peer = 0; peer < peers; ++peer)
                for (int i = 0; i < bytes; ++i)
                    sent[peer * bytes + i] = operation.byte(self, peer_rank(peer, self), chunk, i);
            made.push_back({chunk, chunk == chunks - 1, size, operation.row_bytes,
                            operation.partly ? used[chunk].data() : nullptr, sent, received});
            launch_rail_put(args, made.back(), nullptr);
            sent += peers * bytes;
            received += peers * bytes;
        }
        for (const RailChunk& chunk : made) launch_rail_wait(args, chunk, nullptr);
        if (rail.record.failed) return false;
        if (emulation::random() % 2) emulation::sleep(emulation::random() % 20000);  // while peers go on
        for (const RailChunk& chunk : made)
            for (int peer = 0; peer < peers; ++peer) {
                const int sender = peer_rank(peer, self), block = chunk.block_rows * chunk.row_bytes;
                for (int i = 0; i < operation.used(sender, self, chunk.chunk) * chunk.row_bytes; ++i)
                    CHECK(chunk.received[peer * block + i] == operation.byte(sender, self, chunk.chunk, i));
            }
        return true;
    }
};

void run_all(std::vector<Rail>& rails, unsigned seed, const std::function<void(Program)>& body, int last) {
    for (int self = 0; self < last; ++self)
        emulation::start_program(self, [&, self] { body({rails[self], self, seed}); }, true);
    emulation::run_programs(seed);
}

std::vector<Rail> make(emulation::Network& network, size_t& begin, uint64_t timeout_seconds) {
    std::vector<Rail> rails;
    rails.reserve(num_ranks);  // kernels have addresses of members
    for (int rank = 0; rank < num_ranks; ++rank) rails.emplace_back(network, begin, rank, timeout_seconds);
    begin += Rail::bytes();
    return rails;
}

}  // namespace

int main(int count, char** arguments) {
    num_ranks = std::atoi(arguments[1]);
    const unsigned seed = std::atoi(arguments[2]);
    if (count > 3) emulation::fault = static_cast<emulation::Fault>(std::atoi(arguments[3]));
    size_t begin = 0;
    emulation::Network network(num_ranks, 3 * Rail::bytes());

    std::vector<Rail> rails = make(network, begin, 300);
    const auto operations = [](Program program) {
        for (unsigned number = 0; number < 32; ++number) CHECK(program.run({program.seed, number}));
    };
    run_all(rails, seed, operations, num_ranks);

    // The last rank does not come: all rows are NaN, and a rank that waited for it names it.
    std::vector<Rail> lost = make(network, begin, 20);
    int named = 0;
    const auto lose = [&](Program program) {
        CHECK(!program.run({program.seed, 1}));
        const RailFailure& failure = program.rail.record;
        CHECK(failure.phase == kRailGivenUp || (failure.phase == kRailRows && failure.peer == num_ranks - 1));
        named += failure.phase == kRailRows;
        CHECK(program.rail.region(1)[Rail::kRegionBytes / 2] == -1 || Operation(program.seed, 1).sizes[0] == 0);
    };
    run_all(lost, seed, lose, num_ranks - 1);
    CHECK(named > 0);

    // Rank 0 gives up: the others hear of it before the timeout.
    std::vector<Rail> given_up = make(network, begin, 300);
    const auto give_up = [&](Program program) {
        if (program.self == 0) {
            launch_rail_give_up(program.rail.args[0], nullptr);
            return;
        }
        const uint64_t began = emulation::now();
        CHECK(!program.run({program.seed, 1}));
        CHECK(program.rail.record.phase == kRailGivenUp);
        CHECK(emulation::now() - began < 100000000);
    };
    run_all(given_up, seed, give_up, num_ranks);
    std::printf("%d ranks, seed %u\n", num_ranks, seed);
    return 0;
}
