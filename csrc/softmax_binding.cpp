#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <tuple>

#include "bindings.h"
#include "softmax.h"

namespace luce {
namespace {

// Fresh memory comes from the system in pages of 4 KiB with one fault each, which takes longer than a softmax. Large
// results request large pages; where the system has none, nothing changes.
void ask_for_large_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t PAGE = 2 << 20, LARGE = 4 * PAGE;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + PAGE - 1) / PAGE * PAGE, last = end / PAGE * PAGE;
  if (end - begin >= LARGE && first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

Tensor softmax(const Tensor& x, int64_t algorithm, bool logarithm) {
  STD_TORCH_CHECK(algorithm >= 0 && algorithm < static_cast<int64_t>(SoftmaxAlgorithm::count),
                  "expected `algorithm` as one of luce.ops.softmax.ALGORITHMS, by its place");
  const Rows rows = rows_of(x, "x");
  STD_TORCH_CHECK(rows.type != Type::int64 && rows.type != Type::int32, "expected `x` of a floating dtype");
  Tensor y = empty_like(x, rows);
  ask_for_large_pages(y);
  if (rows.count() == 0 || rows.classes == 0) return y;
  SoftmaxArguments arguments{rows, rows_of(y, "y"), static_cast<SoftmaxAlgorithm>(algorithm), logarithm, {}};
  if (rows.count() < torch::stable::get_num_threads() && rows.classes > SOFTMAX_SLICE) {
    arguments.parallel = [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
      torch::stable::parallel_for(0, count, 1, body);
    };
    LUCE_CHOOSE(softmax)(arguments, 0, rows.count());
  } else {
    run(LUCE_CHOOSE(softmax), arguments, rows);
  }
  return y;
}

std::tuple<Tensor, Tensor, Tensor> exp_parts(const Tensor& x) {
  const Type type = type_of(x, "x");
  STD_TORCH_CHECK((type == Type::float32 || type == Type::float64) && x.is_contiguous(),
                  "expected `x` contiguous, of float32 or float64");
  Tensor mantissa = torch::stable::empty_like(x), exponent = torch::stable::empty_like(x);
  Tensor value = torch::stable::empty_like(x);
  const ExpPartsArguments arguments{x.data_ptr(), mantissa.data_ptr(), exponent.data_ptr(), value.data_ptr(),
                                    type == Type::float64};
  LUCE_CHOOSE(exp_parts)(arguments, 0, x.numel());
  return {mantissa, exponent, value};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(luce, CPU, m) {
  m.impl("softmax", TORCH_BOX(&softmax));
  m.impl("softmax_forward", TORCH_BOX(&softmax));
  m.impl("exp_parts", TORCH_BOX(&exp_parts));
}

}  // namespace luce
