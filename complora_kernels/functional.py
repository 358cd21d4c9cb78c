"""The public operations: their formulas, the checks of their arguments and the choice of a backend.

Notation: `W` [out, in] is a frozen weight, `A` [r, in] and `B` [out, r] are the factors, `P_out = I - U_k U_k^T` and
`P_in = I - V_k V_k^T` project onto the complement of W's top-k left and right singular vectors (Comp-LoRA, arXiv
2501.15040). Folding the projections into the factors, `(x A^T)(P B)^T` instead of `((x A^T) B^T) P`, is exact and costs
4·r·d·k operations whatever the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from complora_kernels import backends, dropout, reference
from complora_kernels.adapted_linear import AdaptedLinear, Rows
from complora_kernels.autograd import (
    BoundUpdatesFunction,
    FoldFactorsFunction,
    PackedLoRALinearFunction,
    ProjectComplementFunction,
)
from complora_kernels.backends import REFERENCE, REGISTRY, Backend, differentiable
from complora_kernels.common.low_rank import Norm
from complora_kernels.common.tracing import check_followed, is_exported, is_followed
from complora_kernels.subspace import check_orthonormal

__all__ = [
    "bound_updates",
    "complora_linear",
    "fold_factors",
    "lora_linear",
    "packed_lora_linear",
    "project_complement",
]


def project_complement(
    factor: Tensor,  # [..., d]
    basis: Tensor,  # [d, k]
    *,
    basis_kind: str = "principal",
    backend: str | None = None,
) -> Tensor:  # [..., d]
    """Removes the protected directions from the last dimension of `factor`.

    `factor (I - U U^T)` for a principal basis U [d, k], `factor U U^T` for a complement basis U [d, d - k]; computed in
    float32, or float64 when `factor` is. Differentiable in `factor`, any number of times.

    Raises:
        ValueError: shapes that do not fit, columns that are not orthonormal, or an unknown `basis_kind`.
    """
    if factor.dim() == 0 or not factor.is_floating_point():
        raise ValueError(f"factor is {factor.dtype} {tuple(factor.shape)}, expected floating-point [..., d]")
    _check_basis(basis, basis_kind, factor.shape[-1], "basis", factor.device)
    name = resolve(
        backend, "project_complement", factor, lambda backend: backend.unsupported_tensors("factor", [factor], [basis])
    )
    if name == REFERENCE:
        return reference.project_complement(factor, basis, basis_kind=basis_kind)
    return ProjectComplementFunction.apply(factor, basis, basis_kind, name)


def fold_factors(
    lora_As: Sequence[Tensor],  # each [r, in]
    lora_Bs: Sequence[Tensor],  # each [out, r]
    output_bases: Sequence[Tensor | None],  # each [out, k]; None leaves B as it is
    input_bases: Sequence[Tensor | None],  # each [in, k]; None leaves A as it is
    *,
    output_basis_kinds: str | Sequence[str] = "principal",
    input_basis_kinds: str | Sequence[str] = "principal",
    scaling: float = 1.0,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """The factors of ordinary LoRA layers: `Ã = A P_in` and `scaling · B̃ = scaling · P_out B` for a list of layers.

    One autograd node for the whole list. Projections run in float32, or float64 when the factors are; `dtype` is what
    the results are cast to afterwards, None keeps that of the factors. Pass the scaling here or to `lora_linear`, not
    to both. The results are not to be written to: they may be parts of one tensor.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, columns that are not orthonormal, an unknown
            kind, a scaling that is not finite, or factors or a `dtype` that are not floating-point.
    """
    _check_scaling(scaling)
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}, expected a floating-point one")
    layers = len(lora_As)
    output_kinds = [output_basis_kinds] * layers if isinstance(output_basis_kinds, str) else list(output_basis_kinds)
    input_kinds = [input_basis_kinds] * layers if isinstance(input_basis_kinds, str) else list(input_basis_kinds)
    lengths = [len(part) for part in (lora_As, lora_Bs, output_bases, input_bases, output_kinds, input_kinds)]
    if set(lengths) != {layers} or layers == 0:
        raise ValueError(f"lora_As, lora_Bs, bases and kinds have lengths {lengths}, expected equal ones of at least 1")
    for A, B, output_basis, input_basis, output_kind, input_kind in zip(
        lora_As, lora_Bs, output_bases, input_bases, output_kinds, input_kinds, strict=True
    ):
        _check_factors(A, B, "lora_A", "lora_B")
        if output_basis is not None or output_kind != "principal":
            _check_basis(output_basis, output_kind, B.shape[0], "output_basis", B.device)
        if input_basis is not None or input_kind != "principal":
            _check_basis(input_basis, input_kind, A.shape[1], "input_basis", A.device)
    factors, bases = [*lora_As, *lora_Bs], [*input_bases, *output_bases]
    name = resolve(
        backend,
        "fold_factors",
        factors[0],
        lambda backend: backend.unsupported_tensors("lora_As, lora_Bs", factors, bases, dtype),
    )
    if name == REFERENCE:
        named = {"output_basis_kinds": output_kinds, "input_basis_kinds": input_kinds}
        return reference.fold_factors(
            lora_As, lora_Bs, output_bases, input_bases, **named, scaling=scaling, dtype=dtype
        )
    folded = FoldFactorsFunction.apply(
        input_bases, input_kinds, output_bases, output_kinds, scaling, dtype, name, *factors
    )
    return list(folded[:layers]), list(folded[layers:])


def bound_updates(
    folded_As: Sequence[Tensor],  # each [r, in]
    scaled_Bs: Sequence[Tensor],  # each [out, r]
    limits: Sequence[Tensor | None],  # each a scalar, above 0; None leaves B as it is
    *,
    norm: str = "frobenius",
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Bounds the updates of folded factors: `ΔW' = ΔW · min(1, limit / |ΔW|)` of `ΔW = B̃ Ã`, for a list of layers.

    The result is Ã and `min(1, limit / |ΔW|) · B̃`, cast to `dtype` (None: that of the factors). Where |ΔW| is within
    its limit B̃ has the bits that it had; a result that is given again with the same limit has them too. `norm` is
    "frobenius" or "spectral", the largest singular value. Both come from r x r work in float64 (`common.low_rank`);
    layers of equal shapes are computed together. Differentiable in the factors, the limits are constants; at ΔW = 0
    the gradient is that without a limit. A spectral norm is decomposed by a solver that no CUDA graph can hold.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, a limit that is no scalar, another norm, or
            factors or a `dtype` that are not floating-point.
    """
    if len({len(part) for part in (folded_As, scaled_Bs, limits)}) != 1:
        lengths = [len(part) for part in (folded_As, scaled_Bs, limits)]
        raise ValueError(f"folded_As, scaled_Bs, limits have lengths {lengths}, expected equal ones")
    if norm not in get_args(Norm):
        raise ValueError(f"norm={norm!r}, expected one of {', '.join(get_args(Norm))}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype}, expected a floating-point one")
    results: list[Any] = [None] * len(limits)
    groups: dict[Any, list[int]] = {}  # of layers that are computed together
    for i, (A, B, limit) in enumerate(zip(folded_As, scaled_Bs, limits, strict=True)):
        _check_factors(A, B, "folded_A", "scaled_B")
        if limit is None:
            results[i] = (A.to(dtype or A.dtype), B.to(dtype or B.dtype))
        elif limit.shape != ():
            raise ValueError(f"limit has shape {tuple(limit.shape)}, expected a scalar")
        else:
            groups.setdefault((A.shape, B.shape, A.dtype, B.dtype, B.device), []).append(i)
    for group in groups.values():
        chosen: list[Any] = [[part[i] for i in group] for part in (folded_As, scaled_Bs, limits)]
        As, Bs, own = chosen
        if resolve(None, "bound_updates", Bs[0], lambda _: None) == REFERENCE:
            As, Bs = reference.bound_updates(As, Bs, own, norm=norm, dtype=dtype)
        else:
            bounded = BoundUpdatesFunction.apply(own, norm, dtype, *As, *Bs)
            As, Bs = bounded[: len(group)], bounded[len(group) :]
        for i, pair in zip(group, zip(As, Bs, strict=True), strict=True):
            results[i] = pair
    return [A for A, _ in results], [B for _, B in results]


