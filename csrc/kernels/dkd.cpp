// Decoupled KD (arXiv 2203.08679): the label against the rest, and the rest among themselves.
//
// The rest is the row without its label; the second part is KL(p || q) of it. The first part compares two numbers, each
// network's log odds of the label against the rest, for which the normalisers of the rest suffice.

#include "../divergence.h"
#include "pair.h"

namespace luce::LUCE_ISA {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double NONE = std::numeric_limits<double>::quiet_NaN();

// log(1 + e^x)
double softplus(double x) { return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x)); }
double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
// d + e^-d - 1 for |d| <= 1
double excess(double d) { return LUCE_ISA::excess<double>(fill(d))[0]; }

// Both networks' log odds of the label, and their difference to the last digit, which the odds would not give.
class Odds {
 public:
  Odds() = default;
  Odds(double teacher, double student, double difference)
      : teacher_(teacher), student_(student), difference_(difference), near_(std::fabs(difference) < 30),
        p_(sigmoid(teacher)), rest_(sigmoid(-teacher)),
        d_(near_ ? std::log1p(rest_ * std::expm1(difference)) : softplus(-student) - softplus(-teacher)) {}

  // KL of (p, 1 - p) and (q, 1 - q); a probability that is 0 in T adds nothing, as in the other divergences.
  template <class T>
  double divergence() const {
    const double d_rest = near_ ? std::log1p(p_ * std::expm1(-difference_)) : softplus(student_) - softplus(teacher_);
    if (std::fabs(difference_) < 0.1) return p_ * excess(d_) + rest_ * excess(d_rest);  // nothing cancels
    return std::max(0.0, (static_cast<T>(p_) > 0 ? p_ * d_ : 0) + (static_cast<T>(rest_) > 0 ? rest_ * d_rest : 0));
  }
  // q - p
  double slope() const {
    if (near_) return p_ * std::expm1(-d_);
    return teacher_ > 0 ? rest_ - sigmoid(-student_) : sigmoid(student_) - p_;
  }

 private:
  double teacher_ = 0, student_ = 0, difference_ = 0;
  bool near_ = true;
  double p_ = 0, rest_ = 0, d_ = 0;  // d = log p - log q
};

template <class T>
bool empty(const T* row, int64_t n) {
  return std::all_of(row, row + n, [](T x) { return x == -Pair<T>::INF; });
}

template <class T>
double dkd_row(const DkdArguments& arguments, const T* s, const T* t, int64_t label, T* g, T weight) {
  const int64_t n = arguments.student.classes;
  if (label < 0 || label >= n) return NONE;
  const double s_label = s[label], t_label = t[label];
  if (!(s_label < INF && t_label < INF) || (s_label == -INF && t_label == -INF)) return NONE;
  const T *s_rest = without(s, n, label, STUDENT_REST), *t_rest = without(t, n, label, TEACHER_REST);

  // A network whose rest is empty borrows the other's, to keep the formulas finite; its odds are infinite.
  const bool no_s = s_rest[label ? 0 : n - 1] == -Pair<T>::INF && empty(s_rest, n);
  const bool no_t = t_rest[label ? 0 : n - 1] == -Pair<T>::INF && empty(t_rest, n);
  if ((no_s && s_label == -INF) || (no_t && t_label == -INF)) return NONE;
  if (no_s && no_t) {
    if (g) std::fill(g, g + n, T(0));
    return 0;
  }
  const double temperature = arguments.temperature;
  Pair<T> rest(no_t ? s_rest : t_rest, no_s ? t_rest : s_rest, n, temperature);
  if constexpr (sizeof(T) == 4) {
    if (rest.enormous()) {
      return in_double(s, t, n, g, [&](const double* student, const double* teacher, double* gradient) {
        return dkd_row<double>(arguments, student, teacher, label, gradient, weight);
      });
    }
  }
  if (!rest.normalise()) return NONE;

  const double scale = double(weight) / temperature;
  Odds odds;
  T of_label = 0;
  const T of_rest = static_cast<T>(arguments.beta * scale);
  Sums<T> among_rest;
  const auto start = [&] {
    odds = Odds(no_t ? INF : t_label / temperature - rest.log_z_first(),
                no_s ? INF : s_label / temperature - rest.log_z_second(),
                no_s ? -INF : no_t ? INF : rest.d(t_label, s_label));
    of_label = static_cast<T>(arguments.alpha * odds.slope() * scale);
    among_rest = {};
  };
  visit_classes(rest, start, [&](int64_t i, const Classes<T>& c) {
    among_rest.add(c.term());
    if (flush_due<T>(i)) among_rest.flush();
    if (g) store_at(g, n, i, c.h * of_rest - c.q * of_label);
  });
  if (g) g[label] = of_label;
  double value = 0;
  if (arguments.alpha != 0) value += arguments.alpha * odds.divergence<T>();
  if (arguments.beta != 0) value += arguments.beta * (no_s || rest.infinite() ? INF : total(among_rest));
  return value;
}

template <class T>
void dkd_rows(const DkdArguments& arguments, int64_t begin, int64_t end) {
  weighted_rows<T>(arguments, begin, end, [&](int64_t index, const T* s, const T* t, T* g, T weight) {
    return dkd_row(arguments, s, t, arguments.target[index], g, weight);
  });
}

}  // namespace

void dkd(const DkdArguments& arguments, int64_t begin, int64_t end) {
  if (arguments.wide) {
    dkd_rows<double>(arguments, begin, end);
  } else {
    dkd_rows<float>(arguments, begin, end);
  }
}

}  // namespace luce::LUCE_ISA
