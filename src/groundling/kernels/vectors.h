// Vectors of floats as wide as the CPU has them, and the number formats of weights read into them.
//
// Invariant: every function gives the same bits wherever it is used: products are fused with sums explicitly,
// sums over lanes have one order.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// Compilers widen short vectors clumsily where one instruction does it.
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace groundling {

// Lanes of a vector, and the tile of outputs (weight rows x tokens) whose sums stay in registers beside the
// operands: there are 16 with AVX2, 32 with AVX-512 and NEON.
#if defined(GROUNDLING_LANES)  // the tests' way to other CPUs' lanes, in plain C++: with -mno-avx
constexpr int kLanes = GROUNDLING_LANES, kTileRows = 4;
#elif defined(__AVX512F__)
constexpr int kLanes = 16, kTileRows = 4;
#elif defined(__AVX__)
constexpr int kLanes = 8, kTileRows = 2;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kTileRows = 4;
#else
constexpr int kLanes = 4, kTileRows = 2;
#endif
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

template <class V>
inline V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);  // unaligned
  return value;
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

// Asks for what a sweep over memory comes to next. The CPU's own prefetching stops at each page of 4 KiB; of 1,024 to 8,192
// bytes ahead these were the best (LOG.md).
inline void fetch_ahead(const float* from) { __builtin_prefetch(reinterpret_cast<const char*>(from) + 2048); }

// The first n lanes, where there may be no more; the others are 0.
inline Vec load_some(const float* from, int64_t n) {
  if (n >= kLanes) return load<Vec>(from);
  Vec value{};
  std::memcpy(&value, from, n * sizeof(float));
  return value;
}

inline void store_some(float* to, Vec value, int64_t n) {
  if (n >= kLanes) return store(to, value);
  std::memcpy(to, &value, n * sizeof(float));
}

// Stores past the caches, for what is not read soon: a line of 64 bytes that is written whole need not be read first, nor
// displace another. `streamed` comes before any other thread reads it.
inline void stream_some(float* to, Vec value, int64_t n) {
#if defined(__AVX__)
  if (n >= kLanes && reinterpret_cast<uintptr_t>(to) % sizeof(Vec) == 0) {
#if defined(__AVX512F__)
    return _mm512_stream_ps(to, (__m512)value);
#else
    return _mm256_stream_ps(to, (__m256)value);
#endif
  }
#endif
  store_some(to, value, n);
}

inline void streamed() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// a * b + c, rounded once: spelled out, because compilers contract the sum in some tiles and not in others.
inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// Holds a value in a register: compilers would rather load it again for each use, and loads are scarcer than sums.
inline void in_register(Vec& value) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(value));
#elif defined(__AVX__)
  __asm__("" : "+x"(value));
#else
  (void)value;
#endif
}

inline Vec splat(float value) { return value - Vec{}; }

inline Vec square_root(Vec value) {
#if defined(__AVX512F__)
  return (Vec)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX__)
  return (Vec)_mm256_sqrt_ps((__m256)value);
#elif defined(__aarch64__)
  return (Vec)vsqrtq_f32((float32x4_t)value);
#else
  for (int lane = 0; lane < kLanes; ++lane) value[lane] = std::sqrt(value[lane]);
  return value;
#endif
}

#if defined(__AVX__)
// The upper lanes added to the lower ones, down to the given width.
inline __m256 folded(Vec value) {
#if defined(__AVX512F__)
  const __m512d whole = (__m512d)value;
  return (__m256)(_mm512_castpd512_pd256(whole)) + (__m256)(_mm512_extractf64x4_pd(whole, 1));
#else
  return (__m256)value;
#endif
}

inline __m128 folded_twice(Vec value) {
  const __m256 half = folded(value);
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#endif

// The sum of the lanes, upper half onto lower half until one is left.
inline float sum(Vec value) {
#if defined(__AVX__)
  __m128 quarter = folded_twice(value);
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_shuffle_ps(quarter, quarter, 1)));
#else
  float lanes[kLanes];
  store(lanes, value);
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
#endif
}

inline float maximum(Vec value) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)value);
#else
  float lanes[kLanes];
  store(lanes, value);
  return *std::max_element(lanes, lanes + kLanes);
#endif
}

