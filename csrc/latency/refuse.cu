// What a rank executes instead of a call whose arguments it refused, so that its peers need not wait for it.
//
// The refused arguments may name another shape than those of the peers. So these kernels take the shape from the facts
// that the peers send: they tell the peers that this rank refused its input and has no tokens, and remove the rows that
// the peers send from the arena that they use.
#include "latency/packets.cuh"

namespace deepep_moe::DEEPEP_MOE_WIDTH::latency {

namespace {

__global__ void __launch_bounds__(kMaxRanks) announce_refusal_kernel(const __grid_constant__ Runtime rt, int* others) {
    if (__syncthreads_or(is_stopped(rt.domain))) return;  // as the dispatch will be
    const int r = threadIdx.x, epoch = next_epoch(rt.local->epochs[kDispatch][0]);
    send_early(rt, epoch, refusal_facts(true), false);
    const Waiting waiting{rt, kDispatch, epoch};
    bool allocates = false;
    if (r < rt.domain.num_ranks && r != rt.domain.rank && !waiting.is_masked(r)) {
        Facts facts{};
        const bool came = read_facts(waiting, r, facts, [](const Facts&) { return true; });
        allocates = came && facts.announced && !facts.refused;
    }
    const bool any = __syncthreads_or(allocates) != 0;
    if (r == 0) *others = any ? kAllocating : kInCall;
}

// A peer's dispatch, from its facts.
struct Sender {
    int tokens;  // that have rows to be removed; 0 also if the peer is masked, lost, or refused its input
    int topk, experts, row_packets;
    const Arena* arena;  // null if the peer needs nothing from this rank but its facts
};

__device__ __forceinline__ Sender sender_of(const RefusalArgs& args, const Facts& facts) {
    Sender sender{};
    if (args.kind != kDispatch || facts.refused) return sender;
    for (int i = 0; i < args.num_arenas; ++i) {
        const Arena& arena = args.arenas[i];
        if (arena.max_tokens != facts.max_tokens || arena.hidden != facts.key) continue;
        const bool fp8 = facts.format != static_cast<int>(Format::kBf16);
        const int packets = arena.hidden / (fp8 ? 16 : 8);
        sender = {facts.tokens, facts.num_topk, facts.num_experts, packets + (fp8 ? ceil_div(packets, kWarpSize) : 0),
                  &arena};
    }
    return sender;
}

// Waits for the row of a token, if it was sent here, and clears its packets. Called by a warp.
__device__ __forceinline__ void remove_row(const Waiting& waiting, const Sender& sender, int source, int token) {
    const int lane = threadIdx.x % kWarpSize, packets = ceil_div(sender.topk, kRoutesPerPacket);
    const int own = waiting.runtime.domain.rank, epoch = waiting.epoch;
    const int4* from = sender.arena->routes(own, epoch, source, token, packets) + lane;
    int4 routes{-1, -1, -1, epoch};
    const auto routes_arrived = [&] {
        if (lane < packets) routes = load_packet(from);
        return routes.w == epoch;
    };
    if (!waiting.warp(source, routes_arrived)) return;
    if (!__any_sync(kFullMask, routes.x >= 0 || routes.y >= 0 || routes.z >= 0)) return;
    int4* row = sender.arena->row(kDispatch, own, epoch, source, token);
    for (int begin = 0; begin < sender.row_packets; begin += kWarpSize) {
        const bool exists = begin + lane < sender.row_packets;
        if (!waiting.warp(source, [&] { return !exists || is_sealed(load_packet(row + begin + lane)); })) return;
        if (exists) store_packet(row + begin + lane, {0, 0, 0, 0});
    }
}

__global__ void __launch_bounds__(kThreads, kBlocksPerSm) refusal_kernel(const __grid_constant__ RefusalArgs args) {
    __shared__ Sender senders[kMaxRanks];
    const Runtime& rt = args.runtime;
    const int ranks = rt.domain.num_ranks, own = rt.domain.rank, block = static_cast<int>(blockIdx.x);
    const int warp = threadIdx.x / kWarpSize;
    const Entered entered = enter<kBoth>(rt, args.kind, args.passed_on, args.source, [] {});
    if (entered.epoch == 0) return;
    const Waiting waiting{rt, args.kind, entered.epoch};
    const int tables = table_blocks(ranks), thread = threadIdx.x;
    // Runs send(peer) for the peers to which this block sends tables.
    const auto each_peer = [&](const auto& send) {
        for (int next = block; block < tables && next < ranks; next += tables) {
            const int peer = (own + next) % ranks;
            if (peer != own && entered.writable.has(peer)) send(peer);
        }
    };
    if (warp == 0) each_peer([&](int peer) { send_facts(rt, args.kind, entered.epoch, peer, refusal_facts(false)); });
    if (thread < ranks) {
        Facts facts{};
        const auto of_the_call = [](const Facts& theirs) { return !theirs.announced; };
        const bool came =
            thread != own && !waiting.is_masked(thread) && read_facts(waiting, thread, facts, of_the_call);
        senders[thread] = came ? sender_of(args, facts) : Sender{};
    }
    __syncthreads();
    each_peer([&](int peer) {
        if (senders[peer].arena == nullptr) return;
        Tagged* counts = senders[peer].arena->counts(peer, entered.epoch, own);
        for (int l = thread; l < senders[peer].experts / ranks; l += kThreads)
            store_tagged_system(counts + l, 0, entered.epoch);
    });
    int most = 0;
    for (int s = 0; s < ranks; ++s) most = max(most, senders[s].tokens);
    for (int item = block * kWarps + warp; item < ranks * most; item += gridDim.x * kWarps) {
        const int source = item % ranks, token = item / ranks;
        if (token < senders[source].tokens) remove_row(waiting, senders[source], source, token);
    }
}

}  // namespace

cudaError_t launch_announce_refusal(const Runtime& runtime, int* others, cudaStream_t stream) {
    announce_refusal_kernel<<<1, kMaxRanks, 0, stream>>>(runtime, others);
    return cudaGetLastError();
}

cudaError_t launch_refusal(const RefusalArgs& args, int num_blocks, cudaStream_t stream) {
    refusal_kernel<<<num_blocks, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH::latency
