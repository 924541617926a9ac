// The gradient of a weight matrix in the matrix unit: in fp32, and with that of the bias, in one go.
//
// Invariant: sums are fp32 from beginning to end. `kernels/products.py` says when.

#include "products.h"

namespace {

groundling::Workspace workspace;

}  // namespace

extern "C" {

// Whether this file's other function may be called.
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

}  // extern "C"
