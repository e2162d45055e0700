// One softmax over sinks | packed pages | exact tokens for the queries of every sequence and KV head. The tokens of a
// sequence are cut into splits, every split keeps a running maximum and sum (FlashDecoding), and splits are merged. Codes
// are multiplied as they lie in pages where that says all of their numbers; else a page is unpacked into a buffer that fits
// the first cache, keys first and then values in their place.
#pragma once
#include <atomic>
#include <vector>

#include "codes.h"
#include "frame.h"

namespace kvq {

// Tokens that a split takes at least: below this the merge costs more than a second core gains.
constexpr int64_t kSplitTokens = 512;
// Units of work for every thread, so that none waits long for another.
constexpr int64_t kUnits = 4;
constexpr double kLowest = -1e30;

// Columns of ``counts``, by sequence: packed keys and values, all body tokens, sinks, the first query's position, and
// what is added to a body token's number to find its key and its value.
enum Count { kPackedKeys, kPackedValues, kBody, kSinks, kPosition, kKeyOffset, kValueOffset, kCounts };

template <class T>
struct Attention {
  int64_t B, K, G, L, D, splits, page_tokens, record, stride, pages, window, bias_stride;
  const int32_t* counts;
  uint8_t* pool;
  const int64_t* table;
  Side key, value;
  Tokens keys, values, sink_keys, sink_values;
  const T *q, *sink_logits, *bias;
  T softcap;
  Frame<T> frame;
  bool folds_keys, folds_values;
  T *tops, *sums, *accs;
  int64_t M() const { return G * L; }
};

// scores [R, count] of R queries [R, D], rows of ``room`` scores; four tokens and R queries share their loads.
template <int R, class T>
void products(const T* q, const T* keys, int64_t count, int64_t D, int64_t room, T* scores) {
  constexpr int N = kLanes<T>;
  for (int64_t t = 0; t < count; t += 4) {
    const int64_t own = std::min<int64_t>(4, count - t);
    const T* k[4];
    for (int j = 0; j < 4; ++j) k[j] = keys + (t + std::min<int64_t>(j, own - 1)) * D;
    Reals<T> dots[R][4] = {};
    for (int64_t d = 0; d < D; d += N) {
      const Reals<T> k0 = load<Reals<T>>(k[0] + d), k1 = load<Reals<T>>(k[1] + d);
      const Reals<T> k2 = load<Reals<T>>(k[2] + d), k3 = load<Reals<T>>(k[3] + d);
      unroll<R>([&](auto m) {
        const Reals<T> part = load<Reals<T>>(q + m * D + d);
        dots[m][0] += part * k0, dots[m][1] += part * k1, dots[m][2] += part * k2, dots[m][3] += part * k3;
      });
    }
    // Rows have room for whole vectors, so scores beyond ``count`` may be written.
    unroll<R>([&](auto m) {
      for (int j = 0; j < 4; ++j) scores[m * room + t + j] = sum<T>(dots[m][j]);
    });
  }
}

// acc [R, D] += weights [R, count] . values [count, D]
template <int R, class T>
void add_weighted(const T* weights, int64_t room, const T* values, int64_t count, int64_t D, T* acc) {
  constexpr int N = kLanes<T>;
  for (int64_t d = 0; d < D; d += 2 * N) {
    const bool two = d + N < D;
    Reals<T> low[R], high[R] = {};
    unroll<R>([&](auto m) {
      low[m] = load<Reals<T>>(acc + m * D + d);
      if (two) high[m] = load<Reals<T>>(acc + m * D + d + N);
    });
    const T* at = values + d;
    for (int64_t t = 0; t < count; ++t, at += D) {
      const Reals<T> first = load<Reals<T>>(at), second = load<Reals<T>>(two ? at + N : at);
      unroll<R>([&](auto m) {
        const T weight = weights[m * room + t];
        low[m] += first * weight, high[m] += second * weight;
      });
    }
    unroll<R>([&](auto m) {
      store(acc + m * D + d, low[m]);
      if (two) store(acc + m * D + d + N, high[m]);
    });
  }
}

// What a thread works with; kept from call to call.
template <class T>
struct Workspace {
  std::vector<T> memory;
  T *q, *numbers, *scores, *factors;
  Turned<T> turned;
  Folded<T> folded;
  // Tokens that ``factors`` belong to, the first of those at hand.
  int64_t room, scaled;

