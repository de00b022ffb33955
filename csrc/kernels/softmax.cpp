// Softmax and log-softmax of rows, by several algorithms that differ in how often they read and write a row.
//
//                        reads + writes of x and y   exponentials
//   three_pass_recompute   3 + 1                      2    maximum; sum; result
//   three_pass_reload      3 + 2                      1    maximum; exponentials stored, and their sum; scaled
//   online                 2 + 1                      2    maximum and sum of each block together; result
//   two_pass               2 + 1                      2    sum with its own exponent, no maximum; result
//   two_pass_lazy          2 + 1                      2    the same, the exponent moved only when it must be
//
// Exponentials stored in 16 bits would be rounded twice, and a logarithm does not need them: three_pass_reload becomes
// three_pass_recompute there.

#include "../softmax.h"

#include <cmath>
#include <type_traits>

#include "softmax_passes.h"

namespace luce::LUCE_ISA {
namespace {

using Algorithm = SoftmaxAlgorithm;

constexpr int64_t SHORT_ROW = 4096;     // numbers that stay in the nearest cache
constexpr int64_t ROW_CACHE = 8 << 20;  // bytes of a row's x and y that stay in some cache from pass to pass
constexpr int64_t CACHES = 48 << 20;    // bytes of all results together that do not

enum { PARTS, X_WINDOW, Y_WINDOW };  // slots of scratch memory

// The normaliser of a row or of a slice: sum * e^at or sum * 2^at.
struct Normaliser {
  double at = 0, sum = 0;
};

template <class S>
using wide_t = typename Element<S>::Wide;

template <class T>
Pair<T> both(T x) {
  return {fill(x), fill(x)};
}

bool by_power(Algorithm algorithm) { return algorithm == Algorithm::two_pass || algorithm == Algorithm::two_pass_lazy; }

bool from_maximum(Algorithm algorithm) {
  return algorithm == Algorithm::three_pass_recompute || algorithm == Algorithm::three_pass_reload;
}

// "auto". Measured on one core of an AMD Zen 4 (AVX-512, 1 MiB of L2, 32 MiB of L3), beside other load, as times faster
// than torch.softmax of PyTorch 2.13; medians of interleaved calls:
//
//   shape               two_pass  lazy  recompute  reload  online
//   (1024, 100)   f32       0.57  0.58       0.76    1.46    0.54
//                 bf16      0.73  0.74       0.86    1.69    0.72
//   (1024, 1000)  f32       1.24  1.29       1.26    2.00    1.20
//                 bf16      1.23  1.31       1.28    2.12    1.23
//   (64, 32000)   f32       1.46  1.56       1.33    1.98    1.36
//                 bf16      1.35  1.49       1.36       -    1.35
//   (1, 2^20)     f32       1.45  1.58       1.37    1.88    1.31
//                 bf16      1.51  1.65       1.52       -    1.49
//   (1, 2^22)     f32       1.71  1.86       1.54    1.63    1.56
//   (1, 2^24)     f32       3.52  3.62       2.91    2.79    3.19
//   (1, 2^26)     f32       3.69  3.50       2.97    2.89    3.46
//
// From 2^24 on, half of the advantage over torch.softmax is that of large pages.
template <class S>
Algorithm choose(Algorithm wish, int64_t n, bool logarithm) {
  const bool reload = n <= SHORT_ROW || (Element<S>::is_wide && !logarithm);
  if (wish == Algorithm::automatic) {
    const bool in_cache = n * static_cast<int64_t>(2 * sizeof(S)) <= ROW_CACHE;
    if (reload && in_cache) return Algorithm::three_pass_reload;
    // A logarithm near 0 is exact only relative to the maximum, and writing it takes no exponentials.
    if (logarithm) return in_cache ? Algorithm::three_pass_recompute : Algorithm::online;
    return Algorithm::two_pass_lazy;
  }
  return wish == Algorithm::three_pass_reload && !reload ? Algorithm::three_pass_recompute : wish;
}

template <class S>
wide_t<S> highest_of(const S* x, int64_t n) {
  using W = wide_t<S>;
  constexpr int64_t UNIT = Element<S>::UNIT;
  Pair<W> top = highest(x, UNIT, n / UNIT, both(-std::numeric_limits<W>::infinity()));
  if (n % UNIT) top = max(top, Element<S>::load(n < UNIT ? Tail<S>(x, n).unit() : x + n - UNIT));
  return highest_lane(max(top.a, top.b));
}

// Joins the lanes to one sum.
template <class T, bool POWER>
Normaliser gather(Gathered<T>& g) {
  const T at = highest_lane(max(g.at.a, g.at.b));
  g.template move<POWER>(both(at));
  return {at, total(g.a, g.b)};
}

template <class A, class S>
Normaliser normaliser_by(const S* x, int64_t n) {
  constexpr int64_t UNIT = Element<S>::UNIT;
  Gathered<wide_t<S>> g(A::start);
  A::add(g, x, UNIT, n / UNIT);
  if (n % UNIT) A::add(g, Tail<S>(x, n).unit(), UNIT, 1);
  return gather<wide_t<S>, A::POWER>(g);
}

template <class S>
struct StoreTo {
  S* y;

