// Cross-entropy of rows of logits, and its gradient in their place.
//
// Invariant: a row's loss and gradient depend on nothing but the row: not on the others, nor on the number of threads.
// Logits are fp32 or bf16; all arithmetic is fp32. `kernels/head.py` makes the logits and uses the gradient.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "exponentials.h"
#include "vectors.h"

namespace {

using namespace groundling;

// A row in vectors: all but the last are whole; the last, of 1 to kLanes elements, is filled up with -inf, and its last
// element counts `n_last` times.
template <class Format>
struct Row {
  typename Format::Element* logits;
  int64_t whole;  // elements before the last vector
  int64_t n_rest;
  Vec rest;

  Row(typename Format::Element* from, int64_t n_vocab, float log_n_last)
      : logits(from), whole((n_vocab - 1) / kLanes * kLanes), n_rest(n_vocab - whole) {
    float lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = i < n_rest ? Format::value(logits[whole + i]) : -INFINITY;
    lanes[n_rest - 1] += log_n_last;
    rest = load<Vec>(lanes);
  }

  template <class Function>
  void each(Function function) const {
    for (int64_t at = 0; at < whole; at += kLanes) function(Format::read(logits + at));
    function(rest);
  }

  // The largest logit, and the logarithm of the sum of e^(logit - largest); not a number if a logit is none, or infinite.
  std::pair<float, float> log_sum() const {
    Vec largest = splat(-INFINITY), total{};
    each([&](Vec v) { largest = v > largest ? v : largest; });
    const float most = maximum(largest);
    each([&](Vec v) { total += exponential(v - most); });
    return {most, std::log(sum(total)) + 0 * (most - most)};
  }

  // Softmax, given the logarithm of its denominator, in the logits' place.
  void to_softmax(float most, float log_sum) {
    for (int64_t at = 0; at < whole; at += kLanes)
      Format::write(logits + at, exponential((Format::read(logits + at) - most) - log_sum));
    float lanes[kLanes];
    store(lanes, exponential((rest - most) - log_sum));
    for (int64_t i = 0; i < n_rest; ++i) logits[whole + i] = Format::element(lanes[i]);
  }
};

template <class Format>
void cross_entropy(int n_threads, typename Format::Element* logits, int64_t n_rows, int64_t n_vocab,
                   const int64_t* targets, float log_n_last, bool with_gradient, float* losses) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t i = 0; i < n_rows; ++i) {
    typename Format::Element* row = logits + i * n_vocab;
    const int64_t target = targets[i];
    if (target < 0) {  // ignored
      losses[i] = 0;
      if (with_gradient) std::fill(row, row + n_vocab, typename Format::Element{});
      continue;
    }
    Row<Format> vectors(row, n_vocab, log_n_last);
    const auto [most, log_sum] = vectors.log_sum();
    const float logit = Format::value(row[target]);
    losses[i] = log_sum + (most - logit);
    if (!with_gradient) continue;
    vectors.to_softmax(most, log_sum);
    // From the logit again, not from the rounded probability: near 1 the difference would be lost.
    const float counted = target == n_vocab - 1 ? logit + log_n_last : logit;
    row[target] = Format::element(std::expm1((counted - most) - log_sum));
  }
}

}  // namespace

extern "C" {

// logits (n_rows, n_vocab), fp32 or, with `bf16`, bf16; targets (n_rows,), of which negative ones are ignored; the last
// logit of a row counts e^log_n_last times. Writes losses (n_rows,) and, if asked, the gradient over the logits.
void groundling_cross_entropy(int n_threads, int bf16, void* logits, int64_t n_rows, int64_t n_vocab,
                              const int64_t* targets, float log_n_last, int with_gradient, float* losses) {
  if (bf16)
    cross_entropy<Bf16>(n_threads, static_cast<uint16_t*>(logits), n_rows, n_vocab, targets, log_n_last, with_gradient,
                        losses);
  else
    cross_entropy<Fp32>(n_threads, static_cast<float*>(logits), n_rows, n_vocab, targets, log_n_last, with_gradient,
                        losses);
}

// sums (n, m) += products (m, n) transposed, bf16; or = with `first`.
void groundling_add_transposed(int n_threads, const uint16_t* products, int64_t n, int64_t m, int first, float* sums) {
  constexpr int64_t kTile = 64;
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t row = 0; row < n; row += kTile) {
    const int64_t n_rows = std::min(kTile, n - row);
    for (int64_t column = 0; column < m; column += kTile) {
      const int64_t n_columns = std::min(kTile, m - column);
      float tile[kTile][kTile + 1];  // odd, so that a column does not meet itself in the cache
      for (int64_t j = 0; j < n_columns; ++j)
        for (int64_t i = 0; i < n_rows; ++i) tile[i][j] = Bf16::value(products[(column + j) * n + row + i]);
      for (int64_t i = 0; i < n_rows; ++i) {
        float* to = sums + (row + i) * m + column;
        for (int64_t j = 0; j < n_columns; ++j) to[j] = (first ? 0.f : to[j]) + tile[i][j];
      }
    }
  }
}

}  // extern "C"
