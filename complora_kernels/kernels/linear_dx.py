"""The large product of a backward pass, with the low-rank term in its float32 accumulator.

dX = dY W + Σ_p m_p ∘ (g_p Ã_p)        g_p = dY B̃_p [M, r]
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportOptionalIterable=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch
from complora_kernels.kernels.dropout import dropout_lanes, keep_mask
from complora_kernels.kernels.operands import as_loaded, load_early
from complora_kernels.kernels.rows import RowGroups, groups_of
from complora_kernels.kernels.tiles import MAX_BLOCK_R, MAX_INSIDE_R, LargeProduct, Tiles


@triton.jit
def dx_of_tile(
    rows,  # [BLOCK_M], int64
    tile,  # of BLOCK_K columns
    dY_ptr,  # [M, N]
    weight_ptr,  # [N, K]
    A_ptr,  # [P, R, K]
    B_ptr,  # [P, D, R]
    g_ptr,  # [M, P * R]; only its dtype counts where g is computed and not stored
    seed_ptr,  # [1]
    M,
    K,
    D,
    stride_dm,
    stride_dn,
    stride_wn,
    stride_wk,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    GROUPS: tl.constexpr,
    ADAPTER_OF_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTE_G: tl.constexpr,
    STORE_G: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of dX [BLOCK_M, BLOCK_K] in float32, and the last adapter's g [BLOCK_M, BLOCK_R] with COMPUTE_G.

    g is computed in the loop over N, group by group, and rounded; with STORE_G the first tile of each row stores it.
    Without COMPUTE_G the groups do not matter: D is N and GROUPS is 1.
    """
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_N)
    row_mask, column_mask = (rows < M)[:, None], (k < K)[None, :]
    r = tl.arange(0, BLOCK_R)
    g_ptrs = g_ptr + rows * (ADAPTERS * RANK)
    A_ptrs = A_ptr + r[:, None].to(tl.int64) * K + k[None, :]
    rank_mask = r < RANK
    # More does not fit into registers, nor does it beside what float32 products keep there.
    PIN: tl.constexpr = BLOCK_R <= 32 and A_ptr.dtype.element_ty.primitive_bitwidth == 16
    if BITS > 0:
        seed = tl.load(seed_ptr)

    dX = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    g_rounded = tl.zeros((BLOCK_M, BLOCK_R), g_ptr.dtype.element_ty)
    if not COMPUTE_G and BITS == 0:
        # The end needs these: their latency is that of the first dY and W. Were g not transposed, it would be moved
        # into the layout of the dot here, through shared memory.
        gT = load_early(g_ptrs[None, :] + r[:, None], (rows < M)[None, :] & rank_mask[:, None], PIN)  # [R, BLOCK_M]
        A = load_early(A_ptrs, column_mask & rank_mask[:, None], PIN)  # [BLOCK_R, BLOCK_K]
    if not COMPUTE_G and BITS > 0:
        # Here and not at the end: a masked product takes registers of its own beside those of dX.
        for adapter in tl.range(0, ADAPTERS, num_stages=1):  # one after the other: registers for one mask at a time
            update = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for r0 in tl.static_range(0, RANK, BLOCK_R):
                ranks = (r0 + r < RANK)[:, None]
                first = adapter * RANK + r0
                g = tl.load(g_ptrs[:, None] + (first + r)[None, :], mask=row_mask & tl.trans(ranks), other=0.0)
                A = tl.load(A_ptrs + tl.cast(first, tl.int64) * K, mask=column_mask & ranks, other=0.0)
                if UPCAST:
                    g, A = g.to(tl.float32), A.to(tl.float32)
                update = tl.dot(g, A, update, input_precision=PRECISION)
            keep = keep_mask(seed, adapter, rows, tile * BLOCK_K, threshold, BLOCK_M, BLOCK_K, BITS)
            dX += tl.where(keep, update * keep_scale, 0.0)  # m ∘ (g Ã)

    dY_ptrs = dY_ptr + rows[:, None] * stride_dm + d[None, :].to(tl.int64) * stride_dn
    weight_ptrs = weight_ptr + d[:, None].to(tl.int64) * stride_wn + k[None, :].to(tl.int64) * stride_wk
    for group in tl.static_range(GROUPS):
        owner = (ADAPTER_OF_GROUP >> (4 * group)) & 15
        if COMPUTE_G:
            A_mask = column_mask & (rank_mask & (owner < ADAPTERS))[:, None]
            A = load_early(A_ptrs + tl.cast(owner * RANK, tl.int64) * K, A_mask, PIN)  # [BLOCK_R, BLOCK_K]
            B_ptrs = B_ptr + (owner * D + d).to(tl.int64)[:, None] * RANK + r[None, :]
            g = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for d0 in range(0, D, BLOCK_N):
            inside = EVEN_D | (d0 + d < D)
            dY = tl.load(dY_ptrs, mask=row_mask & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
            W = tl.load(weight_ptrs, mask=column_mask & inside[:, None], other=0.0)  # [BLOCK_N, BLOCK_K]
            if UPCAST:
                dY, W = dY.to(tl.float32), W.to(tl.float32)
            dX = tl.dot(dY, W, dX, input_precision=PRECISION)  # dY W
            if COMPUTE_G and owner < ADAPTERS:
                B = tl.load(B_ptrs, mask=rank_mask[None, :] & inside[:, None], other=0.0)
                if UPCAST:
                    B = B.to(tl.float32)
                g = tl.dot(dY, B, g, input_precision=PRECISION)  # dY B̃
                B_ptrs += BLOCK_N * RANK
            dY_ptrs += BLOCK_N * tl.cast(stride_dn, tl.int64)
            weight_ptrs += BLOCK_N * tl.cast(stride_wn, tl.int64)
        if not EVEN_D:  # the last step of a group may have reached past its end
            overshoot = tl.cast(tl.cdiv(D, BLOCK_N) * BLOCK_N - D, tl.int64)
            dY_ptrs -= overshoot * stride_dn
            weight_ptrs -= overshoot * stride_wn
        if COMPUTE_G and owner < ADAPTERS:
            g_rounded = g.to(g_ptr.dtype.element_ty)
            if STORE_G and tile == 0:
                tl.store(g_ptrs[:, None] + (owner * RANK + r)[None, :], g_rounded, mask=row_mask & rank_mask[None, :])
            if BITS > 0:
                update = tl.dot(g_rounded, as_loaded(A, A_ptr, UPCAST), input_precision=PRECISION)
                keep = keep_mask(seed, owner, rows, tile * BLOCK_K, threshold, BLOCK_M, BLOCK_K, BITS)
                dX += tl.where(keep, update * keep_scale, 0.0)  # m ∘ (g Ã)
            else:
                dX = tl.dot(g_rounded, as_loaded(A, A_ptr, UPCAST), dX, input_precision=PRECISION)  # g Ã
    if not COMPUTE_G and BITS == 0:
        g = tl.trans(as_loaded(gT, g_ptr, UPCAST))
        dX = tl.dot(g, as_loaded(A, A_ptr, UPCAST), dX, input_precision=PRECISION)  # g Ã
        for r0 in tl.static_range(BLOCK_R, RANK, BLOCK_R):  # ranks beyond one block
            ranks = (r0 + r < RANK)[:, None]
            g = tl.load(g_ptrs[:, None] + (r0 + r)[None, :], mask=row_mask & tl.trans(ranks), other=0.0)
            A = tl.load(A_ptrs + tl.cast(r0, tl.int64) * K, mask=column_mask & ranks, other=0.0)
            if UPCAST:
                g, A = g.to(tl.float32), A.to(tl.float32)
            dX = tl.dot(g, A, dX, input_precision=PRECISION)
    return dX, g_rounded


@triton.jit
def packed_lora_linear_dx_kernel(
    dY_ptr,  # [M, N]
    weight_ptr,  # [N, K]
    A_ptr,  # [P, R, K]
    B_ptr,  # [P, D, R]
    g_ptr,  # [M, P * R]
    dX_ptr,  # [M, K]
    seed_ptr,  # [1]
    M,
    N,
    K,
    D,
    stride_dm,
    stride_dn,
    stride_wn,
    stride_wk,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    GROUPS: tl.constexpr,
    ADAPTER_OF_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    COMPUTE_G: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes BLOCK_M rows and BLOCK_K columns of dX.

    Minimum bytes: dY, W, B̃ (with COMPUTE_G), Ã, g and dX once each, `size (M N + N K + P D R + P R K + M P R + M K)`.
    A program loads its rows of dY and its columns of W whole, so that dY is loaded `ceil(K / BLOCK_K)` and W
    `ceil(M / BLOCK_M)` times: all but the first come from the L2.
    """
    tiles = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) % tiles  # neighbours share rows of dY; the weight stays in the cache
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dX, _ = dx_of_tile(
        rows,
        tile,
        dY_ptr,
        weight_ptr,
        A_ptr,
        B_ptr,
        g_ptr,
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
        ADAPTERS,
        GROUPS,
        ADAPTER_OF_GROUP,
        BITS,
        COMPUTE_G,
        COMPUTE_G,
        UPCAST,
        PRECISION,
        EVEN_D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        BLOCK_R,
    )
    store_tile(dX_ptr, dX, rows, tile * BLOCK_K + tl.arange(0, BLOCK_K), M, K)


@triton.jit
def store_tile(
    dX_ptr,  # [M, K]
    dX,  # [BLOCK_M, BLOCK_K]
    rows,  # [BLOCK_M], int64
    k,  # [BLOCK_K]
    M,
    K,
):
    """Rounds a tile of dX to the dtype of the memory and stores it."""
    dX_ptrs = dX_ptr + rows[:, None] * K + k[None, :]
    tl.store(dX_ptrs, dX.to(dX_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (k < K)[None, :])


def packed_lora_linear_dx(
    dY: Tensor,  # [M, N]
    linear: AdaptedLinear,  # weight [N, K]
    g: Tensor | None,  # [M, P r]; None: computed inside, where `fits_inside`
    *,
    tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # dX [M, K], g [M, P r]
    """`dX = dY W + Σ_p m_p ∘ (g_p Ã_p)`."""
    dtype, device, seed, groups = dY.dtype, dY.device, linear.seed, groups_of(linear)
    weight = launch.cast(linear.weight, dtype)
    A, B = launch.stacked(linear.As), launch.stacked(linear.Bs)  # [P, r, K], [P, D, r]; of one [r, K], [D, r]
    (M, N), K, (P, R) = dY.shape, weight.shape[1], launch.adapters_of(linear)
    dropping, compute_g = linear.dropout_p > 0, g is None
    if compute_g and R > MAX_INSIDE_R:
        raise ValueError(f"g=None with rank {R}, expected g above rank {MAX_INSIDE_R}")
    dX = launch.empty((M, K), dtype, device)
    stored_g = launch.empty((M, P * R), dtype, device) if g is None else g
    if not compute_g:
        groups = RowGroups(N, (0,))
        if not dropping:
            P, R = 1, P * R
    crowded = dropping and (compute_g or P > 1)
    product = _product(M, N, K, R, dtype, P if dropping else 0, crowded)
    cut = launch.tiles_for((dY, weight), product, tiles)
    if M > 0:
        strides, precision = (*dY.stride(), *weight.stride()), launch.input_precision(dtype)
        prepared = _launch(product, strides, P, groups, linear.dropout_p, compute_g, dtype, precision, cut)
        tensors = (dY, weight, A, B, stored_g, dX, dY if seed is None else seed)
        launch.run(packed_lora_linear_dx_kernel, prepared, tensors)
    return launch.rounded(dX, dtype), launch.rounded(stored_g, dtype)


@launch.cached
def _product(M: int, N: int, K: int, R: int, dtype: torch.dtype, masks: int, crowded: bool) -> LargeProduct:
    return LargeProduct(M, K, N, 1, R, dtype.itemsize, dtype.itemsize, masks, crowded)


@launch.cached
def _launch(
    product: LargeProduct,
    strides: tuple[int, ...],  # of dY and the weight
    P: int,
    groups: RowGroups,
    dropout_p: float,
    compute_g: bool,
    dtype: torch.dtype,
    precision: str,
    cut: Tiles,
) -> launch.Launch:
    M, N, K, R = product.rows, product.inner, product.columns, product.rank
    dropout = dropout_lanes(dropout_p)
    constexprs = {
        "RANK": R,
        "ADAPTERS": P,
        "GROUPS": len(groups.adapters),
        "ADAPTER_OF_GROUP": groups.adapter_of_group,
        "BITS": dropout.bits,
        "COMPUTE_G": compute_g,
        "UPCAST": launch.upcast(dtype),
        "PRECISION": precision,
        "EVEN_D": groups.size % cut.block_in == 0,
        "BLOCK_M": cut.block_m,
        "BLOCK_N": cut.block_in,
        "BLOCK_K": cut.block_out,
        "BLOCK_R": launch.power_of_two(R, 16, MAX_INSIDE_R if compute_g else MAX_BLOCK_R[dtype]),
    }
    grid = (launch.cdiv(M, cut.block_m) * launch.cdiv(K, cut.block_out),)
    numbers = (M, N, K, groups.size, *strides, dropout.threshold, dropout.scale)
    return launch.Launch(grid, numbers, constexprs, num_warps=cut.num_warps, num_stages=cut.num_stages)
