"""The large products with the low-rank term added to their float32 accumulator, so that each output is rounded once.

    h_p = drop_p(x) Ã_p^T [M, r]      y = x W^T + b + h_p B̃_p^T in the rows of adapter p
    g_p = dY B̃_p [M, r]               dX = dY W + Σ_p m_p ∘ (g_p Ã_p)

P adapters share a weight [N, K] whose rows are groups of D (q, k and v: N = 3 D). Each tile of y lies in one group and
takes its adapter. `ADAPTER_OF_GROUP` holds the adapter of each group, four bits each, 15 for none. h and g are
[M, P r], adapter by adapter.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportOptionalIterable=false

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch
from complora_kernels.kernels.dropout import Dropout, dropout_lanes, keep_mask
from complora_kernels.kernels.rows import RowGroups, groups_of

MAX_INSIDE_R = 64  # ranks that h and g have inside the kernel of a large product
MAX_BLOCK_R = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}  # float32 has no tensor cores: fewer registers


class Tiles(NamedTuple):
    """The tiles of a large product: [BLOCK_M, BLOCK_OUT] of the output, BLOCK_IN of the inner dimension at a time."""

    block_m: int
    block_out: int
    block_in: int
    num_warps: int
    num_stages: int


# By the oldest chip that a row is for. `make aot` prints what each costs in registers and shared memory.
HALF_TILES = {
    120: (Tiles(128, 128, 32, 8, 3), Tiles(64, 128, 32, 4, 4)),  # has the shared memory of 89
    100: (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 4)),
    90: (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 4), Tiles(64, 128, 64, 4, 4)),
    89: (Tiles(128, 128, 32, 8, 3), Tiles(64, 128, 32, 4, 4)),
    80: (Tiles(128, 128, 32, 8, 4), Tiles(64, 128, 32, 4, 4)),
    0: (Tiles(32, 32, 32, 4, 1),),
}
FLOAT32_TILES = {80: (Tiles(64, 64, 32, 4, 3),), 0: (Tiles(32, 32, 32, 4, 1),)}

# AMD's chips keep a stage of a loop in registers on its way to shared memory, of which they have 64 KiB.
CDNA_TILES = {
    torch.float32: (Tiles(64, 64, 32, 4, 2),),
    torch.bfloat16: (Tiles(128, 128, 64, 8, 2), Tiles(128, 128, 32, 4, 2), Tiles(64, 128, 32, 4, 2)),
}
RDNA_TILES = {
    torch.float32: (Tiles(64, 64, 16, 8, 2),),
    torch.bfloat16: (Tiles(128, 128, 32, 8, 2), Tiles(64, 128, 32, 8, 2)),
}

# Loads of single elements need an address each: registers that larger tiles do not leave.
UNALIGNED_TILES = Tiles(64, 64, 32, 4, 2)


def tiles_of(chip: int | str, dtype: torch.dtype, *, crowded: bool = False) -> tuple[Tiles, ...]:
    """The tiles that ship for a chip (`launch.chip`), the default first.

    A kernel is crowded when it needs a mask or a residual beside an accumulator: tiles of 128 elements a thread would
    spill registers there.
    """
    if isinstance(chip, str):
        table = CDNA_TILES if chip.startswith("gfx9") else RDNA_TILES
        return table[torch.float32 if dtype == torch.float32 else torch.bfloat16]
    table = FLOAT32_TILES if dtype == torch.float32 else HALF_TILES
    tiles = table[max(oldest for oldest in table if oldest <= chip)]
    return tuple(t for t in tiles if not crowded or t.block_m * t.block_out < 128 * 32 * t.num_warps)


def fits_inside(rank: int, dtype: torch.dtype, dropout_p: float) -> bool:
    """Whether h or g can be computed in the kernel of the large product, with the registers that its tile leaves."""
    return dtype != torch.float32 and rank <= (32 if dropout_p > 0 else MAX_INSIDE_R)


def candidate_tiles(device: torch.device, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """The tiles worth trying on a device, the default first."""
    return tiles_of(launch.chip(device), dtype)


def _tiles_for(
    operands: tuple[Tensor, Tensor],  # the two of the large product
    wanted: Sequence[int] | None,
    crowded: bool,
) -> Tiles:
    """The tiles that were asked for, where the kernel can take them, else the default."""
    device, dtype = operands[0].device, operands[0].dtype
    if not launch.INTERPRETED and not all(launch.aligned(operand) for operand in operands):
        return UNALIGNED_TILES
    fitting = tiles_of(launch.chip(device), dtype, crowded=crowded)
    return Tiles(*wanted) if wanted in fitting else fitting[0]


@triton.jit
def packed_lora_linear_h_kernel(
    x_ptr,  # [M, K]
    A_ptr,  # [P, R, K]
    h_ptr,  # [M, P * R]
    copy_ptr,  # [M, K], where x is copied to beside h
    columns_ptr,  # [M, P * R]
    seed_ptr,  # [1]
    M,
    K,
    stride_xm,
    stride_xk,
    stride_hm,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    BITS: tl.constexpr,
    COPY_X: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes h for BLOCK_M rows and BLOCK_R ranks of one adapter."""
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
        if COPY_X and chunk == 0:
            copy_ptrs = copy_ptr + rows[:, None] * stride_hm + (k0 + k)[None, :]
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
    h_ptrs = h_ptr + rows[:, None] * stride_hm + pr
    tl.store(h_ptrs, (h * keep_scale).to(h_ptr.dtype.element_ty), mask=row_mask & rank_mask)


