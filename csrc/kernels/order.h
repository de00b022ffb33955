// The order of a row: positions by falling value, the lower position first among equals.
//
// Up to 1024 values are packed, key above position, into 32 bits and sorted by a bitonic network, which costs the same
// for any input and nothing for a branch guessed wrong. Keys are coarser than values: a sweep puts runs of equal keys
// right. Longer rows are first dealt into buckets of about 128.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "rows.h"
#include "vec.h"

namespace luce::LUCE_ISA {

typedef uint32_t bits_vec __attribute__((vector_size(VECTOR_BYTES)));
constexpr int BIT_LANES = VECTOR_BYTES / 4;

template <int FLIP, int... I>
inline bits_vec exchange_lanes(bits_vec v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ FLIP)...);
}

// Compares each lane i with lane i ^ FLIP: of the two, the one with HIGH_BIT set gets the larger number.
template <int FLIP, int HIGH_BIT>
inline bits_vec compare_lanes(bits_vec v) {
  const bits_vec other = exchange_lanes<FLIP>(v, std::make_integer_sequence<int, BIT_LANES>());
  bits_vec lane;
  for (int l = 0; l < BIT_LANES; ++l) lane[l] = (l & HIGH_BIT) ? ~0u : 0u;
  return lane ? max(v, other) : min(v, other);
}

// The last steps of a merge, within each vector: distances BIT_LANES/2 down to 1.
template <int DISTANCE>
inline bits_vec merge_lanes(bits_vec v) {
  if constexpr (DISTANCE == 0) {
    return v;
  } else {
    return merge_lanes<DISTANCE / 2>(compare_lanes<DISTANCE, DISTANCE>(v));
  }
}

// A whole vector, sorted: runs of 2, 4, ... each merged with its mirrored neighbour.
template <int RUN>
inline bits_vec sort_lanes(bits_vec v) {
  if constexpr (RUN > BIT_LANES) {
    return v;
  } else {
    return sort_lanes<RUN * 2>(merge_lanes<RUN / 4>(compare_lanes<RUN - 1, RUN / 2>(v)));
  }
}

inline bits_vec load_bits(const uint32_t* p) {
  bits_vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store_bits(uint32_t* p, bits_vec v) { std::memcpy(p, &v, sizeof v); }

// Sorts COUNT vectors of numbers, a power of two. Few vectors stay in registers all along.
template <int COUNT>
inline void sort_vectors(uint32_t* x) {
  constexpr auto lanes = std::make_integer_sequence<int, BIT_LANES>();
  bits_vec v[COUNT];
  std::memcpy(v, x, sizeof v);
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; ++i) v[i] = sort_lanes<2>(v[i]);
#pragma GCC unroll 16
  for (int run = 2; run <= COUNT; run *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) {
      const int j = i ^ (run - 1);
      if (i > j) continue;
      const bits_vec a = v[i], b = exchange_lanes<BIT_LANES - 1>(v[j], lanes);
      v[i] = min(a, b);
      v[j] = exchange_lanes<BIT_LANES - 1>(max(a, b), lanes);
    }
#pragma GCC unroll 16
    for (int distance = run / 4; distance >= 1; distance /= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < COUNT; ++i) {
        if (i & distance) continue;
        const bits_vec a = v[i], b = v[i + distance];
        v[i] = min(a, b);
        v[i + distance] = max(a, b);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) v[i] = merge_lanes<BIT_LANES / 2>(v[i]);
  }
  std::memcpy(x, v, sizeof v);
}

// The last steps of a merge that stay within COUNT vectors.
template <int COUNT>
inline void merge_vectors(uint32_t* x) {
  bits_vec v[COUNT];
  std::memcpy(v, x, sizeof v);
#pragma GCC unroll 16
  for (int distance = COUNT / 2; distance >= 1; distance /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < COUNT; ++i) {
      if (i & distance) continue;
      const bits_vec a = v[i], b = v[i + distance];
      v[i] = min(a, b);
      v[i + distance] = max(a, b);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; ++i) v[i] = merge_lanes<BIT_LANES / 2>(v[i]);
  std::memcpy(x, v, sizeof v);
}

