// One forward pass of GPT-2 over a few rows (tokens) of several sequences, for decoding on a CPU.
//
// Reading the weights is what a decoded token costs, so every row of a pass shares one reading of them:
// the tokens of a prompt, the drafted tokens that a pass verifies, and the newest tokens of all sequences
// in a batch are all just rows.
//
// Invariant: a row's logits depend, to the last bit, on nothing but its own sequence up to its position:
// not on the other rows of the pass, nor on how many there are, nor on the number of threads. Every output
// is summed over lanes in one fixed order, whatever tile computes it.
//
// Weights are fp32, bf16 or int8 with one fp32 scale a row; all arithmetic is fp32. `kernels/build.py` compiles
// this file, `generation/native.py` binds it. It is long because the parts of a pass share one plan of the weights in
// memory, one team of threads and one scratch, which headers of their own would have to show to everybody.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "exponentials.h"
#include "team.h"
#include "vectors.h"

namespace {

using namespace groundling;

constexpr int kTileTokens = 6;
constexpr int kPanelRows = 4;     // weight rows that lie side by side in memory, so that reading them is one stream
// Panels that a thread takes at once: so few that they stay in its L2 while several tiles of tokens pass by; of one
// tile, so many that the hardware's prefetching gets into its stride.
constexpr int kPiecePanels = 12, kPiecePanelsOnce = 24;
constexpr int kPieceOutputs = kPiecePanelsOnce * kPanelRows;
// Inputs of a weight row that are multiplied together: so few that those of a tile of tokens stay in L1 (18 of 32 KiB).
constexpr int64_t kBlockInputs = 768;
// Weights are asked for this far ahead where the arithmetic on them leaves the hardware's own prefetching behind: with
// several tokens in a tile, and (less far) with int8. Measured (LOG.md): bf16 with six tokens, and int8 with one, 1.3
// times as fast; one token in bf16 or fp32 no faster.
constexpr int kBusyAheadBytes = 4096;
constexpr float kLayerNormEps = 1e-5f;  // GPT-2's

struct Matrix {
  const void* weight = nullptr;  // for each block of inputs: (panels, units, kPanelRows, elements of a unit)
  const float* scale = nullptr;  // (n_out,), int8 only
  const float* bias = nullptr;   // (n_out,), or none
  int64_t n_out = 0, n_in = 0;
};

// Weight rows, with those that fill the last panel.
int64_t whole_panels(int64_t n_out) { return (n_out + kPanelRows - 1) / kPanelRows * kPanelRows; }

// A block of the inputs, `begin` .. `begin + size`.
struct Block {
  int64_t begin, size;

  static Block of(int64_t n_in, int64_t input) {
    const int64_t all = padded(n_in), n = (all + kBlockInputs - 1) / kBlockInputs, each = padded((all + n - 1) / n);
    const int64_t begin = input / each * each;
    return {begin, std::min(each, all - begin)};
  }

  // Where a weight row's unit of `unit` elements lies that begins at an input of this block.
  int64_t place(int64_t n_out, int64_t n, int64_t input, int unit) const {
    return whole_panels(n_out) * begin + n / kPanelRows * kPanelRows * size +
           ((input - begin) / unit * kPanelRows + n % kPanelRows) * unit;
  }
};

struct Norm {
  const float *weight, *bias;
};

struct Layer {
  Norm ln_1, ln_2;
  Matrix c_attn, attn_proj, c_fc, mlp_proj;
};

// What to do with an output beside storing it.
enum class Then { kStore, kAdd, kGelu, kCache };

struct Network {
  int64_t n_layer, n_head, n_embd, n_vocab, n_window, n_slots, max_rows;
  int format;  // 0 fp32, 1 bf16, 2 int8
  Matrix head;
  const float* wpe;
  Norm ln_f;
  std::vector<Layer> layers;

  int64_t width, head_width;  // of a row of n_embd, of a padded head
  std::vector<float> x, normed, qkv, mixed, wide;
  std::unique_ptr<void, decltype(&std::free)> cache{nullptr, &std::free};  // floats, or bf16
  std::vector<std::vector<float>> scores, products;  // of each thread

  // The pass at work.
  const int32_t *tokens, *slots, *positions, *outputs;
  int64_t n_rows, n_outputs;
  float* logits;
  std::vector<std::atomic<int64_t>> taken;  // work handed out, by phase

  Team team;  // last: its threads use the rest

  explicit Network(int n_threads) : taken(0), team(n_threads, [this](int thread) { run(thread); }) {}

