// Powers of e and of 2, and what is made of them, of vectors of floats.
//
// Invariant: as in vectors.h, the same bits wherever a function is used.

#pragma once

#include "vectors.h"

namespace groundling {

constexpr float kLog2E = 1.44269504f;
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
  const Vec n = multiply_add(x, splat(kLog2E), shift) - shift;
  // ln 2 in two parts (Cody and Waite 1980)
  const Vec r = multiply_add(n, splat(2.12194440e-4f), multiply_add(n, splat(-0.693359375f), x));
  Vec y = splat(1.f / 5040);
  for (float c : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f}) y = multiply_add(y, r, splat(c));
  return y * (Vec)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// 2^x within 2^-22 of it: 2^n 2^r, |r| <= 1/2, by the polynomial of degree 5 whose largest error is least. Where numbers
// end, 0 or infinity, or on CPUs without AVX-512 DQ what is next to them; what is no number stays.
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
  constexpr float kFactor = -1.59576912f * kLog2E;
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
