// Divergences between the teacher's and the student's distribution, with the gradient towards the student's logits.

#include "../divergence.h"
#include "pair.h"

namespace luce::LUCE_ISA {
namespace {

constexpr double NONE = std::numeric_limits<double>::quiet_NaN();

// p is the teacher's; the gradient is q - p.
template <class T>
double forward_kl(Pair<T>& row, T scale, T* g) {
  Sums<T> value;
  visit_classes(row, [&] { value = {}; }, [&](int64_t i, const Classes<T>& c) {
    value.add(c.term());
    if (flush_due<T>(i)) value.flush();
    if (g) store_at(g, row.size(), i, c.h * scale);
  });
  return row.infinite() ? INFINITY : total(value);
}

// p is the student's; the gradient is p (d - D), where D is the mean of d.
template <class T>
double reverse_kl(Pair<T>& row, T scale, T* g) {
  T* difference = scratch().get<T>(THIRD, row.size());
  Sums<T> value, mean;
  visit_classes(row, [&] { value = mean = {}; }, [&](int64_t i, const Classes<T>& c) {
    const vec_t<T> d = c.p > T(0) ? c.d : fill(T(0));
    value.add(c.term());
    mean.add(row.exponential_p(i) * d);
    mean.flush();  // each time: where a class has nearly all of q, its d and the mean almost cancel in the gradient
    if (flush_due<T>(i)) value.flush();
    store(difference + i, d);
  });
  if (row.infinite()) {
    if (g) std::fill(g, g + row.size(), std::numeric_limits<T>::quiet_NaN());
    return INFINITY;
  }
  const Split<T> middle(total(mean) / row.sum_p());
  for (int64_t i = 0; g && i < row.size(); i += Simd<T>::lanes) {
    store_at(g, row.size(), i, row.p(i) * ((load(difference + i) - middle.high) - middle.low) * scale);
  }
  return total(value);
}

// (1 + u) log(1 + u) - u, and the logarithm; `whole` is 1 + u. Near 0 the difference would cancel: with
// log(1 + u) = u + rest, u itself drops out.
template <class T>
inline vec_t<T> entropy_term(vec_t<T> whole, vec_t<T> u, vec_t<T>& logarithm) {
  vec_t<T> e, f;
  split(whole, e, f);
  const mask_t<T> near = e == T(0);
  const vec_t<T> reduced = near ? u : f, rest = log1p_rest(reduced);
  logarithm = times_ln2(e, reduced + rest);
  return near ? u * u + (T(1) + u) * rest : whole * logarithm - u;
}

// p is the teacher's. With the mixture m = share p + (1 - share) q, u = p/m - 1 and v = q/m - 1, the value is the sum of
// m (share f(u) + (1 - share) f(v)), f(u) = (1 + u) log(1 + u) - u, and the gradient (1 - share) q (b - B), where
// b = log(q/m) and B is its mean.
template <class T>
double jsd(Pair<T>& row, T share, T scale, T* g) {
  const T other = T(1) - share;
  T* logarithms = scratch().get<T>(THIRD, row.size());
  Sums<T> value, mean;
  visit_classes(row, [&] { value = mean = {}; }, [&](int64_t i, const Classes<T>& c) {
    const vec_t<T> m = share * c.p + other * c.q;
    const mask_t<T> counts = m >= std::numeric_limits<T>::min();  // below it 1/m may overflow
    const vec_t<T> over_m = T(1) / (counts ? m : fill(T(1)));
    vec_t<T> a, b;
    const vec_t<T> f = entropy_term<T>(c.p * over_m, -other * c.h * over_m, a);
    const vec_t<T> f_student = entropy_term<T>(c.q * over_m, share * c.h * over_m, b);
    value.add(counts ? m * (share * f + other * f_student) : fill(T(0)));
    mean.add(row.exponential_q(i) * b);
    mean.flush();
    if (flush_due<T>(i)) value.flush();
    store(logarithms + i, b);
  });
  const Split<T> middle(total(mean) / row.sum_q());
  for (int64_t i = 0; g && i < row.size(); i += Simd<T>::lanes) {
    store_at(g, row.size(), i, row.q(i) * ((load(logarithms + i) - middle.high) - middle.low) * (other * scale));
  }
  return total(value);
}

// Half the variance of s - t over the classes that both networks have; the gradient is the deviation from its mean over
// their number. A class that one network alone excludes keeps the divergence above 0 at every T: T^2 of it is infinite.
template <class T>
double limit(const T* s, const T* t, int64_t n, T weight, T* g) {
  constexpr T INF = std::numeric_limits<T>::infinity();
  double sum = 0;
  int64_t of_student = 0, of_teacher = 0, of_both = 0;
  bool spoilt = false;
  // In double, where differences of float32 logits are exact and their squares cannot overflow.
  const auto shared = [=](int64_t i) { return (s[i] != -INF) & (t[i] != -INF); };
  const auto difference = [=](int64_t i) { return shared(i) ? double(s[i]) - double(t[i]) : 0; };
  for (int64_t i = 0; i < n; ++i) {
    sum += difference(i);
    of_student += s[i] != -INF;
    of_teacher += t[i] != -INF;
    of_both += shared(i);
    spoilt |= !(s[i] < INF) | !(t[i] < INF);
  }
  if (spoilt || !of_student || !of_teacher) return NONE;
  const double count = static_cast<double>(std::max<int64_t>(of_both, 1)), mean = sum / count;
  double squares = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double deviation = shared(i) ? difference(i) - mean : 0;
    squares += deviation * deviation;
    if (g) g[i] = static_cast<T>(deviation * (weight / count));
  }
  return of_student + of_teacher > 2 * of_both ? INFINITY : squares / (2 * count);
}

template <class T>
double divergence_row(const DivergenceArguments& arguments, const T* s, const T* t, T* g, T weight) {
  const int64_t n = arguments.student.classes;
  if (arguments.kind == Divergence::limit) return limit(s, t, n, weight, g);
  const bool reverse = arguments.kind == Divergence::reverse_kl;
  Pair<T> row(reverse ? s : t, reverse ? t : s, n, arguments.temperature);
  if constexpr (sizeof(T) == 4) {
    if (row.enormous()) {
      return in_double(s, t, n, g, [&](const double* student, const double* teacher, double* gradient) {
        return divergence_row<double>(arguments, student, teacher, gradient, weight);
      });
    }
  }
  if (!row.normalise()) return NONE;
  const T scale = static_cast<T>(weight / arguments.temperature);
  switch (arguments.kind) {
    case Divergence::forward_kl: return forward_kl(row, scale, g);
    case Divergence::reverse_kl: return reverse_kl(row, scale, g);
    case Divergence::jsd: return jsd(row, static_cast<T>(arguments.share), scale, g);
    case Divergence::limit: break;  // returned above
  }
  return NONE;
}

template <class T>
void divergence_rows(const DivergenceArguments& arguments, int64_t begin, int64_t end) {
  weighted_rows<T>(arguments, begin, end, [&](int64_t, const T* s, const T* t, T* g, T weight) {
    return divergence_row(arguments, s, t, g, weight);
  });
}

}  // namespace

void divergence(const DivergenceArguments& arguments, int64_t begin, int64_t end) {
  if (arguments.wide) {
    divergence_rows<double>(arguments, begin, end);
  } else {
    divergence_rows<float>(arguments, begin, end);
  }
}

}  // namespace luce::LUCE_ISA
