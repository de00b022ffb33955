// What the kernels that compare distributions are told. Rows of weight 0 are not looked at; `weight` may be absent.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "tensor.h"

namespace luce {

// `limit` is what T^2 times the others tends to as the temperature T grows, for `jsd` over share (1 - share).
enum class Divergence : int64_t { forward_kl, reverse_kl, jsd, limit };

struct DivergenceArguments {
  Rows student, teacher, gradient;  // `gradient` may be absent
  const void* weight;
  void* loss;  // one number a row
  bool wide;   // calculate in double; weight and loss are double then, else float
  Divergence kind;
  double temperature;
  double share;  // the teacher's in the mixture of `jsd`
};
LUCE_KERNEL(divergence, DivergenceArguments)

struct DkdArguments {
  Rows student, teacher, gradient;
  const int64_t* target;  // a class a row
  const void* weight;
  void* loss;
  bool wide;
  double temperature;
  double alpha, beta;  // what the two parts count; a part that counts nothing is left out
};
LUCE_KERNEL(dkd, DkdArguments)

struct CrossEntropyArguments {
  Rows student, teacher, gradient;  // there is no teacher
  const int64_t* target;
  const void* weight;
  void* loss;
  bool wide;
  double smoothing;
};
LUCE_KERNEL(cross_entropy, CrossEntropyArguments)

}  // namespace luce
