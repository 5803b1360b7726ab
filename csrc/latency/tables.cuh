// The tables of a dispatch: for each route of a token, its local expert at the peer and its place among the rows that
// this rank sends to that expert; and how many rows each expert gets. The receiver adds the rows of earlier ranks.
//
// The experts of a token differ, so a bit per (expert, token) says who chose what, and the place of a route is the
// number of bits below its token's. Each thread makes one packet. The block needs two barriers, and the result does not
// depend on the order of the atomic operations.
#pragma once

#include <cstddef>

#include "latency/packets.cuh"

namespace deepep_moe::DEEPEP_MOE_WIDTH::latency {

constexpr int kTileWords = 8;  // of 32 tokens each: what shared memory holds at a time
static_assert(kTileWords % 4 == 0, "cleared sixteen bytes at a time");

struct Tables {
    // [local expert] a bit per token of the tile: whether it chose the expert
    alignas(sizeof(int4)) unsigned chosen[kMaxExperts][kTileWords];
    int base[kMaxExperts];  // [local expert] tokens of earlier tiles that chose it
};

__device__ __forceinline__ Facts facts_of(const DispatchArgs& args) {
    return {args.arena.max_tokens,         args.num_topk,     args.num_experts,
            static_cast<int>(args.format), args.arena.hidden, args.num_tokens};
}

// The routes of the packet that this thread makes: three routes of a token of the tile.
struct PacketRoutes {
    int token, number;             // in the tile; packet of the token
    int expert[kRoutesPerPacket];  // local expert at the peer, -1: another rank's, or none
};

// Tokens of a tile that begins with token `first`.
__device__ __forceinline__ int tile_of(const DispatchArgs& args, int first, int packets) {
    return min(min(kThreads / packets, kTileWords * 32), args.num_tokens - first);
}

// Whether the token chose the same expert earlier in its top-k. Only checked if a bit of Tables::chosen was set twice.
inline __device__ __noinline__ bool is_repeated(const DispatchArgs& args, int64_t token, int k) {
    const int64_t expert = args.topk_idx.at(token * args.num_topk + k);
#pragma unroll 1
    for (int earlier = 0; earlier < k; ++earlier) {
        if (args.topk_idx.at(token * args.num_topk + earlier) != expert) continue;
        report_notice(args.runtime.domain, kRepeatedExpert, kLowLatencyDispatch, args.runtime.domain.rank,
                      static_cast<int>(token), static_cast<int>(expert));
        return true;
    }
    return false;
}

// Reads the routes of a tile and marks in the tables which tokens chose which experts of `peer`. Called by all threads
// of the block; a barrier must follow before the tables are read.
__device__ __forceinline__ PacketRoutes read_tile(const DispatchArgs& args, Tables& tables, int peer, int first,
                                                  int packets) {
    const int local_experts = args.num_experts / args.runtime.domain.num_ranks;
    PacketRoutes routes;
    routes.token = threadIdx.x / packets;
    routes.number = threadIdx.x % packets;
    const bool exists = routes.token < tile_of(args, first, packets);
    const int64_t token = first + routes.token;
    int64_t expert[kRoutesPerPacket];
#pragma unroll
    for (int n = 0; n < kRoutesPerPacket; ++n) {
        const int k = routes.number * kRoutesPerPacket + n;
        expert[n] = exists && k < args.num_topk ? args.topk_idx.at(token * args.num_topk + k) : -1;
    }
    static_assert(alignof(Tables) % sizeof(int4) == 0 && offsetof(Tables, chosen) == 0,
                  "shared memory for int4 stores");
    for (int i = threadIdx.x; i < local_experts * kTileWords / 4; i += kThreads)
        reinterpret_cast<int4*>(tables.chosen)[i] = {0, 0, 0, 0};
    if (first == 0)
        for (int l = threadIdx.x; l < local_experts; l += kThreads) tables.base[l] = 0;
    __syncthreads();
    bool repeated = false;
#pragma unroll
    for (int n = 0; n < kRoutesPerPacket; ++n) {
        const bool valid = expert[n] >= 0 && expert[n] < args.num_experts;
        if (!valid && expert[n] != -1)
            report_notice(args.runtime.domain, kBadExpert, kLowLatencyDispatch, args.runtime.domain.rank,
                          args.num_experts, static_cast<int>(expert[n]));
        const int local = static_cast<int>(expert[n]) - peer * local_experts;
        routes.expert[n] = valid && local >= 0 && local < local_experts ? local : -1;
        if (routes.expert[n] < 0) continue;
        const unsigned bit = 1u << routes.token % 32;
        repeated |= (atomicOr(&tables.chosen[local][routes.token / 32], bit) & bit) != 0;
    }
    if (__syncthreads_or(repeated)) {
#pragma unroll
        for (int n = 0; n < kRoutesPerPacket; ++n)
            if (routes.expert[n] >= 0 && is_repeated(args, token, routes.number * kRoutesPerPacket + n))
                routes.expert[n] = -1;
    }
    return routes;
}

// Called by all threads of a block. `routes`: of the first tile.
__device__ __forceinline__ void send_tables(const DispatchArgs& args, Tables& tables, PacketRoutes routes, int epoch,
                                            int peer, bool writable) {
    const Arena& arena = args.arena;
    const int rank = args.runtime.domain.rank, tokens = args.num_tokens;
    const int local_experts = args.num_experts / args.runtime.domain.num_ranks;
    const int packets = ceil_div(args.num_topk, kRoutesPerPacket);
    if (writable && threadIdx.x / kWarpSize == kWarps - 1)  // the warp with the fewest packets
        send_facts(args.runtime, kDispatch, epoch, peer, facts_of(args));
    for (int first = 0;;) {
        const int in_tile = tile_of(args, first, packets);
        if (writable && routes.token < in_tile) {
            int words[kRoutesPerPacket];
#pragma unroll
            for (int n = 0; n < kRoutesPerPacket; ++n) {
                words[n] = -1;
                if (routes.expert[n] < 0) continue;
                const unsigned* chosen = tables.chosen[routes.expert[n]];
                int place =
                    tables.base[routes.expert[n]] + __popc(chosen[routes.token / 32] & ((1u << routes.token % 32) - 1));
                for (int w = 0; w < routes.token / 32; ++w) place += __popc(chosen[w]);
                words[n] = routes.expert[n] << 16 | place;
            }
            store_packet(arena.routes(peer, epoch, rank, first + routes.token, packets) + routes.number,
                         {words[0], words[1], words[2], epoch});
        }
        first += in_tile;
        if (first < tokens) __syncthreads();
        for (int l = threadIdx.x; l < local_experts; l += kThreads) {
            int count = tables.base[l];
#pragma unroll
            for (int w = 0; w < kTileWords; ++w) count += __popc(tables.chosen[l][w]);
            if (first < tokens)
                tables.base[l] = count;
            else if (writable)
                store_tagged_system(arena.counts(peer, epoch, rank) + l, count, epoch);
        }
        __syncthreads();  // the memory of tables is used again
        if (first >= tokens) return;
        routes = read_tile(args, tables, peer, first, packets);
        __syncthreads();
    }
}

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH::latency
