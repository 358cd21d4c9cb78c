"""The operations of a pre-norm residual block around its attention, with the norm and the activation inside them.

    s = x + delta        q, k, v = packed_lora_linear(LN(s))        s + lora_linear(act(lora_linear(LN(s))))

Notation as in `functional`. LayerNorm and its affine part are frozen: they get no gradient. The results of LayerNorm
and the activation are not saved for the backward pass, which computes them again from what they read. The residual
stream passes through each autograd node, so that its gradient is added where the norm's gradient is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from complora_kernels import functional, reference
from complora_kernels.adapted_linear import AdaptedLinear, ProductGrads
from complora_kernels.autograd import backend_of_backward
from complora_kernels.backends import REFERENCE, REGISTRY, Backend
from complora_kernels.backends.torch import Activated, Norm, Normed, ProductInput, Source, whole_gradient
from complora_kernels.common.shapes import flatten, unflatten
from complora_kernels.common.tracing import is_differentiated
from complora_kernels.dropout import fresh_masks
from complora_kernels.reference import without_autocast

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
__all__ = ["ACTIVATIONS", "Norm", "norm_lora_linear", "norm_lora_mlp"]


def norm_lora_linear(
    x: Tensor,  # [..., in]
    delta: Tensor | None,  # [..., in]
    norm: Norm,
    *linears: AdaptedLinear,  # each [out, in]
    heads: Sequence[tuple[int, int]] | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:  # [..., in], each [..., out]
    """`s = x + delta` and `packed_lora_linear(LN(s), ...)`: residual, LayerNorm and the products that read it.

        ds = d_s + LN'(dn)    LN'(dn) = rstd · (w ∘ dn - mean(w ∘ dn) - ŝ · mean(w ∘ dn ∘ ŝ))    ŝ = (s - mean) · rstd

    where dn is the sum of the products' input gradients and d_s that of the first result. With `heads`, a pair (P, H)
    for each product, its columns come as P results [..., H, out / (P H)], whose gradients need not be put together
    where kernels read them as they come. `precision` None is that of
    each record, whose seeds and `save_h` are not read: new ones are drawn. The products run in autocast's dtype
    where that is on, else in that of x; LayerNorm in float32, or float64 when x is. Of the activations s, mean,
    rstd [M] and h [M, r] are saved. Without delta the first result is a view of x, and with `heads` the
    others are views: they are not to be written to.

    Raises:
        ValueError: as `packed_lora_linear`; a norm that does not fit or requires a gradient.
        RuntimeError: a backend that was asked for by name does not support the arguments.
    """
    if heads is not None:
        widths = [linear.weight.shape[0] for linear in linears]
        if len(heads) != len(linears) or any(N % (P * H) for N, (P, H) in zip(widths, heads, strict=True)):
            raise ValueError(f"heads={list(heads)}, expected for each product (P, H) whose P · H divides its {widths}")
    records, dtype, name = _prepare("norm_lora_linear", x, delta, norm, linears, precision, backend)
    if name == REFERENCE:
        pairs = [
            reference.norm_lora_linear(x, delta, norm, linear, dropout_masks=fresh_masks(x, linear))
            for linear in records
        ]
        return pairs[0][0], *_unbound([y for _, y in pairs], heads)
    tensors = itertools.chain.from_iterable(linear.tensors() for linear in records)
    parts = [linear.without_tensors() for linear in records]
    apart = heads if heads is not None and REGISTRY[name].reads_parts else [(1, 0)] * len(records)
    stream, *ys = NormLoRALinearFunction.apply(x, delta, norm, parts, apart, dtype, name, *tensors)
    return stream, *(ys if apart is heads else _unbound(ys, heads))


def norm_lora_mlp(
    x: Tensor,  # [..., in]
    delta: Tensor | None,  # [..., in]
    norm: Norm,
    fc1: AdaptedLinear,  # [hidden, in]
    fc2: AdaptedLinear,  # [in, hidden]
    activation: str,
    *,
    recompute: bool = False,
    precision: str | None = None,
    backend: str | None = None,
) -> Tensor:  # [..., in]
    """`s + fc2(act(fc1(LN(s))))` with `s = x + delta`: the second half of a residual block.

    `act` is "gelu", `z Φ(z)`, "gelu_tanh", `z (1 + tanh(√(2/π) (z + 0.044715 z³))) / 2`, or "quick_gelu",
    `z · sigmoid(1.702 z)`. Of the activations s, mean, rstd [M], h of both products and z [M, hidden] are saved; with
    `recompute` z is not, and the backward pass computes fc1 again. Otherwise as `norm_lora_linear`.

    Raises:
        ValueError: as `norm_lora_linear`; another activation.
        RuntimeError: a backend that was asked for by name does not support the arguments.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    (fc1, fc2), dtype, name = _prepare("norm_lora_mlp", x, delta, norm, [fc1, fc2], precision, backend)
    if name == REFERENCE:
        stream, z = reference.norm_lora_linear(x, delta, norm, fc1, dropout_masks=fresh_masks(x, fc1))
        return stream + reference.activation_lora_linear(z, activation, fc2, dropout_masks=fresh_masks(z, fc2))
    records = (fc1.without_tensors(), fc2.without_tensors())
    tensors = (*fc1.tensors(), *fc2.tensors())
    y, _ = NormLoRAMLPFunction.apply(x, delta, norm, *records, activation, recompute, dtype, name, *tensors)
    return y.view(x.shape)


