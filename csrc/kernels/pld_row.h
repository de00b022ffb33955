// One row of a Plackett-Luce loss, as all ways of computing it need it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "rows.h"
#include "vec.h"

namespace luce::LUCE_ISA {

// Scratch slots of the ways; the windows take 0 to 2 and sorting takes 3 to 11.
enum PldSlot {
  ORDER = 12, STUDENT, TEACHER, RATIO, SUFFIX, CANDIDATES, CANDIDATE_VALUES, HOMES, BIN_SUMS, BIN_RESTS, BIN_CHOSEN
};

struct PldResult {
  double loss = 0, loss_bound = 0, gradient_bound = 0;
};

template <class T>
struct PldRow {
  const T *s, *t;  // the student's and the teacher's logits
  int64_t n;
  int64_t label;  // -1 where there is none
  T softness;     // 1 / temperature of the teacher
  T* g;           // receives the gradient; may be null
  T scale;        // what the gradient is multiplied by
  bool coarse;    // the teacher's logits were 16-bit floats

  T top_s = 0, top_t = 0;  // largest logits
  T low_s = 0, low_t = 0;  // smallest of the classes that the teacher does not exclude
  bool defined = false;    // false for NaN, for +inf, and where a network excludes every class

  // How far below the top teacher logits have a weight above 0; the order of the others does not matter.
  T span() const {
    const T range = top_t - low_t, all = -Simd<T>::exp_min / softness;
    return range < all ? range : all;
  }

  vec_t<T> alpha(vec_t<T> teacher) const { return exp((teacher - top_t) * softness); }
  double alpha(int64_t i) const {
    const double x = (double(t[i]) - double(top_t)) * double(softness);
    return x < Simd<T>::exp_min ? 0 : std::exp(x);
  }
  // e^(s - top) with the rounding of the difference put back: far below the top it costs several units in the last place.
  vec_t<T> worth(vec_t<T> student) const {
    const vec_t<T> u = student - top_s, shift = u - student, w = exp(u);
    const vec_t<T> lost = (student - (u - shift)) - (top_s + shift);
    return w > T(0) ? w + w * lost : w;
  }

  void describe() {
    constexpr T INF = std::numeric_limits<T>::infinity();
    constexpr int L = Simd<T>::lanes;
    vec_t<T> ts = fill(-INF), tt = fill(-INF), ls = fill(INF), lt = fill(INF);
    mask_t<T> nan = {};
    const auto look = [&](vec_t<T> u, vec_t<T> v) {
      ts = max(ts, u);
      tt = max(tt, v);
      const mask_t<T> possible = v > -INF;
      lt = min(lt, possible ? v : fill(INF));
      ls = min(ls, possible ? u : fill(INF));
      nan |= (u != u) | (v != v);
    };
    int64_t i = 0;
    for (; i + L <= n; i += L) look(load(s + i), load(t + i));
    if (i < n) look(load_some(s + i, n - i, -INF), load_some(t + i, n - i, -INF));
    top_s = lane_max(ts), top_t = lane_max(tt), low_s = lane_min(ls), low_t = lane_min(lt);
    const bool label_exists =
        label == -1 || (label >= 0 && label < n && !(s[label] == -INF && t[label] == -INF));
    defined = !any(nan) && top_s < INF && top_s > -INF && top_t < INF && top_t > -INF && label_exists;
  }
};

// A row's first places, in order, and the sums over all other classes.
struct Ranking {
  uint32_t* order;    // with room for another vector of places
  int64_t count;      // classes in `order`
  int64_t places;     // of which so many have a term in the loss
  double rest_alpha;  // sums over all other classes, relative to the tops
  double rest_worth;
};

}  // namespace luce::LUCE_ISA