  void operator()(int64_t k, Pair<S>, Pair<S> e) const { Element<S>::store(y + k * Element<S>::UNIT, e); }
};

// `top` is the row's maximum where the algorithm wants it. Reloading, the exponentials go to `y`.
template <class S>
Normaliser normaliser(Algorithm algorithm, const S* x, S* y, int64_t n, double top) {
  using W = wide_t<S>;
  constexpr int64_t UNIT = Element<S>::UNIT;
  switch (algorithm) {
    case Algorithm::two_pass: return normaliser_by<TwoPass<S>>(x, n);
    case Algorithm::two_pass_lazy: return normaliser_by<TwoPassLazy<S>>(x, n);
    case Algorithm::online: return normaliser_by<Online<S>>(x, n);
    default: break;
  }
  Gathered<W> g(static_cast<W>(top));
  const int64_t units = n / UNIT, rest = n % UNIT;
  if constexpr (Element<S>::is_wide) {
    if (algorithm == Algorithm::three_pass_reload) {
      const Reference<W, false> r(g.at.a);
      if (n < UNIT) {
        S unit[UNIT];
        add_exponentials(Tail<S>(x, n).unit(), UNIT, 1, r, r, g.a, g.b, StoreTo<S>{unit});
        std::memcpy(y, unit, n * sizeof(S));
        return {top, total(g.a, g.b)};
      }
      if (rest) {  // the last whole unit is stored, the end of it counts
        const Pair<W> v = Element<S>::load(x + n - UNIT), e = {r.exp(v.a).value(), r.exp(v.b).value()};
        Element<S>::store(y + n - UNIT, e);
        const Pair<W> end = without_first<S>(UNIT - rest, e, Pair<W>{});
        g.a.add(end.a);
        g.b.add(end.b);
      }
      add_exponentials(x, UNIT, units, r, r, g.a, g.b, StoreTo<S>{y});
      return {top, total(g.a, g.b)};
    }
  }
  FromMaximum<S>::add(g, x, UNIT, units);
  if (rest) FromMaximum<S>::add(g, Tail<S>(x, n).unit(), UNIT, 1);
  return {top, total(g.a, g.b)};
}

// y = op(x) of a row or slice; x and y may be the same.
template <class S, class Op>
void write_row(const S* x, S* y, int64_t n, bool past_caches, const Op& op) {
  constexpr int64_t UNIT = Element<S>::UNIT;
  if (n < UNIT) {
    S unit[UNIT];
    write(Tail<S>(x, n).unit(), 0, unit, 0, 1, op);
    std::memcpy(y, unit, n * sizeof(S));
    return;
  }
  // Both before anything is written: x may be y.
  const auto first = op(Element<S>::load(x)), last = op(Element<S>::load(x + n - UNIT));
  if (past_caches) {  // from the first aligned element on
    const int64_t head = -(reinterpret_cast<uintptr_t>(y) / sizeof(S)) % (VECTOR_BYTES / sizeof(S));
    write<true>(x + head, UNIT, y + head, UNIT, (n - head) / UNIT, op);
    finish_stores();
    Element<S>::store(y, first);
  } else {
    write(x, UNIT, y, UNIT, n / UNIT, op);
  }
  Element<S>::store(y + n - UNIT, last);
}

template <bool POWER, class S>
void write_result(const S* x, S* y, int64_t n, Normaliser whole, bool logarithm, bool past_caches) {
  using W = wide_t<S>;
  const Reference<W, POWER> r(fill(static_cast<W>(whole.at)));
  if (logarithm) {
    write_row(x, y, n, past_caches, LogSoftmax<W>(r, r, both(static_cast<W>(std::log(whole.sum)))));
  } else {
    write_row(x, y, n, past_caches, Softmax<W, POWER>{r, r, both(static_cast<W>(1 / whole.sum))});
  }
}

// Three passes over a row that stays in the nearest cache, from its exponentials in full precision whatever S is. With
// little around the loops, so that the processor finds the next row's work while it waits for this one's sum.
template <class S>
LUCE_LOOP void softmax_short(const S* x, S* y, int64_t n, bool logarithm) {
  using W = wide_t<S>;
  constexpr int64_t UNIT = Element<S>::UNIT;
  const int64_t units = n / UNIT, rest = n % UNIT;
  const Pair<W> x_end = Element<S>::load(x + n - UNIT);  // the last unit may overlap the one before
  const Pair<W> top = highest(x, UNIT, units, x_end);
  const Reference<W, false> r(fill(highest_lane(max(top.a, top.b))));
  const Pair<W> end = {r.exp(x_end.a).value(), r.exp(x_end.b).value()};
  Totals<W> a, b;
  if (rest) {
    const Pair<W> counted = without_first<S>(UNIT - rest, end, Pair<W>{});
    a.add(counted.a);
    b.add(counted.b);
  }
  if (logarithm) {
    add_exponentials(x, UNIT, units, r, r, a, b, UNSEEN);
    const LogSoftmax<W> op(r, r, both(static_cast<W>(std::log(total(a, b)))));
    write(x, UNIT, y, UNIT, units, op);
    Element<S>::store(y + n - UNIT, op(x_end));
    return;
  }
  W kept[Element<S>::is_wide ? 1 : SHORT_ROW];
  W* e;
  if constexpr (Element<S>::is_wide) {
    e = y;
  } else {
    e = kept;
  }
  add_exponentials(x, UNIT, units, r, r, a, b,
                   [=](int64_t k, Pair<W>, Pair<W> v) { Element<W>::store(e + k * UNIT, v); });
  const Multiply<W> op{both(static_cast<W>(1 / total(a, b)))};
  write(e, UNIT, y, UNIT, units, op);
  Element<S>::store(y + n - UNIT, op(end));
}

// In the order of the slices, whichever threads computed them: results do not depend on the number of threads.
Normaliser combine(const Normaliser* parts, int64_t count, bool power) {
  Normaliser whole = parts[0];
  if (count == 1) return whole;
  for (int64_t i = 1; i < count; ++i) whole.at = std::max(whole.at, parts[i].at);
  whole.sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double down = parts[i].at - whole.at;  // NaN if both are infinite: so are the sums
    whole.sum += parts[i].sum * (down == 0 ? 1 : power ? std::exp2(down) : std::exp(down));
  }
  return whole;
}

// Whether exponents could hold the row, -infinity being far below it.
template <class T>
bool in_range(double at, double sum) {
  return std::fabs(at) < Exponents<T>::LIMIT - 2 * Exponents<T>::BIAS && std::isfinite(sum);
}

template <class S>
void softmax_row(const SoftmaxArguments& arguments, Algorithm algorithm, const S* x, S* y, int64_t n,
                 bool past_caches) {
  using W = wide_t<S>;
  const int64_t slices = (n + SOFTMAX_SLICE - 1) / SOFTMAX_SLICE;
  Normaliser only, *parts = slices == 1 ? &only : scratch().get<Normaliser>(PARTS, slices);
  const auto each = [&](auto body) {  // body(slice, start, length)
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        body(i, i * SOFTMAX_SLICE, std::min(SOFTMAX_SLICE, n - i * SOFTMAX_SLICE));
      }
    };
    if (arguments.parallel) {
      arguments.parallel(slices, some);
    } else {
      some(0, slices);
    }
  };
  double top = -std::numeric_limits<double>::infinity();
  if (from_maximum(algorithm)) {
    each([&](int64_t i, int64_t start, int64_t length) { parts[i].at = highest_of(x + start, length); });
    for (int64_t i = 0; i < slices; ++i) top = std::max(top, parts[i].at);
  }
  each([&](int64_t i, int64_t start, int64_t length) {
    parts[i] = normaliser(algorithm, x + start, y + start, length, top);
  });
  const bool power = by_power(algorithm);
  Normaliser whole = combine(parts, slices, power);
  if (power) {
    if (!in_range<W>(whole.at, whole.sum)) {
      return softmax_row(arguments, Algorithm::three_pass_recompute, x, y, n, past_caches);
    }
    const int exponent = std::ilogb(whole.sum);  // as in `normalise`
    whole.sum = std::ldexp(whole.sum, -exponent);
    whole.at += exponent;
  }
  each([&](int64_t, int64_t start, int64_t length) {
    if (algorithm == Algorithm::three_pass_reload) {
      write_row(y + start, y + start, length, past_caches, Multiply<W>{both(static_cast<W>(1 / whole.sum))});
    } else if (power) {
      write_result<true>(x + start, y + start, length, whole, arguments.logarithm, past_caches);
    } else {
      write_result<false>(x + start, y + start, length, whole, arguments.logarithm, past_caches);
    }
  });
}