  int64_t cache_index(int64_t layer, int which, int64_t slot, int64_t head, int64_t position) const {
    return ((((layer * 2 + which) * n_slots + slot) * n_head + head) * n_window + position) * head_width;
  }

  // A thread's share of a phase: takes pieces of work until none is left.
  template <class Work>
  void share(int& phase, int64_t n_pieces, Work work) {
    std::atomic<int64_t>& next = taken[phase++];
    for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < n_pieces;) work(piece);
    team.meet();
  }

  void embed(int64_t row) {
    float* to = &x[row * width];
    const float* position = wpe + positions[row] * n_embd;
    for (int64_t c = 0; c < n_embd; ++c) {
      const float value = format == 0   ? element<Fp32>(head, tokens[row], c)
                          : format == 1 ? element<Bf16>(head, tokens[row], c)
                                        : element<Int8>(head, tokens[row], c) * head.scale[tokens[row]];
      to[c] = value + position[c];
    }
  }

  template <class Format>
  static float element(const Matrix& m, int64_t n, int64_t k) {
    constexpr int kUnit = Format::kVectors * kLanes;
    const int64_t place = Block::of(m.n_in, k).place(m.n_out, n, k / kUnit * kUnit, kUnit);
    return Format::at(static_cast<const typename Format::Element*>(m.weight) + place, k % kUnit);
  }

  void normalise(const float* from, const Norm& norm, float* to) const {
    const int64_t whole = n_embd / kLanes * kLanes;
    Vec sums{}, rests{};
    for (int64_t c = 0; c < whole; c += kLanes) sums += load<Vec>(from + c);
    float total = sum(sums);
    for (int64_t c = whole; c < n_embd; ++c) total += from[c];
    const float near = total / n_embd;  // rounded, as far as a large row's sum is
    sums = Vec{};
    for (int64_t c = 0; c < whole; c += kLanes) {
      const Vec centred = load<Vec>(from + c) - near;
      rests += centred;
      sums = multiply_add(centred, centred, sums);
    }
    float rest = sum(rests), squares = sum(sums);
    for (int64_t c = whole; c < n_embd; ++c) rest += from[c] - near, squares += (from[c] - near) * (from[c] - near);
    const float off = rest / n_embd, mean = near + off;
    const float scale = 1.f / std::sqrt(std::max(squares / n_embd - off * off, 0.f) + kLayerNormEps);
    for (int64_t c = 0; c < n_embd; ++c) to[c] = (from[c] - mean) * scale * norm.weight[c] + norm.bias[c];
  }

  // Outputs begin .. end of c_attn for a row: queries are kept for this pass, keys and values in the cache.
  template <class Format>
  void keep(int64_t layer, int64_t row, int64_t begin, int64_t end, const float* values) {
    const int64_t head_size = n_embd / n_head;
    auto* const kept = static_cast<typename Format::Element*>(cache.get());
    for (int64_t n = begin, next; n < end; values += next - n, n = next) {
      const int64_t which = n / n_embd, head = n % n_embd / head_size, c = n % head_size;
      next = std::min(end, n - c + head_size);
      if (which == 0) {
        std::copy(values, values + (next - n), &qkv[row * n_embd + n]);
      } else {
        auto* to = kept + cache_index(layer, which - 1, slots[row], head, positions[row]) + c;
        for (int64_t i = 0; i < next - n; ++i) to[i] = Format::element(values[i]);
      }
    }
  }

