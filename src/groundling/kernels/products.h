// Products of bf16 matrices in the matrix unit (tiles.h), and what is done with their blocks before they leave the cache.
//
// Invariant: an element of a product depends on its row and column and on nothing else: not on the number of threads,
// nor on the other rows. Sums are fp32.
//
// The right matrix is packed whole, into memory that all threads read; the left one block by block, each by the thread
// that needs it, into memory that stays in its L2 cache (Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix
// Multiplication"). Packed matrices are in panels of 32 rows (left) or columns (right), a panel in steps of 32 terms, a
// step in two tiles: one load instruction each. What is missing at the edges is filled with zeros.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <type_traits>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "tiles.h"
#include "vectors.h"

namespace groundling {

constexpr int64_t kSide = 2 * kTileSide;        // rows and columns of a block of sums: two tiles by two
constexpr int64_t kStep = kTileDepth * kSide;   // elements of a panel's step: 32 terms of 32 rows
constexpr int64_t kBlockSums = kSide * kSide;
// Half of an L2 cache of 2 MiB for the left matrix (Sapphire Rapids; from 1.5 MiB on, loads were slower).
constexpr int64_t kLeftBytes = 1 << 20;
constexpr int64_t kMaxTerms = 3072;    // of a sum at a time, so that a left block has enough rows
constexpr int64_t kManyTerms = 1024;   // at a time, of longer sums, which are kept in between
constexpr int64_t kNearSteps = 12;     // of a right panel, 24 KiB, that stay in L1 for
constexpr int64_t kTogether = 2;       // left panels, which bypass it
constexpr int64_t kKeptColumns = 768;  // whose sums are kept: 256 rows of them are 768 KiB

inline int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Memory that lives on and only grows, in huge pages where the system has them: with small ones each of the many
// streams of a product misses its pages' addresses.
template <class Element>
class Buffer {
 public:
  Element* of(int64_t n) {
    if (n > size_) {
      std::free(memory_);
      size_ = 0;
      const size_t bytes = divided_up(n * sizeof(Element), kHuge) * kHuge;
      memory_ = std::aligned_alloc(kHuge, bytes);
      if (!memory_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      madvise(memory_, bytes, MADV_HUGEPAGE);
#endif
      size_ = n;
    }
    return static_cast<Element*>(memory_);
  }

 private:
  static constexpr size_t kHuge = 2 << 20;
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

// Everything that products write to on their way; one product at a time.
struct Workspace {
  std::mutex mutex;
  Buffer<uint16_t> right;
  struct OfThread {
    Buffer<uint16_t> left;
    Buffer<float> sums;
  };
  std::vector<OfThread> threads;
};

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
  void pack(int64_t column, int64_t term, uint16_t* to) const {
#if defined(GROUNDLING_WIDE_PACKING)
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                  second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    for (int i = 0; i < kTileSide; ++i) {
      const __m512i one = row_of(matrix, term + 2 * i, column), other = row_of(matrix, term + 2 * i + 1, column);
      fetch_row(matrix, term + 2 * i, column);
      fetch_row(matrix, term + 2 * i + 1, column);
      const __m512i low = _mm512_unpacklo_epi16(one, other), high = _mm512_unpackhi_epi16(one, other);
      _mm512_store_si512(to + i * kTileDepth, _mm512_permutex2var_epi64(low, first, high));
      _mm512_store_si512(to + (kTileSide + i) * kTileDepth, _mm512_permutex2var_epi64(low, second, high));
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
  void pack(int64_t column, int64_t term, uint16_t* to) const {
#if defined(GROUNDLING_WIDE_PACKING)
    for (int half = 0; half < 2; ++half) {
      __m512i rows[16];
      for (int i = 0; i < kTileSide; ++i) rows[i] = row_of(matrix, column + half * kTileSide + i, term);
      transpose_words(rows);
      for (int i = 0; i < kTileSide; ++i)
        _mm512_store_si512(to + (half * kTileSide + i) * kTileDepth, rows[i]);
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

// 32 x 32 sums of n_steps steps of a left and a right panel, to `sums` or, with `more`, onto what is there. Meanwhile
// the memory at `ahead` is fetched, n_ahead lines a step.
inline void multiply_panels(Tiles& tiles, const uint16_t* left, const uint16_t* right, int64_t n_steps, bool more,
                            float* sums, const char* ahead, int n_ahead) {
  constexpr int64_t kTile = kTileBytes / sizeof(float), kRowBytes = 64;
  if (more) {
    tiles.load<0>(sums, kRowBytes);
    tiles.load<1>(sums + kTile, kRowBytes);
    tiles.load<2>(sums + 2 * kTile, kRowBytes);
    tiles.load<3>(sums + 3 * kTile, kRowBytes);
  } else {
    tiles.zero<0>();
    tiles.zero<1>();
    tiles.zero<2>();
    tiles.zero<3>();
  }
  for (int64_t step = 0; step < n_steps; ++step, left += kStep, right += kStep) {
    tiles.load<6>(right, 64);
    tiles.stream<4>(left, 64);
    tiles.multiply<0, 4, 6>();
    tiles.load<7>(right + kStep / 2, 64);
    tiles.multiply<1, 4, 7>();
    tiles.stream<5>(left + kStep / 2, 64);
    tiles.multiply<2, 5, 6>();
    tiles.multiply<3, 5, 7>();
    for (int line = 0; line < n_ahead; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
  }
  tiles.store<0>(sums, kRowBytes);
  tiles.store<1>(sums + kTile, kRowBytes);
  tiles.store<2>(sums + 2 * kTile, kRowBytes);
  tiles.store<3>(sums + 3 * kTile, kRowBytes);
}

// Where row i of a block of sums has this column.
inline const float* place_of_sums(const float* sums, int64_t i, int64_t column) {
  return sums + (i / kTileSide * 2 + column / kTileSide) * kTileSide * kTileSide + i % kTileSide * kTileSide +
         column % kTileSide;
}

inline Vec row_of_sums(const float* sums, int64_t i, int64_t column) {
  return load<Vec>(place_of_sums(sums, i, column));
}

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

// Asks for the first n rows' lines at `from`, the beginning of a block of 32 columns.
template <class Element>
inline void fetch_block(const Element* from, int64_t n, int64_t width) {
  for (int64_t i = 0; i < n; ++i)
    for (size_t line = 0; line < kSide * sizeof(Element); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(from + i * width) + line, 1, 2);
}

// Takes the product of a left and a right matrix block by block: finish(row, column, sums) is called once for each block
// of 32 x 32 sums, by any thread, and finish.prepare(row, column) before it, to ask for memory; rows and columns past the edges are zeros. `rows_at_once`, if not 0, are the rows of
// the left matrix that one thread takes in one go, in their order, columns in the outer loop.
template <class Left, class Right, class Finish>
void product(Workspace& workspace, int n_threads, const Left& left, const Right& right, int64_t rows_at_once,
             Finish finish) {
  const int64_t n_rows = left.n_rows(), n_columns = right.n_columns(), n_terms = left.n_terms();
  const int64_t n_steps = divided_up(n_terms, kTileDepth), n_panels = divided_up(n_columns, kSide);
  const int64_t steps_at_once = n_terms <= kMaxTerms ? n_steps : kManyTerms / kTileDepth;
  const bool in_parts = steps_at_once < n_steps;
  int64_t most_rows = kLeftBytes / (steps_at_once * kTileDepth * 2) / kSide * kSide;
  most_rows = std::max(kSide, std::min<int64_t>(most_rows, in_parts ? 256 : 512));
  // As many rows as fit, but so that all threads have the same number of blocks to take.
  const int64_t n_turns = divided_up(divided_up(n_rows, most_rows), n_threads) * n_threads;
  const int64_t block = rows_at_once ? rows_at_once : divided_up(divided_up(n_rows, n_turns), kSide) * kSide;
  const int64_t n_blocks = divided_up(n_rows, block), block_panels = block / kSide;
  const int64_t panels_at_once = in_parts ? kKeptColumns / kSide : n_panels;
  const int64_t n_parts = divided_up(n_panels, panels_at_once);

  uint16_t* const packed = workspace.right.of(n_panels * n_steps * kStep);
  if (static_cast<int>(workspace.threads.size()) < n_threads) workspace.threads.resize(n_threads);
#pragma omp parallel num_threads(n_threads)
  {
#if defined(_OPENMP)
    auto& own = workspace.threads[omp_get_thread_num()];
#else
    auto& own = workspace.threads[0];
#endif
    uint16_t* const own_left = own.left.of(block * steps_at_once * kTileDepth);
    float* const own_sums = own.sums.of(in_parts ? block_panels * panels_at_once * kBlockSums : kTogether * kBlockSums);
    // Panels in blocks of steps, so that rows of the matrix are read for several panels while they are in the cache.
    constexpr int64_t kPacked = 8;
    const int64_t n_groups = divided_up(n_steps, kPacked);
#pragma omp for schedule(static)
    for (int64_t group = 0; group < n_groups; ++group)
      each_step(right, n_panels, group * kPacked, std::min(n_steps, (group + 1) * kPacked),
                [&](int64_t panel, int64_t step) {
                  right.pack(panel * kSide, step * kTileDepth, packed + (panel * n_steps + step) * kStep);
                });

    Tiles tiles;
#pragma omp for schedule(dynamic)
    for (int64_t turn = 0; turn < n_blocks * n_parts; ++turn) {
      const int64_t first_row = turn / n_parts * block, first_panel = turn % n_parts * panels_at_once;
      const int64_t own_panels = divided_up(std::min(block, n_rows - first_row), kSide);
      const int64_t end_panel = std::min(n_panels, first_panel + panels_at_once);
      for (int64_t first = 0; first < n_steps; first += steps_at_once) {
        const int64_t some = std::min(steps_at_once, n_steps - first);
        const bool last = first + some == n_steps;
        each_step(left, own_panels, 0, some, [&](int64_t panel, int64_t step) {
          left.pack(first_row + panel * kSide, (first + step) * kTileDepth, own_left + (panel * some + step) * kStep,
                    first_panel == 0);
        });
        for (int64_t panel = first_panel; panel < end_panel; ++panel) {
          const uint16_t* const from = packed + (panel * n_steps + first) * kStep;
          // What comes next is fetched while this panel is multiplied, so many lines a step that it is there in time.
          const char* ahead = reinterpret_cast<const char*>(panel + 1 < end_panel ? from + n_steps * kStep : from);
          const char* const end_ahead = ahead + some * kStep * 2;
          const int n_ahead = static_cast<int>(divided_up(kStep * 2 / 64, own_panels));
          for (int64_t group = 0; group < own_panels; group += kTogether) {
            const int64_t end_group = std::min(own_panels, group + kTogether);
            if (last)
              for (int64_t i = group; i < end_group; ++i) finish.prepare(first_row + i * kSide, panel * kSide);
            float* const sums = in_parts ? own_sums + ((panel - first_panel) * block_panels + group) * kBlockSums : own_sums;
            for (int64_t step = 0; step < some; step += kNearSteps) {
              const int64_t n = std::min(kNearSteps, some - step);
              for (int64_t i = group; i < end_group; ++i) {
                multiply_panels(tiles, own_left + (i * some + step) * kStep, from + step * kStep, n, first + step > 0,
                                sums + (i - group) * kBlockSums, ahead, ahead < end_ahead ? n_ahead : 0);
                ahead += n * n_ahead * 64;
              }
            }
            if (last)
              for (int64_t i = group; i < end_group; ++i)
                finish(first_row + i * kSide, panel * kSide, sums + (i - group) * kBlockSums);
          }
        }
      }
    }
  }
}

// Calls body(sums, place in the matrix, column, lanes) for the vectors of a block that the matrix (n_rows, n_columns) has.
template <class Body>
inline void each_vector(int64_t n_rows, int64_t n_columns, int64_t row, int64_t column, const float* sums, Body body) {
  const int64_t end_row = std::min(kSide, n_rows - row), end = std::min(kSide, n_columns - column);
  for (int64_t i = 0; i < end_row; ++i)
    for (int64_t c = 0; c < end; c += kLanes)
      body(row_of_sums(sums, i, c), (row + i) * n_columns + column + c, column + c, std::min<int64_t>(kLanes, end - c));
}

template <class Fetch, class Body>
struct Finish {
  int64_t n_rows, n_columns;
  Fetch fetch;  // (rows, place in the matrix) of a block that `body` will read or write
  Body body;
  void prepare(int64_t row, int64_t column) const {
    fetch(std::min(kSide, n_rows - row), row * n_columns + column);
  }
  void operator()(int64_t row, int64_t column, const float* sums) const {
    each_vector(n_rows, n_columns, row, column, sums, body);
  }
};
template <class Fetch, class Body>
Finish(int64_t, int64_t, Fetch, Body) -> Finish<Fetch, Body>;

}  // namespace groundling
