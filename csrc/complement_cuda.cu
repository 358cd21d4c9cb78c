// The operations on CUDA devices, in two kinds of product, each of which reads its larger operand once for each tile of
// ranks, which are 16, or up to 64 where halves are summed over the tokens:
//
//   out = left^T right                           coordinates of factors along their bases, sums over the tokens
//   out = scale · (factor - coordinates U^T)     projections
//
// Sums have a fixed order that depends on shapes alone: the same bits in every run. Nothing waits for the device, and
// what a kernel needs to know travels in its arguments: everything here can be captured in a CUDA graph.

#include "common.cuh"
#include "complement.h"

#include <Python.h>
#include <mma.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

namespace complora {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int FEW = 16, MANY = 240;      // items in the arguments of one launch: no more than 240 fit
constexpr int64_t SMS = 132;             // multiprocessors of an H100 or H200: the splits fill them once
constexpr int64_t ROWS_PER_SPLIT = 256;  // rows of a split, at least: more partial sums cost more than they bring

// out = left^T right, for each split of the depth.
struct Product {
  Matrix left;          // [depth, ranks]
  Matrix right;         // [depth, columns]
  void* out = nullptr;  // [splits, ranks, columns]
  int64_t out_stride_rank = 0, out_stride_column = 0;
  int64_t adapter = -1;  // the adapter whose mask drops elements of right; -1: nothing is dropped
};

template <int N>
struct Products {
  Product item[N];
};

// A job, and the coordinates of its factor.
struct Projection {
  Job job;
  const void* coordinates = nullptr;  // [r, k]
};

template <int N>
struct Projections {
  Projection item[N];
};

static_assert(sizeof(Products<MANY>) + 256 <= 32764 && sizeof(Projections<MANY>) + 256 <= 32764,
              "the largest arguments of a kernel");

// A tile [16, COLUMNS_] of left^T right by multiply-add. A group of COLUMNS_ threads holds it, four by four elements
// each, of its share of the depth; the groups are added up at the end.
template <typename T, int COLUMNS_>
struct MultiplyAdd {
  using Acc = T;
  using Element = T;
  static constexpr int RANKS = 16, COLUMNS = COLUMNS_, DEPTH = 16384 / (COLUMNS * sizeof(T)), PAD = 16 / sizeof(T);
  static constexpr int GROUPS = THREADS / COLUMNS, BLOCKS_PER_SM = sizeof(T) == 4 && COLUMNS == 64 ? 3 : 2;

  struct Operands {
    T left[DEPTH][RANKS + PAD], right[DEPTH][COLUMNS + PAD];
  };
  union Shared {
    Operands operands;
    T sums[GROUPS][RANKS][COLUMNS + PAD];
  };

  const int group = threadIdx.x / COLUMNS, rank = threadIdx.x / 8 % 4 * 4;
  const int column = (threadIdx.x % 8 + threadIdx.x % COLUMNS / 32 * 8) * 4;
  T sums[4][4] = {};

  __device__ explicit MultiplyAdd(int64_t) {}

  __device__ void add(const Operands& operands) {
#pragma unroll 2
    for (int i = 0; i < DEPTH / GROUPS; ++i) {
      const T* const left = &operands.left[group * (DEPTH / GROUPS) + i][rank];
      const T* const right = &operands.right[group * (DEPTH / GROUPS) + i][column];
      T l[4], r[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        l[j] = left[j];
        r[j] = right[j];
      }
#pragma unroll
      for (int a = 0; a < 4; ++a) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {
          sums[a][b] += l[a] * r[b];
        }
      }
    }
  }

  __device__ void store(Shared& shared) const {
#pragma unroll
    for (int a = 0; a < 4; ++a) {
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        shared.sums[group][rank + a][column + b] = sums[a][b];
      }
    }
  }

  __device__ static T sum(const Shared& shared, int rank, int column) {
    T total = shared.sums[0][rank][column];
#pragma unroll
    for (int i = 1; i < GROUPS; ++i) {
      total += shared.sums[i][rank][column];
    }
    return total;
  }
};

