"""Thin autograd Functions of the product and the fold: what is saved, what is recomputed, which gradients are needed.

They flatten a batch [..., K] to [M, K] and call a backend by its name, or its differentiable twin where a backward pass
is differentiated again or batched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from complora_kernels import reference
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.backends import REGISTRY, Backend
from complora_kernels.backends.differentiable import DifferentiableBackend
from complora_kernels.backends.torch import ProductInput
from complora_kernels.common.low_rank import Norm, norm_of_product, widened
from complora_kernels.common.shapes import flatten, unflatten
from complora_kernels.common.tracing import is_differentiated
from complora_kernels.reference import without_autocast

_TWINS = {philox: DifferentiableBackend(philox=philox) for philox in (False, True)}


def backend_of_backward(name: str) -> Backend:
    """The backend of that name, or its twin that torch can differentiate: with `create_graph=True`, or batched."""
    return _TWINS[REGISTRY[name].philox] if is_differentiated() else REGISTRY[name]


class ProjectComplementFunction(torch.autograd.Function):
    """`factor P`. P is symmetric, so the backward pass is the same projection of the gradient."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, basis: Tensor, basis_kind: str, backend: str) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.basis_kind, ctx.backend = basis_kind, backend
        with without_autocast(factor):
            return REGISTRY[backend].project_complement(factor, basis, basis_kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (basis,) = ctx.saved_tensors
        with without_autocast(grad):
            backend = backend_of_backward(ctx.backend)
            return backend.project_complement(grad, basis, ctx.basis_kind), None, None, None


class FoldFactorsFunction(torch.autograd.Function):
    """`Ã = A P_in` and `scaling · P_out B` for all layers of one call, cast to the compute dtype, or back to their own.

    The arguments after `backend` are all As, then all Bs; the results come in the same order. Only the bases are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_bases: Sequence[Tensor | None],
        input_kinds: Sequence[str],
        output_bases: Sequence[Tensor | None],
        output_kinds: Sequence[str],
        scaling: float,
        dtype: torch.dtype | None,
        backend: str,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.bases, ctx.kinds = (*input_bases, *output_bases), (*input_kinds, *output_kinds)
        ctx.scaling, ctx.backend = scaling, backend
        ctx.dtypes = [factor.dtype for factor in factors]
        ctx.set_materialize_grads(False)  # a layer that was not used gets no gradient, rather than zeros
        output_side = [i >= len(input_bases) for i in range(len(factors))]
        dtypes = [dtype or factor.dtype for factor in factors]
        with without_autocast(factors[0]):
            folded = REGISTRY[backend].fold_factors(factors, ctx.bases, ctx.kinds, output_side, scaling, dtypes)
        asked = ctx.needs_input_grad[7:]  # or layers would compute gradients for the others
        ctx.mark_non_differentiable(*[part for part, needed in zip(folded, asked, strict=True) if not needed])
        return tuple(folded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """`dA = dÃ P_in` and `dB = P_out (s · d(sB̃))`, the operation that folded the factors."""
        asked = ctx.needs_input_grad[7:]
        needed = [i for i, grad in enumerate(grads) if grad is not None and asked[i]]
        result: list[Tensor | None] = [None] * len(grads)
        if needed:
            wanted: list[Any] = [grads[i] for i in needed]
            bases, kinds, dtypes = ([part[i] for i in needed] for part in (ctx.bases, ctx.kinds, ctx.dtypes))
            output_side = [i >= len(grads) // 2 for i in needed]
            with without_autocast(wanted[0]):
                projected = backend_of_backward(ctx.backend).fold_factors_bwd(
                    wanted, bases, kinds, output_side, ctx.scaling, dtypes
                )
            for i, gradient in zip(needed, projected, strict=True):
                result[i] = gradient
        return (None,) * 7 + tuple(result)


class BoundUpdatesFunction(torch.autograd.Function):
    """`B' = s B` with `s = min(1, limit / |B A|)` for n updates of equal shape, and A as it is, cast to `dtype`.

    The arguments after `dtype` are all As, then all Bs; the results come in the same order. Where `s < 1`,
    `ds = -s / |ΔW| · d|ΔW|`; else `s` is constant, and ΔW = 0 gets the gradient that it would get without a limit.
    """

    @staticmethod
    def forward(
        ctx: Any, limits: Sequence[Tensor], norm: Norm, dtype: torch.dtype | None, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        n = len(limits)
        A, B = (widened(torch.stack(part)) for part in (factors[:n], factors[n:]))  # [n, r, in], [n, out, r]
        with without_autocast(A):
            size, P, Q = norm_of_product(A, B, norm)
        limit = torch.stack(list(limits)).to(size)  # [n]
        within = size <= limit  # NaN is not, and stays NaN
        share = torch.where(within, 1, limit / size)  # [n]
        ctx.save_for_backward(*factors, A, B, P, Q, share, torch.where(within, 0, share / size))
        ctx.limits, ctx.norm, ctx.dtype = limits, norm, dtype
        ctx.set_materialize_grads(False)  # as in `FoldFactorsFunction`
        asked = ctx.needs_input_grad[3:]
        bounded = (share[:, None, None] * B).to(dtype or factors[n].dtype).unbind()  # times 1 where it is within
        results = (*A.to(dtype or factors[0].dtype).unbind(), *bounded)
        needed = (*asked[:n], *(a or b for a, b in zip(asked[:n], asked[n:], strict=True)))  # |B A| depends on both
        ctx.mark_non_differentiable(*[part for part, wanted in zip(results, needed, strict=True) if not wanted])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """`dB = s dB' - c P Q A^T` and `dA = dA' - c B^T P Q`, with `c = <dB', B> s / |ΔW|` where s < 1, else 0."""
        n, asked = len(grads) // 2, ctx.needs_input_grad[3:]
        *factors, A, B, P, Q, share, slope = ctx.saved_tensors
        used = [grads[i] is not None or grads[n + i] is not None for i in range(n)] * 2
        needed = [i for i in range(2 * n) if used[i] and asked[i]]
        result: list[Tensor | None] = [None] * (2 * n)
        if is_differentiated():
            with torch.enable_grad():
                As, Bs = reference.bound_updates(factors[:n], factors[n:], ctx.limits, norm=ctx.norm, dtype=ctx.dtype)
                pairs = [(out, grad) for out, grad in zip((*As, *Bs), grads, strict=True) if grad is not None]
                outputs, given = zip(*pairs, strict=True)
                inputs, again = [factors[i] for i in needed], torch.is_grad_enabled()
                computed = torch.autograd.grad(outputs, inputs, given, create_graph=again, allow_unused=True)
        else:
            dA, dB = (
                torch.stack([torch.zeros_like(like) if grad is None else grad.to(like) for grad, like in pairs])
                for pairs in (zip(grads[:n], A, strict=True), zip(grads[n:], B, strict=True))
            )
            with without_autocast(A):
                c = (slope * (dB * B).sum((-2, -1)))[:, None, None]  # [n, 1, 1]
                dA, dB = dA - c * (B.mT @ P) @ Q, share[:, None, None] * dB - c * P @ (Q @ A.mT)
            both = (*dA, *dB)
            computed = [both[i].to(factors[i].dtype) for i in needed]
        for i, gradient in zip(needed, computed, strict=True):
            result[i] = gradient
        return (None,) * 3 + tuple(result)


class PackedLoRALinearFunction(torch.autograd.Function):
    """`y = x W^T + b + (drop(x) Ã^T) B̃^T` per adapter; of the activations it saves x and h = drop(x) Ã^T.

    The arguments after `backend` are the tensors of the record, see `AdaptedLinear.tensors`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: AdaptedLinear, backend: str, *tensors: Tensor | None) -> Tensor:
        whole = linear.with_tensors(tensors)
        with without_autocast(x):
            y, h = REGISTRY[backend].packed_lora_linear_fwd(ProductInput(flatten(x)), whole)  # [M, out], [M, R]
        ctx.save_for_backward(x, h, tensors[0], None, *tensors[2:])  # the bias is not needed again
        ctx.linear, ctx.backend = linear, backend
        return unflatten(y, [*x.shape[:-1], y.shape[-1]])

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, h, *tensors = ctx.saved_tensors
        linear = ctx.linear.with_tensors(tensors)
        needs = linear.needs(ctx.needs_input_grad[0], ctx.needs_input_grad[3:])
        with without_autocast(dY):
            backend = backend_of_backward(ctx.backend)
            grads = backend.packed_lora_linear_bwd(flatten(dY), flatten(x), h, linear, needs)
        dX = unflatten(grads.x, x.shape) if isinstance(grads.x, Tensor) else None
        return (dX, None, None, *linear.gradients(grads))
