// What the kernels of deepep_moe._nvshmem are launched with. No NVSHMEM header is needed to read this.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace deepep_moe {

// Pinned host memory, written by the device; `failed` last.
struct RailFailure {
    long long failed, phase, peer, expected, seen;  // peer: as the caller numbers it
};

struct Waiting {
    RailFailure* record;
    int* failed;  // device memory: this rank has failed
    uint64_t timeout_nanoseconds;
};

// -- the rail ---------------------------------------------------------------------------------------------------------

// Where a rank was when it failed.
enum RailPhase : int {
    kRailStart,    // the peer had not begun the operation, so it may still read what the one before brought
    kRailRows,     // rows of the peer had not arrived
    kRailGivenUp,  // the peer said that it had given up; expected and seen are 0
};

constexpr int kPiecesPerBlock = 16;  // of the rows for one peer, each with a signal of its own
constexpr int kMaxChunks = 8;        // of an operation
constexpr int kRailRegions = 4;      // of memory, between which operations alternate

// Symmetric memory, in rows of words: signals that peers write and this rank reads. Peers are the other ranks of the
// rail, numbered without this one.
struct RailSignals {
    uint64_t* arrived;   // [region][chunk][peer][piece] number of the operation whose rows are there
    uint64_t* begun;     // [peer] operations that the peer has begun
    uint64_t* given_up;  // [peer] 1: the peer does nothing any more
};

// Device memory of this rank.
struct RailState {
    long long done;                    // operations that have ended here
    long long last_use[kRailRegions];  // number of the last operation in each region, the first being 1
    int failed;
};

// What every kernel of a rail knows.
struct RailArgs {
    RailFailure* record;
    RailState* state;
    RailSignals signals;
    const int* pes;  // [num_ranks]
    int rank, num_ranks, region;
    uint64_t timeout_nanoseconds;
};

// Of one chunk: every rank sends every other a block of `block_rows` rows or fewer. At each receiver the blocks lie one
// after another, without its own.
struct RailChunk {
    int chunk;
    bool last;  // of the operation
    int block_rows, row_bytes;
    const int* used;   // [num_ranks] rows for each rank that carry data; null: all
    const char* sent;  // [peers][block_rows][row_bytes] symmetric
    char* received;    // [peers][block_rows][row_bytes] symmetric
};

// Begin an operation: tell the peers that this rank has read what the operations before brought, and wait until they
// have read what lies where this one will write. Memory to send from may be written after it.
cudaError_t launch_rail_begin(const RailArgs& args, cudaStream_t stream);
cudaError_t launch_rail_put(const RailArgs& args, const RailChunk& chunk, cudaStream_t stream);
// Wait for the chunk's rows of all peers. Where they do not come they become NaN.
cudaError_t launch_rail_wait(const RailArgs& args, const RailChunk& chunk, cudaStream_t stream);
// Tell the peers that this rank does nothing any more.
cudaError_t launch_rail_give_up(const RailArgs& args, cudaStream_t stream);

// -- the self-test ----------------------------------------------------------------------------------------------------

// What a rank waited for in vain.
enum ProbePhase : int { kProbeRows, kProbeAnswer };

// Rounds of patterned chunks to one PE, and as many from another. Memory is symmetric, at the same place on all PEs.
struct ProbeArgs {
    Waiting waiting;
    int rank, to, from;               // numbers of ranks: this one, whom it sends to, whom it receives from
    int to_pe, from_pe;               // their PEs
    char* sent;                       // [chunks][chunk_bytes]
    char* received;                   // [chunks][chunk_bytes]
    uint64_t* arrived;                // [chunks] signals: the round that has arrived from `from`
    uint64_t* taken;                  // [chunks] signals: the round that `to` has read
    uint64_t first_round;             // above all rounds that these signals have seen
    int rounds, chunks, chunk_bytes;  // chunk_bytes: a multiple of 8
    bool check;                       // write a new pattern each round and compare what arrives
    unsigned long long* wrong;        // device memory: 8-byte words that differed
};

cudaError_t launch_probe(const ProbeArgs& args, cudaStream_t stream);

}  // namespace deepep_moe
