"""The activation inside an MLP: what follows from it, and its gradient.

gelu:        act(z) = z Φ(z)                   act'(z) = Φ(z) + z φ(z)
gelu_tanh:   act(z) = z σ(2u)                  act'(z) = σ + 2u' z σ (1 - σ)
quick_gelu:  act(z) = z σ(1.702 z)             act'(z) = σ + 1.702 z σ (1 - σ)

with u = √(2/π) (z + 0.044715 z³) and σ(2u) = (1 + tanh u) / 2.

a = act(z)      h = drop(a) Ã^T [M, r]      dz = (da + m ∘ (g Ã)) ∘ act'(z)      dÃ = g^T drop(a) [r, K]

The rank-r term of da may be added here, in float32 and behind the rounded product `dY W`: the slope rescales the sum
before it is rounded, so that a small term is not lost as it would be in da itself.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportArgumentType=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch, partials
from complora_kernels.kernels.beside import (
    BLOCK_N,
    NOTHING_BESIDE,
    Beside,
    Layout,
    in_eights,
    pad_rows,
    write_wide_weight,
)
from complora_kernels.kernels.dropout import dropout_lanes, keep_mask
from complora_kernels.kernels.linear import MAX_BLOCK_R
from complora_kernels.kernels.partials import sum_when_last

GELU, QUICK_GELU, GELU_TANH = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
KINDS = {"gelu": 1, "quick_gelu": 2, "gelu_tanh": 3}
ROWS_PER_SPLIT = 256  # at least, as in the skinny products
SPLIT_PROGRAMS = 264  # programs that dÃ is split over, with all columns: two for each multiprocessor of an H100 or H200
MAX_DA_RANK = 32  # ranks whose dÃ is added up beside dz, with the registers that both leave


@triton.jit
def once(x, PTX: tl.constexpr):
    """x, computed once an element where two layouts read it: the compiler would compute a cheap x again for each.

    A move that it must not repeat, and that no instruction is left of.
    """
    if PTX:
        if x.dtype.primitive_bitwidth == 16:
            return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1)
    return x


@triton.jit
def reciprocal(x, PTX: tl.constexpr):
    """`1 / x` of x >= 1, to 1 ulp; 0 for an infinite x."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def sigmoid(x, PTX: tl.constexpr):
    """`1 / (1 + e^-x)`, exact to a few ulp in both tails, as tanh's approximation is not."""
    power = -1.4426950408889634 * x
    if not PTX:
        power = tl.minimum(power, 127.0)  # of an infinite result hardware makes 0, and NumPy a warning
    return reciprocal(1.0 + tl.exp2(power), PTX)


@triton.jit
def normal_cdf(z, PTX: tl.constexpr):
    """`Φ(z)` to 2e-7, and to 4e-6 of itself for z above -8.

    erfc(x) = t exp(q(t) - x²) with t = 1 / (1 + x / 2) for x >= 0: q is a polynomial that was fitted to the logarithm
    of erfc(x) exp(x²) / t at Chebyshev nodes. Its tail is that of erfc, which `1 - erf` loses.
    """
    x = tl.abs(z) * 0.7071067811865476
    t = reciprocal(1.0 + 0.5 * x, PTX)
    q = 0.1787033975124359 * t - 0.8599414229393005
    q = q * t + 1.565589427947998
    q = q * t - 1.2216228246688843
    q = q * t + 0.3368939161300659
    q = q * t - 0.2101130336523056
    q = q * t + 0.10264156758785248
    q = q * t + 0.3732846677303314
    q = q * t + 1.0000779628753662
    q = q * t - 1.26551353931427
    tail = 0.5 * t * tl.exp2(1.4426950408889634 * (q - x * x))  # Φ(-|z|)
    return tl.where(z < 0, tail, 1.0 - tail)


@triton.jit
def activate(z, KIND: tl.constexpr, PTX: tl.constexpr):
    """`act(z)` of float32 values."""
    if KIND == GELU:
        return z * normal_cdf(z, PTX)
    if KIND == GELU_TANH:
        return z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z), PTX)
    return z * sigmoid(1.702 * z, PTX)


