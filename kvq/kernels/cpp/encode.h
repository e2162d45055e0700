// Numbers to codes and metadata, with the arithmetic of the codecs in torch. Groups are chosen one by one; codes, which are
// many, in loops that become vectors.
#pragma once
#include <torch/headeronly/util/Float8_e4m3fn.h>

#include <vector>

#include "pages.h"

namespace kvq {

// The largest fp16 and E4M3 numbers, and the largest UE5M3 byte that is finite in fp16.
constexpr float kHalfMost = 65504.0f;
constexpr float kFloat8Most = 448.0f;
constexpr int32_t kUE5M3Most = 0xF7;
// The exponents of E8M0, and that of the largest E2M1 number, 6 = 1.5 * 2^2.
constexpr int kE8M0Bias = 127;
constexpr int kE2M1Exponent = 2;
constexpr double kE2M1Most = 6;

// Bits of a number of fp16's range, rounded half to even.
inline uint16_t to_half(float number) {
  int32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  const int32_t sign = bits >> 16 & 0x8000;
  int32_t size = bits & 0x7FFFFFFF;
  if (size < 0x38800000) return sign | static_cast<int32_t>(std::nearbyint(std::fabs(number) * 0x1p24f));
  size -= 0x38000000;
  return sign | (size + 0xFFF + (size >> 13 & 1)) >> 13;
}

inline uint8_t to_e4m3(float number) {
  return c10::Float8_e4m3fn(std::clamp(number, -kFloat8Most, kFloat8Most)).x;
}

template <class T>
inline T e4m3_to(uint8_t byte) {
  return static_cast<T>(static_cast<float>(c10::Float8_e4m3fn(byte, c10::Float8_e4m3fn::from_bits())));
}

// Of numbers of 0 or more: rounded to fp16, then to three bits of mantissa.
inline uint8_t to_ue5m3(float number) {
  const int32_t bits = to_half(std::min(number, kHalfMost));
  return static_cast<uint8_t>(std::min((bits + 63 + (bits >> 7 & 1)) >> 7, kUE5M3Most));
}

template <class T>
inline T ue5m3_to(uint8_t byte) {
  return half_to<T>(static_cast<uint16_t>(byte << 7));
}

// A product that is rounded: no compiler makes one instruction of it and what is added.
template <class T>
inline T rounded(T x) {
  asm("" : "+m"(x));
  return x;
}

template <class T>
struct Pair {
  T scale, minimum;
};

// The share ``clip`` of a range about its middle.
template <class T>
inline void narrow(double clip, T& low, T& high) {
  if (clip == 1) return;
  const T cut = rounded((high - low) * static_cast<T>((1 - clip) / 2));
  low += cut, high -= cut;
}

// (scale, minimum) of codes from ``low`` to ``high`` as they are stored at ``meta``, for all but range8.
template <class T>
inline Pair<T> store_range(const Slice& s, T low, T high, uint8_t* meta) {
  const T steps = static_cast<T>((1 << s.bits) - 1);
  if (s.meta == kFloat16) {
    uint16_t* pair = reinterpret_cast<uint16_t*>(meta);
    pair[0] = to_half(static_cast<float>((high - low) / steps)), pair[1] = to_half(static_cast<float>(low));
    return {half_to<T>(pair[0]), half_to<T>(pair[1])};
  }
  if (s.meta == kE4M3) {
    meta[0] = to_e4m3(static_cast<float>((high - low) / steps)), meta[1] = to_e4m3(static_cast<float>(low));
    return {e4m3_to<T>(meta[0]), e4m3_to<T>(meta[1])};
  }
  low = std::min(low, T(0)), high = std::max(high, T(0));
  meta[0] = to_ue5m3(static_cast<float>((high - low) / steps));
  const T scale = ue5m3_to<T>(meta[0]), span = rounded(scale * steps);
  const T byte = std::nearbyint(T(-255) * low / (span == 0 ? static_cast<T>(INFINITY) : span));
  meta[1] = static_cast<uint8_t>(std::clamp(byte, T(0), T(255)));
  const T share = rounded(static_cast<T>(meta[1]) * static_cast<T>(-static_cast<double>((1 << s.bits) - 1) / 255));
  return {scale, rounded(scale * share)};
}

// The number below an fp16 number.
inline uint16_t below(uint16_t half) {
  if (!(half & 0x7FFF)) return 0x8001;
  return half & 0x8000 ? half + 1 : half - 1;
}

// range8: (low, step) of the minima of a block's channels to ``ends``, and every channel's pair to ``meta``; low and high
// become minimum and scale.
template <class T>
void store_relative(const Slice& s, T* low, T* high, uint8_t* meta, uint16_t* ends) {
  const T least = *std::min_element(low, low + s.channels), most = *std::max_element(low, low + s.channels);
  ends[0] = to_half(static_cast<float>(least));
  if (half_to<T>(ends[0]) > least) ends[0] = below(ends[0]);
  const T start = half_to<T>(ends[0]), steps = static_cast<T>((1 << s.bits) - 1);
  ends[1] = to_half(static_cast<float>((most - start) / T(255)));
  const T step = half_to<T>(ends[1]), divisor = step == 0 ? static_cast<T>(INFINITY) : step;
  for (int64_t c = 0; c < s.channels; ++c) {
    // Rounded down, so that the lowest number of a group stays inside its range. The product is exact.
    const T code = std::clamp(std::floor((low[c] - start) / divisor), T(0), T(255));
    const T minimum = start + rounded(code * step);
    meta[2 * c] = to_ue5m3(static_cast<float>(std::max(high[c] - minimum, T(0)) / steps));
    meta[2 * c + 1] = static_cast<uint8_t>(code);
    low[c] = minimum, high[c] = ue5m3_to<T>(meta[2 * c]);
  }
}

// A scale alone, as it is stored at ``meta``. ``top``: the largest magnitude of the group.
template <class T>
inline T store_scale(const Side& side, const Slice& s, T top, uint8_t* meta) {
  if (s.meta == kE8M0) {
    int exponent = -kE8M0Bias;
    if (top != 0) {
      std::frexp(top, &exponent);
      exponent = std::clamp(exponent - 1 - kE2M1Exponent, -kE8M0Bias, kE8M0Bias);
    }
    meta[0] = static_cast<uint8_t>(exponent + kE8M0Bias);
    return std::ldexp(T(1), exponent);
  }
  if (side.encoding == kE2M1) {
    const T factor = static_cast<T>(side.scale());
    meta[0] = to_e4m3(static_cast<float>(top / static_cast<T>(kE2M1Most) / factor));
    return rounded(e4m3_to<T>(meta[0]) * factor);
  }
  // Symmetric integers span twice the magnitude, levels end at 1.
  const T scale = side.encoding == kSymmetric ? 2 * top / static_cast<T>(1 << s.bits) : top;
  if (s.meta == kE4M3) {
    meta[0] = to_e4m3(static_cast<float>(scale));
    return e4m3_to<T>(meta[0]);
  }
  const uint16_t half = to_half(static_cast<float>(scale));
  std::memcpy(meta, &half, sizeof half);
  return half_to<T>(half);
}

// How many of ``count`` edges lie below each of x.
template <class T>
inline void count_edges(const T* edges, int64_t count, const T* x, int64_t n, uint16_t* codes) {
  std::fill_n(codes, n, uint16_t(0));
  for (int64_t e = 0; e < count; ++e) {
    const T edge = edges[e];
    for (int64_t i = 0; i < n; ++i) codes[i] += edge < x[i];
  }
}

// The encoder of one side: room for the codes of a block of tokens, [heads, block, channels of the slice].
template <class T>
struct Encoder {
  const Side& side;
  int64_t heads, block;
  std::vector<uint16_t> codes;
  std::vector<T> low, high, part;
  T edges[kMostLevels - 1];

