// Low-latency calls of several ranks over several nodes and on one domain. All results are compared with a reference,
// bit for bit. Arguments: ranks, ranks per node, seed, and 1 or 2 for a fault of the machine.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <tuple>

#include "latency/engine.h"
#include "nvshmem.h"
#include "nvshmem/latency.h"
#include "reference.h"

using namespace deepep_moe;
using namespace deepep_moe::latency;
using reference::Batch;
using reference::Expected;

namespace {

#define CHECK_EQUAL(what)                                                                    \
    do {                                                                                     \
        if (what != expected.what) {                                                         \
            std::fprintf(stderr, "rank %d, %s: wrong %s\n", emulation::rank, engine, #what); \
            std::_Exit(1);                                                                   \
        }                                                                                    \
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
    const char* name;
    int per_node;
    std::vector<Rank> ranks;
    size_t used = 0;  // of each heap

    Group(emulation::Network& network, const char* name, size_t begin, int per_node, int max_tokens, int hidden,
          bool masks, double timeout_seconds)
        : network(network), name(name), per_node(per_node), ranks(num_ranks), used(begin) {
        std::vector<std::vector<Address>> addresses;
        for (int r = 0; r < num_ranks; ++r) {
            ranks[r].domain = std::make_shared<DomainRuntime>(r, num_ranks, 0, timeout_seconds, false);
            ranks[r].engine =
                std::make_unique<LatencyEngine>(ranks[r].domain, LatencyEngine::fewest_blocks(num_ranks) + 1, masks);
        }
        addresses = take(DomainRuntime::mailbox_bytes(), false);
        for (int r = 0; r < num_ranks; ++r) ranks[r].domain->set_mailboxes(addresses[r]);
        for (int r = 0; r < num_ranks; ++r)  // the engine copies the domain's addresses
            ranks[r].engine =
                std::make_unique<LatencyEngine>(ranks[r].domain, LatencyEngine::fewest_blocks(num_ranks) + 1, masks);
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
                if (is_far(r, other)) remote.ranks.add(other);
            }
        }
    }

