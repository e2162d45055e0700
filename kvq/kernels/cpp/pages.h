// Where the numbers of a packed page lie, and how they are read: kvq/pages/layout.py says what this follows. A side is cut
// into slices of channels, each with planes and metadata of its own; most have one.
#pragma once
#include <algorithm>
#include <limits>
#include <numeric>

#include "lanes.h"

namespace kvq {

// Channels that share an atom, and most channels of a head (sides.py refuses more).
constexpr int kAtom = 16;
constexpr int kMostHeadDim = 1024;
constexpr int kMostLevels = 16;
constexpr int fields_of(int bits) { return bits == 2 ? 8 : bits == 3 ? 16 : bits == 4 ? 4 : 2; }
constexpr int containers_of(int bits) { return bits == 3 ? 3 : 1; }

// What shares metadata: nothing, channels of a token, tokens of a channel; or channels have static numbers.
enum Axis { kNone, kToken, kChannel, kStatic };
// How metadata is stored: kvq/pages/meta.py.
enum Meta { kFloat16, kE4M3, kE8M0, kZero8, kRange8 };
// How numbers become codes, as the codecs choose them: kvq/kernels/cpp/sides.py.
enum Encoding { kReadOnly, kMinMax, kSymmetric, kUnit, kAbsMax, kBookRange, kE2M1, kCast, kStaticRange };
enum Correct { kLength, kSameLength, kLeastSquares };

// Channels [first, first + channels) of a head, in planes of ``block`` tokens; bits 0: e4m3 bytes.
struct Slice {
  int64_t words_at, meta_at, range_at, bits, axis, group, rows, chunks, width, channels, first, block, terms, meta, shared;
  static constexpr int kNumbers = 15;

  int64_t groups() const { return channels / group; }
  // Groups of a block of tokens.
  int64_t pairs() const {
    if (axis == kStatic) return channels;
    return axis == kNone ? 0 : axis == kChannel ? block / group * channels : block * groups();
  }
  int64_t block_bytes() const { return 2 * rows * containers_of(bits) * width; }
  bool by_channel() const { return axis == kChannel; }
};

// One side of a record, as ``sides.py`` writes it. The reals: a static factor, levels and the edges between them, and of
// every slice the share of a range that its codes span; then scales and offsets of channels, [K, 2, head_dim], if static.
// Beside the codes lie, added to what they name, factors A [tokens, rank] and B [blocks, head_dim, rank], and outliers:
// ``outliers`` of each token at channels of all heads, or of each channel at tokens of a block.
struct Side {
  int64_t slices, head_dim, page_tokens, norm_at, norm_shared, correct, encoding, book, rank, rank_block, token_at,
      block_at, factor_bytes, outliers, outlier_block, index_at, value_at, index_bytes;
  const Slice* slice;
  const double *reals, *levels, *edges, *clip, *statics;
  static constexpr int kNumbers = 18;

  Side(const int64_t* n, const double* r)
      : slices(n[0]), head_dim(n[1]), page_tokens(n[2]), norm_at(n[3]), norm_shared(n[4]), correct(n[5]),
        encoding(n[6]), book(n[7]), rank(n[8]), rank_block(n[9]), token_at(n[10]), block_at(n[11]), factor_bytes(n[12]),
        outliers(n[13]), outlier_block(n[14]), index_at(n[15]), value_at(n[16]), index_bytes(n[17]), slice(reinterpret_cast<const Slice*>(n + kNumbers)), reals(r), levels(r + 1),
        edges(levels + kMostLevels), clip(edges + kMostLevels - 1), statics(clip + n[0]) {}

  // Whether something is added to what codes name, so that factors of tokens cannot wait for the scores.
  bool has_terms() const { return rank || outliers; }

  double scale() const { return reals[0]; }
  // Tokens that share what is folded into their queries, which are the same for ``given`` tokens.
  int64_t span(int64_t given) const {
    for (int64_t i = 0; i < slices; ++i) given = std::gcd(given, slice[i].by_channel() ? slice[i].group : slice[i].block);
    return given;
  }
  int64_t pairs() const {
    int64_t most = 0;
    for (int64_t i = 0; i < slices; ++i) most = std::max(most, slice[i].pairs());
    return most;
  }
};

// Where a page's bytes of one head lie, and those that its heads share.
struct Record {
  uint8_t *own, *common;
  int64_t head;
  uint8_t* at(bool shared, int64_t offset) const { return (shared ? common : own) + offset; }
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