template <class S>
void softmax_any(const SoftmaxArguments& arguments, Algorithm algorithm, const S* x, S* y, int64_t n,
                 bool past_caches) {
  constexpr int64_t UNIT = Element<S>::UNIT;
  if (algorithm != Algorithm::three_pass_reload || n > SHORT_ROW) {
    softmax_row(arguments, algorithm, x, y, n, past_caches);
  } else if (n >= UNIT) {
    softmax_short(x, y, n, arguments.logarithm);
  } else {
    S unit[UNIT];
    softmax_short(Tail<S>(x, n).unit(), unit, UNIT, arguments.logarithm);
    std::memcpy(y, unit, n * sizeof(S));
  }
}

// Moves the power of 2 of the sum to the exponent: near 1, the logarithm of the sum keeps its digits.
template <class T>
void normalise(vec_t<T>& at, vec_t<T>& sum) {
  vec_t<T> e, f;
  split(sum, e, f);
  at += e;
  sum = 1 + f;
}

// A unit of neighbouring pixels, class after class.
template <class A, class S>
bool softmax_pixels_by(const S* x, int64_t x_step, S* y, int64_t y_step, int64_t n, bool logarithm) {
  using W = wide_t<S>;
  Gathered<W> g(0);
  if constexpr (std::is_same_v<A, FromMaximum<S>>) {
    g.at = highest(x, x_step, n, both(-std::numeric_limits<W>::infinity()));
  } else {
    g.at = both(A::start);
  }
  A::add(g, x, x_step, n);
  Pair<W> sum = {g.a.value(), g.b.value()};
  if constexpr (A::POWER) {
    for (int l = 0; l < Simd<W>::lanes; ++l) {
      if (!in_range<W>(g.at.a[l], sum.a[l]) || !in_range<W>(g.at.b[l], sum.b[l])) return false;
    }
    normalise<W>(g.at.a, sum.a);
    normalise<W>(g.at.b, sum.b);
  }
  const Reference<W, A::POWER> a(g.at.a), b(g.at.b);
  if (logarithm) {
    const auto log_of = [](vec_t<W> v) {
      const vec_t<W> none = fill(std::numeric_limits<W>::quiet_NaN());
      return v > 0 ? log(v) : none;
    };
    write(x, x_step, y, y_step, n, LogSoftmax<W>(a, b, {log_of(sum.a), log_of(sum.b)}));
  } else {
    write(x, x_step, y, y_step, n, Softmax<W, A::POWER>{a, b, {1 / sum.a, 1 / sum.b}});
  }
  return true;
}

