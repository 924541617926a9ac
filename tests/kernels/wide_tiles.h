// The build for the matrix unit, with all that AVX-512 packs, rounds and stores for it, but registers in plain C++.

inline bool tiles_allowed() { return true; }

#include "plain_tiles.h"
