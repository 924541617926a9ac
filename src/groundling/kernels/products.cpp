// A layer's three products in the matrix unit: forward with its bias, and the gradients of its input and, in fp32 and with
// that of the bias, of its weight.
//
// Invariant: sums are fp32 from beginning to end, and rounded once where they become bf16. `kernels/products.py` says when.

#include "products.h"

namespace {

groundling::Workspace workspace;

}  // namespace

extern "C" {

// Whether this file's other functions may be called.
int groundling_has_products() { return groundling::tiles_allowed(); }

// d_weight (n_out, n_in) = d_y (n_rows, n_out) transposed x (n_rows, n_in), both bf16; d_bias (n_out,) is the sum of d_y's
// rows.
void groundling_weight_gradient(int n_threads, int64_t n_rows, int64_t n_out, int64_t n_in, const uint16_t* d_y,
                                const uint16_t* x, float* d_weight, float* d_bias) {
  using namespace groundling;
  const std::lock_guard<std::mutex> alone(workspace.mutex);
  product(workspace, n_threads, LeftOfColumns{{d_y, n_rows, n_out}, d_bias}, RightOfRows{{x, n_rows, n_in}}, 0,
          Finish{n_out, n_in, [](int64_t, int64_t) {},  // what is stored goes past the caches
                 [=](Vec sum, int64_t at, int64_t, int64_t n) { stream_some(d_weight + at, sum, n); }});
}

// y (n_rows, n_out) = x (n_rows, n_in) weight (n_out, n_in) transposed, and the bias (n_out,), fp32 (null: none), in each row.
void groundling_linear(int n_threads, int64_t n_rows, int64_t n_out, int64_t n_in, const uint16_t* x,
                       const uint16_t* weight, const float* bias, uint16_t* y) {
  using namespace groundling;
  const std::lock_guard<std::mutex> alone(workspace.mutex);
  product(workspace, n_threads, LeftOfRows{{x, n_rows, n_in}}, RightOfColumns{{weight, n_out, n_in}}, 0,
          Finish{n_rows, n_out, [](int64_t, int64_t) {}, [=](Vec sum, int64_t at, int64_t column, int64_t n) {
                   stream_some(y + at, bias ? sum + load_some(bias + column, n) : sum, n);
                 }});
}

// d_x (n_rows, n_in) = d_y (n_rows, n_out) weight (n_out, n_in), all bf16.
void groundling_input_gradient(int n_threads, int64_t n_rows, int64_t n_out, int64_t n_in, const uint16_t* d_y,
                               const uint16_t* weight, uint16_t* d_x) {
  using namespace groundling;
  const std::lock_guard<std::mutex> alone(workspace.mutex);
  product(workspace, n_threads, LeftOfRows{{d_y, n_rows, n_out}}, RightOfRows{{weight, n_out, n_in}}, 0,
          Finish{n_rows, n_in, [](int64_t, int64_t) {},
                 [=](Vec sum, int64_t at, int64_t, int64_t n) { stream_some(d_x + at, sum, n); }});
}

}  // extern "C"
