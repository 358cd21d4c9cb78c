"""The torch backend: folded factors, norms and activations by torch's own operations, on any device and dtype.

`plans` says how the rank-r term joins the base product: added to it (`addmm`, in float32), as one product
`[x | h] [W | B̃]^T` (`concat`, where a second rounding would lose most of a small adapter), or in the weight (`merge`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from complora_kernels.adapted_linear import AdaptedLinear, Deferred, Needs, ProductGrads
from complora_kernels.backends import plans
from complora_kernels.common.shapes import flatten, unflatten
from complora_kernels.common.tracing import is_checkpointed_selectively
from complora_kernels.dropout import drop, dropout_mask
from complora_kernels.reference import Norm

GELU = {"gelu": "none", "gelu_tanh": "tanh"}  # how torch approximates `z · Φ(z)`
QUICK_GELU = 1.702  # quick_gelu(z) = z · sigmoid(1.702 z), the GELU of OpenAI's CLIP models


class Normed(NamedTuple):
    """`LN(x)` as the input of a product, held by what the norm read: a backward pass computes it again."""

    x: Tensor  # [M, K]
    mean: Tensor  # [M], float32 or wider
    rstd: Tensor  # [M], 1 / sqrt(var + eps)
    norm: Norm
    dtype: torch.dtype  # the dtype of the product

    @property
    def input(self) -> Tensor:
        return self.x

    def compute(self) -> Tensor:  # [M, K]
        return normalize(self.x, self.norm, self.dtype)[0]


class Activated(NamedTuple):
    """`act(z)` as the input of a product, held by z: a backward pass computes it again."""

    z: Tensor  # [M, K]
    activation: str  # "gelu", "gelu_tanh" or "quick_gelu"

    @property
    def input(self) -> Tensor:
        return self.z

    @property
    def dtype(self) -> torch.dtype:
        return self.z.dtype

    def compute(self) -> Tensor:  # [M, K]
        return activate(self.z, self.activation)


Source = Tensor | Normed | Activated  # gives the backward pass of a product its input [M, K]


class SideBySide(NamedTuple):
    """The matrices of a product whose input was written with h in the same rows: `inputs weights^T`."""

    inputs: Tensor  # [x | h | 0] [M, C]; with a bias inside, [x | h | 1 | 0]
    weights: Tensor  # [W | B̃ | 0] [N, C]; with a bias inside, [W | B̃ | b | 0]
    onto: Tensor | None = None  # [M, N]: the residual, which the product, its bias inside, is added to in place


class ProductInput(NamedTuple):
    """What a norm or an activation hands to the product that reads it."""

    x: Tensor  # [M, K]
    h: Tensor | None = None  # [M, R], where it was computed with x; [0, R] where the product does not save it
    beside: SideBySide | None = None  # the matrices whose product y is
    plan: plans.Plan | None = None  # how the product is computed, where that was chosen with x


def input_of(source: Source, *, shape_only: bool = False) -> Tensor:  # [M, K]
    """The input of a product; with `shape_only`, a tensor of its shape, dtype and device that holds no values."""
    if isinstance(source, Tensor):
        return source
    if shape_only:
        return torch.empty(1, dtype=source.dtype, device=source.input.device).expand(source.input.shape)
    return source.compute()


class TorchBackend:
    """Folded factors on torch's own products."""

    name = "torch"
    purpose = "folded factors on torch's own products, any device and dtype"
    philox = False
    reads_parts = False
    own_operations = False
    automatic = True

    def unavailable(self) -> str | None:
        return None

    def unsupported_tensors(
        self, label: str, tensors: Sequence[Tensor], bases: Sequence[Tensor | None] = (), dtype: Any = None
    ) -> str | None:
        return None

    def unsupported_linear(self, x: Tensor, linear: AdaptedLinear) -> str | None:
        return None

    def unsupported_norm(self, x: Tensor, *others: Tensor | None) -> str | None:
        return None

    def project_complement(
        self,
        factor: Tensor,  # [..., d]
        basis: Tensor,  # [d, k]
        basis_kind: str,
    ) -> Tensor:
        """In float32 or wider: in half precision the result would leave the complement."""
        return _cast(_projected(factor, basis, basis_kind), factor.dtype)

    def fold_factors(
        self,
        factors: Sequence[Tensor],  # each [r, d], those of the output side [d, r]
        bases: Sequence[Tensor | None],  # each [d, k]
        kinds: Sequence[str],
        output_side: Sequence[bool],
        scaling: float,
        dtypes: Sequence[torch.dtype],
    ) -> list[Tensor]:  # each in the shape of its factor
        folded = []
        for factor, basis, kind, output, dtype in zip(factors, bases, kinds, output_side, dtypes, strict=True):
            factor = factor.to(torch.promote_types(factor.dtype, dtype))
            if output:
                folded.append(_cast(_projected(factor.mT, basis, kind).mT.mul(scaling), dtype))  # s · P_out B, [out, r]
            else:
                folded.append(_cast(_projected(factor, basis, kind), dtype))  # Ã = A P_in, [r, in]
        return folded

    fold_factors_bwd = fold_factors  # P is symmetric

    def packed_lora_linear_fwd(
        self,
        given: ProductInput,  # x [M, K], h [M, R]; this backend makes no more
        linear: AdaptedLinear,  # weight [N, K]
        *,
        residual: Tensor | None = None,  # [M, N]
    ) -> tuple[Tensor, Tensor]:  # y [M, N], h [M, R]
        x, h, As, Bs, rows = given.x, given.h, linear.As, linear.Bs, linear.rows
        plan = plans.choose_for(x, linear, "torch").name
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        if h is None and linear.seeds:
            dropped = self._drop_each(x, linear)
            h = torch.cat([dropped_x @ A.mT for A, dropped_x in zip(As, dropped, strict=True)], 1)  # [M, R]
        elif h is None and (linear.save_h or plan != "merge"):
            h = x @ _stack(As).mT  # [M, R]
        elif h is None:
            h = x.new_empty(0, linear.rank)
        if linear.columns is not None:
            h = h.where(linear.columns, 0.0)
        if plan == "merge":
            y = F.linear(x, _merged(linear, x.dtype), bias)  # x (W + ΔW)^T + b
        elif plan == "concat":
            wide = torch.cat([linear.weight.to(x.dtype), block_diagonal(linear)], 1)
            y = F.linear(torch.cat([x, h], 1), wide, bias)  # [x | h] [W | B̃]^T + b
        else:
            y = F.linear(x, linear.weight.to(x.dtype), bias)  # [M, N]
            y = y.clone() if is_checkpointed_selectively() else y  # checkpointing may keep the product
            for h_i, B, (start, stop) in zip(_split(h, As), Bs, rows, strict=True):
                y[:, start:stop].addmm_(h_i, B.mT)
        return add_residual(y, residual), h if linear.save_h else h.new_empty(0, h.shape[1])

    def packed_lora_linear_bwd(
        self,
        dY: Tensor,  # [M, N]; this backend gets it whole
        source: Source,  # gives x [M, K]
        h: Tensor,  # [M, R]
        linear: AdaptedLinear,  # weight [N, K]
        needs: Needs,
        *,
        defer: bool = False,  # not used: dX is whole
    ) -> ProductGrads:
        As, Bs, rows, seeds = linear.As, linear.Bs, linear.rows, linear.seeds
        x = input_of(source, shape_only=not needs.A)
        dAs: list[Tensor | None] = [None] * len(As)
        dBs: list[Tensor | None] = [None] * len(Bs)
        dX = None
        if needs.B:
            # each [rows, r], as (h^T dY)^T rather than dY^T h: the long dimension of dY stays the contiguous one
            dBs = [(h_i.mT @ dY[:, start:stop]).mT for h_i, (start, stop) in zip(_split(h, As), rows, strict=True)]
        plan = plans.choose_for(x, linear, "torch").name
        if not (needs.A or needs.x):
            return ProductGrads(None, dAs, dBs)
        if plan == "merge" and not needs.A:
            return ProductGrads(input_grad(dY, x.new_empty(0), linear, plan, x.dtype), dAs, dBs)
        gs = [dY[:, start:stop] @ B for B, (start, stop) in zip(Bs, rows, strict=True)]  # each [M, r]
        if seeds:
            wide = sum_dtype(plan, x.dtype)
            dX = dY.to(wide) @ linear.weight.to(x.dtype).to(wide) if needs.x else None
            for i, (A, g, seed) in enumerate(zip(As, gs, seeds, strict=True)):
                mask = dropout_mask(dY, x.shape, seed, linear.dropout_p)  # [M, K], drawn once for both gradients
                if needs.A:
                    dAs[i] = g.mT @ drop(x, mask, linear.dropout_p)
                if dX is not None:
                    dX += drop(g.to(wide) @ A.to(wide), mask, linear.dropout_p)
            dX = None if dX is None else dX.to(x.dtype)
        else:
            g = torch.cat(gs, 1) if len(gs) > 1 else gs[0]  # [M, R]
            if needs.A:
                dAs = list((g.mT @ x).split_with_sizes([A.shape[0] for A in As]))
            if needs.x:
                dX = input_grad(dY, g, linear, plan, x.dtype)
        return ProductGrads(dX, dAs, dBs)

    def norm_fwd(
        self,
        x: Tensor,  # [M, K]
        delta: Tensor | None,  # [M, K]
        norm: Norm,
        dtype: torch.dtype,
        reader: AdaptedLinear,
        *,
        closing: AdaptedLinear | None = None,  # not used: s is not written twice
    ) -> tuple[Tensor, Normed, ProductInput]:
        stream = x if delta is None else x + delta
        normed, mean, rstd = normalize(stream, norm, dtype)
        return stream, Normed(stream, mean, rstd, norm, dtype), ProductInput(normed)

    def norm_bwd(
        self,
        d_normed: Tensor | Deferred,  # [M, K]; never deferred by this backend
        d_stream: Tensor | None,  # [M, K]
        normed: Normed,
    ) -> tuple[Tensor, Sequence[Tensor] | None]:  # ds [M, K], each dÃ [r, K] or None
        assert isinstance(d_normed, Tensor)
        x, wide = normed.x, normed.mean.dtype
        mean, rstd = normed.mean.unsqueeze(1), normed.rstd.unsqueeze(1)  # [M, 1]
        weight, bias = _affine(normed.norm, wide)
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            d_normed.to(wide), x.to(wide), x.shape[-1:], mean, rstd, weight, bias, [True, False, False]
        )
        return (dx if d_stream is None else dx.add_(d_stream)).to(x.dtype), None

    def activation_fwd(
        self,
        z: Tensor,  # [M, K]
        activation: str,
        reader: AdaptedLinear,
        *,
        onto: Tensor | None = None,  # never made by this backend
    ) -> ProductInput:
        return ProductInput(activate(z, activation))

    def activation_bwd(
        self,
        da: Tensor | Deferred,  # [M, K]; never deferred by this backend
        z: Tensor,  # [M, K]
        activation: str,
    ) -> tuple[Tensor, Sequence[Tensor] | None]:  # dz [M, K], each dÃ [r, K] or None
        assert isinstance(da, Tensor)
        return self._activation_bwd(da, z, activation), None

    def _activation_bwd(
        self,
        da: Tensor,  # [M, K]
        z: Tensor,  # [M, K]
        activation: str,
    ) -> Tensor:  # [M, K]
        if activation in GELU:
            return torch.ops.aten.gelu_backward(da, z, approximate=GELU[activation])
        scaled = QUICK_GELU * z  # act(z) = silu(1.702 z) / 1.702, whose slope is that of silu at 1.702 z
        if z.dtype == torch.float16:
            scaled.clamp_(-1e4, 1e4)  # the slope is 0 or 1 there; an infinite 1.702 z, beyond 38487, would make it NaN
        return torch.ops.aten.silu_backward.grad_input(da, scaled, grad_input=scaled)

    def _drop_each(self, x: Tensor, linear: AdaptedLinear) -> Iterable[Tensor]:
        """Each adapter's `drop(x)` [M, K]. A generator: each mask is gone before the next is drawn."""
        p = linear.dropout_p
        return (drop(x, dropout_mask(x, x.shape, seed, p), p) for seed in linear.seeds)


