// Tokens into pages. The bytes are those of the codecs in torch, whose arithmetic this follows operation by operation, in
// float32 or, for float64 tokens, in float64: kvq/pages/affine.py and meta.py, kvq/codecs/book.py, float4.py and norm.py.
#pragma once
#include <vector>

#include "decode_attention.h"
#include "encode.h"

namespace kvq {

// What a pack works on: tokens of one side, and pages to write.
struct Pack {
  Side side;
  Tokens tokens;
  uint8_t* pool;
  const int64_t* table;
  int64_t B, K, pages, record, stride;
  const int32_t* ranges;  // [B, 3]: first and last token of the pages, and what is added to find one in ``tokens``.

  // Heads that must be packed together: all, where they share a number.
  int64_t heads_at_once() const {
    bool shared = side.norm_at >= 0 && side.norm_shared;
    for (int64_t i = 0; i < side.slices; ++i) shared |= side.slice[i].shared != 0;
    return shared ? K : 1;
  }
};

// Writes the codes of one token, and clears the tokens that follow it in its row of containers.
inline void write_codes(const Slice& s, uint16_t* words, int64_t slot, const uint16_t* codes) {
  const int64_t part = slot / s.rows, width = s.width, kept = part * s.chunks;
  const int containers = s.bits == 3 ? 3 : 1;
  uint16_t* row = words + slot % s.rows * containers * width;
  for (int w = 0; w < containers; ++w) {
    const int64_t fields = s.bits == 3 ? std::clamp<int64_t>(kept - 5 * w, 0, 5) : kept;
    uint16_t keep = (1u << s.bits * fields) - 1;
    if (s.bits == 4) keep = keep << 2 | keep >> 14;
    for (int64_t i = 0; i < width; ++i) row[w * width + i] &= keep;
  }
  for (int64_t chunk = 0; chunk < s.chunks; ++chunk, codes += width) {
    const int64_t field = kept + chunk;
    if (s.bits == 3 && field == 15) {
      for (int w = 0; w < 3; ++w) {
        for (int64_t i = 0; i < width; ++i) row[w * width + i] |= (codes[i] >> w & 1) << 15;
      }
    } else if (s.bits == 3) {
      for (int64_t i = 0; i < width; ++i) row[field / 5 * width + i] |= codes[i] << 3 * (field % 5);
    } else if (s.bits == 4) {
      const int64_t shift = 4 * field + 2;
      for (int64_t i = 0; i < width; ++i) row[i] |= codes[i] << shift | codes[i] >> (16 - shift);
    } else {
      for (int64_t i = 0; i < width; ++i) row[i] |= codes[i] << s.bits * field;
    }
  }
}

// True if every number is finite and, where its range becomes metadata, within that.
template <class T>
inline bool storable(const T* x, int64_t count, T most) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good &= std::fabs(x[i]) <= most;
  return good;
}

template <class T>
T storable_limit(const Side& side) {
  if (side.encoding == kCast) return std::numeric_limits<T>::max();
  const bool narrow = side.encoding == kMinMax && side.slice[0].meta == kE4M3;
  return narrow ? T(kFloat8Most) : T(kHalfMost);
}

// ``heads`` heads from ``k`` of a sequence; false, with nothing of the group written, where numbers cannot be stored.
template <class T>
bool pack_heads(const Pack& p, int64_t b, int64_t k, int64_t heads) {
  const Side& side = p.side;
  const int64_t D = side.head_dim, first = p.ranges[3 * b], last = p.ranges[3 * b + 1], offset = p.ranges[3 * b + 2];
  const int64_t block = side.slice[0].by_channel() ? side.slice[0].group : 1;
  const bool normed = side.norm_at >= 0, corrected = normed && side.correct != kLength;
  std::vector<T> x(heads * block * D), exact, sizes(normed ? heads * block : 0);
  Encoder<T> encoder(side, heads, block);
  for (int64_t t = first; t < last; t += block) {
    for (int64_t h = 0; h < heads; ++h) {
      copy_tokens(p.tokens, b, k + h, t, offset, 0, block, D, x.data() + h * block * D);
    }
    if (!storable<T>(x.data(), heads * block * D, storable_limit<T>(side))) return false;
    const int64_t slot = t % side.page_tokens;
    uint8_t* page = p.pool + p.table[b * p.pages + t / side.page_tokens] * p.stride;
    const auto record = [&](int64_t h) { return Record{page + (k + h) * p.record, page + p.K * p.record, k + h}; };
    if (corrected) exact = x;
    if (normed) take_lengths<T>(side, heads, block, x.data(), sizes.data());
    for (int64_t i = 0; i < side.slices; ++i) {
      const Slice& s = side.slice[i];
      if (side.encoding == kCast) {
        cast<T>(side, x.data(), heads, record, s.words_at + slot * D);
        continue;
      }
      encoder.encode(s, side.clip[i], x.data(), record, slot);
      for (int64_t h = 0; h < heads; ++h) {
        uint8_t* words = record(h).own + s.words_at + slot / s.block * s.block_bytes();
        for (int64_t j = 0; j < block; ++j) {
          write_codes(s, reinterpret_cast<uint16_t*>(words), slot % s.block + j,
                      encoder.codes.data() + (h * block + j) * s.channels);
        }
      }
    }
    if (corrected) correct_lengths<T>(side, heads, exact.data(), encoder.codes.data(), sizes.data());
    if (normed) {
      for (int64_t h = 0; h < (side.norm_shared ? 1 : heads); ++h) {
        uint16_t* norms = reinterpret_cast<uint16_t*>(record(h).at(side.norm_shared, side.norm_at)) + slot;
        for (int64_t j = 0; j < block; ++j) norms[j] = to_half(static_cast<float>(sizes[h * block + j]));
      }
    }
  }
  return true;
}

}  // namespace kvq
