// A long row of which only the first places count, selected without sorting the rest.
#pragma once

#include "order.h"
#include "pld_narrow.h"
#include "pld_row.h"

namespace luce::LUCE_ISA {

// Takes the wanted-th largest maximum of the row's blocks, a value that at least `wanted` classes reach, and gathers the
// classes that reach it by rising index. Returns their number, or -1 if there are more than NETWORK_MAX.
template <class T>
int64_t pld_candidates(const PldRow<T>& row, int64_t wanted, uint32_t* candidates) {
  constexpr int L = Simd<T>::lanes, DEEP = 16, BLOCK = DEEP * L;
  const int64_t blocks = row.n / BLOCK, tail = blocks * BLOCK;
  T* maxima = scratch().get<T>(STUDENT, blocks * L);
  T* ranked = scratch().get<T>(TEACHER, blocks * L);
  for (int64_t b = 0; b < blocks; ++b) {
    vec_t<T> most = load(row.t + b * BLOCK);
    for (int d = 1; d < DEEP; ++d) most = max(most, load(row.t + b * BLOCK + d * L));
    store(maxima + b * L, most);
  }
  std::copy(maxima, maxima + blocks * L, ranked);
  std::nth_element(ranked, ranked + wanted - 1, ranked + blocks * L, [](T a, T b) { return a > b; });
  const T least = ranked[wanted - 1];
  int64_t found = 0;
  const auto take = [&](int64_t i) {
    if (row.t[i] >= least && found <= NETWORK_MAX) candidates[found++] = static_cast<uint32_t>(i);
  };
  for (int64_t b = 0; b < blocks * L; ++b) {
    if (maxima[b] < least) continue;
    for (int d = 0; d < DEEP; ++d) take(b / L * BLOCK + d * L + b % L);
  }
  for (int64_t i = tail; i < row.n; ++i) take(i);
  if (found > NETWORK_MAX) return -1;
  std::sort(candidates, candidates + found);
  return found;
}

// Evaluates `places` places, or as many as leave less than `epsilon` of the teacher's probability. Returns false if
// sorting the whole row is faster.
template <class T>
bool pld_truncated(const PldRow<T>& row, int64_t places, double epsilon, PldResult& result) {
  constexpr int L = Simd<T>::lanes;
  const bool labelled = row.label >= 0;
  if (epsilon > 0 && places > NETWORK_MAX / 2) places = NETWORK_MAX / 2;
  const int64_t wanted = places + 1;  // the label may be among them
  if (wanted > row.n / 32 || wanted > NETWORK_MAX / 2 + 1) return false;
  uint32_t* order = scratch().get<uint32_t>(ORDER, NETWORK_MAX + 1 + L);
  uint32_t* candidates = scratch().get<uint32_t>(CANDIDATES, NETWORK_MAX + 2);
  const int64_t found = pld_candidates(row, wanted, candidates);
  if (found < 0) return false;

  T* values = scratch().get<T>(CANDIDATE_VALUES, found);
  int64_t label_at = -1;
  T lowest = row.top_t;
  for (int64_t i = 0; i < found; ++i) {
    values[i] = row.t[candidates[i]];
    lowest = values[i] < lowest ? values[i] : lowest;
    if (candidates[i] == row.label) label_at = i;
  }
  int64_t count = 0;
  if (labelled) order[count++] = static_cast<uint32_t>(row.label);
  const int64_t others = order_short(values, found, label_at, row.top_t, row.top_t - lowest, row.coarse, order + count);
  for (int64_t i = 0; i < others; ++i) order[count + i] = candidates[order[count + i]];
  count += others;

  // Exponentials of all classes. Those of the ranked ones become 0 before the sum: subtracted from it, they would cancel.
  T* worth = scratch().get<T>(HOMES, row.n + L);
  Sums<T> alphas;
  int64_t i = 0;
  for (; i + L <= row.n; i += L) {
    alphas.add(row.alpha(load(row.t + i)));
    store(worth + i, row.worth(load(row.s + i)));
    if (i / L % FLUSH == FLUSH - 1) alphas.flush();
  }
  if (i < row.n) {
    constexpr T INF = std::numeric_limits<T>::infinity();
    alphas.add(row.alpha(load_some(row.t + i, row.n - i, -INF)));
    store(worth + i, row.worth(load_some(row.s + i, row.n - i, -INF)));
  }
  const double all_alpha = total(alphas);
  if (epsilon > 0) {
    double left = all_alpha;
    int64_t k = 0;
    while (k < std::min(count, places) && !(left < epsilon * all_alpha)) left -= row.alpha(order[k++]);
    if (!(left < epsilon * all_alpha)) return false;
    places = std::max<int64_t>(k, 1);
  }
  count = std::min(count, places);
  double ranked_alpha = 0;
  for (int64_t k = 0; k < count; ++k) {
    worth[order[k]] = 0;
    ranked_alpha += row.alpha(order[k]);
  }
  Sums<T> worths;
  for (i = 0; i < row.n; i += L) {
    worths.add(load(worth + i));
    if (i / L % FLUSH == FLUSH - 1) worths.flush();
  }

  const Ranking ranking{order, count, count, all_alpha - ranked_alpha, total(worths)};
  double prefix = 0;
  if (!pld_narrow(row, ranking, result, &prefix)) return false;
  if (row.g) {
    // The ranked classes have their gradient already, and a worth of 0 here.
    const T factor = static_cast<T>(prefix) * row.scale;
    T* kept = scratch().get<T>(CANDIDATE_VALUES, count);
    for (int64_t k = 0; k < count; ++k) kept[k] = row.g[order[k]];
    for (i = 0; i + L <= row.n; i += L) store(row.g + i, load(worth + i) * factor);
    for (; i < row.n; ++i) row.g[i] = worth[i] * factor;
    for (int64_t k = 0; k < count; ++k) row.g[order[k]] = kept[k];
  }
  return true;
}

}  // namespace luce::LUCE_ISA
