// What lies between the matrix products of a GPT-2 block, forward and backward, a sweep over memory each.
//
// Invariant: the same bits whatever the number of threads: a row's results depend on nothing but the row, and sums over
// rows go in blocks of fixed size. Matrices are contiguous, fp32 or bf16 where a flag says so; all arithmetic is fp32.
// `kernels/native.py` says what each sweep is for.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "exponentials.h"
#include "runs.h"
#include "vectors.h"

namespace {

using namespace groundling;

constexpr int64_t kBlockRows = 32;  // rows summed one after the other; blocks are then summed in their order
constexpr float kEpsilon = 1e-5f;   // LayerNorm's, as in GPT-2's released code

// The derivative of x s(2u), from s(2u). Far below 0 a share that is not quite 0 would be multiplied by a large cube.
inline Vec gelu_slope(Vec x, Vec share) {
  const Vec near = limited(x, -100.f, 100.f), value = near * share;
  const Vec twice_u_slope = multiply_add(near * near, splat(1.59576912f * 3 * 0.044715f), splat(1.59576912f));
  return multiply_add(multiply_add(-value, share, value), twice_u_slope, share);
}

template <class Function>
void with_format(int bf16, Function function) {
  if (bf16)
    function(Bf16{});
  else
    function(Fp32{});
}

template <class Format, class Pointer>
auto elements(Pointer* pointer) {
  using Element = typename Format::Element;
  return static_cast<std::conditional_t<std::is_const_v<Pointer>, const Element*, Element*>>(pointer);
}

// Calls sweep(row, sums) for every row; `totals` becomes the sum of what it adds to `sums`, of n_sums floats.
template <class Sweep>
void sum_rows(int n_threads, int64_t n_rows, int64_t n_sums, float* totals, Sweep sweep) {
  const int64_t n_blocks = (n_rows + kBlockRows - 1) / kBlockRows;
  const std::unique_ptr<float[]> partial(new float[n_blocks * n_sums]);
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t block = 0; block < n_blocks; ++block) {
    float* sums = partial.get() + block * n_sums;
    std::fill_n(sums, n_sums, 0.f);
    const int64_t end = std::min(n_rows, (block + 1) * kBlockRows);
    for (int64_t row = block * kBlockRows; row < end; ++row) sweep(row, sums);
    streamed();  // what the sweep may have
  }
  const int64_t n_vectors = (n_sums + kLanes - 1) / kLanes;
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t i = 0; i < n_vectors; ++i) {
    const int64_t c = i * kLanes;
    each_run(std::min<int64_t>(kLanes, n_sums - c), [&](int64_t, auto n) {
      double total[kLanes] = {};  // thousands of blocks with one sign would drift in fp32
      for (int64_t block = 0; block < n_blocks; ++block) {
        const Vec some = read<Fp32>(partial.get() + block * n_sums + c, n);
        for (int lane = 0; lane < kLanes; ++lane) total[lane] += some[lane];
      }
      Vec rounded;
      for (int lane = 0; lane < kLanes; ++lane) rounded[lane] = static_cast<float>(total[lane]);
      write<Fp32>(totals + c, rounded, n);
    });
  }
}

template <class N>
inline void add_to(float* sums, Vec value, N n) {
  write<Fp32>(sums, read<Fp32>(sums, n) + value, n);
}

template <class Update, class Normed>
void add_layer_norm(int n_threads, int64_t n_rows, int64_t width, const float* x, const typename Update::Element* update,
                    const float* weight, const float* bias, float* sums, typename Normed::Element* normed,
                    float* statistics) {
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t row = 0; row < n_rows; ++row) {
    const int64_t at = row * width;
    Vec total{}, squares{};
    each_run(width, [&](int64_t c, auto n) {
      fetch_ahead(x + at + c);
      fetch_ahead(sums + at + c);
      const Vec value = read<Fp32>(x + at + c, n) + read<Update>(update + at + c, n);
      write<Fp32>(sums + at + c, value, n);
      total += value;
    });
    const float near = sum(total) / width;
    Vec rest{};
    each_run(width, [&](int64_t c, auto n) {
      const Vec centred = first_lanes(read<Fp32>(sums + at + c, n) - near, n);
      rest += centred;
      squares = multiply_add(centred, centred, squares);
    });
    const float off = sum(rest) / width, mean = near + off;
    const float scale = 1 / std::sqrt(std::max(sum(squares) / width - off * off, 0.f) + kEpsilon);
    each_run(width, [&](int64_t c, auto n) {
      const Vec value = (read<Fp32>(sums + at + c, n) - mean) * scale;
      write<Normed>(normed + at + c, multiply_add(value, read<Fp32>(weight + c, n), read<Fp32>(bias + c, n)), n);
    });
    statistics[2 * row] = mean;
    statistics[2 * row + 1] = scale;
  }
}

