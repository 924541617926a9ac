// The matrix unit of a CPU with AMX: eight registers of 16 rows of 64 bytes, and the product of two of them.
//
// Invariant: an element of a product depends on its row and its column alone, and is summed in fp32. The order of the sum
// is the CPU's: of a row's 32 terms the even and the odd ones apart, numbers below the normal ones as 0. Elsewhere, and with
// GROUNDLING_LANES, the tests' way to other CPUs, the registers are those of plain_tiles.h, slow and equal but for rounding;
// GROUNDLING_TILES names a file with others (benchmarks/timed_tiles.h, tests/kernels/wide_tiles.h).
// Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18 (AMX).

#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

#if defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__x86_64__) && defined(__linux__) && \
    !defined(GROUNDLING_LANES) && !defined(GROUNDLING_TILES)
#define GROUNDLING_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace groundling {

constexpr int kTileSide = 16;  // rows of a register, and fp32 in a row
constexpr int kTileDepth = 32;  // bf16 in a row: terms of a dot product that one instruction adds
constexpr int64_t kTileBytes = 1024;

#if defined(GROUNDLING_TILES)

#include GROUNDLING_TILES

#elif defined(GROUNDLING_AMX)

// Whether the system lets this process use the registers, whose contents it must save for each thread.
inline bool tiles_allowed() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of Linux
  static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return allowed;
}

// A thread's registers, all of full size, while this object lives.
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    for (int tile = 0; tile < 8; ++tile) shapes.row_bytes[tile] = 64, shapes.rows[tile] = kTileSide;
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;

  template <int kTile>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  void load(const void* from, int64_t row_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(kTile) : "memory");
  }
  // Loads what will not be needed again soon, past the L1 cache.
  template <int kTile>
  void stream(const void* from, int64_t row_bytes) {
    __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(kTile) : "memory");
  }
  template <int kTile>
  void store(void* to, int64_t row_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(kTile) : "memory");
  }
  // sums += left (16 rows of 32) times right, whose rows hold two terms of each of 16 columns.
  template <int kSums, int kLeft, int kRight>
  void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
  }
};

#else

inline bool tiles_allowed() {
#if defined(GROUNDLING_LANES)
  return true;
#else
  return false;
#endif
}

#include "plain_tiles.h"

#endif

}  // namespace groundling
