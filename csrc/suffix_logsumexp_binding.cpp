#include "suffix_logsumexp.h"

#include "bindings.h"

namespace luce {
namespace {

Tensor suffix_logsumexp(const Tensor& x) {
  SuffixArguments arguments{};
  arguments.x = floating_rows(x, "x");
  Tensor result = empty_like(x, arguments.x);
  arguments.result = rows_of(result, "result");
  arguments.wide = arguments.x.type == Type::float64;
  run(LUCE_CHOOSE(suffix_logsumexp), arguments, arguments.x);
  return result;
}

Tensor suffix_logsumexp_backward(const Tensor& upstream, const Tensor& x) {
  SuffixArguments arguments{};
  arguments.x = floating_rows(x, "x");
  arguments.upstream = floating_rows(upstream, "upstream");
  const Rows &a = arguments.x, &b = arguments.upstream;
  STD_TORCH_CHECK(a.outer == b.outer && a.classes == b.classes && a.inner == b.inner,
                  "expected `upstream` of the same shape as `x`");
  Tensor result = empty_like(x, arguments.x);
  arguments.result = rows_of(result, "result");
  arguments.wide = wide_type(a, b) == Type::float64;
  run(LUCE_CHOOSE(suffix_logsumexp_backward), arguments, a);
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(luce, CPU, m) {
  m.impl("suffix_logsumexp", TORCH_BOX(&suffix_logsumexp));
  m.impl("suffix_logsumexp_backward", TORCH_BOX(&suffix_logsumexp_backward));
}

}  // namespace luce
