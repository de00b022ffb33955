// The kernels' view of a tensor: a plain pointer with strides, no PyTorch.
#pragma once

#include <cstdint>

namespace luce {

enum class Type : int32_t { float32, float64, bfloat16, float16, int64, int32 };

// Rows of classes: a tensor (outer, classes, inner) read along its middle dimension. Strides are in elements.
struct Rows {
  void* data = nullptr;
  Type type = Type::float32;
  int64_t outer = 0, classes = 0, inner = 1;
  int64_t outer_stride = 0, class_stride = 1, inner_stride = 0;

  int64_t count() const { return outer * inner; }
  int64_t offset(int64_t row) const {
    return inner == 1 ? row * outer_stride : row / inner * outer_stride + row % inner * inner_stride;
  }
  explicit operator bool() const { return data != nullptr; }
};

}  // namespace luce
