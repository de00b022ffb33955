// Cross-entropy with the label, a share of the target being spread evenly over the classes that exist.

#include <cmath>

#include "../divergence.h"
#include "span.h"

namespace luce::LUCE_ISA {
namespace {

enum CrossEntropySlot { REST = 3, EXPONENTIALS };

template <class T>
double cross_entropy_row(const CrossEntropyArguments& arguments, const T* s, int64_t label, T* g, T weight) {
  constexpr T INF = std::numeric_limits<T>::infinity();
  constexpr double NONE = std::numeric_limits<double>::quiet_NaN();
  const int64_t n = arguments.student.classes;
  if (label < 0 || label >= n || s[label] != s[label]) return NONE;

  // The rest is summed without the label: -log q = log(1 + rest/label) keeps its digits where q is almost 1.
  const Span<T> rest(without(s, n, label, REST), n);
  vec_t<T> tops = fill(s[label]);
  for (int64_t i = 0; i < n; i += Simd<T>::lanes) tops = max(tops, rest[i]);
  const T top = lane_max(tops);
  T* exponentials = scratch().get<T>(EXPONENTIALS, n);
  Sums<T> sum;
  for (int64_t i = 0; i < n; i += Simd<T>::lanes) {
    const vec_t<T> w = exp(rest[i] - top);
    sum.add(w);
    store(exponentials + i, w);
    if (flush_due<T>(i)) sum.flush();
  }
  // NaN, +inf and a row without classes make the sum NaN or, as the label's logit, x.
  const double x = double(s[label]) - double(top), of_label = std::exp(x), z_rest = total(sum), z = z_rest + of_label;
  if (z != z) return NONE;
  // Further down of_label may underflow, and log z - x cancels nothing.
  const double nll = x > -30 ? std::log1p(z_rest / of_label) : std::log(z) - x;

  const double smoothing = arguments.smoothing;
  T even = 0;
  double value = nll;
  if (smoothing != 0) {
    Sums<T> below, count;
    for (int64_t i = 0; i < n; i += Simd<T>::lanes) {
      const mask_t<T> exists = rest[i] > -INF;
      below.add(exists ? rest[i] - top : fill(T(0)));  // from the top: a common offset would take digits
      count.add(exists ? fill(T(1)) : fill(T(0)));
      if (flush_due<T>(i)) below.flush(), count.flush();
    }
    const bool label_exists = s[label] > -INF;
    const double classes = total(count) + label_exists;
    value = (1 - smoothing) * nll + smoothing * (std::log(z) - (total(below) + (label_exists ? x : 0)) / classes);
    even = static_cast<T>(smoothing / classes * weight);
  }
  if (!g) return value;
  const T scale = static_cast<T>(weight / z);
  for (int64_t i = 0; i < n; i += Simd<T>::lanes) {
    store_at(g, n, i, load(exponentials + i) * scale - (rest[i] > -INF ? fill(even) : fill(T(0))));
  }
  const double evenly = s[label] > -INF ? smoothing * of_label / z * weight - even : 0;
  g[label] = static_cast<T>(evenly - (1 - smoothing) * (z_rest / z) * weight);
  return value;
}

template <class T>
void cross_entropy_rows(const CrossEntropyArguments& arguments, int64_t begin, int64_t end) {
  weighted_rows<T>(arguments, begin, end, [&](int64_t index, const T* s, const T*, T* g, T weight) {
    return cross_entropy_row(arguments, s, arguments.target[index], g, weight);
  });
}

}  // namespace

void cross_entropy(const CrossEntropyArguments& arguments, int64_t begin, int64_t end) {
  if (arguments.wide) {
    cross_entropy_rows<double>(arguments, begin, end);
  } else {
    cross_entropy_rows<float>(arguments, begin, end);
  }
}

}  // namespace luce::LUCE_ISA
