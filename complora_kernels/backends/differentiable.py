"""Plain operations, which torch can differentiate any number of times and batch.

They are the forward passes for torch.func and forward-mode differentiation, which cannot enter a custom Function whose
backward pass is hand-written, and those backward passes themselves, for `create_graph=True`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from complora_kernels import reference
from complora_kernels.adapted_linear import AdaptedLinear, Needs, ProductGrads
from complora_kernels.backends.torch import GELU, QUICK_GELU, ProductInput, Source, TorchBackend, input_of
from complora_kernels.dropout import scaled_masks


def packed_lora_linear(
    x: Tensor,  # [..., K]
    linear: AdaptedLinear,
    masks: Sequence[Tensor] | None,  # each [..., K], 0 or 1 / (1 - p), in float32 or wider
) -> Tensor:  # [..., N], in the dtype of x
    """`reference.packed_lora_linear` in float32 or wider, rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rounded = linear.with_tensors([None if tensor is None else tensor.to(x.dtype) for tensor in linear.tensors()])
    widened = linear.with_tensors([None if tensor is None else tensor.to(wide) for tensor in rounded.tensors()])
    with reference.without_autocast(x):
        return reference.packed_lora_linear(x.to(wide), widened, dropout_masks=masks).to(x.dtype)


class DifferentiableBackend(TorchBackend):
    """The operations of a backward pass, under the names of a backend, in float32 or wider.

    It reads only tensors that know what they were computed from. A saved h does not: it is computed again.
    """

    def __init__(self, *, philox: bool) -> None:
        self.philox = philox  # the kind of masks that the forward pass drew

    def packed_lora_linear_fwd(
        self,
        given: ProductInput,  # x [M, K]
        linear: AdaptedLinear,  # weight [N, K]
        *,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Any]:  # y [M, N], and h as it was given
        return packed_lora_linear(given.x, linear, scaled_masks(given.x, linear, philox=self.philox)), given.h

    def packed_lora_linear_bwd(
        self,
        dY: Tensor,  # [M, N]
        source: Source,  # gives x [M, K]
        h: Tensor,  # not read
        linear: AdaptedLinear,  # weight [N, K]
        needs: Needs,
        *,
        defer: bool = False,
    ) -> ProductGrads:
        """`g = dY B̃`, `dX = dY W + m ∘ (g Ã)`, `dÃ = g^T (m ∘ x)`, `dB̃ = dY^T h` with `h = (m ∘ x) Ã^T`."""
        x = input_of(source)
        wide = torch.promote_types(x.dtype, torch.float32)
        wide_x, dY = x.to(wide), dY.to(wide)
        dX = dY @ linear.weight.to(x.dtype).to(wide) if needs.x else None
        adapters = len(linear.As)
        dAs: list[Tensor | None] = [None] * adapters
        dBs: list[Tensor | None] = [None] * adapters
        masks = scaled_masks(wide_x, linear, philox=self.philox)
        for i, (A, B, (start, stop)) in enumerate(zip(linear.As, linear.Bs, linear.rows, strict=True)):
            m = 1.0 if masks is None else masks[i]
            dropped = m * wide_x
            own_dY = dY.narrow(1, start, stop - start)  # [M, rows]
            g = own_dY @ B.to(wide)  # [M, r]
            if dX is not None:
                dX = dX + m * (g @ A.to(wide))
            if needs.A:
                dAs[i] = (g.mT @ dropped).to(A.dtype)
            if needs.B:
                dBs[i] = (own_dY.mT @ (dropped @ A.to(wide).mT)).to(B.dtype)
        return ProductGrads(None if dX is None else dX.to(x.dtype), dAs, dBs)

    def _activation_bwd(
        self,
        da: Tensor,  # [M, K]
        z: Tensor,  # [M, K]
        activation: str,
    ) -> Tensor:  # [M, K]
        """`dz = da ∘ act'(z)`: torch's for GELU, or `σ + 1.702 z σ (1 - σ)` with `σ = sigmoid(1.702 z)`."""
        if activation in GELU:
            return torch.ops.aten.gelu_backward(da, z, approximate=GELU[activation])
        wide = torch.promote_types(z.dtype, torch.float32)
        scaled = QUICK_GELU * z.to(wide)
        sigmoid = scaled.sigmoid()
        return (da.to(wide) * (sigmoid + scaled * sigmoid * (1 - sigmoid))).to(z.dtype)
