"""Batches whose samples have different adapters: which layer computes, and which columns of h each row has.

Such a batch is computed by layers in which the factors of all its adapters lie side by side. They are no part of the
model: within `standing_in`, on one thread, they stand in for the model's own. Of `h = x Ã^T` [M, R], each row keeps the
columns of its sample's adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from complora_kernels.common.thread_stack import ThreadStack

Layer = TypeVar("Layer", bound=nn.Module)

_STAND_INS: ThreadStack[Mapping[nn.Module, Any]] = ThreadStack("mixed adapters")


class Samples(NamedTuple):
    """The samples of a batch, as the factors of one layer see them."""

    columns: Tensor  # [N, R], bool: the columns that each sample has
    sequence_first: bool | None  # x is [L, N, d]; None: that is not known
    label: str  # the path of the layer

    def columns_of(
        self,
        x: Tensor,  # [N, in], [N, ..., in] or [L, N, in]
        weights: int,  # that x is multiplied with, each of which has R columns
    ) -> Tensor:  # bool, to be broadcast: [N, 1, weights · R] or [1, N, weights · R]
        """The columns that each row of x has.

        Raises:
            ValueError: x has another number of samples, or it cannot be told in which dimension they are; or gradients
                are computed.
        """
        if torch.is_grad_enabled():
            raise ValueError(
                f"{self.label}: gradients are computed, expected torch.no_grad() or torch.inference_mode(): a batch of "
                "several adapters is for inference"
            )
        N, shape = len(self.columns), tuple(x.shape)
        place = 1 if self.sequence_first and x.dim() > 2 else 0
        unclear = self.sequence_first is None and x.dim() > 2 and shape[1] == N
        if x.dim() < 2 or shape[place] != N or unclear:
            names = "[L, N, in]" if place else "[N, ..., in]"
            reason = ", but it is not known whether its samples come first" if unclear else ""
            raise ValueError(f"{self.label}: x {shape}, expected {names} with N={N}, one adapter a sample{reason}")
        columns = self.columns.to(x.device).repeat(1, weights)  # [N, weights · R]
        return columns.view(*(1,) * place, N, *(1,) * (x.dim() - 2 - place), columns.shape[1])


def stand_in(layer: Layer) -> Layer:
    """The layer that computes in the place of `layer` on this thread, or `layer` itself."""
    for layers in reversed(_STAND_INS.values()):
        if layer in layers:
            return layers[layer]
    return layer


def standing_in(layers: Mapping[nn.Module, nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Within it, on this thread, the layers that are values compute in the place of those that are keys."""
    return _STAND_INS.holding(layers)
