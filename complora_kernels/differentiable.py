"""Plain operations, which torch can differentiate any number of times and batch.

Forward passes for torch.func and forward-mode differentiation, which follow no custom Function whose backward pass is
hand-written; and those backward passes themselves, for `create_graph=True`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from complora_kernels import eager, eager_block, reference
from complora_kernels.dropout import dropout_mask
from complora_kernels.eager_block import QUICK_GELU, Source


def packed_lora_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    As: Sequence[Tensor],  # each [r, K]
    Bs: Sequence[Tensor],  # each [rows, r]
    rows: eager.Rows,
    masks: Sequence[Tensor] | None,  # each [..., K], 0 or 1 / (1 - p), in float32 or wider
) -> Tensor:  # [..., N], in the dtype of x
    """`reference.packed_lora_linear` in float32 or wider, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(x.dtype).to(wide)
    As, Bs = ([factor.to(wide) for factor in factors] for factors in (As, Bs))
    with reference.without_autocast(x):
        y = reference.packed_lora_linear(
            x.to(wide), weight.to(x.dtype).to(wide), bias, As, Bs, rows, dropout_masks=masks
        )
    return y.to(x.dtype)


class DifferentiableBackward(NamedTuple):
    """The operations of a backend's backward pass, under the same names, in float32 or wider.

    It reads only tensors that know what they were computed from. A saved h does not: it is computed again.
    """

    backend: str  # the one that drew the dropout masks of the forward pass

    project_complement = staticmethod(eager.project_complement)
    fold_factors_bwd = staticmethod(eager.fold_factors_bwd)
    norm_bwd = staticmethod(eager_block.norm_bwd)

    def packed_lora_linear_bwd(
        self,
        dY: Tensor,  # [..., N]
        x: Tensor,  # [..., K]
        h: Tensor,  # not read
        weight: Tensor,  # [N, K]
        As: Sequence[Tensor],  # each [r, K]
        Bs: Sequence[Tensor],  # each [rows, r]
        rows: eager.Rows,
        dropout_p: float,
        seeds: Sequence[Tensor],
        needs: tuple[bool, bool, bool],
        *,
        precision: str,
    ) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
        """`g = dY B̃`, `dX = dY W + m ∘ (g Ã)`, `dÃ = g^T (m ∘ x)`, `dB̃ = dY^T h` with `h = (m ∘ x) Ã^T`."""
        needs_x, needs_A, needs_B = needs
        wide = torch.promote_types(x.dtype, torch.float32)
        flat = x.reshape(-1, x.shape[-1]).to(wide)  # [M, K]
        dY = dY.reshape(-1, len(weight)).to(wide)  # [M, N]
        dX = dY @ weight.to(x.dtype).to(wide) if needs_x else None
        dAs: list[Tensor | None] = [None] * len(As)
        dBs: list[Tensor | None] = [None] * len(Bs)
        masks = self._masks(flat, len(As), dropout_p, seeds)
        for i, (A, B, (start, stop)) in enumerate(zip(As, Bs, rows, strict=True)):
            m = 1.0 if masks is None else masks[i]
            dropped = m * flat
            own_dY = dY.narrow(1, start, stop - start)  # [M, rows]
            g = own_dY @ B.to(wide)  # [M, r]
            if dX is not None:
                dX = dX + m * (g @ A.to(wide))
            if needs_A:
                dAs[i] = (g.mT @ dropped).to(A.dtype)
            if needs_B:
                dBs[i] = (own_dY.mT @ (dropped @ A.to(wide).mT)).to(B.dtype)
        return None if dX is None else dX.to(x.dtype).reshape(x.shape), dAs, dBs

    def complora_linear_bwd(
        self,
        dY: Tensor,  # [..., N]
        x: Tensor,  # [..., K]
        h: Tensor,  # not read
        weight: Tensor,  # [N, K]
        folded_A: Tensor,  # not read
        scaled_B: Tensor,  # not read
        output_basis: Tensor | None,  # [N, k]
        input_basis: Tensor | None,  # [K, k]
        output_basis_kind: str,
        input_basis_kind: str,
        scaling: float,
        dropout_p: float,
        seeds: Sequence[Tensor],
        needs: tuple[bool, bool, bool],
        factors: tuple[Tensor, Tensor],  # A [r, K], B [N, r]
        *,
        precision: str,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # dX, dA [r, K], dB [N, r]
        """`dA = dÃ P_in` and `dB = s · P_out dB̃`, after `packed_lora_linear_bwd`."""
        of_A = ([input_basis], [input_basis_kind], [False], scaling)
        of_B = ([output_basis], [output_basis_kind], [True], scaling)
        (A,), (B,) = (
            eager.fold_factors(factors[:1], *of_A, [x.dtype]),
            eager.fold_factors(factors[1:], *of_B, [x.dtype]),
        )
        wide = torch.promote_types(x.dtype, torch.float32)  # the gradients are rounded after the projection
        As, Bs, rows = [A.to(wide)], [B.to(wide)], [(0, len(weight))]
        dX, (dA,), (dB,) = self.packed_lora_linear_bwd(
            dY, x, h, weight, As, Bs, rows, dropout_p, seeds, needs, precision=precision
        )
        if dA is not None:
            (dA,) = eager.fold_factors([dA], *of_A, [factors[0].dtype])
        if dB is not None:
            (dB,) = eager.fold_factors([dB], *of_B, [factors[1].dtype])
        return dX, dA, dB

    def linear_fwd(
        self,
        x: Tensor,  # [M, K]
        h: Tensor | None,
        weight: Tensor,  # [N, K]
        bias: Tensor | None,  # [N]
        As: Sequence[Tensor],
        Bs: Sequence[Tensor],
        rows: eager.Rows,
        dropout_p: float,
        seeds: Sequence[Tensor],
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:  # y [M, N], and h as it was given
        """`packed_lora_linear`, which a backward pass computes again."""
        return packed_lora_linear(x, weight, bias, As, Bs, rows, self._masks(x, len(As), dropout_p, seeds)), h

    def linear_bwd(self, dY: Tensor, source: Source, *arguments: Any, precision: str) -> Any:
        """As `packed_lora_linear_bwd`."""
        return self.packed_lora_linear_bwd(dY, source.compute(), *arguments, precision=precision)

    @staticmethod
    def activation_bwd(
        da: Tensor,  # [M, K]
        z: Tensor,  # [M, K]
        activation: str,
    ) -> Tensor:  # [M, K]
        """`dz = da ∘ act'(z)`: `Φ(z) + z φ(z)`, or `σ + 1.702 z σ (1 - σ)` with `σ = sigmoid(1.702 z)`."""
        if activation == "gelu":
            return torch.ops.aten.gelu_backward(da, z)
        wide = torch.promote_types(z.dtype, torch.float32)
        scaled = QUICK_GELU * z.to(wide)
        sigmoid = scaled.sigmoid()
        return (da.to(wide) * (sigmoid + scaled * sigmoid * (1 - sigmoid))).to(z.dtype)

    def _masks(
        self,
        x: Tensor,  # [M, K]
        adapters: int,
        dropout_p: float,
        seeds: Sequence[Tensor],
    ) -> list[Tensor] | None:
        """Each adapter's `m = mask / (1 - p)` [M, K] of the forward pass; None without dropout."""
        if not seeds:
            return None
        if self.backend == "torch":
            masks, p = [dropout_mask(x, x.shape, seed, dropout_p) for seed in seeds], dropout_p
        else:
            masks = [reference.keep_mask(seeds[0], adapter, x.shape, dropout_p) for adapter in range(adapters)]
            p = reference.drawn_p(dropout_p)
        return [mask.to(torch.promote_types(x.dtype, torch.float32)) / (1 - p) for mask in masks]
