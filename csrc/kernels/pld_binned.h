// A long row in which classes of almost equal teacher logits share a place, within a proven error bound.
//
// Classes, the label apart, are put into bins by falling teacher logit. For a bin with the sums A of alpha and E of w, let
// Z_end be the sum of w behind it and Z_start = Z_end + E. In the true ranking, every Z of its members lies between
// Z_end + min w and Z_start. Giving all d members Efron's Z = Z_end + E (d + 1) / (2 d) instead changes
//
//   the loss by at most                A log(Z_start / (Z_end + min w)),
//   the gradient's L1 norm by at most  A E / (Z_end + min w) + A E / Z_start,
//
// where the first term is the members' own gradient and the second that of all classes behind them. Errors of bins add
// up. As log(x) <= x - 1, the gradient's bound holds for the loss as well. Bins whose errors exceed the tolerance are
// sorted.
#pragma once

#include "order.h"
#include "pld_row.h"

namespace luce::LUCE_ISA {

template <class T>
class PldBins {
 public:
  explicit PldBins(const PldRow<T>& row) : row_(row) {}

  // Returns false if sorting the whole row is faster.
  bool run(double tolerance, PldResult& result) {
    if (!deal() || !choose(tolerance * all_alpha_)) return false;
    rank_chosen();
    result.loss = sum_up() / all_alpha_;
    result.loss_bound = result.gradient_bound = error_ / all_alpha_;
    if (row_.g) write_gradient();
    return true;
  }

 private:
  static constexpr int64_t BINS = 4096, LABEL = BINS, EXCLUDED = BINS + 1, HOMES_OF_CLASSES = BINS + 2;
  static constexpr int L = Simd<T>::lanes;
  static constexpr T INF = std::numeric_limits<T>::infinity();
  typedef double quad __attribute__((vector_size(4 * sizeof(double))));  // float sums would stop growing in a crowded bin
  static constexpr int ALPHA = 0, WORTH = 1, MEMBERS = 2, COST = 3;  // of a bin; a cost is alpha * (top - s)

  // One pass over the classes: exponentials, bins, and the bins' sums.
  bool deal() {
    constexpr int BLOCK = 4 * L;
    const int64_t n = row_.n;
    std::memset(bin_, 0, HOMES_OF_CLASSES * sizeof *bin_);
    const T span = row_.span(), scale = key_scale(BINS, span);
    mask_t<T> far = {};
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
      const int64_t size = std::min<int64_t>(BLOCK, n - begin);
      T s[BLOCK], t[BLOCK], cost[BLOCK];
      std::copy(row_.s + begin, row_.s + begin + size, s);
      std::copy(row_.t + begin, row_.t + begin + size, t);
      std::fill(s + size, s + BLOCK, -INF);
      std::fill(t + size, t + BLOCK, -INF);
      for (int i = 0; i < BLOCK; i += L) {
        const vec_t<T> u = load(s + i) - row_.top_s, v = load(t + i), a = row_.alpha(v);
        const mask_t<T> counts = a > T(0);
        far |= counts & (u < -Simd<T>::reach);
        store(worth_ + begin + i, row_.worth(load(s + i)));
        store(alpha_ + begin + i, a);
        store(cost + i, counts ? -u * a : fill(T(0)));
      }
      for (int i = 0; i < BLOCK; ++i) {
        const T deep = row_.top_t - t[i];
        const auto b = static_cast<int32_t>((deep < span ? deep : span) * scale);
        home_[begin + i] = static_cast<uint16_t>(deep > span ? int32_t(EXCLUDED) : b);
      }
      if (row_.label >= begin && row_.label < begin + size) home_[row_.label] = LABEL;
      for (int64_t i = 0; i < size; ++i) {
        bin_[home_[begin + i]] += quad{alpha_[begin + i], worth_[begin + i], 1, cost[i]};
      }
    }
    if (any(far)) return false;