// Sorts `count` numbers, a power of two of at least 32.
inline void sort_network(uint32_t* x, int64_t count) {
  constexpr int L = BIT_LANES, REGISTERS = 8;
  constexpr auto lanes = std::make_integer_sequence<int, L>();
  if (count == 32 && 32 / L <= REGISTERS) return sort_vectors<32 / L>(x);
  if (count == 64 && 64 / L <= REGISTERS) return sort_vectors<64 / L>(x);
  for (int64_t i = 0; i < count; i += REGISTERS * L) sort_vectors<REGISTERS>(x + i);
  for (int64_t run = 2 * REGISTERS * L; run <= count; run *= 2) {
    for (int64_t start = 0; start < count; start += run) {
      uint32_t *low = x + start, *high = x + start + run - L;
      for (; low < high; low += L, high -= L) {
        const bits_vec a = load_bits(low), b = exchange_lanes<L - 1>(load_bits(high), lanes);
        store_bits(low, min(a, b));
        store_bits(high, exchange_lanes<L - 1>(max(a, b), lanes));
      }
    }
    int64_t distance = run / 4;
    for (; distance >= REGISTERS * L; distance /= 2) {
      for (int64_t start = 0; start < count; start += 2 * distance) {
        for (uint32_t* p = x + start; p < x + start + distance; p += L) {
          const bits_vec a = load_bits(p), b = load_bits(p + distance);
          store_bits(p, min(a, b));
          store_bits(p + distance, max(a, b));
        }
      }
    }
    for (int64_t i = 0; i < count; i += REGISTERS * L) merge_vectors<REGISTERS>(x + i);
  }
}

// The factor that turns depths up to `span` into keys below `levels`. 0.999999 keeps the rounded key of `span` itself below
// `levels`; 1e30 keeps the factor finite for subnormal spans.
template <class T>
inline T key_scale(int64_t levels, T span) {
  return span > 0 ? std::min(static_cast<T>(levels) * T(0.999999) / span, T(1e30)) : T(0);
}

constexpr int64_t NETWORK_MAX = 1024;
constexpr int64_t BUCKET_MEAN = 128;

// Sorts positions `order[0..count)` by falling value[position], the lower position first among equals.
template <class T>
inline void sort_exactly(uint32_t* order, int64_t count, const T* value) {
  const auto before = [=](uint32_t a, uint32_t b) { return value[a] != value[b] ? value[a] > value[b] : a < b; };
  if (count > 32) return std::sort(order, order + count, before);
  for (int64_t i = 1; i < count; ++i) {
    const uint32_t moving = order[i];
    int64_t j = i;
    for (; j > 0 && before(moving, order[j - 1]); --j) order[j] = order[j - 1];
    order[j] = moving;
  }
}

// A number of 19 bits that falls as the value rises, exact for values that were 16-bit floats: sign, exponent and the ten
// bits of mantissa that float16 has.
inline uint32_t coarse_key(float value) {
  value += 0.0f;  // the zeros are equal
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rising = bits ^ (bits >> 31 ? ~0u : 0x80000000u);
  return ~rising >> 13;
}