def packed_lora_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    folded_As: Sequence[Tensor],  # each [r, in]
    folded_Bs: Sequence[Tensor],  # each [stop - start, r]
    rows: Rows,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    precision: str = "exact",
    columns: Tensor | None = None,  # [..., R], bool, R the sum of the ranks
    backend: str | None = None,
) -> Tensor:  # [..., out]
    """One product with several adapters: `y = x W^T + b`, plus `(drop(x) Ã_i^T) B̃_i^T` in the rows of adapter i.

    `rows` holds its (start, stop), rows `start <= n < stop` of the weight. This is how attention computes q, k and v,
    whose weights are stacked in one [3d, d] parameter. Each adapter draws a dropout mask of its own. Otherwise as
    `lora_linear`.

    `columns`, broadcast to the rows of x, is for batches whose samples have different adapters: where it is False,
    `h_i = drop(x) Ã_i^T`, the ranks of all adapters side by side, is 0. It is for inference: with gradients enabled it
    is a ValueError.
    """
    adapters = len(rows)
    if adapters == 0 or len(folded_As) != adapters or len(folded_Bs) != adapters:
        raise ValueError(
            f"folded_As, folded_Bs, rows have lengths {len(folded_As)}, {len(folded_Bs)}, {adapters}, "
            "expected equal ones of at least 1"
        )
    linear = AdaptedLinear(
        weight, bias, folded_As, folded_Bs, tuple(rows), dropout_p, precision=precision, columns=columns
    )
    return _adapted_linear(x, linear, training, backend)


