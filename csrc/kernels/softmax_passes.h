// The passes that every softmax is made of, over units of two vectors that lie `step` apart.
//
// Along a row the step is a unit and every lane gathers a share of it; across an image's pixels the step leads from
// class to class and every lane is a pixel. Sums are floats over a few units, then doubles.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>

#include "softmax_elements.h"
#include "vec.h"

// Inlines everything that a loop calls, which the compiler's own limits would prevent.
#define LUCE_LOOP __attribute__((flatten)) inline

namespace luce::LUCE_ISA {

// How a number is written as mantissa * 2^exponent, its exponent a whole number in the same type. A number of the order
// of 1.5 * 2^mantissa_bits has no fraction: adding it rounds, and leaves the integer, biased, in the lowest bits.
template <class T>
struct Exponents;

template <>
struct Exponents<float> {
  static constexpr float LOG2_E = 0x1.715476p+0f, LN_2 = 0x1.62E430p-1f;
  static constexpr float ROUNDER = 0x1.8p23f, BIAS = 127;
  static constexpr int BITS = 23;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  static constexpr float LIMIT = 0x1p17f;  // |x| < 90852: the mantissas keep their two ULP
#else
  static constexpr float LIMIT = 0x1p14f;
#endif
  // x - n ln(2)
  static vec_t<float> reduce(vec_t<float> x, vec_t<float> n) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return (x - n * 0x1.62E430p-1f) - n * -0x1.05C610p-29f;
#else  // factors so short that their products with n < 2^14 are exact
    return ((x - n * 0x1.6280p-1f) - n * 0x1.9080p-11f) - n * 0x1.FDF474p-22f;
#endif
  }
};

template <>
struct Exponents<double> {
  static constexpr double LOG2_E = 0x1.71547652B82FEp+0, LN_2 = 0x1.62E42FEFA39EFp-1;
  static constexpr double ROUNDER = 0x1.8p52, BIAS = 1023;
  static constexpr int BITS = 52;
  static constexpr double LIMIT = 0x1p17;
  static constexpr double LN_2_HIGH = 0x1.62E42FEFA0000p-1, LN_2_LOW = 0x1.CF79ABC9E3B39p-40;  // 36 bits, and the rest
  static vec_t<double> reduce(vec_t<double> x, vec_t<double> n) { return (x - n * LN_2_HIGH) - n * LN_2_LOW; }
};

template <class T>
inline vec_t<T> round_to_exponent(vec_t<T> x) {
  using X = Exponents<T>;
  return (x * X::LOG2_E + X::ROUNDER) - X::ROUNDER;
}

// 2^d, given d + BIAS + ROUNDER; 0 where d = -BIAS.
template <class T>
inline vec_t<T> power(vec_t<T> biased) {
  mask_t<T> bits;
  std::memcpy(&bits, &biased, sizeof bits);
  bits <<= Exponents<T>::BITS;
  std::memcpy(&biased, &bits, sizeof bits);
  return biased;
}

// ExtExp of the Two-Pass Softmax: e^x = mantissa * 2^n, where `biased` is n + bias.
template <class T>
struct Exponential {
  vec_t<T> mantissa, n, biased;

  Exponential(vec_t<T> x, vec_t<T> bias) {
    biased = x * Exponents<T>::LOG2_E + bias;
    n = biased - bias;
    mantissa = exp_reduced(Exponents<T>::reduce(x, n));
  }
  vec_t<T> value() const { return mantissa * power<T>(biased); }
};

// The reference of a row's exponentials: e^at, at being usually its maximum, or 2^at. The maximum makes the largest
// exponential exactly 1, but x - at is rounded. A power of 2 is subtracted from the exponent instead, without rounding, and
// need not be the maximum.
template <class T, bool POWER>
class Reference {
  using V = vec_t<T>;
  using X = Exponents<T>;

 public:
  explicit Reference(V at) : at_(at) {
    lowest_ = POWER ? (at - X::BIAS) * X::LN_2 : fill(-X::BIAS * X::LN_2);
    bias_ = POWER ? X::ROUNDER + X::BIAS - at : fill(X::ROUNDER + X::BIAS);
  }

