// Low-latency calls of several ranks, each a thread, over several nodes and on one domain: results must be equal bit
// for bit. Arguments: ranks, ranks per node, seed.
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>
#include <thread>

#include "latency/engine.h"
#include "nvshmem.h"
#include "nvshmem/latency.h"

using namespace deepep_moe;
using namespace deepep_moe::latency;

namespace {

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            std::fprintf(stderr, "rank %d, line %d: %s\n", emulation::rank, __LINE__, #condition); \
            std::_Exit(1);                                                                         \
        }                                                                                          \
    } while (false)

int num_ranks;

// -- a group ---------------------------------------------------------------------------------------------------------

// One rank of a group, with the memory that Python allocates.
struct Rank {
    std::shared_ptr<DomainRuntime> domain;
    std::unique_ptr<LatencyEngine> engine;
    Arena arena;
    Remote remote{};
    Posted posted{};
};

struct Group {
    emulation::Network& network;
    int per_node;
    std::vector<Rank> ranks;
    size_t used = 0;  // of each heap

    Group(emulation::Network& network, size_t begin, int per_node, int max_tokens, int hidden, bool masks,
          double timeout_seconds)
        : network(network), per_node(per_node), ranks(num_ranks), used(begin) {
        std::vector<std::vector<Address>> addresses;
        for (int r = 0; r < num_ranks; ++r) {
            ranks[r].domain = std::make_shared<DomainRuntime>(r, num_ranks, 0, timeout_seconds, false);
            ranks[r].engine = std::make_unique<LatencyEngine>(ranks[r].domain, num_ranks + 2, masks);
        }
        addresses = take(DomainRuntime::mailbox_bytes(), false);
        for (int r = 0; r < num_ranks; ++r) ranks[r].domain->set_mailboxes(addresses[r]);
        for (int r = 0; r < num_ranks; ++r)  // the engine copies the domain's addresses
            ranks[r].engine = std::make_unique<LatencyEngine>(ranks[r].domain, num_ranks + 2, masks);
        addresses = take(LatencyEngine::control_bytes(), false);
        for (int r = 0; r < num_ranks; ++r) ranks[r].engine->set_control(addresses[r]);
        addresses = take(LatencyEngine::arena_bytes(num_ranks, max_tokens, hidden), true);
        for (int r = 0; r < num_ranks; ++r)
            ranks[r].arena = ranks[r].engine->add_arena(addresses[r], max_tokens, hidden);
        addresses = take(sizeof(Signals), false);
        for (int r = 0; r < num_ranks; ++r) {
            Remote& remote = ranks[r].remote;
            remote.runtime = ranks[r].engine->runtime();
            remote.signals = at<Signals>(addresses[r][r]);
            remote.posted = &ranks[r].posted;
            for (int other = 0; other < num_ranks; ++other) {
                remote.pes[other] = other;
                if (is_far(r, other)) remote.ranks |= RankMask{1} << other;
            }
        }
    }

    bool is_far(int rank, int other) const { return rank / per_node != other / per_node; }

    // Symmetric memory as _NodeMemory of low_latency_nodes.py makes it: [rank] the addresses that the rank uses.
    std::vector<std::vector<Address>> take(size_t bytes, bool by_source) {
        bytes = (bytes + 255) / 256 * 256;
        const size_t block = by_source ? bytes / num_ranks : bytes, begin = used;
        std::vector<std::vector<Address>> addresses(num_ranks);
        for (int rank = 0; rank < num_ranks; ++rank) {
            size_t staging = begin + bytes;
            for (int other = 0; other < num_ranks; ++other) {
                if (is_far(rank, other)) {
                    const size_t displaced = by_source ? block * rank : 0;
                    addresses[rank].push_back(reinterpret_cast<Address>(network.heap(rank) + staging) - displaced);
                    staging += block;
                } else {
                    addresses[rank].push_back(reinterpret_cast<Address>(network.heap(other) + begin));
                }
            }
        }
        used += bytes + block * num_ranks;
        return addresses;
    }
};

// -- calls -----------------------------------------------------------------------------------------------------------

struct Batch {
    int topk, experts;
    Format format;
    std::vector<std::vector<uint16_t>> x;  // [rank][T, H]
    std::vector<std::vector<int>> topk_idx;
    std::vector<std::vector<float>> weights;

