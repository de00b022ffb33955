// Arguments of the softmax kernels.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels.h"
#include "tensor.h"

namespace luce {

// In the order of `ALGORITHMS` in Python.
enum class SoftmaxAlgorithm : int64_t {
  automatic,
  two_pass,
  two_pass_lazy,
  three_pass_recompute,
  three_pass_reload,
  online,
  count
};

struct SoftmaxArguments {
  Rows x, y;  // of one type and shape
  SoftmaxAlgorithm algorithm;
  bool logarithm;
  // Calls body(begin, end) on parts of 0..count in parallel, for rows that several threads share. If empty, one thread
  // computes each row.
  std::function<void(int64_t count, const std::function<void(int64_t begin, int64_t end)>& body)> parallel;
};
LUCE_KERNEL(softmax, SoftmaxArguments)

// Rows longer than this are calculated in slices of this length, one after the other or side by side.
constexpr int64_t SOFTMAX_SLICE = 1 << 16;

struct ExpPartsArguments {
  const void* x;
  void *mantissa, *exponent, *value;
  bool wide;  // all in double, else in float
};
LUCE_KERNEL(exp_parts, ExpPartsArguments)

}  // namespace luce
