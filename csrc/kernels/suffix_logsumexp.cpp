// Log-sum-exp of every suffix of a row, phi_k = log Z_k with Z_k = sum of e^x from place k on, and its gradient:
// dx_j = e^x_j B_j, where B_j sums g/Z up to place j and g is the gradient that arrives.
//
// Two ways lead there, both with exponents kept apart from mantissas as in the Two-Pass Softmax (arXiv 2001.04438), so
// that no logarithm of a large number is added to one of a small. `narrow` has one exponent for the row: enough where
// the last place, which is the smallest suffix, is not too far below the largest. `wide` gives every suffix its own.

#include "../suffix_logsumexp.h"

#include <algorithm>
#include <cmath>

#include "rows.h"
#include "scan.h"

namespace luce::LUCE_ISA {
namespace {

enum Slot { WORTH = 3, RATIO, SCALE };  // rows.h has the slots before

template <class T>
constexpr T INF = std::numeric_limits<T>::infinity();

// The largest row that `exp_over` below splits without losing digits, and the largest gradient whose ratios fit.
constexpr double LARGEST = 1e4, LARGEST_UPSTREAM = 1e6;

// e^x / 2^exponent for |x| up to LARGEST; anything far below 2^exponent, also -inf, gives 0. Here ln 2 has so many parts,
// the first ones so short, that their products with a whole number are exact without fused multiply-adds as well.
inline vec_t<float> exp_over(vec_t<float> x, float exponent) {
  const mask_t<float> tiny = x < exponent * 0x1.62E430p-1f + (Simd<float>::exp_min + 1);
  const vec_t<float> magic = fill(0x1.8000FEp23f);
  vec_t<float> biased = x * 0x1.715476p+0f + magic;
  const vec_t<float> n = biased - magic;
  const vec_t<float> t = ((x - n * 0x1.6280p-1f) - n * 0x1.9080p-11f) - n * 0x1.FDF474p-22f;
  biased -= exponent;
  mask_t<float> bits;
  std::memcpy(&bits, &biased, sizeof bits);
  bits <<= 23;
  vec_t<float> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return tiny ? fill(0.0f) : exp_reduced(t) * scale;
}

inline vec_t<double> exp_over(vec_t<double> x, double exponent) {
  const mask_t<double> tiny = x < exponent * 0x1.62E42FEFA39EFp-1 + (Simd<double>::exp_min + 1);
  const vec_t<double> magic = fill(0x1.80000000003FFp52);
  vec_t<double> biased = x * 0x1.71547652B82FEp+0 + magic;
  const vec_t<double> n = biased - magic;
  const vec_t<double> t = (x - n * 0x1.62E42FEFA0000p-1) - n * 0x1.CF79ABC9E3B39p-40;
  biased -= exponent;
  mask_t<double> bits;
  std::memcpy(&bits, &biased, sizeof bits);
  bits <<= 52;
  vec_t<double> scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return tiny ? fill(0.0) : exp_reduced(t) * scale;
}

// Calls body(place, lanes) for each vector of a row of n places, in the order of a running sum.
template <class T, Way WAY, class Body>
inline void each_vector(int64_t n, Body body) {
  constexpr int64_t L = Simd<T>::lanes;
  const int64_t full = n / L * L;
  if constexpr (WAY == DOWN) {
    if (full < n) body(full, n - full);
    for (int64_t k = full - L; k >= 0; k -= L) body(k, L);
  } else {
    for (int64_t k = 0; k < full; k += L) body(k, L);
    if (full < n) body(full, n - full);
  }
}

template <class T>
inline vec_t<T> load_lanes(const T* p, int64_t lanes, T rest) {
  return lanes == Simd<T>::lanes ? load(p) : load_some(p, lanes, rest);
}

template <class T>
inline void store_lanes(T* p, vec_t<T> v, int64_t lanes) {
  if (lanes == Simd<T>::lanes) return store(p, v);
  store_some(p, v, lanes);
}

// For the wide way: numbers of type T in vectors of double.
template <class T>
inline vec_t<double> load_double(const T* p, int64_t lanes, double rest) {
  double lane[Simd<double>::lanes];
  for (int l = 0; l < Simd<double>::lanes; ++l) lane[l] = l < lanes ? static_cast<double>(p[l]) : rest;
  return load(lane);
}

template <class T>
inline void store_double(T* p, vec_t<double> v, int64_t lanes) {
  for (int64_t l = 0; l < lanes; ++l) p[l] = static_cast<T>(v[l]);
}

// e^x as a scaled number; an excluded place weighs nothing.
inline Scaled worth_of(vec_t<double> x) {
  const mask_t<double> none = x == -INF<double>;
  return {none ? fill(0.0) : fill(1.0), none ? fill(Scaled::NOTHING) : x};
}

// Places from 0 to n - 1 of a row, the last one finite and none NaN or +inf.
template <class T>
struct Part {
  const T* x;
  int64_t n;
  T top;

