// Causal attention of whole windows to themselves in bf16, forward and backward, a head of a window at a time.
//
// Invariant: a query's output depends on no later position, to the bit; and no result depends on the number of threads.
// Scores, probabilities and their gradients exist for 32 queries at a time, in memory of the thread that stays in its L2
// cache; all arithmetic but the products' factors is fp32.
// Source: Vaswani et al. 2017, section 3.2.1; that the backward pass makes the probabilities again from the logarithms of
// the softmax's denominators: Dao et al. 2022, "FlashAttention", section 3.1.

#include <cmath>
#include <type_traits>

#include "exponentials.h"
#include "heads.h"
#include "products.h"

namespace {

using namespace groundling;

inline Ints lane_numbers() {
  Ints lanes{};
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

// The value where a query sees the keys, counted from the beginning of its own block; else another one.
inline Vec seen(Vec value, int64_t query, int64_t key, float other) {
  return lane_numbers() + static_cast<int32_t>(key) > static_cast<int32_t>(query) ? splat(other) : value;
}

template <class Side>
void pack_all(const Side& side, int64_t n_panels, int64_t n_steps, uint16_t* to) {
  each_step(side, n_panels, 0, n_steps, [&](int64_t panel, int64_t step) {
    if constexpr (std::is_same_v<Side, LeftOfRows>)
      side.pack(panel * kSide, step * kTileDepth, to + (panel * n_steps + step) * kStep, true);
    else
      side.pack(panel * kSide, step * kTileDepth, to + (panel * n_steps + step) * kStep);
  });
}

float* sums_at(float* sums, int64_t i, int64_t column) { return const_cast<float*>(place_of_sums(sums, i, column)); }

// A head of a window, and a thread's registers and memory for it.
class HeadOfWindow {
 public:
  HeadOfWindow(const Shape& shape, Workspace::OfThread& own)
      : shape_(shape),
        n_(divided_up(shape.n_positions, kSide)),
        depths_(divided_up(shape.width, kSide)),
        scale_(1 / std::sqrt(float(shape.width))) {
    const int64_t packed = n_ * depths_ * kStep;
    uint16_t* at = own.halves.of(7 * packed + 2 * n_ * (1 + kTurned) * kStep);
    for (uint16_t** part : {&query_, &key_, &value_, &d_, &query_rows_, &key_rows_, &d_rows_}) *part = at, at += packed;
    probabilities_ = at, at += n_ * kStep;
    d_scores_ = at, at += n_ * kStep;
    for (uint16_t** part : {&turned_probabilities_, &turned_d_scores_}) *part = at, at += n_ * kTurned * kStep;
    float* sums = own.floats.of(2 * n_ * kApart + (2 * n_ * depths_ + 1) * kBlockSums);
    for (float** part : {&scores_, &d_probabilities_}) *part = sums, sums += n_ * kApart;
    for (float** part : {&d_key_, &d_value_}) *part = sums, sums += n_ * depths_ * kBlockSums;
    block_ = sums;
  }

  void forward(const uint16_t* qkv, uint16_t* mixed, float* log_sums) {
    const int64_t C = shape_.n_embd();
    pack_all(LeftOfRows{part(qkv, 0)}, n_, depths_, query_);
    pack_all(RightOfColumns{part(qkv, 1)}, n_, depths_, key_);
    pack_all(RightOfRows{part(qkv, 2)}, depths_, n_, value_);
    for (int64_t i = 0; i < n_; ++i) {
      float shares[kSide];
      products_of(query_, key_, i, scores_);
      for (int64_t row = 0; row < kSide; ++row) {
        Vec largest = splat(-INFINITY), total{};
        each_block(i, [&](int64_t j, bool last) {
          for (int64_t c = 0; c < kSide; c += kLanes) {
            Vec score = row_of_sums(scores_ + j * kApart, row, c);
            if (last) score = seen(score, row, c, -INFINITY);
            largest = score > largest ? score : largest;
          }
        });
        const float most = maximum(largest);
        each_block(i, [&](int64_t j, bool last) {
          Vec weights[kLineVectors];
          for (int v = 0; v < kLineVectors; ++v) {
            const Vec score = row_of_sums(scores_ + j * kApart, row, v * kLanes);
            weights[v] = power_of_two((score - most) * (scale_ * kLog2E));
            if (last) weights[v] = seen(weights[v], row, v * kLanes, 0);
            total += weights[v];
          }
          write_line(probabilities_ + j * kStep + row * kTileDepth, weights);
        });
        const float whole = sum(total);
        shares[row] = 1 / whole;
        if (i * kSide + row < shape_.n_positions) log_sums[i * kSide + row] = most * scale_ + std::log(whole);
      }
      for (int64_t depth = 0; depth < depths_; ++depth) {
        multiplier_.panels(probabilities_, value_ + depth * n_ * kStep, i + 1, false, block_, nullptr, 0);
        write_block(mixed, C, i, depth, block_, shares);
      }
    }
  }

  void backward(const uint16_t* qkv, const float* log_sums, const uint16_t* d_mixed, uint16_t* d_qkv) {
    const int64_t C = shape_.n_embd();
    const Matrix d{d_mixed, shape_.n_positions, shape_.width, C};
    pack_all(LeftOfRows{part(qkv, 0)}, n_, depths_, query_);
    pack_all(RightOfRows{part(qkv, 0)}, depths_, n_, query_rows_);
    pack_all(RightOfColumns{part(qkv, 1)}, n_, depths_, key_);
    pack_all(RightOfRows{part(qkv, 1)}, depths_, n_, key_rows_);
    pack_all(RightOfColumns{part(qkv, 2)}, n_, depths_, value_);
    pack_all(LeftOfRows{d}, n_, depths_, d_);
    pack_all(RightOfRows{d}, depths_, n_, d_rows_);
    for (int64_t i = 0; i < n_; ++i) {
      products_of(query_, key_, i, scores_);
      products_of(d_, value_, i, d_probabilities_);
      for (int64_t row = 0; row < kSide; ++row) {
        // A query that fills up the last panel has no probabilities.
        const float log_sum = i * kSide + row < shape_.n_positions ? log_sums[i * kSide + row] : INFINITY;
        Vec together{};
        each_block(i, [&](int64_t j, bool last) {
          Vec probabilities[kLineVectors];
          for (int v = 0; v < kLineVectors; ++v) {
            const Vec score = row_of_sums(scores_ + j * kApart, row, v * kLanes);
            probabilities[v] = power_of_two(multiply_add(score, splat(scale_ * kLog2E), splat(-log_sum * kLog2E)));
            if (last) probabilities[v] = seen(probabilities[v], row, v * kLanes, 0);
            together = multiply_add(probabilities[v], row_of_sums(d_probabilities_ + j * kApart, row, v * kLanes), together);
            store(sums_at(scores_ + j * kApart, row, v * kLanes), probabilities[v] * scale_);
          }
          write_line(probabilities_ + j * kStep + row * kTileDepth, probabilities);
        });
        const float mean = sum(together);
        each_block(i, [&](int64_t j, bool) {
          Vec d_scores[kLineVectors];
          for (int v = 0; v < kLineVectors; ++v)
            d_scores[v] = row_of_sums(scores_ + j * kApart, row, v * kLanes) *
                          (row_of_sums(d_probabilities_ + j * kApart, row, v * kLanes) - mean);
          write_line(d_scores_ + j * kStep + row * kTileDepth, d_scores);
        });
      }
      for (int64_t depth = 0; depth < depths_; ++depth) {
        multiplier_.panels(d_scores_, key_rows_ + depth * n_ * kStep, i + 1, false, block_, nullptr, 0);
        write_block(d_qkv, 3 * C, i, depth, block_, nullptr);
      }
      for (int64_t j = 0; j <= i; ++j) {
        turn(d_scores_, i, j, turned_d_scores_);
        turn(probabilities_, i, j, turned_probabilities_);
      }
      if (i % kTurned == kTurned - 1 || i == n_ - 1) {
        add_turned(turned_d_scores_, query_rows_, i, d_key_);
        add_turned(turned_probabilities_, d_rows_, i, d_value_);
      }
    }
    for (int64_t j = 0; j < n_; ++j)
      for (int64_t depth = 0; depth < depths_; ++depth) {
        write_block(d_qkv + C, 3 * C, j, depth, d_key_ + (j * depths_ + depth) * kBlockSums, nullptr);
        write_block(d_qkv + 2 * C, 3 * C, j, depth, d_value_ + (j * depths_ + depth) * kBlockSums, nullptr);
      }
  }

 private:
  // Queries (0), keys (1) or values (2) of this head, (positions, width).
  Matrix part(const uint16_t* qkv, int64_t which) const {
    const int64_t C = shape_.n_embd();
    return {qkv + which * C, shape_.n_positions, shape_.width, 3 * C};
  }

  // Calls body(block, whether it is the queries' own block) for the blocks of keys up to panel i.
  template <class Body>
  static void each_block(int64_t i, Body body) {
    for (int64_t j = 0; j < i; ++j) body(j, false);
    body(i, true);
  }

  // Products of the rows of panel i with those of all panels up to it.
  void products_of(const uint16_t* left, const uint16_t* right, int64_t i, float* to) {
    for (int64_t j = 0; j <= i; ++j)
      multiplier_.panels(left + i * depths_ * kStep, right + j * depths_ * kStep, depths_, false,
                      to + j * kApart, nullptr, 0);
  }

  // Keeps the block of panel i's queries and panel j's keys, transposed: a step of the keys' panel.
  static void turn(const uint16_t* blocks, int64_t i, int64_t j, uint16_t* turned) {
    const Matrix block{blocks + j * kStep, kSide, kSide};
    LeftOfColumns{block}.pack(0, 0, turned + (j * kTurned + i % kTurned) * kStep, false);
  }

  // Adds what was turned of the last panels of queries, panel i the last of them, times the queries' rows, to the sums of
  // the keys.
  void add_turned(const uint16_t* turned, const uint16_t* rows, int64_t i, float* to) {
    const int64_t begin = i / kTurned * kTurned;
    for (int64_t j = 0; j <= i; ++j) {
      const int64_t first = std::max(begin, j);
      for (int64_t depth = 0; depth < depths_; ++depth)
        multiplier_.panels(turned + (j * kTurned + first % kTurned) * kStep, rows + (depth * n_ + first) * kStep,
                        i + 1 - first, begin > j, to + (j * depths_ + depth) * kBlockSums, nullptr, 0);
    }
  }

  // A block of sums, each row times its share (null: 1), as bf16 into rows `stride` apart; past the caches where lines are
  // whole, for with all heads' they are more than stays there.
  void write_block(uint16_t* to, int64_t stride, int64_t i, int64_t depth, const float* block, const float* shares) const {
    const int64_t n_rows = std::min(kSide, shape_.n_positions - i * kSide);
    const int64_t n_columns = std::min(kSide, shape_.width - depth * kSide);
    to += i * kSide * stride + depth * kSide;
    for (int64_t row = 0; row < n_rows; ++row, to += stride)
      for (int64_t c = 0; c < n_columns; c += kLanes)
        stream_some(to + c, row_of_sums(block, row, c) * (shares ? shares[row] : 1.f),
                    std::min<int64_t>(kLanes, n_columns - c));
  }

  // Panels of queries whose blocks are turned before they are added up, so that sums are seldom stored and loaded again.
  static constexpr int64_t kTurned = 8;
  // From one block of a panel's scores to the next: with pages between them, a row's would meet in one set of the L1 cache.
  static constexpr int64_t kApart = kBlockSums + kTileSide;

  Multiplier multiplier_;
  const Shape shape_;
  const int64_t n_, depths_;  // panels of positions, and of a head's width
  const float scale_;
  uint16_t *query_, *key_, *value_, *d_, *query_rows_, *key_rows_, *d_rows_, *probabilities_, *d_scores_;
  uint16_t *turned_probabilities_, *turned_d_scores_;
  float *scores_, *d_probabilities_, *d_key_, *d_value_, *block_;
};

Workspace workspace;

}  // namespace

extern "C" {

int groundling_unit_of_attention() { return unit(); }

// mixed (n_windows, n_positions, n_embd) from queries, keys and values side by side, qkv (..., 3 n_embd); log_sums
// (n_windows, n_head, n_positions), of the softmax's denominators. `width` is a head's.
void groundling_attention(int n_threads, int64_t n_windows, int64_t n_positions, int64_t n_head, int64_t width,
                          const uint16_t* qkv, uint16_t* mixed, float* log_sums) {
  const Shape shape{n_windows, n_positions, n_head, width};
  each_head<HeadOfWindow>(workspace, n_threads, shape, [&](HeadOfWindow& head, int64_t i, int64_t row, int64_t column) {
    const int64_t C = shape.n_embd();
    head.forward(qkv + row * 3 * C + column, mixed + row * C + column, log_sums + i * n_positions);
  });
}

// d_qkv from d_mixed, qkv and log_sums, all as above.
void groundling_attention_backward(int n_threads, int64_t n_windows, int64_t n_positions, int64_t n_head, int64_t width,
                                   const uint16_t* qkv, const float* log_sums, const uint16_t* d_mixed,
                                   uint16_t* d_qkv) {
  const Shape shape{n_windows, n_positions, n_head, width};
  each_head<HeadOfWindow>(workspace, n_threads, shape, [&](HeadOfWindow& head, int64_t i, int64_t row, int64_t column) {
    const int64_t C = shape.n_embd();
    head.backward(qkv + row * 3 * C + column, log_sums + i * n_positions, d_mixed + row * C + column,
                  d_qkv + row * 3 * C + column);
  });
}

}  // extern "C"
