"""What the update of an adapted weight is bounded by: `update_bound` times a norm or singular values of the weight."""

from __future__ import annotations

import torch
from torch import Tensor

from complora_kernels import subspace
from complora_kernels.common.low_rank import Norm, norm_of_product, widened
from complora_kernels.config import CompLoRAConfig
from complora_kernels.modules.float32_state import LIMIT


def limit_name(name: str) -> str:
    """The name of the buffer with the limit of one adapted weight."""
    return f"{LIMIT}_{name}" if name else LIMIT


def update_limit(
    weight: Tensor,  # [out, in]
    config: CompLoRAConfig,
    k: int,
    label: str,
) -> float:
    """`update_bound` times |W|, σ_{k+1} or σ_k - σ_{k+1}, see `CompLoRAConfig`; σ_{k+1} is 0 for k = min(out, in).

    With `subspace_source="ends"` half of the k directions, rounded up, are at the upper end: they count as k.

    Raises:
        ValueError: it is 0 in float32, or there is no σ_k.
    """
    assert config.update_bound is not None
    reference, norm = config.update_bound_relative_to, config.update_bound_norm
    if reference == "weight" and norm == "frobenius":
        size = float(widened(weight).norm())
    else:
        sigma = [*subspace.singular_values(weight).tolist(), 0.0]  # σ_1, σ_2, ...
        top = (
            (k + 1) // 2 if config.subspace_source == "ends" else k
        )  # of the protected ones those that are the largest
        if reference == "gap" and k == 0:
            raise ValueError(f"update_bound_relative_to='gap' for {label}, expected k >= 1 protected directions, not 0")
        size = {"weight": sigma[0], "next": sigma[top], "gap": sigma[top - 1] - sigma[top]}[reference]
    limit = config.update_bound * size
    if not limit >= torch.finfo(torch.float32).tiny:
        raise ValueError(
            f"update_bound={config.update_bound} times {size:.3g}, which is update_bound_relative_to={reference!r} of "
            f"{label} {tuple(weight.shape)} with k={k}, expected more than 0: no update would be left"
        )
    return limit


def size_of_update(A: Tensor, B: Tensor, norm: Norm) -> float:
    """|B A|, for factors A [r, in] and B [out, r]."""
    with torch.no_grad():
        return float(norm_of_product(widened(A), widened(B), norm).norm)
