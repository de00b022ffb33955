// A ranked row whose exponentials fit into the row's own precision: nearly all rows.
#pragma once

#include "pld_row.h"
#include "scan.h"

namespace luce::LUCE_ISA {

// Returns false, with nothing written, if a place that counts lies so far below the row's top that the sum over the places
// behind it could lose digits. `prefix`, if given, receives the sum of alpha/Z over all places, for unranked classes.
//
// Sums run in the row's own precision within a vector of places, and in double from vector to vector: their errors would
// grow with the length of the row.
template <class T>
bool pld_narrow(const PldRow<T>& row, const Ranking& ranking, PldResult& result, double* prefix = nullptr) {
  constexpr int L = Simd<T>::lanes;
  constexpr T INF = std::numeric_limits<T>::infinity();
  const int64_t count = ranking.count, padded = (count + L - 1) / L * L;
  uint32_t* order = ranking.order;
  T* worth = scratch().get<T>(STUDENT, padded);
  T* alpha = scratch().get<T>(TEACHER, padded);
  T* ratio = scratch().get<T>(RATIO, padded);

  for (int64_t k = 0; k < count; ++k) {
    worth[k] = row.s[order[k]];
    alpha[k] = row.t[order[k]];
  }
  for (int64_t k = count; k < padded; ++k) worth[k] = alpha[k] = -INF;

  Sums<T> alphas;
  mask_t<T> far = {};
  for (int64_t k = 0; k < padded; k += L) {
    const vec_t<T> a = row.alpha(load(alpha + k)), s = load(worth + k), u = s - row.top_s;
    alphas.add(a);
    const vec_t<T> counting = lane_numbers<T>() < static_cast<T>(ranking.places - k) ? a : fill(T(0));
    far |= (counting > T(0)) & (u < -Simd<T>::reach);
    store(alpha + k, counting);
    store(worth + k, row.worth(s));
    if (k / L % FLUSH == FLUSH - 1) alphas.flush();
  }
  if (any(far)) return false;
  const double normaliser = 1 / (total(alphas) + ranking.rest_alpha);

  // Z from the last place to the first. The class of a place is chosen with probability w/Z, those behind it with rest/Z.
  Sums<T> losses;
  double behind = ranking.rest_worth;
  for (int64_t k = padded - L; k >= 0; k -= L) {
    const vec_t<T> w = load(worth + k), a = load(alpha + k), sum = scan<DOWN, T>(w), carry = fill(static_cast<T>(behind));
    const vec_t<T> inverse = T(1) / (carry + sum), rest = (carry + shift<DOWN, T>(sum, T(0))) * inverse;
    const mask_t<T> counts = a > T(0);
    losses.add(counts ? a * minus_log(w * inverse, rest) : fill(T(0)));
    store(ratio + k, counts ? a * inverse : fill(T(0)));
    store(alpha + k, counts ? a * rest : fill(T(0)));
    behind += double(last_of<DOWN, T>(sum));
    if (k / L % FLUSH == 0) losses.flush();
  }
  result.loss = total(losses) * normaliser;
  if (!row.g && !prefix) return true;

  // B from the first place to the last.
  const T scale = static_cast<T>(normaliser) * row.scale;
  double before = 0;
  for (int64_t k = 0; k < padded; k += L) {
    const vec_t<T> sum = scan<UP, T>(load(ratio + k)), seen = fill(static_cast<T>(before)) + shift<UP, T>(sum, T(0));
    store(worth + k, (load(worth + k) * seen - load(alpha + k)) * scale);
    before += double(last_of<UP, T>(sum));
  }
  if (prefix) *prefix = before * normaliser;
  if (!row.g) return true;
  for (int64_t k = 0; k < count; ++k) row.g[order[k]] = worth[k];
  return true;
}

}  // namespace luce::LUCE_ISA
