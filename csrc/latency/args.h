// Memory and kernel arguments of the latency engine, which moves decode-sized batches to places fixed in advance.
//
// Symbols in shapes: T tokens of a rank, M maximum tokens of any rank, K top-k, R ranks, E experts, L = E / R local
// experts, H hidden size.
//
// Two kinds of packets cross the link. Each is sixteen bytes, written and read by one instruction, so neither kind
// needs fences or flags.
//   tables  three words and the epoch of the call: valid if the epoch is that of the running call
//   rows    sixteen bytes of a row, the last word inverted: valid if that word is not 0. The reader clears it.
//
// When a slot may be overwritten. Memory is double-buffered: call e of a kind uses half e % 2, last used by call e - 2.
// Before a rank writes to a peer, it waits until the peer has confirmed that it has finished reading call e - 2
// (Control::consumed). Each kernel starts by confirming the calls of earlier kernels on its stream, whose reads and
// clears are complete. This wait always ends: the peer's own call e confirms before it waits for anything, and a rank
// makes call e only after it has received call e - 2.
//
// No deadlock. The first blocks send tables and wait only for `consumed`, and so do the senders of a dispatch's rows;
// senders of a combine's rows wait for the peers' tables; receivers wait for tables, then for rows. These waits form no
// cycle if all blocks of the grid are resident, so the grid has at most two blocks per SM.
//
// A rank that refuses the arguments of a call executes the kernels of refuse.cu instead, which need no arguments.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "device/tagged.h"
#include "runtime/domain.h"

namespace deepep_moe::DEEPEP_MOE_WIDTH::latency {

constexpr int kMaxTopk = 32;          // one lane of a warp per route of a token
constexpr int kMaxExperts = 1024;     // limited by shared memory
constexpr int kTokenLimit = 1 << 15;  // a position among the rows of one source and expert has 16 bits
constexpr int kMaxBlocks = 1024;
constexpr int kThreads = 512;
constexpr int kBlocksPerSm = 2;
constexpr int kWarps = kThreads / 32;
constexpr int kCrowd = 1024;  // if more warps than this wait for rows, only one lane of each polls

constexpr int kRoutesPerPacket = 3;   // dispatch: local expert << 16 | position among the source's rows of it, or -1
constexpr int kWeightsPerPacket = 2;  // combine: two weights, and their local experts in 16 bits each (0xffff: none)
constexpr int kMaxRoutePackets = (kMaxTopk + kRoutesPerPacket - 1) / kRoutesPerPacket;
constexpr int kMaxWeightPackets = kMaxTopk / kWeightsPerPacket;

inline __host__ __device__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

enum Kind : int { kDispatch, kCombine, kNumKinds };

// Which part of a call a kernel executes.
enum Half : int {
    kTables = 1,  // send tables
    kRows = 2,    // send rows; of a combine, after the peers' tables
    kSend = kTables | kRows,
    kReceive = 4,
    kBoth = kSend | kReceive
};

enum class Format : int { kBf16, kFp8, kFp8Rounded, kFp8Ue8m0 };

// What a rank tells the others about a call, in one packet.
struct Facts {
    int max_tokens, num_topk, num_experts, format;
    int key;  // dispatch: the hidden size; combine: the epoch of its dispatch
    int tokens;
    bool refused;  // this rank refused its input: it has no tokens and sends no rows
    // The packet was sent before the call: either with what must agree, or only to say that the rank refused its input.
    // Unless it shows that something differs, a reader keeps waiting for the packet of the call itself, which contains
    // the number of tokens.
    bool announced;

    // Words x and y, and these bits of word z, must be equal on all ranks.
    static constexpr int kAgreedBits = 0xfff << 16;

