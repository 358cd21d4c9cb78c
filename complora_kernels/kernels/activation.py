"""The activation inside an MLP: what follows from it, and its gradient.

gelu:        act(z) = z Φ(z)                   act'(z) = Φ(z) + z φ(z)
gelu_tanh:   act(z) = z σ(2u)                  act'(z) = σ + 2u' z σ (1 - σ)
quick_gelu:  act(z) = z σ(1.702 z)             act'(z) = σ + 1.702 z σ (1 - σ)

with u = √(2/π) (z + 0.044715 z³) and σ(2u) = (1 + tanh u) / 2.

a = act(z)      h = drop(a) Ã^T [M, r]      dz = da ∘ act'(z)
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch
from complora_kernels.kernels.dropout import dropout_lanes, keep_mask
from complora_kernels.kernels.linear import MAX_BLOCK_R

GELU, QUICK_GELU, GELU_TANH = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
KINDS = {"gelu": 1, "quick_gelu": 2, "gelu_tanh": 3}


@triton.jit
def activate(z, KIND: tl.constexpr):
    """`act(z)` of float32 values."""
    if KIND == GELU:
        return z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    if KIND == GELU_TANH:
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return z * tl.sigmoid(1.702 * z)


@triton.jit
def activation_slope(z, KIND: tl.constexpr):
    """`act'(z)` of float32 values."""
    if KIND == GELU:
        return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    if KIND == GELU_TANH:
        sigma = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return sigma + 1.5957691216057308 * (1 + 0.134145 * z * z) * z * sigma * (1 - sigma)
    sigma = tl.sigmoid(1.702 * z)
    return sigma + 1.702 * z * sigma * (1 - sigma)


@triton.jit
def activation_fwd_kernel(
    z_ptr,  # [M, K]
    A_ptr,  # [R, K]
    a_ptr,  # [M, K]
    h_ptr,  # [M, R]
    seed_ptr,  # [1]
    M,
    K,
    stride_zm,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    COMPUTE_H: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program computes a and h for BLOCK_M rows and BLOCK_R ranks; the first ranks' programs store a."""
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    chunk = tl.program_id(0) % RANK_BLOCKS  # neighbours share rows of z
    rows = (tl.program_id(0) // RANK_BLOCKS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask, rank_mask = (rows < M)[:, None], (r < RANK)[None, :]
    z_ptrs = z_ptr + rows[:, None] * stride_zm + k[None, :]
    a_ptrs = a_ptr + rows[:, None] * K + k[None, :]
    A_ptrs = A_ptr + r.to(tl.int64)[None, :] * K + k[:, None]
    if BITS > 0:
        seed = tl.load(seed_ptr)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        inside = k0 + k < K
        z = tl.load(z_ptrs, mask=row_mask & inside[None, :], other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_K]
        a = activate(z, KIND).to(a_ptr.dtype.element_ty)
        if chunk == 0:
            tl.store(a_ptrs, a, mask=row_mask & inside[None, :])
        if COMPUTE_H:
            if BITS > 0:
                a = tl.where(keep_mask(seed, 0, rows, k0, threshold, BLOCK_M, BLOCK_K, BITS), a, 0.0)
            A = tl.load(A_ptrs + k0, mask=rank_mask & inside[:, None], other=0.0)  # [BLOCK_K, BLOCK_R]
            if UPCAST:
                a, A = a.to(tl.float32), A.to(tl.float32)
            h = tl.dot(a, A, h, input_precision=PRECISION)  # drop(a) Ã^T
        z_ptrs += BLOCK_K
        a_ptrs += BLOCK_K
    if COMPUTE_H:
        h_ptrs = h_ptr + rows[:, None] * RANK + r[None, :]
        tl.store(h_ptrs, (h * keep_scale).to(h_ptr.dtype.element_ty), mask=row_mask & rank_mask)


@triton.jit
def activation_bwd_kernel(
    da_ptr,  # [M, K]
    z_ptr,  # [M, K]
    dz_ptr,  # [M, K]
    M,
    K,
    stride_dm,
    stride_zm,
    KIND: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns BLOCK_K columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    z = tl.load(z_ptr + row * stride_zm + k, mask=k < K, other=0.0).to(tl.float32)
    da = tl.load(da_ptr + row * stride_dm + k, mask=k < K, other=0.0).to(tl.float32)
    dz = da * activation_slope(z, KIND)  # da ∘ act'(z)
    tl.store(dz_ptr + row * K + k, dz.to(dz_ptr.dtype.element_ty), mask=k < K)


def activation_fwd(
    z: Tensor,  # [M, K]
    activation: str,
    reader: AdaptedLinear | None,  # the product that reads a, of one adapter or without dropout; None: no h
) -> tuple[Tensor, Tensor]:  # a [M, K], h [M, P r]
    """`a = act(z)` and `h = drop(a) Ã^T` in one pass over z."""
    z = launch.contiguous_rows(z)
    A = None if reader is None else launch.stacked(reader.As).flatten(0, 1)  # [P r, K]
    seed = None if reader is None else reader.seed
    (M, K), R = z.shape, 1 if A is None else len(A)
    dropout = dropout_lanes(0.0 if reader is None else reader.dropout_p)
    a = launch.empty((M, K), z.dtype, z.device)
    h = launch.empty((0 if A is None else M, R), z.dtype, z.device)
    block_m, block_k = (32, 32) if launch.INTERPRETED or z.dtype == torch.float32 else (32, 64)
    block_r = launch.power_of_two(R, 16, MAX_BLOCK_R[z.dtype])
    if M > 0:
        with launch.on_device(z.device):
            activation_fwd_kernel[(triton.cdiv(M, block_m) * triton.cdiv(R, block_r),)](
                z,
                z if A is None else A,
                a,
                h,
                z if seed is None else seed,
                M,
                K,
                z.stride(0),
                dropout.threshold,
                dropout.scale,
                RANK=R,
                COMPUTE_H=A is not None,
                BITS=dropout.bits,
                KIND=KINDS[activation],
                UPCAST=launch.upcast(z.dtype),
                PRECISION=launch.input_precision(z.dtype),
                BLOCK_M=block_m,
                BLOCK_K=block_k,
                BLOCK_R=block_r,
                num_warps=4,
                num_stages=3,
            )
    return launch.rounded(a, z.dtype), launch.rounded(h, z.dtype)


def activation_bwd(
    da: Tensor,  # [M, K]
    z: Tensor,  # [M, K]
    activation: str,
) -> Tensor:  # [M, K]
    """`dz = da ∘ act'(z)`."""
    da, z = launch.contiguous_rows(da), launch.contiguous_rows(z)
    M, K = z.shape
    dz = launch.empty((M, K), z.dtype, z.device)
    block_k = launch.power_of_two(K, 64, 1024)
    if M > 0:
        with launch.on_device(z.device):
            activation_bwd_kernel[(M, triton.cdiv(K, block_k))](
                da, z, dz, M, K, da.stride(0), z.stride(0), KIND=KINDS[activation], BLOCK_K=block_k, num_warps=4
            )
    return launch.rounded(dz, z.dtype)
