"""Facts about tensors that are expensive to read, remembered for as long as the tensor lives unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Fact = TypeVar("Fact")


class TensorFacts(Generic[Fact]):
    """A weak dictionary from a tensor, at its present version, to a fact about its values."""

    def __init__(self) -> None:
        self._facts: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> (version, fact)

    def get(self, tensor: Tensor) -> Fact | None:
        """The remembered fact, or None when there is none or the tensor was written to since."""
        known = self._facts.get(tensor)  # read once: other threads may change the entry meanwhile
        return known[1] if known is not None and known[0] == _version(tensor) else None

    def set(self, tensor: Tensor, fact: Fact) -> Fact:
        """Remembers `fact` for the tensor's present version and returns it."""
        self._facts[tensor] = (_version(tensor), fact)
        return fact

    def compute(self, tensor: Tensor, compute: Callable[[Tensor], Fact]) -> Fact:
        """Computes a fact and remembers it for the version that it was computed from; other threads may write then."""
        version = _version(tensor)
        fact = compute(tensor)
        self._facts[tensor] = (version, fact)
        return fact


def _version(tensor: Tensor) -> int:
    # Inference tensors carry no version counter and reject in-place writes outside inference mode.
    return -1 if tensor.is_inference() else tensor._version
