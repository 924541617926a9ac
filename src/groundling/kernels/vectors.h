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

// The largest lane, where each is a number.
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
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;  // rounding could make a number of what is none
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  }
  static void write(uint16_t* to, Vec value) {  // the same, of each lane
#if defined(__AVX512BF16__) && !defined(GROUNDLING_LANES)
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)value);  // subnormal floats become 0
    std::memcpy(to, &halves, sizeof halves);
#else
    const Words bits = (Words)value;
    const Words is_none = (Words)((bits & 0x7fffffffu) > 0x7f800000u);
    const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Halves halves = __builtin_convertvector((rounded & ~is_none) | (is_none & 0x7fc0u), Halves);
    std::memcpy(to, &halves, sizeof halves);
#endif
  }
};

// 32 values fill a line of the caches, 64 bytes, with bf16. `write_line` and `stream_line`, which goes past the caches (see
// stream_some), take the address of a whole line.
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

// bf16 past the caches; two vectors that fill a line are stored as one.
inline void stream_some(uint16_t* to, Vec value, int64_t n) {
#if defined(__AVX512BF16__) && !defined(GROUNDLING_LANES)
  if (n >= kLanes && reinterpret_cast<uintptr_t>(to) % 32 == 0)
    return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)value));
#endif
  write_some<Bf16>(to, value, n);
}

}  // namespace groundling
