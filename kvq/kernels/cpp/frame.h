// Keys that stand relative to their block (kvq/transforms/frame.py): with t[c] = cos[c] q[c] + sin[c] q[partner[c]] of the
// block's origin, q . key = (t M) . stored + t . mean. Queries are turned for a block, or the keys of one that is shorter
// than there are queries.
#pragma once
#include "product.h"

namespace kvq {

// cos, sin [batch * blocks, D]; matrix M [K, D, D], transposed where keys are turned, and mean [K, D], or null.
template <class T>
struct Frame {
  int64_t block = 0, blocks = 0;  // Tokens of a block, 0: there is no frame; blocks of a row.
  bool turns_keys = false;
  const T *cos = nullptr, *sin = nullptr, *matrix = nullptr, *mean = nullptr;
  const int64_t* partner = nullptr;
};

// Turned queries of a page's blocks, [blocks, M, D], and what is added to their scores; room for keys.
template <class T>
struct Turned {
  static constexpr int64_t kRows = 16;
  T *q, *swapped, *part, *bias;
};

// Queries with the channels of every rotary pair exchanged.
template <class T>
void swap_pairs(const Frame<T>& f, const T* q, int64_t M, int64_t D, Turned<T>& w) {
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t d = 0; d < D; ++d) w.swapped[m * D + d] = q[m * D + f.partner[d]];
  }
}

// Queries [M, D] as the keys of ``count`` blocks are read with, and what is added to their scores.
template <class T>
void turn_queries(const Frame<T>& f, int64_t block, int64_t count, int64_t k, const T* q, int64_t M, int64_t D,
                  Turned<T>& w) {
  T* turned = f.matrix ? w.part : w.q;
  for (int64_t i = 0; i < count; ++i) {
    const T *cos = f.cos + (block + i) * D, *sin = f.sin + (block + i) * D;
    for (int64_t m = 0; m < M; ++m) {
      T* own = turned + (i * M + m) * D;
      for (int64_t d = 0; d < D; ++d) own[d] = cos[d] * q[m * D + d] + sin[d] * w.swapped[m * D + d];
      w.bias[i * M + m] = f.mean ? dot(own, f.mean + k * D, D) : T(0);
    }
  }
  if (f.matrix) times_matrix<T>(w.part, count * M, f.matrix + k * D * D, nullptr, D, w.q);
}

// ``count`` keys of a block, as they are read, to where exact ones stand.
template <class T>
void leave(const Frame<T>& f, int64_t block, int64_t k, int64_t count, int64_t D, T* keys, Turned<T>& w) {
  const T *cos = f.cos + block * D, *sin = f.sin + block * D;
  constexpr int64_t kRows = Turned<T>::kRows;
  for (int64_t t = 0; t < count; t += kRows) {
    const int64_t own = std::min(kRows, count - t);
    T* rows = keys + t * D;
    if (f.matrix) {
      times_matrix<T>(rows, own, f.matrix + k * D * D, f.mean ? f.mean + k * D : nullptr, D, w.part);
    } else {
      std::copy_n(rows, own * D, w.part);
    }
    for (int64_t i = 0; i < own; ++i) {
      const T* key = w.part + i * D;
      for (int64_t d = 0; d < D; ++d) w.swapped[d] = sin[d] * key[d];
      for (int64_t d = 0; d < D; ++d) rows[i * D + d] = cos[d] * key[d] + w.swapped[f.partner[d]];
    }
  }
}

}  // namespace kvq