def lora_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    folded_A: Tensor,  # [r, in]
    folded_B: Tensor,  # [out, r]
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    precision: str = "exact",
    columns: Tensor | None = None,  # [..., r], bool
    backend: str | None = None,
) -> Tensor:  # [..., out]
    """`y = x W^T + b + scaling · (drop(x) Ã^T) B̃^T`: a frozen linear layer with a LoRA update (Hu et al., 2106.09685).

    Computed in the dtype of `x`, or in autocast's where that is on; `weight` and `bias` are frozen, gradients flow to
    `x` and the factors where they are asked for:

        dX = dY W + m ∘ (g Ã)    dÃ = g^T drop(x)    dB̃ = scaling · dY^T h    g = scaling · dY B̃    h = drop(x) Ã^T

    Of the activations, x and h [M, r] are saved. With `training` and `dropout_p` > 0 the mask m is drawn from the
    default generator of x's device and drawn again in the backward pass. In half precision the rank-r term is added
    before the one rounding of y; `precision="fast"` allows plans that round twice (`plans`), which lose most of an
    update below half a unit in the last place of y. `columns` is as in `packed_lora_linear`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, a weight or bias that requires a gradient, dropout_p
            outside [0, 1), a scaling that is not finite, or another precision.
        RuntimeError: a backend that was asked for by name does not support the arguments.
    """
    _check_fits(folded_A, folded_B, weight, "folded_A", "folded_B")
    _check_scaling(scaling)
    scaled_B = folded_B if scaling == 1.0 else scaling * folded_B
    rows = ((0, weight.shape[0]),)
    linear = AdaptedLinear(weight, bias, [folded_A], [scaled_B], rows, dropout_p, precision=precision, columns=columns)
    return _adapted_linear(x, linear, training, backend)


def complora_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    lora_A: Tensor,  # [r, in]
    lora_B: Tensor,  # [out, r]
    *,
    output_basis: Tensor | None = None,  # [out, k]
    input_basis: Tensor | None = None,  # [in, k]
    output_basis_kind: str = "principal",
    input_basis_kind: str = "principal",
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = True,
    precision: str = "exact",
    backend: str | None = None,
) -> Tensor:  # [..., out]
    """`y = x W^T + b + scaling · (drop(x) (A P_in)^T) (P_out B)^T`: a Comp-LoRA layer (arXiv 2501.15040).

    With an output basis U this is `x·W + ((x·A)·B)·P_perp` of the paper's notation, and no output coordinate along U
    ever changes. A basis has orthonormal columns; "principal" means it spans the protected directions [d, k],
    "complement" that it spans the rest [d, d - k]. Without a basis the side is not projected.

    Equivalent to `fold_factors` followed by `lora_linear`, whose docstring has the gradients; those of the factors are
    projected again, `dA = dÃ P_in` and `dB = P_out dB̃`, in float32, or float64 when the factors are. In half precision
    they are rounded before that projection, too.

    Raises:
        ValueError: as `fold_factors` and `lora_linear`.
    """
    _check_fits(lora_A, lora_B, weight, "lora_A", "lora_B")
    _check_scaling(scaling)
    dtype, rows = compute_dtype(x), ((0, weight.shape[0]),)
    _check_factors(lora_A, lora_B, "lora_A", "lora_B")
    _check_basis(output_basis, output_basis_kind, lora_B.shape[0], "output_basis", lora_B.device)
    _check_basis(input_basis, input_basis_kind, lora_A.shape[1], "input_basis", lora_A.device)
    linear = AdaptedLinear(weight, bias, [lora_A], [lora_B], rows, dropout_p, precision=precision)
    check_linear(x, linear, "lora_A", "lora_B")

    def unsupported(backend: Backend) -> str | None:
        bases = [input_basis, output_basis]
        reason = backend.unsupported_tensors("lora_A, lora_B", [lora_A, lora_B], bases, dtype)
        return reason or backend.unsupported_linear(x, linear)

    name = resolve(backend, "complora_linear", x, unsupported, dropping=training and dropout_p > 0)
    bases = ([output_basis], [input_basis])
    kinds = {"output_basis_kinds": output_basis_kind, "input_basis_kinds": input_basis_kind}
    As, Bs = fold_factors([lora_A], [lora_B], *bases, **kinds, scaling=scaling, dtype=dtype, backend=name)
    return _adapted_linear(x, linear._replace(As=As, Bs=Bs), training, name)


