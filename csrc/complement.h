// The operations of the extension, the same on every device: arguments checked, results made, and the work handed to
// the device as a list of jobs. A `Device` computes it:
//
//   Device::project(jobs, factor_dtype, out_dtype, where)   every job, in float32, or float64 where a dtype is; `where`
//                                                           is a tensor on the device
//   Device::reduce(reduction)                               the sums over the tokens
//   Device::drop(x, out, adapter, dropout_p, seed)          m ∘ x

#pragma once

#include "sizes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace complora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

// One factor: r vectors of length d, its basis [d, k], and where the result goes. Strides count elements.
//
//   out = scale · (factor - (factor U) U^T)   or, with a complement basis,   scale · (factor U) U^T
struct Job {
  const void* factor = nullptr;  // [r, d]
  int64_t factor_stride_r = 0, factor_stride_d = 0;
  const void* basis = nullptr;  // [d, k]; null: no directions
  int64_t basis_stride_d = 0, basis_stride_k = 0;
  void* out = nullptr;  // [r, d]
  int64_t out_stride_r = 0, out_stride_d = 0;
  int64_t r = 0, d = 0, k = 0;
  bool complement = false;
  double scale = 1.0;
};

// The sums over M tokens, of all adapters of one product, in float32 (float64), rounded once:
//
//   dA_p = g_p^T drop_p(x)      dB_p = dY_p^T h_p      dY_p = dY[:, start_p : start_p + D]
struct Reduction {
  Tensor dY, x, h, g;           // [M, N], [M, K], [M, P r], [M, P r]: all of one dtype
  Tensor dA, dB;                // [P, r, K], [P, D, r] of that dtype; [0, ...] where it is not asked for
  std::vector<int64_t> starts;  // P
  double dropout_p = 0.0;
  std::optional<Tensor> seed;  // [1], int64
};

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  }
  return text + "]";
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16 ||
         dtype == ScalarType::Half;
}

// The dtype of the sums.
inline ScalarType accumulator(ScalarType first, ScalarType second) {
  return first == ScalarType::Double || second == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_floating(ScalarType dtype, const std::string& name) {
  COMPLORA_CHECK(is_floating(dtype), name, " has dtype ", torch::headeronly::toString(dtype),
                 ", expected Float, Double, BFloat16 or Half");
}

inline std::string device_of(const Tensor& tensor) {
  return tensor.is_cpu() ? "cpu" : tensor.is_cuda() ? sentence("cuda:", tensor.get_device_index()) : "another device";
}

inline void check_device(const Tensor& tensor, const Tensor& where, const std::string& name) {
  COMPLORA_CHECK(tensor.device() == where.device(), name, " is on ", device_of(tensor), ", expected ",
                 device_of(where));
}

inline void check_dtype(const Tensor& tensor, ScalarType dtype, const std::string& name) {
  COMPLORA_CHECK(tensor.scalar_type() == dtype, name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                 ", expected ", torch::headeronly::toString(dtype));
}

// The distance between two neighbours. A dimension of one element may have any stride in torch; here it stays small
// enough to count with.
inline int64_t stride_of(const Tensor& tensor, int64_t dim) {
  return tensor.size(dim) > 1 ? tensor.stride(dim) : std::min(tensor.stride(dim), int64_t{1} << 32);
}

// How many elements lie between the ends of a tensor, both included.
inline int64_t extent(const Tensor& tensor) {
  if (tensor.numel() == 0) {
    return 0;
  }
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    last = sum_of(last, product_of(tensor.size(i) - 1, tensor.stride(i)));
  }
  return sum_of(last, 1);
}

// A tensor can outlive its memory: `untyped_storage().resize_(0)` gives it back.
inline void check_memory(const Tensor& tensor, const std::string& name) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const int64_t elements = extent(tensor);
  COMPLORA_CHECK(
      elements == 0 || sum_of(tensor.storage_offset(), elements) <= bytes / static_cast<int64_t>(tensor.element_size()),
      name, " has shape ", shape_of(tensor), " in a storage of ", bytes, " bytes, expected one that holds it");
}

inline Tensor empty(const Tensor& where, std::vector<int64_t> shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype, std::nullopt, where.device());
}

// [..., d] as [R, d]; a copy where the strides allow no view.
inline Tensor as_rows(const Tensor& tensor) {
  const int64_t d = tensor.size(tensor.dim() - 1);
  return tensor.dim() == 2 ? tensor : torch::stable::reshape(tensor, {d == 0 ? 0 : tensor.numel() / d, d});
}

inline void check_basis(const std::optional<Tensor>& basis, int64_t d, const Tensor& where, ScalarType computed_in,
                        const std::string& name) {
  if (!basis.has_value()) {
    return;
  }
  COMPLORA_CHECK(basis->dim() == 2 && basis->size(0) == d && basis->size(1) <= d, name, " has shape ", shape_of(*basis),
                 ", expected [", d, ", k] with k <= ", d);
  check_device(*basis, where, name);
  check_dtype(*basis, computed_in, name);
  check_memory(*basis, name);
}

