"""The large products with the low-rank term added to their float32 accumulator, so that each output is rounded once.

    h_p = drop_p(x) Ã_p^T [M, r]      y = x W^T + b + h_p B̃_p^T in the rows of adapter p
    g_p = dY B̃_p [M, r]               dX = dY W + Σ_p m_p ∘ (g_p Ã_p)

P adapters share a weight [N, K] whose rows are groups of D (q, k and v: N = 3 D). Each tile of y lies in one group and
takes its adapter. `ADAPTER_OF_GROUP` holds the adapter of each group, four bits each, 15 for none. h and g are
[M, P r], adapter by adapter.

The kernel of h stands here, that of y in `linear_fwd`, that of dX in `linear_dx`; this file has the names of all three.
`linear_bwd` computes dX and the gradients of the factors of one adapter in one launch.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportOptionalIterable=false, reportArgumentType=false

from __future__ import annotations

from typing import Any

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
from complora_kernels.kernels.launch import candidate_tiles
from complora_kernels.kernels.linear_dx import packed_lora_linear_dx
from complora_kernels.kernels.linear_fwd import packed_lora_linear_fwd
from complora_kernels.kernels.tiles import MAX_BLOCK_R, fits_inside, tiles_of

__all__ = [
    "candidate_tiles",
    "fits_inside",
    "packed_lora_linear_dx",
    "packed_lora_linear_fwd",
    "packed_lora_linear_h",
    "tiles_of",
]


@triton.jit
def packed_lora_linear_h_kernel(
    x_ptr,  # [M, K]
    A_ptr,  # [P, R, K]
    h_ptr,  # [M, P * R]
    copy_ptr,  # [M, K], where x is copied to
    beside_ptr,  # [M, P * R], at column K of the copy's rows
    frozen_ptr,  # [N, K]
    B_ptr,  # [B_ADAPTERS, D, B_RANK]
    wide_ptr,  # [N, C]
    columns_ptr,  # [M, P * R]
    seed_ptr,  # [1]
    M,
    K,
    N,
    D,
    programs,  # of h; those after them write `[W | B̃ | 0]`
    stride_xm,
    stride_xk,
    stride_cm,
    stride_fn,
    stride_fk,
    stride_wn,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    BITS: tl.constexpr,
    STORE_H: tl.constexpr,
    PADDING: tl.constexpr,  # columns behind h in the copy's rows; -1: x is not copied
    B_RANK: tl.constexpr,
    B_ADAPTERS: tl.constexpr,
    ADAPTER_OF_GROUP: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes h for BLOCK_M rows and BLOCK_R ranks of one adapter.

    Minimum bytes: x and Ã read once, h written once; where x is copied beside h, x and h written once more, and W
    and B̃ read and written once.
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
        stride_cm = in_eights(stride_cm)
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    chunk = tl.program_id(0) % (ADAPTERS * RANK_BLOCKS)  # neighbours share rows of x
    adapter = chunk // RANK_BLOCKS
    rows = (tl.program_id(0) // (ADAPTERS * RANK_BLOCKS)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    r = (chunk % RANK_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + k[None, :].to(tl.int64) * stride_xk
    A_ptrs = A_ptr + (adapter * RANK + r).to(tl.int64)[None, :] * K + k[:, None]
    row_mask, rank_mask = (rows < M)[:, None], (r < RANK)[None, :]
    if BITS > 0:
        seed = tl.load(seed_ptr)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        inside = EVEN_K | (k0 + k < K)
        x = tl.load(x_ptrs, mask=row_mask & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        A = tl.load(A_ptrs, mask=rank_mask & inside[:, None], other=0.0)  # [BLOCK_K, BLOCK_R]
        if PADDING >= 0 and chunk == 0:
            copy_ptrs = copy_ptr + rows[:, None] * stride_cm + (k0 + k)[None, :]
            tl.store(copy_ptrs, x, mask=row_mask & inside[None, :])
        if BITS > 0:
            x = tl.where(keep_mask(seed, adapter, rows, k0, threshold, BLOCK_M, BLOCK_K, BITS), x, 0.0)
        if UPCAST:
            x, A = x.to(tl.float32), A.to(tl.float32)
        h = tl.dot(x, A, h, input_precision=PRECISION)  # h = (mask ∘ x) Ã^T
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        A_ptrs += BLOCK_K
    pr = (adapter * RANK + r)[None, :]
    if HAS_COLUMNS:
        kept = tl.load(columns_ptr + rows[:, None] * (ADAPTERS * RANK) + pr, mask=row_mask & rank_mask, other=0)
        h = tl.where(kept != 0, h, 0.0)
    h_rounded = (h * keep_scale).to(h_ptr.dtype.element_ty)
    if STORE_H:
        tl.store(h_ptr + rows[:, None] * (ADAPTERS * RANK) + pr, h_rounded, mask=row_mask & rank_mask)
    if PADDING >= 0:
        tl.store(beside_ptr + rows[:, None] * stride_cm + pr, h_rounded, mask=row_mask & rank_mask)
        if PADDING > 0 and chunk == 0:
            pad_rows(beside_ptr + ADAPTERS * RANK, rows, M, stride_cm, 0.0, PADDING)


def packed_lora_linear_h(
    x: Tensor,  # [M, K]
    linear: AdaptedLinear,  # its As, dropout and columns are read
    *,
    beside: Beside | None = None,  # the product is one of [x | h | 0] and [W | B̃ | 0]: both are made
) -> Any:  # h [M, P r]; or, beside x, [x | h | 0] [M, C] and h, [0, P r] unless the product saves it
    """`h_p = drop_p(x) Ã_p^T`, 0 outside the columns of each row, in one pass over x, which it can copy beside h."""
    A, seed, dtype, device = launch.stacked(linear.As), linear.seed, x.dtype, x.device  # [P, r, K]; of one [r, K]
    (M, K), (P, R) = x.shape, launch.adapters_of(linear)
    if not linear.dropout_p:
        P, R = 1, P * R  # without masks of their own the adapters are one of more ranks
    store_h = beside is None or linear.save_h
    h = launch.empty((M if store_h else 0, P * R), dtype, device)
    copy = h if beside is None else launch.empty((M, beside.layout.width), dtype, device)
    columns = None if linear.columns is None else linear.columns.contiguous().view(torch.uint8)
    if M > 0:
        shapes = (M, K, P, R, *x.stride(), copy.shape[1])
        layout, precision = None if beside is None else beside.layout, launch.input_precision(dtype)
        prepared = _launch(shapes, linear.dropout_p, store_h, layout, columns is not None, dtype, precision)
        tensors = (
            x,
            A,
            h,
            copy,
            h if beside is None else copy[:, K:],
            A if beside is None else beside.frozen,
            A if beside is None else beside.B,
            A if beside is None else beside.wide,
            x if columns is None else columns,
            x if seed is None else seed,
        )
        launch.run(packed_lora_linear_h_kernel, prepared, tensors)
    h = launch.rounded(h, dtype)
    return h if beside is None else (launch.rounded(copy, dtype), h)


@launch.cached
def _launch(
    shapes: tuple[int, ...],  # M, K, P, R, the strides of x, the columns of its copy
    dropout_p: float,
    store_h: bool,
    beside: Layout | None,
    has_columns: bool,
    dtype: torch.dtype,
    precision: str,
) -> launch.Launch:
    M, K, P, R, stride_m, stride_k, width = shapes
    dropout = dropout_lanes(dropout_p)
    block_r = launch.power_of_two(R, 16, MAX_BLOCK_R[dtype])
    block_m, block_k = (32, 32) if launch.INTERPRETED or dtype == torch.float32 else (64, 64)
    programs = launch.cdiv(M, block_m) * P * launch.cdiv(R, block_r)
    beside_numbers = NOTHING_BESIDE if beside is None else beside
    constexprs = {
        "RANK": R,
        "ADAPTERS": P,
        "BITS": dropout.bits,
        "STORE_H": store_h,
        "PADDING": -1 if beside is None else width - K - P * R,
        **beside_numbers.constexprs(),
        "HAS_COLUMNS": has_columns,
        "UPCAST": launch.upcast(dtype),
        "PRECISION": precision,
        "EVEN_K": K % block_k == 0,
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "BLOCK_R": block_r,
        "BLOCK_N": BLOCK_N,
    }
    of_weight = (beside_numbers.stride_n, beside_numbers.stride_k, beside_numbers.width)
    strides = (stride_m, stride_k, P * R if beside is None else width, *of_weight)
    numbers = (M, K, beside_numbers.N, beside_numbers.D, programs, *strides, dropout.threshold, dropout.scale)
    return launch.Launch((programs + beside_numbers.programs,), numbers, constexprs, num_warps=4, num_stages=3)
