// The head, its loss and all gradients in bf16, without a matrix of logits in fp32.
//
// Invariant: a position's loss and gradient depend on nothing but the position. The exponentials of the logits, less a
// shift that is the position's own, are rounded to bf16 once and kept undivided, an id's side by side ("weights" below);
// what is divided by their sum are the much smaller matrices that are multiplied with them. `kernels/head.py` says when.

#include <cmath>

#include "exponentials.h"
#include "products.h"

namespace {

using namespace groundling;

constexpr int64_t kIds = 512;          // whose exponentials are summed by one thread, in their order
constexpr float kMostSum = 1e30f;      // above it the shift is raised by kRaise, so that sums stay far from overflow
constexpr float kRaise = 60.f;
constexpr int kMostRaises = 16;        // then the loss, of a thousand nats, is called infinite
constexpr float kIgnoredShift = 1e30f;  // all its exponentials are next to nothing

Workspace workspace;
Buffer<float> partial_sums, places;
Buffer<uint16_t> divided;

struct Head {
  int n_threads;
  int64_t n_rows, n_vocab, n_in;
  const uint16_t *hidden, *weight;
  const int64_t* targets;
  float log_n_last;
  uint16_t* weights;  // (n_vocab, n_rows), rows `stride` apart and written up to the end of a line of 64 bytes; or null
  int64_t stride;
  float *shifts, *sums, *logits;  // (n_rows,): of each position; the logit is its target's

  // The target's logit is a good shift: unless the model is far off, no exponential is large, and their sum is not small.
  void choose_shifts() const {
#pragma omp parallel for schedule(static) num_threads(n_threads)
    for (int64_t i = 0; i < n_rows; ++i) {
      Vec total{};
      if (targets[i] >= 0)
        for (int64_t c = 0; c < n_in; c += kLanes) {
          const int64_t n = std::min<int64_t>(kLanes, n_in - c);
          total = multiply_add(read_some<Bf16>(hidden + i * n_in + c, n),
                               read_some<Bf16>(weight + targets[i] * n_in + c, n), total);
        }
      shifts[i] = targets[i] < 0 ? kIgnoredShift : sum(total);
      logits[i] = 0;
    }
  }

  struct Exponentials {
    const Head& head;
    float* partial;  // a row for every kIds ids
    void prepare(int64_t, int64_t) const {}  // what is stored goes past the caches
    void operator()(int64_t id, int64_t row, const float* block) const {
      const int64_t n_ids = std::min(kSide, head.n_vocab - id), n_rows = std::min(kSide, head.n_rows - row);
      const auto n_lanes = [=](int vector) { return std::clamp<int64_t>(n_rows - vector * kLanes, 0, kLanes); };
      float* const totals_at = partial + id / kIds * head.n_rows + row;
      Vec shifts[kLineVectors], totals[kLineVectors], exponents[kLineVectors];
      for (int v = 0; v < kLineVectors; ++v) {
        shifts[v] = load_some(head.shifts + row + v * kLanes, n_lanes(v));
        totals[v] = load_some(totals_at + v * kLanes, n_lanes(v));
      }
      for (int64_t i = 0; i < n_ids; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kLineVectors; ++v) {
          Vec logit = row_of_sums(block, i, v * kLanes);
          if (id + i == head.n_vocab - 1) logit += head.log_n_last;
          exponents[v] = power_of_two((logit - shifts[v]) * kLog2E);
          totals[v] += exponents[v];
        }
        if (head.weights) stream_line(head.weights + (id + i) * head.stride + row, exponents);
      }
      for (int v = 0; v < kLineVectors; ++v) store_some(totals_at + v * kLanes, totals[v], n_lanes(v));
      for (int64_t i = 0; i < n_rows; ++i)
        if (const int64_t target = head.targets[row + i] - id; target >= 0 && target < n_ids)
          head.logits[row + i] = row_of_sums(block, target, i / kLanes * kLanes)[i % kLanes];
    }
  };

  void sum_exponentials() const {
    const int64_t n_partial = divided_up(n_vocab, kIds);
    float* const partial = partial_sums.of(n_partial * n_rows);
    std::fill_n(partial, n_partial * n_rows, 0.f);
    product(workspace, n_threads, LeftOfRows{{weight, n_vocab, n_in}}, RightOfColumns{{hidden, n_rows, n_in}}, kIds,
            Exponentials{*this, partial});
    for (int64_t i = 0; i < n_rows; ++i) {
      double total = 0;
      for (int64_t part = 0; part < n_partial; ++part) total += partial[part * n_rows + i];
      sums[i] = static_cast<float>(total);
    }
  }

