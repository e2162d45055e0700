// One softmax over sinks | packed pages | exact tokens for the queries of every sequence and KV head. The tokens of a
// sequence are cut into splits, every split keeps a running maximum and sum (FlashDecoding), and splits are merged. A
// page is unpacked into a buffer that fits the first cache, keys first and then values in their place.
#pragma once
#include <atomic>
#include <vector>

#include "frame.h"
#include "pages.h"

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
      for (int j = 0; j < 4; ++j) scores[m * room + t + j] = sum<T, N>(dots[m][j]);
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
  T *q, *numbers, *steps, *minima, *scores, *factors;
  Turned<T> turned;
  // Tokens that ``factors`` belong to, the first of those at hand.
  int64_t room, scaled;

  void reserve(const Attention<T>& a) {
    constexpr int64_t N = kLanes<T>;
    const int64_t tokens = std::max({a.page_tokens, a.sink_keys.count, int64_t{4}});
    // Scores are written four at a time, from any token on.
    room = (tokens + 3 + N - 1) / N * N;
    const int64_t pairs = (std::max(a.key.pairs(), a.value.pairs()) + N - 1) / N * N;
    const int64_t turns = Turned<T>::room(a.M(), a.D);
    memory.resize(a.M() * a.D + room * a.D + 2 * pairs + (a.M() + 1) * room + turns + N);
    const uintptr_t start = reinterpret_cast<uintptr_t>(memory.data());
    q = reinterpret_cast<T*>((start + kVectorBytes - 1) / kVectorBytes * kVectorBytes);
    numbers = q + a.M() * a.D, steps = numbers + room * a.D, minima = steps + pairs, scores = minima + pairs;
    factors = scores + a.M() * room;
    turned.take(factors + room, a.M(), a.D);
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
    sum_of[m] = sum_of[m] * shrink + sum<T, N>(total);
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

// Let the queries see ``count`` more tokens from position ``first``; score_keys fills w.scores, read_values w.numbers.
template <class T, class Keys, class Values>
void take(const Attention<T>& a, int64_t b, int64_t first, int64_t count, Workspace<T>& w, T* top, T* sum_of, T* acc,
          Keys&& score_keys, Values&& read_values) {
  w.scaled = 0;
  score_keys();
  scale_tokens(a, w);
  soften(a, b, first, count, w, top, sum_of, acc);
  w.scaled = 0;
  read_values();
  scale_tokens(a, w);
  by_queries(a.M(), [&](int64_t m, auto R) {
    add_weighted<R>(w.scores + m * w.room, w.room, w.numbers, count, a.D, acc + m * a.D);
  });
}

// One side of page ``p`` as the queries see it: ``packed`` tokens from the page, the others exact.
template <class T>
void read_side(const Attention<T>& a, const Side& side, const Tokens& exact, int64_t b, int64_t k, int64_t p,
               int64_t packed, int64_t offset, int64_t count, Workspace<T>& w) {
  const int64_t first = p * a.page_tokens, from = std::clamp<int64_t>(packed - first, 0, count);
  if (from) {
    uint8_t* page = a.pool + a.table[b * a.pages + p] * a.stride;
    const Record record{page + k * a.record, page + a.K * a.record, k};
    read_page(side, record, w.steps, w.minima, w.numbers);
    if (read_factors(side, record, w.factors)) w.scaled = from;
    if (side.has_terms()) {
      scale_numbers(a, w);
      if (side.rank) add_low_rank(side, record, w.numbers);
      if (side.outliers) add_outliers(side, record, w.numbers);
    }
  }
  copy_tokens(exact, b, k, first, offset, from, count, a.D, w.numbers);
}

// Scores of page ``p``, whose first ``packed`` tokens stand in the frame: every block of them has queries of its own, or its
// keys leave the frame.
template <class T>
void score_page(const Attention<T>& a, int64_t b, int64_t k, int64_t p, int64_t packed, int64_t count, Workspace<T>& w) {
  const Frame<T>& frame = a.frame;
  const int64_t block = b * frame.blocks + p * a.page_tokens / std::max<int64_t>(frame.block, 1);
  if (!frame.block) packed = 0;
  if (frame.turns_keys) {
    scale_numbers(a, w);
    for (int64_t t = 0; t < packed; t += frame.block) {
      const int64_t own = std::min(frame.block, packed - t);
      leave(frame, block + t / frame.block, k, own, a.D, w.numbers + t * a.D, w.turned);
    }
    packed = 0;
  }
  for (int64_t t = 0; t < packed; t += frame.block) {
    const int64_t last = std::min(t + frame.block, packed);
    turn_queries(frame, block + t / frame.block, k, w.q, a.M(), a.D, w.turned);
    score(a, w.turned.q, t, last, w);
    for (int64_t m = 0; m < a.M(); ++m) {
      T* scores = w.scores + m * w.room;
      for (int64_t i = t; i < last; ++i) scores[i] = scores[i] * (w.scaled ? w.factors[i] : T(1)) + w.turned.bias[m];
    }
  }
  if (packed) w.scaled = 0;
  if (packed < count) score(a, w.q, packed, count, w);
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
    take(a, b, 0, sinks, w, top, sum_of, acc,
         [&] {
           copy_tokens(a.sink_keys, b, k, 0, 0, 0, sinks, D, w.numbers);
           score(a, w.q, 0, sinks, w);
         },
         [&] { copy_tokens(a.sink_values, b, k, 0, 0, 0, sinks, D, w.numbers); });
  }
  // Pages before every query's window are not read.
  const int64_t hidden = a.window ? std::max<int64_t>(0, n[kPosition] + 1 - a.window - sinks) : 0;
  const int64_t start = hidden / a.page_tokens, pages = (body + a.page_tokens - 1) / a.page_tokens - start;
  for (int64_t p = start + pages * split / a.splits; p < start + pages * (split + 1) / a.splits; ++p) {
    const int64_t first = p * a.page_tokens, count = std::min(a.page_tokens, body - first);
    take(a, b, sinks + first, count, w, top, sum_of, acc,
         [&] {
           read_side(a, a.key, a.keys, b, k, p, n[kPackedKeys], n[kKeyOffset], count, w);
           score_page(a, b, k, p, std::clamp<int64_t>(n[kPackedKeys] - first, 0, count), count, w);
         },
         [&] { read_side(a, a.value, a.values, b, k, p, n[kPackedValues], n[kValueOffset], count, w); });
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
