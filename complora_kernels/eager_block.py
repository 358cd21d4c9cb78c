"""The torch backend of a residual block: norms, activations and the products that read them.

A block saves what its norms and activations read, not what they return: the backward pass takes `Normed` or `Activated`
in the place of a product's input and computes it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from complora_kernels.eager import Rows

QUICK_GELU = 1.702  # x · sigmoid(1.702 x), the GELU of OpenAI's CLIP models


class Norm(NamedTuple):
    """A frozen LayerNorm over the last dimension."""

    weight: Tensor  # [K]
    bias: Tensor | None  # [K]
    eps: float


class Normed(NamedTuple):
    """`LN(x)` in the dtype of the product that reads it, from what is saved of it."""

    x: Tensor  # [M, K]
    mean: Tensor  # [M], float32 or wider
    rstd: Tensor  # [M], 1 / sqrt(var + eps)
    norm: Norm
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def device(self) -> torch.device:
        return self.x.device

    def compute(self) -> Tensor:  # [M, K]
        return normalize(self.x, self.norm, self.dtype)[0]


class Activated(NamedTuple):
    """`act(z)`, from z."""

    z: Tensor  # [M, K]
    activation: str  # "gelu" or "quick_gelu"

    @property
    def dtype(self) -> torch.dtype:
        return self.z.dtype

    @property
    def shape(self) -> torch.Size:
        return self.z.shape

    @property
    def device(self) -> torch.device:
        return self.z.device

    def compute(self) -> Tensor:  # [M, K]
        return activate(self.z, self.activation)


Source = Normed | Activated  # of a product's input


def normalize(x: Tensor, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`LN(x)` [M, K] rounded to `dtype`, with mean and rstd [M]; computed in float32, or float64 when x is."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normed, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], *_affine(norm, wide), norm.eps)
    return normed.to(dtype), mean.view(-1), rstd.view(-1)


def _affine(norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return norm.weight.to(dtype), None if norm.bias is None else norm.bias.to(dtype)


def activate(z: Tensor, activation: str) -> Tensor:
    """`z · Φ(z)` or `z · sigmoid(1.702 z)`."""
    if activation == "gelu":
        return F.gelu(z)
    if z.requires_grad and torch.is_grad_enabled():  # a backward pass that is differentiated again
        return (QUICK_GELU * z).sigmoid() * z
    return (QUICK_GELU * z).sigmoid_().mul_(z)


def norm_fwd(
    x: Tensor,  # [M, K], the residual stream
    delta: Tensor | None,  # [M, K], what is added to it first
    norm: Norm,
    dtype: torch.dtype,  # of the product that reads the result
    As: Sequence[Tensor],  # each [r, K], the factors of that product
    dropout_p: float,
    seeds: Sequence[Tensor],  # each [1]; none without dropout
) -> tuple[Tensor, Normed, Tensor, Tensor | None]:
    """`x + delta` [M, K], its norm to be saved, the norm [M, K], and h = drop(norm) Ã^T [M, R] where it comes for free.

    h is None here: the product computes it.
    """
    stream = x if delta is None else x + delta
    normed, mean, rstd = normalize(stream, norm, dtype)
    return stream, Normed(stream, mean, rstd, norm, dtype), normed, None


def norm_bwd(
    d_normed: Tensor,  # [M, K]
    d_stream: Tensor | None,  # [M, K], the gradient of the residual stream behind the norm
    normed: Normed,
) -> Tensor:  # [M, K], in the dtype of the stream
    """`dx = d_stream + rstd · (w ∘ dn - mean(w ∘ dn) - x̂ · mean(w ∘ dn ∘ x̂))` with `x̂ = (x - mean) · rstd`."""
    x, wide = normed.x, normed.mean.dtype
    mean, rstd = normed.mean.unsqueeze(1), normed.rstd.unsqueeze(1)  # [M, 1]
    weight, bias = _affine(normed.norm, wide)
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        d_normed.to(wide), x.to(wide), x.shape[-1:], mean, rstd, weight, bias, [True, False, False]
    )
    return (dx if d_stream is None else dx.add_(d_stream)).to(x.dtype)


def activation_fwd(
    z: Tensor,  # [M, K]
    activation: str,
    As: Sequence[Tensor],  # each [r, K], the factors of the product that reads the result
    dropout_p: float,
    seeds: Sequence[Tensor],  # each [1]; none without dropout
) -> tuple[Tensor, Tensor | None]:
    """`act(z)` [M, K], and h = drop(act(z)) Ã^T [M, R] where it comes for free. h is None here."""
    return activate(z, activation), None


def activation_bwd(
    da: Tensor,  # [M, K]
    z: Tensor,  # [M, K]
    activation: str,
) -> Tensor:  # [M, K]
    """`dz = da ∘ act'(z)`: `Φ(z) + z φ(z)`, or `σ + 1.702 z σ (1 - σ)` with `σ = sigmoid(1.702 z)`."""
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(da, z)
    scaled = QUICK_GELU * z  # act(z) = silu(1.702 z) / 1.702, whose slope is that of silu at 1.702 z
    if z.dtype == torch.float16:
        scaled.clamp_(-1e4, 1e4)  # where the slope is 0 or 1; infinite beyond 38487, it would be NaN
    return torch.ops.aten.silu_backward.grad_input(da, scaled, grad_input=scaled)


def linear_fwd(
    products: ModuleType,  # `eager` or `extension`
    x: Tensor,  # [M, K]
    h: Tensor | None,  # [M, R], where it is known
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    rows: Rows,
    dropout_p: float,
    seeds: Sequence[Tensor],
    *,
    residual: Tensor | None = None,  # [M, N]
    save_h: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:  # y [M, N], in the dtype of the residual where there is one; h [M, R], or [0, R]
    """`packed_lora_linear`, plus a residual."""
    y, kept_h = products.packed_lora_linear_fwd(
        x, weight, bias, As, Bs, rows, dropout_p, seeds, save_h=save_h, precision=precision, h=h
    )
    if residual is not None:
        y = y.add_(residual) if y.dtype == residual.dtype else residual + y
    return y, kept_h


def linear_bwd(
    products: ModuleType,
    dY: Tensor,  # [M, N]
    source: Source,  # of the product's input [M, K]
    h: Tensor,  # [M, R]
    weight: Tensor,  # [N, K]
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    rows: Rows,
    dropout_p: float,
    seeds: Sequence[Tensor],
    needs: tuple[bool, bool, bool],
    *,
    precision: str,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """As `packed_lora_linear_bwd`: dX [M, K], dÃs, dB̃s, of which `needs` says what is computed."""
    _, needs_A, _ = needs
    shape = torch.empty(1, dtype=source.dtype, device=source.device).expand(source.shape)
    x = source.compute() if needs_A else shape  # of which nothing else is read
    return products.packed_lora_linear_bwd(dY, x, h, weight, As, Bs, rows, dropout_p, seeds, needs, precision=precision)
