"""All gradients of a product with one adapter in one launch, where g is computed in the kernel of dX.

    g = dY B̃ [M, r]    dX = dY W + m ∘ (g Ã)    dÃ = g^T drop(x) [r, K]    dB̃ = dY^T h [D, r]

A program that has computed a tile of dX holds g of its rows: it reads its tile of x and adds to dÃ, so that g is never
stored. dB̃ needs neither and has programs of its own behind those of dX. They are the last ones because they are short
and many: they fill the multiprocessors whose last tile of dX is done, and find the last rows of dY in the L2 cache.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportOptionalIterable=false
# Triton knows no starred expressions.
# ruff: noqa: RUF005

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch, partials
from complora_kernels.kernels.activation import KINDS
from complora_kernels.kernels.da import affine_of_norm, input_of_product
from complora_kernels.kernels.db import db_job, packed_lora_linear_db_kernel
from complora_kernels.kernels.dropout import dropout_lanes
from complora_kernels.kernels.linear_dx import dx_of_tile, store_tile
from complora_kernels.kernels.partials import sum_when_last
from complora_kernels.kernels.rows import RowGroups, groups_of
from complora_kernels.kernels.tiles import MAX_INSIDE_R, UNALIGNED_TILES, LargeProduct, Tiles

DA_ELEMENTS = 64  # of x that a thread holds at a time: dX is stored by then, and its registers are free


@triton.jit
def packed_lora_linear_bwd_kernel(
    dx_programs,  # the first ones; the others are those of dB̃
    dY_ptr,  # [M, N]
    weight_ptr,  # [N, K]
    A_ptr,  # [1, R, K]
    B_ptr,  # [1, D, R]
    dX_ptr,  # [M, K]
    seed_ptr,  # [1]
    x_ptr,  # [M, K]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    norm_weight_ptr,  # [K]
    norm_bias_ptr,  # [K]
    dA_ptr,  # [1, R, K]
    da_partials_ptr,  # [SPLITS + GROUPS, R, K]
    da_counters_ptr,  # [tiles of K, GROUPS + 1]
    h_ptr,  # [M, R]
    dB_ptr,  # [1, D, R]
    db_partials_ptr,  # [SPLITS + GROUPS, D, R]
    db_counters_ptr,
    M,
    N,
    K,
    D,
    stride_dm,
    stride_dn,
    stride_wn,
    stride_wk,
    stride_xm,
    stride_xk,
    stride_hm,
    da_splits,
    da_group_of_splits,
    db_rows_of_split,
    db_splits,
    db_group_of_splits,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,  # of rows of the weight
    ADAPTER_OF_GROUP: tl.constexpr,
    GROUP_OF_ADAPTER: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTE_DA: tl.constexpr,
    DA_SPLIT: tl.constexpr,
    NORMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # 0: none
    COMPUTE_DB: tl.constexpr,
    DB_SPLIT: tl.constexpr,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DA_BLOCK_K: tl.constexpr,  # columns of x that are read at a time
    DB_BLOCK_M: tl.constexpr,
    DB_BLOCK_N: tl.constexpr,
    DB_BLOCK_R: tl.constexpr,
):
    """One program computes a tile of dX and what its rows and columns add to dÃ, or is one of dB̃.

    Minimum bytes: dY, W, B̃, Ã and h read once, dX written once, dB̃ written once; with dÃ x and what the norm needs read
    once, dÃ written once. The partial sums of dÃ, `[R, K]` in float32 for each BLOCK_M rows, and those of dB̃ are
    written and read once. The programs of dX load dY and W as those of `packed_lora_linear_dx_kernel` do; those of dB̃
    read dY once more.
    """
    if tl.program_id(0) < dx_programs:
        tiles = tl.cdiv(K, BLOCK_K)
        tile = tl.program_id(0) % tiles  # neighbours share rows of dY; the weight stays in the cache
        split = (tl.program_id(0) // tiles).to(tl.int64)
        rows = split * BLOCK_M + tl.arange(0, BLOCK_M)
        dX, g = dx_of_tile(
            rows,
            tile,
            dY_ptr,
            weight_ptr,
            A_ptr,
            B_ptr,
            dX_ptr,
            seed_ptr,
            M,
            K,
            D,
            stride_dm,
            stride_dn,
            stride_wn,
            stride_wk,
            threshold,
            keep_scale,
            RANK,
            1,
            GROUPS,
            ADAPTER_OF_GROUP,
            BITS,
            True,
            False,
            UPCAST,
            PRECISION,
            EVEN_D,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            BLOCK_R,
        )
        store_tile(dX_ptr, dX, rows, tile * BLOCK_K + tl.arange(0, BLOCK_K), M, K)
        if COMPUTE_DA:
            seed = tl.load(seed_ptr) if BITS > 0 else 0
            r = tl.arange(0, BLOCK_R)
            dA, offsets, masks = (), (), ()
            for j in tl.static_range(BLOCK_K // DA_BLOCK_K):
                k0 = tile * BLOCK_K + j * DA_BLOCK_K
                k = k0 + tl.arange(0, DA_BLOCK_K)
                weight, bias = affine_of_norm(norm_weight_ptr, norm_bias_ptr, k, K, NORMED, HAS_BIAS)
                x = input_of_product(
                    x_ptr,
                    rows,
                    k0,
                    mean_ptr,
                    rstd_ptr,
                    weight,
                    bias,
                    seed,
                    0,
                    M,
                    K,
                    stride_xm,
                    stride_xk,
                    threshold,
                    dX_ptr.dtype.element_ty,
                    BITS,
                    NORMED,
                    HAS_BIAS,
                    ACTIVATION,
                    UPCAST,
                    PTX,
                    BLOCK_M,
                    DA_BLOCK_K,
                )
                part = tl.dot(tl.trans(x), g, input_precision=PRECISION)  # (mask ∘ x)^T g  [DA_BLOCK_K, BLOCK_R]
                dA = dA + (part * keep_scale,)
                offsets = offsets + (r[None, :] * K + k[:, None],)
                masks = masks + ((k < K)[:, None] & (r < RANK)[None, :],)
            sum_when_last(
                dA,
                offsets,
                masks,
                dA_ptr,
                da_partials_ptr,
                da_counters_ptr + tile * (tl.cdiv(da_splits, da_group_of_splits) + 1),
                RANK * K,
                split,
                da_splits,
                da_group_of_splits,
                COUNT=BLOCK_K // DA_BLOCK_K,
                SPLIT=DA_SPLIT,
            )
    elif COMPUTE_DB:
        packed_lora_linear_db_kernel(
            dx_programs,
            dY_ptr,
            dY_ptr,
            dY_ptr,
            h_ptr,
            dY_ptr,
            dY_ptr,
            dY_ptr,
            dY_ptr,
            dB_ptr,
            db_partials_ptr,
            db_counters_ptr,
            M,
            D,
            stride_dm,
            stride_dm,
            stride_dm,
            stride_dn,
            stride_hm,
            stride_hm,
            stride_dm,
            db_rows_of_split,
            db_splits,
            db_group_of_splits,
            RANK,
            1,
            GROUPS,
            ADAPTER_OF_GROUP,
            GROUP_OF_ADAPTER,
            1,
            False,
            False,
            True,
            False,
            0,
            DB_SPLIT,
            UPCAST,
            PRECISION,
            TILES,
            COUNT,
            DB_BLOCK_M,
            DB_BLOCK_N,
            DB_BLOCK_R,
        )


def packed_lora_linear_bwd(
    dY: Tensor,  # [M, N]
    x: Tensor,  # [M, K]
    h: Tensor,  # [M, r], rows at any distance
    linear: AdaptedLinear,  # weight [N, K], one adapter
    *,
    compute_dA: bool,
    compute_dB: bool,
    norm: Sequence[Tensor | None] | None = None,  # mean, rstd [M], weight, bias [K]
    activation: str | None = None,
    tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # dX [M, K], dÃ [r, K], dB̃ [1, D, r]; of no elements where not computed
    """`dX = dY W + m ∘ (g Ã)`, `dÃ = g^T drop(x)` and `dB̃ = dY^T h` with `g = dY B̃`, of at least one row.

    dÃ with `drop(LN(x))` or `drop(act(x))` where these are given; dX is the gradient of what these compute.

    Raises:
        ValueError: there is not one adapter, its rank is above what g inside takes, or x has no rows.
    """
    dtype, device, seed, groups = dY.dtype, dY.device, linear.seed, groups_of(linear)
    weight = launch.cast(linear.weight, dtype)
    A, B = launch.stacked(linear.As), launch.stacked(linear.Bs)  # [r, K], [D, r]
    (M, N), K, (P, R) = dY.shape, weight.shape[1], launch.adapters_of(linear)
    if P != 1 or R > MAX_INSIDE_R or M == 0:
        raise ValueError(f"{P} adapters of rank {R}, {M} rows, expected 1 of at most {MAX_INSIDE_R}, and 1 row or more")
    cut = launch.tiles_for((dY, weight), _product(M, N, K, R, dtype, linear.dropout_p, compute_dA), tiles)
    columns = 64 if cut == UNALIGNED_TILES else 128
    db = db_job(dY, h, linear, compute_g=False, compute_dB=compute_dB, narrow=True, columns=columns)
    kind = (norm is not None, norm is not None and norm[3] is not None, KINDS[activation] if activation else 0)
    shapes = (M, N, K, R, *dY.stride(), *weight.stride(), *x.stride(), db.h.stride(0))
    how = (dtype, launch.input_precision(dtype), launch.has_ptx(), launch.aligned(x))
    prepared, da = _launch(shapes, groups, linear.dropout_p, (compute_dA, compute_dB), kind, how, cut, db.work)
    dX = launch.empty((M, K), dtype, device)
    dA = launch.empty((R if compute_dA else 0, K), dtype, device)
    splits = da.parts if compute_dA else 0
    da_partials = torch.empty((splits, R, K), dtype=torch.float32, device=device) if splits else dA
    counts = da.counters * launch.cdiv(K, cut.block_out)
    counters = partials.counters(counts + db.work.counters, device)
    mean, rstd, norm_weight, norm_bias = norm or (None,) * 4
    tensors = (
        dY,
        weight,
        A,
        B,
        dX,
        dY if seed is None else seed,
        x,
        x if mean is None else mean,
        x if rstd is None else rstd,
        x if norm_weight is None else norm_weight.contiguous(),
        x if norm_bias is None else norm_bias.contiguous(),
        dA,
        da_partials,
        counters,
        db.h,
        db.dB,
        db.partials,
        counters[counts:],
    )
    launch.run(packed_lora_linear_bwd_kernel, prepared, tensors)
    return launch.rounded(dX, dtype), launch.rounded(dA, dtype), launch.rounded(db.dB, dtype)


@launch.cached
def _product(M: int, N: int, K: int, R: int, dtype: torch.dtype, dropout_p: float, compute_dA: bool) -> LargeProduct:
    drops, size = dropout_p > 0, dtype.itemsize
    moved = 2 * size if compute_dA else size  # x is read where dX is written
    return LargeProduct(M, K, N, 1, R, size, moved, (2 if compute_dA else 1) * drops, crowded=drops)


@launch.cached
def _launch(
    shapes: tuple[int, ...],  # M, N, K, R, the strides of dY, the weight and x, the distance of the rows of h
    groups: RowGroups,
    dropout_p: float,
    wanted: tuple[bool, bool],  # dÃ, dB̃
    kind: tuple[bool, bool, int],  # normed, with a bias, the activation
    how: tuple[torch.dtype, str, bool, bool],  # dtype, precision, PTX, whether x is aligned
    cut: Tiles,
    db: launch.Work,
) -> tuple[launch.Launch, partials.Splits]:
    (M, N, K, R, *strides), (dtype, precision, ptx, aligned) = shapes, how
    dropout = dropout_lanes(dropout_p)
    splits = partials.split_rows(M, launch.cdiv(M, cut.block_m), cut.block_m)
    programs = splits.number * launch.cdiv(K, cut.block_out)
    constexprs = {
        "RANK": R,
        "GROUPS": len(groups.adapters),
        "ADAPTER_OF_GROUP": groups.adapter_of_group,
        "GROUP_OF_ADAPTER": groups.group_of_adapter,
        "BITS": dropout.bits,
        "COMPUTE_DA": wanted[0],
        "DA_SPLIT": splits.number > 1,
        "NORMED": kind[0],
        "HAS_BIAS": kind[1],
        "ACTIVATION": kind[2],
        "COMPUTE_DB": wanted[1],
        "DB_SPLIT": db.constexprs["SPLIT"],
        "TILES": db.constexprs["TILES"],
        "COUNT": db.constexprs["COUNT"],
        "UPCAST": launch.upcast(dtype),
        "PRECISION": precision,
        "PTX": ptx,
        "EVEN_D": groups.size % cut.block_in == 0,
        "BLOCK_M": cut.block_m,
        "BLOCK_N": cut.block_in,
        "BLOCK_K": cut.block_out,
        "BLOCK_R": launch.power_of_two(R, 16, MAX_INSIDE_R),
        "DA_BLOCK_K": _columns_at_a_time(cut, aligned),
        "DB_BLOCK_M": db.constexprs["BLOCK_M"],
        "DB_BLOCK_N": db.constexprs["BLOCK_N"],
        "DB_BLOCK_R": db.constexprs["BLOCK_R"],
    }
    of_db = (db.numbers["rows_of_split"], db.numbers["splits"], db.numbers["group_of_splits"])
    of_sums = (splits.number, splits.group, *of_db)
    numbers = (M, N, K, groups.size, *strides, *of_sums, dropout.threshold, dropout.scale)
    options = {"num_warps": cut.num_warps, "num_stages": cut.num_stages}
    grid = (programs + (db.programs if wanted[1] else 0),)
    return launch.Launch(grid, numbers, constexprs, before=(programs,), **options), splits


def _columns_at_a_time(cut: Tiles, aligned: bool) -> int:
    """The columns of x that a program reads at a time; of rows that start anywhere each element has an address."""
    elements = DA_ELEMENTS if aligned else DA_ELEMENTS // 2
    return min(cut.block_out, max(elements * 32 * cut.num_warps // cut.block_m, 32))
