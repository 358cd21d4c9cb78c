"""The large products with the low-rank term added to their float32 accumulator, so that each output is rounded once.

    h_p = drop_p(x) Ã_p^T [M, r]      y = x W^T + b + h_p B̃_p^T in the rows of adapter p
    g_p = dY B̃_p [M, r]               dX = dY W + Σ_p m_p ∘ (g_p Ã_p)

P adapters share a weight [N, K] whose rows are groups of D (q, k and v: N = 3 D). Each tile of y lies in one group and
takes its adapter. `ADAPTER_OF_GROUP` holds the adapter of each group, four bits each, 15 for none. h and g are
[M, P r], adapter by adapter.

The kernel of h stands here, that of y in `linear_fwd`, that of dX in `linear_dx`; this file has the names of all three.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false
# pyright: reportGeneralTypeIssues=false, reportOptionalIterable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch
from complora_kernels.kernels.dropout import dropout_lanes, keep_mask
from complora_kernels.kernels.launch import candidate_tiles
from complora_kernels.kernels.linear_dx import packed_lora_linear_dx
from complora_kernels.kernels.linear_fwd import packed_lora_linear_fwd
from complora_kernels.kernels.tiles import MAX_BLOCK_R, fits_inside, tiles_of

__all__ = [
    "candidate_tiles",
    "fits_inside",
    "packed_lora_linear_dx",
    "packed_lora_linear_fwd",
    "packed_lora_linear_h",
    "tiles_of",
]


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