// Coordinates are few columns and a long sum: narrow and deep tiles give more blocks, of fewer steps each.
template <typename T>
using CoordinatesTile = MultiplyAdd<T, 32>;
template <typename T>
using ProjectionTile = MultiplyAdd<T, 64>;

template <typename T>
using LeftFragment = wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::col_major>;  // [ranks, depth]
template <typename T>
using RightFragment = wmma::fragment<wmma::matrix_b, 16, 16, 16, T, wmma::row_major>;  // [depth, columns]

// wmma::load_matrix_sync from shared memory. For bfloat16 nvcc 13.0 does not see which memory it is, and would load
// word by word where ldmatrix loads a tile.
template <class Fragment, typename T>
__device__ void load_fragment(Fragment& fragment, const T* tile, unsigned pitch) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(tile));
    uint32_t words[4];
    static_assert(sizeof(words) == sizeof(fragment.x));
    if constexpr (std::is_same_v<Fragment, LeftFragment<T>>) {
      asm volatile("wmma.load.a.sync.aligned.col.m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(address), "r"(pitch)
                   : "memory");
    } else {
      asm volatile("wmma.load.b.sync.aligned.row.m16n16k16.shared.bf16 {%0, %1, %2, %3}, [%4], %5;"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(address), "r"(pitch)
                   : "memory");
    }
    memcpy(fragment.x, words, sizeof(words));
    return;
  }
#endif
  wmma::load_matrix_sync(fragment, tile, pitch);
}

// A tile [RANKS_, 128] of left^T right of halves on tensor cores, in float32: a warp holds 16 columns of it.
template <typename T, int RANKS_>
struct TensorCores {
  using Acc = float;
  using Element = T;
  static constexpr int RANKS = RANKS_, COLUMNS = 128, DEPTH = 64, PAD = 8, BLOCKS_PER_SM = RANKS == 16 ? 3 : 2;

  struct Operands {
    T left[DEPTH][RANKS + PAD], right[DEPTH][COLUMNS + PAD];
  };
  union Shared {
    Operands operands;
    float sums[RANKS][COLUMNS + PAD];
  };

  const int64_t ranks;  // ranks of the result from the tile's first on: past them nothing is multiplied
  const int column = threadIdx.x / 32 * 16;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> sums[RANKS / 16];

  __device__ explicit TensorCores(int64_t ranks) : ranks(ranks) {
#pragma unroll
    for (int i = 0; i < RANKS / 16; ++i) {
      wmma::fill_fragment(sums[i], 0.0f);
    }
  }

  __device__ void add(const Operands& operands) {
#pragma unroll
    for (int depth = 0; depth < DEPTH; depth += 16) {
      RightFragment<T> right;
      load_fragment(right, &operands.right[depth][column], COLUMNS + PAD);
#pragma unroll
      for (int i = 0; i < RANKS / 16; ++i) {
        if (16 * i < ranks) {
          LeftFragment<T> left;
          load_fragment(left, &operands.left[depth][16 * i], RANKS + PAD);
          wmma::mma_sync(sums[i], left, right, sums[i]);
        }
      }
    }
  }

  __device__ void store(Shared& shared) const {
#pragma unroll
    for (int i = 0; i < RANKS / 16; ++i) {
      wmma::store_matrix_sync(&shared.sums[16 * i][column], sums[i], COLUMNS + PAD, wmma::mem_row_major);
    }
  }

  __device__ static float sum(const Shared& shared, int rank, int column) { return shared.sums[rank][column]; }
};

