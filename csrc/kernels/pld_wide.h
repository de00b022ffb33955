// A ranked row of any spread, and rows whose tied classes share their places: scalar, in double, each sum with its own
// exponent, as in the Two-Pass Softmax.
#pragma once

#include <cmath>

#include "pld_row.h"

namespace luce::LUCE_ISA {

// mantissa * 2^exponent, for sums of exponentials of any size; 0 has the lowest exponent.
struct Extended {
  double mantissa = 0, exponent = -1e300;

  static double power_of_two(double d) {
    return d < -1000 ? 0 : d > 1000 ? INFINITY : std::ldexp(1.0, static_cast<int>(d));
  }

  static Extended exp(double x) {
    if (x == -INFINITY) return {};
    const double exponent = std::floor(x * 0x1.71547652B82FEp+0);
    if (exponent < -0x1p40) return {1, exponent};  // neighbouring doubles differ by more than a factor of 2 here
    const double reduced = std::fma(exponent, -0x1.62E42FEFA0000p-1, x) - exponent * 0x1.CF79ABC9E3B39p-40;
    return {std::exp(reduced), exponent};
  }

  Extended operator+(Extended other) const {
    if (mantissa == 0) return other;
    if (other.mantissa == 0) return *this;
    const double most = std::fmax(exponent, other.exponent);
    return {mantissa * power_of_two(exponent - most) + other.mantissa * power_of_two(other.exponent - most), most};
  }
  Extended times(double x) const { return x == 0 ? Extended{} : Extended{mantissa * x, exponent}; }
  Extended inverse() const { return {1 / mantissa, -exponent}; }

  // The product as a plain number; it must not be beyond the range of double.
  double operator*(Extended other) const {
    if (mantissa == 0 || other.mantissa == 0) return 0;
    return mantissa * other.mantissa * power_of_two(exponent + other.exponent);
  }
  // log of a quotient
  double log_over(Extended other) const {
    return std::log(mantissa / other.mantissa) + (exponent - other.exponent) * 0x1.62E42FEFA39EFp-1;
  }
};

// Everything in `ranking` is ranked, and the rest is empty. With `share_ties`, classes with the same teacher logit, the
// label apart, are one group (Efron's rule): each of its d members sees half a group, Z = Z_after + E (d + 1) / (2 d).
template <class T>
void pld_wide(const PldRow<T>& row, const Ranking& ranking, bool share_ties, PldResult& result) {
  const int64_t count = ranking.count;
  const uint32_t* order = ranking.order;
  Extended* worth = scratch().get<Extended>(STUDENT, count);
  Extended* suffix = scratch().get<Extended>(TEACHER, count + 1);
  double* alpha = scratch().get<double>(RATIO, count);

  double sum = 0;
  suffix[count] = {};
  for (int64_t k = count - 1; k >= 0; --k) {
    worth[k] = Extended::exp(double(row.s[order[k]]) - double(row.top_s));
    suffix[k] = suffix[k + 1] + worth[k];
    alpha[k] = row.alpha(order[k]);
    sum += alpha[k];
  }
  for (int64_t k = 0; k < count; ++k) alpha[k] = k < ranking.places ? alpha[k] / sum : 0;

  result.loss = 0;
  Extended before;
  for (int64_t k = 0, end; k < count; k = end) {
    end = k + 1;
    const bool first_is_label = k == 0 && row.label >= 0;
    while (share_ties && !first_is_label && end < count && row.t[order[end]] == row.t[order[k]]) ++end;
    const double members = static_cast<double>(end - k);
    if (members == 1) {
      const Extended z = suffix[k], rest = suffix[k + 1], w = worth[k];
      if (alpha[k] > 0) {
        const double odds = w.mantissa > 0 ? rest * w.inverse() : INFINITY;
        result.loss += alpha[k] * (odds < 1 ? std::log1p(odds) : w.mantissa > 0 ? z.log_over(w) : INFINITY);
      }
      const bool nothing = z.mantissa == 0;  // an excluded class with only excluded classes behind it
      const double g = w * before - alpha[k] * (nothing ? 1 : rest * z.inverse());
      if (row.g) row.g[order[k]] = static_cast<T>(g * double(row.scale));
      if (!nothing) before = before + z.inverse().times(alpha[k]);
      continue;
    }
    double group_alpha = 0;
    Extended group_worth;
    for (int64_t i = k; i < end; ++i) {
      group_alpha += alpha[i];
      group_worth = group_worth + worth[i];
    }
    const double half = (members + 1) / (2 * members);
    const Extended z = suffix[end] + group_worth.times(half);
    const bool nothing = z.mantissa == 0;
    const Extended seen = nothing ? before : before + z.inverse().times(group_alpha * half);
    for (int64_t i = k; i < end; ++i) {
      if (alpha[i] > 0) result.loss += alpha[i] * (worth[i].mantissa > 0 ? z.log_over(worth[i]) : INFINITY);
      if (row.g) row.g[order[i]] = static_cast<T>((worth[i] * seen - alpha[i]) * double(row.scale));
    }
    if (!nothing) before = before + z.inverse().times(group_alpha);
  }
}

}  // namespace luce::LUCE_ISA