  Encoder(const Side& side, int64_t heads, int64_t block)
      : side(side), heads(heads), block(block), codes(heads * block * side.head_dim), low(side.head_dim),
        high(side.head_dim), part(side.head_dim) {
    for (int i = 0; i < kMostLevels - 1; ++i) edges[i] = static_cast<T>(side.edges[i]);
  }

  // Codes of one slice of x [heads, block, head_dim], and its metadata in the records from token ``slot`` of a page.
  template <class Records>
  void encode(const Slice& s, double clip, const T* x, Records&& record, int64_t slot) {
    for (int64_t h = 0; h < heads; ++h) {
      const T* own = x + h * block * side.head_dim + s.first;
      uint16_t* found = codes.data() + h * block * s.channels;
      if (s.by_channel()) {
        by_channel(s, clip, own, record(h), slot / s.group, found);
      } else if (s.axis == kStatic) {
        const double* numbers = side.statics + 2 * record(h).head * side.head_dim;
        for (int64_t c = 0; c < s.channels; ++c) {
          part[c] = (own[c] - static_cast<T>(numbers[side.head_dim + c])) / static_cast<T>(numbers[c]);
        }
        count_edges(edges, side.book - 1, part.data(), s.channels, found);
      } else if (s.axis == kNone) {
        for (int64_t t = 0; t < block; ++t) {
          count_edges(edges, side.book - 1, own + t * side.head_dim, s.channels, found + t * s.channels);
        }
      } else if (!s.shared || h == 0) {
        by_token(s, clip, own, record(h), slot, found);
      }
    }
  }

