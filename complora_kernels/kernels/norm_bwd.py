"""The gradient of LayerNorm inside a residual block.

    ds = d_s + rstd · (w ∘ dn - mean(w ∘ dn) - ŝ · mean(w ∘ dn ∘ ŝ))      ŝ = (s - mean) · rstd

w and b are frozen: they get no gradient. The rank-r term of dn, `Σ_p m_p ∘ (g_p Ã_p)`, may be added here, in float32
and behind the rounded product `dY W`: the gradient is rescaled before it is rounded, so that a small term is not lost
as it would be in dn itself. The product that read the norm needs `dÃ_p = g_p^T drop_p(LN(s))` of the same operands:
`norm_bwd_da` computes both in one launch.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch
from complora_kernels.kernels.dropout import dropout_lanes, keep_mask
from complora_kernels.kernels.norm import ELEMENTS
from complora_kernels.kernels.rows import MAX_NORM_WIDTH

UPDATE_ROWS = 32  # rows of a program that adds the rank-r term: more take more instructions an element, or registers
UNALIGNED_ROWS = 16  # where rows do not start on 16 bytes, see `tiles.UNALIGNED_TILES`


@triton.jit
def norm_bwd_kernel(
    dn_ptr,  # [M, K]
    d_stream_ptr,  # [M, K]
    stream_ptr,  # [M, K]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    weight_ptr,  # [K]
    dx_ptr,  # [M, K]
    M,
    K,
    stride_nm,
    stride_dm,
    stride_sm,
    HAS_D_STREAM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
):
    """One program owns BLOCK_M whole rows.

    Minimum bytes: dn, d_s, s, w, mean and rstd read once, ds written once.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    row_mask, column_mask = rows < M, k < K
    mask = row_mask[:, None] & column_mask[None, :]
    s = tl.load(stream_ptr + rows[:, None] * stride_sm + k[None, :], mask=mask, other=0.0).to(tl.float32)
    dn = tl.load(dn_ptr + rows[:, None] * stride_nm + k[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + k, mask=column_mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)[:, None]
    unit = tl.where(mask, (s - mean) * rstd, 0.0)  # ŝ
    weighted = dn * weight[None, :]  # w ∘ dn
    dx = rstd * (weighted - tl.sum(weighted, 1)[:, None] / K - unit * (tl.sum(weighted * unit, 1)[:, None] / K))
    if HAS_D_STREAM:
        dx += tl.load(d_stream_ptr + rows[:, None] * stride_dm + k[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + rows[:, None] * K + k[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weighted_and_unit(
    dn_ptrs,  # [BLOCK_M, BLOCK_K]
    stream_ptrs,  # [BLOCK_M, BLOCK_K]
    weight_ptrs,  # [BLOCK_K]
    g_ptrs,  # [BLOCK_M]
    A_ptrs,  # [BLOCK_K]
    mean,  # [BLOCK_M]
    rstd,  # [BLOCK_M]
    rows,  # [BLOCK_M]
    row_mask,  # [BLOCK_M]
    k0,
    K,
    seed,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    BITS: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`w ∘ (dn + Σ_p m_p ∘ (g_p Ã_p))` and `ŝ`, [BLOCK_M, BLOCK_K], from column k0 on."""
    column_mask = k0 + tl.arange(0, BLOCK_K) < K
    mask = row_mask[:, None] & column_mask[None, :]
    dn = tl.load(dn_ptrs + k0, mask=mask, other=0.0).to(tl.float32)
    s = tl.load(stream_ptrs + k0, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptrs + k0, mask=column_mask, other=0.0).to(tl.float32)
    for adapter in tl.static_range(ADAPTERS):
        update = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for r0 in tl.static_range(0, RANK, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            pr = (adapter * RANK + r).to(tl.int64)
            g_mask, A_mask = row_mask[:, None] & (r < RANK)[None, :], (r < RANK)[:, None] & column_mask[None, :]
            g = tl.load(g_ptrs[:, None] + pr[None, :], mask=g_mask, other=0.0)  # [BLOCK_M, BLOCK_R]
            A = tl.load(A_ptrs[None, :] + pr[:, None] * K + k0, mask=A_mask, other=0.0)  # [BLOCK_R, BLOCK_K]
            if UPCAST:
                g, A = g.to(tl.float32), A.to(tl.float32)
            update = tl.dot(g, A, update, input_precision="ieee")  # g Ã
        if BITS > 0:
            keep = keep_mask(seed, adapter, rows, k0, threshold, BLOCK_M, BLOCK_K, BITS)
            update = tl.where(keep, update * keep_scale, 0.0)  # m ∘ (g Ã)
        dn += update
    return dn * weight[None, :], tl.where(mask, (s - mean[:, None]) * rstd[:, None], 0.0)


@triton.jit
def norm_bwd_update_kernel(
    first_program,  # the programs of the launch that come before and compute something else
    dn_ptr,  # [M, K]
    d_stream_ptr,  # [M, K]
    stream_ptr,  # [M, K]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    weight_ptr,  # [K]
    g_ptr,  # [M, P * R]
    A_ptr,  # [P, R, K]
    dx_ptr,  # [M, K]
    seed_ptr,  # [1]
    M,
    K,
    stride_nm,
    stride_dm,
    stride_sm,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    BITS: tl.constexpr,
    HAS_D_STREAM: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program owns BLOCK_M whole rows, and goes through their columns twice: for the means, and for ds.

    Tiles of whole rows would leave no registers beside the rank-r term. The second pass reads from the cache.

    Minimum bytes: dn, d_s, s, w, mean, rstd, g and Ã read once, ds written once. dn, s, w, g and Ã are
    read twice, the second time from the L2.
    """
    rows = (tl.program_id(0) - first_program).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    row_mask = rows < M
    mean = tl.load(mean_ptr + rows, mask=row_mask, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
    dn_ptrs = dn_ptr + rows[:, None] * stride_nm + k[None, :]
    stream_ptrs = stream_ptr + rows[:, None] * stride_sm + k[None, :]
    g_ptrs = g_ptr + rows * (ADAPTERS * RANK)
    seed = tl.load(seed_ptr) if BITS > 0 else 0
    total, product = tl.zeros((BLOCK_M,), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        weighted, unit = _weighted_and_unit(
            dn_ptrs,
            stream_ptrs,
            weight_ptr + k,
            g_ptrs,
            A_ptr + k,
            mean,
            rstd,
            rows,
            row_mask,
            k0,
            K,
            seed,
            threshold,
            keep_scale,
            RANK,
            ADAPTERS,
            BITS,
            UPCAST,
            BLOCK_M,
            BLOCK_K,
            BLOCK_R,
        )
        total += tl.sum(weighted, 1)
        product += tl.sum(weighted * unit, 1)
    for k0 in range(0, K, BLOCK_K):
        weighted, unit = _weighted_and_unit(
            dn_ptrs,
            stream_ptrs,
            weight_ptr + k,
            g_ptrs,
            A_ptr + k,
            mean,
            rstd,
            rows,
            row_mask,
            k0,
            K,
            seed,
            threshold,
            keep_scale,
            RANK,
            ADAPTERS,
            BITS,
            UPCAST,
            BLOCK_M,
            BLOCK_K,
            BLOCK_R,
        )
        dx = rstd[:, None] * (weighted - total[:, None] / K - unit * (product[:, None] / K))
        mask = row_mask[:, None] & (k0 + k < K)[None, :]
        if HAS_D_STREAM:
            d_stream_ptrs = d_stream_ptr + rows[:, None] * stride_dm + (k0 + k)[None, :]
            dx += tl.load(d_stream_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + rows[:, None] * K + (k0 + k)[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def norm_bwd(
    dn: Tensor,  # [M, K]
    d_stream: Tensor | None,  # [M, K]
    stream: Tensor,  # [M, K]
    mean: Tensor,  # [M], float32
    rstd: Tensor,  # [M], float32
    weight: Tensor,  # [K]
    *,
    g: Tensor | None = None,  # [M, P r]: dn lacks its rank-r term, which is added
    reader: AdaptedLinear | None = None,  # the product that read n, beside g
) -> Tensor:  # [M, K], in the dtype of the stream
    """`ds = d_s + LN'(dn)`, or `d_s + LN'(dn + Σ_p m_p ∘ (g_p Ã_p))`."""
    M, K = stream.shape
    dn, stream = launch.contiguous_rows(dn), launch.contiguous_rows(stream)
    d_stream = None if d_stream is None else launch.contiguous_rows(d_stream)
    dx = launch.empty((M, K), stream.dtype, stream.device)
    if M == 0:
        return launch.rounded(dx, stream.dtype)
    tensors = (dn, dn if d_stream is None else d_stream, stream, mean, rstd, weight.contiguous())
    sizes = (M, K, dn.stride(0), dn.stride(0) if d_stream is None else d_stream.stride(0), stream.stride(0))
    if g is None or reader is None:
        launch.run(norm_bwd_kernel, _bwd(sizes, d_stream is not None), (*tensors, dx))
    else:
        A, seed = launch.stacked(reader.As), reader.seed  # [P, r, K]; of one [r, K]
        work = update_work(sizes, *launch.adapters_of(reader), reader.dropout_p, d_stream is not None, dn.dtype)
        tensors = (*tensors, g, A, dx, dn if seed is None else seed)
        launch.run(norm_bwd_update_kernel, launch.alone(work, 4, 3), tensors)
    return launch.rounded(dx, stream.dtype)


@launch.cached
def _bwd(sizes: tuple[int, ...], has_d_stream: bool) -> launch.Launch:
    M, K = sizes[:2]
    block_k = launch.power_of_two(K, 64, MAX_NORM_WIDTH)
    block_m = max(1, ELEMENTS // block_k)
    constexprs = {"HAS_D_STREAM": has_d_stream, "BLOCK_M": block_m, "BLOCK_K": block_k}
    return launch.Launch((launch.cdiv(M, block_m),), sizes, constexprs, num_warps=4, num_stages=1)


@launch.cached
def update_work(
    sizes: tuple[int, ...],  # M, K, the distances of the rows of dn, d_stream and s
    P: int,
    R: int,
    dropout_p: float,
    has_d_stream: bool,
    dtype: torch.dtype,  # of dn
) -> launch.Work:
    """The programs of `norm_bwd_update_kernel`, of four warps."""
    M, K = sizes[:2]
    block_m, dropout = UNALIGNED_ROWS if K % 8 else UPDATE_ROWS, dropout_lanes(dropout_p)
    if not dropout.bits:
        P, R = 1, P * R  # without masks of their own the adapters are one of more ranks
    names = ("M", "K", "stride_nm", "stride_dm", "stride_sm")
    numbers = {
        **dict(zip(names, sizes, strict=True)),
        "threshold": dropout.threshold,
        "keep_scale": dropout.scale,
    }
    constexprs = {
        "RANK": R,
        "ADAPTERS": P,
        "BITS": dropout.bits,
        "HAS_D_STREAM": has_d_stream,
        "UPCAST": launch.upcast(dtype),
        "BLOCK_M": block_m,
        "BLOCK_K": 32 if launch.INTERPRETED or dtype == torch.float32 else 64,
        "BLOCK_R": launch.power_of_two(R, 16, 16),
    }
    return launch.Work(launch.cdiv(M, block_m), 0, 0, numbers, constexprs)
