// Vectors of the width that this file is compiled for, and the few functions of them that the kernels share.
//
// Everything is written with the vector extension of GCC and Clang: no intrinsics, one source for all processors.
// Products and sums are contracted to fused multiply-adds where the processor has them.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace luce::LUCE_ISA {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;  // SSE2, NEON
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  static constexpr int lanes = VECTOR_BYTES / 4;
  typedef float vec __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t mask __attribute__((vector_size(VECTOR_BYTES)));
  // e^x is normal above `exp_min`; sums of exponentials down to e^-reach of the largest lose nothing.
  static constexpr float exp_min = -87.0f;
  static constexpr float reach = 60.0f;
};

template <>
struct Simd<double> {
  static constexpr int lanes = VECTOR_BYTES / 8;
  typedef double vec __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t mask __attribute__((vector_size(VECTOR_BYTES)));
  static constexpr double exp_min = -708.0;
  static constexpr double reach = 600.0;
};

template <class T>
using vec_t = typename Simd<T>::vec;
template <class T>
using mask_t = typename Simd<T>::mask;

template <class T>
inline vec_t<T> load(const T* p) {
  vec_t<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, vec_t<T> v) {
  std::memcpy(p, &v, sizeof v);
}

// The first `count` elements, `rest` in the other lanes.
template <class T>
inline vec_t<T> load_some(const T* p, int64_t count, T rest) {
  T lane[Simd<T>::lanes];
  for (int l = 0; l < Simd<T>::lanes; ++l) lane[l] = l < count ? p[l] : rest;
  return load(lane);
}

template <class T>
inline void store_some(T* p, vec_t<T> v, int64_t count) {
  T lane[Simd<T>::lanes];
  store(lane, v);
  for (int64_t l = 0; l < count; ++l) p[l] = lane[l];
}

template <class T>
inline vec_t<T> fill(T x) {
  return vec_t<T>{} + x;
}

// 0, 1, 2, ...
template <class T>
inline vec_t<T> lane_numbers() {
  vec_t<T> v;
  for (int l = 0; l < Simd<T>::lanes; ++l) v[l] = static_cast<T>(l);
  return v;
}

template <class V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline V min(V a, V b) {
  return a < b ? a : b;
}

// One running sum per lane, in double: a row may be long, and a float stops growing after some thousand terms. Up to
// FLUSH terms are added in the vectors' own precision, then `flush` is due.
constexpr int64_t FLUSH = 8;

template <class T>
class Sums;

template <>
class Sums<double> {
 public:
  void add(vec_t<double> v) { sum_ += v; }
  void flush() {}
  vec_t<double> value() const { return sum_; }
  void read(double* lane) const { std::memcpy(lane, &sum_, sizeof sum_); }
  void write(const double* lane) { std::memcpy(&sum_, lane, sizeof sum_); }

 private:
  vec_t<double> sum_ = {};
};

template <>
class Sums<float> {
 public:
  void add(vec_t<float> v) { recent_ += v; }
  void flush() {
    // As a whole: GCC takes twice as many instructions for two halves.
    const both_t wide = __builtin_convertvector(recent_, both_t);
    vec_t<double> half[2];
    std::memcpy(half, &wide, sizeof half);
    low_ += half[0];
    high_ += half[1];
    round();
  }
  vec_t<float> value() const { return rounded_ + recent_; }
  void read(double* lane) {
    flush();
    std::memcpy(lane, &low_, sizeof low_);
    std::memcpy(lane + Simd<double>::lanes, &high_, sizeof high_);
  }
  void write(const double* lane) {
    std::memcpy(&low_, lane, sizeof low_);
    std::memcpy(&high_, lane + Simd<double>::lanes, sizeof high_);
    round();
  }

 private:
  typedef double both_t __attribute__((vector_size(VECTOR_BYTES * 2)));
  void round() {
    const vec_t<double> half[2] = {low_, high_};
    both_t wide;
    std::memcpy(&wide, half, sizeof wide);
    rounded_ = __builtin_convertvector(wide, vec_t<float>);
    recent_ = vec_t<float>{};
  }