@triton.jit
def activate_with_slope(z, KIND: tl.constexpr, PTX: tl.constexpr):
    """`act(z)` and `act'(z)` of float32 values."""
    if KIND == GELU:
        phi = once(normal_cdf(z, PTX), PTX)
        return z * phi, phi + z * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)
    if KIND == GELU_TANH:
        sigma = once(sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z), PTX), PTX)
        return z * sigma, sigma + 1.5957691216057308 * (1 + 0.134145 * z * z) * z * sigma * (1 - sigma)
    sigma = once(sigmoid(1.702 * z, PTX), PTX)
    return z * sigma, sigma + 1.702 * z * sigma * (1 - sigma)


@triton.jit
def activation_fwd_kernel(
    z_ptr,  # [M, K]
    A_ptr,  # [R, K]
    a_ptr,  # [M, K]
    h_ptr,  # [M, R]
    beside_ptr,  # [M, R], at column K of a's rows
    frozen_ptr,  # [N, K]
    B_ptr,  # [B_ADAPTERS, D, B_RANK]
    bias_ptr,  # [N]
    wide_ptr,  # [N, C]
    seed_ptr,  # [1]
    M,
    K,
    N,
    D,
    programs,  # of activations; those after them write `[W | B̃ | 0]`
    stride_zm,
    stride_am,
    stride_fn,
    stride_fk,
    stride_wn,
    threshold,
    keep_scale,
    RANK: tl.constexpr,
    COMPUTE_H: tl.constexpr,
    STORE_H: tl.constexpr,
    PADDING: tl.constexpr,  # columns behind h in a's rows; -1: h is not stored there
    B_RANK: tl.constexpr,
    B_ADAPTERS: tl.constexpr,
    ADAPTER_OF_GROUP: tl.constexpr,
    BIAS_BESIDE: tl.constexpr,  # the first column behind h is of ones, and b the first behind B̃
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program computes a and h for BLOCK_M rows and BLOCK_R ranks; the first ranks' programs store a.

    Minimum bytes: z and Ã read once, a and h written once; where h is stored beside a, W and B̃, and with BIAS_BESIDE
    b, read and written once. With more than BLOCK_R ranks z is read once for each block of them.
    """
    if PADDING >= 0 and tl.program_id(0) >= programs:
        write_wide_weight(
            tl.program_id(0) - programs,
            frozen_ptr,
            B_ptr,
            bias_ptr,
            wide_ptr,
            N,
            K,
            D,
            stride_fn,
            stride_fk,
            stride_wn,
            B_RANK,
            B_ADAPTERS,
            ADAPTER_OF_GROUP,
            BIAS_BESIDE,
            PADDING,
            BLOCK_N,
            BLOCK_R,
        )
        return
    if PADDING >= 0:
        stride_am = in_eights(stride_am)
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R
    chunk = tl.program_id(0) % RANK_BLOCKS  # neighbours share rows of z
    rows = (tl.program_id(0) // RANK_BLOCKS).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask, rank_mask = (rows < M)[:, None], (r < RANK)[None, :]
    z_ptrs = z_ptr + rows[:, None] * stride_zm + k[None, :]
    a_ptrs = a_ptr + rows[:, None] * stride_am + k[None, :]
    A_ptrs = A_ptr + r.to(tl.int64)[None, :] * K + k[:, None]
    if BITS > 0:
        seed = tl.load(seed_ptr)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        inside = EVEN_K | (k0 + k < K)
        z = tl.load(z_ptrs, mask=row_mask & inside[None, :], other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_K]
        a = once(activate(z, KIND, PTX).to(a_ptr.dtype.element_ty), PTX)
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
        h_rounded = (h * keep_scale).to(h_ptr.dtype.element_ty)
        if STORE_H:
            tl.store(h_ptr + rows[:, None] * RANK + r[None, :], h_rounded, mask=row_mask & rank_mask)
        if PADDING >= 0:
            tl.store(beside_ptr + rows[:, None] * stride_am + r[None, :], h_rounded, mask=row_mask & rank_mask)
        if PADDING > 0:
            pad_rows(beside_ptr + RANK, rows, M, stride_am, 1.0 if BIAS_BESIDE else 0.0, PADDING)


@triton.jit
def activation_bwd_kernel(
    da_ptr,  # [M, K]
    z_ptr,  # [M, K]
    g_ptr,  # [M, R]
    A_ptr,  # [R, K]
    dz_ptr,  # [M, K]
    dA_ptr,  # [R, K]
    partials_ptr,  # [SPLITS + GROUPS, R, K]
    counters_ptr,  # [tiles of K, GROUPS + 1]
    seed_ptr,  # [1]
    M,
    K,
    stride_dm,
    stride_zm,
    rows_of_split,
    splits,
    group_of_splits,
    threshold,
    keep_scale,
    RANK: tl.constexpr,  # 0: da is whole
    COMPUTE_DA: tl.constexpr,
    SPLIT: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    UPCAST: tl.constexpr,
    PTX: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program owns BLOCK_K columns of one split of the rows: it adds the rank-r term and adds up its part of dÃ.

    Minimum bytes: da and z read once, dz written once; with the rank-r term g and Ã read once, with dÃ that written
    once, and its partial sums written and read once.
    """
    tiles = tl.cdiv(K, BLOCK_K)
    tile, split = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    k0 = tile * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)
    column_mask = EVEN_K | (k < K)
    if BITS > 0:
        seed = tl.load(seed_ptr)
    first = split * rows_of_split
    dA = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for m0 in range(0, rows_of_split, BLOCK_M):
        rows = first + m0 + tl.arange(0, BLOCK_M)
        row_mask = (rows < M)[:, None]
        mask = row_mask & column_mask[None, :]
        z = tl.load(z_ptr + rows[:, None] * stride_zm + k[None, :], mask=mask, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + rows[:, None] * stride_dm + k[None, :], mask=mask, other=0.0).to(tl.float32)
        value, slope = activate_with_slope(z, KIND, PTX)
        slope = once(slope, PTX)
        if COMPUTE_DA:
            a = once(value.to(z_ptr.dtype.element_ty), PTX)
        if BITS > 0:
            keep = keep_mask(seed, 0, rows, k0, threshold, BLOCK_M, BLOCK_K, BITS)
        if RANK > 0:
            update = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for r0 in tl.static_range(0, RANK, BLOCK_R):
                g_mask, A_mask = row_mask & (r0 + r < RANK)[None, :], (r0 + r < RANK)[:, None] & column_mask[None, :]
                g = tl.load(g_ptr + rows[:, None] * RANK + (r0 + r)[None, :], mask=g_mask, other=0.0)
                A = tl.load(A_ptr + (r0 + r)[:, None].to(tl.int64) * K + k[None, :], mask=A_mask, other=0.0)
                if UPCAST:
                    g, A = g.to(tl.float32), A.to(tl.float32)
                update = tl.dot(g, A, update, input_precision="ieee")  # g Ã
            if BITS > 0:
                update = tl.where(keep, update * keep_scale, 0.0)  # m ∘ (g Ã)
            da += update
        dz = da * slope  # da ∘ act'(z)
        tl.store(dz_ptr + rows[:, None] * K + k[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
        if COMPUTE_DA:  # of one block of ranks
            if BITS > 0:
                a = tl.where(keep, a, 0.0)
            if UPCAST:
                a = a.to(tl.float32)
            dA = tl.dot(tl.trans(a), g, dA, input_precision="ieee")  # (mask ∘ a)^T g
    if COMPUTE_DA:
        sum_when_last(
            (dA * keep_scale,),
            (r[None, :].to(tl.int64) * K + k[:, None],),
            ((k < K)[:, None] & (r < RANK)[None, :],),
            dA_ptr,
            partials_ptr,
            counters_ptr + tile * (tl.cdiv(splits, group_of_splits) + 1),
            RANK * K,
            split,
            splits,
            group_of_splits,
            COUNT=1,
            SPLIT=SPLIT,
        )


def activation_fwd(
    z: Tensor,  # [M, K]
    activation: str,
    reader: AdaptedLinear | None,  # the product that reads a, of one adapter or without dropout; None: no h
    *,
    beside: Beside | None = None,  # the product is one of [a | h | 0] and [W | B̃ | 0]: both are completed
) -> tuple[Tensor, Tensor]:  # a [M, K] or [a | h | 0] [M, C], h [M, P r]
    """`a = act(z)` and `h = drop(a) Ã^T` in one pass over z.

    Where b is a column of `beside`, the matrices are `[a | h | 1 | 0]` and `[W | B̃ | b | 0]`. h is [0, P r] where
    nothing reads it again: it is stored beside a, and the reader does not save it.
    """
    z = launch.contiguous_rows(z)
    A = None if reader is None else flat_factors(reader)  # [P r, K]
    seed = None if reader is None else reader.seed
    dropout_p = 0.0 if reader is None else reader.dropout_p
    (M, K), R, dtype, device = z.shape, 1 if A is None else A.shape[0], z.dtype, z.device
    width = K if beside is None else beside.layout.width
    a = launch.empty((M, width), dtype, device)
    store_h = A is not None and (beside is None or reader is None or reader.save_h)
    h = launch.empty((M if store_h else 0, R), dtype, device)
    if M > 0:
        shapes, flags = (M, K, R, z.stride(0), width), (A is not None, store_h)
        layout = None if beside is None else beside.layout
        how = (dtype, launch.input_precision(dtype), launch.has_ptx())
        prepared = _fwd(shapes, dropout_p, *flags, layout, KINDS[activation], *how)
        tensors = (
            z,
            z if A is None else A,
            a,
            h,
            a if beside is None else a[:, K:],
            z if beside is None else beside.frozen,
            z if beside is None else beside.B,
            z if beside is None or beside.bias is None else beside.bias,
            z if beside is None else beside.wide,
            z if seed is None else seed,
        )
        launch.run(activation_fwd_kernel, prepared, tensors)
    return launch.rounded(a, dtype), launch.rounded(h, dtype)


def flat_factors(linear: AdaptedLinear) -> Tensor:  # [P r, K]
    """The Ãs of a product below each other."""
    A = launch.stacked(linear.As)
    return A if A.dim() == 2 else A.flatten(0, 1)


@launch.cached
def _fwd(
    shapes: tuple[int, ...],  # M, K, R, the distance of the rows of z, the columns of a
    dropout_p: float,
    compute_h: bool,
    store_h: bool,
    beside: Layout | None,
    kind: int,
    dtype: torch.dtype,
    precision: str,
    ptx: bool,
) -> launch.Launch:
    M, K, R, stride, width = shapes
    dropout = dropout_lanes(dropout_p)
    block_m, block_k = (32, 32) if launch.INTERPRETED or dtype == torch.float32 else (32, 64)
    block_r = launch.power_of_two(R, 16, MAX_BLOCK_R[dtype])
    programs = launch.cdiv(M, block_m) * launch.cdiv(R, block_r)
    layout = NOTHING_BESIDE if beside is None else beside
    constexprs = {
        "RANK": R,
        "COMPUTE_H": compute_h,
        "STORE_H": store_h,
        "PADDING": -1 if beside is None else width - K - R,
        **layout.constexprs(),
        "BIAS_BESIDE": layout.has_bias,
        "BITS": dropout.bits,
        "KIND": kind,
        "UPCAST": launch.upcast(dtype),
        "PRECISION": precision,
        "PTX": ptx,
        "EVEN_K": K % block_k == 0,
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "BLOCK_R": block_r,
        "BLOCK_N": BLOCK_N,
    }
    strides = (stride, width, layout.stride_n, layout.stride_k, layout.width)
    numbers = (M, K, layout.N, layout.D, programs, *strides, dropout.threshold, dropout.scale)
    return launch.Launch((programs + layout.programs,), numbers, constexprs, num_warps=4, num_stages=3)


def activation_bwd(
    da: Tensor,  # [M, K]
    z: Tensor,  # [M, K]
    activation: str,
    *,
    g: Tensor | None = None,  # [M, P r]: da lacks its rank-r term, which is added
    reader: AdaptedLinear | None = None,  # the product that read a, of one adapter or without dropout, beside g
    compute_dA: bool = False,  # of at most MAX_DA_RANK ranks in all
) -> tuple[Tensor, Tensor]:  # dz [M, K], dÃ [P r, K], of no rows where it is not computed
    """`dz = (da + m ∘ (g Ã)) ∘ act'(z)` and `dÃ = g^T drop(act(z))` in one pass over da and z."""
    da, z = launch.contiguous_rows(da), launch.contiguous_rows(z)
    A = None if g is None or reader is None else flat_factors(reader)  # [P r, K]
    seed = None if A is None or reader is None else reader.seed
    dropout_p = 0.0 if A is None or reader is None else reader.dropout_p
    (M, K), R, dtype, device = z.shape, 0 if A is None else A.shape[0], z.dtype, z.device
    if compute_dA and not 0 < R <= MAX_DA_RANK:
        raise ValueError(f"compute_dA=True with {R} ranks, expected 1 to {MAX_DA_RANK}")
    dz = launch.empty((M, K), dtype, device)
    dA = launch.empty((R if compute_dA else 0, K), dtype, device)
    if M > 0 or compute_dA:
        shapes = (M, K, R, da.stride(0), z.stride(0))
        work = _bwd(shapes, dropout_p, compute_dA, KINDS[activation], dtype, launch.has_ptx())
        tensors = (
            da,
            z,
            z if g is None else g,
            z if A is None else A,
            dz,
            dA,
            torch.empty((work.partials, R, K), dtype=torch.float32, device=device),
            partials.counters(work.counters, device),
            z if seed is None else seed,
        )
        launch.run(activation_bwd_kernel, work.prepared, tensors)
    return launch.rounded(dz, dtype), launch.rounded(dA, dtype)


class _Bwd(NamedTuple):
    prepared: launch.Launch
    counters: int
    partials: int


@launch.cached
def _bwd(
    shapes: tuple[int, ...],  # M, K, R, the distances of the rows of da and z
    dropout_p: float,
    compute_dA: bool,
    kind: int,
    dtype: torch.dtype,
    ptx: bool,
) -> _Bwd:
    M, K, R, *strides = shapes
    dropout = dropout_lanes(dropout_p)
    # Float32 products, and rows that do not start on 16 bytes (see `tiles.UNALIGNED_TILES`), leave fewer registers.
    small = launch.INTERPRETED or dtype == torch.float32 or K % 8 > 0
    block_m, block_k = (32, 32) if small else (32, 128)
    tiles, wanted = launch.cdiv(K, block_k), launch.cdiv(M, block_m)
    if compute_dA:
        wanted = min(launch.cdiv(M, ROWS_PER_SPLIT), launch.cdiv(SPLIT_PROGRAMS, tiles))
    splits = partials.split_rows(M, wanted, block_m)
    constexprs = {
        "RANK": R,
        "COMPUTE_DA": compute_dA,
        "SPLIT": splits.number > 1,
        "BITS": dropout.bits,
        "KIND": kind,
        "UPCAST": launch.upcast(dtype),
        "PTX": ptx,
        "EVEN_K": K % block_k == 0,
        "BLOCK_M": block_m,
        "BLOCK_K": block_k,
        "BLOCK_R": launch.power_of_two(R, 16, MAX_DA_RANK),
    }
    sizes = (M, K, *strides, splits.rows, splits.number, splits.group)
    numbers, stages = (*sizes, dropout.threshold, dropout.scale), 3 if compute_dA else 1
    prepared = launch.Launch((tiles * splits.number,), numbers, constexprs, num_warps=4, num_stages=stages)
    return _Bwd(prepared, tiles * splits.counters if compute_dA else 0, splits.parts if compute_dA else 0)
