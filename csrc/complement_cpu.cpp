// The operations on the CPU: torch's own matrix products on pieces that torch's threads share out.
//
// How the work is cut depends on shapes alone, and sums have a fixed order: the same bits whatever the number of
// threads.

#include "complement.h"
#include "philox.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>
#include <cstring>
#include <type_traits>

namespace complora {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t MAX_ROWS = 1024;          // rows of a factor that are projected together
constexpr int64_t MIN_COLUMNS = 128;        // columns of a product that is not cut, at most
constexpr int64_t MAX_COLUMNS = 384;        // columns of a piece
constexpr size_t MANY_STRIPS = 16;          // strips that keep all threads busy without being cut
constexpr int64_t MAX_WORKSPACE = 4 << 20;  // elements of a workspace
constexpr int64_t ROWS_PER_SPLIT = 512;     // rows of a partial sum, at least
constexpr int64_t MAX_SPLITS = 32;          // partial sums
constexpr int64_t ROWS_PER_BLOCK = 256;     // rows that are widened or dropped together

template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix<T> mT() const { return {data, columns, rows, column_stride, row_stride}; }
};

template <typename Acc>
constexpr ScalarType dtype_of = std::is_same_v<Acc, double> ? ScalarType::Double : ScalarType::Float;

template <typename Acc>
Tensor as_tensor(const Matrix<Acc>& matrix) {
  const int64_t sizes[2] = {matrix.rows, matrix.columns}, strides[2] = {matrix.row_stride, matrix.column_stride};
  return torch::stable::from_blob(matrix.data, {sizes, 2}, {strides, 2},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype_of<Acc>);
}

// C = beta C + alpha A B; C is not read where beta is 0.
template <typename Acc>
void gemm(const Matrix<Acc>& C, double beta, double alpha, const Matrix<Acc>& A, const Matrix<Acc>& B) {
  if (C.rows > 0 && C.columns > 0) {
    const Tensor c = as_tensor(C), a = as_tensor(A), b = as_tensor(B);
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(c.get(), c.get(), a.get(), b.get(), beta, alpha));
  }
}

// Memory that is only read, with the type that a product takes.
template <typename Acc>
Acc* read_only(const void* data) {
  return const_cast<Acc*>(static_cast<const Acc*>(data));
}

template <typename Function>
auto with_type(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Float: return function(float{});
    case ScalarType::Double: return function(double{});
    case ScalarType::BFloat16: return function(BFloat16{});
    default: return function(Half{});  // the only one left: `check_floating` saw it
  }
}

// to = scale · from, element by element, from one dtype to another.
template <typename To, typename From>
void copy(const Matrix<To>& to, const Matrix<From>& from, double scale) {
  using Wide = std::conditional_t<std::is_same_v<From, double> || std::is_same_v<To, double>, double, float>;
  const Wide factor = static_cast<Wide>(scale);
  if (to.column_stride != 1 && to.row_stride == 1) {  // written along the contiguous dimension
    copy(to.mT(), from.mT(), scale);
    return;
  }
  for (int64_t i = 0; i < to.rows; ++i) {
    To* const out = to.data + i * to.row_stride;
    const From* const in = from.data + i * from.row_stride;
    if (to.column_stride == 1 && from.column_stride == 1) {
      for (int64_t j = 0; j < to.columns; ++j) {
        out[j] = static_cast<To>(factor * static_cast<Wide>(in[j]));
      }
    } else {
      for (int64_t j = 0; j < to.columns; ++j) {
        out[j * to.column_stride] = static_cast<To>(factor * static_cast<Wide>(in[j * from.column_stride]));
      }
    }
  }
}

template <typename T>
void fill(const Matrix<T>& to, T value) {
  for (int64_t i = 0; i < to.rows; ++i) {
    for (int64_t j = 0; j < to.columns; ++j) {
      to.data[i * to.row_stride + j * to.column_stride] = value;
    }
  }
}

// Whether the products can read or write a matrix as it is.
template <typename Acc>
bool direct(ScalarType dtype, int64_t row_stride, int64_t column_stride) {
  return dtype == dtype_of<Acc> && (row_stride == 1 || column_stride == 1);
}

// Into how many pieces n columns are cut, each of at most MAX_COLUMNS: an even number, for two threads.
struct Pieces {
  int64_t n, count, size;

