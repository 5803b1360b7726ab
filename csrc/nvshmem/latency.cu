#include <algorithm>

#include "latency/meeting.cuh"
#include "nvshmem/latency.h"
#include "nvshmem/signal.cuh"

namespace deepep_moe::latency {

namespace {

constexpr int kPostThreads = 192;

__device__ __forceinline__ bool is_remote(const Remote& remote, int rank) { return remote.ranks >> rank & 1; }

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

__device__ __forceinline__ uint64_t* signals_of(const Remote& remote, Step step, int epoch, int source) {
    return remote.signals->arrived[step][epoch & 1][source];
}

__host__ __device__ constexpr Kind kind_of(Step step) { return step == kDispatchStep ? kDispatch : kCombine; }

// Called by a warp.
__device__ __forceinline__ void put(void* to, const void* from, int64_t bytes, int pe) {
    if (bytes == 0) return;
    delay_put();
    nvshmemx_putmem_nbi_warp(to, from, bytes, pe);
}

// Called by all threads of a block. What is sent to a rank is at the same place of its memory as in staging memory, so
// `self`, whose memory is symmetric, stands for the destination.
template <Step kStep>
__device__ __forceinline__ void put_tables(const ExchangeArgs& args, int epoch, int rank) {
    constexpr Kind kKind = kind_of(kStep);
    const Runtime& rt = args.remote.runtime;
    const Arena& arena = args.arena;
    const int warp = threadIdx.x / kWarpSize, self = rt.domain.rank, pe = args.remote.pes[rank];
    if (warp == 0)
        put(rt.control[self]->facts[kKind][epoch & 1][self], rt.control[rank]->facts[kKind][epoch & 1][self],
            sizeof(int4) * Facts::kPackets, pe);
    if (kStep == kDispatchStep) {
        const int packets = ceil_div(args.num_topk, kRoutesPerPacket);
        if (warp == 1)
            put(arena.routes(self, epoch, self, 0, packets), arena.routes(rank, epoch, self, 0, packets),
                static_cast<int64_t>(args.num_tokens) * packets * sizeof(int4), pe);
        if (warp == 2)
            put(arena.counts(self, epoch, self), arena.counts(rank, epoch, self),
                args.num_experts / rt.domain.num_ranks * sizeof(Tagged), pe);
    } else {
        const int packets = ceil_div(args.num_topk, kWeightsPerPacket);
        if (warp == 1)
            put(arena.weights(self, epoch, self, 0, packets), arena.weights(rank, epoch, self, 0, packets),
                static_cast<int64_t>(args.num_tokens) * packets * sizeof(int4), pe);
    }
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
template <Step kStep>
__device__ __forceinline__ void put_rows(const ExchangeArgs& args, int epoch, int rank, int piece) {
    const Arena& arena = args.arena;
    const int self = args.remote.runtime.domain.rank, ranks = args.remote.runtime.domain.num_ranks;
    const bool dispatches = kStep == kDispatchStep;
    const int tokens = dispatches ? args.num_tokens : args.places.tokens(rank);
    int bytes = 2 * arena.hidden;
    if (dispatches && args.format != Format::kBf16)
        bytes = arena.hidden + ceil_div(arena.hidden, 512) * static_cast<int>(sizeof(int4));
    constexpr Kind kKind = kind_of(kStep);
    for (int token = piece * kWarps + threadIdx.x / kWarpSize; token < tokens; token += kPieces * kWarps) {
        const bool wanted =
            dispatches
                ? ranks_of(args.topk_idx, token, args.num_topk, args.num_experts, args.num_experts / ranks) >> rank & 1
                : has_sum(args, epoch, rank, token);
        if (wanted)
            put(arena.row(kKind, self, epoch, self, token), arena.row(kKind, rank, epoch, self, token), bytes,
                args.remote.pes[rank]);
    }
}

// The facts of a dispatch that `rank` has announced, if any.
__device__ __forceinline__ bool read_announcement(const Remote& remote, int epoch, int rank, Facts& facts) {
    const Runtime& rt = remote.runtime;
    const int4* from = rt.control[rt.domain.rank]->facts[kDispatch][epoch & 1][rank];
    if (is_remote(remote, rank)) {
        uint64_t* signal = &remote.signals->early[epoch & 1][rank];
        if (static_cast<int>(load_acquire_system(signal)) != epoch) return false;
        data_visible(signal, static_cast<uint32_t>(epoch));
        from = remote.signals->early_facts[epoch & 1][rank];
    }
    bool all = true;
    for (int i = 0; i < Facts::kPackets; ++i) {
        const int4 packet = load_packet(from + i);
        all = all && packet.w == epoch;
        facts.word[3 * i] = packet.x;
        facts.word[3 * i + 1] = packet.y;
        facts.word[3 * i + 2] = packet.z;
    }
    return all && facts.word[Facts::kFactAnnounced];
}

// Reports a failure and returns true if a rank has announced another dispatch than this one. Such a rank waits on its
// host, so it does not come to this call.
__device__ __forceinline__ bool others_differ(const ExchangeArgs& args, const Waiting& waiting) {
    const Arena& arena = args.arena;
    const Domain& domain = args.remote.runtime.domain;
    if (arena.num_ranks == 0) return false;  // this rank refuses the call
    const Facts own{{arena.max_tokens, arena.hidden, args.num_topk, args.num_experts, static_cast<int>(args.format)}};
    for (int rank = 0; rank < domain.num_ranks; ++rank) {
        Facts facts{};
        if (rank == domain.rank || !read_announcement(args.remote, waiting.epoch, rank, facts)) continue;
        if (!facts.word[Facts::kFactRefused] && !agree(waiting, rank, own, facts)) return true;
    }
    return false;
}

// One block waits for the signals of all remote ranks. A rank that does not come is masked, or ends the domain.
template <Step kStep>
__device__ __forceinline__ void wait_for_all(const ExchangeArgs& args, int epoch, int pieces) {
    constexpr int kLooks = 1024;  // at a signal, between two looks at announcements
    const Runtime& rt = args.remote.runtime;
    const int rank = threadIdx.x, self = rt.domain.rank;
    const Waiting waiting{rt, kind_of(kStep), epoch};
    if (rank >= rt.domain.num_ranks || !is_remote(args.remote, rank) || waiting.is_masked(rank)) return;
    uint64_t* signals = signals_of(args.remote, kStep, epoch, rank);
    const uint64_t start = global_nanoseconds();
    bool came = true;
    for (int piece = 0; piece < pieces && came; ++piece) {
        int seen = 0, looks = 0;
        bool differ = false;
        const auto arrived = [&] {
            seen = static_cast<int>(load_acquire_system(&signals[piece]));
            if (kStep == kDispatchStep && seen != epoch && ++looks % kLooks == 0) differ = others_differ(args, waiting);
            return seen == epoch || differ;
        };
        came = waiting.thread(rank, arrived, seen) && !differ;
    }
    if (args.wait_stats)
        atomicAdd(&args.wait_stats[rank], static_cast<unsigned long long>(global_nanoseconds() - start));
    if (!came) return;
    data_visible(signals, static_cast<uint32_t>(epoch));
    if (kStep != kDispatchStep || args.arena.num_ranks == 0) return;
    // A rank that refused its input sends no counts: it does not know where they belong.
    constexpr int kWord = Facts::kFactRefused;
    const int4 told = load_packet(&rt.control[self]->facts[kDispatch][epoch & 1][rank][kWord / 3]);
    if ((kWord % 3 == 0 ? told.x : kWord % 3 == 1 ? told.y : told.z) == 0) return;
    for (int l = 0; l < args.num_experts / rt.domain.num_ranks; ++l)
        store_tagged_system(args.arena.counts(self, epoch, rank) + l, 0, epoch);
}

// Blocks: a piece of the rows for a rank each. The first also confirms and waits.
template <Step kStep>
__global__ void __launch_bounds__(kThreads) exchange_kernel(const __grid_constant__ ExchangeArgs args) {
    constexpr int kSignals = kStep == kTablesStep ? 1 : kPieces;
    const Runtime& rt = args.remote.runtime;
    if (blockIdx.x == 0) post(args.remote);
    const int epoch = *args.epoch;
    if (__syncthreads_or(epoch == 0 || *static_cast<const volatile int*>(&rt.domain.state->failed) != 0)) return;
    if (args.puts) {
        const int count = __popc(args.remote.ranks), piece = static_cast<int>(blockIdx.x) / count;
        RankMask left = args.remote.ranks;
        for (int n = static_cast<int>(blockIdx.x) % count; n > 0; --n) left &= left - 1;
        const int rank = __ffs(left) - 1;
        if (!__syncthreads_or(Waiting{rt, kDispatch, epoch}.is_masked(rank))) {
            if (piece == 0 && kStep != kRowsStep) put_tables<kStep>(args, epoch, rank);
            if (kStep != kTablesStep) put_rows<kStep>(args, epoch, rank, piece);
            __syncthreads();
            if (threadIdx.x == 0) {
                nvshmem_fence();  // the puts of the whole block arrive before the signal
                delay_put();
                nvshmemx_signal_op(signals_of(args.remote, kStep, epoch, rt.domain.rank) + piece,
                                   static_cast<uint32_t>(epoch), NVSHMEM_SIGNAL_SET, args.remote.pes[rank]);
            }
        }
    }
    if (args.waits && blockIdx.x == 0) wait_for_all<kStep>(args, epoch, kSignals);
}

__global__ void __launch_bounds__(kPostThreads) post_kernel(const __grid_constant__ Remote remote) { post(remote); }

// Puts facts into `there` of a remote rank, word by word. Called by one thread.
__device__ __forceinline__ void put_facts(int4* there, const Facts& facts, int epoch, int pe) {
    int* words = reinterpret_cast<int*>(there);
    for (int i = 0; i < Facts::kPackets; ++i) {
        for (int n = 0; n < 3; ++n) nvshmem_int_p(words + 4 * i + n, facts.word[3 * i + n], pe);
        nvshmem_int_p(words + 4 * i + 3, epoch, pe);
    }
}

// Called by one thread for each remote rank. Announcements of one epoch may follow each other, hence the first fence.
__device__ __forceinline__ void put_announcement(const Remote& remote, int epoch, int rank, const Facts& facts,
                                                 bool withdrawn) {
    const int self = remote.runtime.domain.rank, half = epoch & 1, pe = remote.pes[rank];
    nvshmem_fence();
    delay_put();
    put_facts(remote.signals->early_facts[half][self], facts, withdrawn ? 0 : epoch, pe);
    nvshmem_fence();
    nvshmemx_signal_op(&remote.signals->early[half][self], withdrawn ? 0 : static_cast<uint32_t>(epoch),
                       NVSHMEM_SIGNAL_SET, pe);
}

__global__ void __launch_bounds__(kWarpSize)
    put_announcement_kernel(const __grid_constant__ Remote remote, bool withdrawn) {
    const Runtime& rt = remote.runtime;
    const int rank = threadIdx.x, epoch = next_epoch(rt.local->epochs[kDispatch][0]);
    if (is_stopped(rt.domain) || rank >= rt.domain.num_ranks || !is_remote(remote, rank)) return;
    if (Waiting{rt, kDispatch, epoch}.is_masked(rank)) return;
    const int4* staged = rt.control[rank]->facts[kDispatch][epoch & 1][rt.domain.rank];
    Facts facts{};
    for (int i = 0; i < Facts::kPackets; ++i) {
        const int4 packet = load_packet(staged + i);
        facts.word[3 * i] = packet.x;
        facts.word[3 * i + 1] = packet.y;
        facts.word[3 * i + 2] = packet.z;
    }
    put_announcement(remote, epoch, rank, facts, withdrawn);
}

__global__ void __launch_bounds__(kWarpSize)
    announce_refusal_kernel(const __grid_constant__ Remote remote, int* others) {
    const Runtime& rt = remote.runtime;
    if (is_stopped(rt.domain)) return;  // as the dispatch will be
    post(remote);
    const int rank = threadIdx.x, epoch = next_epoch(rt.local->epochs[kDispatch][0]);
    const Facts refusal = refusal_facts(true);
    send_early(rt, epoch, refusal, false);
    const Waiting waiting{rt, kDispatch, epoch};
    const bool peer = rank < rt.domain.num_ranks && rank != rt.domain.rank && !waiting.is_masked(rank);
    const bool is_far = peer && is_remote(remote, rank);
    if (is_far) put_announcement(remote, epoch, rank, refusal, false);
    __syncwarp();
    bool allocates = false;
    if (peer) {
        Facts facts{};
        const uint64_t* signals = signals_of(remote, kDispatchStep, epoch, rank);
        int seen = 0;
        const auto in_call = [&] {
            bool all = true;
            for (int piece = 0; piece < kPieces; ++piece)
                all = all && (seen = static_cast<int>(load_acquire_system(&signals[piece]))) == epoch;
            return all || read_announcement(remote, epoch, rank, facts);
        };
        const bool came = is_far ? waiting.thread(rank, in_call, seen)
                                 : read_facts(waiting, rank, facts, [](const Facts&) { return true; });
        allocates = came && facts.word[Facts::kFactAnnounced] && !facts.word[Facts::kFactRefused];
    }
    const bool any = __any_sync(kFullMask, allocates);
    if (rank == 0) *others = any ? kAllocating : kInCall;
}

__global__ void __launch_bounds__(kWarpSize)
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
    delay_put();
    put_facts(rt.control[self]->facts[kind][epoch & 1][self], refusal_facts(false), epoch, pe);
    nvshmem_fence();
    const auto set = [&](Step step, int pieces) {
        uint64_t* signals = signals_of(remote, step, epoch, self);
        for (int piece = 0; piece < pieces; ++piece)
            nvshmemx_signal_op(signals + piece, static_cast<uint32_t>(epoch), NVSHMEM_SIGNAL_SET, pe);
    };
    if (kind == kDispatch) {
        set(kDispatchStep, kPieces);
    } else {
        set(kTablesStep, 1);
        set(kRowsStep, kPieces);
    }
}

__global__ void __launch_bounds__(kWarpSize)
    meet_kernel(const __grid_constant__ Remote remote, bool second, RankMask lift) {
    const Runtime& rt = remote.runtime;
    const int self = rt.domain.rank;
    if (threadIdx.x == 0) nvshmem_fence();  // rows of earlier calls arrive before this
    __syncwarp();
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
    for (RankMask left = args.remote.ranks; left; left &= left - 1) ++count;
    const int blocks = args.puts ? count * (step == kTablesStep ? 1 : kPieces) : 1;
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
    put_announcement_kernel<<<1, kWarpSize, 0, stream>>>(remote, withdrawn);
    return cudaGetLastError();
}

cudaError_t launch_remote_announce_refusal(const Remote& remote, int* others, cudaStream_t stream) {
    announce_refusal_kernel<<<1, kWarpSize, 0, stream>>>(remote, others);
    return cudaGetLastError();
}

cudaError_t launch_remote_refusal(const Remote& remote, Kind kind, const int* source, int* epoch, cudaStream_t stream) {
    refusal_kernel<<<1, kWarpSize, 0, stream>>>(remote, kind, source, epoch);
    return cudaGetLastError();
}

cudaError_t launch_remote_meet(const Remote& remote, bool second, RankMask lift, cudaStream_t stream) {
    meet_kernel<<<1, kWarpSize, 0, stream>>>(remote, second, lift);
    return cudaGetLastError();
}

}  // namespace deepep_moe::latency