// The sums of several vectors, each to the bit what `sum` gives: eight or four together, a vector's lanes beside the
// others', take half the instructions.
template <int kCount>
inline void sums(const Vec* values, float* to) {
  int i = 0;
#if defined(__AVX__)
#pragma GCC unroll 8
  for (; i + 8 <= kCount; i += 8) {
    __m256 pairs[4];  // four lanes of i + k beside four of i + k + 4
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const __m256 one = folded(values[i + k]), other = folded(values[i + k + 4]);
      pairs[k] = _mm256_add_ps(_mm256_permute2f128_ps(one, other, 0x20), _mm256_permute2f128_ps(one, other, 0x31));
    }
    const auto fours = [&](int k) {  // two lanes of each of four
      return _mm256_add_ps(_mm256_shuffle_ps(pairs[k], pairs[k + 1], 0x44),
                           _mm256_shuffle_ps(pairs[k], pairs[k + 1], 0xee));
    };
    const __m256 one = fours(0), other = fours(2);
    _mm256_storeu_ps(to + i, _mm256_add_ps(_mm256_shuffle_ps(one, other, 0x88), _mm256_shuffle_ps(one, other, 0xdd)));
  }
#pragma GCC unroll 8
  for (; i + 4 <= kCount; i += 4) {
    const auto twos = [&](int k) {  // two lanes of each of two
      const __m128 one = folded_twice(values[i + k]), other = folded_twice(values[i + k + 1]);
      return _mm_add_ps(_mm_shuffle_ps(one, other, 0x44), _mm_shuffle_ps(one, other, 0xee));
    };
    const __m128 one = twos(0), other = twos(2);
    _mm_storeu_ps(to + i, _mm_add_ps(_mm_shuffle_ps(one, other, 0x88), _mm_shuffle_ps(one, other, 0xdd)));
  }
#endif
#pragma GCC unroll 8
  for (; i < kCount; ++i) to[i] = sum(values[i]);
}

// The lower (0) or upper (1) half of the lanes, in double.
template <int kHalf>
inline Doubles widened(Vec value) {
#if defined(__AVX512F__)
  return (Doubles)_mm512_cvtps_pd((__m256)_mm512_extractf64x4_pd((__m512d)value, kHalf));
#elif defined(__AVX__)
  return (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)value, kHalf));
#else
  Doubles wide;
  for (int lane = 0; lane < kLanes / 2; ++lane) wide[lane] = value[kHalf * kLanes / 2 + lane];
  return wide;
#endif
}

constexpr int kPad = 32;  // inputs are filled with zeros to a multiple of this

inline int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// Floats between two rows of a buffer: never a multiple of 4 KiB, at which rows would meet in the same cache lines.
inline int64_t row_width(int64_t n) { return padded(n) + 16; }

// A format reads the vectors of a unit (kVectors of them, side by side) of a weight row, and vectors of the cache.
struct Fp32 {
  using Element = float;
  static constexpr int kVectors = 1;
  static constexpr int kAheadBytes = 0;
  static Vec vector(const float* unit, int) { return read(unit); }
  static float at(const float* unit, int64_t i) { return unit[i]; }
  static Vec read(const float* from) { return load<Vec>(from); }
  static float value(float element) { return element; }
  static float element(float value) { return value; }
  static void write(float* to, Vec value) { store(to, value); }
};

struct Bf16 {  // the upper half of an fp32
  using Element = uint16_t;
  // A unit is kLanes words: the first kLanes elements in their lower halves, the next in their upper ones.
  static constexpr int kVectors = 2;
  static constexpr int kAheadBytes = 0;
  static Vec vector(const uint16_t* unit, int which) {
    const Words words = load<Words>(unit);
    return which ? (Vec)(words & 0xffff0000u) : (Vec)(words << 16);
  }
  static int64_t place(int64_t i) { return i < kLanes ? 2 * i : 2 * (i - kLanes) + 1; }  // little-endian
  static float at(const uint16_t* unit, int64_t i) { return value(unit[place(i)]); }
  static Vec read(const uint16_t* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(__AVX2__)
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
    return (Vec)(__builtin_convertvector(load<Halves>(from), Words) << 16);
#endif
  }
  static float value(uint16_t element) {
    const uint32_t bits = uint32_t{element} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static uint16_t element(float value) {  // the nearest, of two the even one
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  }
  static void write(uint16_t* to, Vec value) {  // the same, of each lane
#if defined(__AVX512BF16__) && !defined(GROUNDLING_LANES)
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)value);  // subnormal floats become 0
    std::memcpy(to, &halves, sizeof halves);
#else
    const Words bits = (Words)value;
    const Halves halves = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves);
    std::memcpy(to, &halves, sizeof halves);
#endif
  }
};

// The 32 values of a line of 64 bytes of bf16, at a multiple of as many; the second past the caches, see stream_some.
constexpr int kLineVectors = 32 / kLanes;
#if defined(__AVX512BF16__) && !defined(GROUNDLING_LANES)
inline __m512i line_of(const Vec (&values)[kLineVectors]) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)values[1], (__m512)values[0]);
}
inline void write_line(uint16_t* to, const Vec (&values)[kLineVectors]) { _mm512_store_si512(to, line_of(values)); }
inline void stream_line(uint16_t* to, const Vec (&values)[kLineVectors]) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line_of(values));
}
#else
inline void write_line(uint16_t* to, const Vec (&values)[kLineVectors]) {
  for (int i = 0; i < kLineVectors; ++i) Bf16::write(to + i * kLanes, values[i]);
}
inline void stream_line(uint16_t* to, const Vec (&values)[kLineVectors]) { write_line(to, values); }
#endif