// shared.sums = left[first : last, rank : ]^T (mask ∘ right)[first : last, column : ], one tile of it
template <class Tile, bool DROPPING>
__device__ void multiply(typename Tile::Shared& shared, const Matrix& left, const Matrix& right, int64_t rank,
                         int64_t column, int64_t first, int64_t last, const Mask& mask) {
  Share<typename Tile::Element, Tile::DEPTH, Tile::RANKS> left_share(left, false);
  Share<typename Tile::Element, Tile::DEPTH, Tile::COLUMNS> right_share(right, DROPPING && mask.adapter >= 0);
  Tile tile(left.columns - rank);
  left_share.fetch(left, first, last, rank);
  right_share.fetch(right, first, last, column);
  for (int64_t depth = first; depth < last; depth += Tile::DEPTH) {
    if (DROPPING && mask.adapter >= 0) {
      right_share.drop(mask, depth, column);
    }
    left_share.store(shared.operands.left);
    right_share.store(shared.operands.right);
    __syncthreads();
    if (depth + Tile::DEPTH < last) {
      left_share.fetch(left, depth + Tile::DEPTH, last, rank);
      right_share.fetch(right, depth + Tile::DEPTH, last, column);
    }
    tile.add(shared.operands);
    __syncthreads();
  }
  tile.store(shared);
  __syncthreads();
}

// Calls function(rank, column) for every element of a tile, neighbouring threads where the result is contiguous.
template <class Tile, typename Function>
__device__ void for_each_element(bool along_ranks, const Function& function) {
  for (int i = threadIdx.x; i < Tile::RANKS * Tile::COLUMNS; i += THREADS) {
    if (along_ranks) {
      function(i % Tile::RANKS, i / Tile::RANKS);
    } else {
      function(i / Tile::COLUMNS, i % Tile::COLUMNS);
    }
  }
}

// The blocks that a multiprocessor holds at once: drawing masks takes registers.
template <class Tile, bool DROPPING>
constexpr int RESIDENT = DROPPING ? 2 : Tile::BLOCKS_PER_SM;

// Block (tile, i, split) owns one tile of left^T right of product i over one split of the depth.
template <class Tile, int N, bool DROPPING>
__global__ void __launch_bounds__(THREADS, RESIDENT<Tile, DROPPING>)
    product_kernel(const __grid_constant__ Products<N> products,
                   int64_t depth_of_split,  // a multiple of Tile::DEPTH, or all of the depth
                   int64_t out_stride_split,
                   const int64_t* seed,  // [1]; null where nothing is dropped
                   Dropout dropout) {
  using Acc = typename Tile::Acc;
  const Product& product = products.item[blockIdx.y];
  const unsigned column_tiles = static_cast<unsigned>(ceil_div(product.right.columns, Tile::COLUMNS));
  const int64_t rank = int64_t{blockIdx.x / column_tiles} * Tile::RANKS;
  const int64_t column = int64_t{blockIdx.x % column_tiles} * Tile::COLUMNS;
  if (rank >= product.left.columns) {
    return;
  }
  const int64_t first = blockIdx.z * depth_of_split, end = first + depth_of_split;
  const int64_t last = end < product.right.rows ? end : product.right.rows;
  auto& shared = shared_memory<typename Tile::Shared>();
  multiply<Tile, DROPPING>(shared, product.left, product.right, rank, column, first, last,
                           {dropout, seed, product.adapter});

  Acc* const out = static_cast<Acc*>(product.out) + blockIdx.z * out_stride_split;
  const Acc scale = static_cast<Acc>(product.adapter >= 0 ? dropout.scale : 1.0);
  for_each_element<Tile>(product.out_stride_rank == 1, [&](int r, int c) {
    if (rank + r < product.left.columns && column + c < product.right.columns) {
      out[(rank + r) * product.out_stride_rank + (column + c) * product.out_stride_column] =
          scale * Tile::sum(shared, r, c);
    }
  });
}