template <class Update, class Normed>
void add_layer_norm_backward(int n_threads, int64_t n_rows, int64_t width, const float* sums, const float* statistics,
                             const float* weight, const float* d_sums, const typename Normed::Element* d_normed,
                             float* d_x, typename Update::Element* d_update, float* d_parameters) {
  sum_rows(n_threads, n_rows, 2 * width, d_parameters, [=](int64_t row, float* totals) {
    const int64_t at = row * width;
    const float mean = statistics[2 * row], scale = statistics[2 * row + 1];
    Vec along_one{}, along_value{};
    each_run(width, [&](int64_t c, auto n) {
      fetch_ahead(sums + at + c);
      if (!d_update) fetch_ahead(d_x + at + c);
      const Vec d = read<Normed>(d_normed + at + c, n);
      const Vec value = (read<Fp32>(sums + at + c, n) - mean) * scale;
      add_to(totals + c, d * value, n);
      add_to(totals + width + c, d, n);
      const Vec d_value = d * read<Fp32>(weight + c, n);  // 0 in lanes that are none
      along_one += d_value;
      along_value = multiply_add(d_value, value, along_value);
    });
    const float mean_one = sum(along_one) / width, mean_value = sum(along_value) / width;
    each_run(width, [&](int64_t c, auto n) {
      const Vec value = (read<Fp32>(sums + at + c, n) - mean) * scale;
      const Vec d_value = read<Normed>(d_normed + at + c, n) * read<Fp32>(weight + c, n);
      Vec d = (d_value - mean_one - value * mean_value) * scale;
      if (d_sums) d += read<Fp32>(d_sums + at + c, n);
      if (d_update) {  // the next product reads that one, so d_x is not read soon
        stream_some(d_x + at + c, d, n);
        write<Update>(d_update + at + c, d, n);
      } else {
        write<Fp32>(d_x + at + c, d, n);
      }
    });
  });
}

}  // namespace

extern "C" {

// sums = x + update and normed = layer_norm(sums), all (n_rows, width); statistics (n_rows, 2) are each row's mean and
// the inverse of its standard deviation.
void groundling_add_layer_norm(int n_threads, int64_t n_rows, int64_t width, const float* x, int update_bf16,
                               const void* update, const float* weight, const float* bias, float* sums,
                               int normed_bf16, void* normed, float* statistics) {
  with_format(update_bf16, [=](auto update_format) {
    with_format(normed_bf16, [=](auto normed_format) {
      using Update = decltype(update_format);
      using Normed = decltype(normed_format);
      add_layer_norm<Update, Normed>(n_threads, n_rows, width, x, elements<Update>(update), weight, bias, sums,
                                     elements<Normed>(normed), statistics);
    });
  });
}

// d_x from d_sums (null: zeros) and d_normed; d_update is d_x in another format (null: not wanted); d_parameters
// (2, width) are those of weight and bias.
void groundling_add_layer_norm_backward(int n_threads, int64_t n_rows, int64_t width, const float* sums,
                                        const float* statistics, const float* weight, const float* d_sums,
                                        int normed_bf16, const void* d_normed, float* d_x, int update_bf16,
                                        void* d_update, float* d_parameters) {
  with_format(update_bf16, [=](auto update_format) {
    with_format(normed_bf16, [=](auto normed_format) {
      using Update = decltype(update_format);
      using Normed = decltype(normed_format);
      add_layer_norm_backward<Update, Normed>(n_threads, n_rows, width, sums, statistics, weight, d_sums,
                                              elements<Normed>(d_normed), d_x, elements<Update>(d_update),
                                              d_parameters);
    });
  });
}

// activated = gelu(products + bias), (n_rows, width); with `slopes`, its derivative in the products' place.
void groundling_bias_gelu(int n_threads, int64_t n_rows, int64_t width, int bf16, void* products, const float* bias,
                          void* activated, int slopes) {
  with_format(bf16, [=](auto format) {
    using Format = decltype(format);
    auto* products_at = elements<Format>(products);
    auto* to = elements<Format>(activated);
    const float* const bias_at = bias;  // of this function: clang loses what a lambda captured in a parallel region
    const bool with_slopes = slopes;
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (int64_t row = 0; row < n_rows; ++row)
      each_run(width, [&](int64_t c, auto n) {
        const int64_t at = row * width + c;
        const Vec x = read<Format>(products_at + at, n) + read<Fp32>(bias_at + c, n);
        const Vec share = std::is_same_v<Format, Bf16> ? rough_gelu_share(x) : gelu_share(x), value = x * share;
        write<Format>(to + at, value, n);
        if (with_slopes) write<Format>(products_at + at, gelu_slope(x, share), n);
      });
  });
}

// The gradient of the products, in the place of the slopes, and that of the bias (width,).
void groundling_bias_gelu_backward(int n_threads, int64_t n_rows, int64_t width, int bf16, void* slopes,
                                   const void* d_activated, float* d_bias) {
  with_format(bf16, [=](auto format) {
    using Format = decltype(format);
    auto* slopes_at = elements<Format>(slopes);
    const auto* d_at = elements<Format>(d_activated);
    sum_rows(n_threads, n_rows, width, d_bias, [=](int64_t row, float* totals) {
      each_run(width, [&](int64_t c, auto n) {
        const int64_t at = row * width + c;
        const Vec d = read<Format>(d_at + at, n) * read<Format>(slopes_at + at, n);
        write<Format>(slopes_at + at, d, n);
        add_to(totals + c, d, n);
      });
    });
  });
}

// totals (width,): the sum of all rows.
void groundling_sum_rows(int n_threads, int64_t n_rows, int64_t width, int bf16, const void* rows, float* totals) {
  with_format(bf16, [=](auto format) {
    using Format = decltype(format);
    const auto* from = elements<Format>(rows);
    sum_rows(n_threads, n_rows, width, totals, [=](int64_t row, float* sums) {
      each_run(width, [&](int64_t c, auto n) { add_to(sums + c, read<Format>(from + row * width + c, n), n); });
    });
  });
}

}  // extern "C"