  // MASKED: without the bits of other fields.
  template <int F, bool MASKED = true>
  Ints<T> field() const {
    constexpr int MASK = MASKED ? (1 << BITS) - 1 : -1;
    if constexpr (BITS == 3 && F == 15) {
      return (container[0] >> 15) | (container[1] >> 14 & 2) | (container[2] >> 13 & 4);
    } else if constexpr (BITS == 3) {
      return container[F / 5] >> 3 * (F % 5) & MASK;
    } else {
      return container[0] >> BITS * F & MASK;
    }
  }
};

// Scales and minima of ``count`` groups as two arrays; whole vectors, which metadata fills. Where no minimum is stored,
// integers are symmetric about the middle of their range, and levels about zero.
template <class T>
void read_pairs(const Slice& s, bool book, const uint8_t* at, const uint8_t* ends, int64_t count, T* steps, T* minima) {
  constexpr int N = kLanes<T>;
  const T middle = book ? T(0) : -static_cast<T>(1 << (s.bits - 1));
  const T span = static_cast<T>(-static_cast<double>((1 << s.bits) - 1) / 255);
  for (int64_t i = 0; i < count; i += N) {
    if (s.terms == 1) {
      Reals<T> scale;
      if (s.meta == kFloat16) {
        scale = from_half<T>(load_words<T>(at + 2 * i));
      } else if (s.meta == kE4M3) {
        scale = from_e4m3<T>(load_bytes<T>(at + i));
      } else {
        for (int j = 0; j < N; ++j) scale[j] = std::ldexp(T(1), at[i + j] - 127);
      }
      store(steps + i, scale), store(minima + i, scale * middle);
      continue;
    }
    if (s.meta == kFloat16) {
      const Ints<T> pair = load<Ints<T>>(at + 4 * i);
      store(steps + i, from_half<T>(pair & 0xFFFF)), store(minima + i, from_half<T>(pair >> 16 & 0xFFFF));
      continue;
    }
    const Ints<T> pair = load_words<T>(at + 2 * i), first = pair & 0xFF, second = pair >> 8;
    if (s.meta == kE4M3) {
      store(steps + i, from_e4m3<T>(first)), store(minima + i, from_e4m3<T>(second));
      continue;
    }
    const Reals<T> scale = from_half<T>(first << 7), byte = as_reals<T>(second);
    store(steps + i, scale);
    if (s.meta == kZero8) {
      store(minima + i, scale * (byte * span));
    } else {
      // Channels of one row, which are whole vectors.
      const uint16_t* row = reinterpret_cast<const uint16_t*>(ends) + 2 * (i / s.channels);
      store(minima + i, byte * half_to<T>(row[1]) + half_to<T>(row[0]));
    }
  }
}

// Numbers that codes name: integers, or levels.
template <int BITS, bool BOOK, class T>
inline Reals<T> named(Ints<T> code, const T* levels) {
  if constexpr (!BOOK) {
    return as_reals<T>(code);
  } else {
    return looked_up<T, 1 << BITS>(levels, code);
  }
}

// Words of one block of tokens to numbers, out [block, stride] = named(code) * step + minimum.
template <int BITS, bool BOOK, int AXIS, class T>
void read_codes(const Slice& s, const uint16_t* words, const T* levels, const T* steps, const T* minima, int64_t stride,
                T* out) {
  constexpr int F = fields_of(BITS), N = kLanes<T>;
  int64_t token[F], channel[F], pair[F] = {};
  // Divisions cost as much as a vector's codes, so none stands in the loop: of channels this is the group of each atom.
  int32_t group_of[kMostHeadDim / kAtom];
  for (int f = 0; f < F; ++f) token[f] = f / s.chunks * s.rows, channel[f] = f % s.chunks * s.width;
  if (AXIS == kToken) {
    for (int64_t atom = 0; atom < s.channels / kAtom; ++atom) group_of[atom] = atom * kAtom / s.group;
  }
  const int64_t groups = AXIS == kToken ? s.groups() : 0;
  // Rows where some part's token begins a group of tokens.
  const int64_t edge = AXIS == kChannel ? std::gcd(s.rows, s.group) : 1;
  for (int64_t r = 0; r < s.rows; ++r, words += containers_of(BITS) * s.width) {
    if (AXIS == kChannel && r % edge == 0) {
      for (int f = 0; f < F; ++f) pair[f] = (token[f] + r) / s.group * s.channels + channel[f];
    }
    for (int64_t first = 0; first < s.width; first += N) {
      const Row<BITS, T> row(words, s.width, first);
      unroll<F>([&](auto f) {
        const Reals<T> number = named<BITS, BOOK, T>(row.template field<f>(), levels);
        T* target = out + (token[f] + r) * stride + channel[f] + first;
        if constexpr (AXIS == kNone) {
          store(target, number);
        } else if constexpr (AXIS == kChannel) {
          store(target, number * load<Reals<T>>(steps + pair[f] + first) + load<Reals<T>>(minima + pair[f] + first));
        } else {
          const int64_t own = (token[f] + r) * groups + group_of[(channel[f] + first) / kAtom];
          store(target, number * steps[own] + minima[own]);
        }
      });
    }
  }
}

// Calls f with whether codes name levels, how many bits they have, and their axis, as constants.
template <class F>
inline void by_kind(const Slice& s, bool book, F&& f) {
  const auto with_axis = [&](auto bits, auto levels) {
    if (s.axis == kNone) f(bits, levels, std::integral_constant<int, kNone>{});
    if (s.axis == kToken) f(bits, levels, std::integral_constant<int, kToken>{});
    if (s.axis == kChannel || s.axis == kStatic) f(bits, levels, std::integral_constant<int, kChannel>{});
  };
  const auto with_bits = [&](auto levels) {
    if (s.bits == 2) with_axis(std::integral_constant<int, 2>{}, levels);
    if (s.bits == 3) with_axis(std::integral_constant<int, 3>{}, levels);
    if (s.bits == 4) with_axis(std::integral_constant<int, 4>{}, levels);
    if constexpr (!levels) {
      if (s.bits == 8) with_axis(std::integral_constant<int, 8>{}, levels);
    }
  };
  if (book) {
    with_bits(std::true_type{});
  } else {
    with_bits(std::false_type{});
  }
}

// Scales and minima of the block of tokens from ``t``, [pairs].
template <class T>
void read_meta(const Side& side, const Slice& s, Record record, int64_t t, T* steps, T* minima) {
  const int64_t count = s.pairs(), size = s.terms * (s.meta == kFloat16 ? 2 : 1), block = t / s.block;
  if (s.axis == kStatic) {
    const double* own = side.statics + 2 * record.head * side.head_dim;
    for (int64_t c = 0; c < count; ++c) {
      steps[c] = static_cast<T>(own[c]), minima[c] = static_cast<T>(own[side.head_dim + c]);
    }
  } else if (count) {
    const int64_t rows = s.by_channel() ? s.block / s.group : 0;
    read_pairs(s, side.book, record.at(s.shared, s.meta_at + block * count * size),
               record.own + s.range_at + block * rows * 4, count, steps, minima);
  }
}

template <class T>
void read_slice(const Side& side, const Slice& s, Record record, const T* levels, T* steps, T* minima, T* out) {
  const uint8_t* bytes = record.own + s.words_at;
  if (s.bits == 0) {
    for (int64_t i = 0; i < side.page_tokens * side.head_dim; i += kLanes<T>) {
      store(out + i, from_e4m3<T>(load_bytes<T>(bytes + i)));
    }
    return;
  }
  for (int64_t t = 0; t < side.page_tokens; t += s.block, bytes += s.block_bytes()) {
    read_meta(side, s, record, t, steps, minima);
    by_kind(s, side.book, [&](auto bits, auto book, auto axis) {
      read_codes<bits, book, axis>(s, reinterpret_cast<const uint16_t*>(bytes), levels, steps, minima, side.head_dim,
                                   out + t * side.head_dim + s.first);
    });
  }
}

// One side of a head's record as numbers, out [page_tokens, head_dim], but for ``read_factors``. steps and minima: room
// for its pairs.
template <class T>
void read_page(const Side& side, Record record, T* steps, T* minima, T* out) {
  alignas(kVectorBytes) T levels[kMostLevels];
  for (int i = 0; i < kMostLevels; ++i) levels[i] = static_cast<T>(side.levels[i]);
  int64_t stored = 0;
  for (int64_t i = 0; i < side.slices; ++i) stored += side.slice[i].channels;
  // Channels of no slice are zero.
  if (stored < side.head_dim) std::fill_n(out, side.page_tokens * side.head_dim, T(0));
  for (int64_t i = 0; i < side.slices; ++i) read_slice(side, side.slice[i], record, levels, steps, minima, out);
}

// What every token of a page is multiplied with, [page_tokens]; false where that is 1.
template <class T>
bool read_factors(const Side& side, Record record, T* out) {
  const T scale = static_cast<T>(side.scale());
  if (side.norm_at < 0) {
    std::fill_n(out, side.page_tokens, scale);
    return scale != 1;
  }
  const uint8_t* at = record.at(side.norm_shared, side.norm_at);
  for (int64_t t = 0; t < side.page_tokens; t += kLanes<T>) {
    store(out + t, from_half<T>(load_words<T>(at + 2 * t)) * scale);
  }
  return true;
}

// A B^T of every block, added to out [page_tokens, head_dim]; one column of the factors after the other.
template <class T>
void add_low_rank(const Side& side, Record record, T* out) {
  constexpr int N = kLanes<T>;
  const int64_t D = side.head_dim;
  const auto number = [&](const uint8_t* at, int64_t i) {
    if (side.factor_bytes == 2) return half_to<T>(reinterpret_cast<const uint16_t*>(at)[i]);
    return from_e4m3<T>(Ints<T>{} + at[i])[0];
  };
  T column[kMostHeadDim];
  for (int64_t t = 0; t < side.page_tokens; ++t) {
    const int64_t block = t / side.rank_block;
    const uint8_t* b = record.own + side.block_at + block * D * side.rank * side.factor_bytes;
    if (t % side.rank_block) continue;
    for (int64_t r = 0; r < side.rank; ++r) {
      for (int64_t d = 0; d < D; ++d) column[d] = number(b, d * side.rank + r);
      for (int64_t i = t; i < t + side.rank_block; ++i) {
        const T weight = number(record.own + side.token_at, i * side.rank + r);
        for (int64_t d = 0; d < D; d += N) {
          store(out + i * D + d, load<Reals<T>>(out + i * D + d) + load<Reals<T>>(column + d) * weight);
        }
      }
    }
  }
}

// Outliers of a page, added to out [page_tokens, head_dim].
template <class T>
void add_outliers(const Side& side, Record record, T* out) {
  const int64_t D = side.head_dim, n = side.outliers;
  const bool by_token = side.outlier_block == 0;
  const uint8_t* index = record.at(by_token, side.index_at);
  const uint16_t* value = reinterpret_cast<const uint16_t*>(record.at(by_token, side.value_at));
  const auto place = [&](int64_t i) -> int64_t {
    return side.index_bytes == 1 ? index[i] : reinterpret_cast<const uint16_t*>(index)[i];
  };
  if (by_token) {
    const int64_t first = record.head * D;
    for (int64_t i = 0; i < side.page_tokens * n; ++i) {
      const int64_t channel = place(i) - first;
      if (channel >= 0 && channel < D) out[i / n * D + channel] += half_to<T>(value[i]);
    }
    return;
  }
  for (int64_t t = 0; t < side.page_tokens; t += side.outlier_block, out += side.outlier_block * D) {
    const int64_t block = t / side.outlier_block * D * n;
    for (int64_t i = 0; i < D * n; ++i) {
      const int64_t token = place(block + i);
      if (token < side.outlier_block) out[token * D + i / n] += half_to<T>(value[block + i]);
    }
  }
}

}  // namespace kvq