    // As if this many calls of both kinds, modulo 2^32, had been made.
    void start_after(int epoch) {
        for (Rank& rank : ranks) {
            const Runtime& runtime = rank.engine->runtime();
            runtime.local->meetings = epoch;
            for (int kind = 0; kind < kNumKinds; ++kind) {
                std::fill_n(runtime.local->epochs[kind], kMaxBlocks, epoch);
                for (int call : {epoch - 1, epoch}) {
                    const int word = 2 * kind + (call & 1);
                    runtime.local->consumed[word] = call;
                    for (int other = 0; other < num_ranks; ++other) {
                        runtime.control[runtime.domain.rank]->consumed[other][word] = call;
                        rank.posted.consumed[other][word] = call;
                    }
                }
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

// A dispatch and its combine on one rank. Outputs are filled before, so that whole buffers can be compared.
struct Call {
    Call(const Call&) = delete;  // its kernels have addresses of members
    const char* engine;
    Rank& rank;
    const Batch& batch;
    int self, hidden, epoch = 0;
    std::vector<int> places, scales, counts, src_info, stats;
    std::vector<int64_t> wide_idx, wide_kept_idx;
    std::vector<char> rows;
    std::vector<int64_t> layout_range;
    std::vector<uint16_t> y, out;
    DispatchArgs dispatch_args{};
    CombineArgs combine_args{};

    Call(Group& group, int self, const Batch& batch)
        : engine(group.name), rank(group.ranks[self]), batch(batch), self(self), hidden(rank.arena.hidden) {
        const int local = batch.experts / num_ranks, slots = static_cast<int>(rank.arena.slots());
        const int tokens = batch.tokens(self);
        places.assign(LatencyEngine::places_words(num_ranks, rank.arena.max_tokens, batch.topk), -7);
        rows.assign(static_cast<size_t>(local) * slots * hidden * 2, Expected::kFill);
        scales.assign(local * slots * (hidden / 128 + 1), Expected::kFill);
        counts.assign(local, Expected::kNothing);
        src_info.assign(local * slots, Expected::kNothing);
        layout_range.assign(local * num_ranks, Expected::kNothing);
        y.resize(static_cast<size_t>(local) * slots * hidden);
        for (size_t i = 0; i < y.size(); ++i) y[i] = batch.expert_output(self, i);
        out.assign(tokens * hidden + 1, Expected::kFill);
        DispatchArgs& d = dispatch_args;
        d.arena = rank.arena;
        d.x = reinterpret_cast<const char*>(batch.x[self].data());
        wide_idx.assign(batch.topk_idx[self].begin(), batch.topk_idx[self].end());
        wide_kept_idx.assign(batch.kept_idx[self].begin(), batch.kept_idx[self].end());
        stats.assign(local, 3);
        const bool wide = batch.number % 2, wide_kept = batch.number % 4 > 1;  // a combine may have the other type
        d.topk_idx = {wide ? static_cast<const void*>(wide_idx.data()) : batch.topk_idx[self].data(), wide};
        d.stats = stats.data();
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
        c.topk_idx = {wide_kept ? static_cast<const void*>(wide_kept_idx.data()) : batch.kept_idx[self].data(),
                      wide_kept};
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
        args.topk_idx = step == kDispatchStep ? dispatch_args.topk_idx : combine_args.topk_idx;
        args.num_tokens = dispatch_args.num_tokens;
        args.num_topk = batch.topk;
        args.num_experts = batch.experts;
        args.format = batch.format;
        args.places = dispatch_args.places;
        args.epoch = of;
        args.puts = half & kSend;
        args.waits = half & kReceive;
        if (rank.remote.ranks.any()) launch_exchange(args, step, nullptr);
    }

    // As NodesEngine of low_latency_nodes.py.
    void dispatch(int half) {
        if (half & kSend) rank.engine->dispatch(dispatch_args, kSend, 0);
        exchange(kDispatchStep, half, places.data());
        if (half & kReceive) rank.engine->dispatch(dispatch_args, kReceive, 0);
        if (half == kReceive && rank.remote.ranks.any()) launch_post(rank.remote, nullptr);
    }
    void combine(int half) {
        if (half & kSend) {
            rank.engine->combine(combine_args, kTables, 0);
            exchange(kTablesStep, kBoth, &epoch);
            rank.engine->combine(combine_args, kRows, 0);
        }
        exchange(kRowsStep, half, &epoch);
        if (half & kReceive) rank.engine->combine(combine_args, kReceive, 0);
        if (half == kReceive && rank.remote.ranks.any()) launch_post(rank.remote, nullptr);
    }

    void check(const std::vector<int>& sides) const {
        const Expected expected(batch, self, static_cast<int>(rank.arena.slots()), sides);
        CHECK(!rank.domain->failure());
        CHECK_EQUAL(counts);
        for (size_t l = 0; l < stats.size(); ++l) CHECK(stats[l] == 3 + counts[l]);
        CHECK_EQUAL(layout_range);
        CHECK_EQUAL(src_info);
        CHECK_EQUAL(rows);
        CHECK_EQUAL(scales);
        if (out != expected.out) expected.explain(out);
        CHECK_EQUAL(out);
    }
};

void refuse(Rank& rank, Kind kind, int* passed_on, const int* source) {
    if (rank.remote.ranks.any()) {
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
    if (rank.remote.ranks.any()) launch_post(rank.remote, nullptr);
}

int announce_refusal(Rank& rank) {
    int others = -1;
    if (rank.remote.ranks.any())
        launch_remote_announce_refusal(rank.remote, &others, nullptr);
    else
        rank.engine->announce_refusal(reinterpret_cast<Address>(&others), 0);
    return others;
}

void announce(Rank& rank, const Facts& facts, bool withdrawn) {
    rank.engine->announce(facts, withdrawn, 0);
    if (rank.remote.ranks.any()) launch_put_announcement(rank.remote, withdrawn, nullptr);
}

void end_masks(Rank& rank) {
    RankSet all{};
    for (int r = 0; r < num_ranks; ++r) all.add(r);
    if (!rank.remote.ranks.any()) return rank.engine->lift_masks(all, 0);
    launch_remote_meet(rank.remote, false, all, nullptr);
    rank.engine->clear_rows(0);
    launch_remote_meet(rank.remote, true, RankSet{}, nullptr);
    launch_post(rank.remote, nullptr);
}

// -- what the ranks do -----------------------------------------------------------------------------------------------

// A barrier of the programs of all ranks.
struct Barrier {
    int arrived = 0, phase = 0;
    void wait() {
        const int before = phase;
        if (++arrived % num_ranks == 0) ++phase;
        while (phase == before) emulation::yield();
    }
};

struct Program {
    Group &nodes, &domain;
    Barrier& all;
    int self;
    unsigned seed;

    void pause() {
        if (emulation::random() % 3 == 0) emulation::sleep(emulation::random() % 20000);
    }
    Batch batch(unsigned number) const {
        return {seed * 1000 + number, num_ranks, nodes.ranks[0].arena.max_tokens, nodes.ranks[0].arena.hidden};
    }
    const std::vector<Group*> groups = nodes.per_node < num_ranks ? std::vector{&domain, &nodes} : std::vector{&domain};
    const std::vector<int> together = std::vector<int>(num_ranks, 0);

    void calls(unsigned first, int count, bool hooks, const std::vector<int>& sides) {
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
            for (const Call& call : made) call.check(sides);
        }
    }

    // Dispatches alone, always two in flight; then their combines.
    void in_flight(unsigned first) {
        constexpr int kCalls = 6;
        std::vector<Batch> drawn;
        for (int number = 0; number < kCalls; ++number) drawn.push_back(batch(first + number));
        std::deque<Call> made[2];
        for (size_t g = 0; g < groups.size(); ++g) {
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
        for (const std::deque<Call>& of_group : made)
            for (const Call& call : of_group) call.check(together);
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
        std::vector<int> sides = together;
        sides[1] = -1;
        for (const Call& call : made)
            if (self != 1) call.check(sides);
        // all others allocate
        Facts facts{};
        facts.max_tokens = 1000;
        facts.announced = true;
        for (Group* group : groups) {
            Rank& rank = group->ranks[self];
            if (self == 1)
                CHECK(announce_refusal(rank) == kAllocating);
            else
                announce(rank, facts, false);
            all.wait();
            announce(rank, Facts{}, true);
            all.wait();
        }
    }

    // Two calls are in flight, and rank 1 refuses the third, of both kinds.
    void third_call(unsigned first) {
        std::vector<int> sides = together;
        sides[1] = -1;
        std::vector<Batch> drawn;
        for (int number = 0; number < 3; ++number) drawn.push_back(batch(first + number));
        for (Group* group : groups) {
            std::deque<Call> made;  // a call must not move
            for (const Batch& one : drawn) made.emplace_back(*group, self, one);
            Call &a = made[0], &b = made[1], &third = made[2];
            const auto hear = [&] {
                if (self == 1) return;
                CHECK(third.rank.domain->notice() && third.rank.domain->notice()->failure == kBadPeerInput);
                third.rank.domain->take_notice(0);
            };
            a.dispatch(kSend);
            b.dispatch(kSend);
            pause();
            a.dispatch(kReceive);
            if (self == 1) {
                CHECK(announce_refusal(third.rank) == kInCall);
                refuse(third.rank, kDispatch, third.places.data(), nullptr);
            } else {
                third.dispatch(kSend);
            }
            b.dispatch(kReceive);
            if (self != 1) third.dispatch(kReceive);
            hear();
            a.combine(kSend);
            b.combine(kSend);
            pause();
            a.combine(kReceive);
            if (self == 1)
                refuse(third.rank, kCombine, nullptr, third.places.data());
            else
                third.combine(kSend);
            b.combine(kReceive);
            if (self != 1) third.combine(kReceive);
            hear();
            a.check(together);
            b.check(together);
            if (self != 1) third.check(sides);
        }
    }

    // The last rank and the others ignore each other for some calls, and meet again.
    void masks(unsigned first, int count) {
        for (Group* group : groups)
            for (int other = 0; other < num_ranks; ++other)
                if ((other == num_ranks - 1) != (self == num_ranks - 1)) group->ranks[self].engine->set_mask(other, 0);
        std::vector<int> sides = together;
        sides.back() = 1;
        calls(first, count, false, sides);
        for (Group* group : groups) {
            all.wait();
            end_masks(group->ranks[self]);
            int masked[kMaxRanks];
            group->ranks[self].engine->query_mask(reinterpret_cast<Address>(masked), 0);
            for (int other = 0; other < num_ranks; ++other) CHECK(!masked[other]);
        }
    }

    void run() {
        if (num_ranks > 32) return run_some();
        calls(0, 3, false, together);
        calls(10, 3, true, together);
        in_flight(20);
        refusals(30);
        third_call(35);
        calls(40, 2, false, together);
        masks(50, 2);
        calls(60, 2, true, together);
    }
    void run_some() {  // of many ranks, which take long
        if (num_ranks < 64) refusals(30);
        masks(50, 1);
        calls(60, 1, true, together);
    }
};

// The last rank does not come: the others report it.
void lose_a_rank(emulation::Network& network, size_t begin, int per_node, unsigned seed) {
    Group group(network, "nodes", begin, per_node, 5, 128, false, 20.0);
    const Batch batch(seed, num_ranks, 5, 128);
    int named = 0;
    for (int self = 0; self < num_ranks - 1; ++self) {
        const auto program = [&, self] {
            Call call(group, self, batch);
            call.dispatch(kBoth);
            call.combine(kBoth);
            const auto failure = group.ranks[self].domain->failure();
            CHECK(failure && (failure->failure == kTimeout || failure->failure == kPeerFailed));
            named += failure->failure == kTimeout && failure->peer == num_ranks - 1;
        };
        emulation::start_program(self, program, true);
    }
    emulation::run_programs(seed);
    CHECK(named > 0);
}

constexpr size_t kDifferBytes = 2 << 20;
enum class Difference { kFormat, kTopk, kExperts, kHandle, kAnnounced };

// Rank 1 makes a call with another argument, or announces one of another shape: all that are in a call report it at
// once.
void differ(emulation::Network& network, size_t begin, int per_node, unsigned seed, Difference difference) {
    for (int rank = 0; rank < num_ranks; ++rank) std::memset(network.heap(rank) + begin, 0, kDifferBytes);
    Group group(network, "nodes", begin, per_node, 5, 128, false, 300.0);
    CHECK(group.used <= begin + kDifferBytes);
    const Batch same(seed, num_ranks, 5, 128);
    Batch other = same;
    if (difference == Difference::kFormat) other.format = static_cast<Format>((static_cast<int>(same.format) + 1) % 4);
    if (difference == Difference::kExperts) other.experts += num_ranks;
    if (difference == Difference::kTopk) {
        ++other.topk;
        other.topk_idx[1].clear();
        other.kept_idx[1].clear();
    }
    int found = 0;
    for (int self = 0; self < num_ranks; ++self) {
        const auto program = [&, self] {
            const bool differs = self == 1;
            Call call(group, self, differs ? other : same), second(group, self, same);
            if (emulation::random() % 2) emulation::sleep(emulation::random() % 50000);
            const uint64_t began = emulation::now();
            if (differs && difference == Difference::kAnnounced) {
                Facts facts{};
                facts.max_tokens = 1000;
                facts.announced = true;
                announce(call.rank, facts, false);
                return;
            }
            call.dispatch(kBoth);
            if (difference == Difference::kHandle) {
                second.dispatch(kBoth);
                (differs ? second : call).combine(kBoth);
            }
            const auto failure = group.ranks[self].domain->failure();
            CHECK(failure && (failure->failure == kMismatch || failure->failure == kPeerFailed));
            CHECK(emulation::now() - began < 100000000);
            if (failure->failure != kMismatch) return;
            ++found;
            const auto [field, usual, differing] = [&]() -> std::tuple<int, int, int> {
                switch (difference) {
                    case Difference::kFormat:
                        return {kRowFormat, static_cast<int>(same.format), static_cast<int>(other.format)};
                    case Difference::kTopk: return {kNumTopk, same.topk, other.topk};
                    case Difference::kExperts: return {kNumExperts, same.experts, other.experts};
                    case Difference::kHandle: return {kHandle, 1, 2};
                    default: return {kMaxTokens, 5, 1000};
                }
            }();
            CHECK(failure->field == field && failure->expected == (differs ? differing : usual));
            CHECK(failure->seen == (differs ? usual : differing));
        };
        emulation::start_program(self, program, true);
    }
    emulation::run_programs(seed);
    CHECK(found > 0);
}

// Each of the facts at its largest, alone: a packet returns it and leaves the others at zero.
void pack_facts() {
    for (int field = 0; field < 8; ++field) {
        const auto of = [&](int number, int largest) { return number == field ? largest : 0; };
        const Facts facts{of(0, kTokenLimit), of(1, kMaxTopk),    of(2, kMaxExperts), of(3, 3),
                          of(4, -1),          of(5, kTokenLimit), field == 6,         field == 7};
        const int4 packet = facts.pack(9);
        const Facts same = Facts::unpack(packet);
        CHECK(packet.w == 9 && same.max_tokens == facts.max_tokens && same.num_topk == facts.num_topk);
        CHECK(same.num_experts == facts.num_experts && same.format == facts.format && same.key == facts.key);
        CHECK(same.tokens == facts.tokens && same.refused == facts.refused && same.announced == facts.announced);
        CHECK((packet.x || packet.y || packet.z & Facts::kAgreedBits) == (field < 5));
    }
}

}  // namespace

int main(int count, char** arguments) {
    num_ranks = std::atoi(arguments[1]);
    const int per_node = std::atoi(arguments[2]);
    const unsigned seed = std::atoi(arguments[3]);
    if (count > 4) emulation::fault = static_cast<emulation::Fault>(std::atoi(arguments[4]));
    std::mt19937 random(seed);
    const bool many = num_ranks > 32;
    const int max_tokens = many ? 3 : 5 + random() % 8, hidden = many ? 128 : 128 * (1 + random() % 6);
    pack_facts();
    emulation::Network network(num_ranks, 64 << 20);
    Group nodes(network, "nodes", 0, per_node, max_tokens, hidden, true, 300.0);
    Group domain(network, "one domain", nodes.used, num_ranks, max_tokens, hidden, true, 300.0);
    if ((seed + num_ranks) % 2 == 0)
        for (Group* group : {&nodes, &domain}) group->start_after(-1 - static_cast<int>(random() % 30));
    Barrier all;
    for (int self = 0; self < num_ranks; ++self)
        emulation::start_program(self, [&, self] { Program{nodes, domain, all, self, seed}.run(); }, true);
    emulation::run_programs(seed);
    lose_a_rank(network, domain.used, per_node, seed);
    for (unsigned round = 0; round < (many ? 0 : 4); ++round)
        for (Difference difference : {Difference::kFormat, Difference::kTopk, Difference::kExperts, Difference::kHandle,
                                      Difference::kAnnounced})
            differ(network, (5 + static_cast<int>(difference)) * kDifferBytes, round % 4 == 3 ? num_ranks : per_node,
                   4 * seed + round, difference);
    std::printf("%d ranks, %d on a node, seed %u: M = %d, H = %d\n", num_ranks, per_node, seed, max_tokens, hidden);
    return 0;
}
