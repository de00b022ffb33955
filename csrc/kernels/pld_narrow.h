// A ranked row whose exponentials fit into the row's own precision: nearly all rows.
#pragma once

#include "pld_row.h"

namespace luce::LUCE_ISA {

// Places are dealt to the lanes in runs: lane l holds places l*steps to (l+1)*steps - 1. A scan over places is then one
// vector operation a step, once each lane knows the sum of the lanes beyond it.
//
// Returns false, with nothing written, if a place that counts lies so far below the row's top that the sum of all that
// follows could lose digits. `prefix`, if given, receives the sum of alpha/Z over all places, for unranked classes.
template <class T>
bool pld_narrow(const PldRow<T>& row, const Ranking& ranking, PldResult& result, double* prefix = nullptr) {
  constexpr int L = Simd<T>::lanes;
  constexpr T INF = std::numeric_limits<T>::infinity();
  const int64_t count = ranking.count, steps = (count + L - 1) / L;
  const int64_t full = count / steps, more = count % steps;  // lanes with a place in every step, and in the first ones
  const uint32_t* order = ranking.order;
  T* worth = scratch().get<T>(STUDENT, steps * L);
  T* alpha = scratch().get<T>(TEACHER, steps * L);
  T* ratio = scratch().get<T>(RATIO, steps * L);

  for (int64_t j = 0; j < steps; ++j) {
    const int64_t taken = full + (j < more);
    T *u = worth + j * L, *v = alpha + j * L;
    for (int64_t l = 0; l < taken; ++l) {
      const uint32_t i = order[l * steps + j];
      u[l] = row.s[i];
      v[l] = row.t[i];
    }
    for (int64_t l = taken; l < L; ++l) u[l] = v[l] = -INF;
  }

  Sums<T> alphas, worths;
  for (int64_t j = 0; j < steps; ++j) {
    const vec_t<T> a = row.alpha(load(alpha + j * L));
    alphas.add(a);
    store(alpha + j * L, a);
  }
  if (ranking.places < count) {
    for (int64_t l = ranking.places / steps; l < L; ++l) {
      for (int64_t j = l == ranking.places / steps ? ranking.places % steps : 0; j < steps; ++j) alpha[j * L + l] = 0;
    }
  }
  mask_t<T> far = {};
  for (int64_t j = 0; j < steps; ++j) {
    const vec_t<T> u = load(worth + j * L) - row.top_s, w = exp(u);
    far |= (load(alpha + j * L) > T(0)) & (u < -Simd<T>::reach);
    worths.add(w);
    store(worth + j * L, w);
  }
  if (any(far)) return false;
  const double normaliser = 1 / (total(alphas) + ranking.rest_alpha);

  // Z from the last place to the first. `p` is the probability that the place's class is chosen there, `q` = 1/Z.
  double lane_sum[L], others[L];
  worths.read(lane_sum);
  double beyond = ranking.rest_worth;
  for (int l = L - 1; l >= 0; --l) {
    others[l] = beyond;
    beyond += lane_sum[l];
  }
  Sums<T> suffix, ratios, losses;
  suffix.write(others);
  vec_t<T> following = suffix.value();
  for (int64_t j = steps - 1; j >= 0; --j) {
    const vec_t<T> w = load(worth + j * L), a = load(alpha + j * L);
    suffix.add(w);
    const vec_t<T> z = suffix.value(), q = T(1) / z, rest = following * q;
    following = z;
    const mask_t<T> counts = a > T(0);
    losses.add(counts ? a * minus_log(w * q, rest) : fill(T(0)));
    const vec_t<T> r = counts ? a * q : fill(T(0));
    ratios.add(r);
    store(ratio + j * L, r);
    store(alpha + j * L, counts ? a * rest : fill(T(0)));
  }
  result.loss = total(losses) * normaliser;
  if (prefix) *prefix = total(ratios) * normaliser;
  if (!row.g) return true;

  // B from the first place to the last.
  ratios.read(lane_sum);
  double so_far = 0;
  for (int l = 0; l < L; ++l) {
    others[l] = so_far;
    so_far += lane_sum[l];
  }
  Sums<T> before;
  before.write(others);
  const T scale = static_cast<T>(normaliser) * row.scale;
  T lane[L];
  for (int64_t j = 0; j < steps; ++j) {
    const vec_t<T> g = load(worth + j * L) * before.value() - load(alpha + j * L);
    before.add(load(ratio + j * L));
    store(lane, g * scale);
    const int64_t taken = full + (j < more);
    for (int64_t l = 0; l < taken; ++l) row.g[order[l * steps + j]] = lane[l];
  }
  return true;
}

}  // namespace luce::LUCE_ISA
