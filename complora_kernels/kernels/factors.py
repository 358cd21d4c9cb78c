"""The factors of many layers in one launch: projected into the complement, scaled, cast and laid side by side.

    factor P = factor - (factor U) U^T   (U spans the protected directions)   or   (factor U) U^T   (U spans the rest)

The same kernel folds the factors and projects their gradients, since P is symmetric. Products are float32 in three TF32
ones ("tf32x3": high and low halves of the operands), whatever torch allows elsewhere: a single TF32 product would let a
factor leave the complement.

Factors, bases and results lie anywhere in memory. A table with one row for each program, made once for a set of layers
and kept on the device, says where; offsets count elements from the first factor, the first basis, the first result.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch
from complora_kernels.kernels.kept import keep
from complora_kernels.kernels.rows import groups_of


class Job(NamedTuple):
    """One factor of one layer: `r` vectors of length `d`, and where it and its basis lie and its result goes."""

    factor: int
    factor_stride_r: int
    factor_stride_d: int
    basis: int
    basis_stride_d: int
    out: int
    out_stride_r: int
    out_stride_d: int
    r: int
    d: int
    k: int  # 0: not projected
    complement: int  # 1: the basis spans the complement
    scaled: int  # 1: the result is multiplied by the scaling


FIELDS = len(Job._fields) + 2  # and the first rank and the first element of the program


@triton.jit
def fold_factors_kernel(
    table_ptr,  # [programs, FIELDS], int64
    factor_ptr,  # the first factor, each [r, d] by its strides
    basis_ptr,  # the first basis, each [d, k], k contiguous; where nothing is projected any pointer
    out_ptr,  # the first result
    scaling,
    FIELDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """One program computes BLOCK_R vectors at BLOCK_D of their elements.

    It goes through the basis BLOCK_K directions at a time: the coordinates of its vectors along them, which take all d
    elements, then what they amount to at its own elements. So programs of one factor read its basis again, from the
    cache, and none waits for another.
    """
    row = table_ptr + tl.program_id(0) * FIELDS
    factor_stride_r, factor_stride_d = tl.load(row + 1), tl.load(row + 2)
    basis_offset, basis_stride_d = tl.load(row + 3), tl.load(row + 4)
    if ALIGNED:
        basis_offset, basis_stride_d = tl.multiple_of(basis_offset, 4), tl.multiple_of(basis_stride_d, 4)
    R, D, K = tl.load(row + 8).to(tl.int32), tl.load(row + 9).to(tl.int32), tl.load(row + 10).to(tl.int32)
    r = tl.load(row + 13) + tl.arange(0, BLOCK_R)
    d = tl.load(row + 14) + tl.arange(0, BLOCK_D)
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_K)
    factor_ptrs = factor_ptr + tl.load(row) + r[:, None] * factor_stride_r
    basis_ptrs = basis_ptr + basis_offset + j[None, :]

    inside = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for j0 in range(0, K, BLOCK_K):
        direction_mask = (j0 + j < K)[None, :]
        coordinates = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for i0 in range(0, D, BLOCK_I):
            element_mask = i0 + i < D
            factor = tl.load(
                factor_ptrs + (i0 + i)[None, :] * factor_stride_d,
                mask=(r < R)[:, None] & element_mask[None, :],
                other=0.0,
            ).to(tl.float32)  # [BLOCK_R, BLOCK_I]
            basis = tl.load(
                basis_ptrs + (i0 + i)[:, None] * basis_stride_d + j0,
                mask=element_mask[:, None] & direction_mask,
                other=0.0,
            ).to(tl.float32)  # [BLOCK_I, BLOCK_K]
            coordinates = tl.dot(factor, basis, coordinates, input_precision="tf32x3")  # factor U
        basis = tl.load(
            basis_ptrs + d[:, None] * basis_stride_d + j0, mask=(d < D)[:, None] & direction_mask, other=0.0
        ).to(tl.float32)  # [BLOCK_D, BLOCK_K]
        inside = tl.dot(coordinates, tl.trans(basis), inside, input_precision="tf32x3")  # (factor U) U^T

    mask = (r < R)[:, None] & (d < D)[None, :]
    factor = tl.load(factor_ptrs + d[None, :] * factor_stride_d, mask=mask, other=0.0).to(tl.float32)
    projected = tl.where(tl.load(row + 11) != 0, inside, factor - inside)
    projected = tl.where(tl.load(row + 12) != 0, projected * scaling, projected)
    out_ptrs = out_ptr + tl.load(row + 5) + r[:, None] * tl.load(row + 6) + d[None, :] * tl.load(row + 7)
    tl.store(out_ptrs, projected.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def merge_weight_kernel(
    weight_ptr,  # [N, K]
    A_ptr,  # [P, R, K]
    B_ptr,  # [P, D, R]
    merged_ptr,  # [N, K]
    N,
    K,
    D,
    stride_wn,
    stride_wk,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    ADAPTER_OF_GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes a tile [BLOCK_N, BLOCK_K] of the merged weight, all in one group of D rows."""
    tiles_of_group = tl.cdiv(D, BLOCK_N)
    group, tile_of_group = tl.program_id(0) // tiles_of_group, tl.program_id(0) % tiles_of_group
    owner = (ADAPTER_OF_GROUP >> (4 * group)) & 15
    d = tile_of_group * BLOCK_N + tl.arange(0, BLOCK_N)
    n = (group * D + d).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_mask, column_mask = (d < D)[:, None], (k < K)[None, :]
    update = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for r0 in tl.static_range(0, RANK, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        rank_mask = (owner < ADAPTERS) & (r < RANK)
        B_ptrs = B_ptr + (owner.to(tl.int64) * D + d)[:, None] * RANK + r[None, :]
        A_ptrs = A_ptr + (owner * RANK + r).to(tl.int64)[:, None] * K + k[None, :]
        B = tl.load(B_ptrs, mask=row_mask & rank_mask[None, :], other=0.0)
        A = tl.load(A_ptrs, mask=column_mask & rank_mask[:, None], other=0.0)
        if UPCAST:
            B, A = B.to(tl.float32), A.to(tl.float32)
        update = tl.dot(B, A, update, input_precision="ieee")  # B̃ Ã
    weight_ptrs = weight_ptr + n[:, None] * stride_wn + k[None, :].to(tl.int64) * stride_wk
    weight = tl.load(weight_ptrs, mask=row_mask & column_mask, other=0.0).to(tl.float32)
    merged = (weight + update).to(merged_ptr.dtype.element_ty)  # W + ΔW, rounded once
    tl.store(merged_ptr + n[:, None] * K + k[None, :], merged, mask=row_mask & column_mask)


def fold_factors(
    factors: Sequence[Tensor],  # each [r, d], those of the output side [d, r]; all of one dtype
    bases: Sequence[Tensor | None],  # each [d, k]; None: not projected
    complement: Sequence[bool],  # True: the basis spans the complement
    output_side: Sequence[bool],
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:  # [Σ r d]: the results one after the other, each contiguous in the shape of its factor
    """`A P_in` and, of the output side, `scaling · P_out B`, of all layers in one launch."""
    bases = [basis if basis is None or basis.stride(-1) == 1 else basis.contiguous() for basis in bases]
    first_factor = factors[0]
    first_basis = next((basis for basis in bases if basis is not None), first_factor)
    jobs, size = [], 0
    for factor, basis, rest, output in zip(factors, bases, complement, output_side, strict=True):
        vectors = factor.mT if output else factor  # [r, d]
        r, d = vectors.shape
        k = 0 if basis is None else basis.shape[-1]
        if basis is not None and (basis.shape != (d, k) or k > d or basis.dtype != torch.float32):
            shape = list(basis.shape)
            raise ValueError(f"a basis is {basis.dtype} {shape}, expected torch.float32 [{d}, k] with k <= {d}")
        if max(r, d) >= 2**31:
            raise ValueError(f"a factor has shape {list(factor.shape)}, expected sizes below 2^31")
        job = Job(
            factor=_elements_between(first_factor, factor),
            factor_stride_r=vectors.stride(0),
            factor_stride_d=vectors.stride(1),
            basis=0 if basis is None else _elements_between(first_basis, basis),
            basis_stride_d=0 if basis is None else basis.stride(0),
            out=size,
            out_stride_r=1 if output else d,
            out_stride_d=r if output else 1,
            r=r,
            d=d,
            k=k,
            complement=int(rest and basis is not None),
            scaled=int(output),
        )
        jobs.append(job)
        size += factor.numel()
    out = launch.empty((size,), dtype, first_factor.device)
    if size == 0:
        return launch.rounded(out, dtype)
    block_r, block_d, block_k, block_i = (16, 32, 32, 32) if launch.INTERPRETED else (16, 256, 32, 32)
    table = keep(_table(tuple(jobs), block_r, block_d, first_factor.device))
    aligned = first_basis.data_ptr() % 16 == 0 and all(
        job.basis % 4 == 0 and job.basis_stride_d % 4 == 0 for job in jobs
    )
    with launch.on_device(first_factor.device):
        fold_factors_kernel[(len(table),)](
            table,
            first_factor,
            first_basis,
            out,
            scaling,
            FIELDS=FIELDS,
            ALIGNED=aligned,
            BLOCK_R=block_r,
            BLOCK_D=block_d,
            BLOCK_K=block_k,
            BLOCK_I=block_i,
            num_warps=8,
            num_stages=3,
        )
    return launch.rounded(out, dtype)


def merge_weight(
    linear: AdaptedLinear,  # weight [N, K]
    dtype: torch.dtype,
) -> Tensor:  # [N, K]
    """`round(W + B̃_p Ã_p)` in the rows of adapter p: from a float32 W the one rounding that the plain product needs."""
    weight, A, B = linear.weight, launch.stacked(linear.As), launch.stacked(linear.Bs)  # [P, r, K], [P, D, r]
    (N, K), (P, R, _), groups = weight.shape, A.shape, groups_of(linear)
    merged = launch.empty((N, K), dtype, weight.device)
    block_n, block_k = (32, 32) if launch.INTERPRETED else (64, 64)
    grid = (N // groups.size * triton.cdiv(groups.size, block_n), triton.cdiv(K, block_k))
    with launch.on_device(weight.device):
        merge_weight_kernel[grid](
            weight,
            A,
            B,
            merged,
            N,
            K,
            groups.size,
            *weight.stride(),
            RANK=R,
            ADAPTERS=P,
            ADAPTER_OF_GROUP=groups.adapter_of_group,
            UPCAST=launch.upcast(A.dtype),
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            BLOCK_R=launch.power_of_two(R, 16, 64),
            num_warps=4,
            num_stages=1,
        )
    return launch.rounded(merged, dtype)


def _elements_between(first: Tensor, other: Tensor) -> int:
    address = other.data_ptr()
    elements, rest = divmod(address - first.data_ptr(), first.element_size())
    if rest or (address == 0 and other.numel() > 0):
        raise ValueError(f"a tensor {list(other.shape)} lies at address {address}, expected aligned memory")
    return elements


@functools.lru_cache(maxsize=1024)
def _table(jobs: tuple[Job, ...], block_r: int, block_d: int, device: torch.device) -> Tensor:  # [programs, FIELDS]
    """The jobs cut into programs. Addresses of parameters and bases stay, so that it is copied to the device once."""
    rows = [(*job, r, d) for job in jobs for d in range(0, job.d, block_d) for r in range(0, job.r, block_r)]
    return torch.tensor(rows, dtype=torch.int64).to(device)
