// The matrix unit's registers in plain C++: what tiles.h includes, in its namespace, where there is no unit.

class Tiles {
 public:
  template <int kTile>
  void zero() {
    std::memset(tiles_[kTile], 0, kTileBytes);
  }
  template <int kTile>
  void load(const void* from, int64_t row_bytes) {
    for (int row = 0; row < kTileSide; ++row)
      std::memcpy(tiles_[kTile] + row * 64, static_cast<const char*>(from) + row * row_bytes, 64);
  }
  template <int kTile>
  void stream(const void* from, int64_t row_bytes) {
    load<kTile>(from, row_bytes);
  }
  template <int kTile>
  void store(void* to, int64_t row_bytes) {
    for (int row = 0; row < kTileSide; ++row)
      std::memcpy(static_cast<char*>(to) + row * row_bytes, tiles_[kTile] + row * 64, 64);
  }
  template <int kSums, int kLeft, int kRight>
  void multiply() {
    float sums[kTileSide][kTileSide];
    uint16_t left[kTileSide][kTileDepth], right[kTileSide][kTileDepth];
    std::memcpy(sums, tiles_[kSums], kTileBytes);
    std::memcpy(left, tiles_[kLeft], kTileBytes);
    std::memcpy(right, tiles_[kRight], kTileBytes);
    for (int row = 0; row < kTileSide; ++row)
      for (int term = 0; term < kTileDepth; ++term)
        for (int column = 0; column < kTileSide; ++column)
          sums[row][column] +=
              Bf16::value(left[row][term]) * Bf16::value(right[term / 2][2 * column + term % 2]);
    std::memcpy(tiles_[kSums], sums, kTileBytes);
  }

 private:
  char tiles_[8][kTileBytes];
};