  // e^x as mantissa and power of two; the power is 0 where it would not be a normal number. NaN stays.
  Exponential<T> exp(V x) const { return Exponential<T>(max(lowest_, POWER ? x : x - at_), bias_); }

  // The logarithm of the reference, in two parts: x - high is exact where it matters. Not by `reduce`, whose product
  // is the same for all x here, so that a compiler calculates it in advance and there is no fused multiply-add.
  void logarithm(V& high, V& low) const {
    high = at_, low = V{};
    for (int l = 0; POWER && l < Simd<T>::lanes; ++l) {
      const double n = at_[l], ln = n * Exponents<double>::LN_2_HIGH;  // exact
      high[l] = static_cast<T>(ln);
      low[l] = static_cast<T>(ln - high[l] + n * Exponents<double>::LN_2_LOW);
    }
  }

  // What sums relative to `from` are multiplied by, to be relative to `to`, which is not lower.
  static V factor(V from, V to) {
    if constexpr (POWER) {
      return power<T>(max(from - to + (X::ROUNDER + X::BIAS), fill(X::ROUNDER)));
    } else {
      return luce::LUCE_ISA::exp(from - to);
    }
  }

 private:
  V at_, lowest_, bias_;
};

// All lanes as one, in a tree.
template <int BYTES = VECTOR_BYTES, class V, class Op>
inline auto fold(V v, Op op) {
  using T = std::remove_reference_t<decltype(v[0])>;
  if constexpr (BYTES == 2 * sizeof(T)) {
    return op(v[0], v[1]);
  } else {
    typedef T half_t __attribute__((vector_size(BYTES / 2)));
    half_t half[2];
    std::memcpy(half, &v, sizeof v);
    return fold<BYTES / 2>(op(half[0], half[1]), op);
  }
}

template <class V>
inline auto highest_lane(V v) {
  return fold(v, [](auto x, auto y) { return x > y ? x : y; });
}

// One sum a lane, in double.
template <class T>
class Totals {
 public:
  void add(vec_t<T> v) {
    Parts part(v);
    for (int i = 0; i < PARTS; ++i) sum_[i] += part.vec[i];
  }
  void scale(vec_t<T> v) {
    Parts part(v);
    for (int i = 0; i < PARTS; ++i) sum_[i] *= part.vec[i];
  }
  vec_t<T> value() const {
    wide_t wide;
    std::memcpy(&wide, sum_, sizeof wide);
    return __builtin_convertvector(wide, vec_t<T>);
  }
  vec_t<double> folded() const { return PARTS == 1 ? sum_[0] : sum_[0] + sum_[PARTS - 1]; }

 private:
  static constexpr int PARTS = sizeof(double) / sizeof(T);
  typedef double wide_t __attribute__((vector_size(VECTOR_BYTES * PARTS)));
  struct Parts {
    vec_t<double> vec[PARTS];
    explicit Parts(vec_t<T> v) {
      const wide_t wide = __builtin_convertvector(v, wide_t);
      std::memcpy(vec, &wide, sizeof vec);
    }
  };

  vec_t<double> sum_[PARTS] = {};
};

template <class T>
inline double total(const Totals<T>& a, const Totals<T>& b) {
  return fold(a.folded() + b.folded(), [](auto x, auto y) { return x + y; });
}

// Exponentials gathered so far, lane by lane: sum * e^at or sum * 2^at.
template <class T>
struct Gathered {
  Pair<T> at;
  Totals<T> a, b;

  explicit Gathered(T start) : at{fill(start), fill(start)} {}

  template <bool POWER>
  void move(Pair<T> to) {
    a.scale(Reference<T, POWER>::factor(at.a, to.a));
    b.scale(Reference<T, POWER>::factor(at.b, to.b));
    at = to;
  }
};

constexpr int64_t SHORT_SUM = 16;  // units whose sum a float can take
constexpr int64_t BLOCK = 64;      // units that are in the nearest cache when they are read once more

template <class T>
inline Pair<T> max(Pair<T> v, Pair<T> w) {
  return {max(v.a, w.a), max(v.b, w.b)};
}

