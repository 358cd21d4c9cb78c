"""Thin autograd Functions: what is saved, what is recomputed, which gradients are asked for; of any backend."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from complora_kernels import eager, extension, ops
from complora_kernels.common.tracing import is_differentiated
from complora_kernels.differentiable import DifferentiableBackward
from complora_kernels.reference import without_autocast

# Each operation under one name, with the same arguments.
BACKENDS = {"torch": eager, "triton": ops, "extension": extension}
DIFFERENTIABLE = {name: DifferentiableBackward(name) for name in BACKENDS}


class ProjectComplementFunction(torch.autograd.Function):
    """`factor P`. P is symmetric, so the backward pass is the same projection of the gradient."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, basis: Tensor, basis_kind: str, backend: str) -> Tensor:
        ctx.save_for_backward(basis)
        ctx.basis_kind, ctx.backend = basis_kind, backend
        with without_autocast(factor):
            return BACKENDS[backend].project_complement(factor, basis, basis_kind)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (basis,) = ctx.saved_tensors
        with without_autocast(grad):
            backend = backend_of_backward(BACKENDS, ctx.backend)
            return backend.project_complement(grad, basis, ctx.basis_kind), None, None, None


def project_complement_(factor: Tensor, basis: Tensor, basis_kind: str, backend: str) -> Tensor:
    """`factor P`, written back to `factor`: by the extension where it lies.

    By torch's own copy where autograd follows it, which says what it allows, and to a view that negates its memory.
    """
    followed = factor.requires_grad and torch.is_grad_enabled()
    if backend != "extension" or followed or (not torch.compiler.is_compiling() and factor.is_neg()):
        return factor.copy_(ProjectComplementFunction.apply(factor, basis, basis_kind, backend))
    with without_autocast(factor):
        return extension.project_complement_(factor, basis, basis_kind)


class FoldFactorsFunction(torch.autograd.Function):
    """`Ã = A P_in` and `scaling · P_out B` for all layers of one call, cast to the compute dtype, or back to their own.

    The arguments after `backend` are all As, then all Bs; the results come in the same order. Only the bases are saved.
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
            folded = BACKENDS[backend].fold_factors(factors, ctx.bases, ctx.kinds, output_side, scaling, dtypes)
        frozen = (not needed for needed in ctx.needs_input_grad[7:])
        ctx.mark_non_differentiable(*itertools.compress(folded, frozen))  # or layers would compute gradients for them
        return tuple(folded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        """`dA = dÃ P_in` and `dB = P_out (s · d(sB̃))`, the operation that folded the factors."""
        needed = [i for i, grad in enumerate(grads) if grad is not None and ctx.needs_input_grad[7 + i]]
        result: list[Tensor | None] = [None] * len(grads)
        if needed:
            wanted: list[Any] = [grads[i] for i in needed]
            bases, kinds, dtypes = ([part[i] for i in needed] for part in (ctx.bases, ctx.kinds, ctx.dtypes))
            output_side = [i >= len(grads) // 2 for i in needed]
            with without_autocast(wanted[0]):
                projected = backend_of_backward(BACKENDS, ctx.backend).fold_factors_bwd(
                    wanted, bases, kinds, output_side, ctx.scaling, dtypes
                )
            for i, gradient in zip(needed, projected, strict=True):
                result[i] = gradient
        return (None,) * 7 + tuple(result)


class PackedLoRALinearFunction(torch.autograd.Function):
    """`y = x W^T + b + (drop(x) Ã^T) B̃^T` per adapter; of the activations it saves x and h = drop(x) Ã^T.

    The arguments after `backend` are the seeds (none without dropout), all Ãs, all B̃s.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: eager.Rows,
        dropout_p: float,
        save_h: bool,
        precision: str,
        backend: str,
        *seeds_and_factors: Tensor,
    ) -> Tensor:
        seeds, As, Bs = _unpack(seeds_and_factors, len(rows))
        with without_autocast(x):
            y, h = BACKENDS[backend].packed_lora_linear_fwd(
                x, weight, bias, As, Bs, rows, dropout_p, seeds, save_h=save_h, precision=precision
            )
        ctx.save_for_backward(x, h, weight, *seeds_and_factors)
        ctx.rows, ctx.dropout_p, ctx.precision, ctx.backend = rows, dropout_p, precision, backend
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, h, weight, *seeds_and_factors = ctx.saved_tensors
        seeds, As, Bs = _unpack(seeds_and_factors, len(ctx.rows))
        needed = ctx.needs_input_grad
        first_A = 8 + len(seeds)
        needs = (needed[0], any(needed[first_A : first_A + len(As)]), any(needed[first_A + len(As) :]))
        with without_autocast(dY):
            dX, dAs, dBs = backend_of_backward(BACKENDS, ctx.backend).packed_lora_linear_bwd(
                dY, x, h, weight, As, Bs, ctx.rows, ctx.dropout_p, seeds, needs, precision=ctx.precision
            )
        return (dX, *[None] * (7 + len(seeds)), *dAs, *dBs)


