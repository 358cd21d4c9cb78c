"""The skinny products of the backward pass, each in one pass over the activation that it reads.

    g_p = dY_p B̃_p [M, r]      dB̃_p = dY_p^T h_p [D, r]      dÃ_p = g_p^T drop_p(x) [r, K]

dY_p are the columns of adapter p. Sums over M are split: each program adds up its share of the rows and stores the
partial sum; `sum_partials_kernel` adds these in order. The shares depend on shapes alone, so that two runs add in the
same order and give the same bits.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch
from complora_kernels.kernels.activation import KINDS, activate
from complora_kernels.kernels.dropout import dropout_lanes, keep_mask
from complora_kernels.kernels.linear import MAX_BLOCK_R
from complora_kernels.kernels.rows import groups_of

PROGRAMS = 264  # the splits aim for so many: two for each multiprocessor of an H100 or H200
ROWS_PER_SPLIT = 256  # at least: below, storing and adding partial sums would cost more than it brings


@triton.jit
def packed_lora_linear_db_kernel(
    dY_ptr,  # [M, N]
    h_ptr,  # [M, P * R]
    B_ptr,  # [P, D, R]
    g_ptr,  # [TILES, M, P * R]
    dB_ptr,  # [SPLITS, P, D, R]
    M,
    D,
    stride_dm,
    stride_dn,
    rows_of_split,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    GROUP_OF_ADAPTER: tl.constexpr,  # four bits an adapter
    COMPUTE_G: tl.constexpr,
    COMPUTE_DB: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program reads BLOCK_N columns of one adapter's dY over one split of the rows, for BLOCK_R ranks.

    It adds up dB̃ for them and stores what these columns contribute to g: all of it when they are all there are.
    """
    tiles = tl.cdiv(D, BLOCK_N)
    chunk = tl.program_id(0)
    tile = chunk % tiles
    adapter = chunk // tiles % ADAPTERS
    r = chunk // (tiles * ADAPTERS) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(1).to(tl.int64)

    d = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    n = (((GROUP_OF_ADAPTER >> (4 * adapter)) & 15) * D + d).to(tl.int64)
    pr = adapter * RANK + r
    column_mask, rank_mask = d < D, r < RANK
    B_ptrs = B_ptr + (adapter.to(tl.int64) * D + d)[:, None] * RANK + r[None, :]
    weight_mask = column_mask[:, None] & rank_mask[None, :]
    if COMPUTE_G:
        B = tl.load(B_ptrs, mask=weight_mask, other=0.0)  # [BLOCK_N, BLOCK_R]
        if UPCAST:
            B = B.to(tl.float32)
    dB = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    first = split * rows_of_split
    for m0 in range(0, rows_of_split, BLOCK_M):
        rows = first + m0 + tl.arange(0, BLOCK_M)
        row_mask = (rows < M)[:, None]
        dY_ptrs = dY_ptr + rows[:, None] * stride_dm + n[None, :] * stride_dn
        dY = tl.load(dY_ptrs, mask=row_mask & column_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        if UPCAST:
            dY = dY.to(tl.float32)
        if COMPUTE_DB:
            h_ptrs = h_ptr + rows[:, None] * (ADAPTERS * RANK) + pr[None, :]
            h = tl.load(h_ptrs, mask=row_mask & rank_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
            if UPCAST:
                h = h.to(tl.float32)
            dB = tl.dot(tl.trans(dY), h, dB, input_precision=PRECISION)  # dY^T h
        if COMPUTE_G:
            g = tl.dot(dY, B, input_precision=PRECISION)  # dY B̃
            g_ptrs = g_ptr + (tile.to(tl.int64) * M + rows[:, None]) * (ADAPTERS * RANK) + pr[None, :]
            tl.store(g_ptrs, g.to(g_ptr.dtype.element_ty), mask=row_mask & rank_mask[None, :])
    if COMPUTE_DB:
        dB_ptrs = dB_ptr + ((split * ADAPTERS + adapter) * D + d)[:, None] * RANK + r[None, :]
        tl.store(dB_ptrs, dB, mask=weight_mask)


@triton.jit
def packed_lora_linear_da_kernel(
    x_ptr,  # [M, K]
    g_ptr,  # [M, P * R]
    dA_ptr,  # [SPLITS, P, R, K]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    weight_ptr,  # [K]
    bias_ptr,  # [K]
    seed_ptr,  # [1]
    M,
    K,
    stride_xm,
    stride_xk,
    rows_of_split,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    BITS: tl.constexpr,
    NORMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # 0: none
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program adds up BLOCK_K columns and BLOCK_R ranks of one adapter's dÃ over one split of the rows.

    Adapters come first in the grid, so that the programs that read the same part of x run side by side. What the
    forward pass made of x, LayerNorm or an activation, is computed again as x is read, and rounded as it was.
    """
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    chunk = tl.program_id(0)
    adapter = chunk // RANK_BLOCKS
    r = (chunk % RANK_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    split = tl.program_id(2).to(tl.int64)
    pr = adapter * RANK + r
    if BITS > 0:
        seed = tl.load(seed_ptr)
    if NORMED:
        weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    dA = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    first = split * rows_of_split
    for m0 in range(0, rows_of_split, BLOCK_M):
        rows = first + m0 + tl.arange(0, BLOCK_M)
        row_mask = (rows < M)[:, None]
        x_ptrs = x_ptr + rows[:, None] * stride_xm + k[None, :].to(tl.int64) * stride_xk
        x = tl.load(x_ptrs, mask=row_mask & (k < K)[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        g_ptrs = g_ptr + rows[:, None] * (ADAPTERS * RANK) + pr[None, :]
        g = tl.load(g_ptrs, mask=row_mask & (r < RANK)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if NORMED:
            mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
            rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
            x = (x.to(tl.float32) - mean) * rstd * weight[None, :]  # LN(x)
            if HAS_BIAS:
                x += bias[None, :]
        if ACTIVATION > 0:
            x = activate(x.to(tl.float32), ACTIVATION)  # act(x)
        if not UPCAST:
            x = x.to(g_ptr.dtype.element_ty)
        if BITS > 0:
            x = tl.where(keep_mask(seed, adapter, rows, k0, threshold, BLOCK_M, BLOCK_K, BITS), x, 0.0)
        if UPCAST:
            x, g = x.to(tl.float32), g.to(tl.float32)
        dA = tl.dot(tl.trans(x), g, dA, input_precision=PRECISION)  # (mask ∘ x)^T g
    dA_ptrs = dA_ptr + ((split * ADAPTERS + adapter) * RANK + r)[None, :] * K + k[:, None]
    tl.store(dA_ptrs, dA * keep_scale, mask=(k < K)[:, None] & (r < RANK)[None, :])


@triton.jit
def sum_partials_kernel(
    partials_ptr,  # [parts, size]
    out_ptr,  # [size]
    parts,
    size,
    BLOCK: tl.constexpr,
):
    """One program adds BLOCK columns of all parts, in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    partials_ptrs = partials_ptr + i
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(partials_ptrs, mask=i < size, other=0.0)
        partials_ptrs += size
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < size)


def sum_partials(
    partials: Tensor,  # [parts, ...], float32
    dtype: torch.dtype,
) -> Tensor:  # [...]
    """The sum over the first dimension in a fixed order, rounded once."""
    total = launch.empty(partials.shape[1:], dtype, partials.device)
    if total.numel() > 0:
        block = 256
        with launch.on_device(partials.device):
            sum_partials_kernel[(triton.cdiv(total.numel(), block),)](
                partials, total, len(partials), total.numel(), BLOCK=block, num_warps=4
            )
    return launch.rounded(total, dtype)


def packed_lora_linear_db(
    dY: Tensor,  # [M, N]
    h: Tensor,  # [M, P r]; not read unless dB̃ is computed
    linear: AdaptedLinear,  # its Bs and rows are read
    *,
    compute_g: bool,
    compute_dB: bool,
) -> tuple[Tensor, Tensor]:  # g [M, P r], dB̃ [P, D, r]; of no elements where they are not computed
    """`g_p = dY_p B̃_p` and `dB̃_p = dY_p^T h_p` in one pass over dY."""
    B, groups = launch.stacked(linear.Bs), groups_of(linear)  # [P, D, r]
    M, (P, D, R), dtype, device = dY.shape[0], B.shape, dY.dtype, dY.device
    block_r = launch.power_of_two(R, 16, MAX_BLOCK_R[dtype])
    block_m, widest, warps = (
        (32, 32, 4) if launch.INTERPRETED else (32, 64, 4) if dtype == torch.float32 else (64, 256, 8)
    )
    block_n = launch.power_of_two(D, 32, widest)
    tiles = triton.cdiv(D, block_n)
    chunks = tiles * P * triton.cdiv(R, block_r)
    splits, rows_of_split = _splits(M, chunks, block_m)
    partial_g = torch.float32 if tiles > 1 else dtype
    g = launch.empty((tiles if compute_g else 0, M, P * R), partial_g, device)
    dB = torch.empty((splits if compute_dB else 0, P, D, R), dtype=torch.float32, device=device)
    if M > 0 and (compute_g or compute_dB):
        with launch.on_device(device):
            packed_lora_linear_db_kernel[(chunks, splits)](
                dY,
                h,
                B,
                g,
                dB,
                M,
                D,
                *dY.stride(),
                rows_of_split,
                RANK=R,
                ADAPTERS=P,
                GROUP_OF_ADAPTER=groups.group_of_adapter,
                COMPUTE_G=compute_g,
                COMPUTE_DB=compute_dB,
                UPCAST=launch.upcast(dtype),
                PRECISION=launch.input_precision(dtype),
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                BLOCK_R=block_r,
                num_warps=warps,
                num_stages=launch.stages(3 if block_r <= 32 else 2),  # B̃ lies in shared memory beside the stages of dY
            )
    whole_g = g.new_empty(0)
    if compute_g:
        whole_g = launch.rounded(g[0], dtype) if tiles == 1 else sum_partials(g, dtype)
    return whole_g, sum_partials(dB, dtype) if compute_dB else dY.new_empty(0)


def packed_lora_linear_da(
    x: Tensor,  # [M, K]
    g: Tensor,  # [M, P r]
    linear: AdaptedLinear,  # the number of its adapters and its dropout are read
    *,
    norm: Sequence[Tensor | None] | None = None,  # mean, rstd [M], weight, bias [K]
    activation: str | None = None,
) -> Tensor:  # [P, r, K]
    """`dÃ_p = g_p^T drop_p(x)` in one pass over x; with `drop_p(LN(x))` or `drop_p(act(x))` where these are given."""
    (M, K), dtype, device = x.shape, g.dtype, x.device
    mean, rstd, weight, bias = norm or (None,) * 4
    adapters, seed = len(linear.rows), linear.seed
    P, R = adapters, g.shape[1] // adapters
    dropout = dropout_lanes(linear.dropout_p)
    if not dropout.bits:
        P, R = 1, P * R  # without masks of their own the adapters are one of more ranks
    block_r = launch.power_of_two(R, 16, MAX_BLOCK_R[dtype])
    wide = 128 if launch.aligned(x) else 64  # see `linear.UNALIGNED_TILES`
    block_m, block_k = (32, 32) if launch.INTERPRETED else (32, 64) if dtype == torch.float32 else (64, wide)
    chunks, tiles = P * triton.cdiv(R, block_r), triton.cdiv(K, block_k)
    splits, rows_of_split = _splits(M, triton.cdiv(K, 128), 64)  # whatever the tiles
    dA = torch.empty((splits, P, R, K), dtype=torch.float32, device=device)
    if M > 0:
        with launch.on_device(device):
            packed_lora_linear_da_kernel[(chunks, tiles, splits)](
                x,
                g,
                dA,
                x if mean is None else mean,
                x if rstd is None else rstd,
                x if weight is None else weight.contiguous(),
                x if bias is None else bias.contiguous(),
                x if seed is None else seed,
                M,
                K,
                *x.stride(),
                rows_of_split,
                dropout.threshold,
                dropout.scale,
                RANK=R,
                ADAPTERS=P,
                BITS=dropout.bits,
                NORMED=norm is not None,
                HAS_BIAS=bias is not None,
                ACTIVATION=KINDS[activation] if activation else 0,
                UPCAST=launch.upcast(dtype),
                PRECISION=launch.input_precision(dtype),
                BLOCK_M=block_m,
                BLOCK_K=block_k,
                BLOCK_R=block_r,
                num_warps=8 if block_r > 32 else 4,
                num_stages=3,
            )
    return sum_partials(dA, dtype).view(adapters, -1, K)


def _splits(M: int, chunks: int, block_m: int) -> tuple[int, int]:
    """Into how many parts the rows are split, and the rows of each, a multiple of BLOCK_M; no parts of no rows."""
    wanted = max(1, min(triton.cdiv(M, ROWS_PER_SPLIT), triton.cdiv(PROGRAMS, chunks)))
    rows_of_split = triton.cdiv(triton.cdiv(M, wanted), block_m) * block_m
    return (triton.cdiv(M, rows_of_split), rows_of_split) if M > 0 else (0, 0)