template <class S, class... Rest>
void softmax_pixels(Algorithm algorithm, const S* x, Rest... rest) {
  bool done = false;
  switch (algorithm) {
    case Algorithm::two_pass: done = softmax_pixels_by<TwoPass<S>>(x, rest...); break;
    case Algorithm::two_pass_lazy: done = softmax_pixels_by<TwoPassLazy<S>>(x, rest...); break;
    case Algorithm::online: done = softmax_pixels_by<Online<S>>(x, rest...); break;
    default: break;
  }
  if (!done) softmax_pixels_by<FromMaximum<S>>(x, rest...);
}

// A matrix as one image: where classes lie apart, its rows are often neighbours.
Rows as_image(Rows rows) {
  if (rows.inner == 1) {
    rows.inner = rows.outer, rows.inner_stride = rows.outer_stride;
    rows.outer = 1, rows.outer_stride = 0;
  }
  return rows;
}

template <class S>
void softmax_all(const SoftmaxArguments& arguments, int64_t begin, int64_t end) {
  using W = wide_t<S>;
  constexpr int64_t UNIT = Element<S>::UNIT;
  const bool apart = arguments.x.class_stride != 1 || arguments.y.class_stride != 1;
  const Rows x = apart ? as_image(arguments.x) : arguments.x, y = apart ? as_image(arguments.y) : arguments.y;
  const int64_t n = x.classes;
  const Algorithm algorithm = choose<S>(arguments.algorithm, n, arguments.logarithm);
  const S* from = static_cast<const S*>(x.data);
  S* to = static_cast<S*>(y.data);
  if (!apart) {
    const bool past_caches = x.count() * n * static_cast<int64_t>(sizeof(S)) > CACHES;
    for (int64_t row = begin; row < end; ++row) {
      softmax_any(arguments, algorithm, from + x.offset(row), to + y.offset(row), n, past_caches);
    }
    return;
  }
  const bool neighbours = x.inner_stride == 1 && y.inner_stride == 1;
  Window<W> window_x(x, X_WINDOW, TILE), window_y(y, Y_WINDOW, TILE);
  for (int64_t row = begin; row < end;) {
    const int64_t image_end = std::min(end, row + x.inner - row % x.inner), pixels = image_end - row;
    if (neighbours && pixels >= UNIT) {
      for (; row < image_end; row += UNIT) {
        const int64_t first = std::min(row, image_end - UNIT);  // the last unit may overlap the one before
        softmax_pixels(algorithm, from + x.offset(first), x.class_stride, to + y.offset(first), y.class_stride, n,
                       arguments.logarithm);
      }
      row = image_end;
      continue;
    }
    const int64_t count = std::min(TILE, pixels);
    window_x.load(row, count);
    window_y.place(row);
    const Algorithm wide = choose<W>(algorithm, n, arguments.logarithm);
    for (int64_t r = row; r < row + count; ++r) {
      softmax_any<W>(arguments, wide, window_x.row(r), window_y.row(r), n, false);
    }
    window_y.store(count);
    row += count;
  }
}