// At most NETWORK_MAX values, nearly all between `top` and `top - span`; position `left_out` (or -1) is not in the result.
// Returns the number of positions written. `coarse`: all values were 16-bit floats, equal ones are many, and keys exact.
template <class T>
int64_t order_short(const T* value, int64_t count, int64_t left_out, T top, T span, bool coarse, uint32_t* order) {
  int bits = 5;
  while ((int64_t(1) << bits) < count) ++bits;
  const int64_t padded = int64_t(1) << bits;
  const T scale = key_scale(int64_t(1) << (32 - bits), span);
  uint32_t* packed = scratch().get<uint32_t>(3, NETWORK_MAX + 1);
  if (coarse) {
    for (int64_t i = 0; i < count; ++i) {
      packed[i] = coarse_key(static_cast<float>(value[i])) << bits | static_cast<uint32_t>(i);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const T depth = top - value[i] > T(0) ? top - value[i] : T(0);
      const auto key = static_cast<int32_t>((depth < span ? depth : span) * scale);
      packed[i] = static_cast<uint32_t>(key) << bits | static_cast<uint32_t>(i);
    }
  }
  for (int64_t i = count; i < padded; ++i) packed[i] = ~0u;
  if (left_out >= 0) packed[left_out] = ~0u;
  sort_network(packed, padded);
  const int64_t kept = count - (left_out >= 0);
  packed[kept] = ~0u;
  uint32_t equal = 0;
  const uint32_t low = static_cast<uint32_t>(padded - 1);
  for (int64_t i = 0; i < kept; ++i) {
    equal |= ((packed[i] ^ packed[i + 1]) >> bits) == 0 ? ~0u : 0u;
    order[i] = packed[i] & low;
  }
  if (equal && !coarse) {
    for (int64_t i = 0; i < kept;) {
      int64_t end = i + 1;
      while (end < kept && (packed[i] ^ packed[end]) >> bits == 0) ++end;
      if (end > i + 1) sort_exactly(order + i, end - i, value);
      i = end;
    }
  }
  return kept;
}

// Any number of values, as `order_short`. `depth` counts how often a crowded bucket was dealt again.
template <class T>
int64_t order_row(const T* value, int64_t count, int64_t left_out, T top, T span, bool coarse, uint32_t* order,
                  int depth = 0) {
  if (count <= NETWORK_MAX) return order_short(value, count, left_out, top, span, coarse, order);
  if (!(span > 0)) {  // nothing to tell apart
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (i != left_out) order[kept++] = static_cast<uint32_t>(i);
    }
    return kept;
  }

  int64_t buckets = 1;
  while (buckets * BUCKET_MEAN < count && buckets < 4096) buckets *= 2;
  const T scale = key_scale(buckets, span);
  uint32_t* start = scratch().get<uint32_t>(4 + depth, buckets + 3);
  uint16_t* bucket = scratch().get<uint16_t>(6 + depth, count);
  uint32_t* position = scratch().get<uint32_t>(8 + depth, count);
  T* sorted = scratch().get<T>(10 + depth, count);

  // Behind all buckets come values below the span, whose order does not matter, and then what is left out.
  std::fill(start, start + buckets + 3, 0u);
  for (int64_t i = 0; i < count; ++i) {
    const T deep = top - value[i];
    const auto b = static_cast<int32_t>((deep < span ? deep : span) * scale);
    bucket[i] = static_cast<uint16_t>(deep > span ? static_cast<int32_t>(buckets) : b);
  }
  if (left_out >= 0) bucket[left_out] = static_cast<uint16_t>(buckets + 1);
  for (int64_t i = 0; i < count; ++i) ++start[bucket[i] + 1];
  for (int64_t b = 0; b <= buckets + 1; ++b) start[b + 1] += start[b];
  // `start[b]` moves from the bucket's begin to its end, which is the next one's begin.
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t place = start[bucket[i]]++;
    position[place] = static_cast<uint32_t>(i);
    sorted[place] = value[i];
  }
  for (int64_t b = 0, begin = 0; b < buckets; ++b) {
    const int64_t end = start[b], size = end - begin;
    const T* values = sorted + begin;
    uint32_t* out = order + begin;
    if (size > NETWORK_MAX && depth == 1) {
      for (int64_t i = 0; i < size; ++i) out[i] = static_cast<uint32_t>(i);
      sort_exactly(out, size, values);
    } else if (size > NETWORK_MAX) {
      const auto [low, high] = std::minmax_element(values, values + size);
      order_row(values, size, int64_t(-1), *high, *high - *low, coarse, out, depth + 1);
    } else if (size > 1) {
      order_short(values, size, int64_t(-1), top - static_cast<T>(b) / scale, T(1) / scale, coarse, out);
    } else if (size == 1) {
      out[0] = 0;
    }
    for (int64_t i = 0; i < size; ++i) out[i] = position[begin + out[i]];
    begin = end;
  }
  std::copy(position + start[buckets - 1], position + start[buckets], order + start[buckets - 1]);
  return count - (left_out >= 0);
}

}  // namespace luce::LUCE_ISA
