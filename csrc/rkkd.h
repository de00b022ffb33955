// Arguments of the kernel of the differentiable Kendall tau.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "tensor.h"

namespace luce {

enum class RkkdForm : int64_t { tanh, sign_tanh, product, clip };  // numbered as `FORMS` in ops/rkkd/reference.py

struct RkkdArguments {
  Rows student, teacher, gradient;  // `gradient` may be absent
  const void* weight;               // may be absent; rows of weight 0 are skipped
  void* loss;                       // one number a row
  bool wide;                        // calculate in double; weight and loss are double then, else float
  RkkdForm form;
  double steepness;
};
LUCE_KERNEL(rkkd, RkkdArguments)

}  // namespace luce
