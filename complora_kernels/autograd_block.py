"""The autograd Functions of a residual block. LayerNorm and GELU outputs are not saved but computed again.

The residual stream passes through each node, so that its gradient is added where the norm's gradient is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from complora_kernels import eager, eager_block, extension, ops_block
from complora_kernels.autograd import backend_of_backward
from complora_kernels.common.tracing import is_differentiated
from complora_kernels.eager_block import Activated, Norm, Normed, Source
from complora_kernels.reference import without_autocast


class Linear(NamedTuple):
    """A frozen product with P adapters, perhaps none. Their factors are handed over apart: they get gradients."""

    weight: Tensor  # [N, K], as it is kept: under autocast in a wider dtype than the input
    bias: Tensor | None  # [N]
    rows: eager.Rows  # P of them
    dropout_p: float
    seeds: Sequence[Tensor]  # each [1]; none without dropout
    save_h: bool


class _Backend(NamedTuple):
    norm_fwd: Any
    norm_bwd: Any
    activation_fwd: Any
    activation_bwd: Any
    linear_fwd: Any
    linear_bwd: Any


def _torch_backend(products: Any) -> _Backend:
    linear = (partial(eager_block.linear_fwd, products), partial(eager_block.linear_bwd, products))
    shared = (eager_block.norm_fwd, eager_block.norm_bwd, eager_block.activation_fwd, eager_block.activation_bwd)
    return _Backend(*shared, *linear)


BACKENDS = {
    "torch": _torch_backend(eager),
    "extension": _torch_backend(extension),
    "triton": _Backend(*(getattr(ops_block, name) for name in _Backend._fields)),
}


class NormLoRALinearFunction(torch.autograd.Function):
    """`s = x + delta` and `y = n W^T + b + (drop(n) Ã^T) B̃^T` per adapter with `n = LN(s)`.

    Of the activations it saves s, its means and deviations, and h = drop(n) Ã^T. The last arguments are all Ãs, all B̃s.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, K]
        delta: Tensor | None,  # [M, K]
        norm: Norm,
        linear: Linear,
        dtype: torch.dtype,
        precision: str,
        backend: str,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        run, adapter = BACKENDS[backend], _adapter(linear, factors)
        with without_autocast(x):
            stream, normed, n, h = run.norm_fwd(x, delta, norm, dtype, *adapter)
            y, h = _linear_fwd(run, linear, factors, n, h, precision)
        ctx.save_for_backward(*_pack(normed), h, linear.weight, *linear.seeds, *factors)
        ctx.eps, ctx.dtype = norm.eps, dtype
        ctx.linear, ctx.precision, ctx.backend = _without_tensors(linear), precision, backend
        ctx.set_materialize_grads(False)
        stream = x.view_as(x) if delta is None else stream
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(stream)  # the first adapted block: below it no gradient is asked for
        return stream, y

    @staticmethod
    def backward(ctx: Any, d_stream: Tensor | None, dY: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        normed, (h, weight, *rest) = _unpack_normed(saved[:5], ctx.eps, ctx.dtype), saved[5:]
        linear, factors = _with_tensors(ctx.linear, weight, rest)
        needs_stream = any(ctx.needs_input_grad[:2])
        dx, d_factors = d_stream, (None,) * len(factors)
        if dY is not None:
            run = backend_of_backward(BACKENDS, ctx.backend)
            dY, d_stream = dY.resolve_neg(), None if d_stream is None else d_stream.resolve_neg()  # kernels read memory
            with without_autocast(dY):
                dn, d_factors = _linear_bwd(
                    run, linear, factors, dY, normed, h, needs_stream, ctx.needs_input_grad[7:], ctx.precision
                )
                dx = run.norm_bwd(dn, d_stream, normed) if needs_stream else None
        return dx, dx if ctx.needs_input_grad[1] else None, *[None] * 5, *d_factors


class NormLoRAMLPFunction(torch.autograd.Function):
    """`s + fc2(act(fc1(LN(s))))` with `s = x + delta`, both products with adapters.

    Of the activations it saves s, its means and deviations, h of both products and, unless it is recomputed, what the
    activation reads. The last arguments are fc1's Ãs and B̃s, then fc2's. s is returned beside the result, so that a
    backward pass that is differentiated again knows what it was computed from; None without delta, where s is x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [M, K]
        delta: Tensor | None,  # [M, K]
        norm: Norm,
        fc1: Linear,
        fc2: Linear,
        activation: str,
        recompute: bool,
        dtype: torch.dtype,
        precision: str,
        backend: str,
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        run = BACKENDS[backend]
        factors1, factors2 = factors[: 2 * len(fc1.rows)], factors[2 * len(fc1.rows) :]
        with without_autocast(x):
            stream, normed, n, h1 = run.norm_fwd(x, delta, norm, dtype, *_adapter(fc1, factors1))
            z, h1 = _linear_fwd(run, fc1, factors1, n, h1, precision, keep_h=recompute)
            a, h2 = run.activation_fwd(z, activation, *_adapter(fc2, factors2))
            y, h2 = _linear_fwd(run, fc2, factors2, a, h2, precision, residual=stream)
        if recompute:
            z = z.new_empty(0)
        ctx.save_for_backward(
            *_pack(normed), z, h1, fc1.weight, fc1.bias, *fc1.seeds, *factors1, h2, fc2.weight, *fc2.seeds, *factors2
        )
        ctx.eps, ctx.dtype, ctx.activation, ctx.recompute = norm.eps, dtype, activation, recompute
        ctx.fc1, ctx.fc2, ctx.precision, ctx.backend = _without_tensors(fc1), _without_tensors(fc2), precision, backend
        ctx.set_materialize_grads(False)
        if delta is None:
            return y, None
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(stream)
        return y, stream

    @staticmethod
    def backward(ctx: Any, dY: Tensor | None, d_stream: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors
        end1 = 9 + len(ctx.fc1.seeds) + 2 * len(ctx.fc1.rows)
        normed, (z, h1, weight1, bias1) = _unpack_normed(saved[:5], ctx.eps, ctx.dtype), saved[5:9]
        fc1, factors1 = _with_tensors(ctx.fc1, weight1, saved[9:end1], bias1)
        h2, weight2, *rest = saved[end1:]
        fc2, factors2 = _with_tensors(ctx.fc2, weight2, rest)
        needs_stream, needs1 = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[10 : 10 + len(factors1)]
        needs2 = ctx.needs_input_grad[10 + len(factors1) :]
        if dY is None:
            dx, d_factors = d_stream, [None] * (len(factors1) + len(factors2))
            return dx, dx if ctx.needs_input_grad[1] else None, *[None] * 8, *d_factors
        run, dx, d_factors1 = backend_of_backward(BACKENDS, ctx.backend), None, (None,) * len(factors1)
        dY = dY.resolve_neg()  # kernels read memory
        with without_autocast(dY):
            if ctx.recompute or is_differentiated():  # the saved z does not know its inputs
                z, _ = _linear_fwd(run, fc1, factors1, normed.compute(), h1 if fc1.rows else None, ctx.precision)
            below = needs_stream or any(needs1)
            source = Activated(z, ctx.activation)
            da, d_factors2 = _linear_bwd(run, fc2, factors2, dY, source, h2, below, needs2, ctx.precision)
            if below:
                dz = run.activation_bwd(da, z, ctx.activation)
                del da, z, source
                dn, d_factors1 = _linear_bwd(run, fc1, factors1, dz, normed, h1, needs_stream, needs1, ctx.precision)
                d_stream = dY if d_stream is None else dY + d_stream
                dx = run.norm_bwd(dn, d_stream, normed) if needs_stream else None
        return dx, dx if ctx.needs_input_grad[1] else None, *[None] * 8, *d_factors1, *d_factors2


def _adapter(linear: Linear, factors: Sequence[Tensor]) -> tuple[Sequence[Tensor], float, Sequence[Tensor]]:
    """What a norm or an activation computes h with: Ãs, dropout_p, seeds."""
    return factors[: len(linear.rows)], linear.dropout_p, linear.seeds


def _linear_fwd(
    run: _Backend,
    linear: Linear,
    factors: Sequence[Tensor],
    x: Tensor,  # [M, K]
    h: Tensor | None,  # [M, R]
    precision: str,
    *,
    residual: Tensor | None = None,  # [M, N]
    keep_h: bool = False,
) -> tuple[Tensor, Tensor]:  # y [M, N], h [M, R]
    weight, bias, rows, dropout_p, seeds, save_h = linear
    if not rows:
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y if residual is None else residual + y, x.new_empty(0)
    As, Bs = factors[: len(rows)], factors[len(rows) :]
    save_h = save_h or keep_h
    return run.linear_fwd(
        x, h, weight, bias, As, Bs, rows, dropout_p, seeds, residual=residual, save_h=save_h, precision=precision
    )


def _linear_bwd(
    run: _Backend,
    linear: Linear,
    factors: Sequence[Tensor],
    dY: Tensor,  # [M, N]
    source: Source,  # of [M, K]
    h: Tensor,  # [M, R]
    needs_x: bool,
    needs_factors: Sequence[bool],
    precision: str,
) -> tuple[Tensor | None, Sequence[Tensor | None]]:  # dX [M, K], dÃs and dB̃s
    weight, _, rows, dropout_p, seeds, _ = linear
    dY = dY.to(source.dtype)  # of the stream, which autocast leaves in float32
    if not rows:
        return dY @ weight.to(dY.dtype) if needs_x else None, ()
    As, Bs = factors[: len(rows)], factors[len(rows) :]
    needs = (needs_x, any(needs_factors[: len(rows)]), any(needs_factors[len(rows) :]))
    dX, dAs, dBs = run.linear_bwd(dY, source, h, weight, As, Bs, rows, dropout_p, seeds, needs, precision=precision)
    return dX, (*dAs, *dBs)


def _pack(normed: Normed) -> tuple[Tensor | None, ...]:
    return normed.x, normed.mean, normed.rstd, normed.norm.weight, normed.norm.bias


def _unpack_normed(saved: Sequence[Any], eps: float, dtype: torch.dtype) -> Normed:
    x, mean, rstd, weight, bias = saved
    return Normed(x, mean, rstd, Norm(weight, bias, eps), dtype)


def _without_tensors(linear: Linear) -> Linear:
    """What of a product is kept on the node itself. Tensors go through `save_for_backward`, which sees a write."""
    return linear._replace(weight=None, bias=None, seeds=[None] * len(linear.seeds))


def _with_tensors(
    linear: Linear, weight: Tensor, rest: Sequence[Tensor], bias: Tensor | None = None
) -> tuple[Linear, Sequence[Tensor]]:
    """The product again, and its factors, from the seeds and factors that were saved."""
    seeds = len(linear.seeds)
    return linear._replace(weight=weight, bias=bias, seeds=rest[:seeds]), rest[seeds:]