    __host__ __device__ int4 pack(int epoch) const {
        return {max_tokens | num_experts << 16, key,
                tokens | num_topk << 16 | format << 24 | int{refused} << 28 | int{announced} << 29, epoch};
    }
    static __host__ __device__ Facts unpack(int4 packet) {
        const int x = packet.x, z = packet.z;
        return {x & 0xffff, z >> 16 & 0xff,     x >> 16,           z >> 24 & 0xf, packet.y,
                z & 0xffff, (z >> 28 & 1) != 0, (z >> 29 & 1) != 0};
    }
};
static_assert(kTokenLimit <= 0xffff && kMaxExperts <= 0xffff && kMaxTopk <= 0xff, "bits of a field");

// Symmetric memory, one for all arenas.
struct Control {
    int4 facts[kNumKinds][2][kMaxRanks];     // [kind][epoch % 2][source] Facts
    int consumed[kMaxRanks][kNumKinds * 2];  // [source][2 * kind + epoch % 2] last epoch that rank has received
    int4 meeting[2][kMaxRanks];              // [first, second half][source] its epochs of both kinds, 0, barrier number
};

// What the blocks of a call vote on (Waiting::vote).
enum class Vote : int { kWritable, kTables };
constexpr int kNumVotes = 2;

// Private device memory of this rank. Epochs are counted here instead of passed as arguments, so that captured graphs
// can be replayed. Each block counts for itself: all kernels have the same grid, so blocks need not synchronise.
struct LocalState {
    int epochs[kNumKinds][kMaxBlocks];
    int consumed[kNumKinds * 2];  // the next values of Control::consumed
    int masked[kMaxRanks];        // not 0: nothing is sent to that rank or expected from it
    // [vote][2 * kind + epoch % 2][rank] whether the rank is lost for call e: 2 * e + lost, modulo 2^32
    int decided[kNumVotes][kNumKinds * 2][kMaxRanks];
    int meetings;
};

struct Runtime {
    Domain domain;
    Control* control[kMaxRanks];  // [rank] as mapped here
    LocalState* local;
    bool masks;  // a rank that does not answer in time is masked instead of ending the domain
};

// Symmetric memory of one (M, H). It is never moved, because captured graphs contain its addresses.
//
// [R sources][2 halves] blocks of what the source sends to the owner in a call:
//   routes   [M][packets of K routes]      of dispatch
//   counts   [kMaxExperts] Tagged          of dispatch: rows for each local expert
//   weights  [M][packets of K weights]     of combine
//   signals  [kinds][M] words              set when a row has arrived from another node (csrc/nvshmem)
//   rows     [kinds][M][2 * H bytes]       of dispatch (scales follow e4m3 data), of combine
// So what one rank sends to another is in two blocks. If the other's memory is not mapped, `base` points to staging
// memory of this rank, displaced so that these two blocks are in it.
struct Arena {
    char* base[kMaxRanks];  // [rank] as mapped here
    int num_ranks, max_tokens, hidden;
    unsigned counts_offset, weights_offset, rows_offset;  // bytes, in a block
    unsigned block_packets;                               // of sixteen bytes
    unsigned signals_offset;                              // bytes, in a block

    __host__ __device__ int64_t slots() const { return static_cast<int64_t>(num_ranks) * max_tokens; }
    __host__ __device__ int64_t row_bytes() const { return 2 * static_cast<int64_t>(hidden); }
    __host__ __device__ int64_t block_bytes() const { return static_cast<int64_t>(block_packets) * sizeof(int4); }
    __host__ __device__ int64_t bytes() const { return 2 * num_ranks * block_bytes(); }

    __device__ __forceinline__ char* block(int owner, int epoch, int source) const {
        return base[owner] + static_cast<uint64_t>(2u * source + (epoch & 1)) * block_packets * sizeof(int4);
    }
    __device__ __forceinline__ int4* routes(int owner, int epoch, int source, int token, int packets) const {
        return reinterpret_cast<int4*>(block(owner, epoch, source)) + token * packets;
    }
    __device__ __forceinline__ Tagged* counts(int owner, int epoch, int source) const {
        return reinterpret_cast<Tagged*>(block(owner, epoch, source) + counts_offset);
    }
    __device__ __forceinline__ int4* weights(int owner, int epoch, int source, int token, int packets) const {
        return reinterpret_cast<int4*>(block(owner, epoch, source) + weights_offset) + token * packets;
    }
    __device__ __forceinline__ uint64_t* signal(Kind kind, int owner, int epoch, int source, int token) const {
        return reinterpret_cast<uint64_t*>(block(owner, epoch, source) + signals_offset) + kind * max_tokens + token;
    }
    __device__ __forceinline__ int4* row(Kind kind, int owner, int epoch, int source, int token) const {
        return reinterpret_cast<int4*>(block(owner, epoch, source) + rows_offset +
                                       static_cast<uint64_t>(unsigned(kind) * max_tokens + token) * (2u * hidden));
    }
};

// Results of a dispatch that its combine needs (the epoch also passes from its sending to its receiving half), in
// memory that belongs to the call.
struct Places {
    int* data;

