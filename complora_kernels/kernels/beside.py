"""`[W | B̃ | 0]`, the second matrix of a product whose input is `[x | h | 0]`, written by the kernels that compute h.

A product that is added to what its result's memory holds takes no bias of its own: b is then a column of that matrix,
and the input has a column of ones, `[x | h | 1 | 0] [W | B̃ | b | 0]^T`.
It is put together anew for each product: nothing of it is kept that a write to W, or another adapter, could make stale.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch
from complora_kernels.kernels.rows import RowGroups, groups_of

BLOCK_N = 16  # rows of the weight that one program copies


class Layout(NamedTuple):
    """The shapes and distances of a frozen weight and its factors: numbers alone."""

    N: int
    D: int
    stride_n: int  # of W
    stride_k: int
    width: int  # C
    rank: int
    adapters: int
    adapter_of_group: int
    has_bias: bool = False  # whether b is the column behind B̃

    @property
    def programs(self) -> int:
        """Programs that write the matrix, after those of a kernel itself."""
        return launch.cdiv(self.N, BLOCK_N)

    def constexprs(self) -> dict[str, int]:
        """The constexprs of a kernel that calls `write_wide_weight`."""
        return {"B_RANK": self.rank, "B_ADAPTERS": self.adapters, "ADAPTER_OF_GROUP": self.adapter_of_group}


NOTHING_BESIDE = Layout(0, 1, 0, 0, 0, 1, 0, 0)


class Beside(NamedTuple):
    """What `[W | B̃ | 0]`, or `[W | B̃ | b | 0]`, is made of, and the memory that it is written to."""

    frozen: Tensor  # W [N, K]
    B: Tensor  # [P, D, R], of one adapter [D, R]
    wide: Tensor  # [N, C]
    layout: Layout
    bias: Tensor | None = None  # b [N], where it is a column

    def whole(self, dtype: torch.dtype) -> Tensor:  # [N, C]
        """The matrix, after the launch that wrote it."""
        return launch.rounded(self.wide, dtype)


def width(inputs: int, rank: int) -> int:
    """C, the elements of a row of x [M, inputs] and `rank` columns beside it: a multiple of 8, or 16 bytes."""
    return -(-(inputs + rank) // 8) * 8


def beside(linear: AdaptedLinear, dtype: torch.dtype, *, with_bias: bool = False) -> Beside:
    """The record of a product in `dtype`; `with_bias`: b is a column, where the product has one."""
    W, groups, B = linear.weight, groups_of(linear), launch.stacked(linear.Bs)  # [N, K], [P, D, R]; of one [D, R]
    (N, K), (P, R) = W.shape, launch.adapters_of(linear)
    bias = linear.bias.contiguous() if with_bias and linear.bias is not None else None  # [N]
    layout = _layout(N, K, W.stride(0), W.stride(1), R, P, groups, bias is not None)
    return Beside(W, B, launch.empty((N, layout.width), dtype, W.device), layout, bias)


@launch.cached
def _layout(N: int, K: int, stride_n: int, stride_k: int, R: int, P: int, groups: RowGroups, has_bias: bool) -> Layout:
    C = width(K, P * R + has_bias)
    return Layout(N, groups.size, stride_n, stride_k, C, R, P, groups.adapter_of_group, has_bias)


@triton.jit
def in_eights(stride):
    """The distance of rows of C elements, which the compiler then knows to be a multiple of 8: they start on 16 bytes.

    Of an argument it knows multiples of 16 alone.
    """
    return stride // 8 * 8


@triton.jit
def write_wide_weight(
    program,
    frozen_ptr,  # W [N, K]
    B_ptr,  # [P, D, R]
    bias_ptr,  # [N]
    wide_ptr,  # [N, C]
    N,
    K,
    D,
    stride_fn,
    stride_fk,
    stride_wn,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    ADAPTER_OF_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PADDING: tl.constexpr,  # C - K - P R
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Writes BLOCK_N rows of `[W | B̃ | 0]`: in those of adapter p its B̃ stands in the columns from K + p R on.

    With HAS_BIAS the first column behind B̃ is b.
    """
    stride_wn = in_eights(stride_wn)
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = (n < N)[:, None]
    frozen_ptrs = frozen_ptr + n[:, None].to(tl.int64) * stride_fn
    wide_ptrs = wide_ptr + n[:, None].to(tl.int64) * stride_wn
    j = tl.arange(0, 128)
    for k0 in range(0, K, 128):
        k = (k0 + j)[None, :]
        mask = row_mask & (k < K)
        W = tl.load(frozen_ptrs + k.to(tl.int64) * stride_fk, mask=mask, other=0.0)  # [BLOCK_N, 128]
        tl.store(wide_ptrs + k, W.to(wide_ptr.dtype.element_ty), mask=mask)
    group = n // D
    owner = (ADAPTER_OF_GROUP >> (4 * group)) & 15
    row = owner.to(tl.int64) * D + (n - group * D)  # of B̃
    for adapter in tl.static_range(ADAPTERS):
        for r0 in tl.static_range(0, RANK, BLOCK_R):
            r = (r0 + tl.arange(0, BLOCK_R))[None, :]
            mask = row_mask & (r < RANK)
            own = mask & (owner == adapter)[:, None]
            B = tl.load(B_ptr + row[:, None] * RANK + r, mask=own, other=0.0)  # [BLOCK_N, BLOCK_R]
            tl.store(wide_ptrs + K + adapter * RANK + r, B.to(wide_ptr.dtype.element_ty), mask=mask)
    first = 0.0
    if HAS_BIAS:
        first = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]  # [BLOCK_N, 1]
    pad_rows(wide_ptr + K + ADAPTERS * RANK, n.to(tl.int64), N, stride_wn, first, PADDING)


@triton.jit
def pad_rows(
    rows_ptr,  # [M, C], at its column K + R
    rows,  # [BLOCK_M]
    M,
    stride_m,
    first,  # [BLOCK_M, 1] or a number: the first column's values
    PADDING: tl.constexpr,  # C - K - R, at most 8
):
    """Writes one column of values and zeros behind h or B̃: what memory held there could be NaN."""
    if PADDING > 0:
        c = tl.arange(0, 8)
        mask = (rows < M)[:, None] & (c < PADDING)[None, :]
        values = tl.where((rows >= 0)[:, None] & (c == 0)[None, :], first, 0.0)  # [BLOCK_M, 8]
        tl.store(rows_ptr + rows[:, None] * stride_m + c[None, :], values.to(rows_ptr.dtype.element_ty), mask=mask)
