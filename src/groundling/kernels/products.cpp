// A layer's three products in bf16: forward with its bias, and the gradients of its input and, in fp32 and with that of the
// bias, of its weight. And the symmetric products that Muon takes.
//
// Invariant: sums are fp32 from beginning to end, and rounded once where they become bf16. `kernels/products.py` says when.

#include "products.h"

namespace {

using namespace groundling;

constexpr int64_t kSymmetricRows = 96;  // at most at once
constexpr int64_t kTurns = 4;           // of each thread, for they are of different length
Workspace workspace;

// Where a symmetric product of bf16 matrices is written to: its blocks left of the diagonal, and their mirror images.
struct Mirrored {
  int64_t n;
  float alpha, beta;
  const uint16_t* plus;  // (n, n), times beta; or null
  uint16_t* to;          // (n, n)
  void prepare(int64_t, int64_t) const {}
  void operator()(int64_t row, int64_t column, const float* sums) const {
    if (column > row) return;
    const int64_t n_rows = std::min(kSide, n - row), n_columns = std::min(kSide, n - column);
    alignas(64) uint16_t block[kSide * kSide] = {}, turned[kSide * kSide];
    for (int64_t i = 0; i < n_rows; ++i)
      for (int64_t c = 0; c < n_columns; c += kLanes) {
        const int64_t some = std::min<int64_t>(kLanes, n_columns - c);
        Vec sum = row_of_sums(sums, i, c) * alpha;
        if (plus) sum = multiply_add(read_some<Bf16>(plus + (row + i) * n + column + c, some), splat(beta), sum);
        write_some<Bf16>(block + i * kSide + c, sum, some);
      }
    LeftOfColumns{{block, kSide, kSide}}.pack(0, 0, turned, false);
    if (row == column)
      for (int64_t i = 0; i < kSide; ++i) std::copy(turned + i * kSide + i, turned + (i + 1) * kSide, block + i * kSide + i);
    else
      for (int64_t i = 0; i < n_columns; ++i) std::copy_n(turned + i * kSide, n_rows, to + (column + i) * n + row);
    for (int64_t i = 0; i < n_rows; ++i) std::copy_n(block + i * kSide, n_columns, to + (row + i) * n + column);
  }
};

}  // namespace

extern "C" {

// Whether this file's other functions may be called.
int groundling_unit_of_products() { return unit(); }

// d_weight (n_out, n_in) = d_y (n_rows, n_out) transposed x (n_rows, n_in), both bf16; d_bias (n_out,; null: none) is the
// sum of d_y's rows.
void groundling_weight_gradient(int n_threads, int64_t n_rows, int64_t n_out, int64_t n_in, const uint16_t* d_y,
                                const uint16_t* x, float* d_weight, float* d_bias) {
  const std::lock_guard<std::mutex> alone(workspace.mutex);
  product(workspace, n_threads, LeftOfColumns{{d_y, n_rows, n_out}, d_bias}, RightOfRows{{x, n_rows, n_in}}, 0,
          Finish{n_out, n_in, [](int64_t, int64_t) {},  // what is stored goes past the caches
                 [=](Vec sum, int64_t at, int64_t, int64_t n) { stream_some(d_weight + at, sum, n); }});
}

// y (n_rows, n_out) = x (n_rows, n_in) weight (n_out, n_in) transposed, and the bias (n_out,), fp32 (null: none), in each row.
void groundling_linear(int n_threads, int64_t n_rows, int64_t n_out, int64_t n_in, const uint16_t* x,
                       const uint16_t* weight, const float* bias, uint16_t* y) {
  const std::lock_guard<std::mutex> alone(workspace.mutex);
  product(workspace, n_threads, LeftOfRows{{x, n_rows, n_in}}, RightOfColumns{{weight, n_out, n_in}}, 0,
          Finish{n_rows, n_out, [](int64_t, int64_t) {}, [=](Vec sum, int64_t at, int64_t column, int64_t n) {
                   stream_some(y + at, bias ? sum + load_some(bias + column, n) : sum, n);
                 }});
}

// d_x (n_rows, n_in) = d_y (n_rows, n_out) weight (n_out, n_in), all bf16.
void groundling_input_gradient(int n_threads, int64_t n_rows, int64_t n_out, int64_t n_in, const uint16_t* d_y,
                               const uint16_t* weight, uint16_t* d_x) {
  const std::lock_guard<std::mutex> alone(workspace.mutex);
  product(workspace, n_threads, LeftOfRows{{d_y, n_rows, n_out}}, RightOfRows{{weight, n_out, n_in}}, 0,
          Finish{n_rows, n_in, [](int64_t, int64_t) {},
                 [=](Vec sum, int64_t at, int64_t, int64_t n) { stream_some(d_x + at, sum, n); }});
}

// y (n, n) = alpha x (n, n_terms) z (n, n_terms) transposed + beta plus (n, n; null: none), which the caller knows to be
// symmetric: what is left of the diagonal is computed, and copied to its right. All bf16.
void groundling_symmetric(int n_threads, int64_t n, int64_t n_terms, const uint16_t* x, const uint16_t* z, float alpha,
                          const uint16_t* plus, float beta, uint16_t* y) {
  const std::lock_guard<std::mutex> alone(workspace.mutex);
  const int64_t rows = divided_up(divided_up(n, kTurns * n_threads), kSide) * kSide;
  product<true>(workspace, n_threads, LeftOfRows{{x, n, n_terms}}, RightOfColumns{{z, n, n_terms}},
                std::clamp(rows, kSide, kSymmetricRows), Mirrored{n, alpha, beta, plus, y});
}

}  // extern "C"
