// Connects PyTorch's stable C++ interface to the kernels; no mathematics.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "tensor.h"

namespace luce {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::float32;
    case ScalarType::Double: return Type::float64;
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Half: return Type::float16;
    case ScalarType::Long: return Type::int64;
    case ScalarType::Int: return Type::int32;
    default: STD_TORCH_CHECK(false, "expected `", name, "` as float32, float64, bfloat16, float16, int64 or int32");
  }
}

inline int32_t dtype_of(Type type) {
  switch (type) {
    case Type::float64: return aoti_torch_dtype_float64();
    case Type::bfloat16: return aoti_torch_dtype_bfloat16();
    case Type::float16: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_float32();
  }
}

// (N, C) or (N, C, M) of any strides.
inline Rows rows_of(const Tensor& tensor, const char* name) {
  const auto size = tensor.sizes(), stride = tensor.strides();
  STD_TORCH_CHECK(size.size() == 2 || size.size() == 3, "expected `", name, "` of shape (N, C) or (N, C, M), got ",
                  size.size(), " dimensions");
  Rows rows{tensor.data_ptr(), type_of(tensor, name), size[0], size[1], 1, stride[0], stride[1], 0};
  if (size.size() == 3) rows.inner = size[2], rows.inner_stride = stride[2];
  if (rows.classes == 1) rows.class_stride = 1;
  return rows;
}

inline Rows floating_rows(const Tensor& tensor, const char* name) {
  const Rows rows = rows_of(tensor, name);
  STD_TORCH_CHECK(rows.type != Type::int64 && rows.type != Type::int32, "expected `", name, "` of a floating dtype");
  STD_TORCH_CHECK(rows.classes > 0, "expected at least one class in `", name, "`");
  return rows;
}

inline void check_same_shape(const Rows& a, const Rows& b, const char* name) {
  STD_TORCH_CHECK(a.outer == b.outer && a.classes == b.classes && a.inner == b.inner, "expected `", name,
                  "` of the same shape as the student's logits");
}

// One number a row, laid out as the rows are counted.
inline const void* per_row(const std::optional<Tensor>& tensor, const Rows& rows, Type type, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->numel() == rows.count() && tensor->is_contiguous() && type_of(*tensor, name) == type,
                  "expected `", name, "` as one number a row, contiguous and of the right dtype");
  return tensor->data_ptr();
}

// Kernels calculate in double if any input is, else in float.
inline Type wide_type(const Rows& a, const Rows& b) {
  return a.type == Type::float64 || b.type == Type::float64 ? Type::float64 : Type::float32;
}

// A contiguous tensor on the CPU, without the detour through the dispatcher that torch::stable::empty takes.
inline Tensor empty(const std::vector<int64_t>& size, Type type) {
  std::vector<int64_t> stride(size.size());
  int64_t step = 1;
  for (size_t d = size.size(); d-- > 0; step *= size[d]) stride[d] = step;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(), stride.data(),
                                                         dtype_of(type), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// The student's shape, dtype and, where it is dense, strides.
inline Tensor empty_like(const Tensor& student, const Rows& rows) {
  if (!student.is_contiguous()) return torch::stable::empty_like(student);
  if (student.dim() == 3) return empty({rows.outer, rows.classes, rows.inner}, rows.type);
  return empty({rows.outer, rows.classes}, rows.type);
}

// The shape of one number a row.
inline std::vector<int64_t> row_shape(const Tensor& tensor, const Rows& rows) {
  if (tensor.dim() == 3) return {rows.outer, rows.inner};
  return {rows.outer};
}

// Runs kernel(arguments, begin, end) on all rows in PyTorch's own threads, about 4096 steps at a time: fewer would cost more
// in synchronisation than they save. A row takes `steps`, by default one a class.
template <class Kernel, class Arguments>
void run(Kernel kernel, const Arguments& arguments, const Rows& rows, int64_t steps = 0) {
  constexpr int64_t GRAIN = 4096;
  torch::stable::parallel_for(0, rows.count(), std::max<int64_t>(1, GRAIN / (steps ? steps : rows.classes)),
                              [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

}  // namespace luce
