// Products of bf16 matrices (panel_products.h), and what is done with their blocks before they leave the cache.
//
// Invariant: an element of a product depends on its row and column and on nothing else: not on the number of threads,
// nor on the other rows. Sums are fp32.
//
// The right matrix is packed whole (panels.h), into memory that all threads read; the left one block by block, each by the
// thread that needs it, into memory that stays in its L2 cache (Goto and van de Geijn 2008, "Anatomy of High-Performance
// Matrix Multiplication").

#pragma once

#include <algorithm>
#include <cstdint>

#include "panel_products.h"
#include "panels.h"
#include "vectors.h"
#include "workspace.h"

namespace groundling {

// Half of an L2 cache of 2 MiB for the left matrix (Sapphire Rapids; from 1.5 MiB on, loads were slower).
constexpr int64_t kLeftBytes = 1 << 20;
constexpr int64_t kMaxTerms = 3072;    // of a sum at a time, so that a left block has enough rows
constexpr int64_t kManyTerms = 1024;   // at a time, of longer sums, which are kept in between
constexpr int64_t kNearSteps = 12;     // of a right panel, 24 KiB, that stay in L1 for
constexpr int64_t kTogether = 2;       // left panels, which bypass it
constexpr int64_t kKeptColumns = 768;  // whose sums are kept: 256 rows of them are 768 KiB

// Where row i of a block of sums has this column.
inline const float* place_of_sums(const float* sums, int64_t i, int64_t column) {
  return sums + (i / kTileSide * 2 + column / kTileSide) * kTileSide * kTileSide + i % kTileSide * kTileSide +
         column % kTileSide;
}

inline Vec row_of_sums(const float* sums, int64_t i, int64_t column) {
  return load<Vec>(place_of_sums(sums, i, column));
}

// Asks for the first n rows' lines at `from`, the beginning of a block of 32 columns.
template <class Element>
inline void fetch_block(const Element* from, int64_t n, int64_t width) {
  for (int64_t i = 0; i < n; ++i)
    for (size_t line = 0; line < kSide * sizeof(Element); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(from + i * width) + line, 1, 2);
}

// Takes the product of a left and a right matrix block by block: finish(row, column, sums) is called once for each block
// of 32 x 32 sums, by any thread, and finish.prepare(row, column) before it, to ask for memory; rows and columns past
// the edges are zeros. `rows_at_once`, if not 0, are the rows of the left matrix that one thread takes in one go, in
// their order, columns in the outer loop. With kLower, blocks right of the diagonal need not be had, though some are.
template <bool kLower = false, class Left, class Right, class Finish>
void product(Workspace& workspace, int n_threads, const Left& left, const Right& right, int64_t rows_at_once,
             Finish finish) {
  const int64_t n_rows = left.n_rows(), n_columns = right.n_columns(), n_terms = left.n_terms();
  if (!n_rows) return;
  // Sums of no terms are sums of one step of zeros.
  const int64_t n_steps = std::max<int64_t>(1, divided_up(n_terms, kTileDepth)), n_panels = divided_up(n_columns, kSide);
  const int64_t steps_at_once = n_terms <= kMaxTerms ? n_steps : kManyTerms / kTileDepth;
  const bool in_parts = steps_at_once < n_steps;
  int64_t most_rows = kLeftBytes / (steps_at_once * kTileDepth * 2) / kSide * kSide;
  most_rows = std::max(kSide, std::min<int64_t>(most_rows, in_parts ? 256 : 512));
  // As many rows as fit, but so that all threads have as many blocks to take, which differ by a panel at most.
  const int64_t n_turns = divided_up(divided_up(n_rows, most_rows), n_threads) * n_threads;
  const int64_t n_row_panels = divided_up(n_rows, kSide);
  const int64_t n_blocks =
      rows_at_once ? divided_up(n_rows, rows_at_once) : std::min(n_row_panels, n_turns);
  const int64_t block_panels = rows_at_once ? rows_at_once / kSide : divided_up(n_row_panels, n_blocks);
  const auto begin_of = [=](int64_t block) {  // its first row
    return (rows_at_once ? std::min(n_row_panels, block * block_panels) : block * n_row_panels / n_blocks) * kSide;
  };
  const int64_t panels_at_once = in_parts ? kKeptColumns / kSide : n_panels;
  const int64_t n_parts = divided_up(n_panels, panels_at_once);

  uint16_t* const packed = workspace.shared.of(n_panels * n_steps * kStep);
  workspace.begin(n_threads);
#pragma omp parallel num_threads(n_threads)
  {
    Workspace::OfThread& own = workspace.own();
    uint16_t* const own_left = own.halves.of(block_panels * steps_at_once * kStep);
    float* const own_sums = own.floats.of(in_parts ? block_panels * panels_at_once * kBlockSums : kTogether * kBlockSums);
    // Panels in blocks of steps, so that rows of the matrix are read for several panels while they are in the cache.
    constexpr int64_t kPacked = 8;
    const int64_t n_groups = divided_up(n_steps, kPacked);
#pragma omp for schedule(static) nowait
    for (int64_t group = 0; group < n_groups; ++group)
      each_step(right, n_panels, group * kPacked, std::min(n_steps, (group + 1) * kPacked),
                [&](int64_t panel, int64_t step) {
                  right.template pack<Later>(panel * kSide, step * kTileDepth, packed + (panel * n_steps + step) * kStep);
                });
    streamed();
#pragma omp barrier

    Multiplier multiplier;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < n_blocks * n_parts; ++i) {
      const int64_t turn = kLower ? n_blocks * n_parts - 1 - i : i;  // mostly the longest first
      const int64_t first_row = begin_of(turn / n_parts), first_panel = turn % n_parts * panels_at_once;
      const int64_t own_panels = (begin_of(turn / n_parts + 1) - first_row) / kSide;
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
            if (kLower && first_row / kSide + end_group <= panel) continue;
            if (last)
              for (int64_t i = group; i < end_group; ++i) finish.prepare(first_row + i * kSide, panel * kSide);
            float* const sums = in_parts ? own_sums + ((panel - first_panel) * block_panels + group) * kBlockSums : own_sums;
            for (int64_t step = 0; step < some; step += kNearSteps) {
              const int64_t n = std::min(kNearSteps, some - step);
              for (int64_t i = group; i < end_group; ++i) {
                multiplier.panels(own_left + (i * some + step) * kStep, from + step * kStep, n, first + step > 0,
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
    streamed();  // what `finish` may have
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
  Fetch fetch;  // (rows, place in the matrix) of a block that `body` will read, or write into the caches
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
