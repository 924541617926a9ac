// Matrices of bf16 in the order in which the matrix unit's tiles are loaded, and vectors likewise.
//
// Invariant: packing moves numbers and changes none; what is missing at the edges is zeros.
//
// Packed matrices are in panels of 32 rows (left) or columns (right), a panel in steps of 32 terms, a step in two tiles:
// one load instruction each.

#pragma once

#include <cstdint>

#include "tiles.h"

namespace groundling {

constexpr int64_t kSide = 2 * kTileSide;       // rows and columns of a block of sums: two tiles by two
constexpr int64_t kStep = kTileDepth * kSide;  // elements of a panel's step: 32 terms of 32 rows

// A matrix of bf16 in memory: rows of `width` elements, `stride` elements apart.
struct Matrix {
  const uint16_t* at;
  int64_t n_rows, width, stride;
  Matrix(const uint16_t* from, int64_t rows, int64_t columns) : Matrix(from, rows, columns, columns) {}
  Matrix(const uint16_t* from, int64_t rows, int64_t columns, int64_t apart)
      : at(from), n_rows(rows), width(columns), stride(apart) {}
};

#if defined(__AVX512BW__) && !defined(GROUNDLING_LANES)
#define GROUNDLING_WIDE_PACKING 1

// 16 rows of 16 words become 16 columns.
inline void transpose_words(__m512i rows[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// 32 elements of a row, from `column` on; zeros where the matrix has none.
inline __m512i row_of(const Matrix& matrix, int64_t row, int64_t column) {
  if (row >= matrix.n_rows || column >= matrix.width) return _mm512_setzero_si512();
  const uint16_t* from = matrix.at + row * matrix.stride + column;
  const int64_t n = matrix.width - column;
  return n >= 32 ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << n) - 1), from);
}
#endif

// How a packed line of 64 bytes is written: to be read soon, or later, when the caches have forgotten it.
struct Soon {
#if defined(GROUNDLING_WIDE_PACKING)
  static void store(uint16_t* to, __m512i line) { _mm512_store_si512(to, line); }
#endif
};
struct Later {
#if defined(GROUNDLING_WIDE_PACKING)
  static void store(uint16_t* to, __m512i line) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), line); }
#endif
};

// Asks for what the next step reads, where steps are further rows.
inline void fetch_row(const Matrix& matrix, int64_t row, int64_t column) {
  __builtin_prefetch(matrix.at + (row + kTileDepth) * matrix.stride + column, 0, 2);
}

inline uint16_t element_of(const Matrix& matrix, int64_t row, int64_t column) {
  return row < matrix.n_rows && column < matrix.width ? matrix.at[row * matrix.stride + column] : 0;
}

// A step of a left panel (32 rows from `row` on, 32 terms from `term` on) from a matrix (rows, terms).
struct LeftOfRows {
  static constexpr bool kTermsOutside = false;  // steps of a panel lie beside each other in memory
  Matrix matrix;
  void pack(int64_t row, int64_t term, uint16_t* to, bool) const {
    for (int64_t i = 0; i < kSide; ++i, to += kTileDepth) {
#if defined(GROUNDLING_WIDE_PACKING)
      _mm512_store_si512(to, row_of(matrix, row + i, term));
#else
      for (int64_t t = 0; t < kTileDepth; ++t) to[t] = element_of(matrix, row + i, term + t);
#endif
    }
  }
  int64_t n_rows() const { return matrix.n_rows; }
  int64_t n_terms() const { return matrix.width; }
};

// The same from a matrix (terms, rows). `totals`, if not null, become the sums over all terms, added up where a step is
// packed for the first time.
struct LeftOfColumns {
  static constexpr bool kTermsOutside = true;
  Matrix matrix;
  float* totals = nullptr;

