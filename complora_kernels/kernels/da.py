"""The gradient of Ã in one pass over the input of the product.

    dÃ_p = g_p^T drop_p(x) [r, K]

x may be what a LayerNorm or an activation reads: what the forward pass made of it is computed again.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch, partials
from complora_kernels.kernels.activation import KINDS, activate
from complora_kernels.kernels.dropout import dropout_lanes, keep_mask
from complora_kernels.kernels.linear import MAX_BLOCK_R
from complora_kernels.kernels.partials import sum_when_last

PROGRAMS = 264  # the splits aim for so many: two for each multiprocessor of an H100 or H200
WIDE_PROGRAMS = 132  # one: with more than 32 ranks a program has the registers of eight warps
ROWS_PER_SPLIT = 128  # at least: below, storing and adding partial sums would cost more than it brings


class Source(NamedTuple):
    """The operands of `dÃ_p = g_p^T drop_p(x)`; with `drop_p(LN(x))` or `drop_p(act(x))` where these are given."""

    x: Tensor  # [M, K]
    g: Tensor  # [M, P r], rows at any distance
    linear: AdaptedLinear  # the number of its adapters and its dropout are read
    norm: Sequence[Tensor | None] | None = None  # mean, rstd [M], weight, bias [K]
    activation: str | None = None


class Job(NamedTuple):
    """A launch that computes dÃ, or part of one."""

    work: launch.Work
    dA: Tensor  # [P, r, K] as the kernel stores it
    partials: Tensor  # [SPLITS + GROUPS, P, r, K], float32
    g: Tensor  # [M, P r], rows contiguous
    source: Source

    def tensors(self, counters: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the kernel, in order."""
        x, _, linear, norm, _ = self.source
        seed = linear.seed
        mean, rstd, weight, bias = norm or (None,) * 4
        return (
            x,
            self.g,
            self.dA,
            self.partials,
            counters,
            x if mean is None else mean,
            x if rstd is None else rstd,
            x if weight is None else weight.contiguous(),
            x if bias is None else bias.contiguous(),
            x if seed is None else seed,
        )

    def result(self) -> Tensor:  # [P, r, K]
        """dÃ in the dtype of g, after the launch."""
        dA, P = launch.rounded(self.dA, self.g.dtype), len(self.source.linear.rows)
        return dA if dA.shape[0] == P else dA.view(P, -1, self.source.x.shape[1])