struct Int8 {
  using Element = int8_t;
  static constexpr int kVectors = 1;
  static constexpr int kAheadBytes = 2048;
  static Vec vector(const int8_t* unit, int) { return read(unit); }
  static float at(const int8_t* unit, int64_t i) { return unit[i]; }
  static Vec read(const int8_t* from) {
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Vec);
#endif
  }
};

// The first n lanes, where there may be no more.
template <class Format>
inline Vec read_some(const typename Format::Element* from, int64_t n) {
  if (n >= kLanes) return Format::read(from);
  typename Format::Element lanes[kLanes] = {};
  std::memcpy(lanes, from, n * sizeof *from);
  return Format::read(lanes);
}

template <class Format>
inline void write_some(typename Format::Element* to, Vec value, int64_t n) {
  if (n >= kLanes) return Format::write(to, value);
  typename Format::Element lanes[kLanes];
  Format::write(lanes, value);
  std::memcpy(to, lanes, n * sizeof *to);
}

constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the lower bits

// x, but nothing outside [low, high]; what is no number stays. Compilers make two instructions of each comparison.
inline Vec limited(Vec x, float low, float high) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)splat(high), _mm512_max_ps((__m512)splat(low), (__m512)x));
#elif defined(__AVX__)
  return (Vec)_mm256_min_ps((__m256)splat(high), _mm256_max_ps((__m256)splat(low), (__m256)x));
#else
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
#endif
}

// e^x by x = n ln 2 + r and the Taylor series of e^r, |r| <= ln 2 / 2, to r^7 / 7!: within 2 units of the last place.
inline Vec exponential(Vec x) {
  x = limited(x, -87.f, 87.f);  // whose inverses are no subnormal numbers either
  const Vec shift = splat(kRounder);
  const Vec n = multiply_add(x, splat(1.44269504f), shift) - shift;
  // ln 2 in two parts (Cody and Waite 1980)
  const Vec r = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x));
  Vec y = splat(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) y = multiply_add(y, r, splat(c));
  return y * (Vec)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// 2^x within 2^-22 of it: 2^n 2^r, |r| <= 1/2, by the polynomial of degree 5 whose largest error is least. Where numbers
// end, 0 or infinity, or on other CPUs what is next to them.
inline Vec power_of_two(Vec x) {
#if defined(__AVX512DQ__)
  const Vec r = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), n = x - r;
#else
  x = limited(x, -126.f, 126.f);
  const Vec rounded = x + kRounder, r = x - (rounded - kRounder);
#endif
  Vec y = splat(1.3264727e-3f);
  for (float c : {9.6715130e-3f, 5.5507336e-2f, 0.24022242f, 0.69314700f, 1.f}) y = multiply_add(y, r, splat(c));
#if defined(__AVX512DQ__)
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  return y * (Vec)(((Ints)rounded + 127) << 23);
#endif
}

constexpr float kLog2E = 1.44269504f;

// GPT-2's GELU is 0.5 x (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3), and so x s(2u), with the logistic
// function s: this share of x.
inline Vec gelu_share(Vec x) {
  const Vec twice_u = 1.59576912f * x * multiply_add(x * x, splat(0.044715f), splat(1.f));
  return 1.f / (1.f + exponential(-twice_u));
}

inline Vec gelu(Vec x) { return x * gelu_share(x); }

// The same share within 2^-13, which is finer than bf16 by four bits, in two thirds of the time: by 2^x = 2^n 2^r and the
// Taylor series of 2^r, |r| <= 1/2, to r^4.
inline Vec rough_gelu_share(Vec x) {
  constexpr float kFactor = -1.59576912f * 1.44269504f;
  const Vec power = limited(x * multiply_add(x * x, splat(0.044715f * kFactor), splat(kFactor)), -126.f, 126.f);
  const Vec rounded = power + kRounder, r = power - (rounded - kRounder);
  Vec y = splat(9.6181291e-3f);
  for (float c : {5.5504109e-2f, 0.24022651f, 0.69314718f, 1.f}) y = multiply_add(y, r, splat(c));
  const Vec scale = (Vec)(((Ints)rounded + 127) << 23);
  const Vec divisor = multiply_add(y, scale, splat(1.f));
#if defined(__AVX512F__)
  return (Vec)_mm512_rcp14_ps((__m512)divisor);
#else
  return 1.f / divisor;
#endif
}

}  // namespace groundling
