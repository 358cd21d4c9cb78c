"""B̃ beside the frozen weight, `[W | B̃ | 0]`, written by the kernels that compute h for the product of both."""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch
from complora_kernels.kernels.rows import groups_of

BLOCK_N = 64  # rows of the weight that one program writes B̃ beside


class Beside(NamedTuple):
    """The matrices of a product `[x | h | 0] [W | B̃ | 0]^T`, and how B̃ is written into the second one."""

    B: Tensor  # [P, D, R]
    wide: Tensor  # [N, C]
    K: int
    D: int
    adapter_of_group: int

    @property
    def programs(self) -> int:
        """Programs that write B̃, after those of a kernel itself."""
        return triton.cdiv(len(self.wide), BLOCK_N)


def beside(linear: AdaptedLinear, wide: Tensor) -> Beside:
    """The record of a product whose wide weight is `wide` [N, C]."""
    groups = groups_of(linear)
    B = launch.stacked(linear.Bs)  # [P, D, R]
    return Beside(B, wide, linear.weight.shape[1], groups.size, groups.adapter_of_group)


@triton.jit
def write_factors(
    program,
    B_ptr,  # [P, D, R]
    wide_ptr,  # [N, C]
    N,
    K,
    D,
    stride_wn,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    ADAPTER_OF_GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Writes B̃ beside BLOCK_N rows of W: in the rows of adapter p to columns K + p R ... K + (p + 1) R."""
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    group = n // D
    owner = (ADAPTER_OF_GROUP >> (4 * group)) & 15
    adapted = (n < N) & (owner < ADAPTERS)
    row = owner.to(tl.int64) * D + (n - group * D)  # of B̃
    for r0 in tl.static_range(0, RANK, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        mask = adapted[:, None] & (r < RANK)[None, :]
        B = tl.load(B_ptr + row[:, None] * RANK + r[None, :], mask=mask, other=0.0)  # [BLOCK_N, BLOCK_R]
        columns = K + owner[:, None] * RANK + r[None, :]
        tl.store(wide_ptr + n[:, None].to(tl.int64) * stride_wn + columns, B, mask=mask)


@triton.jit
def pad_rows(
    wide_ptr,  # [M, C], at its column K + R
    rows,  # [BLOCK_M]
    M,
    stride_m,
    PADDING: tl.constexpr,  # C - K - R
):
    """Writes zeros behind h: what memory held there could be NaN."""
    if PADDING > 0:
        c = tl.arange(0, 8)
        mask = (rows < M)[:, None] & (c < PADDING)[None, :]
        zeros = tl.zeros((rows.shape[0], 8), wide_ptr.dtype.element_ty)
        tl.store(wide_ptr + rows[:, None] * stride_m + c[None, :], zeros, mask=mask)
