// Two distributions over the same classes: p, the softmax of the first logits over T, and q, of the second ones.
//
// Let d = log p - log q. A sum of p d loses all digits where q is close to p: its terms have both signs and cancel. So
// every term becomes p (d + e^-d - 1) = p d + q - p. The sum is the same, as p and q both add up to 1, but its terms are
// not negative and shrink with d^2.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "span.h"

namespace luce::LUCE_ISA {

// Scratch slots; the windows take 0 to 2.
enum PairSlot { FIRST = 3, SECOND, THIRD, STUDENT_REST, TEACHER_REST, STUDENT_COPY, TEACHER_COPY, GRADIENT_COPY };

// d + e^-d - 1 for |d| <= 1 by its series: the expression itself would cancel near 0.
template <class T>
inline vec_t<T> excess(vec_t<T> d) {
  constexpr double inverse_factorial[] = {
      1.0 / 2,         1.0 / 6,          1.0 / 24,          1.0 / 120,           1.0 / 720,           1.0 / 5040,
      1.0 / 40320,     1.0 / 362880,     1.0 / 3628800,     1.0 / 39916800,      1.0 / 479001600,     1.0 / 6227020800,
      1.0 / 87178291200, 1.0 / 1307674368000, 1.0 / 20922789888000, 1.0 / 355687428096000, 1.0 / 6402373705728000};
  constexpr int LAST = sizeof(T) == 4 ? 8 : 16;
  vec_t<T> sum = fill(T(inverse_factorial[LAST]));
  for (int k = LAST - 1; k >= 0; --k) sum = T(inverse_factorial[k]) - d * sum;
  return sum * (d * d);
}

// A double as two numbers of type T, for normalisers: rounded to one float, they would shift every d alike.
template <class T>
struct Split {
  T high, low;
  explicit Split(double x = 0) : high(static_cast<T>(x)), low(static_cast<T>(x - double(high))) {}
};

template <class T>
class Pair {
 public:
  static constexpr T INF = std::numeric_limits<T>::infinity();

  Pair(const T* first, const T* second, int64_t n, double temperature)
      : a_(first), b_(second), first_(first, n), second_(second, n), n_(n), temperature_(temperature),
        softness_(static_cast<T>(1 / temperature)) {
    vec_t<T> top_a = fill(-INF), top_b = fill(-INF);
    mask_t<T> only_first = {};
    for (int64_t i = 0; i < n; i += Simd<T>::lanes) {
      const vec_t<T> a = first_[i], b = second_[i];
      top_a = max(top_a, a);
      top_b = max(top_b, b);
      only_first |= (b == -INF) & (a > -INF);
    }
    top_a_ = lane_max(top_a), top_b_ = lane_max(top_b);
    second_excludes_ = any(only_first);
  }

  int64_t size() const { return n_; }
  double temperature() const { return temperature_; }

  // Whether differences of the logits may exceed the range of T.
  bool enormous() const { return sizeof(T) == 4 && (top_a_ > T(1e30) || top_b_ > T(1e30)); }

  // Computes the exponentials. Returns false for NaN, for +inf, and where a network excludes every class: each of them
  // makes a sum NaN.
  bool normalise() {
    p_ = scratch().get<T>(FIRST, n_);
    q_ = scratch().get<T>(SECOND, n_);
    Sums<T> sum_a, sum_b;
    for (int64_t i = 0; i < n_; i += Simd<T>::lanes) {
      const vec_t<T> p = exp((first_[i] - top_a_) * softness_), q = exp((second_[i] - top_b_) * softness_);
      sum_a.add(p);
      sum_b.add(q);
      store(p_ + i, p);
      store(q_ + i, q);
      if (flush_due<T>(i)) sum_a.flush(), sum_b.flush();
    }
    z_a_ = total(sum_a), z_b_ = total(sum_b);
    one_over_z_a_ = static_cast<T>(1 / z_a_), one_over_z_b_ = static_cast<T>(1 / z_b_);
    tops_ = double(top_a_) - double(top_b_);
    tops_split_ = Split<T>(tops_);
    set_rest(temperature_ * std::log(z_a_ / z_b_) + lost(top_a_, top_b_));
    return z_a_ == z_a_ && z_b_ == z_b_;
  }

  // log p - log q of a class with these logits: (a - b - tops - rest) / T. The difference of the normalisers is kept as
  // that of the maxima and a rest: the rest is tiny where both networks prefer the same class, and would be rounded away.
  double d(double a, double b) const { return ((a - b - tops_) + (lost(a, b) - rest_)) / temperature_; }

  // What a - b loses to rounding: at 1e18 a double has no digit for a difference of 30.
  static double lost(double a, double b) {
    const double high = a - b, minus_b = high - a;
    return (a - (high - minus_b)) - (b + minus_b);
  }

