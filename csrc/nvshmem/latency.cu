#include <algorithm>

#include "latency/meeting.cuh"
#include "nvshmem/latency.h"
#include "nvshmem/signal.cuh"

namespace deepep_moe::DEEPEP_MOE_WIDTH::latency {

namespace {

constexpr int kPostThreads = 192;

__device__ __forceinline__ bool is_remote(const Remote& remote, int rank) { return remote.ranks.has(rank); }

// Called by all threads of a block, before any wait.
__device__ __forceinline__ void post(const Remote& remote) {
    constexpr int kConsumed = kNumKinds * 2, kWords = kConsumed + 1;
    const Runtime& rt = remote.runtime;
    const int self = rt.domain.rank;
    const Waiting waiting{rt, kDispatch, 0};
    for (int i = threadIdx.x; i < kWords * rt.domain.num_ranks; i += blockDim.x) {
        const int rank = i / kWords, word = i % kWords;
        if (!is_remote(remote, rank) || waiting.is_masked(rank)) continue;
        const bool confirms = word < kConsumed;
        int* posted = confirms ? &remote.posted->consumed[rank][word] : &remote.posted->failed[rank];
        const int value = confirms ? rt.local->consumed[word] : rt.domain.mailbox[rank]->failed[self];
        if (value == *posted) continue;
        int* there = confirms ? &rt.control[self]->consumed[self][word] : &rt.domain.mailbox[self]->failed[self];
        delay_put();
        nvshmem_int_p(there, value, remote.pes[rank]);
        *posted = value;
    }
}

__host__ __device__ constexpr Kind kind_of(Step step) { return step == kDispatchStep ? kDispatch : kCombine; }

// Blocks that send to one rank.
__host__ __device__ constexpr int pieces_of(Step step) { return step == kTablesStep ? 1 : kPieces; }

__device__ __forceinline__ uint64_t* table_signal(const Remote& remote, Kind kind, int epoch, int source, int table) {
    return &remote.signals->tables[kind][epoch & 1][source][table];
}

__device__ __forceinline__ bool has_arrived(const uint64_t* signal, int epoch) {
    return static_cast<int>(load_acquire_system(signal)) == epoch;
}

// Put with a signal. Called by a warp.
__device__ __forceinline__ void put(void* to, const void* from, int64_t bytes, uint64_t* signal, int epoch, int pe) {
    delay_put();
    if (bytes > 0)
        nvshmemx_putmem_signal_nbi_warp(to, from, bytes, signal, static_cast<uint32_t>(epoch), NVSHMEM_SIGNAL_SET, pe);
    else if (threadIdx.x % kWarpSize == 0)
        nvshmemx_signal_op(signal, static_cast<uint32_t>(epoch), NVSHMEM_SIGNAL_SET, pe);
}

// Called by all threads of a block, a warp per table. What is sent to a rank is at the same place of its memory as in
// staging memory, so `self`, whose memory is symmetric, stands for the destination.
template <Kind kKind>
__device__ __forceinline__ void put_tables(const ExchangeArgs& args, int epoch, int rank) {
    const Runtime& rt = args.remote.runtime;
    const Arena& arena = args.arena;
    const int table = threadIdx.x / kWarpSize, self = rt.domain.rank, pe = args.remote.pes[rank];
    if (table >= (kKind == kDispatch ? kNumTables : kCountsTable)) return;
    const int packets = ceil_div(args.num_topk, kKind == kDispatch ? kRoutesPerPacket : kWeightsPerPacket);
    const void *to, *from;
    int64_t bytes;
    if (table == kFactsTable) {
        to = &rt.control[self]->facts[kKind][epoch & 1][self];
        from = &rt.control[rank]->facts[kKind][epoch & 1][self];
        bytes = sizeof(int4);
    } else if (table == kCountsTable) {
        to = arena.counts(self, epoch, self);
        from = arena.counts(rank, epoch, self);
        bytes = args.num_experts / rt.domain.num_ranks * sizeof(Tagged);
    } else {
        to = kKind == kDispatch ? arena.routes(self, epoch, self, 0, packets)
                                : arena.weights(self, epoch, self, 0, packets);
        from = kKind == kDispatch ? arena.routes(rank, epoch, self, 0, packets)
                                  : arena.weights(rank, epoch, self, 0, packets);
        bytes = static_cast<int64_t>(args.num_tokens) * packets * sizeof(int4);
    }
    put(const_cast<void*>(to), from, bytes, table_signal(args.remote, kKind, epoch, self, table), epoch, pe);
}

// Whether this rank has a row for the token of `home`: the weights that came from there say so. Called by a warp.
__device__ __forceinline__ bool has_sum(const ExchangeArgs& args, int epoch, int home, int token) {
    const int lane = threadIdx.x % kWarpSize, packets = ceil_div(args.num_topk, kWeightsPerPacket);
    bool wanted = false;
    if (lane < packets) {
        const int4 packet =
            load_packet(args.arena.weights(args.remote.runtime.domain.rank, epoch, home, token, packets) + lane);
        wanted = packet.w == epoch && packet.z != -1;  // -1: no expert of this rank, twice
    }
    return __any_sync(kFullMask, wanted);
}

// The rows of piece `piece` for `rank`. Called by all threads of a block.
template <Kind kKind>
__device__ __forceinline__ void put_rows(const ExchangeArgs& args, int epoch, int rank, int piece) {
    const Arena& arena = args.arena;
    const int self = args.remote.runtime.domain.rank, ranks = args.remote.runtime.domain.num_ranks;
    const int tokens = kKind == kDispatch ? args.num_tokens : args.places.tokens(rank);
    int bytes = 2 * arena.hidden;
    if (kKind == kDispatch && args.format != Format::kBf16)
        bytes = arena.hidden + ceil_div(arena.hidden, 512) * static_cast<int>(sizeof(int4));  // channels and scales
    for (int token = piece * kWarps + threadIdx.x / kWarpSize; token < tokens; token += kPieces * kWarps) {
        const bool wanted =
            kKind == kDispatch
                ? ranks_of(args.topk_idx, token, args.num_topk, args.num_experts, args.num_experts / ranks).has(rank)
                : has_sum(args, epoch, rank, token);
        if (wanted)
            put(arena.row(kKind, self, epoch, self, token), arena.row(kKind, rank, epoch, self, token), bytes,
                arena.signal(kKind, self, epoch, self, token), epoch, args.remote.pes[rank]);
    }
}

// The facts of a dispatch that `rank` has announced, if any.
__device__ __forceinline__ bool read_announcement(const Remote& remote, int epoch, int rank, Facts& facts) {
    const Runtime& rt = remote.runtime;
    const int4* from = &rt.control[rt.domain.rank]->facts[kDispatch][epoch & 1][rank];
    if (is_remote(remote, rank)) {
        uint64_t* signal = &remote.signals->early[epoch & 1][rank];
        if (static_cast<int>(load_acquire_system(signal)) != epoch) return false;
        data_visible(signal, static_cast<uint32_t>(epoch));
        from = &remote.signals->early_facts[epoch & 1][rank];
    }
    const int4 packet = load_packet(from);
    facts = Facts::unpack(packet);
    return packet.w == epoch && facts.announced;
}

__device__ __forceinline__ Facts own_facts(const ExchangeArgs& args, Kind kind) {
    return {args.arena.max_tokens, args.num_topk, args.num_experts, static_cast<int>(args.format),
            kind == kCombine ? args.places.epoch() : args.arena.hidden};
}

__device__ __forceinline__ Facts facts_of(const Runtime& rt, Kind kind, int epoch, int rank) {
    return Facts::unpack(load_packet(&rt.control[rt.domain.rank]->facts[kind][epoch & 1][rank]));
}

// Reports a failure and returns true if a rank has announced another dispatch than this one. Such a rank waits on its
// host, so it does not come to this call.
__device__ __forceinline__ bool others_differ(const ExchangeArgs& args, const Waiting& waiting) {
    const Domain& domain = args.remote.runtime.domain;
    if (args.refuses) return false;
    const Facts own = own_facts(args, kDispatch);
    for (int rank = 0; rank < domain.num_ranks; ++rank) {
        Facts facts{};
        if (rank == domain.rank || !read_announcement(args.remote, waiting.epoch, rank, facts)) continue;
        if (!facts.refused && !agree(waiting, rank, own, facts)) return true;
    }
    return false;
}

// The waits of an exchange, by one block. A rank that does not come is masked, or ends the domain.
template <Step kStep>
struct Arrivals {
    static constexpr Kind kKind = kind_of(kStep);
    static constexpr int kLooks = 1024;  // at a signal, between two looks at announcements
    const ExchangeArgs& args;
    const Waiting waiting;
    int *tokens, *topk;          // [R] shared
    unsigned long long* waited;  // [R] shared: nanoseconds
    const uint64_t start = global_nanoseconds();

