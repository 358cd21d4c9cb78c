"""Tensors that share memory, as tied weights do, whatever objects they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def sharing_memory(tensors: Sequence[Tensor]) -> Iterator[tuple[int, int]]:
    """The pairs of tensors, by their positions, that have an element's memory in common.

    Disjoint parts of one storage, such as the slices of a flat buffer, are no such pair. Tensors without memory of
    their own (on the meta device, or distributed) share it where they are the same object.
    """
    running: list[tuple[str, int, int]] = []  # device, end of the span, position
    for device, start, stop, position in sorted((*_span(tensor), position) for position, tensor in enumerate(tensors)):
        running = [other for other in running if other[0] == device and other[1] > start]
        for *_, other in running:
            if not device or np.shares_memory(_addresses(tensors[other]), _addresses(tensors[position])):
                yield other, position
        running.append((device, stop, position))


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """The device, the first address and the address after the last one."""
    if tensor.is_meta or tensor.numel() == 0 or is_traceable_wrapper_subclass(tensor):
        return "", id(tensor), id(tensor) + 1
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class _Addresses:
    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (tensor.data_ptr(), True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
        }


def _addresses(tensor: Tensor) -> np.ndarray:
    """An array at the addresses of a tensor. It must not be read: they may be addresses of another device."""
    return np.asarray(_Addresses(tensor))
