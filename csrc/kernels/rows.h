// Rows in the kernels' own precision, whatever the tensors' types and strides.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "../tensor.h"
#include "vec.h"

namespace luce::LUCE_ISA {

// Memory that a thread keeps from row to row, by slot. It grows and is freed with the thread.
class Scratch {
 public:
  static constexpr int SLOTS = 24;

  template <class U>
  U* get(int slot, int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(U) + 64;
    if (bytes > size_[slot]) {
      release(slot);
      data_[slot] = ::operator new(bytes, std::align_val_t(64));
      size_[slot] = bytes;
    }
    return static_cast<U*>(data_[slot]);
  }

  ~Scratch() {
    for (int slot = 0; slot < SLOTS; ++slot) release(slot);
  }

 private:
  void release(int slot) {
    if (data_[slot]) ::operator delete(data_[slot], std::align_val_t(64));
    data_[slot] = nullptr;
    size_[slot] = 0;
  }

  void* data_[SLOTS] = {};
  size_t size_[SLOTS] = {};
};

inline Scratch& scratch() {
  static thread_local Scratch memory;
  return memory;
}

inline float widen_bfloat16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

inline uint16_t narrow_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return static_cast<uint16_t>(x != x ? 0x7FC0 : rounded);
}

inline float widen_float16(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  // Let the multiplication normalise what is subnormal; infinity and NaN need their exponent put back.
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFF) << 13;
  float y;
  std::memcpy(&y, &magnitude, 4);
  y *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &y, 4);
  if ((h & 0x7C00) == 0x7C00) bits = magnitude | 0x7F800000;
  bits |= static_cast<uint32_t>(h & 0x8000) << 16;
  std::memcpy(&y, &bits, 4);
  return y;
#endif
}

inline uint16_t narrow_float16(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7FFFFFFF;
  if (bits > 0x7F800000) return sign | 0x7E00;
  if (bits >= 0x477FF000) return sign | 0x7C00;  // rounds to more than the largest
  if (bits < 0x38800000) {                        // subnormal: the addition rounds at the right place
    float y;
    std::memcpy(&y, &bits, 4);
    y += 0.5f;
    std::memcpy(&bits, &y, 4);
    return sign | static_cast<uint16_t>(bits - 0x3F000000);
  }
  bits += 0xC8000FFF + ((bits >> 13) & 1);
  return sign | static_cast<uint16_t>(bits >> 13);
#endif
}

template <class T>
inline void widen(const void* from, Type type, int64_t offset, int64_t stride, int64_t count, T* to) {
  const auto copy = [=](const auto* x, auto convert) {
    x += offset;
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(convert(x[i]));
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(convert(x[i * stride]));
    }
  };
  const auto same = [](auto x) { return x; };
  switch (type) {
    case Type::float32: return copy(static_cast<const float*>(from), same);
    case Type::float64: return copy(static_cast<const double*>(from), same);
    case Type::bfloat16: return copy(static_cast<const uint16_t*>(from), widen_bfloat16);
    case Type::float16: {
#if defined(__F16C__)
      if (stride == 1 && sizeof(T) == 4) {
        const uint16_t* x = static_cast<const uint16_t*>(from) + offset;
        int64_t i = 0;
        for (; i + 8 <= count; i += 8) {
          const __m256 y = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
          std::memcpy(to + i, &y, sizeof y);
        }
        for (; i < count; ++i) to[i] = static_cast<T>(widen_float16(x[i]));
        return;
      }
#endif
      return copy(static_cast<const uint16_t*>(from), widen_float16);
    }
    case Type::int64: return copy(static_cast<const int64_t*>(from), same);
    case Type::int32: return copy(static_cast<const int32_t*>(from), same);
  }
}

template <class T>
inline void narrow(const T* from, int64_t count, void* to, Type type, int64_t offset, int64_t stride) {
  const auto copy = [=](auto* y, auto convert) {
    y += offset;
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) y[i] = convert(from[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) y[i * stride] = convert(from[i]);
    }
  };
  switch (type) {
    case Type::float32: return copy(static_cast<float*>(to), [](T x) { return static_cast<float>(x); });
    case Type::float64: return copy(static_cast<double*>(to), [](T x) { return static_cast<double>(x); });
    case Type::bfloat16:
      return copy(static_cast<uint16_t*>(to), [](T x) { return narrow_bfloat16(static_cast<float>(x)); });
    case Type::float16: {
#if defined(__F16C__)
      if (stride == 1 && sizeof(T) == 4) {
        uint16_t* y = static_cast<uint16_t*>(to) + offset;
        int64_t i = 0;
        for (; i + 8 <= count; i += 8) {
          __m256 x;
          std::memcpy(&x, from + i, sizeof x);
          _mm_storeu_si128(reinterpret_cast<__m128i*>(y + i), _mm256_cvtps_ph(x, 0));
        }
        for (; i < count; ++i) y[i] = narrow_float16(static_cast<float>(from[i]));
        return;
      }
#endif
      return copy(static_cast<uint16_t*>(to), [](T x) { return narrow_float16(static_cast<float>(x)); });
    }
    default: return;  // results are never integers
  }
}

