"""Adapter state that stays float32 or wider when the rest of a model is converted to half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from complora_kernels.common.tracing import Unscriptable

LIMIT = "update_limit"  # what the names of buffers with limits of updates begin with


class Float32State(Unscriptable):
    """A module whose own `lora_*` parameters, bases and limits stay float32 or wider when `.half()` converts others."""

    def _own_float32_state(self) -> Iterator[Tensor]:
        for name, tensor in [*self._parameters.items(), *self._buffers.items()]:
            if tensor is not None and (name.startswith(("lora_", LIMIT)) or "_basis" in name):
                yield tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = list(self._own_float32_state())
        kept_ids = {id(tensor) for tensor in kept} | {id(tensor.grad) for tensor in kept if tensor.grad is not None}

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if id(tensor) in kept_ids and converted.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(converted.device)
            return converted

        return super()._apply(convert, recurse)


class Factors(Float32State):
    """The factors of one kind of an attention layer: parameters `q`, `k`, `v`, `o`, as many as are adapted."""

    def __init__(self, factors: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, factor in factors.items():
            self.register_parameter(name, factor)

    def _own_float32_state(self) -> Iterator[Tensor]:
        return self.parameters(recurse=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):  # a plain model's checkpoint has no factors: keep ours
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