    Batch(unsigned seed, int max_tokens, int hidden) {
        std::mt19937 random(seed);
        experts = num_ranks * (1 + random() % 5);
        topk = 1 + random() % std::min(8, experts);
        format = static_cast<Format>(random() % 4);
        for (int r = 0; r < num_ranks; ++r) {
            const int tokens = random() % (max_tokens + 1);
            x.emplace_back(tokens * hidden);
            topk_idx.emplace_back(tokens * topk);
            weights.emplace_back(tokens * topk);
            for (uint16_t& value : x[r]) value = 0x3f00 + random() % 256 + (random() % 2 << 15);
            for (float& weight : weights[r]) weight = (random() % 16) / 8.0f;
            std::vector<int> order(experts);
            for (int e = 0; e < experts; ++e) order[e] = e;
            for (int t = 0; t < tokens; ++t) {
                std::shuffle(order.begin(), order.end(), random);
                for (int k = 0; k < topk; ++k) topk_idx[r][t * topk + k] = random() % 8 ? order[k] : -1;
            }
        }
    }
};

// A dispatch and its combine on one rank. Outputs are filled before, so that whole buffers can be compared.
struct Call {
    Call(const Call&) = delete;  // its kernels have addresses of members
    Rank& rank;
    const Batch& batch;
    int self, hidden, epoch = 0;
    std::vector<int> places, scales, counts, src_info;
    std::vector<char> rows;
    std::vector<int64_t> layout_range;
    std::vector<uint16_t> y, out;
    DispatchArgs dispatch_args{};
    CombineArgs combine_args{};

    Call(Group& group, int self, const Batch& batch)
        : rank(group.ranks[self]), batch(batch), self(self), hidden(rank.arena.hidden) {
        const int local = batch.experts / num_ranks, slots = static_cast<int>(rank.arena.slots());
        const int tokens = static_cast<int>(batch.topk_idx[self].size()) / batch.topk;
        places.assign(LatencyEngine::places_words(num_ranks, rank.arena.max_tokens, batch.topk), -7);
        rows.assign(static_cast<size_t>(local) * slots * hidden * 2, 0x55);
        scales.assign(local * slots * (hidden / 128 + 1), 0x55);
        counts.assign(local, -5);
        src_info.assign(local * slots, -5);
        layout_range.assign(local * num_ranks, -5);
        y.resize(static_cast<size_t>(local) * slots * hidden);
        for (size_t i = 0; i < y.size(); ++i) y[i] = 0x3f00 + (i * 7 + self) % 256;
        out.assign(tokens * hidden + 1, 0x55);
        DispatchArgs& d = dispatch_args;
        d.arena = rank.arena;
        d.x = reinterpret_cast<const char*>(batch.x[self].data());
        d.topk_idx = {batch.topk_idx[self].data(), false};
        d.num_tokens = tokens;
        d.num_topk = batch.topk;
        d.num_experts = batch.experts;
        d.format = batch.format;
        d.places = {places.data()};
        d.rows = rows.data();
        d.scales = scales.data();
        d.counts = counts.data();
        d.src_info = src_info.data();
        d.layout_range = layout_range.data();
        CombineArgs& c = combine_args;
        c.arena = rank.arena;
        c.x = reinterpret_cast<const char*>(y.data());
        c.topk_idx = d.topk_idx;
        c.weights = batch.weights[self].data();
        c.num_tokens = tokens;
        c.num_topk = batch.topk;
        c.num_experts = batch.experts;
        c.format = batch.format;
        c.places = d.places;
        c.epoch = &epoch;
        c.out = reinterpret_cast<char*>(out.data());
    }

    void exchange(Step step, int half, const int* of) {
        ExchangeArgs args{};
        args.remote = rank.remote;
        args.arena = rank.arena;
        args.topk_idx = dispatch_args.topk_idx;
        args.num_tokens = dispatch_args.num_tokens;
        args.num_topk = batch.topk;
        args.num_experts = batch.experts;
        args.format = batch.format;
        args.places = dispatch_args.places;
        args.epoch = of;
        args.puts = half & kSend;
        args.waits = half & kReceive;
        if (rank.remote.ranks) launch_exchange(args, step, nullptr);
    }

    // As NodesEngine of low_latency_nodes.py.
    void dispatch(int half) {
        if (half & kSend) rank.engine->dispatch(dispatch_args, kSend, 0);
        exchange(kDispatchStep, half, places.data());
        if (half & kReceive) rank.engine->dispatch(dispatch_args, kReceive, 0);
        if (half == kReceive && rank.remote.ranks) launch_post(rank.remote, nullptr);
    }
    void combine(int half) {
        if (half & kSend) {
            rank.engine->combine(combine_args, kTables, 0);
            exchange(kTablesStep, kBoth, &epoch);
            rank.engine->combine(combine_args, kRows, 0);
        }
        exchange(kRowsStep, half, &epoch);
        if (half & kReceive) rank.engine->combine(combine_args, kReceive, 0);
        if (half == kReceive && rank.remote.ranks) launch_post(rank.remote, nullptr);
    }

