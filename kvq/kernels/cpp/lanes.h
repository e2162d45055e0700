// Vectors of the machine's width, in the extension that GCC and Clang share. No fast-math: minus infinity and NaN mean
// what they say, and products round as written except where a multiply and an add become one instruction.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace kvq {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;
// Numbers of a vector: they divide the 16 channels of an atom.
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <class T>
using Reals = Vector<T, kLanes<T>>;
template <class T>
using Ints = Vector<int32_t, kLanes<T>>;

template <class V>
inline V load(const void* at) {
  V v;
  std::memcpy(&v, at, sizeof v);
  return v;
}

template <class V>
inline void store(void* at, V v) {
  std::memcpy(at, &v, sizeof v);
}

// Memory that is read soon: pages are small and lie anywhere, so the processor does not foresee them.
// GCC drops calls of functions that do nothing else.
__attribute__((always_inline)) inline void prefetch(const void* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i, 0, 2);
}

template <class T>
inline Reals<T> splat(T x) {
  return x - Reals<T>{};
}

// Lanes of another type. A loop, which GCC turns into one instruction where __builtin_convertvector takes it apart.
template <class To, class From, int N>
inline Vector<To, N> converted(const void* at) {
  From from[N];
  To to[N];
  std::memcpy(from, at, sizeof from);
  for (int i = 0; i < N; ++i) to[i] = static_cast<To>(from[i]);
  return load<Vector<To, N>>(to);
}

// Lanes' numbers from 16-bit or 8-bit memory, without a sign.
template <class T>
inline Ints<T> load_words(const void* at) {
  return converted<int32_t, uint16_t, kLanes<T>>(at);
}

template <class T>
inline Ints<T> load_bytes(const void* at) {
  return converted<int32_t, uint8_t, kLanes<T>>(at);
}

template <class T>
inline Reals<T> as_reals(Ints<T> v) {
  return converted<T, int32_t, kLanes<T>>(&v);
}

// float32 numbers from their bits, times a power of two that moves the exponent, as T.
template <class T>
inline Reals<T> scaled_bits(Ints<T> bits, float factor) {
  const auto floats = load<Vector<float, kLanes<T>>>(&bits) * factor;
  return converted<T, float, kLanes<T>>(&floats);
}

// fp16 numbers from their bits: exponent and fraction moved into place, the offset multiplied away.
template <class T>
inline Reals<T> from_half(Ints<T> half) {
  return scaled_bits<T>((half & 0x7FFF) << 13 | (half & 0x8000) << 16, 0x1p112f);
}

template <class T>
inline T half_to(uint16_t half) {
  const int32_t bits = (half & 0x7FFF) << 13 | (half & 0x8000) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return static_cast<T>(number * 0x1p112f);
}

// Lane i of the answer is table[index[i]]; a table has room for 16 numbers.
template <class T, int SIZE>
inline Reals<T> looked_up(const T* table, Ints<T> index) {
  constexpr int N = kLanes<T>;
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (sizeof(T) == 4 && SIZE <= N) return __builtin_shuffle(load<Reals<T>>(table), index);
  if constexpr (sizeof(T) == 4 && SIZE == 2 * N) {
    return __builtin_shuffle(load<Reals<T>>(table), load<Reals<T>>(table + N), index);
  }
#endif
  T found[N];
  for (int i = 0; i < N; ++i) found[i] = table[index[i]];
  return load<Reals<T>>(found);
}

// E4M3 numbers from their bits; the code of NaN is never stored.
template <class T>
inline Reals<T> from_e4m3(Ints<T> byte) {
  return scaled_bits<T>((byte & 0x7F) << 20 | (byte & 0x80) << 24, 0x1p120f);
}

template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline V smaller(V a, V b) {
  return a < b ? a : b;
}

// Lanes of a and b in turns, OTHER of each: those of its own place, or, OTHER negative, of the place across.
#if defined(__GNUC__) && !defined(__clang__)
template <int OTHER, class T, int... I>
inline Reals<T> halves(Reals<T> a, Reals<T> b, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I), HALF = OTHER < 0 ? -OTHER : OTHER;
  using Mask = std::conditional_t<sizeof(T) == 4, Vector<int32_t, N>, Vector<int64_t, N>>;
  return __builtin_shuffle(a, b, Mask{(I & HALF ? N : 0) + (OTHER < 0 ? I ^ HALF : I)...});
}
#else
template <int OTHER, class T, int... I>
inline Reals<T> halves(Reals<T> a, Reals<T> b, std::integer_sequence<int, I...>) {
  constexpr int N = sizeof...(I), HALF = OTHER < 0 ? -OTHER : OTHER;
  return __builtin_shufflevector(a, b, ((I & HALF ? N : 0) + (OTHER < 0 ? I ^ HALF : I))...);
}
#endif

// Sum of all lanes.
template <class T, int HALF = kLanes<T> / 2>
inline T sum(Reals<T> v) {
  if constexpr (HALF == 0) {
    return v[0];
  } else {
    return sum<T, HALF / 2>(v + halves<-HALF, T>(v, v, std::make_integer_sequence<int, kLanes<T>>{}));
  }
}

// Sum of ``count`` products, or of as many numbers.
template <class T>
inline T dot(const T* a, const T* b, int64_t count) {
  constexpr int N = kLanes<T>;
  Reals<T> whole = {};
  int64_t i = 0;
  for (; i + N <= count; i += N) whole += load<Reals<T>>(a + i) * load<Reals<T>>(b + i);
  T found = sum<T>(whole);
  for (; i < count; ++i) found += a[i] * b[i];
  return found;
}

template <class T>
inline T total(const T* a, int64_t count) {
  constexpr int N = kLanes<T>;
  Reals<T> whole = {};
  int64_t i = 0;
  for (; i + N <= count; i += N) whole += load<Reals<T>>(a + i);
  T found = sum<T>(whole);
  for (; i < count; ++i) found += a[i];
  return found;
}

template <class T, int N>
inline T largest(Vector<T, N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    typedef Vector<T, N / 2> Half;
    const char* at = reinterpret_cast<const char*>(&v);
    return largest<T, N / 2>(larger(load<Half>(at), load<Half>(at + sizeof(Half))));
  }
}

// Calls f with the constants 0 ... N - 1.
template <class F, int... I>
inline void unrolled(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

template <int N, class F>
inline void unroll(F&& f) {
  unrolled(std::forward<F>(f), std::make_integer_sequence<int, N>{});
}

// exp of numbers that are 0 or less: 2^n times the series of e^r with r at most ln(2)/2, whose eight terms reach float32.
// What float32 cannot hold becomes 0.
inline Reals<float> exponential(Reals<float> x) {
  constexpr int N = kLanes<float>;
  x = larger(x, splat(-87.0f));
  // Adding 1.5 * 2^23 leaves the nearest whole number in the low bits.
  const Reals<float> shifted = x * 1.4426950408889634f + 12582912.0f;
  const Reals<float> n = shifted - 12582912.0f;
  const Reals<float> r = x + n * -0.693359375f + n * 2.12194440e-4f;
  Reals<float> series = splat(1.0f / 5040);
  for (float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * r + term;
  const Vector<int32_t, N> power = (converted<int32_t, float, N>(&n) + 127) << 23;
  return x > splat(-87.0f) ? series * load<Reals<float>>(&power) : Reals<float>{};
}

inline Reals<double> exponential(Reals<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

}  // namespace kvq
