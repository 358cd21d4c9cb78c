"""Whether random numbers are unrelated."""

from __future__ import annotations

from torch import Tensor

SIGMAS = 5  # a normal variable leaves ±5 standard deviations once in 1.7 million draws


def assert_unrelated(first: Tensor, second: Tensor, dropout_p: float) -> None:
    """Two independent masks agree in a share p² + (1 - p)² of their elements."""
    agreement = dropout_p**2 + (1 - dropout_p) ** 2
    agreeing = int(((first > 0) == (second > 0)).sum())
    n = first.numel()
    assert abs(agreeing - n * agreement) <= SIGMAS * (n * agreement * (1 - agreement)) ** 0.5
