"""LayerNorm inside a residual block: what is added before it, and what follows from it.

    s = x + delta      n = (s - mean) · rstd ∘ w + b      h_p = drop_p(n) Ã_p^T [M, r]

Programs hold whole rows [ROWS, K], so that each activation is read once. `norm_bwd` has the gradient.
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
from complora_kernels.kernels.beside import (
    BLOCK_N,
    NOTHING_BESIDE,
    Beside,
    Layout,
    in_eights,
    pad_rows,
    write_wide_weight,
)
from complora_kernels.kernels.dropout import dropout_lanes, keep_mask
from complora_kernels.kernels.linear import MAX_BLOCK_R
from complora_kernels.kernels.rows import MAX_NORM_WIDTH

ROWS_WITH_H = 16  # rows of a program that computes h: they are still in the cache when it reads them again
ELEMENTS = 4096  # elements of the rows that one program holds: 32 a thread


@triton.jit
def norm_fwd_kernel(
    x_ptr,  # [M, K]
    delta_ptr,  # [M, K]
    weight_ptr,  # [K]
    bias_ptr,  # [K]
    A_ptr,  # [P, R, K]
    stream_ptr,  # [M, K]
    again_ptr,  # [M, K]
    normed_ptr,  # [M, K]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    h_ptr,  # [M, P * R]
    beside_ptr,  # [M, P * R], at column K of n's rows
    frozen_ptr,  # [N, K]
    B_ptr,  # [B_ADAPTERS, D, B_RANK]
    wide_ptr,  # [N, C]
    seed_ptr,  # [1]
    M,
    K,
    N,
    D,
    programs,  # of norms; those after them write `[W | B̃ | 0]`
    stride_xm,
    stride_dm,
    stride_nm,
    stride_fn,
    stride_fk,
    stride_wn,
    eps,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,  # 0: h is not computed
    BITS: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    TWICE: tl.constexpr,  # s is stored to `again_ptr` too
    HAS_BIAS: tl.constexpr,
    STORE_H: tl.constexpr,
    PADDING: tl.constexpr,  # columns behind h in n's rows; -1: h is not stored there
    B_RANK: tl.constexpr,
    B_ADAPTERS: tl.constexpr,
    ADAPTER_OF_GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program owns BLOCK_M whole rows: it normalizes ROWS of them at a time, then computes the h of all.

    For h it reads the norm that it has stored again, BLOCK_H columns at a time and from the cache: shared memory holds
    neither whole rows nor all of Ã, however wide they are.

    Minimum bytes: x, delta, Ã, w and b read once, s (with delta), n, mean, rstd and h written once, and n read from the
    cache for h; W and B̃ read and written once where h is stored beside n; with TWICE s written once more.
    """
    if PADDING >= 0 and tl.program_id(0) >= programs:
        write_wide_weight(
            tl.program_id(0) - programs,
            frozen_ptr,
            B_ptr,
            frozen_ptr,
            wide_ptr,
            N,
            K,
            D,
            stride_fn,
            stride_fk,
            stride_wn,
            B_RANK,
            B_ADAPTERS,
            ADAPTER_OF_GROUP,
            False,
            PADDING,
            BLOCK_N,
            BLOCK_R,
        )
        return
    if PADDING >= 0:
        stride_nm = in_eights(stride_nm)
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
        if TWICE:
            tl.store(again_ptr + rows[:, None] * K + k[None, :], s.to(again_ptr.dtype.element_ty), mask=mask)
        mean = tl.sum(s, 1) / K  # [ROWS]
        centred = tl.where(mask, s - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / K + eps)
        tl.store(mean_ptr + rows, mean, mask=row_mask)
        tl.store(rstd_ptr + rows, rstd, mask=row_mask)
        n = centred * rstd[:, None] * weight[None, :]
        if HAS_BIAS:
            n += bias[None, :]
        tl.store(normed_ptr + rows[:, None] * stride_nm + k[None, :], n.to(normed_ptr.dtype.element_ty), mask=mask)

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
            normed_ptrs = normed_ptr + rows[:, None] * stride_nm + j[None, :]
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
            h_rounded = (h * keep_scale).to(h_ptr.dtype.element_ty)
            pr = (adapter * RANK + r)[None, :]
            if STORE_H:
                tl.store(h_ptr + rows[:, None] * (ADAPTERS * RANK) + pr, h_rounded, mask=row_mask & rank_mask)
            if PADDING >= 0:
                tl.store(beside_ptr + rows[:, None] * stride_nm + pr, h_rounded, mask=row_mask & rank_mask)
        if PADDING > 0:
            pad_rows(beside_ptr + ADAPTERS * RANK, rows, M, stride_nm, 0.0, PADDING)


