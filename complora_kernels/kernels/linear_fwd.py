"""The large product of a forward pass, with the low-rank term in its float32 accumulator.

y = x W^T + b + h_p B̃_p^T in the rows of adapter p, + residual        h_p = drop_p(x) Ã_p^T [M, r]
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportOptionalIterable=false, reportAssignmentType=false

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

    Minimum bytes: x, W, Ã (with COMPUTE_H), B̃, h, the bias, the residual and y once each,
    `size (M K + N K + P R K + P D R + M P R + N + M N) + residual_size M N`. A program loads its rows of x and of W
    whole, so that x is loaded `N / BLOCK_N` and W `ceil(M / BLOCK_M)` times: all but the first come from the L2.
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
    h_ptrs = h_ptr + rows * (ADAPTERS * RANK) + owner * RANK
    r = tl.arange(0, BLOCK_R)
    rank_mask = adapted & (r < RANK)

    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if HAS_RESIDUAL:  # the accumulator starts from it: one set of registers for both
        residual_ptrs = residual_ptr + rows[:, None] * stride_rm + n[None, :]
        y += tl.load(residual_ptrs, mask=row_mask & column_mask, other=0.0).to(tl.float32)
    # The end needs these: their latency is that of the first x and W. Were h not transposed, it would be moved into the
    # layout of the dot here, through shared memory.
    PIN: tl.constexpr = not HAS_RESIDUAL and BLOCK_R <= 32  # more does not fit into registers
    B = load_early(B_ptrs + r[:, None], column_mask & rank_mask[:, None], PIN)  # [BLOCK_R, BLOCK_N]
    if not COMPUTE_H:
        hT = load_early(h_ptrs[None, :] + r[:, None], (rows < M)[None, :] & rank_mask[:, None], PIN)  # [R, BLOCK_M]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=d < D, other=0.0)  # [BLOCK_N]

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
        h = (h * keep_scale).to(h_ptr.dtype.element_ty)
        if STORE_H and tile_of_group == 0:
            tl.store(h_ptrs[:, None] + r[None, :], h, mask=row_mask & rank_mask[None, :])
    else:
        h = tl.trans(as_loaded(hT, h_ptr, UPCAST))
    y = tl.dot(h, as_loaded(B, B_ptr, UPCAST), y, input_precision=PRECISION)  # h B̃^T
    for r0 in tl.static_range(BLOCK_R, RANK, BLOCK_R):  # ranks of a given h beyond one block
        rank_mask = adapted & (r0 + r < RANK)
        h = tl.load(h_ptrs[:, None] + (r0 + r)[None, :], mask=row_mask & rank_mask[None, :], other=0.0)
        B = tl.load(B_ptrs + (r0 + r)[:, None], mask=column_mask & rank_mask[:, None], other=0.0)
        if UPCAST:
            h, B = h.to(tl.float32), B.to(tl.float32)
        y = tl.dot(h, B, y, input_precision=PRECISION)
    if HAS_BIAS:
        y += bias.to(tl.float32)[None, :]
    tl.store(y_ptr + rows[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=row_mask & column_mask)


def packed_lora_linear_fwd(
    x: Tensor,  # [M, K]
    linear: AdaptedLinear,  # weight [N, K]
    h: Tensor | None,  # [M, P r]; None: computed inside, where `fits_inside`
    *,
    residual: Tensor | None = None,  # [M, N]
    tiles: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:  # y [M, N], h [M, P r], or [0, P r] when it is neither given nor stored
    """`y = x W^T + b + h_p B̃_p^T` in the rows of adapter p, plus a residual, in the wider dtype of both."""
    x_dtype, device, store_h, seed = x.dtype, x.device, linear.save_h, linear.seed
    weight, groups = launch.cast(linear.weight, x_dtype), groups_of(linear)
    bias = None if linear.bias is None else launch.cast(linear.bias, x_dtype).contiguous()
    A, B = launch.stacked(linear.As), launch.stacked(linear.Bs)  # [P, r, K], [P, D, r]; of one [r, K], [D, r]
    (M, K), N, (P, R) = x.shape, weight.shape[0], launch.adapters_of(linear)
    compute_h = h is None
    if compute_h and R > MAX_INSIDE_R:
        raise ValueError(f"h=None with rank {R}, expected h above rank {MAX_INSIDE_R}")
    if compute_h and linear.columns is not None:
        raise ValueError("h=None with columns, expected h, which packed_lora_linear_h computes")
    residual = None if residual is None else launch.contiguous_rows(residual)
    added = None if residual is None else residual.dtype
    dtype = x_dtype if added is None else torch.promote_types(x_dtype, added)
    dropout_p = linear.dropout_p if compute_h else 0.0
    crowded = dropout_p > 0 or (added is not None and launch.spills_with_residual(device))
    product = _product(M, N, K, len(groups.adapters), R, x_dtype, dtype, added, crowded)
    cut = launch.tiles_for((x, weight), product, tiles)
    y = launch.empty((M, N), dtype, device)
    stored_h = launch.empty((M if store_h else 0, P * R), x_dtype, device) if h is None else h
    if M > 0:
        strides = (*x.stride(), *weight.stride(), 0 if residual is None else residual.stride(0))
        flags = (bias is not None, residual is not None, compute_h, store_h)
        precision = launch.input_precision(x_dtype)
        prepared = _launch(product, strides, P, groups, dropout_p, *flags, x_dtype, precision, cut)
        tensors = (
            x,
            weight,
            x if bias is None else bias,
            A,
            B,
            stored_h,
            x if residual is None else residual,
            y,
            x if seed is None else seed,
        )
        launch.run(packed_lora_linear_fwd_kernel, prepared, tensors)
    return launch.rounded(y, dtype), launch.rounded(stored_h, x_dtype)


@launch.cached
def _product(
    M: int,
    N: int,
    K: int,
    groups: int,
    R: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,  # of y
    added: torch.dtype | None,  # of the residual
    crowded: bool,  # see `LargeProduct`
) -> LargeProduct:
    # On Blackwell the accumulator is in registers only until the loop: it then takes as many for its way to the tensor
    # memory as it has. A residual makes it crowded there.
    moved = dtype.itemsize + (0 if added is None else added.itemsize)
    return LargeProduct(M, N, K, groups, R, x_dtype.itemsize, moved, crowded=crowded)


@launch.cached
def _launch(
    product: LargeProduct,
    strides: tuple[int, ...],  # of x, the weight and the rows of the residual
    P: int,
    groups: RowGroups,
    dropout_p: float,  # of an h that is computed
    has_bias: bool,
    has_residual: bool,
    compute_h: bool,
    store_h: bool,
    dtype: torch.dtype,  # of x
    precision: str,
    cut: Tiles,
) -> launch.Launch:
    M, N, K, R = product.rows, product.columns, product.inner, product.rank
    dropout = dropout_lanes(dropout_p)
    grid = (launch.cdiv(M, cut.block_m) * product.groups * launch.cdiv(groups.size, cut.block_out),)
    constexprs = {
        "RANK": R,
        "ADAPTERS": P,
        "ADAPTER_OF_GROUP": groups.adapter_of_group,
        "BITS": dropout.bits,
        "HAS_BIAS": has_bias,
        "HAS_RESIDUAL": has_residual,
        "COMPUTE_H": compute_h,
        "STORE_H": store_h,
        "UPCAST": launch.upcast(dtype),
        "PRECISION": precision,
        "EVEN_K": K % cut.block_in == 0,
        "BLOCK_M": cut.block_m,
        "BLOCK_N": cut.block_out,
        "BLOCK_K": cut.block_in,
        "BLOCK_R": launch.power_of_two(R, 16, MAX_INSIDE_R if compute_h else MAX_BLOCK_R[dtype]),
    }
    numbers = (M, N, K, groups.size, *strides, dropout.threshold, dropout.scale)
    return launch.Launch(grid, numbers, constexprs, num_warps=cut.num_warps, num_stages=cut.num_stages)
