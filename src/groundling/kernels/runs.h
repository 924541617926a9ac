// Rows of any length, a vector at a time.
//
// Invariant: what is beyond the end of a row is neither read nor written.

#pragma once

#include <cstdint>
#include <type_traits>

#include "vectors.h"

namespace groundling {

// Runs of columns are whole vectors, whose length is known when compiling, and a rest of fewer lanes.
using Whole = std::integral_constant<int, kLanes>;

template <class Body>
inline void each_run(int64_t n_columns, Body body) {
  int64_t c = 0;
  for (; c + kLanes <= n_columns; c += kLanes) body(c, Whole{});
  if (c < n_columns) body(c, static_cast<int>(n_columns - c));
}

// The first n lanes; the others are 0.
template <class Format, class N>
inline Vec read(const typename Format::Element* from, N n) {
  if constexpr (std::is_same_v<N, Whole>) {
    return Format::read(from);
  } else {
    return read_some<Format>(from, n);
  }
}

template <class Format, class N>
inline void write(typename Format::Element* to, Vec value, N n) {
  if constexpr (std::is_same_v<N, Whole>) {
    Format::write(to, value);
  } else {
    write_some<Format>(to, value, n);
  }
}

// The value, with something else in all lanes but the first n.
template <class N>
inline Vec first_lanes(Vec value, N n, float other = 0) {
  if constexpr (!std::is_same_v<N, Whole>)
    for (int lane = n; lane < kLanes; ++lane) value[lane] = other;
  return value;
}

}  // namespace groundling