    static constexpr int kHead = 2 + kMaxRanks;
    __device__ __forceinline__ int& epoch() const { return data[0]; }
    __device__ __forceinline__ int& tokens(int source) const { return data[2 + source]; }  // 0 if masked
    // [R][M][K]: row of the route in [L * R * M], -1 if its expert is on another rank
    __device__ __forceinline__ int& row(const Arena& arena, int num_topk, int source, int token, int k) const {
        return data[kHead + (static_cast<int64_t>(source) * arena.max_tokens + token) * num_topk + k];
    }
};

// The caller's expert indices: [T, K] int32 or int64.
struct TopkIdx {
    const void* data;
    bool wide;

    __device__ __forceinline__ int64_t at(int64_t i) const {
        return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int*>(data)[i];
    }
};

struct DispatchArgs {
    Runtime runtime;
    Arena arena;
    const char* x;  // [T, H] bf16
    TopkIdx topk_idx;
    int num_tokens, num_topk, num_experts;
    Format format;
    Places places;
    char* rows;                      // [L, R * M, H] bf16 or e4m3
    void* scales;                    // [L, H / 128, R * M] fp32, or [L, H / 512 rounded up, R * M] packed exponents
    int* counts;                     // [L]
    int* src_info;                   // [L, R * M]
    int64_t* layout_range;           // [L, R]
    int* stats;                      // [L] or null
    unsigned long long* wait_stats;  // [R] nanoseconds, or null
};

struct CombineArgs {
    Runtime runtime;
    Arena arena;
    const char* x;  // [L, R * M, H] bf16
    TopkIdx topk_idx;
    const float* weights;  // [T, K]
    int num_tokens, num_topk, num_experts;
    Format format;  // of the dispatch
    Places places;  // of the dispatch
    int* epoch;     // of this call, from its sending to its receiving half
    char* out;      // [T, H] bf16
    unsigned long long* wait_stats;
};

// Of a call whose arguments this rank refused.
struct RefusalArgs {
    Runtime runtime;
    Kind kind;
    const Arena* arenas;  // [num_arenas] all that exist, in device memory: peers may use any of them
    int num_arenas;
    int* passed_on;     // of a dispatch: its epoch for the combine, 0 if the call was skipped
    const int* source;  // of a combine: the epoch of its dispatch, or null if unknown
};

// What the other ranks are doing instead of the dispatch that this rank refused.
enum Others : int {
    kInCall,     // they execute or refuse it
    kAllocating  // some of them wait on their hosts, to allocate an arena on all ranks
};

// Launches, each defined next to its kernel. They return the status of the launch.
cudaError_t launch_dispatch(const DispatchArgs& args, Half half, int num_blocks, cudaStream_t stream);
cudaError_t launch_combine(const CombineArgs& args, Half half, int num_blocks, cudaStream_t stream);
// Announce to the peers the values of the next dispatch that must agree, before this rank does something that may take
// long; or withdraw the announcement, before any rank makes another call.
cudaError_t launch_announce(const Runtime& runtime, const Facts& facts, bool withdrawn, cudaStream_t stream);
// Announce to the peers that this rank refuses the next dispatch, and wait until each of them has sent or announced its
// own. `others` is set to an Others, or is left alone while kernels are frozen.
cudaError_t launch_announce_refusal(const Runtime& runtime, int* others, cudaStream_t stream);
// Take part in a call without tokens, so that the peers learn that this rank refused its arguments.
cudaError_t launch_refusal(const RefusalArgs& args, int num_blocks, cudaStream_t stream);
cudaError_t launch_set_mask(const Runtime& runtime, int rank, cudaStream_t stream);
cudaError_t launch_query_mask(const Runtime& runtime, int* status, cudaStream_t stream);
// A barrier of all ranks that are not masked or are in `lift`. Ranks of `lift` that arrive are unmasked.
// All ranks have equal epochs afterwards.
cudaError_t launch_meet(const Runtime& runtime, bool second, const RankSet& lift, cudaStream_t stream);

}  // namespace deepep_moe::DEEPEP_MOE_WIDTH::latency
