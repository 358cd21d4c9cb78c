"""Batches of any number of dimensions as matrices, and back, parts of a flat tensor, and whether devices are one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors


def flatten(
    x: Tensor,  # [..., d]
) -> Tensor:  # [M, d]
    """`x.reshape(-1, d)`, also where d is 0, which torch calls ambiguous."""
    if x.dim() == 2:
        return x
    d = x.shape[-1]
    return x.reshape(-1 if d else math.prod(x.shape[:-1]), d)


def unflatten(result: Tensor, shape: Sequence[int]) -> Tensor:
    """`result.view(shape)`, but no view to autograd, which forbids writing to one that a custom Function returns."""
    return torch.ops.aten._unsafe_view(result, list(shape))


def split_like(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of a flat tensor, one after the other, in the shapes of these tensors."""
    sizes = [tensor.numel() for tensor in like]
    if 0 in sizes or torch.compiler.is_compiling():  # torch 2.11 compiles the call below to parts without gradients
        parts = flat.split_with_sizes(sizes)
        return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
    return list(_unflatten_dense_tensors(flat, like))  # as above, in one call


def check_device(first: Tensor, *others: Tensor | None) -> None:
    """Raises ValueError unless all are on one device: beside a tensor without values others have no result."""
    device = first.device
    for tensor in others:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"a tensor is on {tensor.device}, expected {device}")
