// One draw from a distribution that is given as logits.
//
// Invariant: the place depends on nothing but the logits and the share; one whose logit is -infinity is never drawn.
//
// `kernels/build.py` compiles this file, `kernels/draw.py` binds it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "exponentials.h"
#include "vectors.h"

namespace {

using namespace groundling;

constexpr int64_t kBlock = 256;  // terms that are summed together: of some 200 sums, and 256 terms, few are searched

// What each logit adds to the sum: 0 where it is -infinity (or so small that it makes no difference).
Vec terms(Vec logits, float largest) {
  const Vec below = logits - largest;
  return below < -87.f ? Vec{} : exponential(below);
}

float largest_of(const float* logits, int64_t n) {
  Vec most = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec some = load<Vec>(logits + i);
    most = some > most ? some : most;
  }
  float largest = -INFINITY;
  for (; i < n; ++i) largest = std::max(largest, logits[i]);
  for (int lane = 0; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
  return largest;
}

}  // namespace

extern "C" {

// Where the sum of e^logits passes this share (of 1) of their total; -1 unless the logits (n,) are finite or -infinity,
// and one of them finite. `sums` has room for a number for every 256.
int64_t groundling_place(const float* logits, int64_t n, double share, double* sums) {
  const float largest = largest_of(logits, n);
  double total = 0;
  for (int64_t begin = 0, block = 0; begin < n; begin += kBlock, ++block) {
    const int64_t end = std::min(n, begin + kBlock);
    Vec sum_of{};
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) sum_of += terms(load<Vec>(logits + i), largest);
    if (i < end) {
      const Vec rest = terms(load_some(logits + i, end - i), largest);
      for (int64_t lane = 0; lane < end - i; ++lane) sum_of[lane] += rest[lane];
    }
    sums[block] = total += sum(sum_of);
  }
  if (!std::isfinite(total)) return -1;
  const double wanted = share * total;
  const int64_t n_blocks = (n + kBlock - 1) / kBlock;
  const int64_t block = std::min<int64_t>(std::upper_bound(sums, sums + n_blocks, wanted) - sums, n_blocks - 1);
  double passed = block ? sums[block - 1] : 0;
  int64_t last = -1;  // that can be drawn: where rounding leaves the sum of the block short of what it was
  for (int64_t i = block * kBlock; i < std::min(n, (block + 1) * kBlock); i += kLanes) {
    const int64_t left = std::min(n, (block + 1) * kBlock) - i;
    const Vec some = terms(load_some(logits + i, left), largest);
    for (int64_t lane = 0; lane < std::min<int64_t>(left, kLanes); ++lane) {
      if (some[lane] <= 0) continue;
      passed += some[lane], last = i + lane;
      if (passed > wanted) return last;
    }
  }
  return last;
}

}  // extern "C"
