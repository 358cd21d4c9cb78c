"""The triton backend: operations registered with their fakes, each by the plan of its problem.

Each computes what its namesake in `eager` does. torch.compile takes them as they are; the autograd Functions outside
say what is saved. Plans other than `fused` leave the large products to torch. The first call imports Triton.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from complora_kernels.backends import plans
from complora_kernels.eager import Rows, block_diagonal, check_device, flatten, unflatten
from complora_kernels.kernels.blocks import Blocks, row_blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = torch.library.Library("complora_triton", "DEF")
_LIBRARY.define(
    "packed_lora_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor[] As, Tensor[] Bs, int[] starts, "
    "float dropout_p, Tensor? seed, bool save_h, str precision) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "packed_lora_linear_bwd(Tensor dY, Tensor x, Tensor h, Tensor weight, Tensor[] As, Tensor[] Bs, int[] starts, "
    "float dropout_p, Tensor? seed, bool[] needs, str precision) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "fold_factors(Tensor[] factors, Tensor?[] bases, bool[] complement, bool[] output_side, float scaling, "
    "ScalarType dtype) -> Tensor"
)


def packed_lora_linear_fwd(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], as it is kept: under autocast in a wider dtype than x
    bias: Tensor | None,  # [N]
    As: Sequence[Tensor],  # each [r, K], in the dtype of x
    Bs: Sequence[Tensor],  # each [D, r]
    rows: Rows,
    dropout_p: float,
    seeds: Sequence[Tensor],  # one [1], or none without dropout
    *,
    save_h: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:  # y [..., N], h [M, P r], or [0, P r] unless it is saved
    """`y = x W^T + b + h_p B̃_p^T` in the rows of adapter p, and `h_p = drop_p(x) Ã_p^T`."""
    starts, seed = [start for start, _ in rows], seeds[0] if seeds else None
    return torch.ops.complora_triton.packed_lora_linear_fwd(
        x, weight, bias, As, Bs, starts, dropout_p, seed, save_h, precision
    )


def packed_lora_linear_bwd(
    dY: Tensor,  # [..., N]
    x: Tensor,  # [..., K]
    h: Tensor,  # [M, P r]
    weight: Tensor,  # [N, K]
    As: Sequence[Tensor],  # each [r, K]
    Bs: Sequence[Tensor],  # each [D, r]
    rows: Rows,
    dropout_p: float,
    seeds: Sequence[Tensor],
    needs: tuple[bool, bool, bool],
    *,
    precision: str,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """`g_p = dY_p B̃_p`, `dX = dY W + Σ_p m_p ∘ (g_p Ã_p)`, `dÃ_p = g_p^T drop_p(x)`, `dB̃_p = dY_p^T h_p`.

    `needs` says which of dX, dÃ, dB̃ are computed.
    """
    starts, seed = [start for start, _ in rows], seeds[0] if seeds else None
    dX, dA, dB = torch.ops.complora_triton.packed_lora_linear_bwd(
        dY, x, h, weight, As, Bs, starts, dropout_p, seed, needs, precision
    )
    needs_x, needs_A, needs_B = needs
    nothing: list[Tensor | None] = [None] * len(As)
    return dX if needs_x else None, dA.unbind() if needs_A else nothing, dB.unbind() if needs_B else nothing


def project_complement(
    factor: Tensor,  # [..., d]
    basis: Tensor,  # [d, k]
    basis_kind: str,
) -> Tensor:
    """`factor (I - U U^T)` or `factor U U^T`, in float32."""
    rows = flatten(factor)  # [R, d]
    (projected,) = fold_factors([rows], [basis], [basis_kind], [False], 1.0, [factor.dtype])
    return unflatten(projected, factor.shape)


def fold_factors(
    factors: Sequence[Tensor],  # each [r, d], those of the output side [d, r]; all of one dtype
    bases: Sequence[Tensor | None],  # each [d, k], float32
    kinds: Sequence[str],
    output_side: Sequence[bool],
    scaling: float,
    dtypes: Sequence[torch.dtype],  # all the same
) -> list[Tensor]:  # in the shapes of the factors, parts of one tensor
    """`A P_in` and, of the output side, `scaling · P_out B`: all factors of all layers in one launch."""
    complement = [kind == "complement" for kind in kinds]
    flat = torch.ops.complora_triton.fold_factors(factors, bases, complement, output_side, scaling, dtypes[0])
    return _parts(flat, factors)


def fold_factors_bwd(
    grads: Sequence[Tensor],  # as the factors
    bases: Sequence[Tensor | None],
    kinds: Sequence[str],
    output_side: Sequence[bool],
    scaling: float,
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """The same projections of the gradients, which are gathered first.

    Factors and bases stay where they are and gradients do not: gathered, they too lie at known distances.
    """
    gathered = _parts(torch.cat([grad.reshape(-1) for grad in grads]), grads)
    return fold_factors(gathered, bases, kinds, output_side, scaling, dtypes)


def _parts(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = torch.split(flat, [tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]


def _blocks(weight: Tensor, Bs: Sequence[Tensor], starts: Sequence[int]) -> Blocks:
    blocks = row_blocks([(start, start + len(B)) for start, B in zip(starts, Bs, strict=True)], len(weight))
    if blocks is None:
        raise ValueError(
            f"starts={list(starts)} with Bs {_shapes(Bs)}, expected distinct ones of equal blocks of {len(weight)} rows"
        )
    return blocks


def _plan(x: Tensor, weight: Tensor, As: Sequence[Tensor], dropout_p: float, precision: str) -> plans.Plan:
    from complora_kernels.kernels import linear

    problem = plans.problem(
        x, weight, backend="triton", rank=len(As[0]), adapters=len(As), dtype=x.dtype, dropout=dropout_p > 0
    )
    plan = plans.choose(problem, precision)
    if plan.h == "inside" and not linear.fits_inside(len(As[0]), x.dtype, dropout_p):
        return plan._replace(h="given")
    return plan


def linear_fwd(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    starts: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    save_h: bool,
    precision: str,
    *,
    h: Tensor | None = None,  # [M, P r], where it is known
    residual: Tensor | None = None,  # [M, N]
) -> tuple[Tensor, Tensor]:  # y [M, N], in the dtype of the residual where there is one; h [M, P r], or [0, P r]
    """`packed_lora_linear_fwd` by the plan of the problem, plus a residual."""
    from complora_kernels.kernels import factors, launch, linear

    A, B = launch.stacked(As), launch.stacked(Bs)  # [P, r, K], [P, D, r]
    blocks = _blocks(weight, Bs, starts)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    plan = _plan(x, weight, As, dropout_p, precision)
    if plan.name == "fused":
        if h is None and plan.h != "inside":
            h = linear.packed_lora_linear_h(x, A, dropout_p, seed)
        y, h = linear.packed_lora_linear_fwd(
            x,
            weight.to(x.dtype),
            bias,
            A,
            B,
            h,
            blocks,
            dropout_p,
            seed,
            residual=residual,
            store_h=save_h,
            tiles=plan.tiles,
        )
        return y, h if save_h else x.new_empty(0, h.shape[1])
    if plan.name == "merge":
        y = F.linear(x, factors.merge_weight(weight, A, B, blocks, x.dtype), bias)  # x (W + ΔW)^T + b
        h = linear.packed_lora_linear_h(x, A, dropout_p, seed) if h is None and save_h else h
    elif plan.name == "concat":
        if h is None:
            xh = linear.packed_lora_linear_h(x, A, dropout_p, seed, beside_x=True)  # [M, K + R]
            h = xh[:, x.shape[1] :]
        else:
            xh = _beside(x, h)
        wide = _beside(weight.to(x.dtype), block_diagonal(Bs, starts, len(weight)))  # [N, K + R]
        y = F.linear(xh, wide, bias)  # [x | h] [W | B̃]^T + b
    else:
        h = linear.packed_lora_linear_h(x, A, dropout_p, seed) if h is None else h
        y = F.linear(x, weight.to(x.dtype), bias)
        for h_p, B_p, start in zip(h.split(A.shape[1], 1), Bs, starts, strict=True):
            y[:, start : start + len(B_p)].addmm_(h_p, B_p.mT)
    if residual is not None:
        y = y.add_(residual) if y.dtype == residual.dtype else residual + y
    return y, h.contiguous() if h is not None and save_h else x.new_empty(0, A.shape[0] * A.shape[1])


def linear_bwd(
    dY: Tensor,  # [M, N]
    x: Tensor,  # [M, K], of which only shape, dtype and device are looked at
    h: Tensor,  # [M, P r]
    weight: Tensor,  # [N, K]
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    starts: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    precision: str,
    factor_grad: Callable[[Tensor], Tensor],  # g [M, P r] -> dÃ [P, r, K]
) -> tuple[Tensor, Tensor, Tensor]:  # dX [M, K], dÃ [P, r, K], dB̃ [P, D, r]
    """`packed_lora_linear_bwd` by the plan of the problem."""
    from complora_kernels.kernels import factors, launch, linear, reductions

    needs_x, needs_A, needs_B = needs
    A, B = launch.stacked(As), launch.stacked(Bs)  # [P, r, K], [P, D, r]
    blocks = _blocks(weight, Bs, starts)
    plan = _plan(x, weight, As, dropout_p, precision)
    product = weight.to(x.dtype) if needs_x and plan.name != "merge" else weight
    dX, dA = x.new_empty(0), x.new_empty(0)
    if needs_x and plan.name == "fused" and plan.h == "inside":
        dX, g = linear.packed_lora_linear_dx(dY, product, A, B, None, blocks, dropout_p, seed, tiles=plan.tiles)
        _, dB = reductions.packed_lora_linear_db(dY, h, B, blocks, compute_g=False, compute_dB=needs_B)
    else:
        g, dB = reductions.packed_lora_linear_db(dY, h, B, blocks, compute_g=needs_x or needs_A, compute_dB=needs_B)
        if needs_x and plan.name == "merge":
            dX = dY @ factors.merge_weight(weight, A, B, blocks, x.dtype)  # dY (W + ΔW)
        elif needs_x and plan.name == "concat" and dropout_p == 0:
            dX = torch.cat([dY, g], 1) @ torch.cat([product, *As])  # [dY | g] [W ; Ã]
        elif needs_x and plan.name == "addmm" and dropout_p == 0:
            dX = torch.addmm(dY @ product, g, torch.cat(list(As)))  # dY W, then + g Ã
        elif needs_x:  # with dropout a mask stands between g Ã and the sum, whatever the plan
            dX, _ = linear.packed_lora_linear_dx(dY, product, A, B, g, blocks, dropout_p, seed, tiles=plan.tiles)
    if needs_A:
        dA = factor_grad(g)
    return dX, dA, dB


def _beside(left: Tensor, right: Tensor) -> Tensor:
    """`[left | right]`, rows starting on 16 bytes as cuBLAS wants them."""
    both = torch.cat([left, right], 1)
    return F.pad(both, (0, -both.shape[1] % 8))[:, : both.shape[1]]


# The checks of `functional` again, in fewer words: anybody may call a registered operation, and a kernel reads past the
# end of a tensor that does not fit.


def _check_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    starts: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    precision: str,
) -> None:
    if not 1 <= len(As) == len(Bs) == len(starts):
        raise ValueError(
            f"As, Bs, starts have lengths {len(As)}, {len(Bs)}, {len(starts)}, expected equal ones of at least 1"
        )
    A, B = As[0].shape, Bs[0].shape
    fits = x.dim() >= 1 and weight.dim() == len(A) == len(B) == 2 and x.shape[-1] == weight.shape[1] == A[1] > 0
    fits = fits and A[0] == B[1] > 0 and all(other.shape == A for other in As) and all(other.shape == B for other in Bs)
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = _shapes([x, weight, *As, *Bs, *([] if bias is None else [bias])])
        raise ValueError(
            f"x, weight, As, Bs, bias have shapes {shapes}, expected [..., K], [N, K], each [r, K], each [D, r], [N]"
        )
    check_device(x, weight, bias, *As, *Bs, seed)
    _check_memory(x, weight, bias, *As, *Bs, seed)
    _check_dtype(x.dtype, *As, *Bs)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected a floating-point one")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p}, expected a probability in [0, 1)")
    if dropout_p > 0 and (seed is None or seed.shape != (1,) or seed.dtype != torch.int64):
        raise ValueError(f"seed={seed} with dropout_p={dropout_p}, expected an int64 tensor of shape [1]")
    if precision not in ("exact", "fast"):
        raise ValueError(f"precision={precision!r}, expected 'exact' or 'fast'")


def _check_memory(*tensors: Tensor | None) -> None:
    """Each is strided, and its storage was not given back."""
    for tensor in tensors:
        if tensor is not None and (
            tensor.layout is not torch.strided or (tensor.data_ptr() == 0 and tensor.numel() > 0)
        ):
            raise ValueError(f"a tensor {list(tensor.shape)} is {tensor.layout} or has no memory, expected a dense one")


def _check_dtype(dtype: torch.dtype, *tensors: Tensor) -> None:
    if dtype not in DTYPES or any(tensor.dtype != dtype for tensor in tensors):
        dtypes = [dtype, *(tensor.dtype for tensor in tensors)]
        raise ValueError(f"tensors have dtypes {dtypes}, expected one of {DTYPES}")


def _shapes(tensors: Sequence[Tensor]) -> list[list[int]]:
    return [list(tensor.shape) for tensor in tensors]


def _packed_lora_linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    starts: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    save_h: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    _check_product(x, weight, bias, As, Bs, starts, dropout_p, seed, precision)
    flat = flatten(x)  # [M, K]
    y, h = linear_fwd(flat, weight, bias, As, Bs, starts, dropout_p, seed, save_h, precision)
    return unflatten(y, [*x.shape[:-1], len(weight)]), h


def _packed_lora_linear_bwd(
    dY: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    starts: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    from complora_kernels.kernels import reductions

    _check_product(x, weight, None, As, Bs, starts, dropout_p, seed, precision)
    check_device(x, dY, h)
    _check_memory(dY, h)
    _check_dtype(x.dtype, dY, h)
    flat = flatten(x)  # [M, K]
    h_shape = (len(flat), len(As) * len(As[0]))
    if dY.shape != (*x.shape[:-1], len(weight)) or len(needs) != 3 or (needs[2] and h.shape != h_shape):
        raise ValueError(
            f"dY {list(dY.shape)}, h {list(h.shape)}, needs={list(needs)}, expected [..., N], [M, P r] and three"
        )
    dY, h = flatten(dY), h.contiguous()  # [M, N], [M, P r]
    dX, dA, dB = linear_bwd(
        dY,
        flat,
        h,
        weight,
        As,
        Bs,
        starts,
        dropout_p,
        seed,
        needs,
        precision,
        lambda g: reductions.packed_lora_linear_da(flat, g, len(As), dropout_p, seed),
    )
    return unflatten(dX, x.shape) if needs[0] else dX, dA, dB


def _fold_factors(
    factors: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    complement: Sequence[bool],
    output_side: Sequence[bool],
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    from complora_kernels.kernels.factors import fold_factors

    if not 1 <= len(factors) == len(bases) == len(complement) == len(output_side):
        raise ValueError(
            f"factors, bases, complement, output_side have lengths {len(factors)}, {len(bases)}, {len(complement)}, "
            f"{len(output_side)}, expected equal ones of at least 1"
        )
    check_device(*factors, *bases)
    _check_dtype(factors[0].dtype, *factors)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}, expected one of {DTYPES}")
    return fold_factors(factors, bases, complement, output_side, scaling, dtype)


def _packed_lora_linear_fwd_shape(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    starts: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    save_h: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    check_device(x, weight, bias, *As, *Bs, seed)
    M, R = math.prod(x.shape[:-1]), sum(len(A) for A in As)
    return x.new_empty((*x.shape[:-1], len(weight))), x.new_empty((M if save_h else 0, R))


def _packed_lora_linear_bwd_shape(
    dY: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    starts: Sequence[int],
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    check_device(x, dY, h, weight, *As, *Bs, seed)
    shapes = (x.shape, (len(As), *As[0].shape), (len(Bs), *Bs[0].shape))
    dX, dA, dB = (x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True))
    return dX, dA, dB


def _fold_factors_shape(
    factors: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    complement: Sequence[bool],
    output_side: Sequence[bool],
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    check_device(*factors, *bases)
    return factors[0].new_empty((sum(factor.numel() for factor in factors),), dtype=dtype)


for _name, _compute, _shape in (
    ("packed_lora_linear_fwd", _packed_lora_linear_fwd, _packed_lora_linear_fwd_shape),
    ("packed_lora_linear_bwd", _packed_lora_linear_bwd, _packed_lora_linear_bwd_shape),
    ("fold_factors", _fold_factors, _fold_factors_shape),
):
    _LIBRARY.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"complora_triton::{_name}", _shape, lib=_LIBRARY)