    __device__ __forceinline__ bool is_expected(int rank) const {
        return rank < waiting.runtime.domain.num_ranks && is_remote(args.remote, rank) && !waiting.is_masked(rank);
    }

    __device__ __forceinline__ void wait_for(int rank, const uint64_t* signal, bool looks_around) const {
        int seen = 0, looks = 0;
        const auto arrived = [&] {
            seen = static_cast<int>(load_acquire_system(signal));
            return seen == waiting.epoch || (looks_around && ++looks % kLooks == 0 && others_differ(args, waiting));
        };
        waiting.thread(rank, arrived, seen);
        if (args.wait_stats) atomicMax(&waited[rank], static_cast<unsigned long long>(global_nanoseconds() - start));
    }

    // Called by all threads, after the signals of one kind of data.
    __device__ __forceinline__ void make_visible() const {
        __syncthreads();
        if (threadIdx.x == 0) data_visible(args.remote.signals->early[0], 0);
        __syncthreads();
    }

    __device__ __forceinline__ void tables() const {
        constexpr int kCount = kKind == kDispatch ? kNumTables : kCountsTable;
        const int rank = threadIdx.x / kCount, table = threadIdx.x % kCount;
        if (is_expected(rank))
            wait_for(rank, table_signal(args.remote, kKind, waiting.epoch, rank, table),
                     kKind == kDispatch && table == kFactsTable);
        make_visible();
    }

