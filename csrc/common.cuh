// What the kernels of complement_cuda.cu share: numbers of every dtype, tiles on their way from device memory to shared
// memory, dropout masks, and the launch.

#pragma once

#include "philox.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

namespace complora {

using torch::headeronly::ScalarType;

constexpr int THREADS = 256;  // threads of a block

template <typename T>
constexpr ScalarType dtype_of = std::is_same_v<T, double>          ? ScalarType::Double
                                : std::is_same_v<T, float>         ? ScalarType::Float
                                : std::is_same_v<T, __nv_bfloat16> ? ScalarType::BFloat16
                                                                   : ScalarType::Half;

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

// A float64 becomes a half by way of float32, as it does in torch.
template <typename T, typename Wide>
__device__ T narrow(Wide value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(value));
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(value));
  } else {
    return static_cast<T>(value);
  }
}

// Element i of an array of any dtype. An array loaded as halves holds halves of that type.
template <typename T>
__device__ T load(const void* data, ScalarType dtype, int64_t i) {
  if constexpr (std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>) {
    return static_cast<const T*>(data)[i];
  } else {
    switch (dtype) {
      case ScalarType::Float: return static_cast<T>(static_cast<const float*>(data)[i]);
      case ScalarType::Double: return static_cast<T>(static_cast<const double*>(data)[i]);
      case ScalarType::BFloat16: return static_cast<T>(widen(static_cast<const __nv_bfloat16*>(data)[i]));
      default: return static_cast<T>(widen(static_cast<const __half*>(data)[i]));
    }
  }
}

template <typename T>
__device__ void store(void* data, ScalarType dtype, int64_t i, T value) {
  switch (dtype) {
    case ScalarType::Float: static_cast<float*>(data)[i] = narrow<float>(value); break;
    case ScalarType::Double: static_cast<double*>(data)[i] = narrow<double>(value); break;
    case ScalarType::BFloat16: static_cast<__nv_bfloat16*>(data)[i] = narrow<__nv_bfloat16>(value); break;
    default: static_cast<__half*>(data)[i] = narrow<__half>(value);
  }
}

// Which of WIDTH elements of a mask are kept, a bit for each, from [row, column] on; column is a multiple of WIDTH.
template <int BITS, int WIDTH>
__device__ uint32_t kept_lanes(const Dropout& dropout, int64_t adapter, int64_t row, int64_t column) {
  constexpr int LANES = 32 / BITS;  // lanes in a word
  static_assert(4 * LANES % WIDTH == 0, "the elements lie in one draw");
  uint32_t words[4][1] = {{static_cast<uint32_t>(column / (4 * LANES))},
                          {static_cast<uint32_t>(row)},
                          {static_cast<uint32_t>(adapter)},
                          {0}};
  philox4x32_7(words, dropout.seed);
  const unsigned first = static_cast<unsigned>(column / WIDTH % (4 * LANES / WIDTH)) * WIDTH;
  uint32_t kept = 0;
#pragma unroll
  for (unsigned j = 0; j < WIDTH; ++j) {
    const unsigned word = (first + j) / LANES, lane = (first + j) % LANES;
    // Not words[word]: an index known only at run time would put the words into local memory.
    const uint32_t lanes = word < 2 ? (word == 0 ? words[0][0] : words[1][0]) : (word == 2 ? words[2][0] : words[3][0]);
    kept |= static_cast<uint32_t>((lanes >> (BITS * lane) & ((1u << BITS) - 1)) >= dropout.threshold) << j;
  }
  return kept;
}

template <int WIDTH>
__device__ uint32_t kept_lanes(const Dropout& dropout, int64_t adapter, int64_t row, int64_t column) {
  return dropout.bits == 8    ? kept_lanes<8, WIDTH>(dropout, adapter, row, column)
         : dropout.bits == 16 ? kept_lanes<16, WIDTH>(dropout, adapter, row, column)
                              : ~uint32_t{0};
}