  explicit Pieces(int64_t n)
      : n(n), count(n <= MIN_COLUMNS ? 1 : 2 * ceil_div(n, 2 * MAX_COLUMNS)), size(ceil_div(n, count)) {}
  int64_t begin(int64_t i) const { return std::min(i * size, n); }
  int64_t length(int64_t i) const { return begin(i + 1) - begin(i); }
};

// Some rows of one factor, and their coordinates along the basis.
template <typename Acc>
struct Strip {
  const Job* job;
  int64_t first, rows;
  Acc* coordinates;  // [rows, k]
};

// One piece of one strip.
struct Piece {
  int64_t strip;
  int64_t begin, length;
};

template <typename Acc>
Matrix<Acc> basis_columns(const Job& job, int64_t begin, int64_t columns) {  // [d, columns]
  Acc* const data = read_only<Acc>(job.basis) + begin * job.basis_stride_k;
  return {data, job.d, columns, job.basis_stride_d, job.basis_stride_k};
}

template <typename Acc>
Matrix<Acc> basis_rows(const Job& job, int64_t begin, int64_t rows) {  // [rows, k]
  Acc* const data = read_only<Acc>(job.basis) + begin * job.basis_stride_d;
  return {data, rows, job.k, job.basis_stride_d, job.basis_stride_k};
}

template <typename T>
Matrix<T> part(const void* data, int64_t stride_r, int64_t stride_d, int64_t first, int64_t rows, int64_t begin,
               int64_t columns) {
  return {const_cast<T*>(static_cast<const T*>(data)) + first * stride_r + begin * stride_d, rows, columns, stride_r,
          stride_d};
}

// coordinates[:, piece] = factor U[:, piece]
template <typename Acc>
void compute_coordinates(const Strip<Acc>& strip, const Piece& piece, ScalarType factor_dtype) {
  const Job& job = *strip.job;
  if (piece.length == 0) {
    return;
  }
  Matrix<Acc> rows{nullptr, strip.rows, job.d, job.d, 1};
  std::vector<Acc> widened;
  if (direct<Acc>(factor_dtype, job.factor_stride_r, job.factor_stride_d)) {
    rows = part<Acc>(job.factor, job.factor_stride_r, job.factor_stride_d, strip.first, strip.rows, 0, job.d);
  } else {
    widened.resize(product_of(strip.rows, job.d));
    rows.data = widened.data();
    with_type(factor_dtype, [&](auto type) {
      using T = decltype(type);
      copy(rows, part<T>(job.factor, job.factor_stride_r, job.factor_stride_d, strip.first, strip.rows, 0, job.d), 1.0);
    });
  }
  const Matrix<Acc> coordinates{strip.coordinates + piece.begin, strip.rows, piece.length, job.k, 1};
  gemm(coordinates, 0.0, 1.0, rows, basis_columns<Acc>(job, piece.begin, piece.length));
}

// out[:, piece] = scale · factor[:, piece] - scale · coordinates U[piece, :]^T, or scale · coordinates U[piece, :]^T
template <typename Acc>
void compute_projection(const Strip<Acc>& strip, const Piece& piece, ScalarType factor_dtype, ScalarType out_dtype) {
  const Job& job = *strip.job;
  Matrix<Acc> sum{nullptr, strip.rows, piece.length, piece.length, 1};
  std::vector<Acc> wide;
  const bool in_place = direct<Acc>(out_dtype, job.out_stride_r, job.out_stride_d);
  if (in_place) {
    sum = part<Acc>(job.out, job.out_stride_r, job.out_stride_d, strip.first, strip.rows, piece.begin, piece.length);
  } else {
    wide.resize(product_of(strip.rows, piece.length));
    sum.data = wide.data();
  }
  if (!job.complement) {
    with_type(factor_dtype, [&](auto type) {
      using T = decltype(type);
      copy(sum,
           part<T>(job.factor, job.factor_stride_r, job.factor_stride_d, strip.first, strip.rows, piece.begin,
                   piece.length),
           job.scale);
    });
  }
  if (job.basis != nullptr) {
    const Matrix<Acc> coordinates{strip.coordinates, strip.rows, job.k, job.k, 1};
    const double sign = job.complement ? 1.0 : -1.0;
    gemm(sum, job.complement ? 0.0 : 1.0, sign * job.scale, coordinates,
         basis_rows<Acc>(job, piece.begin, piece.length).mT());
  } else if (job.complement) {
    fill(sum, Acc{0});
  }
  if (!in_place) {
    with_type(out_dtype, [&](auto type) {
      using T = decltype(type);
      copy(part<T>(job.out, job.out_stride_r, job.out_stride_d, strip.first, strip.rows, piece.begin, piece.length),
           sum, 1.0);
    });
  }
}