def normalize(x: Tensor, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`LN(x)` [M, K] rounded to `dtype`, with mean and rstd [M]; computed in float32, or float64 when x is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], *_affine(norm, wide), norm.eps)
    return normed.to(dtype), mean.view(-1), rstd.view(-1)


def _affine(norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return norm.weight.to(dtype), None if norm.bias is None else norm.bias.to(dtype)


def activate(z: Tensor, activation: str) -> Tensor:
    """`z · Φ(z)`, exact or with the tanh of `blocks.norm_lora_mlp`, or `z · sigmoid(1.702 z)`."""
    if activation in GELU:
        return F.gelu(z, approximate=GELU[activation])
    if z.requires_grad and torch.is_grad_enabled():  # a backward pass that is differentiated again
        return (QUICK_GELU * z).sigmoid() * z
    return (QUICK_GELU * z).sigmoid_().mul_(z)


def whole_gradient(dY: Tensor | Sequence[Tensor]) -> Tensor:  # [M, N]
    """The gradient of a product from those of its columns [M, D], side by side."""
    return dY if isinstance(dY, Tensor) else torch.cat(list(dY), 1)


def add_residual(y: Tensor, residual: Tensor | None) -> Tensor:
    """`y + residual`, in the dtype of the residual; y is written to where it has that dtype."""
    if residual is None:
        return y
    return y.add_(residual) if y.dtype == residual.dtype else residual + y


def input_grad(
    dY: Tensor,  # [M, N]
    g: Tensor,  # [M, R]; not read by the plan `merge`
    linear: AdaptedLinear,
    plan: str,
    dtype: torch.dtype,
) -> Tensor:  # [M, K]
    """`dX = dY W + g Ã` without dropout, by a plan."""
    if plan == "merge":
        return dY @ _merged(linear, dtype)  # dY (W + ΔW)
    weight = linear.weight.to(dtype)
    if plan == "concat":
        return torch.cat([dY, g], 1) @ torch.cat([weight, _stack(linear.As)])  # [dY | g] [W ; Ã]
    return (dY @ weight).addmm_(g, _stack(linear.As))


def sum_dtype(plan: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the two terms of dX are added where a mask stands between them."""
    return torch.promote_types(dtype, torch.float32) if plan == "concat" else dtype


def block_diagonal(linear: AdaptedLinear) -> Tensor:  # [N, R]
    """Each adapter's B̃ in its own rows and columns."""
    Bs, N = linear.Bs, len(linear.weight)
    if len(Bs) == 1 and len(Bs[0]) == N:
        return Bs[0]
    wide = Bs[0].new_zeros(N, linear.rank)
    column = 0
    for B, (start, stop) in zip(Bs, linear.rows, strict=True):
        wide[start:stop, column : column + B.shape[1]] = B
        column += B.shape[1]
    return wide


def _merged(linear: AdaptedLinear, dtype: torch.dtype) -> Tensor:  # [N, K]
    """`W + B̃ Ã` in the rows of each adapter, added in float32 or wider and rounded once."""
    wide = torch.promote_types(linear.weight.dtype, torch.float32)
    merged = linear.weight.to(wide, copy=True)
    for A, B, (start, stop) in zip(linear.As, linear.Bs, linear.rows, strict=True):
        merged[start:stop].addmm_(B.to(wide), A.to(wide))
    return merged.to(dtype)


def _projected(factor: Tensor, basis: Tensor | None, kind: str) -> Tensor:
    """`factor P` in float32, or float64 when the factor is, with 4·r·d·k operations and no [d, d] product.

    Where torch is allowed TF32, these products use it.
    """
    factor = factor.to(torch.promote_types(factor.dtype, torch.float32))
    if basis is None:
        return factor
    rows = flatten(factor)  # [R, d]
    basis = basis.to(factor.dtype)
    coordinates = rows @ basis  # [R, k]
    if kind == "complement":
        return unflatten(coordinates @ basis.mT, factor.shape)
    return unflatten(torch.addmm(rows, coordinates, basis.mT, alpha=-1), factor.shape)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, but not to its own: torch.compile of torch 2.11 loses the gradient of such an output."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _stack(As: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(As)) if len(As) > 1 else As[0]  # [R, K]


def _split(h: Tensor, As: Sequence[Tensor]) -> Sequence[Tensor]:
    return h.split_with_sizes([A.shape[0] for A in As], 1) if len(As) > 1 else [h]  # each [M, r]