// The mask of one adapter, and how it is drawn.
struct Mask {
  Dropout lanes;
  const int64_t* seed = nullptr;  // [1]
  int64_t adapter = -1;           // -1: none

  // The seed is read where it is used: kept, it and the keys that follow from it would take sixteen registers.
  __device__ Dropout dropout() const {
    Dropout seeded = lanes;
    seeded.seed = static_cast<uint64_t>(*seed);
    return seeded;
  }
};

// A matrix in device memory, of any strides.
struct Matrix {
  const void* data = nullptr;  // [rows, columns]
  ScalarType dtype = ScalarType::Float;
  int64_t rows = 0, columns = 0, row_stride = 0, column_stride = 0;
};

// The elements that one access moves; two halves lie in a word, as registers hold them.
template <typename T, int WIDTH>
struct alignas(WIDTH * sizeof(T)) Vector {
  using Word = std::conditional_t<sizeof(T) == 2, uint32_t, T>;
  static constexpr int PER_WORD = sizeof(Word) / sizeof(T);
  Word words[WIDTH / PER_WORD];

  // The elements in their order.
  template <typename Element>
  __device__ static Vector of(const Element& element) {
    Vector vector;
#pragma unroll
    for (int j = 0; j < WIDTH; j += PER_WORD) {
      if constexpr (PER_WORD == 1) {
        vector.words[j] = element(j);
      } else {
        const T low = element(j), high = element(j + 1);
        vector.words[j / 2] = bits(low) | bits(high) << 16;
      }
    }
    return vector;
  }

  __device__ T operator[](int j) const {
    if constexpr (PER_WORD == 1) {
      return words[j];
    } else {
      const uint16_t bits = static_cast<uint16_t>(words[j / 2] >> (16 * (j % 2)));
      T value;
      memcpy(&value, &bits, sizeof(T));
      return value;
    }
  }

  __device__ static uint32_t bits(T half) {
    uint16_t bits;
    memcpy(&bits, &half, sizeof(T));
    return bits;
  }

  // Whether a matrix can be read in such vectors: along its columns, or its rows.
  __device__ static bool fits(const Matrix& matrix, bool along_rows) {
    const int64_t step = along_rows ? matrix.row_stride : matrix.column_stride;
    const int64_t other = along_rows ? matrix.column_stride : matrix.row_stride;
    return matrix.dtype == dtype_of<T> && step == 1 && other % WIDTH == 0 &&
           reinterpret_cast<uintptr_t>(matrix.data) % sizeof(Vector) == 0;
  }
};

// One thread's share of a tile [ROWS, COLUMNS] of a matrix: fetched into registers, where it waits while the tile
// before it is multiplied, then stored to shared memory. Outside the matrix the tile is zero.
template <typename T, int ROWS, int COLUMNS>
struct Share {
  static constexpr int COUNT = ROWS * COLUMNS / THREADS;
  static constexpr int WIDEST = 16 / sizeof(T);
  static constexpr int WIDTH = COUNT < WIDEST ? COUNT : WIDEST;
  static constexpr int DOWN = ROWS / WIDTH, ACROSS = COLUMNS / WIDTH;              // vectors in a column, or a row
  static constexpr int NEXT_ROW = THREADS / ACROSS, NEXT_COLUMN = THREADS / DOWN;  // from one vector to the next
  static_assert(COUNT % WIDTH == 0 && ROWS % WIDTH == 0 && COLUMNS % WIDTH == 0);
  static_assert(COUNT == WIDTH || (THREADS % DOWN == 0 && THREADS % ACROSS == 0));

  Vector<T, WIDTH> vectors[COUNT / WIDTH];
  const bool along_rows;  // the threads of a warp read along the dimension whose stride is 1
  const bool whole;       // one access reads a vector
  const int row, column;  // the first vector's place in the tile; the others lie below it or, along rows, to its right

