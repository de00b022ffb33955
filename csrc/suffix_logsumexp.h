// Arguments of the kernels of log-sum-exp over suffixes.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "tensor.h"

namespace luce {

struct SuffixArguments {
  Rows x;
  Rows upstream;  // of the gradient only
  Rows result;
  bool wide;  // calculate in double, else in float with sums in double
};
LUCE_KERNEL(suffix_logsumexp, SuffixArguments)
LUCE_KERNEL(suffix_logsumexp_backward, SuffixArguments)

}  // namespace luce