  // Whether all sums are so small that nothing overflows; else the shifts are raised where one is not.
  bool settled() const {
    bool all = true;
    for (int64_t i = 0; i < n_rows; ++i)
      if (targets[i] >= 0 && sums[i] > kMostSum) {
        shifts[i] += kRaise;
        all = false;
      }
    return all;
  }

  // The losses; and at each target, its weight less the sum: the gradient over the logits, times the sum.
  void finish(float* losses) const {
    for (int64_t i = 0; i < n_rows; ++i) {
      const int64_t target = targets[i];
      if (target < 0) {
        losses[i] = 0;
        continue;
      }
      const float log_sum = sums[i] > kMostSum ? INFINITY : std::log(sums[i]);
      losses[i] = log_sum + (shifts[i] - logits[i]);
      const float counted = target == n_vocab - 1 ? logits[i] + log_n_last : logits[i];
      if (weights) weights[target * stride + i] = Bf16::element(std::exp(counted - shifts[i]) - sums[i]);
    }
  }
};

}  // namespace

extern "C" {

int groundling_unit_of_head_products() { return unit(); }

// Cross-entropy of hidden (n_rows, n_in) weight (n_vocab, n_in) transposed against targets (n_rows,), of which negative
// ones are ignored; the last logit of a row counts e^log_n_last times. Writes losses (n_rows,) and, if `weights`
// (n_vocab, stride), which is scratch whose rows begin at multiples of 64 bytes, is not null, d_hidden (n_rows, n_in) in
// bf16 and d_weight (n_vocab, n_in) in fp32, or onto what is there with `more`.
void groundling_head(int n_threads, int64_t n_rows, int64_t n_vocab, int64_t n_in, const uint16_t* hidden,
                     const uint16_t* weight, const int64_t* targets, float log_n_last, int more, uint16_t* weights,
                     int64_t stride, float* losses, uint16_t* d_hidden, float* d_weight) {
  const std::lock_guard<std::mutex> alone(workspace.mutex);
  float* const shifts = places.of(3 * n_rows);
  float *const sums = shifts + n_rows, *const logits = sums + n_rows;
  const Head head{n_threads, n_rows, n_vocab, n_in,   hidden, weight, targets,
                  log_n_last, weights, stride, shifts, sums, logits};
  head.choose_shifts();
  head.sum_exponentials();
  for (int raises = 0; raises < kMostRaises && !head.settled(); ++raises) head.sum_exponentials();
  head.finish(losses);
  if (!weights) return;

  uint16_t* const shares = divided.of(n_rows * n_in);
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t i = 0; i < n_rows; ++i) {
    sums[i] = targets[i] < 0 ? 0 : 1 / sums[i];  // from here on, what is multiplied with
    for (int64_t c = 0; c < n_in; c += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, n_in - c);
      write_some<Bf16>(shares + i * n_in + c, read_some<Bf16>(hidden + i * n_in + c, n) * sums[i], n);
    }
  }
  product(workspace, n_threads, LeftOfRows{{weights, n_vocab, n_rows, stride}}, RightOfRows{{shares, n_rows, n_in}}, 0,
          Finish{n_vocab, n_in, [=](int64_t n, int64_t at) { if (more) fetch_block(d_weight + at, n, n_in); },
                 [=](Vec sum, int64_t at, int64_t, int64_t n) {
                   if (more)
                     store_some(d_weight + at, load_some(d_weight + at, n) + sum, n);
                   else
                     stream_some(d_weight + at, sum, n);
                 }});
  product(workspace, n_threads, LeftOfColumns{{weights, n_vocab, n_rows, stride}}, RightOfRows{{weight, n_vocab, n_in}}, 0,
          Finish{n_rows, n_in, [=](int64_t n, int64_t at) { fetch_block(d_hidden + at, n, n_in); },
                 [=](Vec sum, int64_t at, int64_t, int64_t n) {
                   write_some<Bf16>(d_hidden + at, sum * sums[at / n_in], n);
                 }});
}

}  // extern "C"