template <class S, class W = typename Element<S>::Wide>
LUCE_LOOP Pair<W> highest(const S* x, int64_t step, int64_t units, Pair<W> so_far) {
  Pair<W> other = so_far;
  int64_t k = 0;
  for (; k + 2 <= units; k += 2) {
    so_far = max(Element<S>::load(x + k * step), so_far);
    other = max(Element<S>::load(x + (k + 1) * step), other);
  }
  if (k < units) so_far = max(Element<S>::load(x + k * step), so_far);
  return max(so_far, other);
}

// Adds the exponentials of x, handing each pair to seen(k, x, exponentials).
template <class S, class R, class Seen, class W = typename Element<S>::Wide>
LUCE_LOOP void add_exponentials(const S* x, int64_t step, int64_t units, const R& ra, const R& rb, Totals<W>& a,
                                Totals<W>& b, Seen seen) {
  for (int64_t k = 0; k < units;) {
    Pair<W> sum = {};
    for (const int64_t end = std::min(k + SHORT_SUM, units); k < end; ++k) {
      const Pair<W> v = Element<S>::load(x + k * step);
      const Exponential<W> ea = ra.exp(v.a), eb = rb.exp(v.b);
      const Pair<W> e = {ea.value(), eb.value()};
      sum.a += e.a;
      sum.b += e.b;
      seen(k, v, e);
    }
    a.add(sum.a);
    b.add(sum.b);
  }
}

constexpr auto UNSEEN = [](auto...) {};

// Algorithms: add(gathered, x, step, units) takes `units` more units of x into account.

// Three passes: the maximum is known.
template <class S>
struct FromMaximum {
  static constexpr bool POWER = false;
  using W = typename Element<S>::Wide;

  static void add(Gathered<W>& g, const S* x, int64_t step, int64_t units) {
    const Reference<W, POWER> ra(g.at.a), rb(g.at.b);
    add_exponentials(x, step, units, ra, rb, g.a, g.b, UNSEEN);
  }
};

// One pass over memory, two over each block.
template <class S>
struct Online {
  static constexpr bool POWER = false;
  using W = typename Element<S>::Wide;
  static constexpr W start = std::numeric_limits<W>::lowest();

  static void add(Gathered<W>& g, const S* x, int64_t step, int64_t units) {
    for (int64_t k = 0; k < units; k += BLOCK) {
      const int64_t block = std::min(BLOCK, units - k);
      const Pair<W> top = highest(x + k * step, step, block, g.at);
      if (any(top.a > g.at.a) || any(top.b > g.at.b)) g.template move<POWER>(top);
      FromMaximum<S>::add(g, x + k * step, step, block);
    }
  }
};

// The Two-Pass Softmax (arXiv 2001.04438): the exponent of the sum follows the largest exponent of each few terms.
template <class S>
struct TwoPass {
  static constexpr bool POWER = true;
  using W = typename Element<S>::Wide;
  using X = Exponents<W>;
  using V = vec_t<W>;
  static constexpr W start = -X::LIMIT;
  static constexpr int64_t TERMS = 4;

  static void add(Gathered<W>& g, const S* x, int64_t step, int64_t units) {
    for (int64_t k = 0; k < units; k += SHORT_SUM) {
      const int64_t end = std::min(k + SHORT_SUM, units);
      Pair<W> sum = {}, at = g.at;
      int64_t i = k;
      for (; i + TERMS <= end; i += TERMS) few<TERMS>(sum, at, x + i * step, step);
      for (; i < end; ++i) few<1>(sum, at, x + i * step, step);
      g.template move<POWER>(at);
      g.a.add(sum.a);
      g.b.add(sum.b);
    }
  }

 private:
  template <int N>
  LUCE_LOOP static void few(Pair<W>& sum, Pair<W>& at, const S* x, int64_t step) {
    V mantissa_a[N], mantissa_b[N], n_a[N], n_b[N];
    Pair<W> top = at;
    for (int j = 0; j < N; ++j) {
      const Pair<W> v = Element<S>::load(x + j * step);
      const V low = fill(-X::LIMIT * X::LN_2);  // -infinity as well: its power will be 0, or the row is done otherwise
      const Exponential<W> a(max(low, v.a), fill(X::ROUNDER)), b(max(low, v.b), fill(X::ROUNDER));
      mantissa_a[j] = a.mantissa, n_a[j] = a.n;
      mantissa_b[j] = b.mantissa, n_b[j] = b.n;
      top = max(Pair<W>{a.n, b.n}, top);
    }
    const V bias_a = (X::ROUNDER + X::BIAS) - top.a, bias_b = (X::ROUNDER + X::BIAS) - top.b;
    const V none = fill(X::ROUNDER);
    sum.a *= power<W>(max(none, at.a + bias_a));
    sum.b *= power<W>(max(none, at.b + bias_b));
    for (int j = 0; j < N; ++j) {
      sum.a += mantissa_a[j] * power<W>(max(none, n_a[j] + bias_a));
      sum.b += mantissa_b[j] * power<W>(max(none, n_b[j] + bias_b));
    }
    at = top;
  }
};

