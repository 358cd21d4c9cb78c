"""The factors of many layers in two launches: projected into the complement, scaled, cast and laid side by side.

    factor P = factor - (factor U) U^T   (U spans the protected directions)   or   (factor U) U^T   (U spans the rest)

The first launch computes the coordinates `factor U` of every factor, the second multiplies them by U^T: each reads
every basis once. Factors that are not projected take part in the second alone.

The same kernels fold the factors and project their gradients, since P is symmetric. Products are float32 in three TF32
ones ("tf32x3": high and low halves of the operands), whatever torch allows elsewhere: a single TF32 product would let a
factor leave the complement.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportArgumentType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.common.shapes import split_like
from complora_kernels.kernels import launch
from complora_kernels.kernels.fold_programs import (
    ALONG_D,
    ALONG_R,
    MIXED,
    Blocks,
    CoordinatesProgram,
    Job,
    Programs,
    ProjectionProgram,
    fold_programs,
)
from complora_kernels.kernels.kept import keep
from complora_kernels.kernels.rows import RowGroups, groups_of

MIXED_LAYOUT = tl.constexpr(MIXED)
ALONG_R_LAYOUT = tl.constexpr(ALONG_R)


@triton.jit
def fold_coordinates_kernel(
    table_ptr,  # [programs, FIELDS], int64: rows of CoordinatesProgram
    factor_ptr,  # the first factor, each [r, d] by its strides
    basis_ptr,  # the first basis, each [d, k], k contiguous
    coordinates_ptr,  # for each factor [splits, r, k], k padded to four
    FIELDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    TF32: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program computes the coordinates of BLOCK_R vectors along BLOCK_K directions, summed over one split of d.

        coordinates[split] = factor[:, split] U[split, :]

    Minimum bytes: every basis that projects read once, 4 d k bytes, and its factor once, r d elements, the coordinates
    of every split written once, 4 splits r k bytes. A factor is read once for each BLOCK_K directions, and a basis once
    for each BLOCK_R vectors: once where r <= BLOCK_R.

    ALIGNED: every basis row starts on 16 bytes and has a multiple of four directions. WIDTH: elements of a factor that
    one load takes; above 1 every factor is contiguous along d or r as LAYOUT says.
    """
    row = table_ptr + tl.program_id(0) * FIELDS
    if LAYOUT == MIXED_LAYOUT:
        if tl.load(row + 9) != 0:
            _coordinates(
                row, factor_ptr, basis_ptr, coordinates_ptr, ALIGNED, WIDTH, True, TF32, BLOCK_R, BLOCK_K, BLOCK_D
            )
        else:
            _coordinates(
                row, factor_ptr, basis_ptr, coordinates_ptr, ALIGNED, WIDTH, False, TF32, BLOCK_R, BLOCK_K, BLOCK_D
            )
    else:
        FIRST_R: tl.constexpr = LAYOUT == ALONG_R_LAYOUT
        _coordinates(
            row, factor_ptr, basis_ptr, coordinates_ptr, ALIGNED, WIDTH, FIRST_R, TF32, BLOCK_R, BLOCK_K, BLOCK_D
        )


