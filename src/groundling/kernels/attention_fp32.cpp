// Causal attention of whole windows to themselves in fp32, forward and backward, a head of a window at a time.
//
// Invariant: a query's output depends on no later position, to the bit; and no result depends on the number of threads.
// Scores, probabilities and their gradients exist for a block of queries at a time, in memory of the thread.
// Source: as of attention.cpp, which does the same in bf16. The products' loops: Goto and van de Geijn 2008,
// "Anatomy of High-Performance Matrix Multiplication", whose innermost one keeps a tile of sums in registers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "exponentials.h"
#include "heads.h"
#include "runs.h"
#include "vectors.h"
#include "workspace.h"

namespace {

using namespace groundling;

// Rows and vectors of a tile of sums, which stay in registers beside the operands: there are 32 with AVX-512, 16 with AVX2.
constexpr int kRows = 6, kVectors = kLanes == 16 ? 4 : 2;
constexpr int64_t kQueries = 6 * kRows;  // at a time

// A left factor: its rows lie `row` floats apart, the terms of a row `term`.
struct Left {
  const float* at;
  int64_t row, term;
};

// kTileHeight x kTileVectors sums of n_terms terms, to `to` or, with `more`, onto what is there.
template <int kTileHeight, int kTileVectors>
inline void multiply_tile(Left left, const float* right, int64_t right_row, int64_t n_terms, float* to, int64_t to_row,
                          bool more) {
  Vec sums[kTileHeight][kTileVectors];
#pragma GCC unroll 6
  for (int row = 0; row < kTileHeight; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) sums[row][v] = more ? load<Vec>(to + row * to_row + v * kLanes) : Vec{};
  for (int64_t term = 0; term < n_terms; ++term) {
    Vec vectors[kTileVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) vectors[v] = load<Vec>(right + term * right_row + v * kLanes);
#pragma GCC unroll 6
    for (int row = 0; row < kTileHeight; ++row) {
      const Vec factor = splat(left.at[row * left.row + term * left.term]);
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) sums[row][v] = multiply_add(factor, vectors[v], sums[row][v]);
    }
  }
#pragma GCC unroll 6
  for (int row = 0; row < kTileHeight; ++row)
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; ++v) store(to + row * to_row + v * kLanes, sums[row][v]);
}

// The first n_rows <= kTileHeight rows of a tile.
template <int kTileHeight, int kTileVectors, class... Rest>
inline void multiply_rows(int64_t n_rows, Rest... rest) {
  if constexpr (kTileHeight > 1)
    if (n_rows < kTileHeight) return multiply_rows<kTileHeight - 1, kTileVectors>(n_rows, rest...);
  multiply_tile<kTileHeight, kTileVectors>(rest...);
}

// The product of a left factor of n_rows rows and a right one of n_terms rows, n_columns wide: a multiple of kLanes.
void multiply(Left left, int64_t n_rows, const float* right, int64_t right_row, int64_t n_terms, int64_t n_columns,
              float* to, int64_t to_row, bool more) {
  const auto columns = [&](auto n_vectors, int64_t column) {
    for (int64_t row = 0; row < n_rows; row += kRows)
      multiply_rows<kRows, decltype(n_vectors)::value>(
          std::min<int64_t>(kRows, n_rows - row), Left{left.at + row * left.row, left.row, left.term}, right + column,
          right_row, n_terms, to + row * to_row + column, to_row, more);
  };
  int64_t column = 0;
  for (; column + kVectors * kLanes <= n_columns; column += kVectors * kLanes)
    columns(std::integral_constant<int, kVectors>{}, column);
  for (; column < n_columns; column += kLanes) columns(std::integral_constant<int, 1>{}, column);
}

// Floats of the vectors that n of them fill.
inline int64_t in_vectors(int64_t n) { return divided_up(n, kLanes) * kLanes; }