// A thread that is done with an item takes the next one that nobody has: items may cost more or less.
template <typename Function>
void parallel(int64_t items, const Function& function) {
  const int64_t threads = std::min(items, static_cast<int64_t>(torch::stable::get_num_threads()));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < items; i = next++) {
      function(i);
    }
  });
}

template <typename Acc>
void project_strips(std::vector<Strip<Acc>>& strips, ScalarType factor_dtype, ScalarType out_dtype) {
  int64_t elements = 0;
  for (const Strip<Acc>& strip : strips) {
    elements = sum_of(elements, product_of(strip.rows, strip.job->k));
  }
  std::vector<Acc> workspace(elements);
  Acc* next = workspace.data();
  for (Strip<Acc>& strip : strips) {
    strip.coordinates = next;
    next += strip.rows * strip.job->k;
  }
  if (strips.size() >= MANY_STRIPS) {
    // The largest first: no thread begins one when the others are nearly done.
    const auto cost = [](const Strip<Acc>& strip) {
      return static_cast<double>(strip.rows) * static_cast<double>(strip.job->d) *
             static_cast<double>(strip.job->k + 1);
    };
    std::stable_sort(strips.begin(), strips.end(), [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
    parallel(strips.size(), [&](int64_t i) {  // the basis is still in the cache for the second product
      compute_coordinates(strips[i], {i, 0, strips[i].job->k}, factor_dtype);
      compute_projection(strips[i], {i, 0, strips[i].job->d}, factor_dtype, out_dtype);
    });
    return;
  }
  std::vector<Piece> along_k, along_d;
  for (int64_t i = 0; i < static_cast<int64_t>(strips.size()); ++i) {
    const Pieces directions(strips[i].job->k), columns(strips[i].job->d);
    for (int64_t j = 0; j < directions.count && strips[i].job->k > 0; ++j) {
      along_k.push_back({i, directions.begin(j), directions.length(j)});
    }
    for (int64_t j = 0; j < columns.count; ++j) {
      along_d.push_back({i, columns.begin(j), columns.length(j)});
    }
  }
  parallel(along_k.size(), [&](int64_t i) { compute_coordinates(strips[along_k[i].strip], along_k[i], factor_dtype); });
  parallel(along_d.size(),
           [&](int64_t i) { compute_projection(strips[along_d[i].strip], along_d[i], factor_dtype, out_dtype); });
}

template <typename Acc>
void project_jobs(const std::vector<Job>& jobs, ScalarType factor_dtype, ScalarType out_dtype) {
  std::vector<Strip<Acc>> strips;
  int64_t elements = 0;
  for (const Job& job : jobs) {
    for (int64_t first = 0; first < job.r; first += MAX_ROWS) {
      const int64_t rows = std::min(MAX_ROWS, job.r - first);
      strips.push_back({&job, first, rows, nullptr});
      elements = sum_of(elements, product_of(rows, std::max(job.k, int64_t{1})));
      if (elements >= MAX_WORKSPACE) {
        project_strips(strips, factor_dtype, out_dtype);
        strips.clear();
        elements = 0;
      }
    }
  }
  project_strips(strips, factor_dtype, out_dtype);
}

// The value, or 0 where no bit is kept, whatever the value is: a choice without a branch, which would be mispredicted.
template <typename Wide, typename Bits>
Wide masked(Wide value, Bits kept) {
  Bits bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits &= kept;
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

// to = m ∘ from at some rows, m = mask / (1 - p). A row draws the lanes of COUNTERS counters at a time: their words,
// one after the other in memory, are the lanes in the order of the columns.
template <typename Lane, typename To, typename From>
void drop_rows_by(const Matrix<To>& to, const Matrix<From>& from, int64_t first_row, int64_t adapter,
                  const Dropout& dropout) {
  using Wide = std::conditional_t<std::is_same_v<From, double>, double, float>;
  using Bits = std::conditional_t<std::is_same_v<Wide, double>, uint64_t, uint32_t>;
#ifdef __BYTE_ORDER__  // not every compiler defines it
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first lane of a word is its lowest byte");
#endif
  constexpr int COUNTERS = 16;  // counters side by side, for vector instructions
  constexpr int64_t LANES = 16 / sizeof(Lane) * COUNTERS;
  const Wide scale = static_cast<Wide>(dropout.scale);
  const Lane threshold = static_cast<Lane>(dropout.threshold);
  for (int64_t i = 0; i < to.rows; ++i) {
    To* out = to.data + i * to.row_stride;
    const From* in = from.data + i * from.row_stride;
    for (int64_t begin = 0; begin < to.columns; begin += LANES) {
      uint32_t words[4][COUNTERS], in_order[COUNTERS][4];
      for (int n = 0; n < COUNTERS; ++n) {
        words[0][n] = static_cast<uint32_t>(begin / LANES * COUNTERS + n);
        words[1][n] = static_cast<uint32_t>(first_row + i);
        words[2][n] = static_cast<uint32_t>(adapter);
        words[3][n] = 0;
      }
      philox4x32_7(words, dropout.seed);
      for (int n = 0; n < COUNTERS; ++n) {
        for (int word = 0; word < 4; ++word) {
          in_order[n][word] = words[word][n];
        }
      }
      Lane lanes[LANES];
      std::memcpy(lanes, in_order, sizeof(lanes));
      Bits kept[LANES];
      for (int64_t j = 0; j < LANES; ++j) {
        kept[j] = lanes[j] >= threshold ? ~Bits{0} : Bits{0};
      }
      const int64_t columns = std::min(LANES, to.columns - begin);
      if (to.column_stride == 1 && from.column_stride == 1) {
        for (int64_t j = 0; j < columns; ++j) {
          out[begin + j] = static_cast<To>(masked(scale * static_cast<Wide>(in[begin + j]), kept[j]));
        }
      } else {
        for (int64_t j = 0; j < columns; ++j) {
          const Wide value = static_cast<Wide>(in[(begin + j) * from.column_stride]);
          out[(begin + j) * to.column_stride] = static_cast<To>(masked(scale * value, kept[j]));
        }
      }
    }
  }
}

template <typename To, typename From>
void drop_rows(const Matrix<To>& to, const Matrix<From>& from, int64_t first_row, int64_t adapter,
               const Dropout& dropout) {
  if (dropout.bits == 8) {
    drop_rows_by<uint8_t>(to, from, first_row, adapter, dropout);
  } else {
    drop_rows_by<uint16_t>(to, from, first_row, adapter, dropout);
  }
}

template <typename T>
Matrix<T> matrix(const Tensor& tensor, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns) {
  return part<T>(tensor.const_data_ptr(), stride_of(tensor, 0), stride_of(tensor, 1), first_row, rows, first_column,
                 columns);
}

Dropout dropout_of(double p, const Tensor& seed) {
  Dropout dropout = dropout_lanes(p);
  dropout.seed = static_cast<uint64_t>(*seed.const_data_ptr<int64_t>());
  return dropout;
}

// `rows` rows of a tensor in the accumulators' dtype: a view of it, or a copy in `scratch`.
template <typename Acc, typename T>
Matrix<Acc> widened(const Matrix<T>& from, std::vector<Acc>& scratch) {
  if constexpr (std::is_same_v<Acc, T>) {
    if (from.row_stride == 1 || from.column_stride == 1) {
      return from;
    }
  }
  scratch.resize(product_of(from.rows, from.columns));
  const Matrix<Acc> to{scratch.data(), from.rows, from.columns, from.columns, 1};
  copy(to, from, 1.0);
  return to;
}

// sum += left^T right over the rows first <= m < last, where sum = 0 before
template <typename Acc, typename T, typename Right>
void add_up(const Matrix<Acc>& sum, const Tensor& left, int64_t left_column, int64_t first, int64_t last,
            const Right& right) {
  std::vector<Acc> left_scratch, right_scratch;
  for (int64_t m = first; m < last; m += ROWS_PER_BLOCK) {
    const int64_t rows = std::min(ROWS_PER_BLOCK, last - m);
    const Matrix<Acc> l = widened<Acc>(matrix<T>(left, m, rows, left_column, sum.rows), left_scratch);
    gemm(sum, m == first ? 0.0 : 1.0, 1.0, l.mT(), right(m, rows, right_scratch));
  }
}

template <typename T>
void reduce(const Reduction& task) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  const int64_t M = task.x.size(0), K = task.x.size(1), R = task.dA.size(1), D = task.dB.size(1);
  const int64_t P = static_cast<int64_t>(task.starts.size());
  const bool dropping = task.dropout_p > 0;
  const Dropout dropout = dropping ? dropout_of(task.dropout_p, *task.seed) : Dropout{};
  const int64_t splits = std::clamp(ceil_div(M, ROWS_PER_SPLIT), int64_t{1}, MAX_SPLITS);
  const int64_t rows_of_split = ceil_div(M, splits);
  // Without masks of their own the adapters are one of more ranks.
  const int64_t A_size = task.dA.numel(), B_size = task.dB.numel(), size = sum_of(A_size, B_size);
  const int64_t A_sums = A_size == 0 ? 0 : dropping ? P : 1, A_rank = dropping ? R : P * R;
  const int64_t B_sums = B_size == 0 ? 0 : P;
  if (size == 0) {
    return;
  }
  std::vector<Acc> partials(product_of(splits, size));  // [splits, P r K + P D r]
  parallel(splits * (A_sums + B_sums), [&](int64_t item) {
    const int64_t split = item / (A_sums + B_sums), sum = item % (A_sums + B_sums);
    const int64_t first = split * rows_of_split, last = split + 1 < splits ? first + rows_of_split : M;
    Acc* const partial = partials.data() + split * size;
    if (sum < A_sums) {
      const Matrix<Acc> dA{partial + sum * A_rank * K, A_rank, K, K, 1};  // g_p^T drop_p(x)
      add_up<Acc, T>(dA, task.g, sum * A_rank, first, last, [&](int64_t m, int64_t rows, std::vector<Acc>& scratch) {
        const Matrix<T> x = matrix<T>(task.x, m, rows, 0, K);
        if (!dropping) {
          return widened<Acc>(x, scratch);
        }
        scratch.resize(product_of(rows, K));
        const Matrix<Acc> dropped{scratch.data(), rows, K, K, 1};
        drop_rows(dropped, x, m, sum, dropout);
        return dropped;
      });
    } else {
      const int64_t p = sum - A_sums;
      const Matrix<Acc> dB{partial + A_size + p * D * R, D, R, R, 1};  // dY_p^T h_p
      add_up<Acc, T>(dB, task.dY, task.starts[p], first, last, [&](int64_t m, int64_t rows, std::vector<Acc>& scratch) {
        return widened<Acc>(matrix<T>(task.h, m, rows, p * R, R), scratch);
      });
    }
  });
  // In the order of the splits, a few elements at a time.
  constexpr int64_t BLOCK = 4096;
  parallel(ceil_div(size, BLOCK), [&](int64_t block) {
    const int64_t begin = block * BLOCK, end = std::min(begin + BLOCK, size);
    for (int64_t split = 1; split < splits; ++split) {
      const Acc* const partial = partials.data() + split * size;
      for (int64_t i = begin; i < end; ++i) {
        partials[i] += partial[i];
      }
    }
  });
  const Acc* const sums = partials.data();
  const auto round = [](Acc sum) { return static_cast<T>(sum); };
  std::transform(sums, sums + A_size, static_cast<T*>(task.dA.mutable_data_ptr()), round);
  std::transform(sums + A_size, sums + size, static_cast<T*>(task.dB.mutable_data_ptr()), round);
}

struct CPU {
  static void project(const std::vector<Job>& jobs, ScalarType factor_dtype, ScalarType out_dtype, const Tensor&) {
    if (accumulator(factor_dtype, out_dtype) == ScalarType::Double) {
      project_jobs<double>(jobs, factor_dtype, out_dtype);
    } else {
      project_jobs<float>(jobs, factor_dtype, out_dtype);
    }
  }

  static void reduce(const Reduction& task) {
    with_type(task.x.scalar_type(), [&](auto type) { complora::reduce<decltype(type)>(task); });
  }

  static void drop(const Tensor& x, const Tensor& out, int64_t adapter, double dropout_p, const Tensor& seed) {
    const Dropout dropout = dropout_of(dropout_p, seed);
    with_type(x.scalar_type(), [&](auto type) {
      using T = decltype(type);
      const int64_t rows = x.size(0), columns = x.size(1);
      torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / columns), [&](int64_t begin, int64_t end) {
        const Matrix<T> to = matrix<T>(out, begin, end - begin, 0, columns);
        const Matrix<T> from = matrix<T>(x, begin, end - begin, 0, columns);
        if (dropout.bits == 0) {
          copy(to, from, 1.0);
        } else {
          drop_rows(to, from, begin, adapter, dropout);
        }
      });
    });
  }
};

}  // namespace
}  // namespace complora

STABLE_TORCH_LIBRARY_IMPL(complora, CPU, m) { complora::register_operations<complora::CPU>(m); }
