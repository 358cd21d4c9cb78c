"""The truth: every operation under its own name in plain PyTorch, to be checked against the formulas, never optimised.

Gradients come from autograd. Products run in the dtype of `x`; projections in float32, or float64 when the factors are.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from complora_kernels.adapted_linear import AdaptedLinear


class Norm(NamedTuple):
    """A frozen LayerNorm over the last dimension."""

    weight: Tensor  # [K]
    bias: Tensor | None  # [K]
    eps: float


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of devices; torch has none for "meta"."""
    return device != "meta" and torch.is_autocast_enabled(device)


_AS_IT_IS = contextlib.nullcontext()


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """A block in which autocast does not lower what is computed in a chosen dtype, on the device of `tensor`."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if autocasts(device) else _AS_IT_IS


def project_complement(
    factor: Tensor,  # [..., d]
    basis: Tensor,  # [d, k]
    *,
    basis_kind: str = "principal",
) -> Tensor:
    """`factor (I - U U^T)` for a principal basis U, `factor U U^T` for a complement basis."""
    wide = _wide(factor)
    basis = basis.to(wide.dtype)
    with without_autocast(factor):
        inside = (wide @ basis) @ basis.mT  # [..., d]
    return (wide - inside if basis_kind == "principal" else inside).to(factor.dtype)


def fold_factors(
    lora_As: Sequence[Tensor],  # each [r, in]
    lora_Bs: Sequence[Tensor],  # each [out, r]
    output_bases: Sequence[Tensor | None],  # each [out, k]
    input_bases: Sequence[Tensor | None],  # each [in, k]
    *,
    output_basis_kinds: Sequence[str],
    input_basis_kinds: Sequence[str],
    scaling: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """`Ã = A P_in` and `scaling · B̃ = scaling · P_out B` for every layer."""
    folded_As, folded_Bs = [], []
    for A, U, kind in zip(lora_As, input_bases, input_basis_kinds, strict=True):
        projected = A if U is None else project_complement(_wide(A), U, basis_kind=kind)
        folded_As.append(projected.to(dtype or A.dtype))
    for B, U, kind in zip(lora_Bs, output_bases, output_basis_kinds, strict=True):
        projected = _wide(B) if U is None else project_complement(_wide(B).mT, U, basis_kind=kind).mT
        folded_Bs.append((scaling * projected).to(dtype or B.dtype))
    return folded_As, folded_Bs


def bound_updates(
    folded_As: Sequence[Tensor],  # each [r, in]
    scaled_Bs: Sequence[Tensor],  # each [out, r]
    limits: Sequence[Tensor],  # each a scalar
    *,
    norm: str = "frobenius",
    dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """`ΔW' = ΔW · min(1, limit / |ΔW|)` of `ΔW = B A`, as another B; of ΔW itself, in torch's own norms."""
    bounded_Bs = []
    for A, B, limit in zip(folded_As, scaled_Bs, limits, strict=True):
        with without_autocast(B):
            delta = _wide(B) @ _wide(A)  # [out, in]
        size = torch.linalg.matrix_norm(delta, 2 if norm == "spectral" else "fro")
        within = size <= limit
        share = torch.where(within, 1, limit / torch.where(within, 1, size))  # the gradient of limit / 0 is NaN
        bounded_Bs.append((share * _wide(B)).to(dtype or B.dtype))
    return [A.to(dtype or A.dtype) for A in folded_As], bounded_Bs


def packed_lora_linear(
    x: Tensor,  # [..., in]
    linear: AdaptedLinear,  # weight [out, in]
    *,
    dropout_masks: Sequence[Tensor] | None = None,  # each [..., in], 0 or 1 / (1 - p)
) -> Tensor:  # [..., out]
    """`y = x W^T + b`, plus `((m ∘ x) Ã^T) B̃^T` in the rows of each adapter; where `columns` is False, h is 0."""
    y = F.linear(x, linear.weight, linear.bias)  # [..., out]
    first = 0
    for i, (A, B, (start, stop)) in enumerate(zip(linear.As, linear.Bs, linear.rows, strict=True)):
        dropped = x if dropout_masks is None else x * dropout_masks[i]
        h = dropped @ A.mT  # [..., r]
        if linear.columns is not None:
            h = torch.where(linear.columns[..., first : first + len(A)], h, 0.0)
            first += len(A)
        update = h @ B.mT  # [..., stop - start]
        y = y + F.pad(update, (start, len(linear.weight) - stop))
    return y


