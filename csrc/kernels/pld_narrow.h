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
  uint32_t* order = ranking.order;
  T* worth = scratch().get<T>(STUDENT, steps * L);
  T* alpha = scratch().get<T>(TEACHER, steps * L);
  T* ratio = scratch().get<T>(RATIO, steps * L);

  // Places beyond the last read the first one's class, so that loops need not ask, and are blotted out afterwards.
  for (int64_t k = count; k < steps * L; ++k) order[k] = order[0];
  for (int64_t j = 0; j < steps; ++j) {
    for (int l = 0; l < L; ++l) {
      const uint32_t i = order[l * steps + j];
      worth[j * L + l] = row.s[i];
      alpha[j * L + l] = row.t[i];
    }
  }
  for (int64_t k = count; k < steps * L; ++k) worth[k % steps * L + k / steps] = alpha[k % steps * L + k / steps] = -INF;

  Sums<T> alphas, worths;
  mask_t<T> far = {};
  vec_t<T> places_left;
  for (int l = 0; l < L; ++l) places_left[l] = static_cast<T>(ranking.places - l * steps);
  for (int64_t j = 0; j < steps; ++j) {
    const vec_t<T> a = row.alpha(load(alpha + j * L)), u = load(worth + j * L) - row.top_s, w = exp(u);
    alphas.add(a);
    worths.add(w);
    const vec_t<T> counting = places_left > T(0) ? a : fill(T(0));
    far |= (counting > T(0)) & (u < -Simd<T>::reach);
    store(alpha + j * L, counting);
    store(worth + j * L, w);
    places_left -= T(1);
    if (j % FLUSH == FLUSH - 1) alphas.flush(), worths.flush();
  }
  if (any(far)) return false;
  const double normaliser = 1 / (total(alphas) + ranking.rest_alpha);

  // Z from the last place to the first. A place's class is chosen there with probability w/Z, the others with rest/Z.
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
    const vec_t<T> z = suffix.value(), inverse = T(1) / z, rest = following * inverse;
    following = z;
    const mask_t<T> counts = a > T(0);
    const vec_t<T> r = counts ? a * inverse : fill(T(0));
    losses.add(counts ? a * minus_log(w * inverse, rest) : fill(T(0)));
    ratios.add(r);
    store(ratio + j * L, r);
    store(alpha + j * L, counts ? a * rest : fill(T(0)));
    if (j % FLUSH == 0) suffix.flush(), losses.flush(), ratios.flush();
  }
  result.loss = total(losses) * normaliser;
  ratios.read(lane_sum);
  double so_far = 0;
  for (int l = 0; l < L; ++l) {
    others[l] = so_far;
    so_far += lane_sum[l];
  }
  if (prefix) *prefix = so_far * normaliser;
  if (!row.g) return true;

  // B from the first place to the last.
  Sums<T> before;
  before.write(others);
  const T scale = static_cast<T>(normaliser) * row.scale;
  T first = 0;
  for (int64_t j = 0; j < steps; ++j) {
    T lane[L];
    store(lane, (load(worth + j * L) * before.value() - load(alpha + j * L)) * scale);
    before.add(load(ratio + j * L));
    if (j == 0) first = lane[0];
    for (int l = 0; l < L; ++l) row.g[order[l * steps + j]] = lane[l];
    if (j % FLUSH == FLUSH - 1) before.flush();
  }
  row.g[order[0]] = first;
  return true;
}

}  // namespace luce::LUCE_ISA
