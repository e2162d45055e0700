// Tokens in memory as the model left them, of any dtype.
#pragma once
#include <algorithm>

#include "lanes.h"

namespace kvq {

enum class Kind { kFloat, kDouble, kHalf, kBFloat16 };

// Tokens [batch, heads, tokens, head_dim] in memory, strides in bytes.
struct Tokens {
  const uint8_t* at = nullptr;
  int64_t count = 0, batch_stride = 0, head_stride = 0, token_stride = 0;
  Kind kind = Kind::kFloat;
};

template <class T>
inline void copy_token(const uint8_t* at, Kind kind, int64_t D, T* out) {
  constexpr int N = kLanes<T>;
  for (int64_t d = 0; d < D; d += N) {
    if (kind == Kind::kFloat) {
      store(out + d, converted<T, float, N>(at + 4 * d));
    } else if (kind == Kind::kDouble) {
      store(out + d, converted<T, double, N>(at + 8 * d));
    } else if (kind == Kind::kBFloat16) {
      store(out + d, scaled_bits<T>(load_words<T>(at + 2 * d) << 16, 1.0f));
    } else {
      const Ints<T> half = load_words<T>(at + 2 * d);
      // Infinity and NaN keep their exponent.
      const Ints<T> top = (half & 0x7C00) == 0x7C00 ? Ints<T>{} + 0x38000000 : Ints<T>{};
      Reals<T> number = from_half<T>(half);
      if (largest<int32_t, N>(top)) number = scaled_bits<T>(((half & 0x7FFF) << 13 | (half & 0x8000) << 16) + 2 * top, 1.0f);
      store(out + d, number);
    }
  }
}

// Tokens [first, last) of one sequence and head to their rows of out; token t lies at (t + offset) % count.
template <class T>
void copy_tokens(const Tokens& x, int64_t b, int64_t k, int64_t start, int64_t offset, int64_t first, int64_t last,
                 int64_t D, T* out) {
  const uint8_t* head = x.at + b * x.batch_stride + k * x.head_stride;
  for (int64_t t = first; t < last; ++t) {
    int64_t place = start + t + offset;
    if (place >= x.count) place %= x.count;
    copy_token(head + place * x.token_stride, x.kind, D, out + t * D);
  }
}

}  // namespace kvq
