// Sums of rows in fp32: a list of rows and their factors, added in the order of the list. A warp per list.
#pragma once

#include "device/sum.cuh"

namespace deepep_moe {

// Rows to add, in shared memory: one list per warp.
template <int kCapacity>
struct RowList {
    const char* row[kCapacity];
    float factor[kCapacity];
    int count;
};

// Lane k holds the k-th row, if its bit is in the mask.
struct LaneRows {
    const char* row;
    float factor;
    unsigned mask;
};

template <typename List>
__device__ __forceinline__ void append(List& list, int& count, const LaneRows& from, unsigned mask) {
    const int lane = threadIdx.x % kWarpSize;
    if (mask >> lane & 1) {
        const int index = count + __popc(mask & ((1u << lane) - 1));
        list.row[index] = from.row;
        list.factor[index] = from.factor;
    }
    count += __popc(mask);
}

// The vectors [first, end) of a row.
struct Span {
    int first, end;
};

// Sum the vectors `first + u * 32` of exactly kRows rows; all of them must exist.
template <typename T, int kRows, int kVectors, typename List>
__device__ __forceinline__ void sum_vectors(const List& list, int first, char* out) {
    int4 v[kRows][kVectors];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        const int4* row = reinterpret_cast<const int4*>(list.row[r]) + first;
#pragma unroll
        for (int u = 0; u < kVectors; ++u) v[r][u] = load_streaming(row + u * kWarpSize);
    }
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
        Vector<T> total;
        total.clear();
#pragma unroll
        for (int r = 0; r < kRows; ++r) total.add_scaled(v[r][u], list.factor[r]);
        store_streaming(reinterpret_cast<int4*>(out) + first + u * kWarpSize, total.pack());
    }
}

// Sum exactly kRows rows, with about eight loads in flight.
template <typename T, int kRows, typename List>
__device__ __forceinline__ void sum_few(const List& list, Span span, char* out) {
    constexpr int kVectors = kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1;
    const int lane = threadIdx.x % kWarpSize;
    int base = span.first;
    for (; base + kVectors * kWarpSize <= span.end; base += kVectors * kWarpSize)
        sum_vectors<T, kRows, kVectors>(list, base + lane, out);
    for (base += lane; base < span.end; base += kWarpSize) sum_vectors<T, kRows, 1>(list, base, out);
}

// Sum any number of rows, four at a time.
template <typename T, typename List>
__device__ __forceinline__ void sum_many(const List& list, Span span, char* out) {
    constexpr int kRows = 4;
    for (int i = span.first + threadIdx.x % kWarpSize; i < span.end; i += kWarpSize) {
        Vector<T> total;
        total.clear();
        int row = 0;
        for (; row + kRows <= list.count; row += kRows) {
            int4 v[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) v[r] = load_streaming(reinterpret_cast<const int4*>(list.row[row + r]) + i);
#pragma unroll
            for (int r = 0; r < kRows; ++r) total.add_scaled(v[r], list.factor[row + r]);
        }
        for (; row < list.count; ++row)
            total.add_scaled(load_streaming(reinterpret_cast<const int4*>(list.row[row]) + i), list.factor[row]);
        store_streaming(reinterpret_cast<int4*>(out) + i, total.pack());
    }
}

// Sum the rows of the list over the span, in order. Call with the whole warp.
template <typename T, typename List>
__device__ __forceinline__ void sum_rows(const List& list, Span span, char* out) {
    switch (list.count) {
        case 1: return sum_few<T, 1>(list, span, out);
        case 2: return sum_few<T, 2>(list, span, out);
        case 3: return sum_few<T, 3>(list, span, out);
        case 4: return sum_few<T, 4>(list, span, out);
        case 5: return sum_few<T, 5>(list, span, out);
        case 6: return sum_few<T, 6>(list, span, out);
        case 7: return sum_few<T, 7>(list, span, out);
        case 8: return sum_few<T, 8>(list, span, out);
        default: return sum_many<T>(list, span, out);
    }
}

}  // namespace deepep_moe
