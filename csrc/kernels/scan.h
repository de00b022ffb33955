// Running sums over a row, kept in double: inside a vector by shifting it onto itself, from vector to vector by a carry.
#pragma once

#include <limits>
#include <utility>

#include "vec.h"

namespace luce::LUCE_ISA {

// Which way a running sum goes: a prefix sum moves up the row, a suffix sum down.
enum Way { DOWN = -1, UP = 1 };

// Each lane from BY lanes below it (above it, if negative), `rest` where there is none.
template <int BY, class V, int... l>
inline V shift_lanes(V v, V rest, std::integer_sequence<int, l...>) {
  constexpr int BOTH = 2 * sizeof...(l);
  return __builtin_shufflevector(v, rest, ((l - BY + BOTH) % BOTH)...);
}

template <int BY, class T>
inline vec_t<T> shift(vec_t<T> v, T rest) {
  return shift_lanes<BY>(v, fill(rest), std::make_integer_sequence<int, Simd<T>::lanes>());
}

template <Way WAY, class T>
inline T last_of(vec_t<T> v) {
  return v[WAY == UP ? Simd<T>::lanes - 1 : 0];
}

template <Way WAY, class T, int DISTANCE = 1>
inline vec_t<T> scan(vec_t<T> v) {
  if constexpr (DISTANCE < Simd<T>::lanes) {
    return scan<WAY, T, 2 * DISTANCE>(v + shift<WAY * DISTANCE, T>(v, T(0)));
  } else {
    return v;
  }
}

template <Way WAY>
class RunningSum {
 public:
  vec_t<double> add(vec_t<double> v) {
    const vec_t<double> sum = scan<WAY, double>(v), all = carry_ + sum;
    carry_ += last_of<WAY, double>(sum);
    return all;
  }

  vec_t<float> add(vec_t<float> v) {
    half_t half[2];
    std::memcpy(half, &v, sizeof v);
    constexpr int first = WAY == UP ? 0 : 1;
    for (int i : {first, 1 - first}) {
      half[i] = __builtin_convertvector(add(__builtin_convertvector(half[i], vec_t<double>)), half_t);
    }
    std::memcpy(&v, half, sizeof v);
    return v;
  }

 private:
  typedef float half_t __attribute__((vector_size(VECTOR_BYTES / 2)));
  vec_t<double> carry_ = {};
};

// mantissa * e^scale, for sums beyond the range of double. The scale is one of the row's own logits, any finite number.
struct Scaled {
  vec_t<double> mantissa, scale;

  static constexpr double NOTHING = -std::numeric_limits<double>::max();  // the scale of 0

  Scaled operator+(const Scaled& other) const {
    const vec_t<double> d = scale - other.scale;
    const mask_t<double> more = d > 0.0;
    const vec_t<double> shrink = exp(more ? -d : d);
    return {more ? mantissa + other.mantissa * shrink : mantissa * shrink + other.mantissa, more ? scale : other.scale};
  }
};

template <Way WAY, int DISTANCE = 1>
inline Scaled scan(Scaled v) {
  if constexpr (DISTANCE < Simd<double>::lanes) {
    constexpr int by = WAY * DISTANCE;
    return scan<WAY, 2 * DISTANCE>(v + Scaled{shift<by, double>(v.mantissa, 0.0), shift<by, double>(v.scale, Scaled::NOTHING)});
  } else {
    return v;
  }
}

template <Way WAY>
class RunningScaledSum {
 public:
  Scaled add(Scaled v) {
    const Scaled all = carry_ + scan<WAY>(v);
    carry_ = {fill(last_of<WAY, double>(all.mantissa)), fill(last_of<WAY, double>(all.scale))};
    return all;
  }

 private:
  Scaled carry_{fill(0.0), fill(Scaled::NOTHING)};
};

}  // namespace luce::LUCE_ISA
