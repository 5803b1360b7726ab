// How many ranks code is compiled for, and sets of ranks.
//
// The latency engine and the domain are compiled twice from the same sources: narrow, for up to 32 ranks, where a set
// is one word and a warp has a lane for each rank, and wide (DEEPEP_MOE_WIDE), for up to 128 ranks. Everything that
// depends on the width is in an inline namespace with its name, so that one module can contain both.
#pragma once

#include <cuda_runtime.h>

#ifdef DEEPEP_MOE_WIDE
#define DEEPEP_MOE_WIDTH wide
#else
#define DEEPEP_MOE_WIDTH narrow
#endif

namespace deepep_moe {

inline namespace DEEPEP_MOE_WIDTH {

#ifdef DEEPEP_MOE_WIDE
constexpr int kMaxRanks = 128;
#else
constexpr int kMaxRanks = 32;
#endif
constexpr int kRankWords = kMaxRanks / 32;  // of a RankSet

// A bit per rank. The loops over words are unrolled, so that the words stay in registers.
struct RankSet {
    unsigned words[kRankWords];

    static __host__ __device__ int bit_of(int rank) { return kRankWords == 1 ? rank : rank % 32; }

    __host__ __device__ bool has(int rank) const {
        unsigned word = words[0];
        for (int w = 1; w < kRankWords; ++w)
            if (w == rank / 32) word = words[w];
        return word >> bit_of(rank) & 1;
    }
    __host__ __device__ bool any() const {
        unsigned all = words[0];
        for (int w = 1; w < kRankWords; ++w) all |= words[w];
        return all != 0;
    }
    __host__ __device__ void add(int rank) {
        for (int w = 0; w < kRankWords; ++w)
            if (kRankWords == 1 || w == rank / 32) words[w] |= 1u << bit_of(rank);
    }
    __host__ __device__ void remove(int rank) {
        for (int w = 0; w < kRankWords; ++w)
            if (kRankWords == 1 || w == rank / 32) words[w] &= ~(1u << bit_of(rank));
    }
    // The members that are at least `rank`.
    __host__ __device__ RankSet from(int rank) const {
        RankSet set{};
        for (int w = 0; w < kRankWords; ++w)
            if (kRankWords == 1 || w >= rank / 32)
                set.words[w] = words[w] & (kRankWords == 1 || w == rank / 32 ? ~0u << bit_of(rank) : ~0u);
        return set;
    }
    friend __host__ __device__ RankSet operator&(const RankSet& a, const RankSet& b) {
        RankSet set;
        for (int w = 0; w < kRankWords; ++w) set.words[w] = a.words[w] & b.words[w];
        return set;
    }
};

}  // namespace DEEPEP_MOE_WIDTH

}  // namespace deepep_moe