// Puts a basis that was checked into a job.
inline void set_basis(Job& job, const std::optional<Tensor>& basis, bool complement) {
  if (!basis.has_value()) {
    return;
  }
  job.basis = basis->const_data_ptr();
  job.basis_stride_d = stride_of(*basis, 0);
  job.basis_stride_k = stride_of(*basis, 1);
  job.k = basis->size(1);
  job.complement = complement;
  if (job.k == 0) {
    job.basis = nullptr;  // all of the factor is left, or with a complement basis nothing
  }
}

inline void check_factor(const Tensor& factor, const std::string& name) {
  COMPLORA_CHECK(factor.dim() >= 1, name, " has no dimensions, expected [..., d]");
  check_floating(factor.scalar_type(), name);
  check_memory(factor, name);
}

// `factor (I - U U^T)`, or `factor U U^T` with a complement basis.
template <class Device>
Tensor project_complement(const Tensor& factor /* [..., d] */, const Tensor& basis /* [d, k] */, bool complement) {
  check_factor(factor, "factor");
  const ScalarType dtype = factor.scalar_type();
  check_basis(basis, factor.size(factor.dim() - 1), factor, accumulator(dtype, dtype), "basis");
  const Tensor rows = as_rows(factor);  // [R, d]
  const Tensor out = empty(factor, {factor.sizes().begin(), factor.sizes().end()}, dtype);
  Job job;
  job.factor = rows.const_data_ptr();
  job.factor_stride_r = stride_of(rows, 0);
  job.factor_stride_d = stride_of(rows, 1);
  job.out = out.mutable_data_ptr();
  job.r = rows.size(0);
  job.d = job.out_stride_r = rows.size(1);
  job.out_stride_d = 1;
  set_basis(job, basis, complement);
  if (rows.numel() > 0) {
    Device::project({job}, dtype, dtype, rows);
  }
  return out;
}

// `A P_in` and, of the output side, `scaling · P_out B`, of all factors in one call: [Σ r d], the results one after the
// other, each contiguous in the shape of its factor.
template <class Device>
Tensor fold_factors(const Tensors& factors, const OptionalTensors& bases, const std::vector<bool>& complement,
                    const std::vector<bool>& output_side, double scaling, ScalarType dtype) {
  const size_t n = factors.size();
  COMPLORA_CHECK(n > 0 && bases.size() == n && complement.size() == n && output_side.size() == n,
                 "factors, bases, complement, output_side have lengths ", n, ", ", bases.size(), ", ",
                 complement.size(), ", ", output_side.size(), ", expected equal ones of at least 1");
  check_floating(dtype, "dtype");
  const Tensor& first = factors[0];
  const ScalarType factor_dtype = first.scalar_type(), computed_in = accumulator(factor_dtype, dtype);
  std::vector<Job> jobs(n);
  int64_t size = 0;
  for (size_t i = 0; i < n; ++i) {
    const Tensor& factor = factors[i];  // [r, d], those of the output side [d, r]
    const std::string index = sentence("[", i, "]");
    COMPLORA_CHECK(factor.dim() == 2, "factors", index, " has shape ", shape_of(factor), ", expected two dimensions");
    check_factor(factor, "factors" + index);
    check_device(factor, first, "factors" + index);
    check_dtype(factor, factor_dtype, "factors" + index);
    const int r = output_side[i] ? 1 : 0, d = 1 - r;
    Job& job = jobs[i];
    job.factor = factor.const_data_ptr();
    job.factor_stride_r = stride_of(factor, r);
    job.factor_stride_d = stride_of(factor, d);
    job.r = factor.size(r);
    job.d = factor.size(d);
    job.out_stride_r = output_side[i] ? 1 : job.d;
    job.out_stride_d = output_side[i] ? job.r : 1;
    job.scale = output_side[i] ? scaling : 1.0;
    check_basis(bases[i], job.d, first, computed_in, "bases" + index);
    set_basis(job, bases[i], complement[i]);
    size = sum_of(size, factor.numel());
  }
  const Tensor out = empty(first, {size}, dtype);
  char* bytes = static_cast<char*>(out.mutable_data_ptr());
  for (Job& job : jobs) {
    job.out = bytes;
    bytes += job.r * job.d * out.element_size();
  }
  jobs.erase(std::remove_if(jobs.begin(), jobs.end(), [](const Job& job) { return job.r == 0 || job.d == 0; }),
             jobs.end());
  if (size > 0) {
    Device::project(jobs, factor_dtype, dtype, first);
  }
  return out;
}

inline void check_seed(const Tensor& seed, const Tensor& where) {
  COMPLORA_CHECK(seed.numel() == 1, "seed has shape ", shape_of(seed), ", expected [1]");
  check_dtype(seed, ScalarType::Long, "seed");
  check_device(seed, where, "seed");
  check_memory(seed, "seed");
}

