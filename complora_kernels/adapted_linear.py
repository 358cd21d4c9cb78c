"""`AdaptedLinear`: one frozen product with its adapters, as every room from module to launcher takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Rows = Sequence[tuple[int, int]]


class AdaptedLinear(NamedTuple):
    """`y = x W^T + b`, plus `(drop_i(x) Ã_i^T) B̃_i^T` in the rows of adapter i; P adapters, perhaps none.

    The scaling is part of B̃. A plain layer has one adapter on all rows; q, k and v are three on one packed weight.
    """

    weight: Tensor  # [out, in], frozen, as the user keeps it: under autocast in a wider dtype than x
    bias: Tensor | None  # [out]
    As: Sequence[Tensor] = ()  # each Ã [r, in]
    Bs: Sequence[Tensor] = ()  # each B̃ [stop - start, r]
    rows: Rows = ()  # each (start, stop): the rows `start <= n < stop` of the weight that an adapter updates
    dropout_p: float = 0.0  # 0 in evaluation
    seeds: Sequence[Tensor] = ()  # each [1], int64, of the dropout masks; none without dropout
    save_h: bool = True  # whether h = drop(x) Ã^T is kept for the gradient of B̃
    precision: str = "exact"  # "exact": one rounding in half precision; "fast": any plan
