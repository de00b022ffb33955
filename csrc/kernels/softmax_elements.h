// Rows of any floating type, two vectors at a time: loaded as float or double, stored rounded.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "rows.h"
#include "vec.h"

namespace luce::LUCE_ISA {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
struct Pair {
  vec_t<T> a, b;
};

#if defined(__AVX512F__)
// GCC sees no maximum in a > b ? a : b where one of them is constant, and compares and selects. This is the same.
inline vec_t<float> max(vec_t<float> a, vec_t<float> b) { return (vec_t<float>)_mm512_max_ps((__m512)a, (__m512)b); }
inline vec_t<double> max(vec_t<double> a, vec_t<double> b) {
  return (vec_t<double>)_mm512_max_pd((__m512d)a, (__m512d)b);
}
#endif

// Past the caches: a row that is too long for them is not read into them just to be overwritten. There is no way to
// say this in the language (Clang's __builtin_nontemporal_store is unknown to GCC), hence intrinsics. `to` is aligned.
template <class V>
inline void store_past_caches(void* to, V v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(static_cast<float*>(to), (__m512)v);
#elif defined(__AVX__)
  _mm256_stream_ps(static_cast<float*>(to), (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps(static_cast<float*>(to), (__m128)v);
#else
  std::memcpy(to, &v, sizeof v);
#endif
}

// Stores past the caches are seen by other threads only after this.
inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <bool PAST_CACHES, class V>
inline void put(void* to, V v) {
  if constexpr (PAST_CACHES) {
    store_past_caches(to, v);
  } else {
    std::memcpy(to, &v, sizeof v);
  }
}

// Element<S>: `Wide`, what S is calculated in; a `UNIT` of elements fills a pair; `position` is each lane's place in it.
template <class S>
struct Element {
  using Wide = S;
  static constexpr int UNIT = 2 * Simd<S>::lanes;
  static constexpr bool is_wide = true;

  static Pair<S> load(const S* p) { return {luce::LUCE_ISA::load(p), luce::LUCE_ISA::load(p + UNIT / 2)}; }
  template <bool PAST_CACHES = false>
  static void store(S* p, Pair<S> v) {
    put<PAST_CACHES>(p, v.a);
    put<PAST_CACHES>(p + UNIT / 2, v.b);
  }
  static constexpr int position(int lane) { return lane; }
  static S minus_infinity() { return -std::numeric_limits<S>::infinity(); }
};

// As 32-bit integers, of which the even elements are the lower halves: no conversion, only shifts.
template <>
struct Element<Bfloat16> {
  using Wide = float;
  static constexpr int UNIT = 2 * Simd<float>::lanes;
  static constexpr bool is_wide = false;
  typedef uint32_t bits_t __attribute__((vector_size(VECTOR_BYTES)));

  static Pair<float> load(const Bfloat16* p) {
    bits_t raw;
    std::memcpy(&raw, p, sizeof raw);
    return {(vec_t<float>)(raw << 16), (vec_t<float>)(raw & 0xFFFF0000)};
  }
  // NaN stays NaN: those of here have no lowest bits from which a carry could run over.
  template <bool PAST_CACHES = false>
  static void store(Bfloat16* p, Pair<float> v) {
    put<PAST_CACHES>(p, (rounded(v.a) >> 16) | (rounded(v.b) & 0xFFFF0000));
  }
  static constexpr int position(int lane) { return lane < UNIT / 2 ? 2 * lane : 2 * (lane - UNIT / 2) + 1; }
  static Bfloat16 minus_infinity() { return {0xFF80}; }

 private:
  static bits_t rounded(vec_t<float> v) {
    const bits_t bits = (bits_t)v;
    return bits + 0x7FFF + ((bits >> 16) & 1);  // to nearest, ties to even
  }
};

template <>
struct Element<Float16> {
  using Wide = float;
  static constexpr int UNIT = 2 * Simd<float>::lanes;
  static constexpr bool is_wide = false;

  static Pair<float> load(const Float16* p) { return {widened(p), widened(p + UNIT / 2)}; }
  template <bool PAST_CACHES = false>
  static void store(Float16* p, Pair<float> v) {
    alignas(VECTOR_BYTES) Float16 both[UNIT];
    narrowed(both, v.a);
    narrowed(both + UNIT / 2, v.b);
    vec_t<float> bits;
    std::memcpy(&bits, both, sizeof bits);
    put<PAST_CACHES>(p, bits);
  }
  static constexpr int position(int lane) { return lane; }
  static Float16 minus_infinity() { return {0xFC00}; }

 private:
  static vec_t<float> widened(const Float16* p) {
#if defined(__AVX512F__)
    __m256i half;
    std::memcpy(&half, p, sizeof half);
    return (vec_t<float>)_mm512_cvtph_ps(half);
#elif defined(__F16C__)
    __m128i half;
    std::memcpy(&half, p, sizeof half);
    return (vec_t<float>)_mm256_cvtph_ps(half);
#else
    float lane[UNIT / 2];
    for (int l = 0; l < UNIT / 2; ++l) lane[l] = widen_float16(p[l].bits);
    return luce::LUCE_ISA::load(lane);
#endif
  }
  static void narrowed(Float16* p, vec_t<float> v) {
#if defined(__AVX512F__)
    const __m256i half = _mm512_cvtps_ph((__m512)v, 0);
    std::memcpy(p, &half, sizeof half);
#elif defined(__F16C__)
    const __m128i half = _mm256_cvtps_ph((__m256)v, 0);
    std::memcpy(p, &half, sizeof half);
#else
    for (int l = 0; l < UNIT / 2; ++l) p[l].bits = narrow_float16(v[l]);
#endif
  }
};

// `instead` in the lanes that hold the first `count` elements of a unit.
template <class S, class W = typename Element<S>::Wide>
inline Pair<W> without_first(int64_t count, Pair<W> v, Pair<W> instead) {
  struct Positions {
    W lane[Element<S>::UNIT];
    constexpr Positions() : lane() {
      for (int l = 0; l < Element<S>::UNIT; ++l) lane[l] = static_cast<W>(Element<S>::position(l));
    }
  };
  static constexpr Positions position;
  const W first = static_cast<W>(count);
  const W* lane = position.lane;
  return {load(lane) < first ? instead.a : v.a, load(lane + Element<S>::UNIT / 2) < first ? instead.b : v.b};
}

// The last elements of a row that do not fill a unit, -infinity before or behind them.
template <class S>
class Tail {
 public:
  Tail(const S* x, int64_t n) {
    using W = typename Element<S>::Wide;
    constexpr int64_t UNIT = Element<S>::UNIT;
    if (n < UNIT) {
      std::fill(unit_, unit_ + UNIT, Element<S>::minus_infinity());
      std::memcpy(unit_, x, n * sizeof(S));
    } else {
      const vec_t<W> none = fill(-std::numeric_limits<W>::infinity());
      Element<S>::store(unit_, without_first<S>(UNIT - n % UNIT, Element<S>::load(x + n - UNIT), {none, none}));
    }
  }
  const S* unit() const { return unit_; }

 private:
  alignas(VECTOR_BYTES) S unit_[Element<S>::UNIT];
};

}  // namespace luce::LUCE_ISA