 private:
  T code_of(T x, Pair<T> pair, T steps) const {
    const T code = std::nearbyint((x - pair.minimum) / pair.scale);
    return code < 0 ? T(0) : code > steps ? steps : code;
  }

  // One token: ``block`` is 1, and where heads share a group x is all of theirs.
  void by_token(const Slice& s, double clip, const T* x, Record record, int64_t slot, uint16_t* found) {
    const int64_t together = s.shared ? heads : 1, groups = s.groups();
    const int64_t size = s.terms * (s.meta == kFloat16 ? 2 : 1);
    for (int64_t g = 0; g < groups; ++g) {
      T least = x[g * s.group], most = least;
      for (int64_t h = 0; h < together; ++h) {
        const T* own = x + h * side.head_dim + g * s.group;
        for (int64_t i = 0; i < s.group; i += kLanes<T>) {
          const Reals<T> numbers = load<Reals<T>>(own + i);
          least = std::min(least, -largest<T, kLanes<T>>(-numbers)), most = std::max(most, largest<T, kLanes<T>>(numbers));
        }
      }
      const Pair<T> pair = choose(s, clip, least, most, record.at(s.shared, s.meta_at + (slot * groups + g) * size));
      for (int64_t h = 0; h < together; ++h) {
        to_codes(s, pair, x + h * side.head_dim + g * s.group, s.group, found + h * s.channels + g * s.group);
      }
    }
  }

  Pair<T> choose(const Slice& s, double clip, T least, T most, uint8_t* meta) const {
    if (side.encoding == kMinMax) {
      narrow(clip, least, most);
      return store_range(s, least, most, meta);
    }
    if (side.encoding == kBookRange) {
      uint16_t* pair = reinterpret_cast<uint16_t*>(meta);
      pair[0] = to_half(static_cast<float>((most - least) / 2)), pair[1] = to_half(static_cast<float>((most + least) / 2));
      return {half_to<T>(pair[0]), half_to<T>(pair[1])};
    }
    const T scale = store_scale(side, s, std::max(std::fabs(least), std::fabs(most)), meta);
    return {scale, side.encoding == kSymmetric ? -scale * static_cast<T>(1 << (s.bits - 1)) : T(0)};
  }

  void to_codes(const Slice& s, Pair<T> pair, const T* x, int64_t count, uint16_t* found) {
    // A group of scale 0 is constant, and all its codes are that of 0.
    if (pair.scale == 0) pair.scale = static_cast<T>(INFINITY);
    if (!side.book) {
      const T steps = static_cast<T>((1 << s.bits) - 1);
      for (int64_t i = 0; i < count; ++i) found[i] = static_cast<uint16_t>(static_cast<int32_t>(code_of(x[i], pair, steps)));
      return;
    }
    for (int64_t i = 0; i < count; ++i) part[i] = (x[i] - pair.minimum) / pair.scale;
    if (side.encoding != kE2M1) return count_edges(edges, side.book - 1, part.data(), count, found);
    for (int64_t i = 0; i < count; ++i) found[i] = std::signbit(part[i]) ? 8 : 0, part[i] = std::fabs(part[i]);
    // Ties go to the even code.
    for (int e = 0; e < 7; ++e) {
      for (int64_t i = 0; i < count; ++i) found[i] += e % 2 ? edges[e] <= part[i] : edges[e] < part[i];
    }
  }

