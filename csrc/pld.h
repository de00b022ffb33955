// What the Plackett-Luce kernel is told.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels.h"
#include "tensor.h"

namespace luce {

struct PldArguments {
  Rows student, teacher, order, gradient;  // `order` and `gradient` may be absent
  const int64_t* target;                   // a class a row, or -1 for none; may be absent
  const void* weight;                      // may be absent; rows of weight 0 are not looked at
  void* loss;                              // one number a row
  void* bound;                             // two numbers a row: of the loss, of the gradient's L1 norm
  bool wide;                               // calculate in double; weight, loss and bound are double then, else float
  double teacher_temperature;
  int64_t top_k;    // places that count
  double epsilon;   // teacher's probability that may be left out; 0 for none
  double tolerance;
  bool average_ties;
  std::atomic<bool>* bad_order;  // set if a row of `order` is no permutation
};
LUCE_KERNEL(pld, PldArguments)

}  // namespace luce