@triton.jit
def packed_lora_linear_fwd_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # [N]
    A_ptr,  # [P, R, K]
    B_ptr,  # [P, D, R]
    h_ptr,  # [M, P * R]
    residual_ptr,  # [M, N]
    y_ptr,  # [M, N]
    seed_ptr,  # [1]
    M,
    N,
    K,
    D,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_rm,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    ADAPTERS: tl.constexpr,
    ADAPTER_OF_GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    COMPUTE_H: tl.constexpr,
    STORE_H: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes BLOCK_M rows and BLOCK_N columns of y, all in the D columns of one group.

    With COMPUTE_H it computes its adapter's h in the same loop over K, and the first tile of a group stores it.
    """
    tiles_of_group = tl.cdiv(D, BLOCK_N)
    tiles = tiles_of_group * (N // D)
    tile = tl.program_id(0) % tiles  # neighbours share rows of x; the weight stays in the cache
    group, tile_of_group = tile // tiles_of_group, tile % tiles_of_group
    owner = (ADAPTER_OF_GROUP >> (4 * group)) & 15
    adapted = owner < ADAPTERS

    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tile_of_group * BLOCK_N + tl.arange(0, BLOCK_N)
    n = (group * D + d).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    row_mask, column_mask = (rows < M)[:, None], (d < D)[None, :]
    B_ptrs = B_ptr + (owner.to(tl.int64) * D + d)[None, :] * RANK
    h_ptrs = h_ptr + rows[:, None] * (ADAPTERS * RANK) + owner * RANK

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if not COMPUTE_H:
        for r0 in tl.static_range(0, RANK, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            h = tl.load(h_ptrs + r[None, :], mask=row_mask & adapted & (r < RANK)[None, :], other=0.0)
            B = tl.load(B_ptrs + r[:, None], mask=column_mask & adapted & (r < RANK)[:, None], other=0.0)
            if UPCAST:
                h, B = h.to(tl.float32), B.to(tl.float32)
            y = tl.dot(h, B, y, input_precision=PRECISION)  # h B̃^T

    r = tl.arange(0, BLOCK_R)
    rank_mask = adapted & (r < RANK)
    A_ptrs = A_ptr + (owner * RANK + r).to(tl.int64)[None, :] * K + k[:, None]
    x_ptrs = x_ptr + rows[:, None] * stride_xm + k[None, :].to(tl.int64) * stride_xk
    weight_ptrs = weight_ptr + n[None, :] * stride_wn + k[:, None].to(tl.int64) * stride_wk
    if COMPUTE_H and BITS > 0:
        seed = tl.load(seed_ptr)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        inside = EVEN_K | (k0 + k < K)
        x = tl.load(x_ptrs, mask=row_mask & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        W = tl.load(weight_ptrs, mask=column_mask & inside[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        if UPCAST:
            x, W = x.to(tl.float32), W.to(tl.float32)
        y = tl.dot(x, W, y, input_precision=PRECISION)  # x W^T
        if COMPUTE_H:
            A = tl.load(A_ptrs, mask=rank_mask[None, :] & inside[:, None], other=0.0)  # [BLOCK_K, BLOCK_R]
            if BITS > 0:
                x = tl.where(keep_mask(seed, owner, rows, k0, threshold, BLOCK_M, BLOCK_K, BITS), x, 0.0)
            if UPCAST:
                A = A.to(tl.float32)
            h = tl.dot(x, A, h, input_precision=PRECISION)  # (mask ∘ x) Ã^T
            A_ptrs += BLOCK_K
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        weight_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)

    if COMPUTE_H:
        h_rounded = (h * keep_scale).to(h_ptr.dtype.element_ty)
        if STORE_H and tile_of_group == 0:
            tl.store(h_ptrs + r[None, :], h_rounded, mask=row_mask & rank_mask[None, :])
        B = tl.load(B_ptrs + r[:, None], mask=column_mask & rank_mask[:, None], other=0.0)
        if UPCAST:
            B = B.to(tl.float32)
        y = tl.dot(h_rounded, B, y, input_precision=PRECISION)  # h B̃^T
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + rows[:, None] * stride_rm + n[None, :]
        y += tl.load(residual_ptrs, mask=row_mask & column_mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=row_mask & column_mask)


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

    With COMPUTE_G it computes g in the same loop over N, group by group, and the first tile of each row stores it.
    Without it the groups do not matter: D is N and GROUPS is 1.
    """
    tiles = tl.cdiv(K, BLOCK_K)
    tile = tl.program_id(0) % tiles  # neighbours share rows of dY; the weight stays in the cache
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_N)
    row_mask, column_mask = (rows < M)[:, None], (k < K)[None, :]
    g_ptrs = g_ptr + rows[:, None] * (ADAPTERS * RANK)
    A_ptrs = A_ptr + k[None, :]
    if BITS > 0:
        seed = tl.load(seed_ptr)

    dX = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if not COMPUTE_G:
        for adapter in tl.range(0, ADAPTERS, num_stages=1):  # one after the other: registers for one mask at a time
            update = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for r0 in tl.static_range(0, RANK, BLOCK_R):
                r = r0 + tl.arange(0, BLOCK_R)
                pr = (adapter * RANK + r).to(tl.int64)
                g = tl.load(g_ptrs + pr[None, :], mask=row_mask & (r < RANK)[None, :], other=0.0)
                A = tl.load(A_ptrs + pr[:, None] * K, mask=column_mask & (r < RANK)[:, None], other=0.0)
                if UPCAST:
                    g, A = g.to(tl.float32), A.to(tl.float32)
                if BITS > 0:
                    update = tl.dot(g, A, update, input_precision=PRECISION)
                else:
                    dX = tl.dot(g, A, dX, input_precision=PRECISION)  # g Ã
            if BITS > 0:
                keep = keep_mask(seed, adapter, rows, tile * BLOCK_K, threshold, BLOCK_M, BLOCK_K, BITS)
                dX += tl.where(keep, update * keep_scale, 0.0)  # m ∘ (g Ã)

    dY_ptrs = dY_ptr + rows[:, None] * stride_dm + d[None, :].to(tl.int64) * stride_dn
    weight_ptrs = weight_ptr + d[:, None].to(tl.int64) * stride_wn + k[None, :].to(tl.int64) * stride_wk
    for group in tl.static_range(GROUPS):
        owner = (ADAPTER_OF_GROUP >> (4 * group)) & 15
        r = tl.arange(0, BLOCK_R)
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
                B = tl.load(B_ptrs, mask=(r < RANK)[None, :] & inside[:, None], other=0.0)
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
            if tile == 0:
                tl.store(g_ptrs + (owner * RANK + r)[None, :], g_rounded, mask=row_mask & (r < RANK)[None, :])
            pr = (owner * RANK + r).to(tl.int64)
            A = tl.load(A_ptrs + pr[:, None] * K, mask=column_mask & (r < RANK)[:, None], other=0.0)
            if UPCAST:
                A = A.to(tl.float32)
            update = tl.dot(g_rounded, A, input_precision=PRECISION)  # g Ã
            if BITS > 0:
                keep = keep_mask(seed, owner, rows, tile * BLOCK_K, threshold, BLOCK_M, BLOCK_K, BITS)
                update = tl.where(keep, update * keep_scale, 0.0)  # m ∘ (g Ã)
            dX += update
    dX_ptrs = dX_ptr + rows[:, None] * K + k[None, :]
    tl.store(dX_ptrs, dX.to(dX_ptr.dtype.element_ty), mask=row_mask & column_mask)


