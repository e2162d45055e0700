// Tokens into pages: the plain grid from a group's minimum to its maximum, or E4M3. The bytes are those of the codecs in
// torch, whose arithmetic this follows operation by operation, in float32 or, for float64 tokens, in float64.
#pragma once
#include <torch/headeronly/util/Float8_e4m3fn.h>

#include <vector>

#include "decode_attention.h"

namespace kvq {

// The largest fp16 and E4M3 numbers.
constexpr float kHalfMost = 65504.0f;
constexpr float kFloat8Most = 448.0f;

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

inline float half_to_float(uint16_t half) {
  const int32_t bits = (half & 0x7FFF) << 13 | (half & 0x8000) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number * 0x1p112f;
}

// What a pack works on: tokens of one side, and pages to write.
struct Pack {
  Side side;
  Tokens tokens;
  uint8_t* pool;
  const int64_t* table;
  int64_t B, K, pages, record, stride;
  const int32_t* ranges;  // [B, 3]: first and last token of the pages, and what is added to find one in ``tokens``.
  double scale;
};

// Writes the codes of one token, and clears the tokens that follow it in its row of containers.
inline void write_codes(const Side& side, uint16_t* words, int64_t slot, const uint16_t* codes) {
  const int64_t part = slot / side.rows, width = side.width, kept = part * side.chunks;
  const int containers = side.bits == 3 ? 3 : 1;
  uint16_t* row = words + slot % side.rows * containers * width;
  for (int w = 0; w < containers; ++w) {
    const int64_t fields = side.bits == 3 ? std::clamp<int64_t>(kept - 5 * w, 0, 5) : kept;
    uint16_t keep = (1u << side.bits * fields) - 1;
    if (side.bits == 4) keep = keep << 2 | keep >> 14;
    for (int64_t i = 0; i < width; ++i) row[w * width + i] &= keep;
  }
  for (int64_t chunk = 0; chunk < side.chunks; ++chunk, codes += width) {
    const int64_t field = kept + chunk;
    if (side.bits == 3 && field == 15) {
      for (int w = 0; w < 3; ++w) {
        for (int64_t i = 0; i < width; ++i) row[w * width + i] |= (codes[i] >> w & 1) << 15;
      }
    } else if (side.bits == 3) {
      for (int64_t i = 0; i < width; ++i) row[field / 5 * width + i] |= codes[i] << 3 * (field % 5);
    } else if (side.bits == 4) {
      const int64_t shift = 4 * field + 2;
      for (int64_t i = 0; i < width; ++i) row[i] |= codes[i] << shift | codes[i] >> (16 - shift);
    } else {
      for (int64_t i = 0; i < width; ++i) row[i] |= codes[i] << side.bits * field;
    }
  }
}

// Metadata of a group with these ends: (scale, minimum) to ``meta``, and the two as they are stored.
template <class T>
inline void choose_pair(T low, T high, int64_t bits, uint16_t* meta, T& scale, T& minimum) {
  meta[0] = to_half(static_cast<float>((high - low) / static_cast<T>((1 << bits) - 1)));
  meta[1] = to_half(static_cast<float>(low));
  const T step = half_to_float(meta[0]);
  // Such a group is constant, and all its codes are 0.
  scale = step == 0 ? static_cast<T>(INFINITY) : step;
  minimum = half_to_float(meta[1]);
}

template <class T>
inline uint16_t code_of(T x, T scale, T minimum, T steps) {
  const T code = std::nearbyint((x - minimum) / scale);
  return static_cast<uint16_t>(static_cast<int32_t>(code < 0 ? T(0) : code > steps ? steps : code));
}

// True if every number is finite and, where its range becomes metadata, within fp16.
template <class T>
inline bool storable(const T* x, int64_t count, T most) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good &= std::fabs(x[i]) <= most;
  return good;
}

template <class T>
void encode_by_token(const Side& side, const T* x, uint16_t* meta, uint16_t* codes) {
  constexpr int N = kLanes<T>;
  const T steps = static_cast<T>((1 << side.bits) - 1);
  for (int64_t g = 0; g < side.groups; ++g, x += side.group, codes += side.group) {
    Reals<T> low = load<Reals<T>>(x), high = low;
    for (int64_t d = N; d < side.group; d += N) {
      low = smaller(low, load<Reals<T>>(x + d)), high = larger(high, load<Reals<T>>(x + d));
    }
    T scale, minimum;
    choose_pair<T>(-largest<T, N>(-low), largest<T, N>(high), side.bits, meta + 2 * g, scale, minimum);
    for (int64_t d = 0; d < side.group; ++d) codes[d] = code_of(x[d], scale, minimum, steps);
  }
}

// Whole groups of tokens x [group, D]; meta [D, 2], codes [group, D].
template <class T>
void encode_by_channel(const Side& side, const T* x, uint16_t* meta, uint16_t* codes, T* low, T* high) {
  const int64_t D = side.head_dim;
  const T steps = static_cast<T>((1 << side.bits) - 1);
  std::copy_n(x, D, low), std::copy_n(x, D, high);
  for (int64_t t = 1; t < side.group; ++t) {
    for (int64_t d = 0; d < D; ++d) {
      const T number = x[t * D + d];
      low[d] = number < low[d] ? number : low[d], high[d] = number > high[d] ? number : high[d];
    }
  }
  for (int64_t d = 0; d < D; ++d) choose_pair<T>(low[d], high[d], side.bits, meta + 2 * d, high[d], low[d]);
  for (int64_t t = 0; t < side.group; ++t) {
    for (int64_t d = 0; d < D; ++d) codes[t * D + d] = code_of(x[t * D + d], high[d], low[d], steps);
  }
}

// Tokens of one sequence and head; false, with nothing of the group written, where numbers cannot be stored.
template <class T>
bool pack_head(const Pack& p, int64_t b, int64_t k) {
  const Side& side = p.side;
  const int64_t D = side.head_dim, first = p.ranges[3 * b], last = p.ranges[3 * b + 1], offset = p.ranges[3 * b + 2];
  const int64_t block = side.by_channel ? side.group : 1;
  std::vector<T> x(block * D), low(D), high(D);
  std::vector<uint16_t> codes(block * D);
  for (int64_t t = first; t < last; t += block) {
    copy_tokens(p.tokens, b, k, t, offset, 0, block, D, x.data());
    if (!storable<T>(x.data(), block * D, side.bits ? T(kHalfMost) : std::numeric_limits<T>::max())) return false;
    const int64_t slot = t % side.page_tokens;
    uint8_t* record = p.pool + p.table[b * p.pages + t / side.page_tokens] * p.stride + k * p.record;
    if (side.bits == 0) {
      const T scale = static_cast<T>(p.scale), most = static_cast<T>(kFloat8Most);
      for (int64_t d = 0; d < D; ++d) {
        const float number = static_cast<float>(std::clamp<T>(x[d] / scale, -most, most));
        record[side.words_at + slot * D + d] = c10::Float8_e4m3fn(number).x;
      }
      continue;
    }
    uint16_t* meta = reinterpret_cast<uint16_t*>(record + side.meta_at);
    if (side.by_channel) {
      encode_by_channel<T>(side, x.data(), meta + slot / block * 2 * D, codes.data(), low.data(), high.data());
    } else {
      encode_by_token<T>(side, x.data(), meta + slot * 2 * side.groups, codes.data());
    }
    for (int64_t i = 0; i < block; ++i) {
      write_codes(side, reinterpret_cast<uint16_t*>(record + side.words_at), slot + i, codes.data() + i * D);
    }
  }
  return true;
}

}  // namespace kvq
