// Sum: the rows of each item in fp32, in the order of its places. On the way back, a rank first sums the expert rows of
// each received row into a send buffer; at home the rows of each token's ranks are summed into the result.
//
// A warp per item, or per part of it where rows are long: blockIdx.y is the part.
#include "device/row_sum.cuh"
#include "local/agree.cuh"

namespace deepep_moe {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPartVectors = 448;  // of a row

using List = RowList<kMaxSummedRows>;

template <typename T>
__global__ void __launch_bounds__(kThreads) sum_kernel(const __grid_constant__ SumArgs args) {
    __shared__ List lists[kWarps];
    if (headers_differ(args.headers)) {  // dense: only results at home are compared
        set_to_nan(args.out, static_cast<int64_t>(args.num_items) * args.row_bytes / 4);
        if (args.out_vectors) set_to_nan(args.out_vectors, static_cast<int64_t>(args.num_items) * args.num_weights);
        return;
    }
    const int lane = threadIdx.x % kWarpSize, width = args.places.width;
    const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
    if (item >= args.num_items) return;
    List& list = lists[threadIdx.x / kWarpSize];
    const int64_t out_row = args.segments.own_last_row(static_cast<int>(item), args.num_items);
    float* out_vector = args.out_vectors && blockIdx.y == 0
                            ? reinterpret_cast<float*>(args.out_vectors + out_row * args.out_vectors_pitch)
                            : nullptr;
    int count = 0;
    for (int first = 0; first < width; first += kWarpSize) {
        const int64_t row = first + lane < width ? args.places.of(item, first + lane) : -1;
        const float weight = row >= 0 && args.row_weights ? args.row_weights[row] : 0.0f;
        const unsigned mask = __ballot_sync(kFullMask, row >= 0);
        append(list, count, {args.x + row * args.pitch, args.apply_weights ? weight : 1.0f, mask}, mask);
        if (out_vector && !args.vectors && first + lane < width) out_vector[first + lane] = weight;
    }
    const int rows = count;
    for (int b = 0; b < args.num_biases; ++b) {
        const LaneRows bias{args.bias[b] + item * args.row_bytes, 1.0f, 1u};
        append(list, count, bias, bias.mask);
    }
    list.count = count;
    __syncwarp();

    const int vectors = args.row_bytes / static_cast<int>(sizeof(int4));
    const int begin = blockIdx.y * kPartVectors, end = min(vectors, begin + kPartVectors);
    sum_rows<T>(list, Span{begin, end}, args.out + out_row * args.out_pitch);
    if (out_vector && args.vectors)
        for (int k = lane; k < args.num_weights; k += kWarpSize) {
            float total = 0.0f;
            for (int i = 0; i < rows; ++i) {
                const int64_t row = (list.row[i] - args.x) / args.pitch;
                total += reinterpret_cast<const float*>(args.vectors + row * args.vectors_pitch)[k];
            }
            out_vector[k] = total;
        }
}

template <typename T>
cudaError_t launch(const SumArgs& args, cudaStream_t stream) {
    const int vectors = args.row_bytes / static_cast<int>(sizeof(int4));
    const dim3 grid((args.num_items + kWarps - 1) / kWarps, (vectors + kPartVectors - 1) / kPartVectors);
    sum_kernel<T><<<grid, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_sum(const SumArgs& args, DataType dtype, cudaStream_t stream) {
    if (args.num_items == 0) return cudaSuccess;
    switch (dtype) {
        case DataType::kFloat32: return launch<float>(args, stream);
        case DataType::kBFloat16: return launch<__nv_bfloat16>(args, stream);
        case DataType::kFloat16: return launch<__half>(args, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace deepep_moe
