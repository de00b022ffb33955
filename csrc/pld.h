// Arguments of the Plackett-Luce kernel.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels.h"
#include "tensor.h"

namespace luce {

// The fields of PldOptions in ops/pld/options.py, in its order.
struct PldOptions {
  double teacher_temperature;
  int64_t top_k;
  double epsilon;
  double tolerance;
  bool average_ties;
};

struct PldArguments {
  Rows student, teacher, order, gradient;  // `order` and `gradient` may be absent
  const int64_t* target;                   // a class a row, or -1 for none; may be absent
  const void* weight;                      // may be absent; rows of weight 0 are skipped
  void* loss;                              // one number a row
  void* bound;                             // two numbers a row: of the loss, of the gradient's L1 norm
  bool wide;                               // calculate in double; weight, loss and bound are double then, else float
  PldOptions options;
  std::atomic<bool>* bad_order;  // set if a row of `order` is no permutation
};
LUCE_KERNEL(pld, PldArguments)

}  // namespace luce