@triton.jit
def _coordinates(
    row,
    factor_ptr,
    basis_ptr,
    coordinates_ptr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST_R: tl.constexpr,
    TF32: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    factor_stride_r, factor_stride_d = tl.load(row + 1), tl.load(row + 2)
    basis_stride_d, coordinates_stride_r = tl.load(row + 4), tl.load(row + 6)
    R, K = tl.load(row + 7).to(tl.int32), tl.load(row + 8).to(tl.int32)
    first_d, last_d = tl.multiple_of(tl.load(row + 12).to(tl.int32), BLOCK_D), tl.load(row + 13).to(tl.int32)
    coordinates_stride_r = tl.multiple_of(coordinates_stride_r, 4)
    basis_ptrs = basis_ptr + _multiple(tl.load(row + 3), 4 if ALIGNED else 1)
    basis_stride_d, K = _multiple(basis_stride_d, 4 if ALIGNED else 1), _multiple(K, 4 if ALIGNED else 1)
    last_d = last_d if FIRST_R else _multiple(last_d, WIDTH)
    r = tl.multiple_of(tl.load(row + 10).to(tl.int32), BLOCK_R) + tl.arange(0, BLOCK_R)
    k = tl.multiple_of(tl.load(row + 11).to(tl.int32), BLOCK_K) + tl.arange(0, BLOCK_K)
    d = first_d + tl.arange(0, BLOCK_D)
    factor_ptrs = _tile(
        factor_ptr + _multiple(tl.load(row), WIDTH), r, d, factor_stride_r, factor_stride_d, WIDTH, FIRST_R
    )
    basis_ptrs += d[:, None] * basis_stride_d + k[None, :]

    coordinates = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for d0 in range(first_d, last_d, BLOCK_D):
        rest = d0 + tl.arange(0, BLOCK_D) < last_d
        mask = rest[:, None] & (r < _multiple(R, WIDTH))[None, :] if FIRST_R else (r < R)[:, None] & rest[None, :]
        factor = tl.load(factor_ptrs, mask=mask, other=0.0).to(tl.float32)
        factor = tl.trans(factor) if FIRST_R else factor  # [BLOCK_R, BLOCK_D]
        basis = tl.load(basis_ptrs, mask=rest[:, None] & (k < K)[None, :], other=0.0)  # [BLOCK_D, BLOCK_K]
        coordinates += _product(factor, basis, TF32)  # factor U
        factor_ptrs += BLOCK_D * factor_stride_d
        basis_ptrs += BLOCK_D * basis_stride_d

    coordinates_ptrs = coordinates_ptr + tl.multiple_of(tl.load(row + 5), 4)
    coordinates_ptrs += r[:, None] * coordinates_stride_r + k[None, :]
    tl.store(coordinates_ptrs, coordinates, mask=(r < R)[:, None] & (k < K)[None, :])


@triton.jit
def fold_factors_kernel(
    table_ptr,  # [programs, FIELDS], int64: rows of ProjectionProgram
    factor_ptr,  # the first factor, each [r, d] by its strides
    basis_ptr,  # the first basis, each [d, k], k contiguous; where nothing is projected any pointer
    coordinates_ptr,  # for each factor [splits, r, k], k padded to four; where nothing is projected any pointer
    out_ptr,  # the first result, each [r, d] by its strides
    scaling,
    FIELDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    WIDTH: tl.constexpr,
    LAYOUT: tl.constexpr,
    TF32: tl.constexpr,
    SPLITS: tl.constexpr,  # 0: nothing is projected
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program computes BLOCK_R vectors at BLOCK_D of their elements.

        out = factor - (Σ coordinates[split]) U^T   or   (Σ coordinates[split]) U^T   or factor; of some, times scaling

    The sum goes through the splits in their order, as it reads them.

    Minimum bytes: every basis that projects read once, 4 d k bytes, the coordinates of every split once, 4 splits r k
    bytes, and every factor once, r d elements, every result written once, r d elements. Coordinates are read once for
    each BLOCK_D elements, and a basis once for each BLOCK_R vectors: once where r <= BLOCK_R.

    ALIGNED, WIDTH, LAYOUT: see `fold_coordinates_kernel`.
    """
    row = table_ptr + tl.program_id(0) * FIELDS
    R, D, K = tl.load(row + 11).to(tl.int32), tl.load(row + 12).to(tl.int32), tl.load(row + 13).to(tl.int32)
    r = tl.multiple_of(tl.load(row + 17).to(tl.int32), BLOCK_R) + tl.arange(0, BLOCK_R)
    d = tl.multiple_of(tl.load(row + 18).to(tl.int32), BLOCK_D) + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    K, basis_stride_d = _multiple(K, 4 if ALIGNED else 1), _multiple(tl.load(row + 4), 4 if ALIGNED else 1)
    coordinates_stride_r, splits = tl.multiple_of(tl.load(row + 6), 4), tl.load(row + 7)
    basis_ptrs = basis_ptr + _multiple(tl.load(row + 3), 4 if ALIGNED else 1)
    basis_ptrs += d[:, None] * basis_stride_d + k[None, :]
    coordinates_ptrs = coordinates_ptr + tl.multiple_of(tl.load(row + 5), 4)
    coordinates_ptrs += r[:, None] * coordinates_stride_r + k[None, :]

    inside = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if SPLITS > 0:  # else the pointers are of another dtype, and nothing is multiplied
        for k0 in range(0, K, BLOCK_K):
            rest = (k0 + k < K)[None, :]
            mask = (r < R)[:, None] & rest
            coordinates = tl.load(coordinates_ptrs, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_K]
            for split in tl.static_range(1, SPLITS):
                partial_ptrs = coordinates_ptrs + split * R * coordinates_stride_r
                coordinates += tl.load(partial_ptrs, mask=mask & (split < splits), other=0.0)
            basis = tl.load(basis_ptrs, mask=(d < D)[:, None] & rest, other=0.0)  # [BLOCK_D, BLOCK_K]
            inside += _product(coordinates, tl.trans(basis), TF32)  # (factor U) U^T
            coordinates_ptrs += BLOCK_K
            basis_ptrs += BLOCK_K

    if LAYOUT == MIXED_LAYOUT:
        if tl.load(row + 16) != 0:
            _finish(row, factor_ptr, out_ptr, inside, r, d, R, D, scaling, WIDTH, True)
        else:
            _finish(row, factor_ptr, out_ptr, inside, r, d, R, D, scaling, WIDTH, False)
    else:
        FIRST_R: tl.constexpr = LAYOUT == ALONG_R_LAYOUT
        _finish(row, factor_ptr, out_ptr, inside, r, d, R, D, scaling, WIDTH, FIRST_R)


@triton.jit
def _finish(row, factor_ptr, out_ptr, inside, r, d, R, D, scaling, WIDTH: tl.constexpr, FIRST_R: tl.constexpr):
    """Stores what the coordinates leave of a factor, or make of it."""
    if FIRST_R:
        inside = tl.trans(inside)
        mask = (d < D)[:, None] & (r < _multiple(R, WIDTH))[None, :]
    else:
        mask = (r < R)[:, None] & (d < _multiple(D, WIDTH))[None, :]
    factor_first, out_first = _multiple(tl.load(row), WIDTH), _multiple(tl.load(row + 8), WIDTH)
    factor_ptrs = _tile(factor_ptr + factor_first, r, d, tl.load(row + 1), tl.load(row + 2), WIDTH, FIRST_R)
    out_ptrs = _tile(out_ptr + out_first, r, d, tl.load(row + 9), tl.load(row + 10), WIDTH, FIRST_R)
    factor = tl.load(factor_ptrs, mask=mask, other=0.0).to(tl.float32)
    projected = tl.where(tl.load(row + 14) != 0, inside, factor - inside)
    projected = tl.where(tl.load(row + 15) != 0, projected * scaling, projected)
    tl.store(out_ptrs, projected.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _product(left, right, TF32: tl.constexpr):
    """`left right` of float32 accuracy: of three TF32 products, or one of float32 where the chip has no TF32."""
    if not TF32:
        return tl.dot(left, right, input_precision="ieee")
    left_low, right_low = left - _high(left), right - _high(right)
    product = tl.dot(left_low, _high(right), input_precision="tf32")
    product = tl.dot(_high(left), right_low, product, input_precision="tf32")
    return tl.dot(left - left_low, right - right_low, product, input_precision="tf32")


@triton.jit
def _high(x):
    """The 10 bits of mantissa that a tensor core takes of a float32."""
    return (x.to(tl.int32, bitcast=True) & ~0x1FFF).to(tl.float32, bitcast=True)


@triton.jit
def _tile(first_ptr, r, d, stride_r, stride_d, WIDTH: tl.constexpr, FIRST_R: tl.constexpr):
    """Pointers to a tile [d, r] if FIRST_R, else [r, d]; contiguous along its last dimension where WIDTH is above 1."""
    if FIRST_R:
        ptrs = first_ptr + d[:, None] * _multiple(stride_d, WIDTH) + r[None, :]
    elif WIDTH > 1:
        ptrs = first_ptr + r[:, None] * _multiple(stride_r, WIDTH) + d[None, :]
    else:
        ptrs = first_ptr + r[:, None] * stride_r + d[None, :] * stride_d
    return ptrs


@triton.jit
def _multiple(n, WIDTH: tl.constexpr):
    """n, a multiple of WIDTH, in a form in which the compiler sees that it is one: its loads take so many at a time."""
    return n // WIDTH * WIDTH if WIDTH > 1 else n


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
    """One program computes a tile [BLOCK_N, BLOCK_K] of the merged weight, all in one group of D rows.

    Minimum bytes: W, Ã and B̃ read once, the merged weight written once. A tile reads its part of Ã and of B̃: all but
    the first reads of each come from the L2.
    """
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
    *,
    flat: Tensor | None = None,  # [Σ r d]
) -> Tensor:  # [Σ r d]: the results one after the other, each contiguous in the shape of its factor
    """`A P_in` and, of the output side, `scaling · P_out B`, of all layers in two launches.

    With `flat` the values are those in it, one factor after the other, and of the factors the shapes alone count.

    Raises:
        ValueError: a basis or a factor does not fit.
        RuntimeError: a CUDA graph is being captured, and these factors and bases were not folded before.
    """
    bases = [basis if basis is None or basis.stride(-1) == 1 else basis.contiguous() for basis in bases]
    first_factor = factors[0] if flat is None else flat
    device = first_factor.device
    first_basis = next((basis for basis in bases if basis is not None), first_factor)
    layout = _layout_of(factors, bases, complement, output_side, flat, first_factor, first_basis)
    out = launch.empty((layout.size,), dtype, device)
    if layout.size == 0:
        return launch.rounded(out, dtype)
    if (prepared := layout.prepared.get(device)) is None:
        prepared = layout.prepared[device] = _prepare(layout, device)
    programs = prepared.programs
    keep(programs.coordinates)
    keep(programs.projections)
    coordinates = torch.empty(programs.workspace, dtype=torch.float32, device=device)
    if programs.workspace:
        tensors = (programs.coordinates, first_factor, first_basis, coordinates)
        launch.run(fold_coordinates_kernel, prepared.coordinates, tensors)
    read = coordinates if programs.workspace else first_basis
    tensors = (programs.projections, first_factor, first_basis, read, out)
    launch.run(fold_factors_kernel, _projections(len(programs.projections), scaling, prepared.projections), tensors)
    return launch.rounded(out, dtype)


def blocks_of(rank: int, aligned: bool) -> Blocks:
    """The largest blocks that leave a multiprocessor of sm_90 room for two programs, for factors of this rank or less.

    The fewer directions and elements a program has, the more often factors and coordinates are read again.
    """
    block_r = launch.power_of_two(rank, 16, 64)
    if block_r == 64:
        return Blocks(64, coordinates_k=64, coordinates_d=32, projection_d=64, projection_k=32, stages=3)
    if block_r == 32 or not aligned:
        return Blocks(block_r, coordinates_k=64, coordinates_d=32, projection_d=128, projection_k=16, stages=4)
    return Blocks(16, coordinates_k=128, coordinates_d=32, projection_d=256, projection_k=16, stages=4)


class _Prepared(NamedTuple):
    """The tables of a fold on one device, and the launches that read them."""

    programs: Programs
    coordinates: launch.Launch
    projections: tuple[Any, ...]  # what the second launch follows from beside the scaling


class _Layout(NamedTuple):
    """Where the factors and bases of a fold lie behind the first of each, and what follows from it."""

    jobs: tuple[Job, ...]
    size: int  # the elements of all results
    aligned: bool  # the bases
    width: int  # elements of a factor that are read and written at a time
    blocks: Blocks
    prepared: dict[torch.device, _Prepared]


LAYOUTS: dict[Any, _Layout] = {}  # by distances, shapes and strides: steps have few of them
MAX_LAYOUTS = 256


def _layout_of(
    factors: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    complement: Sequence[bool],
    output_side: Sequence[bool],
    flat: Tensor | None,
    first_factor: Tensor,
    first_basis: Tensor,
) -> _Layout:
    from_factor, from_basis = first_factor.data_ptr(), first_basis.data_ptr()
    key = (
        (first_factor.dtype, from_factor % 16, from_basis % 16, *complement, *output_side),
        tuple([((own := f.data_ptr()) - from_factor, own > 0, f.shape, f.stride()) for f in factors])
        if flat is None
        else _places_in(flat, factors),
        tuple([b if b is None else (b.data_ptr() - from_basis, b.dtype, b.shape, b.stride()) for b in bases]),
    )
    if (layout := LAYOUTS.get(key)) is not None:
        return layout
    placed = factors if flat is None else split_like(flat, factors)
    jobs, size = _jobs(placed, bases, complement, output_side, first_factor, first_basis)
    aligned = from_basis % 16 == 0 and all(job.basis % 4 == job.basis_stride_d % 4 == job.k % 4 == 0 for job in jobs)
    width = 16 // first_factor.element_size()
    while width > 1 and not (from_factor % 16 == 0 and all(_fits_loads(job, width) for job in jobs)):
        width //= 2
    layout = _Layout(tuple(jobs), size, aligned, width, blocks_of(max(job.r for job in jobs), aligned), {})
    if len(LAYOUTS) >= MAX_LAYOUTS:
        LAYOUTS.clear()
    LAYOUTS[key] = layout
    return layout


def _places_in(flat: Tensor, factors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Of each factor [r, d] what the key of its layout has, were it the part of `flat` that holds its values."""
    places, start, size = [], 0, flat.element_size()
    for factor in factors:
        r, d = shape = factor.shape
        places.append((start, True, shape, (d, 1)))
        start += r * d * size
    return tuple(places)


def _prepare(layout: _Layout, device: torch.device) -> _Prepared:
    """Raises RuntimeError where a CUDA graph is being captured, which cannot hold the tables' copy to the device."""
    blocks, width, programs = layout.blocks, layout.width, fold_programs(layout.jobs, layout.blocks, device)
    coordinates = {
        "FIELDS": len(CoordinatesProgram._fields),
        "LAYOUT": programs.coordinates_layout if width > 1 else ALONG_D,
        "BLOCK_K": blocks.coordinates_k,
        "BLOCK_D": blocks.coordinates_d,
        **_shared(layout.aligned, width, blocks),
    }
    options = {"num_warps": 4, "num_stages": launch.stages(blocks.stages)}
    first = launch.Launch((programs.coordinates.shape[0],), (), coordinates, **options)
    order = programs.projections_layout if width > 1 else ALONG_D
    return _Prepared(programs, first, (order, programs.splits, layout.aligned, width, blocks))


def _shared(aligned: bool, width: int, blocks: Blocks) -> dict[str, Any]:
    """The constexprs of both launches."""
    return {"ALIGNED": aligned, "WIDTH": width, "TF32": launch.has_tf32(), "BLOCK_R": blocks.r}


@launch.cached
def _projections(programs: int, scaling: float, follows_from: tuple[Any, ...]) -> launch.Launch:
    order, splits, aligned, width, blocks = follows_from
    constexprs = {
        "FIELDS": len(ProjectionProgram._fields),
        "LAYOUT": order,
        "SPLITS": splits,
        "BLOCK_D": blocks.projection_d,
        "BLOCK_K": blocks.projection_k,
        **_shared(aligned, width, blocks),
    }
    options = {"num_warps": 4, "num_stages": launch.stages(blocks.stages)}
    return launch.Launch((programs,), (scaling,), constexprs, **options)


def _jobs(
    factors: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    complement: Sequence[bool],
    output_side: Sequence[bool],
    first_factor: Tensor,
    first_basis: Tensor,
) -> tuple[list[Job], int]:
    """The factors as jobs, and the elements of all results."""
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
    return jobs, size


def _fits_loads(job: Job, width: int) -> bool:
    """Whether a factor and its result can be read and written `width` elements at a time, along one dimension."""
    step, other, length = (
        (job.factor_stride_r, job.factor_stride_d, job.r)
        if job.along_r
        else (job.factor_stride_d, job.factor_stride_r, job.d)
    )
    return step == 1 and other % width == length % width == job.factor % width == job.out % width == 0


def merge_weight(
    linear: AdaptedLinear,  # weight [N, K]
    dtype: torch.dtype,
) -> Tensor:  # [N, K]
    """`round(W + B̃_p Ã_p)` in the rows of adapter p: from a float32 W the one rounding that the plain product needs."""
    weight = linear.weight
    A, B = launch.stacked(linear.As), launch.stacked(linear.Bs)  # [P, r, K], [P, D, r]; of one [r, K], [D, r]
    (N, K), (P, R), groups = weight.shape, launch.adapters_of(linear), groups_of(linear)
    merged = launch.empty((N, K), dtype, weight.device)
    prepared = _merge((N, K, *weight.stride()), P, R, groups, A.dtype)
    launch.run(merge_weight_kernel, prepared, (weight, A, B, merged))
    return launch.rounded(merged, dtype)


@launch.cached
def _merge(shapes: tuple[int, ...], P: int, R: int, groups: RowGroups, dtype: torch.dtype) -> launch.Launch:
    N, K, *strides = shapes
    block_n, block_k = (32, 32) if launch.INTERPRETED else (64, 64)
    grid = (N // groups.size * launch.cdiv(groups.size, block_n), launch.cdiv(K, block_k))
    constexprs = {
        "RANK": R,
        "ADAPTERS": P,
        "ADAPTER_OF_GROUP": groups.adapter_of_group,
        "UPCAST": launch.upcast(dtype),
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "BLOCK_R": launch.power_of_two(R, 16, 64),
    }
    return launch.Launch(grid, (N, K, groups.size, *strides), constexprs, num_warps=4, num_stages=1)


def _elements_between(first: Tensor, other: Tensor) -> int:
    address = other.data_ptr()
    elements, rest = divmod(address - first.data_ptr(), first.element_size())
    if rest or (address == 0 and other.numel() > 0):
        raise ValueError(f"a tensor {list(other.shape)} lies at address {address}, expected aligned memory")
    return elements
