"""`AdaptedLinear`: one frozen product with its adapters, as every room from module to launcher takes it.

`Needs` and `ProductGrads` say which gradients of it a backward pass computes, and hold them; `Deferred` is an input
gradient whose second term its reader adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

Rows = Sequence[tuple[int, int]]


class Needs(NamedTuple):
    """The gradients that a backward pass of a product computes."""

    x: bool
    A: bool  # of every Ã
    B: bool  # of every B̃


class ProductGrads(NamedTuple):
    """The gradients of a product with P adapters; None for those that are not computed."""

    x: Tensor | Deferred | None  # [M, K]
    As: Sequence[Tensor | None]  # each [r, K]
    Bs: Sequence[Tensor | None]  # each [stop - start, r]


class AdaptedLinear(NamedTuple):
    """`y = x W^T + b`, plus `(drop_i(x) Ã_i^T) B̃_i^T` in the rows of adapter i; P adapters, perhaps none.

    The scaling is part of B̃. A plain layer has one adapter on all rows; q, k and v are three on one packed weight.
    """

    weight: Tensor  # [out, in], frozen, as the user keeps it: under autocast in a wider dtype than x
    bias: Tensor | None  # [out]
    As: Sequence[Tensor] = ()  # each Ã [r, in], in the dtype of x; for launchers also one tensor [P, r, in]
    Bs: Sequence[Tensor] = ()  # each B̃ [stop - start, r], in the dtype of x; also one tensor [P, D, r]
    rows: Rows = ()  # each (start, stop): the rows `start <= n < stop` of the weight that an adapter updates
    dropout_p: float = 0.0  # 0 in evaluation
    seeds: Sequence[Tensor] = ()  # each [1], int64, see `dropout`; none without dropout
    save_h: bool = True  # whether h = drop(x) Ã^T is kept for the gradient of B̃
    precision: str = "exact"  # "exact" allows the plans that round once, "fast" all of them, see `backends.plans`
    columns: Tensor | None = None  # [M, R], bool: the columns of h that each row has, else 0; without gradients

    @property
    def rank(self) -> int:
        """The sum of the adapters' ranks, R: h is [M, R]."""
        As = self.As
        return As.shape[0] * As.shape[1] if isinstance(As, Tensor) else sum([A.shape[0] for A in As])

    @property
    def seed(self) -> Tensor | None:
        """The one key of all masks that kernels draw, [1]; None without dropout."""
        return self.seeds[0] if self.seeds else None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors in a row, as an autograd Function takes and saves them: weight, bias, seeds, Ãs, B̃s."""
        return (self.weight, self.bias, *self.seeds, *self.As, *self.Bs)

    def without_tensors(self) -> AdaptedLinear:
        """The rest of the record, with None for each tensor: what a node of autograd may keep beside what it saves."""
        nothing: Any = (None,) * len(self.rows)
        return self.with_tensors((None, None, *(None,) * len(self.seeds), *nothing, *nothing))

    def with_tensors(self, tensors: Sequence[Any]) -> AdaptedLinear:
        """The whole record again, from the tensors in the order of `tensors`."""
        first_A = 2 + len(self.seeds)
        first_B = first_A + len(self.rows)
        As, Bs, seeds = tensors[first_A:first_B], tensors[first_B:], tensors[2:first_A]
        # The constructor takes a third of the time of `_replace`.
        return AdaptedLinear(
            tensors[0], tensors[1], As, Bs, self.rows, self.dropout_p, seeds, self.save_h, self.precision, self.columns
        )

    def needs(self, x: bool, tensors: Sequence[bool]) -> Needs:
        """The needed gradients, from whether x needs one and whether each of the `tensors` does."""
        first_B = len(tensors) - len(self.rows)
        return Needs(x, any(tensors[first_B - len(self.rows) : first_B]), any(tensors[first_B:]))

    def gradients(self, grads: ProductGrads) -> tuple[Tensor | None, ...]:
        """The gradients of all tensors in the order of `tensors`; weight, bias and seeds get none."""
        return (None, None, *[None] * len(self.seeds), *grads.As, *grads.Bs)


class Deferred(NamedTuple):
    """`dX = base + Σ_p m_p ∘ (g_p Ã_p)`, whose second term is added where dX is read, in float32.

    Rounding the sum of both would lose most of a small second term in half precision. What reads it, a norm's or an
    activation's gradient, rescales the sum and then rounds it once.
    """

    base: Tensor  # [M, K], dY W
    g: Tensor  # [M, R], dY B̃
    linear: AdaptedLinear  # the product
    needs_A: bool = False  # dÃ too is left to what reads dX
