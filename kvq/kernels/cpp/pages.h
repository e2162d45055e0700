// Where the numbers of a packed page lie, and how they are read: kvq/pages/layout.py says what this follows.
#pragma once
#include <algorithm>
#include <numeric>

#include "lanes.h"

namespace kvq {

// Channels that share an atom, and most channels of a head (launch.py refuses more).
constexpr int kAtom = 16;
constexpr int kMostHeadDim = 1024;
constexpr int fields_of(int bits) { return bits == 2 ? 8 : bits == 3 ? 16 : bits == 4 ? 4 : 2; }
constexpr int containers_of(int bits) { return bits == 3 ? 3 : 1; }

// One side of a record, as ``launch.side_numbers`` writes it; bits 0: e4m3.
struct Side {
  int64_t words_at, meta_at, bits, by_channel, group, rows, chunks, width, head_dim, page_tokens, groups;
  static constexpr int kNumbers = 10;

  explicit Side(const int64_t* n)
      : words_at(n[0]), meta_at(n[1]), bits(n[2]), by_channel(n[3]), group(n[4]), rows(n[5]), chunks(n[6]),
        width(n[7]), head_dim(n[8]), page_tokens(n[9]), groups(n[8] / n[4]) {}

  // (scale, minimum) pairs of a page.
  int64_t pairs() const { return by_channel ? page_tokens / group * head_dim : page_tokens * groups; }
};

// All codes of the containers [first, first + lanes) of a row.
template <int BITS, class T>
struct Row {
  Ints<T> container[containers_of(BITS)];

  Row(const uint16_t* row, int64_t width, int64_t first) {
    for (int w = 0; w < containers_of(BITS); ++w) {
      container[w] = load_words<T>(row + w * width + first);
      // The nibbles lie rotated left by two bits.
      if (BITS == 4) container[w] = container[w] >> 2 | container[w] << 14;
    }
  }

  template <int F>
  Ints<T> field() const {
    if constexpr (BITS == 3 && F == 15) {
      return (container[0] >> 15) | (container[1] >> 14 & 2) | (container[2] >> 13 & 4);
    } else if constexpr (BITS == 3) {
      return container[F / 5] >> 3 * (F % 5) & 7;
    } else {
      return container[0] >> BITS * F & ((1 << BITS) - 1);
    }
  }
};

// fp16 pairs (scale, minimum) as two arrays. Reads whole vectors: records are padded beyond.
template <class T>
void read_pairs(const uint8_t* at, int64_t count, T* steps, T* minima) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Ints<T> pair = load<Ints<T>>(at + 4 * i);
    store(steps + i, from_half<T>(pair & 0xFFFF));
    store(minima + i, from_half<T>(pair >> 16 & 0xFFFF));
  }
}

// Words to numbers, out [page_tokens, head_dim] = code * step + minimum.
template <int BITS, class T>
void read_codes(const Side& side, const uint16_t* words, const T* steps, const T* minima, T* out) {
  constexpr int F = fields_of(BITS), N = kLanes<T>;
  const int64_t D = side.head_dim;
  int64_t token[F], channel[F], pair[F] = {};
  // Divisions cost as much as a vector's codes, so none stands in the loop: of channels this is the group of each atom.
  int32_t group_of[kMostHeadDim / kAtom];
  for (int f = 0; f < F; ++f) token[f] = f / side.chunks * side.rows, channel[f] = f % side.chunks * side.width;
  for (int64_t atom = 0; atom < D / kAtom; ++atom) group_of[atom] = atom * kAtom / side.group;
  // Rows where some part's token begins a group of tokens.
  const int64_t edge = std::gcd(side.rows, side.group);
  for (int64_t r = 0; r < side.rows; ++r, words += containers_of(BITS) * side.width) {
    if (side.by_channel && r % edge == 0) {
      for (int f = 0; f < F; ++f) pair[f] = (token[f] + r) / side.group * D + channel[f];
    }
    for (int64_t first = 0; first < side.width; first += N) {
      const Row<BITS, T> row(words, side.width, first);
      unroll<F>([&](auto f) {
        const Reals<T> code = as_reals<T>(row.template field<f>());
        T* target = out + (token[f] + r) * D + channel[f] + first;
        if (side.by_channel) {
          store(target, code * load<Reals<T>>(steps + pair[f] + first) + load<Reals<T>>(minima + pair[f] + first));
        } else {
          const int64_t own = (token[f] + r) * side.groups + group_of[(channel[f] + first) / kAtom];
          store(target, code * steps[own] + minima[own]);
        }
      });
    }
  }
}

// One side of a head's record as numbers, out [page_tokens, head_dim]. steps and minima: room for its pairs.
template <class T>
void read_page(const Side& side, const uint8_t* record, T scale, T* steps, T* minima, T* out) {
  const uint8_t* bytes = record + side.words_at;
  if (side.bits == 0) {
    for (int64_t i = 0; i < side.page_tokens * side.head_dim; i += kLanes<T>) {
      store(out + i, from_e4m3<T>(load_bytes<T>(bytes + i)) * scale);
    }
    return;
  }
  read_pairs(record + side.meta_at, side.pairs(), steps, minima);
  const uint16_t* words = reinterpret_cast<const uint16_t*>(bytes);
  if (side.bits == 2) read_codes<2>(side, words, steps, minima, out);
  if (side.bits == 3) read_codes<3>(side, words, steps, minima, out);
  if (side.bits == 4) read_codes<4>(side, words, steps, minima, out);
  if (side.bits == 8) read_codes<8>(side, words, steps, minima, out);
}

}  // namespace kvq
