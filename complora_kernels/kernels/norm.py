"""LayerNorm inside a residual block: what is added before it, what follows from it, and its gradient.

    s = x + delta      n = (s - mean) · rstd ∘ w + b      h_p = drop_p(n) Ã_p^T [M, r]
    ds = d_s + rstd · (w ∘ dn - mean(w ∘ dn) - ŝ · mean(w ∘ dn ∘ ŝ))      ŝ = (s - mean) · rstd

Programs hold whole rows [ROWS, K], so that each activation is read once. w and b are frozen: they get no gradient.
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
from complora_kernels.kernels.linear import MAX_BLOCK_R
from complora_kernels.kernels.rows import MAX_NORM_WIDTH

PROGRAMS = 528  # programs that compute h, given enough rows: four for each multiprocessor of an H100
ELEMENTS = 4096  # elements of the rows that one program holds: 32 a thread


@triton.jit
def norm_fwd_kernel(
    x_ptr,  # [M, K]
    delta_ptr,  # [M, K]
    weight_ptr,  # [K]
    bias_ptr,  # [K]
    A_ptr,  # [P, R, K]
    stream_ptr,  # [M, K]
    normed_ptr,  # [M, K]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    h_ptr,  # [M, P * R]
    seed_ptr,  # [1]
    M,
    K,
    stride_xm,
    stride_dm,
    eps,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,  # 0: h is not computed
    BITS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program owns BLOCK_M whole rows: it normalizes ROWS of them at a time, then computes the h of all.

    For h it reads the norm that it has stored again, BLOCK_H columns at a time and from the cache: shared memory holds
    neither whole rows nor all of Ã, however wide they are.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    k = tl.arange(0, BLOCK_K)
    column_mask = k < K
    weight = tl.load(weight_ptr + k, mask=column_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + k, mask=column_mask, other=0.0).to(tl.float32)
    for m0 in tl.range(0, BLOCK_M, ROWS, num_stages=1):
        rows = first + m0 + tl.arange(0, ROWS)
        row_mask = rows < M
        mask = row_mask[:, None] & column_mask[None, :]
        s = tl.load(x_ptr + rows[:, None] * stride_xm + k[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_DELTA:
            delta = tl.load(delta_ptr + rows[:, None] * stride_dm + k[None, :], mask=mask, other=0.0).to(tl.float32)
            rounded = (s + delta).to(stream_ptr.dtype.element_ty)  # s = x + delta
            tl.store(stream_ptr + rows[:, None] * K + k[None, :], rounded, mask=mask)
            s = rounded.to(tl.float32)  # the value that the backward pass will read
        mean = tl.sum(s, 1) / K  # [ROWS]
        centred = tl.where(mask, s - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / K + eps)
        tl.store(mean_ptr + rows, mean, mask=row_mask)
        tl.store(rstd_ptr + rows, rstd, mask=row_mask)
        n = centred * rstd[:, None] * weight[None, :]
        if HAS_BIAS:
            n += bias[None, :]
        tl.store(normed_ptr + rows[:, None] * K + k[None, :], n.to(normed_ptr.dtype.element_ty), mask=mask)

    if ADAPTERS > 0:
        tl.debug_barrier()  # each thread reads what others have stored
        RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
        rows = first + tl.arange(0, BLOCK_M)
        row_mask = (rows < M)[:, None]
        j = tl.arange(0, BLOCK_H)
        if BITS > 0:
            seed = tl.load(seed_ptr)
        for chunk in tl.range(0, ADAPTERS * RANK_BLOCKS, num_stages=1):
            adapter = chunk // RANK_BLOCKS
            r = (chunk % RANK_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
            rank_mask = (r < RANK)[None, :]
            normed_ptrs = normed_ptr + rows[:, None] * K + j[None, :]
            A_ptrs = A_ptr + (adapter * RANK + r).to(tl.int64)[None, :] * K + j[:, None]
            h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for k0 in range(0, K, BLOCK_H):
                inside = EVEN_K | (k0 + j < K)
                normed = tl.load(normed_ptrs + k0, mask=row_mask & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_H]
                A = tl.load(A_ptrs + k0, mask=rank_mask & inside[:, None], other=0.0)  # [BLOCK_H, BLOCK_R]
                if BITS > 0:
                    keep = keep_mask(seed, adapter, rows, k0, threshold, BLOCK_M, BLOCK_H, BITS)
                    normed = tl.where(keep, normed, 0.0)
                if UPCAST:
                    normed, A = normed.to(tl.float32), A.to(tl.float32)
                h = tl.dot(normed, A, h, input_precision="ieee")  # drop(n) Ã^T
            h_ptrs = h_ptr + rows[:, None] * (ADAPTERS * RANK) + (adapter * RANK + r)[None, :]
            tl.store(h_ptrs, (h * keep_scale).to(h_ptr.dtype.element_ty), mask=row_mask & rank_mask)


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
    """One program owns BLOCK_M whole rows."""
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


def norm_fwd(
    x: Tensor,  # [M, K]
    delta: Tensor | None,  # [M, K]
    weight: Tensor,  # [K]
    bias: Tensor | None,  # [K]
    eps: float,
    dtype: torch.dtype,
    reader: AdaptedLinear | None,  # the product that reads n, of that dtype; None: h is not computed
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # s, n [M, K], mean, rstd [M], h [M, P r]
    """`s = x + delta`, `n = LN(s)` in `dtype`, and `h_p = drop_p(n) Ã_p^T` of half-precision n. K <= 2048."""
    (M, K), device = x.shape, x.device
    if K > MAX_NORM_WIDTH:
        raise ValueError(f"x {tuple(x.shape)}, expected rows of at most {MAX_NORM_WIDTH}")
    x, delta = launch.contiguous_rows(x), None if delta is None else launch.contiguous_rows(delta)
    A, seed = (None, None) if reader is None else (launch.stacked(reader.As), reader.seed)  # [P, r, K]
    P, R = (0, 1) if A is None else A.shape[:2]
    dropout = dropout_lanes(0.0 if reader is None else reader.dropout_p)
    if A is not None and not dropout.bits:
        P, R = 1, P * R  # without masks of their own the adapters are one of more ranks
    wide = x.dtype if delta is None else torch.promote_types(x.dtype, delta.dtype)
    stream = x if delta is None else launch.empty((M, K), wide, device)
    normed, h = launch.empty((M, K), dtype, device), launch.empty((M, P * R), dtype, device)
    mean, rstd = (torch.empty(M, dtype=torch.float32, device=device) for _ in range(2))
    block_k = launch.power_of_two(K, 64, MAX_NORM_WIDTH)
    block_h = 32 if launch.INTERPRETED else 64
    rows = max(1, ELEMENTS // block_k)
    block_m = rows
    if A is not None:
        block_m = 32 if launch.INTERPRETED else launch.power_of_two(triton.cdiv(M, PROGRAMS), 16, 64)
        rows = min(rows, 16)
    if M > 0:
        with launch.on_device(device):
            norm_fwd_kernel[(triton.cdiv(M, block_m),)](
                x,
                x if delta is None else delta,
                weight.contiguous(),
                weight if bias is None else bias.contiguous(),
                x if A is None else A,
                stream,
                normed,
                mean,
                rstd,
                h,
                x if seed is None else seed,
                M,
                K,
                x.stride(0),
                x.stride(0) if delta is None else delta.stride(0),
                eps,
                dropout.threshold,
                dropout.scale,
                RANK=R,
                ADAPTERS=P,
                BITS=dropout.bits,
                HAS_DELTA=delta is not None,
                HAS_BIAS=bias is not None,
                UPCAST=launch.upcast(dtype),
                EVEN_K=K % block_h == 0,
                BLOCK_M=block_m,
                ROWS=rows,
                BLOCK_K=block_k,
                BLOCK_H=block_h,
                BLOCK_R=launch.power_of_two(R, 16, MAX_BLOCK_R[dtype]),
                num_warps=4,
                num_stages=3,
            )
    return launch.rounded(stream, wide), launch.rounded(normed, dtype), mean, rstd, launch.rounded(h, dtype)


def norm_bwd(
    dn: Tensor,  # [M, K]
    d_stream: Tensor | None,  # [M, K]
    stream: Tensor,  # [M, K]
    mean: Tensor,  # [M], float32
    rstd: Tensor,  # [M], float32
    weight: Tensor,  # [K]
) -> Tensor:  # [M, K], in the dtype of the stream
    """`ds = d_s + LN'(dn)` in one pass."""
    M, K = stream.shape
    dn, stream = launch.contiguous_rows(dn), launch.contiguous_rows(stream)
    d_stream = None if d_stream is None else launch.contiguous_rows(d_stream)
    dx = launch.empty((M, K), stream.dtype, stream.device)
    block_k = launch.power_of_two(K, 64, MAX_NORM_WIDTH)
    block_m = max(1, ELEMENTS // block_k)
    if M > 0:
        with launch.on_device(stream.device):
            norm_bwd_kernel[(triton.cdiv(M, block_m),)](
                dn,
                dn if d_stream is None else d_stream,
                stream,
                mean,
                rstd,
                weight.contiguous(),
                dx,
                M,
                K,
                dn.stride(0),
                dn.stride(0) if d_stream is None else d_stream.stride(0),
                stream.stride(0),
                HAS_D_STREAM=d_stream is not None,
                BLOCK_M=block_m,
                BLOCK_K=block_k,
                num_warps=4,
                num_stages=1,
            )
    return launch.rounded(dx, stream.dtype)
