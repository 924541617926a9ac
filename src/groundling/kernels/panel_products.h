// 32 x 32 sums of two panels of bf16 (panels.h): in the matrix unit's tiles, or by vectors each of whose lanes adds two
// products at once.
//
// Invariant: an element depends on its row and its column alone, and is summed in fp32, in the CPU's order (tiles.h): vectors
// add a row's terms two by two, and take numbers below the normal ones as 0.
// Source: for the vectors, Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, VDPBF16PS.

#pragma once

#include <cstdint>

#include "panels.h"
#include "tiles.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(GROUNDLING_AMX) && !defined(GROUNDLING_LANES) && \
    !defined(GROUNDLING_TILES)
#define GROUNDLING_PAIRS 1
#endif

namespace groundling {

constexpr int64_t kBlockSums = kSide * kSide;

// What panels are multiplied by here, the slower first; kernels/products.py knows these numbers.
enum Unit : int { kNoUnit, kVectorsOfPairs, kMatrixUnit };

inline Unit unit() {
#if defined(GROUNDLING_PAIRS)
  return kVectorsOfPairs;
#else
  return tiles_allowed() ? kMatrixUnit : kNoUnit;
#endif
}

// What a thread multiplies panels with, while this object lives. `panels` gives the 32 x 32 sums of n_steps steps of a left and
// a right panel, to `sums` (two tiles by two) or, with `more`, onto what is there. Meanwhile the memory at `ahead` is fetched,
// n_ahead lines a step.
#if defined(GROUNDLING_PAIRS)

class Multiplier {
  static constexpr int kRows = 8;  // whose sums, two vectors each, stay in registers beside a line of either panel

 public:
  void panels(const uint16_t* left, const uint16_t* right, int64_t n_steps, bool more, float* sums, const char* ahead,
              int n_ahead) const {
    for (int row = 0; row < kSide; row += kRows, n_ahead = 0)
      rows(left + row * kTileDepth, right, n_steps, more, sums + row / kTileSide * 2 * kTile + row % kTileSide * kTileSide,
           ahead, n_ahead);
  }

 private:
  static constexpr int64_t kTile = kTileSide * kTileSide;

  static void rows(const uint16_t* left, const uint16_t* right, int64_t n_steps, bool more, float* sums,
                   const char* ahead, int n_ahead) {
    __m512 low[kRows], high[kRows];  // of the first 16 columns, and of the others
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      low[i] = more ? _mm512_load_ps(sums + i * kTileSide) : _mm512_setzero_ps();
      high[i] = more ? _mm512_load_ps(sums + kTile + i * kTileSide) : _mm512_setzero_ps();
    }
    for (int64_t step = 0; step < n_steps; ++step, left += kStep, right += kStep) {
      for (int pair = 0; pair < kTileDepth; pair += 2) {
        const auto first = (__m512bh)_mm512_load_si512(right + pair / 2 * kTileDepth),
                   second = (__m512bh)_mm512_load_si512(right + kStep / 2 + pair / 2 * kTileDepth);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          const auto both = (__m512bh)_mm512_set1_epi32(load<int32_t>(left + i * kTileDepth + pair));
          low[i] = _mm512_dpbf16_ps(low[i], both, first);
          high[i] = _mm512_dpbf16_ps(high[i], both, second);
        }
      }
      for (int line = 0; line < n_ahead; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      _mm512_store_ps(sums + i * kTileSide, low[i]);
      _mm512_store_ps(sums + kTile + i * kTileSide, high[i]);
    }
  }
};

#else

class Multiplier {
 public:
  void panels(const uint16_t* left, const uint16_t* right, int64_t n_steps, bool more, float* sums, const char* ahead,
              int n_ahead) {
    constexpr int64_t kTile = kTileBytes / sizeof(float), kRowBytes = 64;
    if (more) {
      tiles_.load<0>(sums, kRowBytes);
      tiles_.load<1>(sums + kTile, kRowBytes);
      tiles_.load<2>(sums + 2 * kTile, kRowBytes);
      tiles_.load<3>(sums + 3 * kTile, kRowBytes);
    } else {
      tiles_.zero<0>();
      tiles_.zero<1>();
      tiles_.zero<2>();
      tiles_.zero<3>();
    }
    for (int64_t step = 0; step < n_steps; ++step, left += kStep, right += kStep) {
      tiles_.load<6>(right, 64);
      tiles_.stream<4>(left, 64);
      tiles_.multiply<0, 4, 6>();
      tiles_.load<7>(right + kStep / 2, 64);
      tiles_.multiply<1, 4, 7>();
      tiles_.stream<5>(left + kStep / 2, 64);
      tiles_.multiply<2, 5, 6>();
      tiles_.multiply<3, 5, 7>();
      for (int line = 0; line < n_ahead; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
    }
    tiles_.store<0>(sums, kRowBytes);
    tiles_.store<1>(sums + kTile, kRowBytes);
    tiles_.store<2>(sums + 2 * kTile, kRowBytes);
    tiles_.store<3>(sums + 3 * kTile, kRowBytes);
  }

 private:
  Tiles tiles_;
};

#endif

}  // namespace groundling
