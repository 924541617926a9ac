// AdamW's update of every parameter in one sweep, and the norm of their gradients in another.
//
// Invariant: an element's update depends on its own weight, gradient and moments alone, and a norm is a sum of sums
// over fixed blocks: neither depends on the number of threads or the place in a vector.

#include <cmath>
#include <vector>

#include "vectors.h"

namespace groundling {
namespace {

constexpr int64_t kBlock = 1 << 14;  // elements that a thread takes at a time: 64 KiB of each tensor

struct Parameter {  // as optim/native.py has it
  float* weight;
  const float* gradient;
  float *first, *second;  // moments
  float* n_steps;         // taken so far
  uint16_t* copy;         // the weight in bf16, or null
  int64_t size;
  double learning_rate, beta1, beta2, eps, weight_decay;
};

struct Block {
  int64_t tensor, start, size;
};

template <class SizeOf>
std::vector<Block> blocks_of(int64_t n_tensors, SizeOf size_of) {
  std::vector<Block> blocks;
  for (int64_t tensor = 0; tensor < n_tensors; ++tensor)
    for (int64_t start = 0, size = size_of(tensor); start < size; start += kBlock)
      blocks.push_back({tensor, start, size - start < kBlock ? size - start : kBlock});
  return blocks;
}

// In double, where the square of any float is finite.
double sum_of_squares(const float* values, int64_t size) {
  Doubles sums[4] = {};  // so many that no addition waits for the one before
  const auto add = [&sums](Vec vector, int to) {
    const Doubles lower = widened<0>(vector), upper = widened<1>(vector);
    sums[to] += lower * lower;
    sums[to + 1] += upper * upper;
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    fetch_ahead(values + i);
    fetch_ahead(values + i + kLanes);
    add(load<Vec>(values + i), 0);
    add(load<Vec>(values + i + kLanes), 2);
  }
  for (; i < size; i += kLanes) add(load_some(values + i, size - i), 0);
  const Doubles all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0;
  for (int lane = 0; lane < kLanes / 2; ++lane) total += all[lane];
  return total;
}

// One parameter's constants of this step, from doubles, as PyTorch has them.
struct Update {
  Vec decay, beta1, rest1, beta2, rest2, root_scale, eps, step_size, gradient_scale;

  Update(const Parameter& p, double scale) {
    const double correction1 = 1 - std::pow(p.beta1, *p.n_steps), correction2 = 1 - std::pow(p.beta2, *p.n_steps);
    decay = splat(1 - p.learning_rate * p.weight_decay);
    beta1 = splat(p.beta1), rest1 = splat(1 - p.beta1);
    beta2 = splat(p.beta2), rest2 = splat(1 - p.beta2);
    root_scale = splat(1 / std::sqrt(correction2));
    eps = splat(p.eps);
    step_size = splat(p.learning_rate / correction1);
    gradient_scale = splat(scale);
  }

  void operator()(Vec& weight, Vec gradient, Vec& first, Vec& second) const {
    gradient *= gradient_scale;
    first = multiply_add(first, beta1, gradient * rest1);
    second = multiply_add(second, beta2, gradient * gradient * rest2);
    weight = weight * decay - step_size * first / multiply_add(square_root(second), root_scale, eps);
  }
};

void update_block(const Parameter& p, const Update& update, int64_t start, int64_t size) {
  float *weights = p.weight + start, *firsts = p.first + start, *seconds = p.second + start;
  const float* gradients = p.gradient + start;
  uint16_t* copies = p.copy ? p.copy + start : nullptr;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    fetch_ahead(weights + i);
    fetch_ahead(gradients + i);
    fetch_ahead(firsts + i);
    fetch_ahead(seconds + i);
    Vec weight = load<Vec>(weights + i), first = load<Vec>(firsts + i), second = load<Vec>(seconds + i);
    update(weight, load<Vec>(gradients + i), first, second);
    store(weights + i, weight);
    store(firsts + i, first);
    store(seconds + i, second);
    if (copies) Bf16::write(copies + i, weight);
  }
  if (const int64_t n = size - i) {
    Vec weight = load_some(weights + i, n), first = load_some(firsts + i, n), second = load_some(seconds + i, n);
    update(weight, load_some(gradients + i, n), first, second);
    store_some(weights + i, weight, n);
    store_some(firsts + i, first, n);
    store_some(seconds + i, second, n);
    uint16_t halves[kLanes];
    Bf16::write(halves, weight);
    if (copies) std::memcpy(copies + i, halves, n * sizeof(uint16_t));
  }
}

}  // namespace
}  // namespace groundling

using namespace groundling;

// The sum of the squares of all elements of these tensors.
extern "C" double groundling_sum_of_squares(int n_threads, int64_t n_tensors, const float* const* tensors,
                                             const int64_t* sizes) {
  const std::vector<Block> blocks = blocks_of(n_tensors, [sizes](int64_t tensor) { return sizes[tensor]; });
  const int64_t n_blocks = blocks.size();
  std::vector<double> sums(n_blocks);
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t i = 0; i < n_blocks; ++i)
    sums[i] = sum_of_squares(tensors[blocks[i].tensor] + blocks[i].start, blocks[i].size);
  double total = 0;
  for (const double sum : sums) total += sum;
  return total;
}

// Counts a step of each parameter and takes it, with gradients times `scale`.
extern "C" void groundling_adamw(int n_threads, int64_t n_parameters, const Parameter* parameters, double scale) {
  std::vector<Update> updates;
  for (int64_t i = 0; i < n_parameters; ++i) {
    ++*parameters[i].n_steps;
    updates.emplace_back(parameters[i], scale);
  }
  const std::vector<Block> blocks =
      blocks_of(n_parameters, [parameters](int64_t parameter) { return parameters[parameter].size; });
  const int64_t n_blocks = blocks.size();
#pragma omp parallel for schedule(static) num_threads(n_threads)
  for (int64_t i = 0; i < n_blocks; ++i) {
    const Block& block = blocks[i];
    update_block(parameters[block.tensor], updates[block.tensor], block.start, block.size);
  }
}