template <class T>
constexpr Type type_of() {
  return sizeof(T) == 4 ? Type::float32 : Type::float64;
}

// Rows whose classes lie apart (an image's pixels) are read and written this many at a time, so that a cache
// line is fetched once for all of them.
constexpr int64_t TILE = 16;

// A window of rows of one tensor, each as `classes` consecutive numbers of type T.
//
// Where the tensor already looks like that, `row` points into it; else into scratch memory, from `load` and to `store`.
template <class T>
class Window {
 public:
  // Of up to `most` rows at once.
  Window(const Rows& rows, int slot, int64_t most)
      : rows_(rows), direct_(rows && rows.class_stride == 1 && rows.type == type_of<T>()) {
    if (rows && !direct_) buffer_ = scratch().get<T>(slot, most * rows.classes);
  }

  T* row(int64_t r) const {
    if (!rows_) return nullptr;
    return direct_ ? static_cast<T*>(rows_.data) + rows_.offset(r) : buffer_ + (r - first_) * rows_.classes;
  }

  void load(int64_t first, int64_t count) {
    first_ = first;
    if (!rows_ || direct_) return;
    if (count == 1) return widen(rows_.data, rows_.type, rows_.offset(first), rows_.class_stride, rows_.classes, buffer_);
    T column[TILE];
    for (int64_t c = 0; c < rows_.classes; ++c) {
      widen(rows_.data, rows_.type, rows_.offset(first) + c * rows_.class_stride, rows_.inner_stride, count, column);
      for (int64_t r = 0; r < count; ++r) buffer_[r * rows_.classes + c] = column[r];
    }
  }

  void place(int64_t first) { first_ = first; }

  void store(int64_t count) const {
    if (!rows_ || direct_) return;
    if (count == 1) return narrow(buffer_, rows_.classes, rows_.data, rows_.type, rows_.offset(first_), rows_.class_stride);
    T column[TILE];
    for (int64_t c = 0; c < rows_.classes; ++c) {
      for (int64_t r = 0; r < count; ++r) column[r] = buffer_[r * rows_.classes + c];
      narrow(column, count, rows_.data, rows_.type, rows_.offset(first_) + c * rows_.class_stride, rows_.inner_stride);
    }
  }

 private:
  Rows rows_;
  bool direct_;
  T* buffer_ = nullptr;
  int64_t first_ = 0;
};

// How many rows from `row` on are handled together: neighbours of one image, if classes lie apart in any tensor.
inline int64_t tile_at(int64_t row, int64_t end, int64_t inner, bool apart) {
  return apart ? std::min({TILE, end - row, inner - row % inner}) : 1;
}

// Calls body(row, student, teacher, gradient) for the rows from `begin` to `end`. `gradient` may be absent (null), and
// rows for which skip(row) holds are handed over with null inputs, unread.
template <class T, class Skip, class Body>
void each_row(const Rows& student, const Rows& teacher, const Rows& gradient, int64_t begin, int64_t end, Skip skip,
              Body body) {
  const bool apart = student.class_stride != 1 || (teacher && teacher.class_stride != 1) ||
                     (gradient && gradient.class_stride != 1);
  const int64_t most = apart ? TILE : 1;
  Window<T> s(student, 0, most), t(teacher, 1, most), g(gradient, 2, most);
  for (int64_t row = begin; row < end;) {
    const int64_t count = tile_at(row, end, student.inner, apart);
    bool all_skipped = true;
    for (int64_t r = row; r < row + count; ++r) all_skipped &= skip(r);
    if (!all_skipped) {
      s.load(row, count);
      t.load(row, count);
    }
    g.place(row);
    for (int64_t r = row; r < row + count; ++r) {
      if (skip(r)) {
        body(r, static_cast<const T*>(nullptr), static_cast<const T*>(nullptr), g.row(r));
      } else {
        body(r, static_cast<const T*>(s.row(r)), static_cast<const T*>(t.row(r)), g.row(r));
      }
    }
    g.store(count);
    row += count;
  }
}

}  // namespace luce::LUCE_ISA
