// Passes of calibration: one over a tensor where torch takes one for each result. Arrays are [N, T, C], contiguous; row n
// belongs to group n % R of R, and column c is a channel of it. Magnitudes are compared as the integers that their bits
// are: the order is the same, and NaN comes out on top. Threads take columns or rows, and write to places of their own.
#pragma once
#include <algorithm>
#include <cstdint>

namespace kvq {

constexpr int32_t kMagnitude = 0x7FFFFFFF;
constexpr int64_t kBlock = 64;

// |x| has number (bits >> shift) - lowest, at least 0 and at most levels: ``kvq.calib.observers.magnitude``.
struct Bins {
  int32_t lowest, shift, levels;
  int32_t number(int32_t bits) const {
    return std::min(std::max(((bits & kMagnitude) >> shift) - lowest, 0), levels);
  }
};

struct Rows {
  int64_t rows, tokens, columns, groups;
};

// Columns [first, last) of x into minima and maxima, sums and sums of squares, [R, C].
inline void channel_range(Rows n, const float* __restrict x, int64_t first, int64_t last, float* __restrict low,
                          float* __restrict high, double* __restrict total, double* __restrict squares) {
  for (int64_t row = 0; row < n.rows; ++row) {
    const int64_t at = row % n.groups * n.columns;
    for (int64_t t = 0; t < n.tokens; ++t, x += n.columns) {
      for (int64_t c = first; c < last; ++c) {
        const float number = x[c];
        // A NaN is taken, and then stays.
        low[at + c] = (number < low[at + c]) | (number != number) ? number : low[at + c];
        high[at + c] = (number > high[at + c]) | (number != number) ? number : high[at + c];
      }
      for (int64_t c = first; c < last; ++c) {
        const double wide = x[c];
        total[at + c] += wide, squares[at + c] += wide * wide;
      }
    }
  }
}

// Columns [first, last) of numbers' bits counted by sign and bin, counts [R, C, 2 * levels + 1].
inline void count_signed(Rows n, const int32_t* __restrict bits, int64_t first, int64_t last, Bins bins,
                         int32_t* __restrict counts) {
  const int64_t places = 2 * bins.levels + 1;
  for (int64_t row = 0; row < n.rows; ++row) {
    int32_t* own = counts + row % n.groups * n.columns * places + bins.levels;
    for (int64_t t = 0; t < n.tokens; ++t, bits += n.columns) {
      // Bins of a block at once, which is vector code, and then the counts, which is not.
      for (int64_t block = first; block < last; block += kBlock) {
        const int64_t count = std::min(kBlock, last - block);
        int32_t place[kBlock];
        for (int64_t i = 0; i < count; ++i) {
          const int32_t number = bits[block + i], sign = number >> 31;
          place[i] = (bins.number(number) ^ sign) - sign;
        }
        for (int64_t i = 0; i < count; ++i) own[(block + i) * places + place[i]] += 1;
      }
    }
  }
}

// One row of hidden states' bits [T, C]: the largest magnitude of each token and, over valid tokens, of each channel, and
// every ``step``-th channel of valid tokens counted in [levels + 1].
inline void massive(Rows n, const int32_t* __restrict bits, const bool* valid, int64_t step, Bins bins,
                    int32_t* __restrict tokens, int32_t* __restrict channels, int64_t* __restrict counts) {
  for (int64_t t = 0; t < n.tokens; ++t, bits += n.columns) {
    int32_t top = 0;
    for (int64_t c = 0; c < n.columns; ++c) top = std::max(top, bits[c] & kMagnitude);
    tokens[t] = top;
    if (!valid[t]) continue;
    for (int64_t c = 0; c < n.columns; ++c) channels[c] = std::max(channels[c], bits[c] & kMagnitude);
    for (int64_t c = 0; c < n.columns; c += step) counts[bins.number(bits[c])] += 1;
  }
}

}  // namespace kvq