def _adapted_linear(
    x: Tensor,  # [..., in]
    linear: AdaptedLinear,
    training: bool,
    backend: str | None,
) -> Tensor:  # [..., out]
    """One product with at least one adapter: checks, the choice of a backend, casts, seeds and the autograd node."""
    check_linear(x, linear)
    if not training and linear.dropout_p > 0:
        linear = linear._replace(dropout_p=0.0)
    x, dropping = x.to(dtype := compute_dtype(x)), linear.dropout_p > 0
    name = resolve(
        backend, "packed_lora_linear", x, lambda backend: backend.unsupported_linear(x, linear), dropping=dropping
    )
    linear = for_backend(x, linear, dtype, name)
    if name == REFERENCE:
        wide = x.to(torch.promote_types(dtype, torch.float32))
        return differentiable.packed_lora_linear(x, linear, dropout.fresh_masks(wide, linear))
    return PackedLoRALinearFunction.apply(x, linear.without_tensors(), name, *linear.tensors())


def for_backend(x: Tensor, linear: AdaptedLinear, dtype: torch.dtype, backend: str) -> AdaptedLinear:
    """The record with its factors in the dtype of the product, and fresh seeds for the masks that the backend draws.

    h is saved where B̃ gets a gradient. A backend gets `columns` for the rows of x one after the other.
    """
    weight, bias, As, Bs, rows, dropout_p, _, _, precision, columns = linear
    if [factor for factor in (*As, *Bs) if factor.dtype != dtype]:
        As, Bs = [A.to(dtype) for A in As], [B.to(dtype) for B in Bs]
    seeds = [] if backend == REFERENCE else dropout.draw_seeds(x, linear, philox=REGISTRY[backend].philox)
    save_h = torch.is_grad_enabled() and any(B.requires_grad for B in Bs)
    if columns is not None and backend != REFERENCE:
        columns = columns.expand(*x.shape[:-1], -1).reshape(-1, linear.rank)  # [M, R]
    return AdaptedLinear(weight, bias, As, Bs, rows, dropout_p, seeds, save_h, precision, columns)


def resolve(
    backend: str | None,
    operation: str,
    tensor: Tensor,
    unsupported: Callable[[Backend], str | None],
    *,
    dropping: bool = False,
) -> str:
    """The backend to use: the reference where operations are followed (`is_followed`), torch's under torch.export."""
    if is_followed():
        backends.resolve(backend, operation, _unfollowed, KERNELS)
        return REFERENCE
    skip = backends.skipped(operation, tensor.device.type, dropping)
    if is_exported():  # the program is to run where this package is not
        skip = KERNELS
    return backends.resolve(backend, operation, unsupported, skip)


KERNELS = tuple(name for name, backend in REGISTRY.items() if backend.own_operations)


