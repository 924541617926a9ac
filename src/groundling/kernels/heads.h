// Attention's heads, dealt out to threads: each of each window is computed on its own.
//
// Invariant: no result depends on the number of threads.

#pragma once

#include <cstdint>
#include <mutex>

#include "vectors.h"
#include "workspace.h"

namespace groundling {

struct Shape {
  int64_t n_windows, n_positions, n_head, width;  // width: of a head
  int64_t n_embd() const { return n_head * width; }
};

// Calls body(head, its number, where its window and it begin in (windows, positions, n_embd)) for all heads, with a Head
// for each thread, made of the shape and the thread's memory.
template <class Head, class Body>
void each_head(Workspace& workspace, int n_threads, const Shape& shape, Body body) {
  const std::lock_guard<std::mutex> alone(workspace.mutex);
  workspace.begin(n_threads);
#pragma omp parallel num_threads(n_threads)
  {
    Head head(shape, workspace.own());
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < shape.n_windows * shape.n_head; ++i)
      body(head, i, i / shape.n_head * shape.n_positions, i % shape.n_head * shape.width);
    streamed();  // what the body may have
  }
}

}  // namespace groundling
