"""g and the gradient of B̃ in one pass over the gradient of the product's output.

    g_p = dY_p B̃_p [M, r]      dB̃_p = dY_p^T h_p [D, r]

dY_p are the columns of adapter p: part of one tensor, or a tensor of their own. Where it has to be in one tensor
afterwards, with g beside it or not, the same pass copies it there.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# Triton knows no starred expressions.
# ruff: noqa: RUF005

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch, partials
from complora_kernels.kernels.linear import MAX_BLOCK_R
from complora_kernels.kernels.partials import is_last, sum_in_order, sum_when_last
from complora_kernels.kernels.rows import RowGroups, groups_of

MAX_POINTERS = 3  # tensors that dY may be in: the gradients of q, k and v
ROWS_PER_SPLIT = 128  # at least: below, storing and adding partial sums would cost more than it brings
WHOLE_G_CHIPS = (90, 100)  # whose tensor cores read both operands from 227 KiB of shared memory


class Tiles(NamedTuple):
    """What one program of a launch holds: `number` tiles of BLOCK_N columns, and how many programs run at a time."""

    block_m: int
    block_n: int
    number: int
    num_warps: int
    num_stages: int
    programs: int


class Job(NamedTuple):
    """A launch that computes g and dB̃, or part of one."""

    work: launch.Work
    tiles: Tiles
    tensors: tuple[Tensor, ...]  # of the kernel, in order, but for the counters
    g: Tensor  # [M, P r], or [TILES, M, P r] float32, as the kernel stores it
    h: Tensor  # [M, P r], rows contiguous
    dB: Tensor  # [P, D, r], as the kernel stores it
    partials: Tensor  # [SPLITS + GROUPS, P, D, r], float32
    packed: Tensor | None  # [M, N], or [M, N + P r, padded to 8] with g beside dY
    g_inside: Tensor | None  # [M, P r]: the place of g in it
    dtype: torch.dtype
    wanted: tuple[bool, bool]  # g, dB̃

    def results(self) -> tuple[Tensor, ...]:
        """What the launch computed: g and dB̃ in the dtype of dY, and the packed dY if there is one."""
        g = self.g if self.g.dim() == 3 else launch.rounded(self.g, self.dtype)
        if self.g_inside is not None and launch.upcast(self.dtype):
            g = self.g_inside.copy_(g)
        dB = launch.rounded(self.dB, self.dtype)
        g, dB = g if self.wanted[0] else g.new_empty(0), dB if self.wanted[1] else dB.new_empty(0)
        return (g, dB) if self.packed is None else (g, dB, self.packed)


@triton.jit
def packed_lora_linear_db_kernel(
    first_program,  # the programs of the launch that come before and compute something else
    dY_ptr,  # [M, N], or [M, D] of the first group
    dY1_ptr,  # [M, D] of the second group
    dY2_ptr,  # [M, D] of the third group
    h_ptr,  # [M, P * R]
    B_ptr,  # [P, D, R]
    g_ptr,  # [M, P * R]
    g_partials_ptr,  # [TILES, M, P * R], float32
    packed_ptr,  # [M, N + PAD]
    dB_ptr,  # [P, D, R]
    partials_ptr,  # [SPLITS + GROUPS, P, D, R], float32
    counters_ptr,  # [tiles of dB̃, GROUPS + 1], then one for each block of g
    M,
    D,
    stride_dm,
    stride_dm1,
    stride_dm2,
    stride_dn,
    stride_hm,
    stride_gm,
    stride_pm,
    rows_of_split,
    splits,
    group_of_splits,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    GROUPS: tl.constexpr,  # of rows of the weight
    ADAPTER_OF_GROUP: tl.constexpr,  # four bits a group
    GROUP_OF_ADAPTER: tl.constexpr,  # four bits an adapter
    POINTERS: tl.constexpr,  # that dY is in
    COMPUTE_G: tl.constexpr,
    SUM_G: tl.constexpr,  # over the tiles, where there are several
    COMPUTE_DB: tl.constexpr,
    PACK: tl.constexpr,
    PAD: tl.constexpr,  # columns behind g, which become zero
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    TILES: tl.constexpr,  # programs that share the columns of one adapter
    COUNT: tl.constexpr,  # tiles of BLOCK_N columns in one program
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program reads COUNT * BLOCK_N columns of one group's dY over one split of the rows, for BLOCK_R ranks.

    It adds up dB̃ for them and stores g, which is whole where these columns are all there are. Else it stores what they
    contribute, and the last program of a split adds that up, in order, or a consumer does.

    Minimum bytes: dY, h and B̃ read once, g and dB written once, and, where dY is packed, dY written once; the partial
    sums of g and of dB written and read once. With more than BLOCK_R ranks dY is read once for each block of them.
    """
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    SLOTS: tl.constexpr = GROUPS if PACK else ADAPTERS
    program = tl.program_id(0) - first_program
    chunk = program % (TILES * SLOTS * RANK_BLOCKS)
    split = (program // (TILES * SLOTS * RANK_BLOCKS)).to(tl.int64)
    tile = chunk % TILES
    slot = chunk // TILES % SLOTS
    rank_block = chunk // (TILES * SLOTS)
    if PACK:
        group, adapter = slot, (ADAPTER_OF_GROUP >> (4 * slot)) & 15
    else:
        group, adapter = (GROUP_OF_ADAPTER >> (4 * slot)) & 15, slot
    r = rank_block * BLOCK_R + tl.arange(0, BLOCK_R)
    pr = adapter * RANK + r
    rank_mask = (r < RANK) & (adapter < ADAPTERS)

    columns_ptr, stride_m = dY_ptr, tl.cast(stride_dm, tl.int64)
    if POINTERS > 1:
        columns_ptr = tl.where(group == 1, dY1_ptr, columns_ptr)
        stride_m = tl.where(group == 1, tl.cast(stride_dm1, tl.int64), stride_m)
    if POINTERS > 2:
        columns_ptr = tl.where(group == 2, dY2_ptr, columns_ptr)
        stride_m = tl.where(group == 2, tl.cast(stride_dm2, tl.int64), stride_m)
    if POINTERS == 1:
        columns_ptr += (group * tl.cast(D, tl.int64)) * stride_dn

    first_column = tile * (COUNT * BLOCK_N)
    of_adapter = adapter.to(tl.int64) * D * RANK
    B, dB = (), ()
    for j in tl.static_range(COUNT):
        if COMPUTE_G:
            d = first_column + j * BLOCK_N + tl.arange(0, BLOCK_N)
            B_ptrs = B_ptr + of_adapter + (d[:, None] * RANK + r[None, :])
            B_tile = tl.load(B_ptrs, mask=(d < D)[:, None] & rank_mask[None, :], other=0.0)  # [BLOCK_N, BLOCK_R]
            if UPCAST:
                B_tile = B_tile.to(tl.float32)
            B = B + (B_tile,)
        dB = dB + (tl.zeros((BLOCK_N, BLOCK_R), tl.float32),)

    first = split * rows_of_split
    for m0 in range(0, rows_of_split, BLOCK_M):
        rows = first + m0 + tl.arange(0, BLOCK_M)
        row_mask = (rows < M)[:, None]
        if COMPUTE_DB:
            h_ptrs = h_ptr + rows[:, None] * stride_hm + pr[None, :]
            h = tl.load(h_ptrs, mask=row_mask & rank_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
            if UPCAST:
                h = h.to(tl.float32)
        g = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        added = ()
        for j in tl.static_range(COUNT):
            d = first_column + j * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = row_mask & (d < D)[None, :]
            dY_ptrs = columns_ptr + rows[:, None] * stride_m + d[None, :].to(tl.int64) * stride_dn
            dY = tl.load(dY_ptrs, mask=inside, other=0.0)  # [BLOCK_M, BLOCK_N]
            if PACK and rank_block == 0:
                packed_ptrs = packed_ptr + rows[:, None] * stride_pm + (group * tl.cast(D, tl.int64) + d)[None, :]
                tl.store(packed_ptrs, dY, mask=inside)
            if UPCAST:
                dY = dY.to(tl.float32)
            if COMPUTE_DB:
                added = added + (tl.dot(tl.trans(dY), h, dB[j], input_precision=PRECISION),)  # dY^T h
            if COMPUTE_G:
                g = tl.dot(dY, B[j], g, input_precision=PRECISION)  # dY B̃
        if COMPUTE_DB:
            dB = added
        if COMPUTE_G:
            g_mask = row_mask & rank_mask[None, :]
            if TILES == 1:
                g_ptrs = g_ptr + rows[:, None] * stride_gm + pr[None, :]
                tl.store(g_ptrs, g.to(g_ptr.dtype.element_ty), mask=g_mask)
            else:
                part = tl.cast(tile, tl.int64) * M + rows
                tl.store(g_partials_ptr + part[:, None] * (ADAPTERS * RANK) + pr[None, :], g, mask=g_mask)
        if PAD > 0 and chunk == 0:
            pad = tl.arange(0, 8)[None, :]
            pad_ptrs = packed_ptr + rows[:, None] * stride_pm + (GROUPS * D + ADAPTERS * RANK + pad)
            tl.store(pad_ptrs, tl.zeros((BLOCK_M, 8), packed_ptr.dtype.element_ty), mask=row_mask & (pad < PAD))

    counters_of_tile = tl.cdiv(splits, group_of_splits) + 1
    if COMPUTE_DB:
        offsets, masks = (), ()
        for j in tl.static_range(COUNT):
            d = first_column + j * BLOCK_N + tl.arange(0, BLOCK_N)
            offsets = offsets + (d[:, None] * RANK + r[None, :],)
            masks = masks + ((d < D)[:, None] & rank_mask[None, :],)
        sum_when_last(
            dB,
            offsets,
            masks,
            dB_ptr + of_adapter,
            partials_ptr + of_adapter,
            counters_ptr + chunk * counters_of_tile,
            ADAPTERS * RANK * D,
            split,
            splits,
            group_of_splits,
            COUNT=COUNT,
            SPLIT=SPLIT,
        )
    if COMPUTE_G and TILES > 1 and SUM_G:
        counters_ptr += TILES * SLOTS * RANK_BLOCKS * counters_of_tile
        if is_last(counters_ptr + split * (SLOTS * RANK_BLOCKS) + chunk // TILES, TILES):
            size = tl.cast(M, tl.int64) * (ADAPTERS * RANK)
            for m0 in range(0, rows_of_split, BLOCK_M):
                rows = first + m0 + tl.arange(0, BLOCK_M)
                g_mask = (rows < M)[:, None] & rank_mask[None, :]
                g_offsets = rows[:, None] * (ADAPTERS * RANK) + pr[None, :]
                g = sum_in_order(g_partials_ptr, g_offsets, g_mask, size, TILES)
                g_ptrs = g_ptr + rows[:, None] * stride_gm + pr[None, :]
                tl.store(g_ptrs, g.to(g_ptr.dtype.element_ty), mask=g_mask)


def tiles_for(
    D: int,
    R: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    compute_g: bool,
    narrow: bool = False,
    columns: int = 128,
) -> Tiles:
    """The tiles of a launch; programs share the columns of an adapter.

    `narrow`: for a launch that computes dÃ too, with at most so many `columns` at a time.
    """
    if launch.INTERPRETED:
        return Tiles(32, 32, min(-(-D // 32), 2), 4, 1, 264)
    if dtype == torch.float32:
        return Tiles(32, 64, 1, 4, 3, 264)
    if narrow or not compute_g:
        return Tiles(64, launch.power_of_two(D, 32, columns if R <= 32 else 64), 1, 4, 3, 264)
    chip = launch.chip(device)
    if isinstance(chip, str) and chip.startswith("gfx1"):  # RDNA: warps of 32 threads, and no more registers a thread
        return Tiles(32, launch.power_of_two(D, 32, 64), 1, 8, 2, 132)
    if R > 32 and chip not in WHOLE_G_CHIPS:  # B̃ and dY lie in registers, as operands of the tensor cores
        return Tiles(32, launch.power_of_two(D, 32, 64), 1, 8, 2, 132)
    # One program with all columns would leave 48 KiB a split for the last program to add: by the model of a GPU that
    # takes longer than partial sums of g do.
    return Tiles(64, launch.power_of_two(D, 32, 256), 1, 8, 3 if R <= 32 else 2, 132)


def db_job(
    dY: Tensor | Sequence[Tensor],  # [M, N], or N / D of [M, D]
    h: Tensor,  # [M, P r], rows at any distance
    linear: AdaptedLinear,
    *,
    compute_g: bool,
    compute_dB: bool,
    partial_g: bool = False,
    pack: bool = False,
    beside: bool = False,
    narrow: bool = False,
    columns: int = 128,
) -> Job:
    """The launch that `packed_lora_linear_db` makes; `narrow`, `columns`: as part of another one, see `tiles_for`."""
    B, groups = launch.stacked(linear.Bs), groups_of(linear)  # [P, D, r]; of one [D, r]
    parts = [dY] if isinstance(dY, Tensor) else list(dY)
    if len(parts) not in (1, len(groups.adapters)):
        raise ValueError(f"dY is {len(parts)} tensors, expected one for each of {len(groups.adapters)} groups of rows")
    if any(part.shape != parts[0].shape or part.dtype != parts[0].dtype for part in parts[1:]):
        said = [(tuple(part.shape), part.dtype) for part in parts]
        raise ValueError(f"dY is {said}, expected tensors of one shape and dtype")
    if len(parts) > MAX_POINTERS:
        parts = [torch.cat(parts, 1)]
    if len(parts) > 1:
        parts = [launch.contiguous_rows(part) for part in parts]
    whole, second, third = parts[0], parts[1 % len(parts)], parts[2 % len(parts)]
    M, D, P, R = whole.shape[0], groups.size, len(linear.rows), B.shape[-1]
    N, dtype, device = linear.weight.shape[0], whole.dtype, whole.device
    pack, compute_g = pack or beside, compute_g or beside
    tiles = tiles_for(D, R, dtype, device, compute_g=compute_g, narrow=narrow, columns=columns)
    h = launch.contiguous_rows(h)
    shapes = (M, N, *whole.stride(), second.stride(0), third.stride(0), h.stride(0))
    outputs = (compute_g, compute_dB, partial_g, pack, beside)
    precision = launch.input_precision(dtype)
    work = _work(shapes, P, R, groups, len(parts), outputs, tiles, dtype, precision, ROWS_PER_SPLIT)
    shared, pad, partial = work.constexprs["TILES"], work.constexprs["PAD"], not work.constexprs["SUM_G"]
    packed = torch.empty((M, N + (P * R + pad if beside else 0)), dtype=dtype, device=device) if pack else None
    g_inside = packed[:, N : N + P * R] if packed is not None and beside else None
    if g_inside is not None and not launch.upcast(dtype):
        g = g_inside
    else:
        g = launch.empty((M, P * R), dtype, device) if compute_g and not partial else whole  # not written to
    g_partials = g
    if compute_g and shared > 1:
        g_partials = torch.empty((shared, M, P * R), dtype=torch.float32, device=device)
    dB = launch.empty((P if compute_dB else 0, D, R), dtype, device)
    splits = work.partials if compute_dB else 0
    sums = torch.empty((splits, P, D, R), dtype=torch.float32, device=device) if splits else dB
    stored = (g, g_partials, whole if packed is None else packed, dB, sums)
    tensors = (whole, second, third, h, B, *stored)
    g, wanted = g_partials if partial else g, (compute_g, compute_dB)
    return Job(work, tiles, tensors, g, h, dB, sums, packed, g_inside, dtype, wanted)


@launch.cached
def _work(
    shapes: tuple[int, ...],  # M, N, the strides of dY, the distances of the rows of its second and third part and of h
    P: int,
    R: int,
    groups: RowGroups,
    pointers: int,
    outputs: tuple[bool, ...],  # compute_g, compute_dB, partial_g, pack, beside
    tiles: Tiles,
    dtype: torch.dtype,
    precision: str,
    rows_per_split: int,
) -> launch.Work:
    M, N, stride_m, stride_n, stride_m1, stride_m2, stride_h = shapes
    compute_g, compute_dB, partial_g, pack, beside = outputs
    D, count = groups.size, len(groups.adapters)
    shared = -(-D // (tiles.block_n * tiles.number))  # programs that share the columns of an adapter
    block_r = launch.power_of_two(R, 16, MAX_BLOCK_R[dtype])
    blocks = (count if pack else P) * -(-R // block_r)
    splits = partials.split_rows(M, min(-(-M // rows_per_split), tiles.programs // (shared * blocks)), tiles.block_m)
    pad = -(N + P * R) % 8 if beside else 0
    width = N + (P * R + pad if beside else 0)  # of the packed dY
    numbers = {
        "M": M,
        "D": D,
        "stride_dm": stride_m,
        "stride_dm1": stride_m1,
        "stride_dm2": stride_m2,
        "stride_dn": stride_n,
        "stride_hm": stride_h,
        "stride_gm": width if beside and not launch.upcast(dtype) else P * R,
        "stride_pm": width if pack else 0,
        "rows_of_split": splits.rows,
        "splits": splits.number,
        "group_of_splits": splits.group,
    }
    constexprs = {
        "RANK": R,
        "ADAPTERS": P,
        "GROUPS": count,
        "ADAPTER_OF_GROUP": groups.adapter_of_group,
        "GROUP_OF_ADAPTER": groups.group_of_adapter,
        "POINTERS": pointers,
        "COMPUTE_G": compute_g,
        "SUM_G": not (compute_g and partial_g and shared > 1 and not beside),
        "COMPUTE_DB": compute_dB,
        "PACK": pack,
        "PAD": pad,
        "SPLIT": splits.number > 1,
        "UPCAST": launch.upcast(dtype),
        "PRECISION": precision,
        "TILES": shared,
        "COUNT": tiles.number,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_R": block_r,
    }
    counters = shared * blocks * splits.counters + splits.number * blocks
    return launch.Work(shared * blocks * splits.number, counters, splits.parts, numbers, constexprs)


def packed_lora_linear_db(
    dY: Tensor | Sequence[Tensor],  # [M, N], or for each of the N / D groups of rows a tensor [M, D]
    h: Tensor,  # [M, P r], rows at any distance; not read unless dB̃ is computed
    linear: AdaptedLinear,  # its Bs and rows are read, and the shape of its weight [N, K]
    *,
    compute_g: bool,
    compute_dB: bool,
    partial_g: bool = False,
    pack: bool = False,
    beside: bool = False,
) -> tuple[Tensor, ...]:  # g [M, P r], dB̃ [P, D, r]; of no elements where they are not computed; packed dY
    """`g_p = dY_p B̃_p` and `dB̃_p = dY_p^T h_p` in one pass over dY.

    With `partial_g`, where no program holds all columns of an adapter, g is [TILES, M, P r] in float32, to be added up
    in the order of the first dimension by whoever reads it. With `pack` dY is also copied to one tensor [M, N], the
    third result; with `beside` to [M, N + P r, padded to a multiple of 8], with g beside it, which is then part of that
    tensor, and zeros behind.

    Raises:
        ValueError: dY is another number of tensors than there are groups of rows, or they differ in shape or dtype.
    """
    job = db_job(
        dY,
        h,
        linear,
        compute_g=compute_g,
        compute_dB=compute_dB,
        partial_g=partial_g,
        pack=pack,
        beside=beside,
    )
    if compute_g or compute_dB or job.packed is not None:
        tiles, counters = job.tiles, partials.counters(job.work.counters, job.dB.device)
        prepared = launch.alone(job.work, tiles.num_warps, launch.stages(tiles.num_stages))
        launch.run(packed_lora_linear_db_kernel, prepared, (*job.tensors, counters))
    return job.results()