    // Tokens of a rank that sends rows; -1: it is masked or refused its input, or the call has failed. Called by a
    // thread.
    __device__ __forceinline__ int tokens_of(int rank, const Facts& facts) const {
        if (facts.refused) {
            if (kKind == kDispatch && !args.refuses)  // it sends no counts: it does not know where they belong
                for (int l = 0; l < args.num_experts / waiting.runtime.domain.num_ranks; ++l)
                    store_tagged_system(args.arena.counts(waiting.runtime.domain.rank, waiting.epoch, rank) + l, 0,
                                        waiting.epoch);
            return -1;
        }
        const bool of_arena =
            facts.max_tokens == args.arena.max_tokens && (kKind == kCombine || facts.key == args.arena.hidden);
        const bool agrees = args.refuses ? of_arena : agree(waiting, rank, own_facts(args, kKind), facts);
        return agrees ? facts.tokens : -1;
    }

    __device__ __forceinline__ void read_tokens() const {
        const Runtime& rt = waiting.runtime;
        const int rank = threadIdx.x;
        if (rank < rt.domain.num_ranks) {
            tokens[rank] = -1;
            if (is_expected(rank) && *static_cast<const volatile int*>(&rt.domain.state->failed) == 0) {
                const Facts facts = facts_of(rt, kKind, waiting.epoch, rank);
                tokens[rank] = tokens_of(rank, facts);
                topk[rank] = facts.num_topk;
            }
        }
        __syncthreads();
    }