  vec_t<double> low_ = {}, high_ = {};
  vec_t<float> rounded_ = {}, recent_ = {};
};

// All lanes as one, in pairs: a chain over sixteen lanes would take longer than a short row does.
template <int COUNT, class T, class Join>
inline T join_lanes(T* lane, Join join) {
  if constexpr (COUNT == 1) {
    return lane[0];
  } else {
    for (int l = 0; l < COUNT / 2; ++l) lane[l] = join(lane[l], lane[l + COUNT / 2]);
    return join_lanes<COUNT / 2>(lane, join);
  }
}

template <class T>
inline double total(Sums<T>& sums) {
  double lane[Simd<T>::lanes];
  sums.read(lane);
  return join_lanes<Simd<T>::lanes>(lane, [](double a, double b) { return a + b; });
}

template <class V>
inline auto lane_sum(V v) {
  decltype(v[0] + v[0]) lane[sizeof(V) / sizeof(v[0])];
  std::memcpy(lane, &v, sizeof v);
  return join_lanes<sizeof(V) / sizeof(v[0])>(lane, [](auto a, auto b) { return a + b; });
}

template <class V>
inline auto lane_max(V v) {
  decltype(v[0] + v[0]) lane[sizeof(V) / sizeof(v[0])];
  std::memcpy(lane, &v, sizeof v);
  return join_lanes<sizeof(V) / sizeof(v[0])>(lane, [](auto a, auto b) { return b > a ? b : a; });
}

template <class V>
inline auto lane_min(V v) {
  return -lane_max(-v);
}

template <class M>
inline bool any(M mask) {
  int64_t word[sizeof(M) / 8], all = 0;
  std::memcpy(word, &mask, sizeof mask);
  for (unsigned i = 0; i < sizeof(M) / 8; ++i) all |= word[i];
  return all != 0;
}

// e^t for |t| <= ln(2)/2, within 2 ULP: the polynomial of the Two-Pass Softmax (XNNPACK's, arXiv 2001.04438).
inline vec_t<float> exp_reduced(vec_t<float> t) {
  vec_t<float> p = t * 0x1.0F9F9Cp-7f + 0x1.573A1Ap-5f;
  p = p * t + 0x1.555A80p-3f;
  p = p * t + 0x1.FFFDC6p-2f;
  p = p * t + 0x1.FFFFF6p-1f;
  return p * t + 1.0f;
}

// The Taylor series to the 13th power, whose rest is below 1e-17.
inline vec_t<double> exp_reduced(vec_t<double> t) {
  constexpr double inverse_factorial[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                                          1.0 / 40320,      1.0 / 5040,      1.0 / 720,      1.0 / 120,     1.0 / 24,
                                          1.0 / 6,          1.0 / 2,         1.0,            1.0};
  vec_t<double> p = fill(inverse_factorial[0]);
  for (int k = 1; k < 14; ++k) p = p * t + inverse_factorial[k];
  return p;
}

// e^x for x <= 80 or so; 0 below Simd::exp_min, where it would not be a normal number. A NaN gives an arbitrary number:
// kernels test for NaN once a row, not once an exponential.
//
// Adding 1.5 * 2^mantissa_bits rounds to the nearest integer and leaves it, biased, in the lowest bits. ln 2 is split in
// two, the first part so short that its product with n is exact: the difference to x then loses no digits.
inline vec_t<float> exp(vec_t<float> x) {
  const mask_t<float> tiny = x < Simd<float>::exp_min;
  const vec_t<float> magic = fill(0x1.8000FEp23f);
  const vec_t<float> biased = x * 0x1.715476p+0f + magic;
  const vec_t<float> n = biased - magic;
  const vec_t<float> t = (x - n * 0x1.62E4p-1f) - n * 0x1.7F7D1Cp-20f;
  mask_t<float> bits;
  std::memcpy(&bits, &biased, sizeof bits);
  bits <<= 23;
  vec_t<float> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return tiny ? fill(0.0f) : exp_reduced(t) * scale;
}

