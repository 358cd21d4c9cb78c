"""The gradient of LayerNorm, and dÃ of the product that reads it, in one launch.

    ds = d_s + LN'(dn + Σ_p m_p ∘ (g_p Ã_p))      dÃ_p = g_p^T drop_p(LN(s)) [r, K]

Neither reads the other's result. The programs of dÃ come first: each goes through a whole split of the rows, so that
they take longest, and the partial sums are added while programs of the norm still run.
"""

# A launch takes more than its kernel's arguments.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch, partials
from complora_kernels.kernels.da import Source, da_job, packed_lora_linear_da_kernel
from complora_kernels.kernels.norm_bwd import norm_bwd_update_kernel, update_work
from complora_kernels.kernels.reductions import merged


def fits_together(K: int, dtype: torch.dtype) -> bool:
    """Whether one launch has the registers for both: on Nvidia's tensor cores, of rows whose loads take 16 bytes."""
    return torch.version.hip is None and dtype.itemsize == 2 and K % 8 == 0


@triton.jit
def norm_bwd_da_kernel(
    da_programs,  # the first ones; the others are those of ds
    dn_ptr,  # [M, K]
    d_stream_ptr,  # [M, K]
    A_ptr,  # [P, R, K]
    dx_ptr,  # [M, K]
    stream_ptr,  # [M, K]
    g_ptr,  # [M, P * R]
    dA_ptr,  # [P, R, K]
    partials_ptr,  # [SPLITS + GROUPS, P, R, K]
    counters_ptr,  # [P, tiles of R and K, GROUPS + 1]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    weight_ptr,  # [K]
    bias_ptr,  # [K]
    seed_ptr,  # [1]
    M,
    K,
    stride_nm,
    stride_dm,
    stride_sm,
    rows_of_split,
    splits,
    group_of_splits,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    SPLIT: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_D_STREAM: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    DA_BLOCK_M: tl.constexpr,
    DA_BLOCK_K: tl.constexpr,
    DA_BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program is one of `packed_lora_linear_da_kernel` of LN(s), or of `norm_bwd_update_kernel`.

    Minimum bytes: dn, d_s, s, w, b, mean, rstd, g and Ã read once, ds and dÃ written once; the partial sums of dÃ
    written and read once. s, w, mean, rstd and g are read by the programs of both kinds, a large s from memory each
    time. What each of the two kernels reads more than once stands in its own docstring.
    """
    if tl.program_id(0) < da_programs:
        packed_lora_linear_da_kernel(
            0,
            stream_ptr,
            g_ptr,
            dA_ptr,
            partials_ptr,
            counters_ptr,
            mean_ptr,
            rstd_ptr,
            weight_ptr,
            bias_ptr,
            seed_ptr,
            M,
            K,
            stride_sm,
            1,
            ADAPTERS * RANK,
            rows_of_split,
            splits,
            group_of_splits,
            threshold,
            keep_scale,
            RANK,
            ADAPTERS,
            SPLIT,
            BITS,
            True,
            HAS_BIAS,
            0,
            UPCAST,
            PRECISION,
            PTX,
            DA_BLOCK_M,
            DA_BLOCK_K,
            DA_BLOCK_R,
        )
    else:
        norm_bwd_update_kernel(
            da_programs,
            dn_ptr,
            d_stream_ptr,
            stream_ptr,
            mean_ptr,
            rstd_ptr,
            weight_ptr,
            g_ptr,
            A_ptr,
            dx_ptr,
            seed_ptr,
            M,
            K,
            stride_nm,
            stride_dm,
            stride_sm,
            threshold,
            keep_scale,
            RANK,
            ADAPTERS,
            BITS,
            HAS_D_STREAM,
            UPCAST,
            BLOCK_M,
            BLOCK_K,
            BLOCK_R,
        )


def norm_bwd_da(
    dn: Tensor,  # [M, K], without its rank-r term
    d_stream: Tensor | None,  # [M, K]
    stream: Tensor,  # [M, K]
    mean: Tensor,  # [M], float32
    rstd: Tensor,  # [M], float32
    weight: Tensor,  # [K]
    bias: Tensor | None,  # [K]
    g: Tensor,  # [M, P r], contiguous
    reader: AdaptedLinear,  # the product that read n
) -> tuple[Tensor, Tensor]:  # ds [M, K] in the dtype of the stream, dÃ [P, r, K] in that of g
    """`ds = d_s + LN'(dn + Σ_p m_p ∘ (g_p Ã_p))` and `dÃ_p = g_p^T drop_p(LN(s))`."""
    dn, stream, weight = launch.contiguous_rows(dn), launch.contiguous_rows(stream), weight.contiguous()
    added = dn if d_stream is None else launch.contiguous_rows(d_stream)
    A = launch.stacked(reader.As)  # [P, r, K]; of one [r, K]
    dx = launch.empty(stream.shape, stream.dtype, stream.device)
    da = da_job(Source(stream, g, reader, (mean, rstd, weight, bias)), narrow=True)
    sizes = (*stream.shape, dn.stride(0), added.stride(0), stream.stride(0))
    update = update_work(sizes, *launch.adapters_of(reader), reader.dropout_p, d_stream is not None, dn.dtype)
    tensors = (dn, added, A, dx, *da.tensors(partials.counters(da.work.counters, stream.device)))
    launch.run(norm_bwd_da_kernel, _launch(da.work, update), tensors)
    return launch.rounded(dx, stream.dtype), da.result()


@launch.cached
def _launch(da: launch.Work, update: launch.Work) -> launch.Launch:
    kernel, programs = norm_bwd_da_kernel, da.programs + update.programs
    numbers = merged(kernel, update=update.numbers, da=da.numbers)
    constexprs = merged(kernel, update=update.constexprs, da=da.constexprs)
    options = {"num_warps": 4, "num_stages": 3}
    return launch.Launch((programs,), tuple(numbers.values()), constexprs, before=(da.programs,), **options)