  // Adds a block's products of the weight rows n .. n + kRows, of one panel, with kTokens rows from `row` on:
  // out[token][weight row].
  template <class Format, int kRows, int kTokens>
  __attribute__((noinline)) void tile(const Matrix& m, int64_t n, Block block, const float* in, int64_t in_width,
                                      int64_t row, float* out) const {
    constexpr int kUnit = Format::kVectors * kLanes;
    constexpr int64_t kAhead = kTokens > 2 ? kBusyAheadBytes : Format::kAheadBytes;
    const auto* weight =
        static_cast<const typename Format::Element*>(m.weight) + block.place(m.n_out, n, block.begin, kUnit);
    const float* inputs[kTokens];
    for (int t = 0; t < kTokens; ++t) inputs[t] = in + (row + t) * in_width + block.begin;
    Vec products[kTokens][kRows] = {};
    for (int64_t k = 0; k < block.size; k += kUnit, weight += kPanelRows * kUnit) {
      if (kAhead && row == 0)  // later rows find the panel in the cache
        for (int64_t line = 0; line < int64_t(kPanelRows * kUnit * sizeof(*weight)); line += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(weight) + kAhead + line);
#pragma GCC unroll 8
      for (int v = 0; v < Format::kVectors; ++v) {
        Vec weights[kRows];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          weights[r] = Format::vector(weight + r * kUnit, v);
          in_register(weights[r]);
        }
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          Vec input = load<Vec>(inputs[t] + k + v * kLanes);
          in_register(input);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) products[t][r] = multiply_add(weights[r], input, products[t][r]);
        }
      }
    }
    // A copy, unrolled like the loops above: an index that varies would keep the products themselves in memory, stored at
    // every step.
    Vec whole[kTokens * kRows];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) whole[t * kRows + r] = products[t][r];
    float totals[kTokens][kRows];
    sums<kTokens * kRows>(whole, &totals[0][0]);
    for (int t = 0; t < kTokens; ++t)
      for (int r = 0; r < kRows; ++r) out[t * kPieceOutputs + r] += totals[t][r];
  }

  template <class Format, int kTokens>
  void tiles(const Matrix& m, int64_t begin, int64_t end, Block block, const float* in, int64_t in_width, int64_t row,
             float* out) const {
    constexpr int kRows = kTokens <= 2 ? kPanelRows : kTileRows;
    for (int64_t n = begin; n < end; n += kRows)
      tile<Format, kRows, kTokens>(m, n, block, in, in_width, row, out + row * kPieceOutputs + n - begin);
  }

  // Products of the weight rows begin .. end with n rows: out (n, kPieceOutputs).
  template <class Format>
  void piece(const Matrix& m, int64_t begin, int64_t end, const float* in, int64_t in_width, int64_t n,
             float* out) const {
    std::fill_n(out, n * kPieceOutputs, 0.f);
    for (Block block{0, 0}; block.begin < padded(m.n_in); block.begin += block.size) {
      block = Block::of(m.n_in, block.begin);
      int64_t row = 0;
      for (; row + kTileTokens <= n; row += kTileTokens)
        tiles<Format, kTileTokens>(m, begin, end, block, in, in_width, row, out);
      switch (n - row) {
        case 1: tiles<Format, 1>(m, begin, end, block, in, in_width, row, out); break;
        case 2: tiles<Format, 2>(m, begin, end, block, in, in_width, row, out); break;
        case 3: tiles<Format, 3>(m, begin, end, block, in, in_width, row, out); break;
        case 4: tiles<Format, 4>(m, begin, end, block, in, in_width, row, out); break;
        case 5: tiles<Format, 5>(m, begin, end, block, in, in_width, row, out); break;
      }
    }
  }

  // Makes outputs of products, and puts them where they belong.
  void finish(const Matrix& m, int64_t begin, int64_t end, int64_t row, Then then, float* products, float* out,
              int64_t layer) {
    for (int64_t n = begin; n < end; n += kLanes) {
      const int64_t left = end - n;
      float* const at = products + n - begin;
      Vec value = load<Vec>(at);
      if (m.scale) value *= load_some(m.scale + n, left);
      if (m.bias) value += load_some(m.bias + n, left);
      if (then == Then::kCache)
        store(at, value);
      else if (then == Then::kAdd)
        store_some(out + n, load_some(out + n, left) + value, left);
      else
        store_some(out + n, then == Then::kGelu ? gelu(value) : value, left);
    }
    if (then == Then::kCache)
      format == 0 ? keep<Fp32>(layer, row, begin, end, products) : keep<Bf16>(layer, row, begin, end, products);
  }

  // out (n rows, m.n_out) from in (n rows, m.n_in), a piece of the outputs at a time.
  void linear(int thread, int& phase, const Matrix& m, const float* in, int64_t in_width, int64_t n, Then then,
              float* out, int64_t out_width, int64_t layer = 0) {
    const int64_t size = (n <= kTileTokens ? kPiecePanelsOnce : kPiecePanels) * kPanelRows;
    float* const to = products[thread].data();
    share(phase, (m.n_out + size - 1) / size, [&](int64_t i) {
      const int64_t begin = i * size, end = std::min(m.n_out, begin + size);
      if (format == 0)
        piece<Fp32>(m, begin, end, in, in_width, n, to);
      else if (format == 1)
        piece<Bf16>(m, begin, end, in, in_width, n, to);
      else
        piece<Int8>(m, begin, end, in, in_width, n, to);
      for (int64_t row = 0; row < n; ++row)
        finish(m, begin, end, row, then, to + row * kPieceOutputs, out + row * out_width, layer);
    });
  }

  template <class Format>
  void attend(int64_t layer, int64_t row, int64_t head, const typename Format::Element* cache, float* weights) {
    const int64_t head_size = n_embd / n_head, n = positions[row] + 1;
    const auto* keys = cache + cache_index(layer, 0, slots[row], head, 0);
    const auto* values = cache + cache_index(layer, 1, slots[row], head, 0);
    float query[head_width], mixture[head_width];
    std::memset(query, 0, sizeof query);
    std::memcpy(query, &qkv[row * n_embd + head * head_size], head_size * sizeof(float));
    const float scale = 1.f / std::sqrt(static_cast<float>(head_size));
    float largest = -INFINITY;
    for (int64_t s = 0; s < n; ++s) {
      Vec dot{};
      for (int64_t d = 0; d < head_width; d += kLanes)
        dot = multiply_add(load<Vec>(query + d), Format::read(keys + s * head_width + d), dot);
      weights[s] = sum(dot) * scale;
      largest = std::max(largest, weights[s]);
    }
    for (int64_t s = n; s < n + kLanes; ++s) weights[s] = -INFINITY;
    Vec total{};
    for (int64_t s = 0; s < n; s += kLanes) {
      const Vec scores = load<Vec>(weights + s);
      const Vec terms = scores == -INFINITY ? Vec{} : exponential(scores - largest);
      store(weights + s, terms);
      total += terms;
    }
    const float inverse = 1.f / sum(total);
    std::memset(mixture, 0, sizeof mixture);
    for (int64_t s = 0; s < n; ++s) {
      const Vec share = splat(weights[s] * inverse);
      for (int64_t d = 0; d < head_width; d += kLanes)
        store(mixture + d, multiply_add(share, Format::read(values + s * head_width + d), load<Vec>(mixture + d)));
    }
    std::memcpy(&mixed[row * width + head * head_size], mixture, head_size * sizeof(float));
  }

  // Every thread runs the whole pass; `share` divides each phase among them.
  void run(int thread) {
    int phase = 0;
    float* weights = scores[thread].data();
    const int64_t wide_width = row_width(4 * n_embd);
    share(phase, n_rows, [&](int64_t row) { embed(row); });
    for (int64_t l = 0; l < n_layer; ++l) {
      const Layer& layer = layers[l];
      share(phase, n_rows, [&](int64_t row) { normalise(&x[row * width], layer.ln_1, &normed[row * width]); });
      linear(thread, phase, layer.c_attn, normed.data(), width, n_rows, Then::kCache, qkv.data(), 0, l);
      share(phase, n_rows * n_head, [&](int64_t piece) {
        if (format == 0)
          attend<Fp32>(l, piece / n_head, piece % n_head, static_cast<const float*>(cache.get()), weights);
        else
          attend<Bf16>(l, piece / n_head, piece % n_head, static_cast<const uint16_t*>(cache.get()), weights);
      });
      linear(thread, phase, layer.attn_proj, mixed.data(), width, n_rows, Then::kAdd, x.data(), width);
      share(phase, n_rows, [&](int64_t row) { normalise(&x[row * width], layer.ln_2, &normed[row * width]); });
      linear(thread, phase, layer.c_fc, normed.data(), width, n_rows, Then::kGelu, wide.data(), wide_width);
      linear(thread, phase, layer.mlp_proj, wide.data(), wide_width, n_rows, Then::kAdd, x.data(), width);
    }
    share(phase, n_outputs, [&](int64_t i) { normalise(&x[outputs[i] * width], ln_f, &normed[i * width]); });
    linear(thread, phase, head, normed.data(), width, n_outputs, Then::kStore, logits, n_vocab);
  }
};

