// Products with codes as they lie in pages: what multiplies them is folded into the other factor beforehand, so a code
// costs a shift, a look-up and a product a query, and no number is written down.
#pragma once
#include "pages.h"
#include "product.h"

namespace kvq {

// Tables of 16 numbers are one instruction where a vector has as many lanes, and its index needs no mask.
template <class T>
constexpr bool kTables = kLanes<T> == 16;

// Lane i of the answer is the sum of the lanes of vector i of COUNT, ``stride`` numbers apart; lanes i + COUNT, ... add up
// the rest of them.
template <class T, int COUNT = kLanes<T>>
inline Reals<T> sums(const T* at, int64_t stride) {
  if constexpr (COUNT == 1) {
    return load<Reals<T>>(at);
  } else {
    constexpr int HALF = COUNT / 2;
    const Reals<T> a = sums<T, HALF>(at, stride), b = sums<T, HALF>(at + HALF * stride, stride);
    constexpr auto lanes = std::make_integer_sequence<int, kLanes<T>>{};
    return halves<HALF, T>(a, b, lanes) + halves<-HALF, T>(a, b, lanes);
  }
}

// What codes of ``bits`` name, [16] or more: levels, or the codes themselves, again and again.
template <class T>
inline void make_table(const Side& side, int64_t bits, T* table) {
  for (int i = 0; i < kMostLevels; ++i) {
    const int code = i & ((1 << bits) - 1);
    table[i] = side.book ? static_cast<T>(side.levels[code]) : static_cast<T>(code);
  }
}

template <int F, bool BOOK, int BITS, class T>
inline Reals<T> number_of(const Row<BITS, T>& row, const T* table) {
  if constexpr (kTables<T> && BITS <= 4) {
    return looked_up<T, kMostLevels>(table, row.template field<F, false>());
  } else {
    return named<BITS, BOOK, T>(row.template field<F>(), table);
  }
}

// Calls f with whether codes name levels, how many bits they have, and the chunks of a token, as constants.
template <class T, class F>
inline void by_form(const Slice& s, bool book, F&& f) {
  const auto with_chunks = [&](auto levels, auto bits) {
    const auto with = [&](auto chunks) {
      if constexpr (chunks <= fields_of(bits)) f(levels, bits, chunks);
    };
    if (s.chunks == 1) with(std::integral_constant<int, 1>{});
    if (s.chunks == 2) with(std::integral_constant<int, 2>{});
    if (s.chunks == 4) with(std::integral_constant<int, 4>{});
    if (s.chunks == 8) with(std::integral_constant<int, 8>{});
    if (s.chunks == 16) with(std::integral_constant<int, 16>{});
  };
  const auto with_bits = [&](auto levels) {
    if (s.bits == 2) with_chunks(levels, std::integral_constant<int, 2>{});
    if (s.bits == 3) with_chunks(levels, std::integral_constant<int, 3>{});
    if (s.bits == 4) with_chunks(levels, std::integral_constant<int, 4>{});
    if constexpr (!levels) {
      if (s.bits == 8) with_chunks(levels, std::integral_constant<int, 8>{});
    }
  };
  if constexpr (!kTables<T>) {
    if (book) return with_bits(std::true_type{});
  }
  with_bits(std::false_type{});
}

// Queries that share a look-up. Float64 has a kernel for one: it checks others and need not be fast.
template <class T>
constexpr int kShared = sizeof(T) == 4 ? 4 : 1;

// Adds to sums [block, R, lanes] the products of a block's codes with R queries, whose rows ``q`` of head_dim are its own for
// every ``span`` tokens, ``stride`` numbers apart; ``fresh``: sums begin here.
template <int BITS, bool BOOK, int CHUNKS, int R, class T>
void score_codes(const Slice& s, const uint16_t* words, const T* table, const T* q, int64_t D, int64_t span,
                 int64_t stride, bool fresh, T* sums) {
  constexpr int PARTS = fields_of(BITS) / CHUNKS, N = kLanes<T>;
  alignas(kVectorBytes) static constexpr T kZeros[R * N] = {};
  const T* own[PARTS];
  const int64_t edge = std::gcd(s.rows, span), part = s.rows * R * N;
  int64_t next = 0;
  for (int64_t r = 0; r < s.rows; ++r, words += containers_of(BITS) * s.width, sums += R * N) {
    if (r == next) {
      for (int p = 0; p < PARTS; ++p) own[p] = q + (p * s.rows + r) / span * stride;
      next += edge;
    }
    for (int64_t first = 0; first < s.width; first += N) {
      const Row<BITS, T> row(words, s.width, first);
      const bool begins = fresh && first == 0;
      T* target = sums;
      unroll<PARTS>([&](auto p) {
        const T *before = begins ? kZeros : target, *query = own[p] + first;
        Reals<T> dots[R];
        unroll<R>([&](auto m) { dots[m] = load<Reals<T>>(before + m * N); });
        unroll<CHUNKS>([&](auto c) {
          const Reals<T> number = number_of<p * CHUNKS + c, BOOK>(row, table);
          unroll<R>([&](auto m) { dots[m] += number * load<Reals<T>>(query + m * D); });
          query += s.width;
        });
        unroll<R>([&](auto m) { store(target + m * N, dots[m]); });
        target += part;
      });
    }
  }
}

// acc [R, D] += weights . codes of a block. Group g of channels has weights of its own, [R, room] at ``g * stride``.
template <int BITS, bool BOOK, int CHUNKS, int R, class T>
void add_codes(const Slice& s, const uint16_t* words, const T* table, const T* weights, int64_t room, int64_t group,
               int64_t stride, int64_t D, T* acc) {
  constexpr int PARTS = fields_of(BITS) / CHUNKS, N = kLanes<T>;
  for (int64_t first = 0; first < s.width; first += N) {
    Reals<T> total[CHUNKS][R];
    const T* own[CHUNKS];
    unroll<CHUNKS>([&](auto c) {
      own[c] = weights + (c * s.width + first) / group * stride;
      unroll<R>([&](auto m) { total[c][m] = load<Reals<T>>(acc + m * D + c * s.width + first); });
    });
    const uint16_t* at = words;
    for (int64_t r = 0; r < s.rows; ++r, at += containers_of(BITS) * s.width) {
      const Row<BITS, T> row(at, s.width, first);
      unroll<PARTS>([&](auto p) {
        const int64_t token = p * s.rows + r;
        unroll<CHUNKS>([&](auto c) {
          const Reals<T> number = number_of<p * CHUNKS + c, BOOK>(row, table);
          unroll<R>([&](auto m) { total[c][m] += number * own[c][m * room + token]; });
        });
      });
    }
    unroll<CHUNKS>([&](auto c) {
      unroll<R>([&](auto m) { store(acc + m * D + c * s.width + first, total[c][m]); });
    });
  }
}

// Whether products with a side's codes need no numbers of it: metadata belongs to what a product sums over whole, or can be
// taken out of the sum.
inline bool folds(const Side& side, bool keys) {
  bool good = !side.has_terms();
  for (int64_t i = 0; i < side.slices; ++i) {
    const Slice& s = side.slice[i];
    good &= s.bits != 0;
    if (keys && s.axis == kToken) good &= side.slices == 1 && s.groups() == 1;
    if (!keys && s.axis == kChannel) good &= s.group == s.block;
  }
  return good;
}

// Room for what a page's codes are multiplied with.
template <class T>
struct Folded {
  T *steps, *minima, *queries, *bases, *sums, *weights, *shares;
};

// Scores [M, room] of a page's first ``packed`` tokens. Every ``span`` tokens have queries of their own, q [spans, M, D].
template <class T>
void score_page_codes(const Side& side, Record record, const T* q, int64_t span, int64_t M, int64_t packed, int64_t room,
                      T* scores, Folded<T>& w) {
  constexpr int N = kLanes<T>;
  const int64_t D = side.head_dim, given = span;
  const bool by_token = side.slice[0].axis == kToken;
  bool folded = false;
  span = side.span(span);
  for (int64_t i = 0; i < side.slices; ++i) folded |= side.slice[i].by_channel() || side.slice[i].axis == kStatic;
  const auto source = [&](int64_t t) { return q + t / given * M * D; };
  std::fill_n(w.bases, (packed + span - 1) / span * M, T(0));
  for (int64_t i = 0; i < side.slices; ++i) {
    const Slice& s = side.slice[i];
    for (int64_t start = 0; start < packed; start += s.block) {
      read_meta(side, s, record, start, w.steps + (by_token ? start : 0), w.minima + (by_token ? start : 0));
      for (int64_t t = start; t < std::min(start + s.block, packed); t += span) {
        T *own = w.queries + t / span * M * D + s.first, *base = w.bases + t / span * M;
        const T* from = source(t) + s.first;
        if (by_token) {
          for (int64_t m = 0; m < M; ++m) base[m] = total(from + m * D, D);
        }
        if (!folded && span == given) continue;
        const int64_t pair = s.by_channel() ? (t - start) / s.group * s.channels : 0;
        const bool scaled = s.by_channel() || s.axis == kStatic;
        for (int64_t m = 0; m < M; ++m, own += D, from += D) {
          if (!scaled) {
            std::copy_n(from, s.channels, own);
            continue;
          }
          for (int64_t c = 0; c < s.channels; ++c) own[c] = from[c] * w.steps[pair + c];
          base[m] += dot(from, w.minima + pair, s.channels);
        }
      }
    }
  }
  const T* queries = folded || span != given ? w.queries : q;
  alignas(kVectorBytes) T table[kMostLevels];
  by_queries<kShared<T>>(M, [&](int64_t m, auto R) {
    for (int64_t i = 0; i < side.slices; ++i) {
      const Slice& s = side.slice[i];
      make_table(side, s.bits, table);
      by_form<T>(s, side.book, [&](auto book, auto bits, auto chunks) {
        const uint8_t* words = record.own + s.words_at;
        for (int64_t t = 0; t < packed; t += s.block, words += s.block_bytes()) {
          score_codes<bits, book, chunks, R>(s, reinterpret_cast<const uint16_t*>(words), table,
                                             queries + (t / span * M + m) * D + s.first, D, span, M * D, i == 0,
                                             w.sums + t * R * N);
        }
      });
    }
    for (int64_t j = 0; j < R; ++j) {
      T* own = scores + (m + j) * room;
      for (int64_t t = 0; t < packed; t += N) store(own + t, sums<T>(w.sums + (t * R + j) * N, R * N));
      const T* bases = w.bases + m + j;
      for (int64_t t = 0; t < packed; t += span, bases += M) {
        const int64_t last = std::min(t + span, packed);
        const T base = *bases;
        if (by_token) {
          for (int64_t k = t; k < last; ++k) own[k] = own[k] * w.steps[k] + w.minima[k] * base;
        } else {
          for (int64_t k = t; k < last; ++k) own[k] += base;
        }
      }
    }
  });
}

// acc [M, D] += weights [M, room] . a page's first ``packed`` tokens.
template <class T>
void add_page_codes(const Side& side, Record record, const T* weights, int64_t M, int64_t room, int64_t packed, T* acc,
                    Folded<T>& w) {
  const int64_t D = side.head_dim;
  alignas(kVectorBytes) T table[kMostLevels];
  for (int64_t i = 0; i < side.slices; ++i) {
    const Slice& s = side.slice[i];
    const bool by_token = s.axis == kToken, by_channel = s.by_channel() || s.axis == kStatic;
    const int64_t groups = by_token ? s.groups() : 1, group = by_token ? s.group : s.channels;
    make_table(side, s.bits, table);
    const uint8_t* words = record.own + s.words_at;
    for (int64_t start = 0; start < packed; start += s.block, words += s.block_bytes()) {
      const int64_t own = std::min(packed - start, s.block);
      read_meta(side, s, record, start, w.steps, w.minima);
      // What lies behind the last token may be anything.
      for (int64_t g = 0; g < groups; ++g) {
        if (by_token && groups > 1) {
          // Numbers of one group, side by side.
          for (int64_t t = 0; t < own; ++t) w.sums[t] = w.steps[t * groups + g], w.sums[room + t] = w.minima[t * groups + g];
        }
        const T *steps = groups > 1 ? w.sums : w.steps, *minima = groups > 1 ? w.sums + room : w.minima;
        for (int64_t m = 0; m < M; ++m) {
          T *scaled = w.weights + (g * M + m) * room, *share = w.shares + g * M + m;
          const T* from = weights + m * room + start;
          if (by_token) {
            *share = dot(from, minima, own);
            for (int64_t t = 0; t < own; ++t) scaled[t] = from[t] * steps[t];
          } else {
            *share = by_channel ? total(from, own) : T(0);
            std::copy_n(from, own, scaled);
          }
          std::fill(scaled + own, scaled + s.block, T(0));
        }
      }
      T* target = by_channel ? w.queries : acc + s.first;
      if (by_channel) std::fill_n(target, M * D, T(0));
      by_form<T>(s, side.book, [&](auto book, auto bits, auto chunks) {
        by_queries<std::clamp(16 / chunks, 1, kShared<T>)>(M, [&](int64_t m, auto R) {
          add_codes<bits, book, chunks, R>(s, reinterpret_cast<const uint16_t*>(words), table, w.weights + m * room, room,
                                           group, M * room, D, target + m * D);
        });
      });
      for (int64_t m = 0; m < M; ++m) {
        T* row = acc + m * D + s.first;
        if (by_channel) {
          for (int64_t c = 0; c < s.channels; ++c) row[c] += w.queries[m * D + c] * w.steps[c] + w.shares[m] * w.minima[c];
        } else if (by_token) {
          for (int64_t g = 0; g < groups; ++g, row += group) {
            for (int64_t c = 0; c < group; ++c) row[c] += w.shares[g * M + m];
          }
        }
      }
    }
  }
}

}  // namespace kvq
