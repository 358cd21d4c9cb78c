"""A row of a table of models, and how the tables of each library make theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class Row(NamedTuple):
    """A plain model in evaluation, with a batch for it."""

    model: Any
    inputs: dict[str, Tensor]
    features: Callable[[Any, dict[str, Tensor]], Tensor]  # called (model, inputs): [N, D]
    fused: int  # the number of residual blocks that run by fused operations when all are adapted


def with_random_weights(model: Model) -> Model:
    """The model in evaluation; parameters, biases too, are random and of the size that trained ones have."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
    return model.eval()


def called(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What the model returns."""
    return model(**inputs)


def in_float32(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch whose floating-point numbers are in float32."""
    return {name: values.float() if values.is_floating_point() else values for name, values in inputs.items()}


def in_float64(make: Callable[[], Row]) -> Row:
    """A row in float64, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        row = make()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in row.inputs.items()}
    return row._replace(model=row.model.double(), inputs=inputs)