  // A mask is drawn along columns.
  __device__ Share(const Matrix& matrix, bool masked)
      : along_rows(matrix.row_stride == 1 && matrix.column_stride != 1 && !masked),
        whole(Vector<T, WIDTH>::fits(matrix, along_rows)),
        row(along_rows ? threadIdx.x % DOWN * WIDTH : threadIdx.x / ACROSS),
        column(along_rows ? threadIdx.x / DOWN : threadIdx.x % ACROSS * WIDTH) {}

  // The tile at [top, left], multiples of ROWS and COLUMNS, of the rows before `bottom`.
  __device__ void fetch(const Matrix& matrix, int64_t top, int64_t bottom, int64_t left) {
    const int rows = static_cast<int>(bottom - top < ROWS ? bottom - top : ROWS);
    const int columns = static_cast<int>(matrix.columns - left < COLUMNS ? matrix.columns - left : COLUMNS);
    const int64_t step = along_rows ? matrix.row_stride : matrix.column_stride;
    const int64_t first = (top + row) * matrix.row_stride + (left + column) * matrix.column_stride;
    const int64_t next = along_rows ? NEXT_COLUMN * matrix.column_stride : NEXT_ROW * matrix.row_stride;
#pragma unroll
    for (int v = 0; v < COUNT / WIDTH; ++v) {
      const int down = rows - row - (along_rows ? 0 : v * NEXT_ROW);
      const int across = columns - column - (along_rows ? v * NEXT_COLUMN : 0);
      const int inside = down <= 0 || across <= 0 ? 0 : along_rows ? down : across;  // elements of the vector, or more
      const int64_t i = first + v * next;
      if (whole && inside >= WIDTH) {
        vectors[v] = *reinterpret_cast<const Vector<T, WIDTH>*>(static_cast<const T*>(matrix.data) + i);
      } else {
        vectors[v] = Vector<T, WIDTH>::of(
            [&](int j) { return j < inside ? load<T>(matrix.data, matrix.dtype, i + j * step) : narrow<T>(0.0f); });
      }
    }
  }

  // mask ∘ the tile at [top, left]
  __device__ void drop(const Mask& mask, int64_t top, int64_t left) {
    const Dropout dropout = mask.dropout();
#pragma unroll
    for (int v = 0; v < COUNT / WIDTH; ++v) {
      const uint32_t kept = kept_lanes<WIDTH>(dropout, mask.adapter, top + row + v * NEXT_ROW, left + column);
      const Vector<T, WIDTH> vector = vectors[v];
      vectors[v] = Vector<T, WIDTH>::of([&](int j) { return kept >> j & 1 ? vector[j] : narrow<T>(0.0f); });
    }
  }

  template <int PITCH>
  __device__ void store(T (&tile)[ROWS][PITCH]) const {
    static_assert(PITCH % WIDTH == 0);
#pragma unroll
    for (int v = 0; v < COUNT / WIDTH; ++v) {
      if (along_rows) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
          tile[row + j][column + v * NEXT_COLUMN] = vectors[v][j];
        }
      } else {
        *reinterpret_cast<Vector<T, WIDTH>*>(&tile[row + v * NEXT_ROW][column]) = vectors[v];
      }
    }
  }
};

// The shared memory of a block; the launch says how many bytes.
template <typename Shared>
__device__ Shared& shared_memory() {
  static_assert(sizeof(Shared) <= 48 * 1024, "what every chip gives a block without being asked");
  extern __shared__ __align__(128) unsigned char block_memory[];
  return *reinterpret_cast<Shared*>(block_memory);
}

// Blocks along the first dimension of a grid.
inline unsigned blocks(int64_t n) {
  COMPLORA_CHECK(n < int64_t{1} << 31, "a launch of ", n, " blocks, expected fewer than 2^31");
  return static_cast<unsigned>(n);
}

// An error is reported here, at the launch that caused it.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, size_t shared_bytes, cudaStream_t stream,
            Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace complora