    const double least = std::exp(double(row_.low_s) - double(row_.top_s));
    double z = bin_[EXCLUDED][WORTH];
    all_alpha_ = bin_[LABEL][ALPHA];
    for (int64_t b = BINS - 1; b >= 0; --b) {
      const double a = bin_[b][ALPHA], e = bin_[b][WORTH];
      behind_[b] = z;
      const double end = z + least, start = z + e;
      bin_error_[b] = bin_[b][MEMBERS] > 1 && a > 0 ? a * (e / end + e / start) : 0;
      error_ += bin_error_[b];
      z += e;
      all_alpha_ += a;
    }
    others_ = z;
    return true;
  }

  // Marks the bins to sort, those with the largest errors, until the others' errors are within `allowed`. Errors are told
  // apart by powers of two only. Returns false if the marked bins hold more than a quarter of the classes.
  bool choose(double allowed) {
    std::memset(chosen_, 0, HOMES_OF_CLASSES);
    if (error_ <= allowed) return true;
    constexpr int POWERS = 64;
    double sums[POWERS] = {};
    const double unit = 1 / allowed;
    const auto power = [=](double x) {  // of two in x / allowed, from 0 to POWERS - 1
      const double relative = x * unit;
      uint64_t bits;
      std::memcpy(&bits, &relative, sizeof bits);
      return std::clamp(static_cast<int>(bits >> 52) - 1023 + POWERS / 2, 0, POWERS - 1);
    };
    for (int64_t b = 0; b < BINS; ++b) {
      if (bin_error_[b] > 0) sums[power(bin_error_[b])] += bin_error_[b];
    }
    int least = 0;
    error_ = 0;
    while (least < POWERS && error_ + sums[least] <= allowed) error_ += sums[least++];
    double members = 0;
    for (int64_t b = 0; b < BINS; ++b) {
      chosen_[b] = bin_error_[b] > 0 && power(bin_error_[b]) >= least;
      members += chosen_[b] ? double(bin_[b][MEMBERS]) : 0;
    }
    any_chosen_ = members > 0;
    return members * 4 <= static_cast<double>(row_.n);
  }

  // The classes of the chosen bins, in order.
  void rank_chosen() {
    if (!any_chosen_) return;
    uint32_t* candidate = scratch().get<uint32_t>(CANDIDATES, row_.n + 1);
    for (int64_t i = 0; i < row_.n; ++i) {
      candidate[ranked_] = static_cast<uint32_t>(i);
      ranked_ += chosen_[home_[i]];
    }
    order_ = scratch().get<uint32_t>(ORDER, ranked_ + 1);
    value_ = scratch().get<T>(CANDIDATE_VALUES, ranked_ + 1);
    for (int64_t i = 0; i < ranked_; ++i) value_[i] = row_.t[candidate[i]];
    order_row(value_, ranked_, int64_t(-1), row_.top_t, row_.span(), row_.coarse, order_);
    for (int64_t i = 0; i < ranked_; ++i) order_[i] = candidate[order_[i]];
  }

  static double minus_log_of_choice(double w, double rest) {
    return rest < w ? std::log1p(rest / w) : std::log(rest / w + 1);
  }