template <class T>
void exp_parts_of(const ExpPartsArguments& arguments, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(arguments.x);
  for (int64_t i = begin; i < end; i += Simd<T>::lanes) {
    const int64_t count = std::min<int64_t>(Simd<T>::lanes, end - i);
    const vec_t<T> v = load_some(x + i, count, T(0));
    const Exponential<T> e(v, fill(Exponents<T>::ROUNDER));
    store_some(static_cast<T*>(arguments.mantissa) + i, e.mantissa, count);
    store_some(static_cast<T*>(arguments.exponent) + i, e.n, count);
    store_some(static_cast<T*>(arguments.value) + i, exp(v), count);
  }
}

}  // namespace

void softmax(const SoftmaxArguments& arguments, int64_t begin, int64_t end) {
  switch (arguments.x.type) {
    case Type::float32: return softmax_all<float>(arguments, begin, end);
    case Type::float64: return softmax_all<double>(arguments, begin, end);
    case Type::bfloat16: return softmax_all<Bfloat16>(arguments, begin, end);
    case Type::float16: return softmax_all<Float16>(arguments, begin, end);
    default: return;  // the binding takes no integers
  }
}

void exp_parts(const ExpPartsArguments& arguments, int64_t begin, int64_t end) {
  if (arguments.wide) {
    exp_parts_of<double>(arguments, begin, end);
  } else {
    exp_parts_of<float>(arguments, begin, end);
  }
}

}  // namespace luce::LUCE_ISA