  // Corrects the normalisers by the surplus of the sum of q over 1.
  void correct(double surplus) { set_rest(rest_ - temperature_ * std::log1p(surplus)); }

  // Logarithms of the normalisers, for logits over T.
  double log_z_first() const { return top_a_ / temperature_ + std::log(z_a_); }
  double log_z_second() const { return log_z_first() - (tops_ + rest_) / temperature_; }

  vec_t<T> p(int64_t i) const { return load(p_ + i) * one_over_z_a_; }
  vec_t<T> q(int64_t i) const { return load(q_ + i) * one_over_z_b_; }
  // Before the division by their sums.
  vec_t<T> exponential_p(int64_t i) const { return load(p_ + i); }
  vec_t<T> exponential_q(int64_t i) const { return load(q_ + i); }
  double sum_p() const { return z_a_; }
  double sum_q() const { return z_b_; }

  // To the last digit, also of large logits: differences are held in two numbers, and the small halves added last.
  vec_t<T> d(int64_t i) const {
    const vec_t<T> lowest = fill(std::numeric_limits<T>::lowest());  // -inf - -inf is no number
    const vec_t<T> a = max(lowest, first_[i]), b = max(lowest, second_[i]);
    const vec_t<T> high = a - b, minus_b = high - a, low = (a - (high - minus_b)) - (b + minus_b);
    return (((high - tops_split_.high) - rest_split_.high) + ((low - tops_split_.low) - rest_split_.low)) * softness_;
  }

  // Whether the second network excludes a class to which the first gives a probability above 0 in T.
  bool infinite() const {
    for (int64_t i = 0; second_excludes_ && i < n_; ++i) {
      if (b_[i] == -INF && static_cast<T>(std::exp((double(a_[i]) - double(top_a_)) / temperature_) / z_a_) > 0) return true;
    }
    return false;
  }

 private:
  void set_rest(double rest) {
    rest_ = rest;
    rest_split_ = Split<T>(rest);
  }

  const T *a_, *b_;
  Span<T> first_, second_;
  int64_t n_;
  double temperature_, z_a_ = 0, z_b_ = 0, tops_ = 0, rest_ = 0;
  T softness_, top_a_, top_b_, one_over_z_a_ = 0, one_over_z_b_ = 0;
  Split<T> tops_split_, rest_split_;
  bool second_excludes_;  // whether the second network excludes a class that the first does not
  T *p_ = nullptr, *q_ = nullptr;
};

// One vector of classes, as the divergences need it.
template <class T>
struct Classes {
  vec_t<T> p, q, d, excess, h;  // h = q - p
  mask_t<T> close;              // where |d| <= 1, and `excess` holds

  Classes(const Pair<T>& row, int64_t i) : p(row.p(i)), q(row.q(i)), d(row.d(i)) {
    close = (d <= T(1)) & (d >= T(-1));
    excess = LUCE_ISA::excess<T>(d);
    h = close ? p * (excess - d) : q - p;
  }
  // p (d + e^-d - 1)
  vec_t<T> term() const { return close ? p * excess : (p > T(0) ? p * d : fill(T(0))) + h; }
};

// Calls start() and then visit(i, classes) for all vectors of a row; repeats both once if the normalisers were not exact
// enough. Where all d are small, the rounding of a sum of exponentials is not: the sum of q - p, which should be 0, shows
// it. Within 8 epsilon of the terms' size it may be rounding alone, and a second visit would gain nothing.
template <class T, class Start, class Visit>
void visit_classes(Pair<T>& row, Start start, Visit visit) {
  for (bool again = false;; again = true) {
    start();
    vec_t<T> surpluses = {}, sizes = {};
    for (int64_t i = 0; i < row.size(); i += Simd<T>::lanes) {
      const Classes<T> c(row, i);
      surpluses += c.h;
      sizes += max(c.h, -c.h);
      visit(i, c);
    }
    const double surplus = lane_sum(surpluses), size = lane_sum(sizes);
    if (again || !(std::fabs(surplus) > 8 * double(std::numeric_limits<T>::epsilon()) * size)) return;
    row.correct(surplus);
  }
}

// Runs row(student, teacher, gradient) on copies in double.
template <class T, class Row>
double in_double(const T* s, const T* t, int64_t n, T* g, Row row) {
  double* student = scratch().get<double>(STUDENT_COPY, n);
  double* teacher = scratch().get<double>(TEACHER_COPY, n);
  double* gradient = g ? scratch().get<double>(GRADIENT_COPY, n) : nullptr;
  std::copy(s, s + n, student);
  std::copy(t, t + n, teacher);
  const double value = row(student, teacher, gradient);
  for (int64_t i = 0; g && i < n; ++i) g[i] = static_cast<T>(gradient[i]);
  return value;
}

}  // namespace luce::LUCE_ISA
