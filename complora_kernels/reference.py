"""The truth: every operation under its own name in plain PyTorch, to be checked against the formulas, never optimised.

Gradients come from autograd. Products run in the dtype of `x`; projections in float32, or float64 when the factors are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def project_complement(
    factor: Tensor,  # [..., d]
    basis: Tensor,  # [d, k]
    *,
    basis_kind: str = "principal",
) -> Tensor:
    """`factor (I - U U^T)` for a principal basis U, `factor U U^T` for a complement basis."""
    wide = _wide(factor)
    basis = basis.to(wide.dtype)
    with torch.autocast(factor.device.type, enabled=False):
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


def packed_lora_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    folded_As: Sequence[Tensor],  # each [r, in]
    folded_Bs: Sequence[Tensor],  # each [rows, r]
    rows: Sequence[tuple[int, int]],  # the rows of weight that each adapter updates
    *,
    dropout_masks: Sequence[Tensor] | None = None,  # each [..., in], 0 or 1 / (1 - p)
) -> Tensor:  # [..., out]
    """`y = x W^T + b`, plus `((m ∘ x) Ã^T) B̃^T` in the rows of each adapter."""
    y = F.linear(x, weight, bias)  # [..., out]
    for i, (A, B, (start, stop)) in enumerate(zip(folded_As, folded_Bs, rows, strict=True)):
        dropped = x if dropout_masks is None else x * dropout_masks[i]
        update = (dropped @ A.mT) @ B.mT  # [..., rows]
        y = y + F.pad(update, (start, weight.shape[0] - stop))
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
    masks = None if dropout_mask is None else [dropout_mask]
    rows = [(0, weight.shape[0])]
    return packed_lora_linear(x, weight, bias, [folded_A], [scaling * folded_B], rows, dropout_masks=masks)


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


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))