  // Whole groups of tokens, x [group, head_dim]; ``row`` of the metadata.
  void by_channel(const Slice& s, double clip, const T* x, Record record, int64_t row, uint16_t* found) {
    const int64_t C = s.channels, D = side.head_dim;
    T *least = low.data(), *most = high.data();
    std::copy_n(x, C, least), std::copy_n(x, C, most);
    for (int64_t t = 1; t < s.group; ++t) {
      for (int64_t c = 0; c < C; ++c) {
        const T number = x[t * D + c];
        least[c] = number < least[c] ? number : least[c], most[c] = number > most[c] ? number : most[c];
      }
    }
    const int64_t size = s.terms * (s.meta == kFloat16 ? 2 : 1);
    uint8_t* meta = record.own + s.meta_at + row * C * size;
    if (s.meta == kRange8) {
      for (int64_t c = 0; c < C; ++c) narrow(clip, least[c], most[c]);
      store_relative(s, least, most, meta, reinterpret_cast<uint16_t*>(record.own + s.range_at) + 2 * row);
    } else {
      for (int64_t c = 0; c < C; ++c) {
        const Pair<T> pair = choose(s, clip, least[c], most[c], meta + c * size);
        least[c] = pair.minimum, most[c] = pair.scale;
      }
    }
    for (int64_t c = 0; c < C; ++c) most[c] = most[c] == 0 ? static_cast<T>(INFINITY) : most[c];
    const T steps = static_cast<T>((1 << s.bits) - 1);
    for (int64_t t = 0; t < s.group; ++t) {
      for (int64_t c = 0; c < C; ++c) {
        const T code = code_of(x[t * D + c], {most[c], least[c]}, steps);
        found[t * C + c] = static_cast<uint16_t>(static_cast<int32_t>(code));
      }
    }
  }
};

// One token of all heads to E4M3 bytes ``at`` so many from the start of their records.
template <class T, class Records>
void cast(const Side& side, const T* x, int64_t heads, Records&& record, int64_t at) {
  const T scale = static_cast<T>(side.scale()), most = static_cast<T>(kFloat8Most);
  for (int64_t h = 0; h < heads; ++h, x += side.head_dim) {
    for (int64_t d = 0; d < side.head_dim; ++d) {
      const float number = static_cast<float>(std::clamp<T>(x[d] / scale, -most, most));
      record(h).own[at + d] = c10::Float8_e4m3fn(number).x;
    }
  }
}

// Mean of f(i) for i < n: summed in float64, so that the order does not show.
template <class T, class F>
inline T mean_of(int64_t n, F&& f) {
  double sums[8] = {};
  for (int64_t i = 0; i < n; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += static_cast<double>(f(i + j));
  }
  double total = 0;
  for (double part : sums) total += part;
  return static_cast<T>(total / static_cast<double>(n));
}

// x [heads, block, head_dim] over the lengths of its tokens, and the lengths [heads, block]; of all heads in the first
// row where they share them. A length that is stored as it is, is rounded first.
template <class T>
void take_lengths(const Side& side, int64_t heads, int64_t block, T* x, T* sizes) {
  const int64_t D = side.head_dim, together = side.norm_shared ? heads : 1;
  for (int64_t h = 0; h < heads; h += together) {
    for (int64_t t = 0; t < block; ++t) {
      const T* own = x + (h * block + t) * D;
      const T square = mean_of<T>(together * D, [&](int64_t i) {
        const T number = own[i / D * block * D + i % D];
        return static_cast<T>(number * number);
      });
      T size = std::sqrt(square);
      if (side.correct == kLength) size = half_to<T>(to_half(static_cast<float>(size)));
      sizes[h * block + t] = size;
      const T divisor = size == 0 ? static_cast<T>(INFINITY) : size;
      for (int64_t i = 0; i < together; ++i) {
        T* row = x + ((h + i) * block + t) * D;
        for (int64_t d = 0; d < D; ++d) row[d] /= divisor;
      }
    }
  }
}

// The lengths that decoded tokens need to have that of x or to be nearest to it; x [heads, head_dim] before it was divided,
// codes of levels alone.
template <class T>
void correct_lengths(const Side& side, int64_t heads, const T* x, const uint16_t* codes, T* sizes) {
  const int64_t D = side.head_dim, together = side.norm_shared ? heads : 1;
  for (int64_t h = 0; h < heads; h += together, x += together * D, codes += together * D) {
    const auto level = [&](int64_t i) { return static_cast<T>(side.levels[codes[i]]); };
    const T energy = mean_of<T>(together * D, [&](int64_t i) { return static_cast<T>(level(i) * level(i)); });
    const T wanted = side.correct == kLeastSquares
                         ? mean_of<T>(together * D, [&](int64_t i) { return static_cast<T>(x[i] * level(i)); })
                         : sizes[h] * std::sqrt(energy);
    sizes[h] = energy == 0 ? T(0) : wanted / energy;
  }
}

}  // namespace kvq
