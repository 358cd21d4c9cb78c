"""Thin autograd Functions of the torch backend: what is saved, what is recomputed, which gradients are asked for."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from complora_kernels import eager


class ProjectComplementFunction(torch.autograd.Function):
    """`factor P`. P is symmetric, so the backward pass is the same projection of the gradient."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, basis: Tensor, basis_kind: str) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.basis_kind = basis_kind
        with _without_autocast(factor):
            return _cast(_project(factor, basis, basis_kind), factor.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (basis,) = ctx.saved_tensors
        return ProjectComplementFunction.apply(grad, basis, ctx.basis_kind), None, None


class FoldFactorsFunction(torch.autograd.Function):
    """`Ã = A P_in` and `scaling · P_out B` for all layers of one call, cast to the compute dtype, or back to their own.

    The arguments after `dtype` are all As, then all Bs; the results come in the same order. Only the bases are saved.
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
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        layers = len(input_bases)
        ctx.projections = (input_bases, input_kinds, output_bases, output_kinds)
        ctx.scaling = scaling
        ctx.dtypes = [factor.dtype for factor in factors]
        ctx.set_materialize_grads(False)  # a layer that was not used gets no gradient, rather than zeros
        with _without_autocast(factors[0]):
            folded_As = [
                _cast(_project(A, basis, kind), dtype or A.dtype)  # Ã = A P_in, [r, in]
                for A, basis, kind in zip(factors[:layers], input_bases, input_kinds, strict=True)
            ]
            scaled_Bs = [
                _cast(_project(B.mT, basis, kind).mT.mul(scaling), dtype or B.dtype)  # s · P_out B, [out, r]
                for B, basis, kind in zip(factors[layers:], output_bases, output_kinds, strict=True)
            ]
        folded = (*folded_As, *scaled_Bs)
        frozen = (not needed for needed in ctx.needs_input_grad[6:])
        ctx.mark_non_differentiable(*itertools.compress(folded, frozen))  # or layers would compute gradients for them
        return folded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        input_bases, input_kinds, output_bases, output_kinds = ctx.projections
        layers = len(input_bases)
        needed = ctx.needs_input_grad[6:]
        result: list[Tensor | None] = [None] * len(grads)
        bases, kinds = (*input_bases, *output_bases), (*input_kinds, *output_kinds)
        for i, (grad, basis, kind) in enumerate(zip(grads, bases, kinds, strict=True)):
            if grad is None or not needed[i]:
                continue
            with _without_autocast(grad):
                grad = grad.to(torch.promote_types(ctx.dtypes[i], grad.dtype))
                if i < layers:
                    projected = _project(grad, basis, kind)  # dA = dÃ P_in
                else:
                    projected = _project(grad.mT, basis, kind).mT.mul(ctx.scaling)  # dB = P_out (s · d(sB̃))
                result[i] = projected.to(ctx.dtypes[i])
        return (None,) * 6 + tuple(result)


class PackedLoRALinearFunction(torch.autograd.Function):
    """`y = x W^T + b + (drop(x) Ã^T) B̃^T` per adapter; of the activations it saves x and h = drop(x) Ã^T.

    The arguments after `dropout_p` are the seeds (one per adapter, none without dropout), all Ãs, all B̃s.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: eager.Rows,
        dropout_p: float,
        *seeds_and_factors: Tensor,
    ) -> Tensor:
        seeds, As, Bs = _unpack(seeds_and_factors, len(rows))
        with _without_autocast(x):
            y, h = eager.packed_lora_linear_fwd(x, weight, bias, As, Bs, rows, dropout_p, seeds)
        ctx.save_for_backward(x, h, weight, *seeds_and_factors)
        ctx.rows, ctx.dropout_p = rows, dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, h, weight, *seeds_and_factors = ctx.saved_tensors
        seeds, As, Bs = _unpack(seeds_and_factors, len(ctx.rows))
        needed = ctx.needs_input_grad
        first_A = 5 + len(seeds)
        needs = (needed[0], any(needed[first_A : first_A + len(As)]), any(needed[first_A + len(As) :]))
        with _without_autocast(dY):
            dX, dAs, dBs = eager.packed_lora_linear_bwd(dY, x, h, weight, As, Bs, ctx.rows, ctx.dropout_p, seeds, needs)
        return (dX, None, None, None, None, *[None] * len(seeds), *dAs, *dBs)


def _unpack(tensors: Sequence[Tensor], adapters: int) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    seeds = len(tensors) - 2 * adapters
    return tensors[:seeds], tensors[seeds : seeds + adapters], tensors[seeds + adapters :]


def _project(factor: Tensor, basis: Tensor | None, kind: str) -> Tensor:
    """The projection in float32, or float64 when the factor is: in half precision it would leave the complement."""
    wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
    return wide if basis is None else eager.project_complement(wide, basis, kind)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, but not to its own: torch.compile of torch 2.11 loses the gradient of such an output."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Dtypes are chosen before the Function is called; autocast must not lower the projections inside it."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