def packed_lora_linear_h(
    x: Tensor,  # [M, K]
    linear: AdaptedLinear,  # its As, dropout and columns are read
    *,
    beside_x: bool = False,
) -> Tensor:  # [M, P r], or [M, K + P r] = [x | h] beside x
    """`h_p = drop_p(x) Ã_p^T`, 0 outside the columns of each row, in one pass over x, which it can copy beside h."""
    A, seed = launch.stacked(linear.As), linear.seed  # [P, r, K]
    (M, K), (P, R, _) = x.shape, A.shape
    dropout = dropout_lanes(linear.dropout_p)
    if not dropout.bits:
        P, R = 1, P * R  # without masks of their own the adapters are one of more ranks
    width = K + P * R if beside_x else P * R
    result = launch.empty((M, -(-width // 8) * 8 if beside_x else width), x.dtype, x.device)
    if beside_x:
        result = result[:, :width]  # rows start on 16 bytes, as cuBLAS wants them
    h = result[:, K:] if beside_x else result
    columns = None if linear.columns is None else linear.columns.contiguous().view(torch.uint8)
    block_r = launch.power_of_two(R, 16, MAX_BLOCK_R[x.dtype])
    block_m, block_k = (32, 32) if launch.INTERPRETED or x.dtype == torch.float32 else (64, 64)
    if M > 0:
        with launch.on_device(x.device):
            packed_lora_linear_h_kernel[(triton.cdiv(M, block_m) * P * triton.cdiv(R, block_r),)](
                x,
                A,
                h,
                result,
                x if columns is None else columns,
                x if seed is None else seed,
                M,
                K,
                *x.stride(),
                result.stride(0),
                dropout.threshold,
                dropout.scale,
                RANK=R,
                ADAPTERS=P,
                BITS=dropout.bits,
                COPY_X=beside_x,
                HAS_COLUMNS=columns is not None,
                UPCAST=launch.upcast(x.dtype),
                PRECISION=launch.input_precision(x.dtype),
                EVEN_K=K % block_k == 0,
                BLOCK_M=block_m,
                BLOCK_K=block_k,
                BLOCK_R=block_r,
                num_warps=4,
                num_stages=3,
            )
    return launch.rounded(result, x.dtype)


def packed_lora_linear_fwd(
    x: Tensor,  # [M, K]
    linear: AdaptedLinear,  # weight [N, K]
    h: Tensor | None,  # [M, P r]; None: computed inside, where `fits_inside`
    *,
    residual: Tensor | None = None,  # [M, N]
    tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # y [M, N], h [M, P r], or [0, P r] when it is neither given nor stored
    """`y = x W^T + b + h_p B̃_p^T` in the rows of adapter p, plus a residual, in the wider dtype of both."""
    weight, store_h, seed, groups = linear.weight.to(x.dtype), linear.save_h, linear.seed, groups_of(linear)
    bias = None if linear.bias is None else linear.bias.to(x.dtype).contiguous()
    A, B = launch.stacked(linear.As), launch.stacked(linear.Bs)  # [P, r, K], [P, D, r]
    (M, K), N, (P, R, _) = x.shape, weight.shape[0], A.shape
    compute_h = h is None
    if compute_h and R > MAX_INSIDE_R:
        raise ValueError(f"h=None with rank {R}, expected h above rank {MAX_INSIDE_R}")
    if compute_h and linear.columns is not None:
        raise ValueError("h=None with columns, expected h, which packed_lora_linear_h computes")
    dropout = dropout_lanes(linear.dropout_p) if compute_h else Dropout(0, 0, 1.0)
    cut = _tiles_for((x, weight), tiles, crowded=dropout.bits > 0 or residual is not None)
    residual = None if residual is None else launch.contiguous_rows(residual)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = launch.empty((M, N), dtype, x.device)
    stored_h = launch.empty((M if store_h else 0, P * R), x.dtype, x.device) if h is None else h
    if M > 0:
        grid = (triton.cdiv(M, cut.block_m) * len(groups.adapters) * triton.cdiv(groups.size, cut.block_out),)
        with launch.on_device(x.device):
            packed_lora_linear_fwd_kernel[grid](
                x,
                weight,
                x if bias is None else bias,
                A,
                B,
                stored_h,
                x if residual is None else residual,
                y,
                x if seed is None else seed,
                M,
                N,
                K,
                groups.size,
                *x.stride(),
                *weight.stride(),
                0 if residual is None else residual.stride(0),
                dropout.threshold,
                dropout.scale,
                RANK=R,
                ADAPTERS=P,
                ADAPTER_OF_GROUP=groups.adapter_of_group,
                BITS=dropout.bits,
                HAS_BIAS=bias is not None,
                HAS_RESIDUAL=residual is not None,
                COMPUTE_H=compute_h,
                STORE_H=store_h,
                UPCAST=launch.upcast(x.dtype),
                PRECISION=launch.input_precision(x.dtype),
                EVEN_K=K % cut.block_in == 0,
                BLOCK_M=cut.block_m,
                BLOCK_N=cut.block_out,
                BLOCK_K=cut.block_in,
                BLOCK_R=launch.power_of_two(R, 16, MAX_INSIDE_R if compute_h else MAX_BLOCK_R[x.dtype]),
                num_warps=cut.num_warps,
                num_stages=cut.num_stages,
            )
    return launch.rounded(y, dtype), launch.rounded(stored_h, x.dtype)


def packed_lora_linear_dx(
    dY: Tensor,  # [M, N]
    linear: AdaptedLinear,  # weight [N, K]
    g: Tensor | None,  # [M, P r]; None: computed inside, where `fits_inside`
    *,
    tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # dX [M, K], g [M, P r]
    """`dX = dY W + Σ_p m_p ∘ (g_p Ã_p)`."""
    weight, seed, groups = linear.weight.to(dY.dtype), linear.seed, groups_of(linear)
    A, B = launch.stacked(linear.As), launch.stacked(linear.Bs)  # [P, r, K], [P, D, r]
    (M, N), K, (P, R, _) = dY.shape, weight.shape[1], A.shape
    dropout = dropout_lanes(linear.dropout_p)
    compute_g = g is None
    if compute_g and R > MAX_INSIDE_R:
        raise ValueError(f"g=None with rank {R}, expected g above rank {MAX_INSIDE_R}")
    cut = _tiles_for((dY, weight), tiles, crowded=dropout.bits > 0 and (compute_g or P > 1))
    dX = launch.empty((M, K), dY.dtype, dY.device)
    stored_g = launch.empty((M, P * R), dY.dtype, dY.device) if g is None else g
    if not compute_g:
        groups = RowGroups(N, (0,))
        if not dropout.bits:
            P, R = 1, P * R
    if M > 0:
        with launch.on_device(dY.device):
            packed_lora_linear_dx_kernel[(triton.cdiv(M, cut.block_m) * triton.cdiv(K, cut.block_out),)](
                dY,
                weight,
                A,
                B,
                stored_g,
                dX,
                dY if seed is None else seed,
                M,
                N,
                K,
                groups.size,
                *dY.stride(),
                *weight.stride(),
                dropout.threshold,
                dropout.scale,
                RANK=R,
                ADAPTERS=P,
                GROUPS=len(groups.adapters),
                ADAPTER_OF_GROUP=groups.adapter_of_group,
                BITS=dropout.bits,
                COMPUTE_G=compute_g,
                UPCAST=launch.upcast(dY.dtype),
                PRECISION=launch.input_precision(dY.dtype),
                EVEN_D=groups.size % cut.block_in == 0,
                BLOCK_M=cut.block_m,
                BLOCK_N=cut.block_in,
                BLOCK_K=cut.block_out,
                BLOCK_R=launch.power_of_two(R, 16, MAX_INSIDE_R if compute_g else MAX_BLOCK_R[dY.dtype]),
                num_warps=cut.num_warps,
                num_stages=cut.num_stages,
            )
    return launch.rounded(dX, dY.dtype), launch.rounded(stored_g, dY.dtype)
