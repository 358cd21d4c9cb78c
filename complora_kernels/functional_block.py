"""The operations of a pre-norm residual block around its attention, with the norm and the activation inside them.

    s = x + delta        q, k, v = packed_lora_linear(LN(s))        s + lora_linear(act(lora_linear(LN(s))))

Notation as in `functional`. LayerNorm and its affine part are frozen: they get no gradient. What LayerNorm and the
activation return is not saved for the backward pass, only what they read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from complora_kernels import functional, reference
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.autograd_block import Linear, NormLoRALinearFunction, NormLoRAMLPFunction
from complora_kernels.dropout import dropout_seed, philox_seed
from complora_kernels.eager import flatten
from complora_kernels.eager_block import Norm
from complora_kernels.kernels.blocks import MAX_NORM_WIDTH

ACTIVATIONS = ("gelu", "quick_gelu")
__all__ = ["ACTIVATIONS", "AdaptedLinear", "Norm", "norm_lora_linear", "norm_lora_mlp"]


def norm_lora_linear(
    x: Tensor,  # [..., in]
    delta: Tensor | None,  # [..., in]
    norm: Norm,
    linear: AdaptedLinear,
    *,
    precision: str = "exact",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # [..., in], [..., out]
    """`s = x + delta` and `packed_lora_linear(LN(s), ...)`: residual, LayerNorm and the product that reads it.

        ds = d_s + LN'(dn)    LN'(dn) = rstd · (w ∘ dn - mean(w ∘ dn) - ŝ · mean(w ∘ dn ∘ ŝ))    ŝ = (s - mean) · rstd

    where dn is the product's input gradient and d_s that of the first result. The product runs in autocast's dtype
    where that is on, else in that of x; LayerNorm in float32, or float64 when x is. Of the activations s, mean,
    rstd [M] and h [M, r] are saved. Without delta the first result is a view of x: it is not to be written to.

    Raises:
        ValueError: as `packed_lora_linear`; a norm that does not fit or requires a gradient.
        RuntimeError: a backend that was asked for by name does not serve the arguments.
    """
    _check(x, delta, norm, [linear], precision)
    dtype = functional.compute_dtype(x)
    name = _resolve(backend, "norm_lora_linear", x, delta, norm, dtype, [linear])
    linear = _cast(linear, dtype)
    if name == "reference":
        return reference.norm_lora_linear(x, delta, *norm, *linear[:5], dropout_masks=_masks(x, linear))
    seeds = _seeds(name, x, linear)
    stream, y = NormLoRALinearFunction.apply(
        *_flat(x, delta), norm, _frozen(linear, seeds), dtype, precision, name, *linear.As, *linear.Bs
    )
    return stream.view(x.shape), y.view(*x.shape[:-1], y.shape[-1])


def norm_lora_mlp(
    x: Tensor,  # [..., in]
    delta: Tensor | None,  # [..., in]
    norm: Norm,
    fc1: AdaptedLinear,  # [hidden, in]
    fc2: AdaptedLinear,  # [in, hidden]
    activation: str,
    *,
    recompute: bool = False,
    precision: str = "exact",
    backend: str | None = None,
) -> Tensor:  # [..., in]
    """`s + fc2(act(fc1(LN(s))))` with `s = x + delta`: the second half of a residual block.

    `act` is "gelu", `z Φ(z)`, or "quick_gelu", `z · sigmoid(1.702 z)`. Of the activations s, mean, rstd [M], h of both
    products and z [M, hidden] are saved; with `recompute` z is not, and the backward pass computes fc1 again. Otherwise
    as `norm_lora_linear`.

    Raises:
        ValueError: as `norm_lora_linear`; another activation.
        RuntimeError: a backend that was asked for by name does not serve the arguments.
    """
    _check(x, delta, norm, [fc1, fc2], precision)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if fc2.weight.shape != fc1.weight.shape[::-1]:
        raise ValueError(f"fc1 {tuple(fc1.weight.shape)} and fc2 {tuple(fc2.weight.shape)}, expected transposed shapes")
    dtype = functional.compute_dtype(x)
    name = _resolve(backend, "norm_lora_mlp", x, delta, norm, dtype, [fc1, fc2])
    fc1, fc2 = _cast(fc1, dtype), _cast(fc2, dtype)
    if name == "reference":
        stream, z = reference.norm_lora_linear(x, delta, *norm, *fc1[:5], dropout_masks=_masks(x, fc1))
        masks = _masks(z, fc2)
        return stream + reference.activation_lora_linear(z, *fc2[:5], activation=activation, dropout_masks=masks)
    seeds1, seeds2 = _seeds(name, x, fc1), _seeds(name, x, fc2)
    factors = (*fc1.As, *fc1.Bs, *fc2.As, *fc2.Bs)
    y, _ = NormLoRAMLPFunction.apply(
        *_flat(x, delta),
        norm,
        _frozen(fc1, seeds1),
        _frozen(fc2, seeds2),
        activation,
        recompute,
        dtype,
        precision,
        name,
        *factors,
    )
    return y.view(x.shape)


def _check(x: Tensor, delta: Tensor | None, norm: Norm, linears: Sequence[AdaptedLinear], precision: str) -> None:
    width = x.shape[-1:]
    for name, tensor in (("norm.weight", norm.weight), ("norm.bias", norm.bias)):
        if tensor is None:
            continue
        if tensor.shape != width or tensor.device != x.device:
            raise ValueError(f"{name} {tuple(tensor.shape)} on {tensor.device}, expected {tuple(width)} on {x.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}.requires_grad=True, expected a frozen norm: it gets no gradient here")
    if delta is not None and (delta.shape != x.shape or delta.device != x.device):
        raise ValueError(f"delta {tuple(delta.shape)} on {delta.device}, expected as x, {tuple(x.shape)} on {x.device}")
    hidden = x
    for linear in linears:
        weight, bias, As, Bs, rows, dropout_p, *_ = linear
        if not len(As) == len(Bs) == len(rows):
            raise ValueError(
                f"folded_As, folded_Bs, rows have lengths {len(As)}, {len(Bs)}, {len(rows)}, expected equal"
            )
        functional.check_product(hidden, weight, bias, As, Bs, rows, dropout_p, precision)
        hidden = x.new_empty(1).expand(*x.shape[:-1], len(weight))


def _resolve(
    backend: str | None,
    operation: str,
    x: Tensor,
    delta: Tensor | None,
    norm: Norm,
    dtype: torch.dtype,
    linears: Sequence[AdaptedLinear],
) -> str:
    def unserved(name: str) -> str | None:
        if name == "triton" and x.shape[-1] > MAX_NORM_WIDTH:
            return f"x {tuple(x.shape)}, the kernels serve rows of at most {MAX_NORM_WIDTH}"
        if name == "triton" and any(t is not None and t.is_neg() for t in _tensors(x, delta, norm, linears)):
            return "a tensor is a view that negates its memory, the kernels read the memory"
        like = x.new_empty(0, dtype=dtype)
        for linear in linears:
            factors = linear.As
            reason = (
                functional.unserved_rows(name, like, factors, linear.rows, len(linear.weight))
                if factors
                else functional.unserved(name, "x", [like])
            )
            if reason is not None:
                return reason
        return functional.unserved(name, "x", [x])

    return functional.resolve(backend, operation, x, unserved, dropping=any(linear.dropout_p for linear in linears))


def _tensors(x: Tensor, delta: Tensor | None, norm: Norm, linears: Sequence[AdaptedLinear]) -> Iterator[Tensor | None]:
    yield from (x, delta, norm.weight, norm.bias)
    for linear in linears:
        yield from (linear.weight, linear.bias, *linear.As, *linear.Bs)


def _cast(linear: AdaptedLinear, dtype: torch.dtype) -> AdaptedLinear:
    As, Bs = ([factor.to(dtype) for factor in factors] for factors in (linear.As, linear.Bs))
    return linear._replace(As=As, Bs=Bs)


def _seeds(backend: str, x: Tensor, linear: AdaptedLinear) -> list[Tensor]:
    """Drawn in the order of the products, as where the products are called one by one."""
    if not linear.rows or linear.dropout_p == 0:
        return []
    return [philox_seed(x)] if backend in ("triton", "extension") else [dropout_seed(x) for _ in linear.rows]


def _masks(x: Tensor, linear: AdaptedLinear) -> list[Tensor] | None:
    """Each `m = mask / (1 - p)` [..., in]."""
    return functional.reference_masks(x, len(linear.rows), linear.dropout_p) if linear.dropout_p > 0 else None


def _frozen(linear: AdaptedLinear, seeds: Sequence[Tensor]) -> Linear:
    save_h = torch.is_grad_enabled() and any(B.requires_grad for B in linear.Bs)
    return Linear(linear.weight, linear.bias, linear.rows, linear.dropout_p, seeds, save_h)


def _flat(x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:  # [M, K] each
    return flatten(x), None if delta is None else flatten(delta)
