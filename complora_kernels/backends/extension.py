"""The extension backend: the operations of `csrc/`, on the CPU and on CUDA GPUs.

It folds and projects factors and sums their gradients; the large products, norms and activations are torch's, by the
plans of the torch backend. Dropout masks are those of the Triton kernels (`reference.keep_mask`): one seed a product,
never a stored mask. `build` has loaded the library before an operation is called.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear, Needs, ProductGrads
from complora_kernels.backends import build, plans
from complora_kernels.backends.support import unsupported_heights, unsupported_ranks, unsupported_tensors
from complora_kernels.backends.torch import (
    Source,
    TorchBackend,
    input_grad,
    input_of,
    sum_dtype,
)
from complora_kernels.common.shapes import split_like


class ExtensionBackend(TorchBackend):
    """The compiled operations around torch's own large products."""

    name = "extension"
    purpose = "compiled C++ and CUDA operations, torch's own large products"
    philox = True
    reads_parts = False
    own_operations = True

    DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def unavailable(self) -> str | None:
        return build.failure("cpu")

    def gpu_refusal(self, index: int | None) -> str | None:
        return _gpu_refusal(index)

    def unsupported_tensors(
        self, label: str, tensors: Sequence[Tensor], bases: Sequence[Tensor | None] = (), dtype: Any = None
    ) -> str | None:
        return unsupported_tensors(label, tensors, dtype, ("cpu", "cuda"), self.DTYPES, self.gpu_refusal)

    def unsupported_linear(self, x: Tensor, linear: AdaptedLinear) -> str | None:
        return self.unsupported_tensors("x", [x]) or unsupported_ranks(linear) or unsupported_heights(linear)

    def project_complement(
        self,
        factor: Tensor,  # [..., d]
        basis: Tensor,  # [d, k]
        basis_kind: str,
    ) -> Tensor:
        basis = basis.to(torch.promote_types(factor.dtype, torch.float32))
        return torch.ops.complora.project_complement(factor, basis, basis_kind == "complement")

    def fold_factors(
        self,
        factors: Sequence[Tensor],  # each [r, d], those of the output side [d, r]; all of one dtype
        bases: Sequence[Tensor | None],  # each [d, k]
        kinds: Sequence[str],
        output_side: Sequence[bool],
        scaling: float,
        dtypes: Sequence[torch.dtype],  # all the same
    ) -> list[Tensor]:  # in the shapes of the factors, parts of one tensor
        wide = torch.promote_types(torch.promote_types(factors[0].dtype, dtypes[0]), torch.float32)
        bases = [None if basis is None else basis.to(wide) for basis in bases]
        complement = [kind == "complement" for kind in kinds]
        flat = torch.ops.complora.fold_factors(factors, bases, complement, output_side, scaling, dtypes[0])
        return split_like(flat, factors)

    fold_factors_bwd = fold_factors  # P is symmetric

    def packed_lora_linear_bwd(
        self,
        dY: Tensor,  # [M, N]
        source: Source,  # gives x [M, K]
        h: Tensor,  # [M, P r]
        linear: AdaptedLinear,  # weight [N, K]
        needs: Needs,
        *,
        defer: bool = False,  # not used: dX is whole
    ) -> ProductGrads:
        As, Bs, rows, seeds = linear.As, linear.Bs, linear.rows, linear.seeds
        x = input_of(source, shape_only=not needs.A)
        plan = plans.choose_for(x, linear, "torch").name
        g = _g(dY, linear) if needs.A or (needs.x and plan != "merge") else dY.new_empty(0, h.shape[1])
        dX = self._input_grad(dY, g, linear, plan, x.dtype) if needs.x else None
        dAs: Any = [None] * len(As)
        dBs: Any = [None] * len(Bs)
        if needs.A or needs.B:
            starts, height, seed = [start for start, _ in rows], len(Bs[0]), seeds[0] if seeds else None
            dA, dB = torch.ops.complora.packed_lora_linear_factor_grads(
                dY, x, h, g, starts, height, linear.dropout_p, seed, [needs.A, needs.B]
            )
            dAs, dBs = dA if needs.A else dAs, dB if needs.B else dBs
        return ProductGrads(dX, dAs, dBs)

    def _input_grad(
        self,
        dY: Tensor,  # [M, N]
        g: Tensor,  # [M, P r]
        linear: AdaptedLinear,
        plan: str,
        dtype: torch.dtype,
    ) -> Tensor:  # [M, K]
        seeds, As = linear.seeds, linear.As
        if not seeds:
            return input_grad(dY, g, linear, plan, dtype)
        wide = sum_dtype(plan, dtype)
        dX = dY.to(wide) @ linear.weight.to(dtype).to(wide)
        for p, (A, g_p) in enumerate(zip(As, g.split(len(As[0]), 1), strict=True)):
            dX += torch.ops.complora.drop(g_p.to(wide) @ A.to(wide), seeds[0], p, linear.dropout_p)  # m ∘ (g Ã)
        return dX.to(dtype)

    def _drop_each(self, x: Tensor, linear: AdaptedLinear) -> Iterable[Tensor]:
        adapters = range(len(linear.As))
        return (torch.ops.complora.drop(x, linear.seeds[0], p, linear.dropout_p) for p in adapters)


def _gpu_refusal(index: int | None) -> str | None:
    return build.failure("cuda") or build.chip_refusal(torch.cuda.get_device_capability(index))


def _g(dY: Tensor, linear: AdaptedLinear) -> Tensor:  # [M, N] to [M, P r]
    gs = [dY[:, start:stop] @ B for B, (start, stop) in zip(linear.Bs, linear.rows, strict=True)]  # g_p = dY_p B̃_p
    return torch.cat(gs, 1) if len(gs) > 1 else gs[0]


# torch.compile calls this function while it traces and takes the result for a constant.
_gpu_refusal._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
