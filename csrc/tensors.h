// Reads the tensors that Python passes to the bindings.
//
// It does not need libtorch: PyTorch exports a C function that describes a tensor, in a struct that DLPack defines
// (DLPackExchangeAPI in https://github.com/dmlc/dlpack).
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace deepep_moe {

namespace dlpack {

// The declarations of DLPack 1 that are used here.
struct Tensor {
    void* data;
    int32_t device_type, device_index;
    int32_t ndim;
    uint8_t type_code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

constexpr uint8_t kFloat = 2, kBfloat = 4;  // type_code

using Describe = int (*)(void* tensor, Tensor* description);  // not 0: a Python exception is set

struct ExchangeApi {
    uint32_t major_version, minor_version;
    void* older_version;
    void* unused[3];
    Describe describe;
};

inline bool is_contiguous(const Tensor& tensor) {
    int64_t stride = 1;
    for (int d = tensor.ndim - 1; d >= 0; --d) {
        if (tensor.shape[d] != 1 && tensor.strides[d] != stride) return false;
        stride *= std::max<int64_t>(tensor.shape[d], 1);
    }
    return true;
}

inline std::uintptr_t address(const Tensor& tensor) {
    return reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset;
}

// Kernels read and write rows of BF16 sixteen bytes at a time. A view may begin anywhere.
inline bool is_aligned(const Tensor& tensor) { return tensor.type_code != kBfloat || address(tensor) % 16 == 0; }

// False where the storage was freed, as some programs do with outputs that they compute again. Such a storage begins at
// 0, so views have small addresses, which memory of GPUs never has.
inline bool is_in_memory(const Tensor& tensor) {
    constexpr int32_t kCpu = 1;
    const std::uint64_t least = tensor.device_type == kCpu ? 1 : std::uint64_t{1} << 32;
    return address(tensor) >= least || std::count(tensor.shape, tensor.shape + tensor.ndim, 0) > 0;
}

}  // namespace dlpack

inline pybind11::object tensor_type() { return pybind11::module_::import("torch").attr("Tensor"); }

// The description is valid until the tensor changes.
inline int describe(PyObject* tensor, dlpack::Tensor* description) {
    static const dlpack::Describe function = [] {
        const pybind11::capsule capsule(tensor_type().attr("__dlpack_c_exchange_api__"));
        const auto* api = capsule.get_pointer<dlpack::ExchangeApi>();
        if (api->major_version != 1)
            throw std::runtime_error("this PyTorch describes tensors in version " + std::to_string(api->major_version) +
                                     " of DLPack, deepep_moe needs version 1");
        return api->describe;
    }();
    return function(tensor, description);
}

// The address of a tensor's data; 0 for None.
inline std::uintptr_t address_of(pybind11::handle tensor) {
    if (tensor.is_none()) return 0;
    dlpack::Tensor description;
    if (describe(tensor.ptr(), &description)) throw pybind11::error_already_set();
    return dlpack::address(description);
}

// Dtypes and sizes of several tensors on one device, as a value that Python can compare and hash.
class TensorSignatures {
  public:
    // The arguments are what tensor.__dlpack_device__() returns.
    TensorSignatures(int device_type, int device_index)
        : device_type_(device_type), device_index_(device_index), tensor_type_(tensor_type()), is_neg_("is_neg") {}

    // Some of the arguments may be None. The result is None if one of the others is not a plain tensor: contiguous, on
    // the device, in memory, aligned for kernels, not a subclass, without the negative bit, with at most kMaxDims
    // dimensions.
    template <typename... Handles>
    pybind11::object of(Handles... tensors) const {
        std::array<int64_t, sizeof...(tensors) * (1 + kMaxDims)> words;
        auto end = words.begin();
        for (PyObject* const tensor : {tensors.ptr()...}) {
            dlpack::Tensor seen{};
            if (tensor != Py_None && !is_plain(tensor, seen)) return pybind11::none();
            *end++ = seen.ndim | seen.type_code << 8 | seen.bits << 16;  // 0 for None only: no dtype has 0 bits
            end = std::copy_n(seen.shape, seen.ndim, end);
        }
        return pybind11::bytes(reinterpret_cast<const char*>(words.data()), sizeof(int64_t) * (end - words.begin()));
    }

  private:
    static constexpr int kMaxDims = 4;

    bool is_plain(PyObject* tensor, dlpack::Tensor& seen) const {
        if (reinterpret_cast<PyObject*>(Py_TYPE(tensor)) != tensor_type_.ptr()) return false;
        if (describe(tensor, &seen)) {  // sparse, nested, or of a dtype that DLPack does not have
            PyErr_Clear();
            return false;
        }
        return seen.device_type == device_type_ && seen.device_index == device_index_ && seen.ndim <= kMaxDims &&
               seen.lanes == 1 && dlpack::is_contiguous(seen) && dlpack::is_in_memory(seen) &&
               dlpack::is_aligned(seen) && !is_negative(tensor, seen);
    }

    // Whether the memory holds the negated values. Only floating-point tensors are asked: PyTorch makes such views of
    // the imaginary parts of conjugated tensors.
    bool is_negative(PyObject* tensor, const dlpack::Tensor& seen) const {
        if (seen.type_code != dlpack::kFloat && seen.type_code != dlpack::kBfloat) return false;
        const auto answer = pybind11::reinterpret_steal<pybind11::object>(
            PyObject_VectorcallMethod(is_neg_.ptr(), &tensor, 1, nullptr));
        if (!answer) PyErr_Clear();
        return answer.ptr() != Py_False;
    }

    int device_type_, device_index_;
    pybind11::object tensor_type_;
    pybind11::str is_neg_;
};

}  // namespace deepep_moe