class CompLoRALinearFunction(torch.autograd.Function):
    """`y = x W^T + b + s · (drop(x) (A P_in)^T) (P_out B)^T` of the extension: one node from the raw factors.

    Of the activations it saves x and h = drop(x) Ã^T. The gradients of the factors are summed and projected in one
    call: in half precision they are rounded once, not before the projection too. The raw factors are saved for a
    backward pass that is differentiated again. The last arguments are the seeds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        output_basis: Tensor | None,
        input_basis: Tensor | None,
        output_basis_kind: str,
        input_basis_kind: str,
        scaling: float,
        dropout_p: float,
        save_h: bool,
        precision: str,
        *seeds: Tensor,
    ) -> Tensor:
        kinds = (output_basis_kind, input_basis_kind)
        rows = [(0, weight.shape[0])]
        with without_autocast(x):
            A, B = extension.fold_factors(  # Ã [r, in], s · B̃ [out, r]
                [lora_A, lora_B], [input_basis, output_basis], kinds[::-1], [False, True], scaling, [x.dtype] * 2
            )
            y, h = extension.packed_lora_linear_fwd(
                x, weight, bias, [A], [B], rows, dropout_p, seeds, save_h=save_h, precision=precision
            )
        ctx.save_for_backward(x, h, weight, A, B, output_basis, input_basis, lora_A, lora_B, *seeds)
        ctx.kinds, ctx.scaling, ctx.dropout_p = kinds, scaling, dropout_p
        ctx.precision = precision
        return y

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        x, h, weight, A, B, output_basis, input_basis, lora_A, lora_B, *seeds = ctx.saved_tensors
        needs_x, needs_A, needs_B = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        output_kind, input_kind = ctx.kinds
        with without_autocast(dY):
            dX, dA, dB = backend_of_backward(BACKENDS, "extension").complora_linear_bwd(
                dY,
                x,
                h,
                weight,
                A,
                B,
                output_basis,
                input_basis,
                output_kind,
                input_kind,
                ctx.scaling,
                ctx.dropout_p,
                seeds,
                (needs_x, needs_A, needs_B),
                (lora_A, lora_B),
                precision=ctx.precision,
            )
        return (dX, None, None, dA, dB, *[None] * (8 + len(seeds)))


def backend_of_backward(backends: Mapping[str, Any], name: str) -> Any:
    """The backend of that name, or its twin that torch can differentiate: with `create_graph=True`, or batched."""
    return DIFFERENTIABLE[name] if is_differentiated() else backends[name]


def _unpack(tensors: Sequence[Tensor], adapters: int) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    seeds = len(tensors) - 2 * adapters
    return tensors[:seeds], tensors[seeds : seeds + adapters], tensors[seeds + adapters :]