// Block (tile, i) owns one tile of the result of a projection. The last projections come first: the product before this
// one read their bases last, and they may still be in the cache.
template <typename Acc, int N>
__global__ void __launch_bounds__(THREADS, ProjectionTile<Acc>::BLOCKS_PER_SM)
    projection_kernel(const __grid_constant__ Projections<N> projections, ScalarType factor_dtype,
                      ScalarType out_dtype) {
  using Tile = ProjectionTile<Acc>;
  const Projection& projection = projections.item[gridDim.y - 1 - blockIdx.y];
  const Job& job = projection.job;
  const unsigned column_tiles = static_cast<unsigned>(ceil_div(job.d, Tile::COLUMNS));
  const int64_t rank = int64_t{blockIdx.x / column_tiles} * Tile::RANKS;
  const int64_t column = int64_t{blockIdx.x % column_tiles} * Tile::COLUMNS;
  if (rank >= job.r) {
    return;
  }
  const Matrix coordinates{projection.coordinates, dtype_of<Acc>, job.k, job.r, 1, job.k};             // [k, r]
  const Matrix basis{job.basis, dtype_of<Acc>, job.k, job.d, job.basis_stride_k, job.basis_stride_d};  // [k, d]
  auto& shared = shared_memory<typename Tile::Shared>();
  multiply<Tile, false>(shared, coordinates, basis, rank, column, 0, job.k, {});

  const Acc scale = static_cast<Acc>(job.scale);
  for_each_element<Tile>(job.out_stride_r == 1 && job.out_stride_d != 1, [&](int r, int d) {
    if (rank + r < job.r && column + d < job.d) {
      const Acc inside = Tile::sum(shared, r, d);
      const int64_t i = (rank + r) * job.factor_stride_r + (column + d) * job.factor_stride_d;
      const int64_t o = (rank + r) * job.out_stride_r + (column + d) * job.out_stride_d;
      const Acc kept = job.complement ? inside : load<Acc>(job.factor, factor_dtype, i) - inside;
      store(job.out, out_dtype, o, scale * kept);
    }
  });
}

// A thread adds one element of all partial sums, in order, and rounds the total; those of dA come first.
template <typename Acc, typename T>
__global__ void sum_kernel(const Acc* partials,  // [splits, A_size + B_size]
                           int64_t splits, int64_t A_size, int64_t B_size,
                           T* dA,    // [A_size]
                           T* dB) {  // [B_size]
  const int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x;
  if (i >= A_size + B_size) {
    return;
  }
  Acc total = 0;
#pragma unroll 16
  for (int64_t split = 0; split < splits; ++split) {
    total += partials[split * (A_size + B_size) + i];
  }
  (i < A_size ? dA[i] : dB[i - A_size]) = narrow<T>(total);
}

// A thread owns a vector of one row of m ∘ x.
template <typename T>
__global__ void drop_kernel(Matrix x,  // [rows, columns]
                            T* out,    // [rows, columns], contiguous
                            int64_t adapter,
                            const int64_t* seed,  // [1]
                            Dropout dropout) {
  using Wide = decltype(widen(T{}));
  constexpr int WIDTH = 16 / sizeof(T);
  const int64_t i = int64_t{blockIdx.x} * THREADS + threadIdx.x, vectors = ceil_div(x.columns, WIDTH);
  const int64_t row = i / vectors, column = i % vectors * WIDTH;
  if (row >= x.rows) {
    return;
  }
  dropout.seed = static_cast<uint64_t>(*seed);
  const uint32_t kept = kept_lanes<WIDTH>(dropout, adapter, row, column);
  const auto dropped = [&](int j, T value) {
    return narrow<T>(kept >> j & 1 ? static_cast<Wide>(dropout.scale) * widen(value) : Wide{0});
  };
  const int64_t offset = row * x.row_stride + column * x.column_stride;
  out += row * x.columns + column;
  if (x.columns % WIDTH == 0 && Vector<T, WIDTH>::fits(x, false)) {
    const auto vector = *reinterpret_cast<const Vector<T, WIDTH>*>(static_cast<const T*>(x.data) + offset);
    *reinterpret_cast<Vector<T, WIDTH>*>(out) = Vector<T, WIDTH>::of([&](int j) { return dropped(j, vector[j]); });
  } else {
    for (int j = 0; j < WIDTH && column + j < x.columns; ++j) {
      out[j] = dropped(j, static_cast<const T*>(x.data)[offset + j * x.column_stride]);
    }
  }
}