def _unfollowed(backend: Backend) -> str | None:
    if not backend.own_operations:
        return None
    return (
        "torch.func, forward-mode differentiation and torch.jit.trace follow torch's own operations alone, "
        "which are those of COMPLORA_BACKEND=reference"
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the product: autocast's where it is on (it leaves float64 alone), else that of `x`."""
    check_followed(x)
    if reference.autocasts(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def check_linear(
    x: Tensor,
    linear: AdaptedLinear,
    name_A: str = "folded_A",
    name_B: str = "folded_B",
    *,
    inputs: int | None = None,
) -> None:
    """Raises ValueError unless x [..., in], the weight and the factors fit each other; the message names them.

    `inputs` is the number of columns of what the product reads, where that is not x itself but computed from it.
    """
    weight, dropout_p, device = linear.weight, linear.dropout_p, x.device
    _check_base(x, weight, linear.bias, x.shape[-1:] if inputs is None else (inputs,))
    for A, B, (start, stop) in zip(linear.As, linear.Bs, linear.rows, strict=True):
        _check_factors(A, B, name_A, name_B)
        if A.device != device or B.device != device:
            _check_device(A, name_A, device)
            _check_device(B, name_B, device)
        if not (0 <= start <= stop <= weight.shape[0]) or (B.shape[0], A.shape[1]) != (stop - start, weight.shape[1]):
            raise ValueError(
                f"{name_A} {tuple(A.shape)}, {name_B} {tuple(B.shape)} and rows ({start}, {stop}) do not fit a weight "
                f"of shape {tuple(weight.shape)}: expected [r, in], [stop - start, r] and 0 <= start <= stop <= out"
            )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p}, expected a probability in [0, 1)")
    if linear.precision not in ("exact", "fast"):
        raise ValueError(f"precision={linear.precision!r}, expected 'exact' or 'fast'")
    if linear.columns is not None:
        _check_columns(x, linear, linear.columns)


def _check_columns(x: Tensor, linear: AdaptedLinear, columns: Tensor) -> None:
    shape = (*x.shape[:-1], linear.rank)
    fits = columns.dim() == x.dim() and all(own in (1, n) for own, n in zip(columns.shape[:-1], shape, strict=False))
    if not fits or columns.shape[-1] != linear.rank or columns.dtype != torch.bool:
        raise ValueError(
            f"columns is {columns.dtype} {tuple(columns.shape)}, expected torch.bool that can be expanded to {shape}"
        )
    _check_device(columns, "columns", x.device)
    if torch.is_grad_enabled():
        raise ValueError("columns is given with gradients enabled, expected None, or torch.no_grad()")


def _check_base(x: Tensor, weight: Tensor, bias: Tensor | None, inputs: Sequence[int]) -> None:
    shape, device, dtype = weight.shape, x.device, x.dtype
    if len(shape) != 2 or not inputs or inputs[0] != shape[1]:
        raise ValueError(f"x {(*x.shape[:-1], *inputs)} and weight {tuple(shape)}, expected [..., in] and [out, in]")
    if not dtype.is_floating_point:
        raise ValueError(f"x has dtype {dtype}, expected a floating-point one")
    if shape[1] == 0:
        raise ValueError(f"weight {tuple(shape)}, expected [out, in] with in >= 1")
    if bias is not None and bias.shape != shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)}, expected [out] with out={shape[0]}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}.requires_grad=True, expected a frozen {name}: it gets no gradient here")
        if tensor.device != device:
            _check_device(tensor, name, device)
        if tensor.dtype != dtype and not reference.autocasts(device.type):
            raise ValueError(f"{name} has dtype {tensor.dtype}, expected that of x, {dtype}, outside autocast")


def _check_factors(A: Tensor, B: Tensor, name_A: str, name_B: str) -> None:
    shape_A, shape_B = A.shape, B.shape
    if len(shape_A) != 2 or len(shape_B) != 2 or shape_A[0] != shape_B[1] or shape_A[0] < 1:
        raise ValueError(
            f"{name_A} {tuple(shape_A)} and {name_B} {tuple(shape_B)}, expected [r, in] and [out, r] with r >= 1"
        )
    if not (A.dtype.is_floating_point and B.dtype.is_floating_point):
        raise ValueError(f"{name_A} and {name_B} have dtypes {A.dtype} and {B.dtype}, expected floating-point ones")


def _check_scaling(scaling: float) -> None:
    if not abs(scaling) < math.inf:  # NaN is not either
        raise ValueError(f"scaling={scaling}, expected a finite number")


def _check_fits(A: Tensor, B: Tensor, weight: Tensor, name_A: str, name_B: str) -> None:
    if A.dim() == B.dim() == weight.dim() == 2 and (B.shape[0], A.shape[1]) != weight.shape:
        raise ValueError(
            f"{name_A} {tuple(A.shape)} and {name_B} {tuple(B.shape)} do not fit weight {tuple(weight.shape)}, "
            "expected [r, in] and [out, r] for [out, in]"
        )


def _check_device(tensor: Tensor, name: str, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def _check_basis(basis: Tensor | None, kind: str, d: int, name: str, device: torch.device) -> None:
    if kind not in ("principal", "complement"):
        raise ValueError(f"{name}_kind={kind!r}, expected 'principal' or 'complement'")
    if basis is None:
        return
    shape = basis.shape
    if len(shape) != 2 or shape[0] != d or shape[1] > d:
        raise ValueError(f"{name} has shape {tuple(shape)}, expected [{d}, k] with k <= {d}")
    if basis.device != device:
        _check_device(basis, name, device)
    if not basis.dtype.is_floating_point:
        raise ValueError(f"{name} has dtype {basis.dtype}, expected a floating-point one")
    check_orthonormal(basis, name)