  bool narrow() const { return std::fabs(top) <= T(LARGEST) && x[n - 1] >= top - Simd<T>::reach; }
  T exponent() const { return std::rint(top * T(0x1.71547652B82FEp+0)); }
};

template <class T>
void forward_narrow(const Part<T>& part, T* phi) {
  const T exponent = part.exponent();
  RunningSum<DOWN> suffix;
  each_vector<T, DOWN>(part.n, [&](int64_t k, int64_t lanes) {
    const vec_t<T> z = suffix.add(exp_over(load_lanes(part.x + k, lanes, -INF<T>), exponent));
    vec_t<T> e, f;
    split(z, e, f);
    store_lanes(phi + k, times_ln2(e + exponent, log1p_reduced(f)), lanes);
  });
}

template <class T>
void forward_wide(const Part<T>& part, T* phi) {
  RunningScaledSum<DOWN> suffix;
  each_vector<double, DOWN>(part.n, [&](int64_t k, int64_t lanes) {
    const Scaled z = suffix.add(worth_of(load_double(part.x + k, lanes, -INF<double>)));
    store_double(phi + k, z.scale + log(z.mantissa), lanes);
  });
}

template <class T>
void backward_narrow(const Part<T>& part, const T* upstream, T* dx) {
  const T exponent = part.exponent();
  T* worth = scratch().get<T>(WORTH, part.n);
  RunningSum<DOWN> suffix;
  each_vector<T, DOWN>(part.n, [&](int64_t k, int64_t lanes) {
    const vec_t<T> w = exp_over(load_lanes(part.x + k, lanes, -INF<T>), exponent);
    store_lanes(worth + k, w, lanes);
    store_lanes(dx + k, load_lanes(upstream + k, lanes, T(0)) / suffix.add(w), lanes);
  });
  RunningSum<UP> before;
  each_vector<T, UP>(part.n, [&](int64_t k, int64_t lanes) {
    const vec_t<T> b = before.add(load_lanes(dx + k, lanes, T(0)));
    store_lanes(dx + k, load_lanes(worth + k, lanes, T(0)) * b, lanes);
  });
}

template <class T>
void backward_wide(const Part<T>& part, const T* upstream, T* dx) {
  double* ratio = scratch().get<double>(RATIO, part.n);
  double* scale = scratch().get<double>(SCALE, part.n);
  RunningScaledSum<DOWN> suffix;
  each_vector<double, DOWN>(part.n, [&](int64_t k, int64_t lanes) {
    const Scaled z = suffix.add(worth_of(load_double(part.x + k, lanes, -INF<double>)));
    store_lanes(ratio + k, load_double(upstream + k, lanes, 0) / z.mantissa, lanes);
    store_lanes(scale + k, -z.scale, lanes);
  });
  RunningScaledSum<UP> before;
  each_vector<double, UP>(part.n, [&](int64_t k, int64_t lanes) {
    const Scaled b = before.add({load_lanes(ratio + k, lanes, 0.0), load_lanes(scale + k, lanes, Scaled::NOTHING)});
    const vec_t<double> x = load_double(part.x + k, lanes, -INF<double>);
    store_double(dx + k, exp(x + b.scale) * b.mantissa, lanes);
  });
}

template <class T, class Test>
bool any_place(const T* x, int64_t n, Test test) {
  mask_t<T> found = {};
  each_vector<T, UP>(n, [&](int64_t k, int64_t lanes) { found |= test(load_lanes(x + k, lanes, T(0))); });
  return any(found);
}

// The first place behind all NaN and +inf: what comes before it has no finite suffix.
template <class T>
int64_t first_defined(const T* x, int64_t n) {
  if (!any_place(x, n, [](vec_t<T> v) { return ~(v < INF<T>); })) return 0;
  while (x[n - 1] < INF<T>) --n;
  return n;
}

// Without the places at the end that hold -inf: there, a suffix is empty.
template <class T>
Part<T> without_empty_end(const T* x, int64_t n) {
  while (n > 0 && x[n - 1] == -INF<T>) --n;
  vec_t<T> top = fill(-INF<T>);
  each_vector<T, UP>(n, [&](int64_t k, int64_t lanes) { top = max(top, load_lanes(x + k, lanes, -INF<T>)); });
  return {x, n, lane_max(top)};
}

template <class T>
void forward_row(const T* x, int64_t n, T* phi) {
  const int64_t begin = first_defined(x, n);
  T undefined = INF<T>;
  for (int64_t k = begin - 1; k >= 0; --k) {
    if (x[k] != x[k]) undefined = x[k];
    phi[k] = undefined;
  }
  const Part<T> part = without_empty_end(x + begin, n - begin);
  std::fill(phi + begin + part.n, phi + n, -INF<T>);
  if (part.n == 0) return;
  part.narrow() ? forward_narrow(part, phi + begin) : forward_wide(part, phi + begin);
}

template <class T>
void backward_row(const T* x, const T* upstream, int64_t n, T* dx) {
  constexpr T NONE = std::numeric_limits<T>::quiet_NaN();
  const int64_t begin = first_defined(x, n);
  // The first suffix of all holds every NaN, and every place has a share in the first suffix. Beside +inf, all else
  // has none.
  const bool undefined = std::any_of(x, x + begin, [](T value) { return value != value; });
  if (undefined) return std::fill(dx, dx + n, NONE);
  for (int64_t k = 0; k < begin; ++k) dx[k] = x[k] < INF<T> ? T(0) : NONE;
  const Part<T> part = without_empty_end(x + begin, n - begin);
  std::fill(dx + begin + part.n, dx + n, T(0));
  if (part.n == 0) return;
  const T* g = upstream + begin;
  const bool large = any_place(g, part.n, [](vec_t<T> v) { return max(v, -v) > T(LARGEST_UPSTREAM); });
  part.narrow() && !large ? backward_narrow(part, g, dx + begin) : backward_wide(part, g, dx + begin);
}

constexpr auto NEVER = [](int64_t) { return false; };

template <class T>
void forward_rows(const SuffixArguments& a, int64_t begin, int64_t end) {
  each_row<T>(a.x, {}, a.result, begin, end, NEVER,
              [&](int64_t, const T* x, const T*, T* phi) { forward_row(x, a.x.classes, phi); });
}

template <class T>
void backward_rows(const SuffixArguments& a, int64_t begin, int64_t end) {
  each_row<T>(a.x, a.upstream, a.result, begin, end, NEVER,
              [&](int64_t, const T* x, const T* g, T* dx) { backward_row(x, g, a.x.classes, dx); });
}

}  // namespace

void suffix_logsumexp(const SuffixArguments& arguments, int64_t begin, int64_t end) {
  arguments.wide ? forward_rows<double>(arguments, begin, end) : forward_rows<float>(arguments, begin, end);
}

void suffix_logsumexp_backward(const SuffixArguments& arguments, int64_t begin, int64_t end) {
  arguments.wide ? backward_rows<double>(arguments, begin, end) : backward_rows<float>(arguments, begin, end);
}

}  // namespace luce::LUCE_ISA