class NormLoRALinearFunction(torch.autograd.Function):
    """`s = x + delta` and products `y = n W^T + b + (drop(n) Ã^T) B̃^T` per adapter with `n = LN(s)`.

    Of the activations it saves s, its means and deviations, and h = drop(n) Ã^T of each product. The last arguments are
    the tensors of one record after the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., K]
        delta: Tensor | None,  # [..., K]
        norm: Norm,
        linears: Sequence[AdaptedLinear],
        parts: Sequence[tuple[int, int]],  # of each product P, H: its columns are P results [..., H, D]; 1, 0: [..., N]
        dtype: torch.dtype,
        backend: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        run, wholes = REGISTRY[backend], _with_tensors(linears, tensors)
        with without_autocast(x):
            stream, normed, given = run.norm_fwd(*_flat(x, delta), norm, dtype, wholes[0])
            others = (_linear_fwd(run, ProductInput(given.x), whole) for whole in wholes[1:])
            products = [_linear_fwd(run, given, wholes[0]), *others]
        kept = itertools.chain.from_iterable([whole._replace(bias=None).tensors() for whole in wholes])
        stream = stream.view(x.shape) if delta is None else unflatten(stream, x.shape)
        ctx.save_for_backward(*_pack(normed, x if delta is None else stream), *[h for _, h in products], *kept)
        ctx.eps, ctx.dtype, ctx.linears, ctx.parts, ctx.backend = norm.eps, dtype, linears, parts, backend
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(stream)  # the first adapted block: below it no gradient is asked for
        ys, batch = [], x.shape[:-1]
        for (y, _), (P, H) in zip(products, parts, strict=True):
            if H:
                shape = (*batch, H, y.shape[1] // (P * H))
                ys += [part.view(shape) for part in (y.chunk(P, 1) if P > 1 else [y])]
            else:
                ys.append(unflatten(y, [*batch, y.shape[1]]))
        return stream, *ys

    @staticmethod
    def backward(ctx: Any, d_stream: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        saved, needed, first = ctx.saved_tensors, ctx.needs_input_grad, 5 + len(ctx.parts)
        normed, hs, linears = _unpack(saved[:5], ctx.eps, ctx.dtype), saved[5:first], ctx.linears
        dYs, shape = _put_together(grads, ctx.parts, normed.x.shape[0]), saved[0].shape
        d_stream = None if d_stream is None else flatten(d_stream)
        needs_stream, run = any(needed[:2]), backend_of_backward(ctx.backend)
        dn, dx, d_A, owns, remaining = None, d_stream, None, [], iter(needed[7:])
        with without_autocast(normed.x):
            source = normed if len(dYs) == 1 or not any(needed[7:]) else normed.compute()  # once for all products
            defer = sum(dY is not None for dY in dYs) == 1  # what is to be added to another product is whole
            for dY, h, linear in zip(dYs, hs, _with_tensors(linears, saved[first:]), strict=True):
                needs = list(itertools.islice(remaining, len(linear.tensors())))
                own = ProductGrads(None, [None] * len(linear.rows), [None] * len(linear.rows))
                if dY is not None:
                    own = _linear_bwd(run, dY, source, h, linear, needs_stream, needs, defer=defer)
                d_input: Any = own.x
                dn = d_input if dn is None else dn if d_input is None else dn + d_input
                owns.append(own)
            if dn is not None:
                dx, d_A = run.norm_bwd(dn, None if d_stream is None else d_stream.resolve_neg(), normed)
        whole = (own if own.x is not dn or d_A is None else own._replace(As=d_A) for own in owns)
        d_tensors = itertools.chain.from_iterable(map(AdaptedLinear.gradients, linears, whole))
        dx = None if dx is None else dx.view(shape)
        return dx, dx if needed[1] else None, *[None] * 5, *d_tensors


class NormLoRAMLPFunction(torch.autograd.Function):
    """`s + fc2(act(fc1(LN(s))))` with `s = x + delta`, both products with adapters.

    Of the activations it saves s, its means and deviations, h of both products and, unless it is recomputed, what the
    activation reads. The last arguments are the tensors of fc1's record, then of fc2's. s is returned beside the
    result, so that a backward pass that is differentiated again knows what it was computed from; None without delta,
    where s is x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., K]
        delta: Tensor | None,  # [..., K]
        norm: Norm,
        fc1: AdaptedLinear,
        fc2: AdaptedLinear,
        activation: str,
        recompute: bool,
        dtype: torch.dtype,
        backend: str,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        run = REGISTRY[backend]
        ctx.ends = end1 = len(fc1.tensors())
        whole1, whole2 = fc1.with_tensors(tensors[:end1]), fc2.with_tensors(tensors[end1:])
        whole1 = whole1._replace(save_h=whole1.save_h or recompute)
        with without_autocast(x):
            residual, normed, given = run.norm_fwd(*_flat(x, delta), norm, dtype, whole1, closing=whole2)
            z, h1 = _linear_fwd(run, given, whole1)
            onto = None if residual is normed.x else residual  # s in memory of its own, which y takes
            y, h2 = _linear_fwd(run, run.activation_fwd(z, activation, whole2, onto=onto), whole2, residual=residual)
        if recompute:
            z = z.new_empty(0)
        kept = (*whole1.tensors(), *whole2._replace(bias=None).tensors())
        ctx.save_for_backward(*_pack(normed, x if delta is None else normed.x), z, h1, h2, *kept)
        ctx.shape = x.shape
        ctx.eps, ctx.dtype, ctx.activation, ctx.recompute = norm.eps, dtype, activation, recompute
        ctx.fc1, ctx.fc2, ctx.backend = fc1, fc2, backend
        ctx.set_materialize_grads(False)
        if delta is None:
            return y, None
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(normed.x)
        return y, normed.x

    @staticmethod
    def backward(ctx: Any, dY: Tensor | None, d_stream: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        saved, needed, end1 = ctx.saved_tensors, ctx.needs_input_grad, ctx.ends
        normed, (z, h1, h2), tensors = _unpack(saved[:5], ctx.eps, ctx.dtype), saved[5:8], saved[8:]
        fc1, fc2 = ctx.fc1.with_tensors(tensors[:end1]), ctx.fc2.with_tensors(tensors[end1:])
        needs_stream, needs1, needs2 = any(needed[:2]), needed[9 : 9 + end1], needed[9 + end1 :]
        if dY is None:
            dx = None if d_stream is None else d_stream.view(ctx.shape)
            return dx, dx if needed[1] else None, *[None] * (7 + len(tensors))
        run, dx, d_fc1 = backend_of_backward(ctx.backend), None, [None] * end1
        dY = dY.resolve_neg()  # kernels read memory
        with without_autocast(dY):
            if ctx.recompute or is_differentiated():  # the saved z does not know its inputs
                z, _ = _linear_fwd(run, ProductInput(normed.compute(), h1 if fc1.rows else None), fc1)
            below = needs_stream or any(needs1)
            source: Any = Activated(z, ctx.activation)
            grads2 = _linear_bwd(run, dY, source, h2, fc2, below, needs2, defer=below)
            if below:
                da: Any = grads2.x
                dz, d_A = run.activation_bwd(da, z, ctx.activation)
                grads2 = ProductGrads(None, grads2.As if d_A is None else d_A, grads2.Bs)
                del da, z, source
                grads1 = _linear_bwd(run, dz, normed, h1, fc1, needs_stream, needs1, defer=True)
                d_stream = dY if d_stream is None else dY + d_stream
                if needs_stream and grads1.x is not None:
                    dx, d_A = run.norm_bwd(grads1.x, d_stream, normed)
                    grads1 = grads1 if d_A is None else grads1._replace(As=d_A)
                d_fc1 = fc1.gradients(grads1)
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, dx if needed[1] else None, *[None] * 7, *d_fc1, *fc2.gradients(grads2)


def _linear_fwd(
    run: Backend,
    given: ProductInput,  # x [M, K]
    linear: AdaptedLinear,
    *,
    residual: Tensor | None = None,  # [M, N]
) -> tuple[Tensor, Tensor]:  # y [M, N], h [M, R]
    x = given.x
    if linear.rows:
        return run.packed_lora_linear_fwd(given, linear, residual=residual)
    y = F.linear(x, linear.weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))
    return y if residual is None else residual + y, x.new_empty(0)


