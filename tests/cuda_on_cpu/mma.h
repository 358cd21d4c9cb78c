// Products of tiles by a warp: its first thread holds all of a fragment and does all of the work.

#pragma once

#include "cuda_runtime.h"

#include <type_traits>

namespace nvcuda::wmma {

struct matrix_a;
struct matrix_b;
struct accumulator;
struct row_major;
struct col_major;
enum layout_t { mem_row_major, mem_col_major };

template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment {
  T values[16][16];  // [row, column]
};

inline bool first_of_warp() { return threadIdx.x % 32 == 0; }

inline void check_pointer(const void* pointer, unsigned pitch_bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % 32 != 0 || pitch_bytes % 16 != 0) {
    cuda_on_cpu::fail("a tile at an address that is no multiple of 32 bytes, or of a pitch that is none of 16");
  }
}

template <typename Use, typename T, typename Layout, int M, int N, int K>
void fill_fragment(fragment<Use, M, N, K, T, Layout>& tile, T value) {
  if (first_of_warp()) {
    std::fill_n(&tile.values[0][0], 256, value);
  }
}

template <typename Use, typename T, typename Layout, int M, int N, int K>
void load_matrix_sync(fragment<Use, M, N, K, T, Layout>& tile, const T* from, unsigned pitch) {
  check_pointer(from, pitch * sizeof(T));
  for (int i = 0; i < 16 && first_of_warp(); ++i) {
    for (int j = 0; j < 16; ++j) {
      tile.values[i][j] = std::is_same_v<Layout, row_major> ? from[i * pitch + j] : from[j * pitch + i];
    }
  }
}

template <typename T, typename Left, typename Right, int M, int N, int K>
void mma_sync(fragment<accumulator, M, N, K, float>& out, const fragment<matrix_a, M, N, K, T, Left>& left,
              const fragment<matrix_b, M, N, K, T, Right>& right, const fragment<accumulator, M, N, K, float>& sum) {
  for (int i = 0; i < 16 && first_of_warp(); ++i) {
    float row[16];
    std::copy_n(sum.values[i], 16, row);
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 16; ++j) {
        row[j] += static_cast<float>(left.values[i][k]) * static_cast<float>(right.values[k][j]);
      }
    }
    std::copy_n(row, 16, out.values[i]);
  }
}

template <int M, int N, int K>
void store_matrix_sync(float* to, const fragment<accumulator, M, N, K, float>& tile, unsigned pitch, layout_t layout) {
  check_pointer(to, pitch * sizeof(float));
  for (int i = 0; i < 16 && first_of_warp(); ++i) {
    for (int j = 0; j < 16; ++j) {
      to[layout == mem_row_major ? i * pitch + j : j * pitch + i] = tile.values[i][j];
    }
  }
}

}  // namespace nvcuda::wmma