  void pack(int64_t row, int64_t term, uint16_t* to, bool first_time) const {
    const bool adds_up = totals && first_time;
#if defined(GROUNDLING_WIDE_PACKING)
    __m512i low[16], high[16];  // two terms of columns 0-3, 8-11, 16-19, 24-27, and of the others
    __m512 sums[4] = {};        // of the columns that are the low and high halves of words
    for (int i = 0; i < 16; ++i) {
      const __m512i one = row_of(matrix, term + 2 * i, row), other = row_of(matrix, term + 2 * i + 1, row);
      fetch_row(matrix, term + 2 * i, row);
      fetch_row(matrix, term + 2 * i + 1, row);
      low[i] = _mm512_unpacklo_epi16(one, other);
      high[i] = _mm512_unpackhi_epi16(one, other);
      if (adds_up) {
        const __m512i upper = _mm512_set1_epi32(0xffff0000);
        sums[0] = _mm512_add_ps(sums[0], _mm512_castsi512_ps(_mm512_slli_epi32(low[i], 16)));
        sums[1] = _mm512_add_ps(sums[1], _mm512_castsi512_ps(_mm512_and_si512(low[i], upper)));
        sums[2] = _mm512_add_ps(sums[2], _mm512_castsi512_ps(_mm512_slli_epi32(high[i], 16)));
        sums[3] = _mm512_add_ps(sums[3], _mm512_castsi512_ps(_mm512_and_si512(high[i], upper)));
      }
    }
    transpose_words(low);
    transpose_words(high);
    for (int i = 0; i < 16; ++i) {
      const int column = i / 4 * 8 + i % 4;
      _mm512_store_si512(to + column * kTileDepth, low[i]);
      _mm512_store_si512(to + (column + 4) * kTileDepth, high[i]);
    }
    if (adds_up) {
      float lanes[2][16];
      _mm512_storeu_ps(lanes[0], _mm512_add_ps(sums[0], sums[1]));
      _mm512_storeu_ps(lanes[1], _mm512_add_ps(sums[2], sums[3]));
      for (int64_t i = 0; i < kSide && row + i < n_rows(); ++i)
        add(row + i, term, lanes[i / 4 % 2][i / 8 * 4 + i % 4]);
    }
#else
    for (int64_t i = 0; i < kSide; ++i) {
      float sum = 0;
      for (int64_t t = 0; t < kTileDepth; ++t) {
        to[i * kTileDepth + t] = element_of(matrix, term + t, row + i);
        sum += Bf16::value(to[i * kTileDepth + t]);
      }
      if (adds_up && row + i < n_rows()) add(row + i, term, sum);
    }
#endif
  }
  int64_t n_rows() const { return matrix.width; }
  int64_t n_terms() const { return matrix.n_rows; }

 private:
  void add(int64_t row, int64_t term, float sum) const { totals[row] = term ? totals[row] + sum : sum; }
};

// A step of a right panel (32 columns, 32 terms) from a matrix (terms, columns).
struct RightOfRows {
  static constexpr bool kTermsOutside = true;
  Matrix matrix;
  template <class Read = Soon>
  void pack(int64_t column, int64_t term, uint16_t* to) const {
#if defined(GROUNDLING_WIDE_PACKING)
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int i = 0; i < kTileSide; ++i) {
      const __m512i one = row_of(matrix, term + 2 * i, column), other = row_of(matrix, term + 2 * i + 1, column);
      fetch_row(matrix, term + 2 * i, column);
      fetch_row(matrix, term + 2 * i + 1, column);
      const __m512i low = _mm512_unpacklo_epi16(one, other), high = _mm512_unpackhi_epi16(one, other);
      Read::store(to + i * kTileDepth, _mm512_permutex2var_epi64(low, first, high));
      Read::store(to + (kTileSide + i) * kTileDepth, _mm512_permutex2var_epi64(low, second, high));
    }
#else
    for (int64_t t = 0; t < kTileDepth; ++t)
      for (int64_t i = 0; i < kSide; ++i)
        to[i / kTileSide * kTileSide * kTileDepth + t / 2 * kTileDepth + i % kTileSide * 2 + t % 2] =
            element_of(matrix, term + t, column + i);
#endif
  }
  int64_t n_columns() const { return matrix.width; }
};

// The same from a matrix (columns, terms).
struct RightOfColumns {
  static constexpr bool kTermsOutside = false;
  Matrix matrix;
  template <class Read = Soon>
  void pack(int64_t column, int64_t term, uint16_t* to) const {
#if defined(GROUNDLING_WIDE_PACKING)
    for (int half = 0; half < 2; ++half) {
      __m512i rows[16];
      for (int i = 0; i < kTileSide; ++i) rows[i] = row_of(matrix, column + half * kTileSide + i, term);
      transpose_words(rows);
      for (int i = 0; i < kTileSide; ++i) Read::store(to + (half * kTileSide + i) * kTileDepth, rows[i]);
    }
#else
    for (int64_t i = 0; i < kSide; ++i)
      for (int64_t t = 0; t < kTileDepth; ++t)
        to[i / kTileSide * kTileSide * kTileDepth + t / 2 * kTileDepth + i % kTileSide * 2 + t % 2] =
            element_of(matrix, column + i, term + t);
#endif
  }
  int64_t n_columns() const { return matrix.n_rows; }
};

// Calls pack(panel, step) for all of them, in the order in which memory is read on and on.
template <class Side, class Pack>
inline void each_step(const Side&, int64_t n_panels, int64_t first_step, int64_t end_step, Pack pack) {
  if constexpr (Side::kTermsOutside) {
    for (int64_t step = first_step; step < end_step; ++step)
      for (int64_t panel = 0; panel < n_panels; ++panel) pack(panel, step);
  } else {
    for (int64_t panel = 0; panel < n_panels; ++panel)
      for (int64_t step = first_step; step < end_step; ++step) pack(panel, step);
  }
}

}  // namespace groundling
