// Vectors of a head times its matrix: what transforms of a few tokens cost, without the calls around small products.
#pragma once
#include <vector>

#include "tokens.h"

namespace kvq {

// Calls f(first, constant) for blocks of at most MOST of M queries, 1, 2 or 4.
template <int MOST = 4, class F>
inline void by_queries(int64_t M, F&& f) {
  int64_t m = 0;
  for (; m + MOST <= M; m += MOST) f(m, std::integral_constant<int, MOST>{});
  if constexpr (MOST > 3) {
    if (M - m == 3) f(m, std::integral_constant<int, 3>{});
    if (M - m == 2) f(m, std::integral_constant<int, 2>{});
  }
  if constexpr (MOST > 1) {
    if (M - m == 1) f(m, std::integral_constant<int, 1>{});
  }
}

// out [R, D] = offset + x [R, D] . matrix [D, D], whose rows R vectors share; offset [D] or null.
template <int R, class T>
void times_matrix(const T* x, const T* matrix, const T* offset, int64_t D, T* out) {
  constexpr int N = kLanes<T>;
  for (int64_t d = 0; d < D; d += 2 * N) {
    const bool two = d + N < D;
    const int64_t next = two ? d + N : d;
    Reals<T> low[R], high[R];
    unroll<R>([&](auto m) {
      low[m] = offset ? load<Reals<T>>(offset + d) : Reals<T>{};
      high[m] = offset ? load<Reals<T>>(offset + next) : Reals<T>{};
    });
    const T* row = matrix;
    for (int64_t i = 0; i < D; ++i, row += D) {
      const Reals<T> first = load<Reals<T>>(row + d), second = load<Reals<T>>(row + next);
      unroll<R>([&](auto m) { low[m] += first * x[m * D + i], high[m] += second * x[m * D + i]; });
    }
    unroll<R>([&](auto m) {
      store(out + m * D + d, low[m]);
      if (two) store(out + m * D + next, high[m]);
    });
  }
}

template <class T>
void times_matrix(const T* x, int64_t M, const T* matrix, const T* offset, int64_t D, T* out) {
  by_queries(M, [&](int64_t m, auto R) { times_matrix<R>(x + m * D, matrix, offset, D, out + m * D); });
}

// Every head of x [B, K, M, D] times its matrix of [K, D, D], plus its offset of [K, D]; out [B, K, M, D], contiguous.
template <class T>
void product(const Tokens& x, int64_t B, int64_t K, int64_t D, const T* matrix, const T* offset, T* out) {
  std::vector<T> own(x.count * D);
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t k = 0; k < K; ++k, out += x.count * D) {
      copy_tokens(x, b, k, 0, 0, 0, x.count, D, own.data());
      times_matrix(own.data(), x.count, matrix + k * D * D, offset ? offset + k * D : nullptr, D, out);
    }
  }
}

}  // namespace kvq