// A head of a window, and a thread's memory for it. Rows of `columns_` hold a position each, those of `positions_` one
// of the head's columns or a query.
class HeadOfWindow {
 public:
  HeadOfWindow(const Shape& shape, Workspace::OfThread& own)
      : T_(shape.n_positions),
        D_(shape.width),
        C_(shape.n_embd()),
        positions_(row_width(T_)),
        columns_(in_vectors(D_)),
        scale_(1 / std::sqrt(float(D_))) {
    float* at = own.floats.of(4 * T_ * columns_ + 2 * D_ * positions_ + 2 * kQueries * positions_ + 3 * kQueries * columns_);
    for (float** part : {&key_rows_, &value_rows_, &d_keys_, &d_values_}) *part = at, at += T_ * columns_;
    for (float** part : {&keys_, &values_}) *part = at, at += D_ * positions_;
    for (float** part : {&scores_, &d_scores_}) *part = at, at += kQueries * positions_;
    for (float** part : {&queries_, &d_, &block_}) *part = at, at += kQueries * columns_;
  }

  void forward(const float* qkv, float* mixed, float* log_sums) {
    copy_turned(qkv + C_, keys_);
    copy(qkv + 2 * C_, 3 * C_, T_, 1, value_rows_);
    for (int64_t first = 0; first < T_; first += kQueries) {
      const int64_t n = std::min(kQueries, T_ - first), end = first + n;
      copy(qkv + first * 3 * C_, 3 * C_, n, scale_, queries_);
      multiply({queries_, columns_, 1}, n, keys_, positions_, D_, in_vectors(end), scores_, positions_, false);
      float shares[kQueries];
      for (int64_t i = 0; i < n; ++i) {
        float* row = scores_ + i * positions_;
        const int64_t n_seen = first + i + 1;
        const float most = largest(row, n_seen);
        Vec total{};
        each_run(n_seen, [&](int64_t c, auto n_lanes) {
          const Vec weight = first_lanes(exponential(load<Vec>(row + c) - most), n_lanes);
          store(row + c, weight);
          total += weight;
        });
        fill_unseen(row, n_seen, end);
        const float whole = sum(total);
        shares[i] = 1 / whole;
        log_sums[first + i] = most + std::log(whole);
      }
      multiply({scores_, positions_, 1}, n, value_rows_, columns_, end, columns_, block_, columns_, false);
      for (int64_t i = 0; i < n; ++i) write_row(block_ + i * columns_, shares[i], mixed + (first + i) * C_);
    }
  }

  void backward(const float* qkv, const float* log_sums, const float* d_mixed, float* d_qkv) {
    copy_turned(qkv + C_, keys_);
    copy_turned(qkv + 2 * C_, values_);
    copy(qkv + C_, 3 * C_, T_, 1, key_rows_);
    for (int64_t end = T_; end > 0; end -= kQueries) {  // the last queries see all keys, whose gradients they begin
      const int64_t first = std::max<int64_t>(0, end - kQueries), n = end - first;
      copy(qkv + first * 3 * C_, 3 * C_, n, scale_, queries_);
      copy(d_mixed + first * C_, C_, n, 1, d_);
      multiply({queries_, columns_, 1}, n, keys_, positions_, D_, in_vectors(end), scores_, positions_, false);
      multiply({d_, columns_, 1}, n, values_, positions_, D_, in_vectors(end), d_scores_, positions_, false);
      for (int64_t i = 0; i < n; ++i)
        softmax_backward(scores_ + i * positions_, d_scores_ + i * positions_, log_sums[first + i], first + i + 1, end);
      multiply({d_scores_, positions_, 1}, n, key_rows_, columns_, end, columns_, block_, columns_, false);
      for (int64_t i = 0; i < n; ++i) write_row(block_ + i * columns_, scale_, d_qkv + (first + i) * 3 * C_);
      multiply({d_scores_, 1, positions_}, end, queries_, columns_, n, columns_, d_keys_, columns_, end < T_);
      multiply({scores_, 1, positions_}, end, d_, columns_, n, columns_, d_values_, columns_, end < T_);
    }
    for (int64_t i = 0; i < T_; ++i) {
      write_row(d_keys_ + i * columns_, 1, d_qkv + i * 3 * C_ + C_);
      write_row(d_values_ + i * columns_, 1, d_qkv + i * 3 * C_ + 2 * C_);
    }
  }

 private:
  // Rows of this head, `stride` floats apart, times `factor` and filled up with zeros.
  void copy(const float* from, int64_t stride, int64_t n_rows, float factor, float* to) const {
    for (int64_t i = 0; i < n_rows; ++i)
      each_run(D_, [&](int64_t c, auto n) {
        store(to + i * columns_ + c, first_lanes(read<Fp32>(from + i * stride + c, n), n) * factor);
      });
  }