// The gradients of the factors of P adapters on one product, from that of its output:
//
//   dA_p = g_p^T drop_p(x)      dB_p = dY_p^T h_p      dY_p = dY[:, start_p : start_p + D]
//
// Sums are float32 (float64), rounded once to the dtype of the input.
template <class Device>
std::tuple<Tensor, Tensor> packed_lora_linear_factor_grads(  // dA [P, r, K], dB [P, D, r]; [0, ...] where not needed
    const Tensor& dY,                                        // [M, N]
    const Tensor& x,                                         // [M, K]
    const Tensor& h,                                         // [M, P r] = drop_p(x) A_p^T; not read unless dB is needed
    const Tensor& g,                                         // [M, P r] = dY_p B_p; not read unless dA is needed
    const std::vector<int64_t>& starts,                      // P
    int64_t height,                                          // D
    double dropout_p,
    const std::optional<Tensor>& seed,  // [1], int64; none without dropout
    const std::vector<bool>& needs) {   // dA, dB
  const int64_t P = static_cast<int64_t>(starts.size());
  COMPLORA_CHECK(dY.dim() == 2 && x.dim() == 2 && h.dim() == 2 && g.dim() == 2 && dY.size(0) == x.size(0), "dY ",
                 shape_of(dY), ", x ", shape_of(x), ", h ", shape_of(h), ", g ", shape_of(g),
                 ", expected [M, N], [M, K], [M, P r], [M, P r]");
  COMPLORA_CHECK(P > 0 && needs.size() == 2, "starts and needs have lengths ", P, ", ", needs.size(),
                 ", expected one for each adapter and 2");
  const int64_t M = x.size(0), N = dY.size(1), K = x.size(1);
  const Tensor& ranks = needs[0] ? g : h;
  const int64_t rank = ranks.size(1) / P;
  COMPLORA_CHECK((!needs[0] || (g.size(0) == M && g.size(1) == P * rank)) &&
                     (!needs[1] || (h.size(0) == M && h.size(1) == P * rank)),
                 "h ", shape_of(h), ", g ", shape_of(g), ", expected [", M, ", P r] with P = ", P);
  for (int64_t start : starts) {
    COMPLORA_CHECK(0 <= height && height <= N && 0 <= start && start <= N - height, "starts has ", start,
                   " with height ", height, ", expected 0 <= start and start + height <= ", N);
  }
  const ScalarType dtype = x.scalar_type();
  check_floating(dtype, "x");
  for (const auto& [tensor, name] : {std::pair{&dY, "dY"}, std::pair{&h, "h"}, std::pair{&g, "g"}}) {
    check_device(*tensor, x, name);
    check_dtype(*tensor, dtype, name);
    check_memory(*tensor, name);
  }
  check_memory(x, "x");
  COMPLORA_CHECK(0 <= dropout_p && dropout_p < 1, "dropout_p=", dropout_p, ", expected a probability in [0, 1)");
  COMPLORA_CHECK(dropout_p == 0 || seed.has_value(), "seed is missing, expected one with dropout_p=", dropout_p);
  if (seed.has_value()) {
    check_seed(*seed, x);
  }
  const Tensor dA = empty(x, {needs[0] ? P : 0, rank, K}, dtype);
  const Tensor dB = empty(x, {needs[1] ? P : 0, height, rank}, dtype);
  Device::reduce({dY, x, h, g, dA, dB, starts, dropout_p, seed});
  return {dA, dB};
}

// `m ∘ x`, m = mask / (1 - p), with the mask of one adapter under `seed`.
template <class Device>
Tensor drop(const Tensor& x /* [..., K] */, const Tensor& seed /* [1] */, int64_t adapter, double dropout_p) {
  check_factor(x, "x");
  COMPLORA_CHECK(0 <= dropout_p && dropout_p < 1, "dropout_p=", dropout_p, ", expected a probability in [0, 1)");
  check_seed(seed, x);
  COMPLORA_CHECK(0 <= adapter && adapter < int64_t{1} << 32, "adapter=", adapter,
                 ", expected at least 0 and less than 2^32");
  const Tensor out = empty(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type());
  if (x.numel() > 0) {
    Device::drop(as_rows(x), as_rows(out), adapter, dropout_p, seed);
  }
  return out;
}

template <class Device>
void register_operations(torch::stable::detail::StableLibrary& m) {
  m.impl("project_complement", TORCH_BOX(&project_complement<Device>));
  m.impl("fold_factors", TORCH_BOX(&fold_factors<Device>));
  m.impl("packed_lora_linear_factor_grads", TORCH_BOX(&packed_lora_linear_factor_grads<Device>));
  m.impl("drop", TORCH_BOX(&drop<Device>));
}

}  // namespace complora