    // Whether the token of `rank` has a route to this rank.
    __device__ __forceinline__ bool is_routed_here(int rank, int token) const {
        const int packets = ceil_div(topk[rank], kRoutesPerPacket);
        const int4* routes = args.arena.routes(waiting.runtime.domain.rank, waiting.epoch, rank, token, packets);
        for (int i = 0; i < packets; ++i) {
            const int4 packet = load_packet(routes + i);
            if (packet.x >= 0 || packet.y >= 0 || packet.z >= 0) return true;
        }
        return false;
    }

    // Whether `rank` owns an expert of this rank's token.
    __device__ __forceinline__ bool is_summed_by(int rank, int token) const {
        const int local_experts = args.num_experts / waiting.runtime.domain.num_ranks;
        for (int k = 0; k < args.num_topk; ++k) {
            const int64_t expert = args.topk_idx.at(static_cast<int64_t>(token) * args.num_topk + k);
            if (expert >= 0 && expert < args.num_experts && static_cast<int>(expert) / local_experts == rank)
                return true;
        }
        return false;
    }

    __device__ __forceinline__ void rows() const {
        const int ranks = waiting.runtime.domain.num_ranks, self = waiting.runtime.domain.rank;
        int most = kKind == kDispatch ? 0 : args.num_tokens;
        if (kKind == kDispatch)
            for (int rank = 0; rank < ranks; ++rank) most = max(most, tokens[rank]);
        for (int item = threadIdx.x; item < ranks * most; item += blockDim.x) {
            const int rank = item / most, token = item % most;
            if (!is_expected(rank)) continue;
            if (kKind == kDispatch ? token < tokens[rank] && is_routed_here(rank, token)
                                   : tokens[rank] >= 0 && is_summed_by(rank, token))
                wait_for(rank, args.arena.signal(kKind, self, waiting.epoch, rank, token), false);
        }
        make_visible();
    }
};

// Blocks: a piece of the rows for a rank each, and at last one that confirms and waits.
template <Step kStep>
__global__ void __launch_bounds__(kThreads) exchange_kernel(const __grid_constant__ ExchangeArgs args) {
    __shared__ int tokens[kMaxRanks], topk[kMaxRanks];
    __shared__ unsigned long long waited[kMaxRanks];
    constexpr Kind kKind = kind_of(kStep);
    const Runtime& rt = args.remote.runtime;
    const int epoch = *args.epoch;
    const Waiting waiting{rt, kKind, epoch};
    const bool stopped = epoch == 0 || *static_cast<const volatile int*>(&rt.domain.state->failed) != 0;
    if (blockIdx.x < gridDim.x - 1) {
        const int count = (static_cast<int>(gridDim.x) - 1) / pieces_of(kStep);  // of remote ranks
        const int piece = static_cast<int>(blockIdx.x) / count;
        RankSet left = args.remote.ranks;
        for (int n = static_cast<int>(blockIdx.x) % count; n > 0; --n) remove_first(left);
        const int rank = first_of(left);
        // The last block may have found that another rank's arguments differ. That rank must find it too, so the tables
        // of a dispatch that has begun are sent in any case.
        const bool ends = kStep == kDispatchStep && piece == 0 ? epoch == 0 : stopped;
        if (__syncthreads_or(ends || waiting.is_masked(rank))) return;
        if (piece == 0 && kStep != kRowsStep) put_tables<kKind>(args, epoch, rank);
        if (kStep != kTablesStep) put_rows<kKind>(args, epoch, rank, piece);
        return;
    }
    post(args.remote);
    if (threadIdx.x < kMaxRanks) waited[threadIdx.x] = 0;
    if (__syncthreads_or(stopped || !args.waits)) return;
    const Arrivals<kStep> arrivals{args, waiting, tokens, topk, waited};
    if (kStep != kRowsStep) arrivals.tables();
    if (kStep != kTablesStep) {
        arrivals.read_tokens();
        arrivals.rows();
    }
    if (args.wait_stats && threadIdx.x < rt.domain.num_ranks)
        atomicAdd(&args.wait_stats[threadIdx.x], waited[threadIdx.x]);
}

__global__ void __launch_bounds__(kPostThreads) post_kernel(const __grid_constant__ Remote remote) { post(remote); }

// Put what send_early() stored for a remote rank. Called by one thread. An epoch may be announced and withdrawn several
// times, hence the fence.
__device__ __forceinline__ void put_announcement(const Remote& remote, int epoch, int rank, bool withdrawn) {
    const int self = remote.runtime.domain.rank, half = epoch & 1, pe = remote.pes[rank];
    nvshmem_fence();
    delay_put();
    nvshmem_putmem_signal(&remote.signals->early_facts[half][self],
                          &remote.runtime.control[rank]->facts[kDispatch][half][self], sizeof(int4),
                          &remote.signals->early[half][self], withdrawn ? 0 : static_cast<uint32_t>(epoch),
                          NVSHMEM_SIGNAL_SET, pe);
}

__global__ void __launch_bounds__(kMaxRanks)
    put_announcement_kernel(const __grid_constant__ Remote remote, bool withdrawn) {
    const Runtime& rt = remote.runtime;
    const int rank = threadIdx.x, epoch = next_epoch(rt.local->epochs[kDispatch][0]);
    if (is_stopped(rt.domain) || rank >= rt.domain.num_ranks || !is_remote(remote, rank)) return;
    if (Waiting{rt, kDispatch, epoch}.is_masked(rank)) return;
    put_announcement(remote, epoch, rank, withdrawn);
}

__global__ void __launch_bounds__(kMaxRanks)
    announce_refusal_kernel(const __grid_constant__ Remote remote, int* others) {
    const Runtime& rt = remote.runtime;
    if (__syncthreads_or(is_stopped(rt.domain))) return;  // as the dispatch will be
    post(remote);
    const int rank = threadIdx.x, epoch = next_epoch(rt.local->epochs[kDispatch][0]);
    send_early(rt, epoch, refusal_facts(true), false);
    __threadfence_system();
    __syncthreads();
    const Waiting waiting{rt, kDispatch, epoch};
    const bool peer = rank < rt.domain.num_ranks && rank != rt.domain.rank && !waiting.is_masked(rank);
    const bool is_far = peer && is_remote(remote, rank);
    if (is_far) put_announcement(remote, epoch, rank, false);
    __syncthreads();
    bool allocates = false;
    if (peer) {
        Facts facts{};
        const int seen = 0;
        const auto in_call = [&] {
            return has_arrived(table_signal(remote, kDispatch, epoch, rank, kFactsTable), epoch) ||
                   read_announcement(remote, epoch, rank, facts);
        };
        const bool came = is_far ? waiting.thread(rank, in_call, seen)
                                 : read_facts(waiting, rank, facts, [](const Facts&) { return true; });
        allocates = came && facts.announced && !facts.refused;
    }
    const bool any = __syncthreads_or(allocates) != 0;
    if (rank == 0) *others = any ? kAllocating : kInCall;
}

__global__ void __launch_bounds__(kMaxRanks)
    refusal_kernel(const __grid_constant__ Remote remote, Kind kind, const int* source, int* passed_on) {
    const Runtime& rt = remote.runtime;
    const int rank = threadIdx.x, self = rt.domain.rank;
    const bool stopped = is_stopped(rt.domain) || (source != nullptr && *source == 0);
    post(remote);
    const int epoch = next_epoch(rt.local->epochs[kind][0]);
    if (rank == 0) *passed_on = stopped ? 0 : epoch;
    const Waiting waiting{rt, kind, epoch};
    if (stopped || rank >= rt.domain.num_ranks || !is_remote(remote, rank) || waiting.is_masked(rank)) return;
    const int *consumed = &rt.control[self]->consumed[rank][2 * kind + (epoch & 1)], pe = remote.pes[rank];
    int seen = 0;
    if (!waiting.thread(rank, [&] { return half_is_free(seen = load_relaxed_system(consumed), epoch); }, seen)) return;
    int4* staged = &rt.control[rank]->facts[kind][epoch & 1][self];
    store_packet(staged, refusal_facts(false).pack(epoch));
    __threadfence_system();
    delay_put();
    nvshmem_putmem_signal(&rt.control[self]->facts[kind][epoch & 1][self], staged, sizeof(int4),
                          table_signal(remote, kind, epoch, self, kFactsTable), static_cast<uint32_t>(epoch),
                          NVSHMEM_SIGNAL_SET, pe);
    for (int table = kRoutesTable; table < (kind == kDispatch ? kNumTables : kCountsTable); ++table)
        nvshmemx_signal_op(table_signal(remote, kind, epoch, self, table), static_cast<uint32_t>(epoch),
                           NVSHMEM_SIGNAL_SET, pe);
}

__global__ void __launch_bounds__(kMaxRanks)
    meet_kernel(const __grid_constant__ Remote remote, bool second, const __grid_constant__ RankSet lift) {
    const Runtime& rt = remote.runtime;
    const int self = rt.domain.rank;
    if (threadIdx.x == 0) nvshmem_fence();  // rows of earlier calls arrive before this
    __syncthreads();
    meet(
        rt, second, lift,
        [&](int rank, int4 packet) {
            int4* slot = &rt.control[rank]->meeting[second][self];
            store_packet(slot, packet);
            if (!is_remote(remote, rank)) return;
            __threadfence_system();
            delay_put();
            nvshmem_putmem_signal(&rt.control[self]->meeting[second][self], slot, sizeof(int4),
                                  &remote.signals->met[second][self], static_cast<uint32_t>(packet.w),
                                  NVSHMEM_SIGNAL_SET, remote.pes[rank]);
        },
        [&](int rank, int number, int4& packet) {
            if (is_remote(remote, rank)) {
                uint64_t* met = &remote.signals->met[second][rank];
                if (static_cast<int>(load_acquire_system(met)) != number) return false;
                data_visible(met, static_cast<uint32_t>(number));
            }
            packet = load_packet(&rt.control[self]->meeting[second][rank]);
            return packet.w == number;
        });
}

}  // namespace

cudaError_t launch_exchange(const ExchangeArgs& args, Step step, cudaStream_t stream) {
    int count = 0;
    for (int rank = 0; rank < args.remote.runtime.domain.num_ranks; ++rank) count += args.remote.ranks.has(rank);
    const int blocks = (args.puts ? count * pieces_of(step) : 0) + 1;
    switch (step) {
        case kDispatchStep: exchange_kernel<kDispatchStep><<<blocks, kThreads, 0, stream>>>(args); break;
        case kTablesStep: exchange_kernel<kTablesStep><<<blocks, kThreads, 0, stream>>>(args); break;
        case kRowsStep: exchange_kernel<kRowsStep><<<blocks, kThreads, 0, stream>>>(args); break;
        default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

cudaError_t launch_post(const Remote& remote, cudaStream_t stream) {
    post_kernel<<<1, kPostThreads, 0, stream>>>(remote);
    return cudaGetLastError();
}

cudaError_t launch_put_announcement(const Remote& remote, bool withdrawn, cudaStream_t stream) {
    put_announcement_kernel<<<1, kMaxRanks, 0, stream>>>(remote, withdrawn);
    return cudaGetLastError();
}

cudaError_t launch_remote_announce_refusal(const Remote& remote, int* others, cudaStream_t stream) {
    announce_refusal_kernel<<<1, kMaxRanks, 0, stream>>>(remote, others);
    return cudaGetLastError();
}

cudaError_t launch_remote_refusal(const Remote& remote, Kind kind, const int* source, int* epoch, cudaStream_t stream) {
    refusal_kernel<<<1, kMaxRanks, 0, stream>>>(remote, kind, source, epoch);
    return cudaGetLastError();
}

cudaError_t launch_remote_meet(const Remote& remote, bool second, const RankSet& lift, cudaStream_t stream) {
    meet_kernel<<<1, kMaxRanks, 0, stream>>>(remote, second, lift);
    return cudaGetLastError();
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH::latency