// The device of a tensor, made the current one, and torch's current stream on it.
struct Place {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Place(const Tensor& where) : guard(where.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(where.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

// How the depth of products is split; the results of the splits lie out_stride elements apart.
struct Splits {
  int64_t count = 1, depth = 0, out_stride = 0;
};

template <class Tile, int N, bool DROPPING>
void launch_products(const Product* products, size_t n, const Splits& splits, const int64_t* seed,
                     const Dropout& dropout, cudaStream_t stream) {
  Products<N> arguments;
  std::copy_n(products, n, arguments.item);
  int64_t tiles = 0;
  for (size_t i = 0; i < n; ++i) {
    tiles = std::max(tiles, product_of(ceil_div(products[i].left.columns, Tile::RANKS),
                                       ceil_div(products[i].right.columns, Tile::COLUMNS)));
  }
  if (tiles > 0) {
    const dim3 grid(blocks(tiles), static_cast<unsigned>(n), static_cast<unsigned>(splits.count));
    launch(&product_kernel<Tile, N, DROPPING>, grid, sizeof(typename Tile::Shared), stream, arguments, splits.depth,
           splits.out_stride, seed, dropout);
  }
}

template <typename Acc, int N>
void launch_projections(const Projection* projections, size_t n, ScalarType factor_dtype, ScalarType out_dtype,
                        cudaStream_t stream) {
  using Tile = ProjectionTile<Acc>;
  Projections<N> arguments;
  std::copy_n(projections, n, arguments.item);
  int64_t tiles = 0;
  for (size_t i = 0; i < n; ++i) {
    const Job& job = projections[i].job;
    tiles = std::max(tiles, product_of(ceil_div(job.r, Tile::RANKS), ceil_div(job.d, Tile::COLUMNS)));
  }
  if (tiles > 0) {
    const dim3 grid(blocks(tiles), static_cast<unsigned>(n));
    launch(&projection_kernel<Acc, N>, grid, sizeof(typename Tile::Shared), stream, arguments, factor_dtype, out_dtype);
  }
}

template <typename Acc, int N>
void project_some(const Projection* projections, size_t n, ScalarType factor_dtype, ScalarType out_dtype,
                  cudaStream_t stream) {
  std::vector<Product> products;
  Splits whole;
  for (size_t i = 0; i < n; ++i) {
    const Job& job = projections[i].job;
    if (job.basis != nullptr) {
      Product product;
      product.left = {job.factor, factor_dtype, job.d, job.r, job.factor_stride_d, job.factor_stride_r};
      product.right = {job.basis, dtype_of<Acc>, job.d, job.k, job.basis_stride_d, job.basis_stride_k};
      product.out = const_cast<void*>(projections[i].coordinates);
      product.out_stride_rank = job.k;
      product.out_stride_column = 1;
      products.push_back(product);
      whole.depth = std::max(whole.depth, job.d);
    }
  }
  launch_products<CoordinatesTile<Acc>, N, false>(products.data(), products.size(), whole, nullptr, {}, stream);
  launch_projections<Acc, N>(projections, n, factor_dtype, out_dtype, stream);
}

template <typename Acc>
void project(const std::vector<Job>& jobs, ScalarType factor_dtype, ScalarType out_dtype, const Tensor& where) {
  const Place place(where);
  int64_t size = 0;
  for (const Job& job : jobs) {
    size = sum_of(size, product_of(job.r, job.k));
  }
  const Tensor workspace = empty(where, {size}, dtype_of<Acc>);  // the coordinates of every factor, each [r, k]
  std::vector<Projection> projections(jobs.size());
  const Acc* next = static_cast<const Acc*>(workspace.const_data_ptr());
  for (size_t i = 0; i < jobs.size(); ++i) {
    projections[i] = {jobs[i], next};
    next += jobs[i].r * jobs[i].k;
  }
  for (size_t i = 0; i < jobs.size(); i += MANY) {
    const size_t n = std::min<size_t>(MANY, jobs.size() - i);
    (n <= FEW ? project_some<Acc, FEW> : project_some<Acc, MANY>)(projections.data() + i, n, factor_dtype, out_dtype,
                                                                  place.stream);
  }
}

Matrix matrix(const Tensor& tensor, int64_t first_column, int64_t columns) {
  const char* const data = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t row_stride = stride_of(tensor, 0), column_stride = stride_of(tensor, 1);
  return {data + first_column * column_stride * tensor.element_size(),
          tensor.scalar_type(),
          tensor.size(0),
          columns,
          row_stride,
          column_stride};
}

template <class Tile>
void reduce(const Reduction& task, cudaStream_t stream) {
  using Acc = typename Tile::Acc;
  using T = typename Tile::Element;
  const int64_t M = task.x.size(0), K = task.x.size(1), R = task.dA.size(1), D = task.dB.size(1);
  const int64_t P = static_cast<int64_t>(task.starts.size());
  const int64_t A_size = task.dA.numel(), B_size = task.dB.numel();
  const int64_t size = sum_of(A_size, B_size);
  if (size == 0) {
    return;
  }
  const bool dropping = task.dropout_p > 0;
  // Without masks of their own the adapters are one of more ranks.
  const int64_t A_sums = A_size == 0 ? 0 : dropping ? P : 1, A_rank = dropping ? R : P * R;
  const int64_t B_sums = B_size == 0 ? 0 : P;
  const int64_t A_tiles = product_of(ceil_div(A_rank, Tile::RANKS), ceil_div(K, Tile::COLUMNS));
  const int64_t B_tiles = product_of(ceil_div(R, Tile::RANKS), ceil_div(D, Tile::COLUMNS));
  const int64_t tiles = sum_of(product_of(A_sums, A_tiles), product_of(B_sums, B_tiles));
  Splits splits;
  splits.out_stride = size;
  const int64_t resident = SMS * (dropping ? RESIDENT<Tile, true> : RESIDENT<Tile, false>);
  splits.count = std::min(ceil_div(M, ROWS_PER_SPLIT), std::max(resident / tiles, int64_t{1}));
  splits.depth = M == 0 ? 0 : product_of(ceil_div(ceil_div(M, splits.count), Tile::DEPTH), Tile::DEPTH);
  splits.count = M == 0 ? 0 : ceil_div(M, splits.depth);

  void *const dA = task.dA.mutable_data_ptr(), *const dB = task.dB.mutable_data_ptr();
  const bool is_whole = splits.count == 1 && std::is_same_v<Acc, T>;  // the products write the result itself
  const Tensor workspace = empty(task.x, {is_whole ? 0 : product_of(splits.count, size)}, dtype_of<Acc>);
  Acc* const partials = static_cast<Acc*>(workspace.mutable_data_ptr());  // [splits, P r K + P D r]
  Acc* const A_sum = is_whole ? static_cast<Acc*>(dA) : partials;
  Acc* const B_sum = is_whole ? static_cast<Acc*>(dB) : partials + A_size;
  std::vector<Product> products;
  for (int64_t p = 0; p < A_sums && M > 0; ++p) {  // g_p^T drop_p(x)
    products.push_back(
        {matrix(task.g, p * A_rank, A_rank), matrix(task.x, 0, K), A_sum + p * A_rank * K, K, 1, dropping ? p : -1});
  }
  for (int64_t p = 0; p < B_sums && M > 0; ++p) {  // (h_p^T dY_p)^T
    products.push_back({matrix(task.h, p * R, R), matrix(task.dY, task.starts[p], D), B_sum + p * D * R, 1, R, -1});
  }
  const int64_t* const seed = dropping ? task.seed->const_data_ptr<int64_t>() : nullptr;
  for (size_t i = 0; i < products.size(); i += FEW) {
    (dropping ? launch_products<Tile, FEW, true>
              : launch_products<Tile, FEW, false>)(products.data() + i, std::min<size_t>(FEW, products.size() - i),
                                                   splits, seed, dropout_lanes(task.dropout_p), stream);
  }
  if (!is_whole) {
    launch(&sum_kernel<Acc, T>, dim3(blocks(ceil_div(size, THREADS))), 0, stream, static_cast<const Acc*>(partials),
           splits.count, A_size, B_size, static_cast<T*>(dA), static_cast<T*>(dB));
  }
}

template <typename T>
void reduce_halves(const Reduction& task, cudaStream_t stream) {
  const int64_t P = static_cast<int64_t>(task.starts.size()), rank = task.dA.size(1);
  const int64_t ranks = task.dropout_p > 0 || task.dA.numel() == 0 ? rank : product_of(P, rank);
  (ranks <= 16 ? reduce<TensorCores<T, 16>> : reduce<TensorCores<T, 64>>)(task, stream);
}

template <typename T>
void drop_elements(const Tensor& x, const Tensor& out, int64_t adapter, double dropout_p, const Tensor& seed,
                   cudaStream_t stream) {
  const int64_t vectors = product_of(x.size(0), ceil_div(x.size(1), 16 / sizeof(T)));
  launch(&drop_kernel<T>, dim3(blocks(ceil_div(vectors, THREADS))), 0, stream, matrix(x, 0, x.size(1)),
         static_cast<T*>(out.mutable_data_ptr()), adapter, seed.const_data_ptr<int64_t>(), dropout_lanes(dropout_p));
}

struct CUDA {
  static void project(const std::vector<Job>& jobs, ScalarType factor_dtype, ScalarType out_dtype,
                      const Tensor& where) {
    if (accumulator(factor_dtype, out_dtype) == ScalarType::Double) {
      complora::project<double>(jobs, factor_dtype, out_dtype, where);
    } else {
      complora::project<float>(jobs, factor_dtype, out_dtype, where);
    }
  }

  static void reduce(const Reduction& task) {
    const Place place(task.x);
    switch (task.x.scalar_type()) {
      case ScalarType::Float: return complora::reduce<MultiplyAdd<float, 64>>(task, place.stream);
      case ScalarType::Double: return complora::reduce<MultiplyAdd<double, 64>>(task, place.stream);
      case ScalarType::BFloat16: return reduce_halves<__nv_bfloat16>(task, place.stream);
      default: return reduce_halves<__half>(task, place.stream);
    }
  }

  static void drop(const Tensor& x, const Tensor& out, int64_t adapter, double dropout_p, const Tensor& seed) {
    const Place place(x);
    switch (x.scalar_type()) {
      case ScalarType::Float: return drop_elements<float>(x, out, adapter, dropout_p, seed, place.stream);
      case ScalarType::Double: return drop_elements<double>(x, out, adapter, dropout_p, seed, place.stream);
      case ScalarType::BFloat16: return drop_elements<__nv_bfloat16>(x, out, adapter, dropout_p, seed, place.stream);
      default: return drop_elements<__half>(x, out, adapter, dropout_p, seed, place.stream);
    }
  }
};

}  // namespace
}  // namespace complora

STABLE_TORCH_LIBRARY_IMPL(complora, CUDA, m) { complora::register_operations<complora::CUDA>(m); }

// `import complora_kernels._C_cuda` loads the library, which registers the operations; there is nothing else in it.
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
