// A stand-in for the matrix unit's registers that takes their time and computes nothing, for CPUs with AVX-512 alone.
//
// A register is a vector of 64 bytes. What is loaded and stored are the same lines of memory; a product waits for its
// operands and for the sums, and then keeps one unit of the CPU busy for 16 cycles, as the matrix unit is kept: a division
// of eight doubles does that on the cores that have the unit (Golden Cove). What is stored are the same small numbers
// always: no zeros, which caches give faster, and nothing that makes a model diverge. Included by kernels/tiles.h, inside
// its namespace; `timed_unit.py` says how, and how well it agreed with the unit.

inline bool tiles_allowed() { return true; }

// Functions of the C library do not know that vectors are taken; none of a step by AdamW calls one between two products.
// zmm16 to zmm23 are the registers, which the compiler must leave alone, and so are
// zmm24 (lines that are thrown away), zmm25 (ones), zmm26 (zeros), zmm27 (what is waited for) and zmm28 (what is stored).
class Tiles {
 public:
  Tiles() {
    static const double one = 1;
    static const float stored[16] = {.01f, -.03f, .02f, .01f, -.02f, .03f, -.01f, .04f,
                                     .02f, -.04f, .01f, .03f, -.03f, -.01f, .04f, -.07f};
    __asm__ volatile("vpxord %xmm26, %xmm26, %xmm26");
    __asm__ volatile("vbroadcastsd %0, %%zmm25" ::"m"(one));
    __asm__ volatile("vmovups %0, %%zmm28" ::"m"(stored));
    zero<0>(), zero<1>(), zero<2>(), zero<3>(), zero<4>(), zero<5>(), zero<6>(), zero<7>();
  }
  Tiles(const Tiles&) = delete;

  template <int kTile>
  void zero() {
    __asm__ volatile("vmovapd %%zmm25, %%zmm%c0" ::"i"(16 + kTile));
  }
  template <int kTile>
  void load(const void* from, int64_t row_bytes) {
    const char* row = static_cast<const char*>(from);
#pragma GCC unroll 16
    for (int i = 0; i < kTileSide - 1; ++i, row += row_bytes)
      __asm__ volatile("vmovups %0, %%zmm24" ::"m"(*reinterpret_cast<const Line*>(row)));
    __asm__ volatile("vmovups %0, %%zmm%c1" ::"m"(*reinterpret_cast<const Line*>(row)), "i"(16 + kTile));
    if (kTile < 4)  // sums are 1 always, but wait for the line
      __asm__ volatile("vpandd %%zmm26, %%zmm%c0, %%zmm%c0\n\tvpord %%zmm25, %%zmm%c0, %%zmm%c0" ::"i"(16 + kTile));
  }
  template <int kTile>
  void stream(const void* from, int64_t row_bytes) {
    load<kTile>(from, row_bytes);
  }
  template <int kTile>
  void store(void* to, int64_t row_bytes) {
    char* row = static_cast<char*>(to);
    __asm__ volatile("vpandd %%zmm26, %%zmm%c0, %%zmm27\n\tvpord %%zmm28, %%zmm27, %%zmm27" ::"i"(16 + kTile));
#pragma GCC unroll 16
    for (int i = 0; i < kTileSide; ++i, row += row_bytes)
      __asm__ volatile("vmovups %%zmm27, %0" : "=m"(*reinterpret_cast<Line*>(row)));
  }
  template <int kSums, int kLeft, int kRight>
  void multiply() {
    __asm__ volatile(
        "vpandd %%zmm%c1, %%zmm%c2, %%zmm27\n\t"
        "vpandd %%zmm26, %%zmm27, %%zmm27\n\t"
        "vpord %%zmm27, %%zmm%c0, %%zmm%c0\n\t"
        "vdivpd %%zmm25, %%zmm%c0, %%zmm%c0" ::"i"(16 + kSums),
        "i"(16 + kLeft), "i"(16 + kRight));
  }

 private:
  using Line = char[64];
};
