// Memory that kernels write to on their way, kept from one call to the next.
//
// Invariant: one call at a time uses it, each of its threads its own part.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace groundling {

inline int64_t divided_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Memory that lives on and only grows, in huge pages where the system has them: with small ones each of the many
// streams of a product misses its pages' addresses. Where there is no memory the process ends.
template <class Element>
class Buffer {
 public:
  Element* of(int64_t n) {
    if (n > size_) {
      std::free(memory_);
      size_ = 0;
      const size_t bytes = divided_up(n * sizeof(Element), kHuge) * kHuge;
      memory_ = std::aligned_alloc(kHuge, bytes);
      if (!memory_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
      madvise(memory_, bytes, MADV_HUGEPAGE);
#endif
      size_ = n;
    }
    return static_cast<Element*>(memory_);
  }

 private:
  static constexpr size_t kHuge = 2 << 20;
  void* memory_ = nullptr;
  int64_t size_ = 0;
};

// What the threads of a kernel write to on their way; one call at a time.
struct Workspace {
  struct OfThread {
    Buffer<uint16_t> halves;
    Buffer<float> floats;
  };
  std::mutex mutex;
  Buffer<uint16_t> shared;
  std::vector<OfThread> threads;

  void begin(int n_threads) {
    if (static_cast<int>(threads.size()) < n_threads) threads.resize(n_threads);
  }

  OfThread& own() {
#if defined(_OPENMP)
    return threads[omp_get_thread_num()];
#else
    return threads[0];
#endif
  }
};

}  // namespace groundling