  void reserve(const Attention<T>& a) {
    constexpr int64_t N = kLanes<T>, kRows = Turned<T>::kRows;
    const int64_t tokens = std::max({a.page_tokens, a.sink_keys.count, int64_t{4}}), M = a.M(), D = a.D;
    // Scores are written four at a time, from any token on, or by whole vectors.
    room = (tokens + 3 + N - 1) / N * N;
    const bool turns = a.frame.block && !a.frame.turns_keys;
    const int64_t rows = turns ? a.page_tokens / a.frame.block * M : 0;
    const int64_t pairs = std::max({a.key.pairs(), a.value.pairs(), a.page_tokens}), groups = D / kAtom;
    // Spans of tokens that share folded queries: whole blocks of a frame, groups of tokens.
    const int64_t spans = a.folds_keys ? a.page_tokens / a.key.span(turns ? a.frame.block : a.page_tokens) : 0;
    const std::pair<T**, int64_t> parts[] = {
        {&q, M * D}, {&numbers, room * D}, {&scores, M * room}, {&factors, room},
        {&turned.q, rows * D}, {&turned.swapped, (M + 1) * D}, {&turned.part, std::max(rows, kRows) * D},
        {&turned.bias, rows}, {&folded.steps, pairs}, {&folded.minima, pairs},
        {&folded.queries, std::max<int64_t>(spans, 1) * M * D}, {&folded.bases, spans * M},
        {&folded.sums, room * 4 * N}, {&folded.weights, groups * M * room}, {&folded.shares, groups * M}};
    int64_t total = N;
    for (const auto& [at, count] : parts) total += (count + N - 1) / N * N;
    memory.resize(total);
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory.data());
    T* next = reinterpret_cast<T*>((start + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
    for (const auto& [at, count] : parts) *at = next, next += (count + N - 1) / N * N;
  }
};

// Scores of ``count`` tokens from position ``first`` to weights, and the running maximum and sum with them.
template <class T>
void soften(const Attention<T>& a, int64_t b, int64_t first, int64_t count, Workspace<T>& w, T* top, T* sum_of, T* acc) {
  constexpr int N = kLanes<T>;
  const int64_t own = a.counts[b * kCounts + kPosition];
  const T lowest = T(kLowest);
  for (int64_t m = 0; m < a.M(); ++m) {
    T* scores = w.scores + m * w.room;
    if (a.softcap > 0) {
      for (int64_t t = 0; t < count; ++t) scores[t] = a.softcap * std::tanh(scores[t] / a.softcap);
    }
    if (a.bias) {
      const T* bias = a.bias + b * a.bias_stride + first;
      for (int64_t t = 0; t < count; ++t) scores[t] = std::max(scores[t] + bias[t], lowest);
    }
    const int64_t seen = std::clamp<int64_t>(own + m % a.L + 1 - first, 0, count);
    const int64_t unseen = a.window ? std::clamp<int64_t>(own + m % a.L + 1 - a.window - first, 0, seen) : 0;
    for (int64_t t = 0; t < unseen; ++t) scores[t] = lowest;
    for (int64_t t = seen; t < (count + N - 1) / N * N; ++t) scores[t] = lowest;
    Reals<T> most = splat(top[m]);
    for (int64_t t = 0; t < count; t += N) most = larger(most, load<Reals<T>>(scores + t));
    const T highest = largest<T, N>(most);
    if (highest <= lowest) {
      // Nothing is seen yet.
      for (int64_t t = 0; t < count; ++t) scores[t] = 0;
      continue;
    }
    Reals<T> total = {};
    for (int64_t t = 0; t < count; t += N) {
      const Reals<T> weight = exponential(load<Reals<T>>(scores + t) - highest);
      store(scores + t, weight);
      total += weight;
    }
    const T shrink = std::exp(top[m] - highest);
    top[m] = highest;
    sum_of[m] = sum_of[m] * shrink + sum<T>(total);
    if (shrink != 1) {
      for (int64_t d = 0; d < a.D; ++d) acc[m * a.D + d] *= shrink;
    }
  }
}

// Numbers of the tokens at hand times the factors of their tokens.
template <class T>
void scale_numbers(const Attention<T>& a, Workspace<T>& w) {
  for (int64_t t = 0; t < w.scaled; ++t) {
    for (int64_t d = 0; d < a.D; ++d) w.numbers[t * a.D + d] *= w.factors[t];
  }
  w.scaled = 0;
}

// Scores or weights of the tokens at hand times the factors of their tokens.
template <class T>
void scale_tokens(const Attention<T>& a, Workspace<T>& w) {
  if (!w.scaled) return;
  for (int64_t m = 0; m < a.M(); ++m) {
    T* scores = w.scores + m * w.room;
    for (int64_t t = 0; t < w.scaled; ++t) scores[t] *= w.factors[t];
  }
}

// Scores of tokens [first, last) of w.numbers by queries q.
template <class T>
void score(const Attention<T>& a, const T* q, int64_t first, int64_t last, Workspace<T>& w) {
  by_queries(a.M(), [&](int64_t m, auto R) {
    products<R>(q + m * a.D, w.numbers + first * a.D, last - first, a.D, w.room, w.scores + m * w.room + first);
  });
}

// acc += weights of tokens [first, last) of w.numbers.
template <class T>
void add(const Attention<T>& a, int64_t first, int64_t last, Workspace<T>& w, T* acc) {
  by_queries(a.M(), [&](int64_t m, auto R) {
    add_weighted<R>(w.scores + m * w.room + first, w.room, w.numbers + first * a.D, last - first, a.D, acc + m * a.D);
  });
}

// One side of a page for a head, its first ``packed`` tokens packed.
template <class T>
Record record_of(const Attention<T>& a, int64_t b, int64_t k, int64_t p) {
  uint8_t* page = a.pool + a.table[b * a.pages + p] * a.stride;
  return {page + k * a.record, page + a.K * a.record, k};
}

// Page ``p`` will be read, or the exact tokens where it would be.
template <class T>
__attribute__((always_inline)) inline void fetch(const Attention<T>& a, int64_t b, int64_t k, int64_t p) {
  const int32_t* n = a.counts + b * kCounts;
  if (p * a.page_tokens >= std::max(n[kPackedKeys], n[kPackedValues])) return;
  const Record record = record_of(a, b, k, p);
  prefetch(record.own, a.record);
}

// Numbers of a record's first ``packed`` tokens, which factors of w.factors are still to be multiplied with.
template <class T>
void read_numbers(const Attention<T>& a, const Side& side, Record record, int64_t packed, Workspace<T>& w) {
  read_page(side, record, w.folded.steps, w.folded.minima, w.numbers);
  if (read_factors(side, record, w.factors)) w.scaled = packed;
  if (side.has_terms()) {
    scale_numbers(a, w);
    if (side.rank) add_low_rank(side, record, w.numbers);
    if (side.outliers) add_outliers(side, record, w.numbers);
  }
}

// Scores of a page's first ``packed`` tokens, where exact keys stand or as their frame says.
template <class T>
void score_packed(const Attention<T>& a, int64_t b, int64_t k, int64_t p, int64_t packed, Workspace<T>& w) {
  const Frame<T>& frame = a.frame;
  const Record record = record_of(a, b, k, p);
  const int64_t block = frame.block ? b * frame.blocks + p * a.page_tokens / frame.block : 0;
  const bool turns = frame.block && !frame.turns_keys;
  if (turns) turn_queries(frame, block, (packed + frame.block - 1) / frame.block, k, w.q, a.M(), a.D, w.turned);
  const T* q = turns ? w.turned.q : w.q;
  const int64_t span = turns ? frame.block : a.page_tokens;
  if (a.folds_keys) {
    score_page_codes(a.key, record, q, span, a.M(), packed, w.room, w.scores, w.folded);
    if (read_factors(a.key, record, w.factors)) w.scaled = packed;
  } else {
    read_numbers(a, a.key, record, packed, w);
    if (frame.turns_keys) scale_numbers(a, w);
    for (int64_t t = 0; t < packed; t += span) {
      const int64_t last = std::min(t + span, packed);
      if (frame.turns_keys) {
        for (int64_t i = t; i < last; i += frame.block) {
          leave(frame, block + i / frame.block, k, std::min(frame.block, last - i), a.D, w.numbers + i * a.D, w.turned);
        }
      }
      score(a, q + t / span * a.M() * a.D, t, last, w);
    }
  }
  scale_tokens(a, w);
  w.scaled = 0;
  if (!turns || !frame.mean) return;
  for (int64_t t = 0; t < packed; t += span) {
    const int64_t last = std::min(t + span, packed);
    for (int64_t m = 0; m < a.M(); ++m) {
      const T bias = w.turned.bias[t / span * a.M() + m];
      for (int64_t i = t; i < last; ++i) w.scores[m * w.room + i] += bias;
    }
  }
}

// acc += weights of a page's first ``packed`` tokens.
template <class T>
void add_packed(const Attention<T>& a, int64_t b, int64_t k, int64_t p, int64_t packed, Workspace<T>& w, T* acc) {
  const Record record = record_of(a, b, k, p);
  if (a.folds_values) {
    if (read_factors(a.value, record, w.factors)) w.scaled = packed;
  } else {
    read_numbers(a, a.value, record, packed, w);
  }
  scale_tokens(a, w);
  w.scaled = 0;
  if (a.folds_values) {
    add_page_codes(a.value, record, w.scores, a.M(), w.room, packed, acc, w.folded);
  } else {
    add(a, 0, packed, w, acc);
  }
}

template <class T>
void attend_split(const Attention<T>& a, int64_t b, int64_t k, int64_t split, Workspace<T>& w) {
  const int32_t* n = a.counts + b * kCounts;
  const int64_t unit = (b * a.K + k) * a.splits + split, M = a.M(), D = a.D;
  T *top = a.tops + unit * M, *sum_of = a.sums + unit * M, *acc = a.accs + unit * M * D;
  std::fill_n(top, M, T(kLowest)), std::fill_n(sum_of, M, T(0)), std::fill_n(acc, M * D, T(0));
  std::memcpy(w.q, a.q + (b * a.K + k) * M * D, M * D * sizeof(T));
  if (a.frame.block) swap_pairs(a.frame, w.q, M, D, w.turned);
  const int64_t body = n[kBody], sinks = n[kSinks];
  if (split == 0 && sinks) {
    copy_tokens(a.sink_keys, b, k, 0, 0, 0, sinks, D, w.numbers);
    score(a, w.q, 0, sinks, w);
    soften(a, b, 0, sinks, w, top, sum_of, acc);
    copy_tokens(a.sink_values, b, k, 0, 0, 0, sinks, D, w.numbers);
    add(a, 0, sinks, w, acc);
  }
  // Pages before every query's window are not read.
  const int64_t hidden = a.window ? std::max<int64_t>(0, n[kPosition] + 1 - a.window - sinks) : 0;
  const int64_t start = hidden / a.page_tokens, pages = (body + a.page_tokens - 1) / a.page_tokens - start;
  fetch(a, b, k, start + pages * split / a.splits);
  for (int64_t p = start + pages * split / a.splits; p < start + pages * (split + 1) / a.splits; ++p) {
    const int64_t first = p * a.page_tokens, count = std::min(a.page_tokens, body - first);
    fetch(a, b, k, p + 1);
    const int64_t keys = std::clamp<int64_t>(n[kPackedKeys] - first, 0, count);
    const int64_t values = std::clamp<int64_t>(n[kPackedValues] - first, 0, count);
    if (keys) score_packed(a, b, k, p, keys, w);
    if (keys < count) {
      copy_tokens(a.keys, b, k, first, n[kKeyOffset], keys, count, D, w.numbers);
      score(a, w.q, keys, count, w);
    }
    soften(a, b, sinks + first, count, w, top, sum_of, acc);
    if (values) add_packed(a, b, k, p, values, w, acc);
    if (values < count) {
      copy_tokens(a.values, b, k, first, n[kValueOffset], values, count, D, w.numbers);
      add(a, values, count, w, acc);
    }
  }
}

// Partial results to out [B, K, M, D] and lse [B, K, M]; sink_logits [K, G] is one more logit.
template <class T>
void merge(const Attention<T>& a, T* out, T* lse) {
  for (int64_t i = 0; i < a.B * a.K * a.M(); ++i) {
    const int64_t head = i / a.M(), m = i % a.M();
    const T extra = a.sink_logits ? a.sink_logits[head % a.K * a.G + m / a.L] : T(kLowest);
    const T* tops = a.tops + head * a.splits * a.M() + m;
    const T* sums = a.sums + head * a.splits * a.M() + m;
    T highest = extra;
    for (int64_t s = 0; s < a.splits; ++s) highest = std::max(highest, tops[s * a.M()]);
    T* row = out + i * a.D;
    std::fill_n(row, a.D, T(0));
    if (highest <= T(kLowest)) {
      lse[i] = -INFINITY;
      continue;
    }
    T total = a.sink_logits ? std::exp(extra - highest) : T(0);
    for (int64_t s = 0; s < a.splits; ++s) {
      const T share = std::exp(tops[s * a.M()] - highest);
      const T* acc = a.accs + ((head * a.splits + s) * a.M() + m) * a.D;
      total += sums[s * a.M()] * share;
      for (int64_t d = 0; d < a.D; ++d) row[d] += acc[d] * share;
    }
    for (int64_t d = 0; d < a.D; ++d) row[d] /= total;
    lse[i] = highest + std::log(total);
  }
}

// parallel(n, f) calls f on up to n threads.
template <class T, class Parallel>
void attend(Attention<T>& a, int64_t threads, Parallel&& parallel, T* out, T* lse) {
  int64_t longest = 0;
  for (int64_t b = 0; b < a.B; ++b) longest = std::max<int64_t>(longest, a.counts[b * kCounts + kBody]);
  const int64_t wanted = threads > 1 ? (kUnits * threads + a.B * a.K - 1) / (a.B * a.K) : 1;
  a.splits = std::max<int64_t>(1, std::min(wanted, longest / kSplitTokens));
  a.folds_keys = folds(a.key, true) && !a.frame.turns_keys, a.folds_values = folds(a.value, false);
  const int64_t units = a.B * a.K * a.splits;
  std::vector<T> partial(units * a.M() * (2 + a.D));
  a.tops = partial.data(), a.sums = a.tops + units * a.M(), a.accs = a.sums + units * a.M();
  std::atomic<int64_t> next{0};
  parallel(std::min(threads, units), [&] {
    static thread_local Workspace<T> w;
    w.reserve(a);
    for (int64_t unit = next++; unit < units; unit = next++) {
      attend_split(a, unit / (a.K * a.splits), unit / a.splits % a.K, unit % a.splits, w);
    }
  });
  merge(a, out, lse);
}

}  // namespace kvq