    void check(const Call& one_domain) const {
        CHECK(!rank.domain->failure());
        CHECK(std::equal(places.begin() + 2, places.end(), one_domain.places.begin() + 2));
        CHECK(counts == one_domain.counts && layout_range == one_domain.layout_range);
        CHECK(src_info == one_domain.src_info && rows == one_domain.rows && scales == one_domain.scales);
        CHECK(out == one_domain.out);
        if (batch.format != Format::kBf16) return;
        const int slots = static_cast<int>(rank.arena.slots());
        for (size_t i = 0; i < layout_range.size(); ++i) {
            const int first = static_cast<int>(layout_range[i] >> 32), count = static_cast<int>(layout_range[i]);
            const int expert = static_cast<int>(i) / num_ranks, source = static_cast<int>(i) % num_ranks;
            for (int row = expert * slots + first; row < expert * slots + first + count; ++row) {
                const uint16_t* sent = &batch.x[source][src_info[row] * hidden];
                CHECK(std::memcmp(&rows[static_cast<size_t>(row) * hidden * 2], sent, hidden * 2) == 0);
            }
        }
    }
};

void refuse(Rank& rank, Kind kind, int* passed_on, const int* source) {
    if (rank.remote.ranks) {
        int epoch = 0;
        launch_remote_refusal(rank.remote, kind, source, &epoch, nullptr);
        ExchangeArgs args{};
        args.remote = rank.remote;
        args.arena = rank.arena;
        args.epoch = &epoch;
        args.waits = args.refuses = true;
        launch_exchange(args, kind == kDispatch ? kDispatchStep : kTablesStep, nullptr);
    }
    rank.engine->refuse(kind, reinterpret_cast<Address>(passed_on), reinterpret_cast<Address>(source), 0);
    if (rank.remote.ranks) launch_post(rank.remote, nullptr);
}

int announce_refusal(Rank& rank) {
    int others = -1;
    if (rank.remote.ranks)
        launch_remote_announce_refusal(rank.remote, &others, nullptr);
    else
        rank.engine->announce_refusal(reinterpret_cast<Address>(&others), 0);
    return others;
}

void announce(Rank& rank, const Facts& facts, bool withdrawn) {
    rank.engine->announce(facts, withdrawn, 0);
    if (rank.remote.ranks) launch_put_announcement(rank.remote, withdrawn, nullptr);
}

void end_masks(Rank& rank) {
    const RankMask all = (RankMask{1} << num_ranks) - 1;
    if (!rank.remote.ranks) return rank.engine->lift_masks(all, 0);
    launch_remote_meet(rank.remote, false, all, nullptr);
    rank.engine->clear_rows(0);
    launch_remote_meet(rank.remote, true, 0, nullptr);
    launch_post(rank.remote, nullptr);
}

// -- what the ranks do -----------------------------------------------------------------------------------------------

struct Program {
    Group &nodes, &domain;
    std::barrier<>& all;
    int self;
    unsigned seed;
    std::mt19937 skew;

    void pause() {
        if (skew() % 3 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(skew() % 10));
    }
    Batch batch(unsigned number) const {
        return {seed * 1000 + number, nodes.ranks[0].arena.max_tokens, nodes.ranks[0].arena.hidden};
    }
    Group* groups[2] = {&domain, &nodes};

    void calls(unsigned first, int count, bool hooks) {
        for (int number = 0; number < count; ++number) {
            const Batch drawn = batch(first + number);
            std::deque<Call> made;  // a call must not move
            for (Group* group : groups) {
                Call& call = made.emplace_back(*group, self, drawn);
                pause();
                for (int half : hooks ? std::vector<int>{kSend, kReceive} : std::vector<int>{kBoth})
                    call.dispatch(half);
                for (int half : hooks ? std::vector<int>{kSend, kReceive} : std::vector<int>{kBoth}) call.combine(half);
            }
            made[1].check(made[0]);
        }
    }

    // Dispatches alone, always two in flight; then their combines.
    void in_flight(unsigned first) {
        constexpr int kCalls = 6;
        std::vector<Batch> drawn;
        for (int number = 0; number < kCalls; ++number) drawn.push_back(batch(first + number));
        std::deque<Call> made[2];
        for (int g = 0; g < 2; ++g) {
            for (const Batch& one : drawn) made[g].emplace_back(*groups[g], self, one);
            for (int number = 0; number < kCalls + 2; ++number) {
                if (number >= 2) made[g][number - 2].dispatch(kReceive);
                pause();
                if (number < kCalls) made[g][number].dispatch(kSend);
            }
            for (int number = 0; number < kCalls; number += 2) {
                for (int i = 0; i < 2; ++i) made[g][number + i].combine(kSend);
                for (int i = 1; i >= 0; --i) made[g][number + i].combine(kReceive);
            }
        }
        for (int number = 0; number < kCalls; ++number) made[1][number].check(made[0][number]);
    }