def norm_fwd(
    x: Tensor,  # [M, K]
    delta: Tensor | None,  # [M, K]
    weight: Tensor,  # [K]
    bias: Tensor | None,  # [K]
    eps: float,
    dtype: torch.dtype,
    reader: AdaptedLinear | None,  # the product that reads n, of that dtype; None: h is not computed
    *,
    beside: Beside | None = None,  # the product is one of [n | h | 0] and [W | B̃ | 0]: both are completed
    twice: bool = False,
) -> tuple[Tensor, ...]:  # s [M, K], n [M, K] or [n | h | 0] [M, C], mean, rstd [M], h [M, P r], s again [M, K]
    """`s = x + delta`, `n = LN(s)` in `dtype`, and `h_p = drop_p(n) Ã_p^T` of half-precision n. K <= 2048.

    h is [0, P r] where nothing reads it again: it is stored beside n, and the reader does not save it. The last result
    is the first one, or with `twice` its values in memory of their own.
    """
    (M, K), device = x.shape, x.device
    if K > MAX_NORM_WIDTH:
        raise ValueError(f"x {tuple(x.shape)}, expected rows of at most {MAX_NORM_WIDTH}")
    x, delta = launch.contiguous_rows(x), None if delta is None else launch.contiguous_rows(delta)
    A, seed = (None, None) if reader is None else (launch.stacked(reader.As), reader.seed)  # [P, r, K]; of one [r, K]
    dropout_p = 0.0 if reader is None else reader.dropout_p
    P, R = (0, 1) if reader is None else launch.adapters_of(reader)
    if A is not None and not dropout_p:
        P, R = 1, P * R  # without masks of their own the adapters are one of more ranks
    wide = x.dtype if delta is None else torch.promote_types(x.dtype, delta.dtype)
    stream = x if delta is None else launch.empty((M, K), wide, device)
    again = launch.empty((M, K), wide, device) if twice else stream
    store_h = beside is None or reader is None or reader.save_h
    width = K if beside is None else beside.layout.width
    normed = launch.empty((M, width), dtype, device)
    h = launch.empty((M if store_h else 0, P * R), dtype, device)
    mean = torch.empty(M, dtype=torch.float32, device=device)
    rstd = torch.empty(M, dtype=torch.float32, device=device)
    if M > 0:
        x_stride = x.stride(0)
        shapes = (M, K, P, R, width, x_stride, x_stride if delta is None else delta.stride(0))
        flags = (A is not None, delta is not None, twice, bias is not None, store_h)
        prepared = _fwd(shapes, eps, dropout_p, *flags, None if beside is None else beside.layout, dtype)
        tensors = (
            x,
            x if delta is None else delta,
            weight.contiguous(),
            weight if bias is None else bias.contiguous(),
            x if A is None else A,
            stream,
            again,
            normed,
            mean,
            rstd,
            h,
            normed if beside is None else normed[:, K:],
            x if beside is None else beside.frozen,
            x if beside is None else beside.B,
            x if beside is None else beside.wide,
            x if seed is None else seed,
        )
        launch.run(norm_fwd_kernel, prepared, tensors)
    stream, normed, h = launch.rounded(stream, wide), launch.rounded(normed, dtype), launch.rounded(h, dtype)
    return stream, normed, mean, rstd, h, launch.rounded(again, wide) if twice else stream


@launch.cached
def _fwd(
    shapes: tuple[int, ...],  # M, K, P, R, the columns of n, the distances of the rows of x and delta
    eps: float,
    dropout_p: float,
    compute_h: bool,
    has_delta: bool,
    twice: bool,
    has_bias: bool,
    store_h: bool,
    beside: Layout | None,
    dtype: torch.dtype,
) -> launch.Launch:
    M, K, P, R, width, *strides = shapes
    dropout = dropout_lanes(dropout_p)
    block_k = launch.power_of_two(K, 64, MAX_NORM_WIDTH)
    block_h = 32 if launch.INTERPRETED else 64
    rows = max(1, ELEMENTS // block_k)
    block_m = ROWS_WITH_H if compute_h else rows
    programs = launch.cdiv(M, block_m)
    layout = NOTHING_BESIDE if beside is None else beside
    constexprs = {
        "RANK": R,
        "ADAPTERS": P,
        "BITS": dropout.bits,
        "HAS_DELTA": has_delta,
        "TWICE": twice,
        "HAS_BIAS": has_bias,
        "STORE_H": store_h,
        "PADDING": -1 if beside is None else width - K - P * R,
        **layout.constexprs(),
        "UPCAST": launch.upcast(dtype),
        "EVEN_K": K % block_h == 0,
        "BLOCK_M": block_m,
        "ROWS": min(rows, block_m),
        "BLOCK_K": block_k,
        "BLOCK_H": block_h,
        "BLOCK_R": launch.power_of_two(R, 16, MAX_BLOCK_R[dtype]),
        "BLOCK_N": BLOCK_N,
    }
    sizes = (M, K, layout.N, layout.D, programs, *strides, width, layout.stride_n, layout.stride_k, layout.width)
    numbers = (*sizes, eps, dropout.threshold, dropout.scale)
    return launch.Launch((programs + layout.programs,), numbers, constexprs, num_warps=4, num_stages=3)
