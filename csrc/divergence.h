// Arguments of the kernels that compare distributions. Rows of weight 0 are skipped; `weight` may be absent.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "tensor.h"

namespace luce {

// `limit` is the limit of T^2 times either KL as the temperature T grows; that of `jsd` is share (1 - share) times it.
enum class Divergence : int64_t { forward_kl, reverse_kl, jsd, limit };

struct DivergenceArguments {
  Rows student, teacher, gradient;  // `gradient` may be absent
  const void* weight;
  void* loss;  // one number a row
  bool wide;   // calculate in double; weight and loss are double then, else float
  Divergence kind;
  double temperature;
  double share;  // of the teacher in the mixture of `jsd`
};
LUCE_KERNEL(divergence, DivergenceArguments)

struct DkdArguments {
  Rows student, teacher, gradient;
  const int64_t* target;  // a class a row
  const void* weight;
  void* loss;
  bool wide;
  double temperature;
  double alpha, beta;  // weights of the two parts; a part of weight 0 is omitted
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