def lora_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    folded_A: Tensor,  # [r, in]
    folded_B: Tensor,  # [out, r]
    *,
    scaling: float = 1.0,
    dropout_mask: Tensor | None = None,  # [..., in], 0 or 1 / (1 - p)
) -> Tensor:  # [..., out]
    """`y = x W^T + b + scaling · ((m ∘ x) Ã^T) B̃^T`."""
    linear = AdaptedLinear(weight, bias, [folded_A], [scaling * folded_B], [(0, len(weight))])
    return packed_lora_linear(x, linear, dropout_masks=None if dropout_mask is None else [dropout_mask])


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
    dropout_mask: Tensor | None = None,  # [..., in], 0 or 1 / (1 - p)
) -> Tensor:  # [..., out]
    """`y = x W^T + b + scaling · ((m ∘ x) (A P_in)^T) (P_out B)^T`."""
    (folded_A,), (folded_B,) = fold_factors(
        [lora_A],
        [lora_B],
        [output_basis],
        [input_basis],
        output_basis_kinds=[output_basis_kind],
        input_basis_kinds=[input_basis_kind],
        scaling=scaling,
        dtype=x.dtype,
    )
    return lora_linear(x, weight, bias, folded_A, folded_B, dropout_mask=dropout_mask)


def norm_lora_linear(
    x: Tensor,  # [..., in]
    delta: Tensor | None,  # [..., in]
    norm: Norm,
    linear: AdaptedLinear,  # weight [out, in]
    *,
    dropout_masks: Sequence[Tensor] | None = None,  # each [..., in]
) -> tuple[Tensor, Tensor]:  # [..., in], [..., out]
    """`s = x + delta` and `packed_lora_linear(LN(s))`."""
    stream = x if delta is None else x + delta
    normed = F.layer_norm(stream, stream.shape[-1:], *norm)
    return stream, packed_lora_linear(normed, linear, dropout_masks=dropout_masks)


def activation_lora_linear(
    z: Tensor,  # [..., in]
    activation: str,
    linear: AdaptedLinear,  # weight [out, in]
    *,
    dropout_masks: Sequence[Tensor] | None = None,  # each [..., in]
) -> Tensor:  # [..., out]
    """`packed_lora_linear(act(z))` with an activation of `blocks.norm_lora_mlp`."""
    if activation == "quick_gelu":
        a = z * torch.sigmoid(1.702 * z)
    elif activation == "gelu_tanh":
        a = 0.5 * z * (1 + torch.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3)))
    else:
        a = F.gelu(z)
    return packed_lora_linear(a, linear, dropout_masks=dropout_masks)


def keep_mask(
    seed: int | Tensor,  # or [1], int64
    adapter: int,
    shape: Sequence[int],
    p: float,
) -> Tensor:  # [M, K], bool, on the device of the seed; True is kept
    """The dropout mask that the Triton kernels draw for one adapter, and `kernels.dropout` describes."""
    M, K = shape
    device = seed.device if isinstance(seed, Tensor) else None
    bits = 8 if (256 * p).is_integer() else 16
    lanes = 32 // bits  # lanes of one word
    column = torch.arange(-(-K // (4 * lanes)), device=device).expand(M, -1)
    row = torch.arange(M, device=device).unsqueeze(1)
    counter = [column, row.expand_as(column), torch.full_like(column, adapter), torch.zeros_like(column)]
    words = torch.stack(philox4x32(counter, seed, rounds=7), -1).flatten(1)  # [M, 4 · columns]
    values = (words.unsqueeze(-1) >> (bits * torch.arange(lanes, device=device))) & (2**bits - 1)
    return values.flatten(1)[:, :K] >= drawn_p(p) * 2**bits


def drawn_p(p: float) -> float:
    """The probability that `keep_mask` draws with, and masks are scaled by: p, or p rounded to a multiple of 2^-16."""
    lanes = 2**8 if (256 * p).is_integer() else 2**16
    return min(round(p * lanes), lanes - 1) / lanes


def philox4x32(counter: Sequence[Tensor], key: int | Tensor, rounds: int) -> list[Tensor]:
    """Philox4x32 (Salmon et al., SC 2011): four 32-bit words in int64 tensors, under a 64-bit key."""
    low = 2**32 - 1
    c0, c1, c2, c3 = counter
    k0, k1 = key & low, (key >> 32) & low
    for _ in range(rounds):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64 bits, of which `>>` and `& low` take the halves
        c0, c1, c2, c3 = (second >> 32 & low) ^ c1 ^ k0, second & low, (first >> 32 & low) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