@triton.jit
def affine_of_norm(
    weight_ptr,  # [K]
    bias_ptr,  # [K]
    k,  # [BLOCK_K]
    K,
    NORMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """The weight and bias of a LayerNorm [BLOCK_K] in float32; numbers that nobody reads where there is none."""
    weight, bias = 1.0, 0.0
    if NORMED:
        weight = tl.load(weight_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return weight, bias


@triton.jit
def input_of_product(
    x_ptr,  # [M, K]
    rows,  # [BLOCK_M], int64
    k0,  # the first column, a multiple of 16
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    weight,  # [BLOCK_K], see `affine_of_norm`
    bias,  # [BLOCK_K]
    seed,
    adapter,
    M,
    K,
    stride_xm,
    stride_xk,
    threshold,
    DTYPE: tl.constexpr,  # of the product
    BITS: tl.constexpr,
    NORMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # 0: none
    UPCAST: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile [BLOCK_M, BLOCK_K] of `mask ∘ x` in the product's dtype, of `mask ∘ LN(x)` or of `mask ∘ act(x)`."""
    k = k0 + tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + k[None, :].to(tl.int64) * stride_xk
    x = tl.load(x_ptrs, mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
    if NORMED:
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        x = (x.to(tl.float32) - mean) * rstd * weight[None, :]  # LN(x)
        if HAS_BIAS:
            x += bias[None, :]
    if ACTIVATION > 0:
        x = activate(x.to(tl.float32), ACTIVATION, PTX)  # act(x)
    if not UPCAST:
        x = x.to(DTYPE)
    if BITS > 0:
        x = tl.where(keep_mask(seed, adapter, rows, k0, threshold, BLOCK_M, BLOCK_K, BITS), x, 0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def packed_lora_linear_da_kernel(
    first_program,  # the programs of the launch that come before and compute something else
    x_ptr,  # [M, K]
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
    stride_xm,
    stride_xk,
    stride_gm,
    rows_of_split,
    splits,
    group_of_splits,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    SPLIT: tl.constexpr,
    BITS: tl.constexpr,
    NORMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # 0: none
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program adds up BLOCK_K columns and BLOCK_R ranks of one adapter's dÃ over one split of the rows.

    Adapters come first, so that the programs that read the same part of x run side by side.

    Minimum bytes: x, g and what the norm needs read once, dA written once; the partial sums of dA written and read
    once. With masks x is read once for each adapter, from the second on out of the L2 cache.
    """
    program = tl.program_id(0) - first_program
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile = program % (ADAPTERS * RANK_BLOCKS * tiles_k)
    split = (program // (ADAPTERS * RANK_BLOCKS * tiles_k)).to(tl.int64)
    chunk = tile % (ADAPTERS * RANK_BLOCKS)
    adapter = chunk // RANK_BLOCKS
    r = (chunk % RANK_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    k0 = tile // (ADAPTERS * RANK_BLOCKS) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    pr = adapter * RANK + r
    seed = tl.load(seed_ptr) if BITS > 0 else 0
    weight, bias = affine_of_norm(weight_ptr, bias_ptr, k, K, NORMED, HAS_BIAS)
    dA = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    first = split * rows_of_split
    for m0 in range(0, rows_of_split, BLOCK_M):
        rows = first + m0 + tl.arange(0, BLOCK_M)
        row_mask = (rows < M)[:, None]
        x = input_of_product(
            x_ptr,
            rows,
            k0,
            mean_ptr,
            rstd_ptr,
            weight,
            bias,
            seed,
            adapter,
            M,
            K,
            stride_xm,
            stride_xk,
            threshold,
            g_ptr.dtype.element_ty,
            BITS,
            NORMED,
            HAS_BIAS,
            ACTIVATION,
            UPCAST,
            PTX,
            BLOCK_M,
            BLOCK_K,
        )
        g_ptrs = g_ptr + rows[:, None] * stride_gm + pr[None, :]
        g = tl.load(g_ptrs, mask=row_mask & (r < RANK)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        if UPCAST:
            g = g.to(tl.float32)
        dA = tl.dot(tl.trans(x), g, dA, input_precision=PRECISION)  # (mask ∘ x)^T g
    of_adapter = adapter.to(tl.int64) * RANK * K
    sum_when_last(
        (dA * keep_scale,),
        (r[None, :] * K + k[:, None],),
        ((k < K)[:, None] & (r < RANK)[None, :],),
        dA_ptr + of_adapter,
        partials_ptr + of_adapter,
        counters_ptr + tile * (tl.cdiv(splits, group_of_splits) + 1),
        ADAPTERS * RANK * K,
        split,
        splits,
        group_of_splits,
        COUNT=1,
        SPLIT=SPLIT,
    )


def da_job(source: Source, *, narrow: bool = False) -> Job:
    """The launch that computes dÃ for these operands; `narrow`: with the registers of four warps for any rank."""
    x, g, linear, norm, activation = source
    (M, K), dtype, device = x.shape, g.dtype, x.device
    adapters, dropout_p = len(linear.rows), linear.dropout_p
    P, R = adapters, g.shape[1] // adapters
    if not dropout_p:
        P, R = 1, P * R  # without masks of their own the adapters are one of more ranks
    g = launch.contiguous_rows(g)
    shapes = (M, K, P, R, *x.stride(), g.stride(0))
    flags = (norm is not None, norm is not None and norm[3] is not None, KINDS[activation] if activation else 0)
    how = (launch.aligned(x), dtype, launch.input_precision(dtype), launch.has_ptx())
    work = _work(shapes, dropout_p, *flags, *how, ROWS_PER_SPLIT, narrow)
    dA = launch.empty((P, R, K), dtype, device)
    sums = torch.empty((work.partials, P, R, K), dtype=torch.float32, device=device) if work.partials else dA
    return Job(work, dA, sums, g, source)


@launch.cached
def _work(
    shapes: tuple[int, ...],  # M, K, P, R, the strides of x, the distance of the rows of g
    dropout_p: float,
    normed: bool,
    has_bias: bool,
    activation: int,
    aligned: bool,  # x
    dtype: torch.dtype,
    precision: str,
    ptx: bool,
    rows_per_split: int,
    narrow: bool,
) -> launch.Work:
    M, K, P, R, stride_m, stride_k, stride_g = shapes
    dropout = dropout_lanes(dropout_p)
    block_r = launch.power_of_two(R, 16, MAX_BLOCK_R[dtype])
    wide = 128 if aligned and not narrow else 64  # see `linear.UNALIGNED_TILES`
    block_m, block_k = (32, 32) if launch.INTERPRETED else (32, 64) if dtype == torch.float32 else (64, wide)
    tiles = P * -(-R // block_r) * -(-K // block_k)
    programs = WIDE_PROGRAMS if block_r > 32 and not narrow else PROGRAMS
    splits = partials.split_rows(M, min(-(-M // rows_per_split), programs // tiles), block_m)
    numbers = {
        "M": M,
        "K": K,
        "stride_xm": stride_m,
        "stride_xk": stride_k,
        "stride_gm": stride_g,
        "rows_of_split": splits.rows,
        "splits": splits.number,
        "group_of_splits": splits.group,
        "threshold": dropout.threshold,
        "keep_scale": dropout.scale,
    }
    constexprs = {
        "RANK": R,
        "ADAPTERS": P,
        "SPLIT": splits.number > 1,
        "BITS": dropout.bits,
        "NORMED": normed,
        "HAS_BIAS": has_bias,
        "ACTIVATION": activation,
        "UPCAST": launch.upcast(dtype),
        "PRECISION": precision,
        "PTX": ptx,
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "BLOCK_R": block_r,
    }
    return launch.Work(tiles * splits.number, tiles * splits.counters, splits.parts, numbers, constexprs)


def packed_lora_linear_da(
    x: Tensor,  # [M, K]
    g: Tensor,  # [M, P r], rows at any distance
    linear: AdaptedLinear,  # the number of its adapters and its dropout are read
    *,
    norm: Sequence[Tensor | None] | None = None,  # mean, rstd [M], weight, bias [K]
    activation: str | None = None,
) -> Tensor:  # [P, r, K]
    """`dÃ_p = g_p^T drop_p(x)` in one pass over x; with `drop_p(LN(x))` or `drop_p(act(x))` where these are given."""
    job = da_job(Source(x, g, linear, norm, activation))
    work = job.work
    prepared = launch.alone(work, 8 if work.constexprs["BLOCK_R"] > 32 else 4, 3)
    launch.run(packed_lora_linear_da_kernel, prepared, job.tensors(partials.counters(work.counters, x.device)))
    return job.result()
