// A row as vectors, and the loop over the rows of an operator that gives each row one value and one gradient.
#pragma once

#include <algorithm>
#include <limits>

#include "rows.h"
#include "vec.h"

namespace luce::LUCE_ISA {

// Reads a row as vectors, the last one filled up with -inf: a class that does not exist changes no sum.
template <class T>
class Span {
 public:
  Span(const T* row, int64_t n) : row_(row), whole_(n - n % Simd<T>::lanes) {
    std::fill(tail_, tail_ + Simd<T>::lanes, -std::numeric_limits<T>::infinity());
    std::copy(row + whole_, row + n, tail_);
  }
  vec_t<T> operator[](int64_t i) const { return load(i < whole_ ? row_ + i : tail_); }

 private:
  const T* row_;
  int64_t whole_;
  T tail_[Simd<T>::lanes];
};

// Whether sums are due to be flushed after the vector at `i`.
template <class T>
inline bool flush_due(int64_t i) {
  return i / Simd<T>::lanes % FLUSH == FLUSH - 1;
}

template <class T>
inline void store_at(T* row, int64_t n, int64_t i, vec_t<T> v) {
  if (i + Simd<T>::lanes <= n) {
    store(row + i, v);
  } else {
    store_some(row + i, v, n - i);
  }
}

// A copy of a row in which one class does not exist.
template <class T>
inline const T* without(const T* row, int64_t n, int64_t index, int slot) {
  T* copy = scratch().get<T>(slot, n);
  std::copy(row, row + n, copy);
  copy[index] = -std::numeric_limits<T>::infinity();
  return copy;
}

// Calls row(index, student, teacher, gradient, weight) for the rows of a weight other than 0. It returns the value and
// writes the gradient times the weight, unless `gradient` is null or the value NaN.
template <class T, class Arguments, class Row>
void weighted_rows(const Arguments& arguments, int64_t begin, int64_t end, Row row) {
  const int64_t n = arguments.student.classes;
  const auto weight = [&](int64_t index) {
    return arguments.weight ? static_cast<const T*>(arguments.weight)[index] : T(1);
  };
  const auto skip = [&](int64_t index) { return weight(index) == 0; };
  each_row<T>(arguments.student, arguments.teacher, arguments.gradient, begin, end, skip,
              [&](int64_t index, const T* s, const T* t, T* g) {
                const double value = s ? row(index, s, t, g, weight(index)) * double(weight(index)) : 0;
                static_cast<T*>(arguments.loss)[index] = static_cast<T>(value);
                if (g && !s) std::fill(g, g + n, T(0));
                if (g && value != value) std::fill(g, g + n, std::numeric_limits<T>::quiet_NaN());
              });
}

}  // namespace luce::LUCE_ISA
