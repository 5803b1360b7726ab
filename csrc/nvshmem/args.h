// Arguments of the kernels of deepep_moe._nvshmem. Does not depend on NVSHMEM's headers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace deepep_moe {

// The first failure of this rank, in pinned host memory. The device writes `failed` last.
struct RailFailure {
    long long failed, phase, peer, expected, seen;  // peer: rank in the rail or in the self-test's group
};

struct Waiting {
    RailFailure* record;
    int* failed;  // device memory: nonzero once this rank has failed
    uint64_t timeout_nanoseconds;
};

// -- the rail ---------------------------------------------------------------------------------------------------------

// What a rank was waiting for when it failed.
enum RailPhase : int {
    kRailStart,    // the peer to begin an operation; until then it may read the rows of an earlier one
    kRailRows,     // rows of the peer
    kRailGivenUp,  // the peer reported that it has given up; expected and seen are 0
};

constexpr int kPiecesPerBlock = 16;  // the rows for one peer are sent in so many pieces, each with its own signal
constexpr int kMaxChunks = 8;        // chunks of an operation
constexpr int kRailRegions = 2;      // regions of symmetric memory

// Signals in symmetric memory, written by peers and read by this rank. Peers are the other ranks of the rail, numbered
// from 0 without this rank.
struct RailSignals {
    uint64_t* arrived;   // [region][chunk][peer][piece] number of the last operation whose rows have arrived
    uint64_t* begun;     // [peer] number of operations that the peer has begun
    uint64_t* given_up;  // [peer] 1 once the peer has given up
};

// Device memory of this rank.
struct RailState {
    long long done;                    // operations that have ended here
    long long last_use[kRailRegions];  // number of the last operation in each region, the first being 1
    int failed;
};

// Arguments of all kernels of a rail.
struct RailArgs {
    RailFailure* record;
    RailState* state;
    RailSignals signals;
    const int* pes;  // [num_ranks]
    int rank, num_ranks, region;
    uint64_t timeout_nanoseconds;
};

// One chunk of an operation. Every rank has a block of `block_rows` rows for each peer. At a receiver the blocks of its
// peers follow each other in rank order.
struct RailChunk {
    int chunk;
    bool last;  // of the operation
    int block_rows, row_bytes;
    const int* used;   // [num_ranks] rows for each rank that carry data; null: all
    const char* sent;  // [peers][block_rows][row_bytes] symmetric
    char* received;    // [peers][block_rows][row_bytes] symmetric
};

// Begin an operation: tell the peers that this rank has read the rows of all earlier operations, and wait until they
// have read what lies in the region that this operation uses. The send buffer may be written after this kernel.
cudaError_t launch_rail_begin(const RailArgs& args, cudaStream_t stream);
cudaError_t launch_rail_put(const RailArgs& args, const RailChunk& chunk, cudaStream_t stream);
// Wait for the chunk's rows from all peers. On failure the rows become NaN.
cudaError_t launch_rail_wait(const RailArgs& args, const RailChunk& chunk, cudaStream_t stream);
// Tell the peers that this rank has given up.
cudaError_t launch_rail_give_up(const RailArgs& args, cudaStream_t stream);

// -- the self-test ----------------------------------------------------------------------------------------------------

// What a rank was waiting for when it failed.
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
