// What low-latency calls must return, computed without kernels, one row after the other.
#pragma once

#include <cuda_fp8.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "latency/args.h"

namespace reference {

using deepep_moe::latency::Format;

inline float from_bf16(uint16_t bits) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &word, sizeof(value));
    return value;
}

inline uint16_t to_bf16(float value) {  // of a number: to the nearest, ties to even
    uint32_t word;
    std::memcpy(&word, &value, sizeof(word));
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

// The inputs of all ranks to a dispatch and its combine.
struct Batch {
    int ranks, hidden, topk, experts;
    unsigned number;
    Format format;
    std::vector<std::vector<uint16_t>> x;              // [rank][T, H]
    std::vector<std::vector<int>> topk_idx, kept_idx;  // of dispatch; of combine, which may drop more routes
    std::vector<std::vector<float>> weights;

    Batch(unsigned number, int ranks, int max_tokens, int hidden) : ranks(ranks), hidden(hidden), number(number) {
        std::mt19937 random(number);
        experts = ranks * (1 + random() % 5);
        topk = 1 + random() % std::min(8, experts);
        format = static_cast<Format>(random() % 4);
        for (int r = 0; r < ranks; ++r) {
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
            kept_idx.push_back(topk_idx[r]);
            for (int& expert : kept_idx[r])
                if (number % 3 == 0 && random() % 4 == 0) expert = -1;
            for (size_t i = 0; i < weights[r].size(); ++i)  // what a dropped route weighs is not read
                if (kept_idx[r][i] < 0 && random() % 2) weights[r][i] = NAN;
        }
    }

    int local_experts() const { return experts / ranks; }
    int tokens(int rank) const { return static_cast<int>(topk_idx[rank].size()) / topk; }
    bool chooses(int rank, int token, int expert) const {
        const int* of = &topk_idx[rank][token * topk];
        return std::find(of, of + topk, expert) != of + topk;
    }
    // What the experts of a rank return: element i of [L, R * M, H]. Differs between calls and ranks.
    uint16_t expert_output(int rank, size_t i) const { return 0x3f00 + (i * 7 + rank * 31 + number * 57) % 256; }
};

// What one rank must get. Memory that a call does not write has the values that it was filled with.
struct Expected {
    static constexpr int kNothing = -5, kFill = 0x55;
    const Batch& batch;
    const int self, slots;
    // [rank] ranks with equal numbers exchange rows; -1: the rank refused its input
    const std::vector<int>& sides;
    std::vector<int> counts, src_info, scales;
    std::vector<int64_t> layout_range;
    std::vector<char> rows;
    std::vector<uint16_t> out;

    Expected(const Batch& batch, int self, int slots, const std::vector<int>& sides)
        : batch(batch), self(self), slots(slots), sides(sides) {
        const int local = batch.local_experts(), row_bytes = batch.hidden * (batch.format == Format::kBf16 ? 2 : 1);
        src_info.assign(local * slots, kNothing);
        rows.assign(static_cast<size_t>(local) * slots * batch.hidden * 2, kFill);
        scales.assign(local * slots * (batch.hidden / 128 + 1), kFill);
        for (int l = 0; l < local; ++l) {
            int row = 0;
            for (int source = 0; source < batch.ranks; ++source) {
                const int first = row;
                for (int token = 0; meets(source, self) && token < batch.tokens(source); ++token) {
                    if (!batch.chooses(source, token, self * local + l)) continue;
                    src_info[l * slots + row] = token;
                    write_row(&rows[static_cast<size_t>(l * slots + row) * row_bytes], l, row, source, token);
                    ++row;
                }
                layout_range.push_back(static_cast<int64_t>(first) << 32 | (row - first));
            }
            counts.push_back(row);
        }
        for (int token = 0; token < batch.tokens(self); ++token)
            for (int channel = 0; channel < batch.hidden; ++channel) {
                float sum = 0.0f;
                for (int rank = 0; rank < batch.ranks; ++rank) sum += sum_of(rank, token, channel);
                out.push_back(to_bf16(sum));
            }
        out.push_back(kFill);
    }

    bool meets(int a, int b) const { return sides[a] >= 0 && sides[a] == sides[b]; }

    // The row of a token of `source` among those of local expert `l` of `owner`.
    int row_of(int owner, int l, int source, int token) const {
        int row = 0;
        for (int earlier = 0; earlier <= source; ++earlier)
            for (int t = 0; meets(earlier, owner) && t < (earlier < source ? batch.tokens(earlier) : token); ++t)
                row += batch.chooses(earlier, t, owner * batch.local_experts() + l);
        return row;
    }

    // What `rank` adds to a channel of a token of this rank.
    float sum_of(int rank, int token, int channel) const {
        const int local = batch.local_experts();
        float sum = 0.0f;
        for (int k = 0; meets(rank, self) && k < batch.topk; ++k) {
            const int expert = batch.kept_idx[self][token * batch.topk + k], l = expert - rank * local;
            if (expert < 0 || l < 0 || l >= local) continue;
            const size_t row = static_cast<size_t>(l) * slots + row_of(rank, l, self, token);
            sum += from_bf16(batch.expert_output(rank, row * batch.hidden + channel)) *
                   batch.weights[self][token * batch.topk + k];
        }
        return from_bf16(to_bf16(sum));
    }

    // For a message: the first wrong channel, and what each rank adds to it.
    void explain(const std::vector<uint16_t>& got) const {
        const size_t at = std::mismatch(out.begin(), out.end(), got.begin()).first - out.begin();
        const int token = static_cast<int>(at) / batch.hidden, channel = static_cast<int>(at) % batch.hidden;
        int wrong = 0;
        for (int c = channel; c < batch.hidden; ++c) wrong += got[at - channel + c] != out[at - channel + c];
        std::fprintf(stderr, "batch %u, top-%d of %d experts: %d channels of out[%d] are wrong; channel %d is %g, not",
                     batch.number, batch.topk, batch.experts, wrong, token, channel, from_bf16(got[at]));
        for (int rank = 0; rank < batch.ranks; ++rank) std::fprintf(stderr, " + %g", sum_of(rank, token, channel));
        std::fprintf(stderr, "\n");
    }

  private:
    // Row `row` of local expert `l`.
    void write_row(char* to, int l, int row, int source, int token) {
        const uint16_t* x = &batch.x[source][token * batch.hidden];
        if (batch.format == Format::kBf16) {
            std::memcpy(to, x, batch.hidden * 2);
            return;
        }
        const int blocks = batch.hidden / 128;
        for (int block = 0; block < blocks; ++block) {
            float amax = 1e-4f;
            for (int c = 0; c < 128; ++c) amax = std::max(amax, std::fabs(from_bf16(x[block * 128 + c])));
            float scale = amax / 448.0f, inverse = 448.0f / amax;
            if (batch.format != Format::kFp8) {
                scale = std::exp2(std::ceil(std::log2(scale)));
                inverse = 1.0f / scale;
            }
            for (int c = 0; c < 128; ++c)
                to[block * 128 + c] = static_cast<char>(
                    __nv_cvt_float_to_fp8(from_bf16(x[block * 128 + c]) * inverse, __NV_SATFINITE, __NV_E4M3));
            int bits;
            std::memcpy(&bits, &scale, sizeof(bits));
            if (batch.format != Format::kFp8Ue8m0) {
                scales[(l * blocks + block) * slots + row] = bits;
                continue;
            }
            int& word = scales[(l * ((blocks + 3) / 4) + block / 4) * slots + row];
            if (block % 4 == 0) word = 0;
            word |= (bits >> 23 & 0xff) << 8 * (block % 4);
        }
    }
};

}  // namespace reference