inline vec_t<double> exp(vec_t<double> x) {
  const mask_t<double> tiny = x < Simd<double>::exp_min;
  const vec_t<double> magic = fill(0x1.80000000003FFp52);
  const vec_t<double> biased = x * 0x1.71547652B82FEp+0 + magic;
  const vec_t<double> n = biased - magic;
  const vec_t<double> t = (x - n * 0x1.62E42FEFA0000p-1) - n * 0x1.CF79ABC9E3B39p-40;
  mask_t<double> bits;
  std::memcpy(&bits, &biased, sizeof bits);
  bits <<= 52;
  vec_t<double> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return tiny ? fill(0.0) : exp_reduced(t) * scale;
}

// log(1 + f) - f for sqrt(1/2) <= 1 + f <= sqrt(2): a polynomial in float (Cephes), a rational form in double (fdlibm).
// Without f, which the caller adds last: near 0 it is almost all of the logarithm, and exact.
inline vec_t<float> log1p_rest(vec_t<float> f) {
  vec_t<float> p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  return (p * f - 0.5f) * (f * f);
}

inline vec_t<double> log1p_rest(vec_t<double> f) {
  const vec_t<double> s = f / (2.0 + f), z = s * s, half = 0.5 * f * f;
  vec_t<double> r = z * 1.479819860511658591e-01 + 1.531383769920937332e-01;
  r = r * z + 1.818357216161805012e-01;
  r = r * z + 2.222219843214978396e-01;
  r = r * z + 2.857142874366239149e-01;
  r = r * z + 3.999999999940941908e-01;
  r = r * z + 6.666666666666735130e-01;
  return s * (half + r * z) - half;
}

// log(1 + f) for the same f.
template <class V>
inline V log1p_reduced(V f) {
  return f + log1p_rest(f);
}

// x = 2^e (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); x a normal number above 0. `e` is a whole number. With 1 + f
// from 1 to 2, logarithms just below 1 would be differences of ln 2 and almost ln 2.
inline void split(vec_t<float> x, vec_t<float>& e, vec_t<float>& f) {
  mask_t<float> bits;
  std::memcpy(&bits, &x, sizeof bits);
  const mask_t<float> whole = (bits - 0x3F3504F3) >> 23;
  bits -= whole << 23;
  vec_t<float> m;
  std::memcpy(&m, &bits, sizeof m);
  e = __builtin_convertvector(whole, vec_t<float>);
  f = m - 1.0f;
}

inline void split(vec_t<double> x, vec_t<double>& e, vec_t<double>& f) {
  // Exponents are shifted to be positive: AVX2 has no arithmetic shift and no conversion of 64-bit integers.
  typedef uint64_t bits_t __attribute__((vector_size(VECTOR_BYTES)));
  bits_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bits_t biased = (bits - 0x3FE6A09E667F3BCD + (uint64_t(1023) << 52)) >> 52;
  bits -= (biased - 1023) << 52;
  vec_t<double> m;
  std::memcpy(&m, &bits, sizeof m);
  const bits_t magic = biased | 0x4330000000000000;  // 2^52 + biased
  vec_t<double> shifted;
  std::memcpy(&shifted, &magic, sizeof shifted);
  e = shifted - (0x1p52 + 1023.0);
  f = m - 1.0;
}

inline vec_t<float> times_ln2(vec_t<float> e, vec_t<float> rest) {
  return e * 0x1.62E4p-1f + (e * 0x1.7F7D1Cp-20f + rest);
}

inline vec_t<double> times_ln2(vec_t<double> e, vec_t<double> rest) {
  return e * 0x1.62E42FEFA0000p-1 + (e * 0x1.CF79ABC9E3B39p-40 + rest);
}

// Natural logarithm of normal numbers above 0.
template <class V>
inline V log(V x) {
  V e, f;
  split(x, e, f);
  return times_ln2(e, log1p_reduced(f));
}

// -log(p), given `c` = 1 - p to full precision: exact to rounding also where p is almost 1 and has rounded c away.
template <class V>
inline V minus_log(V p, V c) {
  V e, f;
  split(p, e, f);
  return -times_ln2(e, log1p_reduced(e == 0 ? -c : f));
}

}  // namespace luce::LUCE_ISA
