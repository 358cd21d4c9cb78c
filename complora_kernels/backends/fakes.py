"""The extension's operations for torch.compile: shapes and dtypes of their results.

Importing this registers them; `backends.build` does so when it has loaded the library.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from complora_kernels.common.shapes import check_device


def project_complement(factor: Tensor, basis: Tensor, complement: bool) -> Tensor:
    """A contiguous tensor in the shape of `factor`."""
    check_device(factor, basis)
    return torch.empty_like(factor, memory_format=torch.contiguous_format)


def fold_factors(
    factors: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    complement: Sequence[bool],
    output_side: Sequence[bool],
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """All results in a row, [Σ r d]."""
    check_device(*factors, *bases)
    return factors[0].new_empty((sum(factor.numel() for factor in factors),), dtype=dtype)


def packed_lora_linear_factor_grads(
    dY: Tensor,
    x: Tensor,
    h: Tensor,
    g: Tensor,
    starts: Sequence[int],
    height: int,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """Both gradients: dA [P, r, K], dB [P, D, r]; [0, …] where it is not needed."""
    check_device(x, dY, h, g, seed)
    P, K = len(starts), x.shape[1]
    rank = (g if needs[0] else h).shape[1] // P
    return x.new_empty((P if needs[0] else 0, rank, K)), x.new_empty((P if needs[1] else 0, height, rank))


def drop(x: Tensor, seed: Tensor, adapter: int, dropout_p: float) -> Tensor:
    """A contiguous tensor in the shape of `x`."""
    check_device(x, seed)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_LIBRARY = torch.library.Library("complora", "FRAGMENT")
for _shape in (project_complement, fold_factors, packed_lora_linear_factor_grads, drop):
    torch.library.register_fake(f"complora::{_shape.__name__}", _shape, lib=_LIBRARY)