template <class Format>
void arrange(int64_t n_out, int64_t n_in, const typename Format::Element* from, typename Format::Element* to) {
  constexpr int kUnit = Format::kVectors * kLanes;
  for (int64_t n = 0; n < whole_panels(n_out); ++n)
    for (int64_t k = 0; k < padded(n_in); k += kUnit) {
      auto* unit = to + Block::of(n_in, k).place(n_out, n, k, kUnit);
      for (int64_t i = 0; i < kUnit; ++i)
        unit[Format::kVectors == 2 ? Bf16::place(i) : i] =
            n < n_out && k + i < n_in ? from[n * n_in + k + i] : typename Format::Element{};
    }
}

}  // namespace

extern "C" {

// Elements that a matrix (n_out, n_in) takes in the order that the kernel reads it in.
int64_t groundling_arranged(int64_t n_out, int64_t n_in) {
  return whole_panels(n_out) * padded(n_in);
}

// Copies a matrix (n_out, n_in) from rows into that order.
void groundling_arrange(int format, int64_t n_out, int64_t n_in, const void* from, void* to) {
  if (format == 0)
    arrange<Fp32>(n_out, n_in, static_cast<const float*>(from), static_cast<float*>(to));
  else if (format == 1)
    arrange<Bf16>(n_out, n_in, static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to));
  else
    arrange<Int8>(n_out, n_in, static_cast<const int8_t*>(from), static_cast<int8_t*>(to));
}