  // Rows of this head become columns.
  void copy_turned(const float* from, float* to) const {
    for (int64_t first = 0; first < T_; first += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, T_ - first);
      for (int64_t c = 0; c < D_; ++c) {
        float* column = to + c * positions_ + first;
        for (int64_t i = 0; i < n; ++i) column[i] = from[(first + i) * 3 * C_ + c];
        for (int64_t i = n; i < kLanes; ++i) column[i] = 0;
      }
    }
  }

  void write_row(const float* from, float factor, float* to) const {
    each_run(D_, [&](int64_t c, auto n) { stream_some(to + c, load<Vec>(from + c) * factor, n); });
  }

  static float largest(const float* row, int64_t n_seen) {
    Vec most = splat(-INFINITY);
    each_run(n_seen, [&](int64_t c, auto n) {
      const Vec score = first_lanes(load<Vec>(row + c), n, -INFINITY);
      most = score > most ? score : most;
    });
    return maximum(most);
  }

  // Zeros for the keys up to `end` that a query does not see.
  static void fill_unseen(float* row, int64_t n_seen, int64_t end) {
    if (n_seen < end) std::fill(row + n_seen, row + end, 0.f);
  }

  // A row of scores becomes probabilities, one of their gradients those of the scores, as far as its query sees.
  // Probabilities are divided by their sum once more, since a large log_sum is rounded.
  static void softmax_backward(float* row, float* d_row, float log_sum, int64_t n_seen, int64_t end) {
    Vec products{}, total{};
    each_run(n_seen, [&](int64_t c, auto n) {
      const Vec probability = first_lanes(exponential(load<Vec>(row + c) - log_sum), n);
      store(row + c, probability);
      total += probability;
      products = multiply_add(probability, first_lanes(load<Vec>(d_row + c), n), products);
    });
    const float inverse = 1 / sum(total), mean = sum(products) * inverse;
    each_run(n_seen, [&](int64_t c, auto) {
      const Vec probability = load<Vec>(row + c) * inverse;
      store(row + c, probability);
      store(d_row + c, probability * (load<Vec>(d_row + c) - mean));
    });
    fill_unseen(row, n_seen, end);
    fill_unseen(d_row, n_seen, end);
  }

  const int64_t T_, D_, C_, positions_, columns_;
  const float scale_;
  float *key_rows_, *value_rows_, *d_keys_, *d_values_;  // (T, columns)
  float *keys_, *values_;                                 // (D, positions)
  float *scores_, *d_scores_;                             // (kQueries, positions)
  float *queries_, *d_, *block_;                          // (kQueries, columns)
};

Workspace workspace;

}  // namespace

extern "C" {

// mixed (n_windows, n_positions, n_embd) from queries, keys and values side by side, qkv (..., 3 n_embd); log_sums
// (n_windows, n_head, n_positions), of the softmax's denominators. `width` is a head's.
void groundling_attention_fp32(int n_threads, int64_t n_windows, int64_t n_positions, int64_t n_head, int64_t width,
                               const float* qkv, float* mixed, float* log_sums) {
  const Shape shape{n_windows, n_positions, n_head, width};
  each_head<HeadOfWindow>(workspace, n_threads, shape, [&](HeadOfWindow& head, int64_t i, int64_t row, int64_t column) {
    const int64_t C = shape.n_embd();
    head.forward(qkv + row * 3 * C + column, mixed + row * C + column, log_sums + i * n_positions);
  });
}

// d_qkv from d_mixed, qkv and log_sums, all as above.
void groundling_attention_fp32_backward(int n_threads, int64_t n_windows, int64_t n_positions, int64_t n_head,
                                        int64_t width, const float* qkv, const float* log_sums, const float* d_mixed,
                                        float* d_qkv) {
  const Shape shape{n_windows, n_positions, n_head, width};
  each_head<HeadOfWindow>(workspace, n_threads, shape, [&](HeadOfWindow& head, int64_t i, int64_t row, int64_t column) {
    const int64_t C = shape.n_embd();
    head.backward(qkv + row * 3 * C + column, log_sums + i * n_positions, d_mixed + row * C + column,
                  d_qkv + row * 3 * C + column);
  });
}

}  // extern "C"
