// The differentiable Kendall tau of RKKD (arXiv 2409.17823), value and gradient of a row in one visit of its pairs.
//
// The loss is the mean over pairs of classes i < j of 1 - a(s_i - s_j, t_i - t_j), where the agreement a goes from -1 to
// 1. Pairs are antisymmetric: what one adds to the gradient of class i it takes from that of class j. Nothing is stored
// but the row and its gradient. Of the clipped form only the order of a long row is visited, in C log C steps.

#include "../rkkd.h"

#include <algorithm>
#include <cmath>

#include "order.h"
#include "rows.h"

namespace luce::LUCE_ISA {
namespace {

enum Slot { STUDENT = 12, TEACHER, GRADIENT, PRESENT, ORDER, RANKS, RANKED, TREE };  // order.h has the slots before

template <class T>
constexpr T INF = std::numeric_limits<T>::infinity();

// Enough Taylor terms of e^t - 1 for |t| <= ln(2)/2.
template <class T>
constexpr int TERMS = sizeof(T) == 4 ? 7 : 13;

template <class T>
inline vec_t<T> expm1_reduced(vec_t<T> t) {
  constexpr double inverse_factorial[] = {1.0,          1.0,           1.0 / 2,        1.0 / 6,         1.0 / 24,
                                          1.0 / 120,    1.0 / 720,     1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
                                          1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  vec_t<T> p = fill(T(inverse_factorial[TERMS<T>]));
  for (int k = TERMS<T> - 1; k > 0; --k) p = p * t + T(inverse_factorial[k]);
  return p * t;
}

// e^-y and 1 - e^-y for y >= 0, both to rounding: tanh(x) is (1 - e) / (1 + e), its slope 4 e / (1 + e)^2 at y = 2|x|.
template <class T>
struct Decay {
  vec_t<T> e, rest;

  explicit Decay(vec_t<T> y) {
    constexpr bool single = sizeof(T) == 4;
    const mask_t<T> gone = y > -Simd<T>::exp_min;
    const vec_t<T> magic = fill(single ? T(0x1.8000FEp23) : T(0x1.80000000003FFp52));
    const vec_t<T> biased = magic - y * T(0x1.71547652B82FEp+0);
    const vec_t<T> n = biased - magic;
    const vec_t<T> t = single ? (-y - n * T(0x1.62E4p-1)) - n * T(0x1.7F7D1Cp-20)
                              : (-y - n * T(0x1.62E42FEFA0000p-1)) - n * T(0x1.CF79ABC9E3B39p-40);
    mask_t<T> bits;
    std::memcpy(&bits, &biased, sizeof bits);
    bits <<= single ? 23 : 52;
    vec_t<T> scale;
    std::memcpy(&scale, &bits, sizeof scale);
    const vec_t<T> q = expm1_reduced<T>(t) * scale;
    e = gone ? fill(T(0)) : q + scale;
    rest = gone ? fill(T(1)) : (T(1) - scale) - q;
  }
};

// The cost of a pair, 1 - a, as a sum of positive terms, so that nothing cancels where a is almost 1; and the slope of a
// in the student's difference, divided by the steepness.
template <class T>
struct Pair {
  vec_t<T> cost, slope;
};

template <class T>
inline vec_t<T> magnitude(vec_t<T> v) {
  return max(v, -v);
}

// |v| with the sign of `like`, 0 where that is 0.
template <class T>
inline vec_t<T> with_sign(vec_t<T> v, vec_t<T> like) {
  return like < T(0) ? -v : like > T(0) ? v : fill(T(0));
}

template <RkkdForm FORM, class T>
inline Pair<T> pair_of(vec_t<T> ds, vec_t<T> dt, T k) {
  const mask_t<T> agree = (ds < T(0)) == (dt < T(0)), tied = dt == T(0);
  const vec_t<T> one = fill(T(1));
  if constexpr (FORM == RkkdForm::tanh) {
    const Decay<T> s(magnitude<T>(ds) * (2 * k)), t(magnitude<T>(dt) * (2 * k));
    const vec_t<T> both = T(1) / ((T(1) + s.e) * (T(1) + t.e));
    const vec_t<T> cost = T(2) * both * (agree ? s.e + t.e : T(1) + s.e * t.e);
    return {cost, with_sign<T>(T(4) * t.rest * s.e * both * (both * (T(1) + t.e)), dt)};
  } else if constexpr (FORM == RkkdForm::sign_tanh) {
    const Decay<T> s(magnitude<T>(ds) * (2 * k));
    const vec_t<T> half = T(1) / (T(1) + s.e), cost = T(2) * half * (agree ? s.e : one);
    return {tied ? one : cost, with_sign<T>(T(4) * s.e * half * half, dt)};
  } else if constexpr (FORM == RkkdForm::product) {
    vec_t<T> x = ds * dt;
    x = x == x ? x : fill(T(0));  // 0 * inf: a tie in one network decides
    const Decay<T> p(magnitude<T>(x) * (2 * k));
    const vec_t<T> half = T(1) / (T(1) + p.e), slope = dt * (T(4) * p.e * half * half);
    return {T(2) * half * (x < T(0) ? one : p.e), magnitude<T>(dt) < INF<T> ? slope : fill(T(0))};
  } else {
    const vec_t<T> x = ds * k, clipped = max(min(x, one), -one);
    return {T(1) - with_sign<T>(clipped, dt), with_sign<T>(magnitude<T>(x) < T(1) ? one : fill(T(0)), dt)};
  }
}

// a - b, where two classes that a network excludes are tied and, as `fixed` marks, have no gradient.
template <class T>
inline vec_t<T> difference(vec_t<T> a, vec_t<T> b, mask_t<T>& fixed) {
  const vec_t<T> d = a - b;
  fixed = d != d;
  return fixed ? fill(T(0)) : d;
}

inline vec_t<double> part_of(vec_t<double> v, int) { return v; }

inline vec_t<double> part_of(vec_t<float> v, int part) {
  typedef float half_t __attribute__((vector_size(VECTOR_BYTES / 2)));
  half_t half[2];
  std::memcpy(half, &v, sizeof v);
  return __builtin_convertvector(half[part], vec_t<double>);
}

inline double total(vec_t<double> v) {
  double sum = 0;
  for (int l = 0; l < Simd<double>::lanes; ++l) sum += v[l];
  return sum;
}

// The cost of all pairs of n classes, and at `gradient` what their agreement gains. The arrays have room for a vector
// more, where s and t hold anything finite. INFINITE allows for -inf, and for differences that overflow.
template <RkkdForm FORM, bool INFINITE, class T>
double all_pairs(const T* s, const T* t, int64_t n, T k, double* gradient) {
  constexpr int L = Simd<T>::lanes, D = Simd<double>::lanes;
  mask_t<T> lane;
  for (int l = 0; l < L; ++l) lane[l] = l;
  vec_t<double> costs = {};
  for (int64_t i = 0; i < n; ++i) {
    const vec_t<T> si = fill(s[i]), ti = fill(t[i]);
    vec_t<double> own = {};
    for (int64_t j = i + 1; j < n; j += L) {
      vec_t<T> ds = si - load(s + j), dt = ti - load(t + j);
      mask_t<T> fixed = {}, unused;
      if constexpr (INFINITE) {
        ds = difference<T>(si, load(s + j), fixed);
        dt = difference<T>(ti, load(t + j), unused);
      }
      Pair<T> pair = pair_of<FORM, T>(ds, dt, k);
      if constexpr (INFINITE) pair.slope = fixed ? fill(T(0)) : pair.slope;
      if (n - j < L) {
        const mask_t<T> inside = lane < static_cast<int>(n - j);
        pair.cost = inside ? pair.cost : fill(T(0));
        pair.slope = inside ? pair.slope : fill(T(0));
      }
      for (int p = 0; p < L / D; ++p) {
        const vec_t<double> slope = part_of(pair.slope, p);
        costs += part_of(pair.cost, p);
        own += slope;
        store(gradient + j + p * D, load(gradient + j + p * D) - slope);
      }
    }
    gradient[i] += total(own);
  }
  return total(costs);
}

template <bool INFINITE, class T>
double all_pairs(RkkdForm form, const T* s, const T* t, int64_t n, T k, double* gradient) {
  switch (form) {
    case RkkdForm::tanh: return all_pairs<RkkdForm::tanh, INFINITE>(s, t, n, k, gradient);
    case RkkdForm::sign_tanh: return all_pairs<RkkdForm::sign_tanh, INFINITE>(s, t, n, k, gradient);
    case RkkdForm::product: return all_pairs<RkkdForm::product, INFINITE>(s, t, n, k, gradient);
    case RkkdForm::clip: return all_pairs<RkkdForm::clip, INFINITE>(s, t, n, k, gradient);
  }
  return 0;
}

// The least and the largest number of a row that are not -inf.
template <class T>
struct Range {
  T low = INF<T>, high = -INF<T>;

  Range(const T* x, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      low = x[i] > -INF<T> ? std::min(low, x[i]) : low;
      high = std::max(high, x[i]);
    }
  }
  T span() const { return high > low ? high - low : T(1); }  // above 0: there may be -inf to tell apart
};

// From how many classes on the clipped form is sorted.
constexpr int64_t SORTED_FROM = 160;

// How many classes of each rank, in a binary indexed tree: of those before the window, and of those before its end.
struct Tree {
  struct Counts {
    int32_t begin = 0, end = 0;
  };

