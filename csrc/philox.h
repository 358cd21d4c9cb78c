// Dropout masks without a stored mask, drawn where they are needed: those of `complora_kernels/kernels/dropout.py`,
// whose docstring says which lane of which word belongs to which element. `reference.keep_mask` is the same in plain
// torch.

#pragma once

#include "sizes.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace complora {

// Bits of a lane (0: no dropout), the lanes that drop, and 1 / (1 - p).
struct Dropout {
  int bits = 0;
  uint32_t threshold = 0;
  double scale = 1.0;
  uint64_t seed = 0;
};

inline Dropout dropout_lanes(double p) {
  if (p == 0) {
    return {};
  }
  const int bits = 256 * p == std::floor(256 * p) ? 8 : 16;
  const double lanes = 1 << bits;
  const double threshold = std::min(std::nearbyint(p * lanes), lanes - 1);  // half to even, as Python rounds
  return {bits, static_cast<uint32_t>(threshold), lanes / (lanes - threshold)};
}

// Philox4x32-7 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011) of N counters side by side: the
// words of counter i are words[0..3][i].
template <int N>
COMPLORA_HOST_DEVICE inline void philox4x32_7(uint32_t (&words)[4][N], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    for (int i = 0; i < N; ++i) {
      const uint64_t first = uint64_t{0xD2511F53} * words[0][i], second = uint64_t{0xCD9E8D57} * words[2][i];
      words[0][i] = static_cast<uint32_t>(second >> 32) ^ words[1][i] ^ k0;
      words[1][i] = static_cast<uint32_t>(second);
      words[2][i] = static_cast<uint32_t>(first >> 32) ^ words[3][i] ^ k1;
      words[3][i] = static_cast<uint32_t>(first);
    }
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
}

}  // namespace complora
