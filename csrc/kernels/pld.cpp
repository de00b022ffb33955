// Plackett-Luce Distillation: order, loss and gradient of a row in one visit.
//
// Notation of the paper (arXiv 2506.12542): places k = 1..n of a ranking, w the student's exponentials, alpha the
// teacher's probabilities, Z_k the sum of w from place k on, B_k the sum of alpha/Z up to place k. The loss is the sum of
// alpha_k log(Z_k / w_k), its gradient at place k is w_k B_{k-1} - alpha_k Z_{k+1} / Z_k.
//
// Four ways lead there. `narrow` is the usual one: vectors, in the row's own precision with sums in double. `wide` takes
// over where the exponentials of a row exceed the range of that precision, and for tied groups. `binned` leaves classes
// unsorted where the change is provably within a tolerance, `truncated` where only the first places count.

#include <cmath>

#include "../pld.h"
#include "order.h"
#include "pld_binned.h"
#include "pld_narrow.h"
#include "pld_row.h"
#include "pld_truncated.h"
#include "pld_wide.h"

namespace luce::LUCE_ISA {
namespace {

// Copies the caller's ranking with the label moved to the first place. Returns false if it is no permutation.
template <class T>
bool given_order(const Rows& given, int64_t index, const PldRow<T>& row, uint32_t* order) {
  const int64_t n = row.n, stride = given.class_stride;
  uint32_t* others = order + (row.label >= 0);
  const auto take = [&](const auto* place) {
    place += given.offset(index);
    uint64_t beyond = 0;
    for (int64_t k = 0; k < n; ++k) {
      const int64_t i = place[k * stride];
      beyond |= static_cast<uint64_t>(i < 0) | static_cast<uint64_t>(i >= n);
      others[k] = static_cast<uint32_t>(i);
    }
    return beyond == 0;
  };
  if (!(given.type == Type::int64 ? take(static_cast<const int64_t*>(given.data))
                                  : take(static_cast<const int32_t*>(given.data)))) {
    return false;
  }
  uint8_t* seen = scratch().get<uint8_t>(CANDIDATES, n);
  std::fill(seen, seen + n, uint8_t(0));
  for (int64_t k = 0; k < n; ++k) seen[others[k]] = 1;
  int64_t different = 0;
  for (int64_t i = 0; i < n; ++i) different += seen[i];
  if (different != n) return false;
  if (row.label >= 0) {
    uint32_t* label = std::find(others, others + n, static_cast<uint32_t>(row.label));
    std::copy(label + 1, others + n, label);
    order[0] = static_cast<uint32_t>(row.label);
  }
  return true;
}

// Returns how many first places leave less than `epsilon` of the teacher's probability.
template <class T>
int64_t places_within(const PldRow<T>& row, const uint32_t* order, double epsilon) {
  double all = 0;  // one by one in double, as `left` is taken down: their roundings must not decide about a place
  for (int64_t i = 0; i < row.n; ++i) all += row.alpha(i);
  double left = all;
  int64_t k = 0;
  while (k < row.n && !(left < epsilon * all)) left -= row.alpha(order[k++]);
  return std::max<int64_t>(k, 1);
}

template <class T>
PldResult pld_row(const PldArguments& arguments, const PldRow<T>& row, int64_t index) {
  const PldOptions& options = arguments.options;
  PldResult result;
  int64_t places = std::min(options.top_k, row.n);
  const bool partial = places < row.n || options.epsilon > 0, long_row = row.n > NETWORK_MAX;
  if (long_row && !arguments.order && !options.average_ties) {
    if (partial && pld_truncated(row, places, options.epsilon, result)) return result;
    if (!partial && options.tolerance > 0 && PldBins<T>(row).run(options.tolerance, result)) return result;
  }
  uint32_t* order = scratch().get<uint32_t>(ORDER, row.n + 1 + Simd<T>::lanes);
  if (!arguments.order) {
    const bool labelled = row.label >= 0;
    if (labelled) order[0] = static_cast<uint32_t>(row.label);
    order_row(row.t, row.n, row.label, row.top_t, row.span(), row.coarse, order + labelled);
  } else if (!given_order(arguments.order, index, row, order)) {
    *arguments.bad_order = true;
    return result;
  }
  if (options.epsilon > 0) places = std::min(places, places_within(row, order, options.epsilon));
  const Ranking ranking{order, row.n, places, 0, 0};
  if (options.average_ties || !pld_narrow(row, ranking, result)) {
    pld_wide(row, ranking, options.average_ties, result);
  }
  return result;
}

template <class T>
void pld_rows(const PldArguments& arguments, int64_t begin, int64_t end) {
  constexpr T NONE = std::numeric_limits<T>::quiet_NaN();
  const auto weight = [&](int64_t index) {
    return arguments.weight ? static_cast<const T*>(arguments.weight)[index] : T(1);
  };
  const bool coarse = arguments.teacher.type == Type::bfloat16 || arguments.teacher.type == Type::float16;
  const auto skip = [&](int64_t index) { return weight(index) == 0; };
  each_row<T>(arguments.student, arguments.teacher, arguments.gradient, begin, end, skip,
              [&](int64_t index, const T* s, const T* t, T* g) {
                const int64_t n = arguments.student.classes;
                PldResult result;
                if (!s) {
                  if (g) std::fill(g, g + n, T(0));
                } else {
                  PldRow<T> row{s, t, n, arguments.target ? arguments.target[index] : -1,
                                static_cast<T>(1 / arguments.options.teacher_temperature), g, weight(index), coarse};
                  row.describe();
                  if (row.defined) {
                    result = pld_row(arguments, row, index);
                  } else {
                    result = {NONE, NONE, NONE};
                    if (g) std::fill(g, g + n, NONE);
                  }
                }
                const double size = std::fabs(weight(index));
                static_cast<T*>(arguments.loss)[index] = static_cast<T>(s ? result.loss * weight(index) : 0);
                T* bound = static_cast<T*>(arguments.bound) + 2 * index;
                bound[0] = static_cast<T>(result.loss_bound * size);
                bound[1] = static_cast<T>(result.gradient_bound * size);
              });
}

}  // namespace

void pld(const PldArguments& arguments, int64_t begin, int64_t end) {
  if (arguments.wide) {
    pld_rows<double>(arguments, begin, end);
  } else {
    pld_rows<float>(arguments, begin, end);
  }
}

}  // namespace luce::LUCE_ISA