  Tree(Counts* nodes, int64_t size) : nodes_(nodes), size_(size) { std::fill(nodes, nodes + size + 1, Counts()); }

  void add(int32_t rank, int32_t Counts::* to) {
    for (int64_t node = rank; node <= size_; node += node & -node) ++(nodes_[node].*to);
  }

  Counts up_to(int32_t rank) const {
    Counts sum;
    for (int64_t node = rank; node > 0; node &= node - 1) {
      sum.begin += nodes_[node].begin;
      sum.end += nodes_[node].end;
    }
    return sum;
  }

 private:
  Counts* nodes_;
  int64_t size_;
};

// As all_pairs for the clipped form, which is sgn(t_i - t_j) times k (s_i - s_j) for classes that the student has
// within 1/k of each other, and a sign for all others. Sorted by the student's logits, those near class i are a window,
// and what the teacher's signs sum up to over the first classes is a difference of two counts. The gradient of class i
// is that sum over its window, G_i. As the G_i sum to 0, sum_i s_i G_i is the sum over all gaps of neighbours
// s_i - s_{i+1} of the gap times G_1 + ... + G_i: nothing cancels, and the sums of counts are exact. The ranges must be
// finite.
template <class T>
double clipped_pairs(const T* s, Range<T> range_s, const T* t, Range<T> range_t, int64_t n, T k, double* gradient) {
  uint32_t* order = scratch().get<uint32_t>(ORDER, n + 1);
  int32_t* rank = scratch().get<int32_t>(RANKS, n);
  T* value = scratch().get<T>(RANKED, n);

  order_row(t, n, int64_t(-1), range_t.high, range_t.span(), false, order);
  int32_t ranks = 0;  // the teacher's, from 1 for the largest logit; equals share one
  for (int64_t i = 0; i < n; ++i) {
    ranks += i == 0 || t[order[i]] != t[order[i - 1]];
    rank[order[i]] = ranks;
  }
  order_row(s, n, int64_t(-1), range_s.high, range_s.span(), false, order);
  for (int64_t i = 0; i < n; ++i) value[i] = s[order[i]];
  const auto near = [&](int64_t above, int64_t below) {  // as pair_of has it; two excluded classes are tied
    return value[above] == value[below] || (value[above] - value[below]) * k < T(1);
  };

  Tree tree(scratch().get<Tree::Counts>(TREE, ranks + 1), ranks);
  int64_t begin = 0, end = 0, discord = 0, across = 0;
  double within = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (; begin < i && !near(begin, i); ++begin) tree.add(rank[order[begin]], &Tree::Counts::begin);
    for (; end < n && near(i, end); ++end) tree.add(rank[order[end]], &Tree::Counts::end);
    const int32_t own = rank[order[i]];
    const Tree::Counts above = tree.up_to(own - 1);
    Tree::Counts upward = {above.begin, above.end + 1};
    if (ranks < n) upward = tree.up_to(own);
    // Sums of sgn(t_i - t_j): how many the teacher ranks below i, less those above.
    const int64_t before = begin - upward.begin - above.begin;
    const int64_t window = value[i] == -INF<T> ? 0 : end - upward.end - above.end - before;
    if (across != 0) within += (double(value[i - 1]) - double(value[i])) * double(across);
    across += window;
    discord += before;
    gradient[order[i]] = double(window);
  }
  const int64_t pairs = n * (n - 1) / 2;
  return double(pairs + discord) - double(k) * within;
}

// The loss of a row; at g, if given, its gradient times `weight`.
template <class T>
double rkkd_row(const RkkdArguments& arguments, const T* s, const T* t, int64_t n, double weight, T* g) {
  constexpr int L = Simd<T>::lanes;
  constexpr T NONE = std::numeric_limits<T>::quiet_NaN();
  const bool undefined = std::any_of(s, s + n, [](T x) { return !(x < INF<T>); }) ||
                         std::any_of(t, t + n, [](T x) { return !(x < INF<T>); });
  if (undefined) {
    if (g) std::fill(g, g + n, NONE);
    return NONE;
  }
  T* student = scratch().get<T>(STUDENT, n + L);
  T* teacher = scratch().get<T>(TEACHER, n + L);
  double* gradient = scratch().get<double>(GRADIENT, n + L);
  int64_t* present = scratch().get<int64_t>(PRESENT, n);
  int64_t count = 0;
  for (int64_t c = 0; c < n; ++c) {
    student[count] = s[c];
    teacher[count] = t[c];
    present[count] = c;
    count += s[c] > -INF<T> || t[c] > -INF<T>;
  }
  std::fill(student + count, student + count + L, T(0));
  std::fill(teacher + count, teacher + count + L, T(0));
  std::fill(gradient, gradient + count + L, 0.0);
  if (g) std::fill(g, g + n, T(0));
  if (count < 2) return 0;

  const Range<T> range_s(student, count), range_t(teacher, count);
  const bool overflow = !(range_s.span() < INF<T> && range_t.span() < INF<T>);
  const auto excludes = [count](const T* x) { return std::find(x, x + count, -INF<T>) != x + count; };
  const T k = static_cast<T>(std::min<double>(arguments.steepness, std::numeric_limits<T>::max()));
  double sum;
  if (arguments.form == RkkdForm::clip && count >= SORTED_FROM && !overflow) {
    sum = clipped_pairs(student, range_s, teacher, range_t, count, k, gradient);
  } else if (overflow || excludes(student) || excludes(teacher)) {
    sum = all_pairs<true>(arguments.form, student, teacher, count, k, gradient);
  } else {
    sum = all_pairs<false>(arguments.form, student, teacher, count, k, gradient);
  }
  const double pairs = 0.5 * static_cast<double>(count) * static_cast<double>(count - 1);
  const double scale = -arguments.steepness / pairs * weight;
  for (int64_t c = 0; g && c < count; ++c) g[present[c]] = static_cast<T>(scale * gradient[c]);
  return sum / pairs;
}

template <class T>
void rkkd_rows(const RkkdArguments& arguments, int64_t begin, int64_t end) {
  const int64_t n = arguments.student.classes;
  const auto weight = [&](int64_t row) {
    return arguments.weight ? static_cast<const T*>(arguments.weight)[row] : T(1);
  };
  const auto skip = [&](int64_t row) { return weight(row) == 0; };
  each_row<T>(arguments.student, arguments.teacher, arguments.gradient, begin, end, skip,
              [&](int64_t row, const T* s, const T* t, T* g) {
                double loss = 0;
                if (s) {
                  loss = weight(row) * rkkd_row(arguments, s, t, n, weight(row), g);
                } else if (g) {
                  std::fill(g, g + n, T(0));
                }
                static_cast<T*>(arguments.loss)[row] = static_cast<T>(loss);
              });
}

}  // namespace

void rkkd(const RkkdArguments& arguments, int64_t begin, int64_t end) {
  arguments.wide ? rkkd_rows<double>(arguments, begin, end) : rkkd_rows<float>(arguments, begin, end);
}

}  // namespace luce::LUCE_ISA