    // Rank 1 refuses a call of both kinds.
    void refusals(unsigned first) {
        const Batch drawn = batch(first);
        std::deque<Call> made;  // a call must not move
        for (Group* group : groups) {
            Call& call = made.emplace_back(*group, self, drawn);
            if (self == 1) {
                CHECK(announce_refusal(call.rank) == kInCall);
                refuse(call.rank, kDispatch, call.places.data(), nullptr);
                refuse(call.rank, kCombine, nullptr, call.places.data());
            } else {
                call.dispatch(kBoth);
                call.combine(kBoth);
                CHECK(call.rank.domain->notice() && call.rank.domain->notice()->failure == kBadPeerInput);
                call.rank.domain->take_notice(0);
            }
        }
        if (self != 1) made[1].check(made[0]);
        // all others allocate
        Facts facts{};
        facts.word[Facts::kFactMaxTokens] = 1000;
        facts.word[Facts::kFactAnnounced] = 1;
        for (Group* group : groups) {
            Rank& rank = group->ranks[self];
            if (self == 1)
                CHECK(announce_refusal(rank) == kAllocating);
            else
                announce(rank, facts, false);
            all.arrive_and_wait();
            announce(rank, Facts{}, true);
            all.arrive_and_wait();
        }
    }

    // The last rank and the others ignore each other for two calls, and meet again.
    void masks(unsigned first) {
        for (Group* group : groups)
            for (int other = 0; other < num_ranks; ++other)
                if ((other == num_ranks - 1) != (self == num_ranks - 1)) group->ranks[self].engine->set_mask(other, 0);
        calls(first, 2, false);
        for (Group* group : groups) {
            all.arrive_and_wait();
            end_masks(group->ranks[self]);
            int masked[kMaxRanks];
            group->ranks[self].engine->query_mask(reinterpret_cast<Address>(masked), 0);
            for (int other = 0; other < num_ranks; ++other) CHECK(!masked[other]);
        }
    }

    void run() {
        emulation::rank = self;
        calls(0, 3, false);
        calls(10, 3, true);
        in_flight(20);
        refusals(30);
        calls(40, 2, false);
        masks(50);
        calls(60, 2, true);
    }
};

// The last rank does not come: the others report it.
void lose_a_rank(emulation::Network& network, size_t begin, int per_node, unsigned seed) {
    Group group(network, begin, per_node, 5, 128, false, 2.0);
    const Batch batch(seed, 5, 128);
    std::vector<std::thread> threads;
    std::atomic<int> named{0};
    for (int self = 0; self < num_ranks - 1; ++self)
        threads.emplace_back([&, self] {
            emulation::rank = self;
            Call call(group, self, batch);
            call.dispatch(kBoth);
            call.combine(kBoth);
            const auto failure = group.ranks[self].domain->failure();
            CHECK(failure && (failure->failure == kTimeout || failure->failure == kPeerFailed));
            named += failure->failure == kTimeout && failure->peer == num_ranks - 1;
        });
    for (std::thread& thread : threads) thread.join();
    CHECK(named > 0);
}

}  // namespace

int main(int, char** arguments) {
    num_ranks = std::atoi(arguments[1]);
    const int per_node = std::atoi(arguments[2]);
    const unsigned seed = std::atoi(arguments[3]);
    std::mt19937 random(seed);
    const int max_tokens = 5 + random() % 8, hidden = 128 * (1 + random() % 6);
    emulation::Network network(num_ranks, 32 << 20, seed);
    Group nodes(network, 0, per_node, max_tokens, hidden, true, 300.0);
    Group domain(network, nodes.used, num_ranks, max_tokens, hidden, true, 300.0);
    std::barrier<> all(num_ranks);
    std::vector<std::thread> threads;
    for (int self = 0; self < num_ranks; ++self)
        threads.emplace_back([&, self] { Program{nodes, domain, all, self, seed, std::mt19937(seed + self)}.run(); });
    for (std::thread& thread : threads) thread.join();
    lose_a_rank(network, domain.used, per_node, seed);
    std::printf("%d ranks, %d on a node, seed %u: M = %d, H = %d\n", num_ranks, per_node, seed, max_tokens, hidden);
    return 0;
}