// sizes: n_layer n_head n_embd n_vocab n_window n_slots max_rows. tensors: the embedding (weight,
// scale), the position table, ln_f (weight, bias), then for each layer ln_1 (weight, bias), c_attn (weight,
// scale, bias), attn.c_proj (same), ln_2, c_fc, mlp.c_proj; matrices arranged. They are not copied and must
// outlive the network. Null if there is not enough memory, or no more threads.
void* groundling_open(const int64_t* sizes, int format, int n_threads, const void* const* tensors) try {
  auto net = std::make_unique<Network>(n_threads);
  net->n_layer = sizes[0], net->n_head = sizes[1], net->n_embd = sizes[2];
  net->n_vocab = sizes[3], net->n_window = sizes[4], net->n_slots = sizes[5], net->max_rows = sizes[6];
  net->format = format;
  const int64_t C = net->n_embd, rows = net->max_rows;
  const auto floats = [&] { return static_cast<const float*>(*tensors++); };
  const auto matrix = [&](int64_t n_out, int64_t n_in, bool bias) {
    Matrix m;
    m.weight = *tensors++;
    m.scale = floats();
    m.bias = bias ? floats() : nullptr;
    m.n_out = n_out, m.n_in = n_in;
    return m;
  };
  const auto norm = [&] {
    const float* weight = floats();
    return Norm{weight, floats()};
  };
  net->head = matrix(net->n_vocab, C, false);
  net->wpe = floats();
  net->ln_f = norm();
  for (int64_t l = 0; l < net->n_layer; ++l) {
    Layer layer;
    layer.ln_1 = norm();
    layer.c_attn = matrix(3 * C, C, true);
    layer.attn_proj = matrix(C, C, true);
    layer.ln_2 = norm();
    layer.c_fc = matrix(4 * C, C, true);
    layer.mlp_proj = matrix(C, 4 * C, true);
    net->layers.push_back(layer);
  }
  net->width = row_width(C), net->head_width = padded(C / net->n_head);
  for (auto* buffer : {&net->x, &net->normed, &net->mixed}) buffer->assign(rows * net->width, 0.f);
  net->qkv.assign(rows * C, 0.f);
  net->wide.assign(rows * row_width(4 * C), 0.f);
  // Zeroed by the system, page by page as positions are read: a slot that is never used costs nothing.
  const int64_t cache = net->n_layer * 2 * net->n_slots * net->n_head * net->n_window * net->head_width;
  net->cache.reset(std::calloc(cache, format == 0 ? sizeof(float) : sizeof(uint16_t)));
  if (!net->cache) throw std::bad_alloc();
  net->products.assign(n_threads, std::vector<float>(rows * kPieceOutputs));
  net->scores.assign(n_threads, std::vector<float>(net->n_window + 2 * kLanes));
  net->taken = std::vector<std::atomic<int64_t>>(3 + 7 * net->n_layer);
  return net.release();
} catch (const std::exception&) {
  return nullptr;
}

// Reads row i = tokens[i] at positions[i] of sequence slots[i], whose earlier positions must have been read,
// before or in this pass; writes the logits (n_outputs, n_vocab) that follow the rows named in `outputs`.
void groundling_read(void* network, int64_t n_rows, const int32_t* tokens, const int32_t* slots,
                     const int32_t* positions, int64_t n_outputs, const int32_t* outputs, float* logits) {
  auto* net = static_cast<Network*>(network);
  net->tokens = tokens, net->slots = slots, net->positions = positions, net->outputs = outputs;
  net->n_rows = n_rows, net->n_outputs = n_outputs, net->logits = logits;
  for (auto& count : net->taken) count.store(0, std::memory_order_relaxed);
  net->team.work();
}

void groundling_close(void* network) { delete static_cast<Network*>(network); }

}  // extern "C"