def _linear_bwd(
    run: Backend,
    dY: Tensor | Sequence[Tensor],  # [M, N], or parts [M, D] of equal width
    source: Source,  # gives x [M, K]
    h: Tensor,  # [M, R]
    linear: AdaptedLinear,
    needs_x: bool,
    needed: Sequence[bool],  # one flag for each tensor of the record
    *,
    defer: bool,  # whether what reads dX may add its second term
) -> ProductGrads:
    # Autocast leaves the stream, and so its gradient, in float32; kernels read memory.
    dtype = source.dtype
    own: Any = [_read(part, dtype) for part in ([dY] if isinstance(dY, Tensor) else dY)]
    dY = own[0] if len(own) == 1 else own if run.reads_parts else whole_gradient(own)
    if not linear.rows:
        return ProductGrads(whole_gradient(dY) @ linear.weight.to(dtype) if needs_x else None, [], [])
    return run.packed_lora_linear_bwd(dY, source, h, linear, linear.needs(needs_x, needed), defer=defer)


def _read(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A gradient as kernels read it."""
    grad = grad.resolve_neg() if grad.is_neg() else grad
    return grad if grad.dtype == dtype else grad.to(dtype)


def _unbound(
    ys: Sequence[Tensor],  # each [..., N]
    heads: Sequence[tuple[int, int]] | None,
) -> Sequence[Tensor]:
    """The columns of each product as P results [..., H, N / (P H)]: the gradients of all are packed by one copy."""
    if heads is None:
        return ys
    return [part for y, (P, H) in zip(ys, heads, strict=True) for part in y.unflatten(-1, (P, H, -1)).unbind(-3)]


def _put_together(
    grads: Sequence[Tensor | None],  # each [..., H, D], or [..., D]
    parts: Sequence[tuple[int, int]],  # P, H of each product
    M: int,
) -> list[Any]:
    """The gradient of each product, as one tensor [M, D] or as its parts; None where nothing was computed from it."""
    remaining, dYs = iter(grads), []
    for P, H in parts:
        own = list(itertools.islice(remaining, P))
        known = next((grad for grad in own if grad is not None), None)
        if known is None:
            dYs.append(None)
            continue
        shape = (M, known.shape[-1] * max(H, 1))
        whole = [known.new_zeros(shape) if grad is None else grad.reshape(shape) for grad in own]
        dYs.append(whole if P > 1 else whole[0])
    return dYs


def _with_tensors(linears: Sequence[AdaptedLinear], tensors: Sequence[Any]) -> list[AdaptedLinear]:
    """Whole records again, from the tensors of one after the other."""
    remaining = iter(tensors)
    return [linear.with_tensors(list(itertools.islice(remaining, len(linear.tensors())))) for linear in linears]


def _pack(normed: Normed, x: Tensor) -> tuple[Tensor | None, ...]:
    """What is saved of a norm; `x` is what it read as autograd knows it, an argument or a result, of any shape."""
    return x, normed.mean, normed.rstd, normed.norm.weight, normed.norm.bias


def _unpack(saved: Sequence[Any], eps: float, dtype: torch.dtype) -> Normed:
    x, mean, rstd, weight, bias = saved
    return Normed(flatten(x), mean, rstd, Norm(weight, bias, eps), dtype)


def _prepare(
    operation: str,
    x: Tensor,
    delta: Tensor | None,
    norm: Norm,
    linears: Sequence[AdaptedLinear],
    precision: str | None,
    backend: str | None,
) -> tuple[Sequence[AdaptedLinear], torch.dtype, str]:
    """The records as the backend takes them, the dtype of the products, and the name of the backend.

    Raises:
        ValueError, RuntimeError: as `norm_lora_linear`.
    """
    linears = [linear._replace(precision=precision) for linear in linears] if precision else linears
    _check(x, delta, norm, linears, in_a_row=operation == "norm_lora_mlp")
    dtype = functional.compute_dtype(x)

    def unsupported(backend: Backend) -> str | None:
        like = x if x.dtype == dtype else x.new_empty(0, dtype=dtype)
        tensors = itertools.chain.from_iterable([linear.tensors() for linear in linears])
        reasons = (backend.unsupported_linear(like, linear) for linear in linears)
        return (
            backend.unsupported_norm(x, delta, norm.weight, norm.bias, *tensors)
            or next(filter(None, reasons), None)
            or backend.unsupported_tensors("x", [x])
        )

    dropping = any(linear.dropout_p for linear in linears)
    name = functional.resolve(backend, operation, x, unsupported, dropping=dropping)
    return [functional.for_backend(x, linear, dtype, name) for linear in linears], dtype, name


def _check(x: Tensor, delta: Tensor | None, norm: Norm, linears: Sequence[AdaptedLinear], *, in_a_row: bool) -> None:
    width, device = x.shape[-1:], x.device
    for name, tensor in (("norm.weight", norm.weight), ("norm.bias", norm.bias)):
        if tensor is None:
            continue
        if tensor.shape != width or tensor.device != device:
            raise ValueError(f"{name} {tuple(tensor.shape)} on {tensor.device}, expected {tuple(width)} on {device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}.requires_grad=True, expected a frozen norm: it gets no gradient here")
    if delta is not None and (delta.shape != x.shape or delta.device != device):
        raise ValueError(f"delta {tuple(delta.shape)} on {delta.device}, expected as x, {tuple(x.shape)} on {device}")
    inputs: int | None = None
    for linear in linears:
        if not len(linear.As) == len(linear.Bs) == len(linear.rows):
            lengths = ", ".join(str(len(part)) for part in (linear.As, linear.Bs, linear.rows))
            raise ValueError(f"As, Bs, rows have lengths {lengths}, expected equal ones")
        functional.check_linear(x, linear, inputs=inputs)
        if in_a_row:
            inputs = linear.weight.shape[0]
    if in_a_row and linears[1].weight.shape != (shape := linears[0].weight.shape)[::-1]:
        raise ValueError(f"fc1 {tuple(shape)} and fc2 {tuple(linears[1].weight.shape)}, expected transposed shapes")


def _flat(x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor | None]:  # each [M, K]
    return flatten(x), None if delta is None else flatten(delta)