// The same with an exponent that moves only when necessary: a block is added as if no term were much above it, and added
// again if one was.
template <class S>
struct TwoPassLazy {
  static constexpr bool POWER = true;
  using W = typename Element<S>::Wide;
  using X = Exponents<W>;
  static constexpr W start = -X::LIMIT;
  static constexpr W REACH = X::BIAS / 2;

  static void add(Gathered<W>& g, const S* x, int64_t step, int64_t units) {
    if (units > 0 && g.at.a[0] == start) follow(g, Element<S>::load(x));
    for (int64_t k = 0; k < units; k += BLOCK) {
      const int64_t block = std::min(BLOCK, units - k);
      Totals<W> a = g.a, b = g.b;
      Pair<W> top = add_block(g, a, b, x + k * step, step, block);
      if (any(top.a > (g.at.a + REACH) * X::LN_2) || any(top.b > (g.at.b + REACH) * X::LN_2)) {
        follow(g, top);
        a = g.a, b = g.b;
        add_block(g, a, b, x + k * step, step, block);
      }
      g.a = a, g.b = b;
    }
  }

 private:
  static Pair<W> add_block(const Gathered<W>& g, Totals<W>& a, Totals<W>& b, const S* x, int64_t step, int64_t units) {
    const Reference<W, POWER> ra(g.at.a), rb(g.at.b);
    Pair<W> top = {fill(-std::numeric_limits<W>::infinity()), fill(-std::numeric_limits<W>::infinity())};
    add_exponentials(x, step, units, ra, rb, a, b, [&](int64_t, Pair<W> v, Pair<W>) { top = max(v, top); });
    return top;
  }
  static void follow(Gathered<W>& g, Pair<W> top) {
    const auto exponent = [](vec_t<W> x, vec_t<W> least) {
      return max(least, round_to_exponent<W>(min(x, fill(X::LIMIT * X::LN_2))));
    };
    g.template move<POWER>({exponent(top.a, g.at.a), exponent(top.b, g.at.b)});
  }
};

// What is written, element by element: units may overlap.

template <class T, bool POWER>
struct Softmax {
  Reference<T, POWER> a, b;
  Pair<T> factor;  // 1 / sum

  Pair<T> operator()(Pair<T> v) const {
    const Exponential<T> ea = a.exp(v.a), eb = b.exp(v.b);
    return {ea.mantissa * factor.a * power<T>(ea.biased), eb.mantissa * factor.b * power<T>(eb.biased)};
  }
};

template <class T>
struct LogSoftmax {
  Pair<T> high, low;

  template <bool POWER>
  LogSoftmax(const Reference<T, POWER>& a, const Reference<T, POWER>& b, Pair<T> log_sum) {
    a.logarithm(high.a, low.a);
    b.logarithm(high.b, low.b);
    low.a += log_sum.a;
    low.b += log_sum.b;
  }
  Pair<T> operator()(Pair<T> v) const { return {(v.a - high.a) - low.a, (v.b - high.b) - low.b}; }
};

template <class T>
struct Multiply {
  Pair<T> factor;

  Pair<T> operator()(Pair<T> v) const { return {v.a * factor.a, v.b * factor.b}; }
};

template <bool PAST_CACHES = false, class S, class D, class Op>
LUCE_LOOP void write(const S* x, int64_t x_step, D* y, int64_t y_step, int64_t units, const Op& op) {
  for (int64_t k = 0; k < units; ++k) {
    Element<D>::template store<PAST_CACHES>(y + k * y_step, op(Element<S>::load(x + k * x_step)));
  }
}

}  // namespace luce::LUCE_ISA