  // From the first place to the last: the loss (times the sum of alpha), what each bin's members have `seen_` of
  // alpha/Z, and the gradients of the label and of the ranked classes.
  double sum_up() {
    double before = 0, loss = 0;
    if (row_.label >= 0 && bin_[LABEL][ALPHA] > 0) {
      const double a = bin_[LABEL][ALPHA], w = bin_[LABEL][WORTH];
      loss += a * minus_log_of_choice(w, others_);
      before = a / (w + others_);
      label_gradient_ = -before * others_;
    }
    int64_t used = 0;
    for (int64_t b = 0, next = 0; b < BINS; ++b) {
      const double a = bin_[b][ALPHA], e = bin_[b][WORTH], d = bin_[b][MEMBERS];
      seen_[b] = static_cast<T>(before);
      if (chosen_[b]) {
        next = rank_bin(b, next, before, loss);
      } else if (a > 0) {
        const bool alone = d == 1;
        const double share = alone ? 1 : (d + 1) / (2 * d), z = behind_[b] + e * share, inverse = 1 / z;
        seen_[b] = static_cast<T>(before + a * share * inverse);
        before += a * inverse;
        // A class alone is chosen with probability w/Z. Of several, log(w) is in their cost, and log(Z) is left.
        term_weight_[used] = static_cast<T>(alone ? a : -a);
        term_choice_[used] = static_cast<T>(alone ? e * inverse : z);
        term_rest_[used++] = static_cast<T>(alone ? behind_[b] * inverse : 1 - z);
        loss += alone ? 0 : double(bin_[b][COST]);
      }
    }
    seen_[EXCLUDED] = static_cast<T>(before);
    for (int64_t i = used; i < used + L; ++i) term_weight_[i] = 0, term_choice_[i] = 1, term_rest_[i] = 0;
    Sums<T> terms;
    for (int64_t i = 0; i < used; i += L) {
      terms.add(load(term_weight_ + i) * minus_log(load(term_choice_ + i), load(term_rest_ + i)));
      terms.flush();
    }
    return loss + total(terms);
  }

  // The classes of a chosen bin one by one; they start at `begin` of the ranked ones. Returns where they end.
  int64_t rank_bin(int64_t bin, int64_t begin, double& before, double& loss) {
    int64_t end = begin;
    while (end < ranked_ && home_[order_[end]] == bin) ++end;
    double* z = scratch().get<double>(SUFFIX, end - begin + 1);
    z[end - begin] = behind_[bin];
    for (int64_t k = end - 1; k >= begin; --k) z[k - begin] = z[k - begin + 1] + double(worth_[order_[k]]);
    for (int64_t k = begin; k < end; ++k) {
      const double a = alpha_[order_[k]], w = worth_[order_[k]], here = z[k - begin], rest = z[k - begin + 1];
      const bool counts = a > 0;
      value_[k] = static_cast<T>(w * before - (counts ? a * rest / here : 0));
      if (counts) {
        loss += a * minus_log_of_choice(w, rest);
        before += a / here;
      }
    }
    return end;
  }

  void write_gradient() {
    const T factor = static_cast<T>(double(row_.scale) / all_alpha_);
    seen_[LABEL] = 0;
    for (int64_t i = 0; i < row_.n; ++i) row_.g[i] = (worth_[i] * seen_[home_[i]] - alpha_[i]) * factor;
    for (int64_t k = 0; k < ranked_; ++k) row_.g[order_[k]] = value_[k] * factor;
    if (row_.label >= 0) row_.g[row_.label] = static_cast<T>(label_gradient_) * factor;
  }

  const PldRow<T>& row_;
  double all_alpha_ = 0, others_ = 0, error_ = 0, label_gradient_ = 0;
  bool any_chosen_ = false;
  int64_t ranked_ = 0;
  uint32_t* order_ = nullptr;
  T* value_ = nullptr;  // of the ranked classes: first the teacher's logits, then the gradients

  // One entry a class
  uint16_t* home_ = scratch().get<uint16_t>(HOMES, row_.n + 4 * L);
  T* worth_ = scratch().get<T>(STUDENT, row_.n + 4 * L);
  T* alpha_ = scratch().get<T>(TEACHER, row_.n + 4 * L);
  // One entry a bin
  quad* bin_ = scratch().get<quad>(BIN_SUMS, HOMES_OF_CLASSES);
  double* behind_ = scratch().get<double>(BIN_RESTS, 2 * BINS);
  double* bin_error_ = behind_ + BINS;
  uint8_t* chosen_ = scratch().get<uint8_t>(BIN_CHOSEN, HOMES_OF_CLASSES);
  T* seen_ = scratch().get<T>(RATIO, 4 * (BINS + L));
  T *term_weight_ = seen_ + BINS + L, *term_choice_ = term_weight_ + BINS + L, *term_rest_ = term_choice_ + BINS + L;
};

}  // namespace luce::LUCE_ISA
