"""Is more kept at the same new-task accuracy? Fronts over learning rates, compared pair by pair over seeds.

A method's front for one seed is the line through (new-task accuracy, retained accuracy) of the zero-shot model, which
is learning rate 0, and of each learning rate in ascending order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Results = Sequence[Mapping[str, Any]]

_LEVELS = 101  # new-task accuracies at which fronts are compared, evenly over the range that they share


def kept_at(new: Array, kept: Array, levels: Array) -> Array:
    """What a front keeps at given new-task accuracies: the best point of the line at each level, NaN where it has none.

    Args:
        new: new-task accuracies along the front [P].
        kept: retained accuracies along the front [P].
        levels: new-task accuracies [L].

    Returns:
        Retained accuracies [L].
    """
    best = np.full(len(levels), -np.inf)
    for (new_a, new_b), (kept_a, kept_b) in zip(pairwise(new), pairwise(kept), strict=True):
        crossed = (levels >= min(new_a, new_b)) & (levels <= max(new_a, new_b))
        if new_a == new_b:
            on_segment = np.full(len(levels), max(kept_a, kept_b))
        else:
            on_segment = kept_a + (levels - new_a) / (new_b - new_a) * (kept_b - kept_a)
        best = np.where(crossed, np.maximum(best, on_segment), best)
    return np.where(np.isfinite(best), best, np.nan)


class Paired(NamedTuple):
    """A paired comparison of two methods over seeds, in the unit of the accuracies."""

    mean: float
    low: float  # of the 95% interval of the mean (Student's t)
    high: float
    wins: int  # seeds with a positive difference
    seeds: int


def paired(differences: Sequence[float]) -> Paired:
    """The mean of paired differences [seeds] with its 95% interval; infinitely wide for fewer than two seeds."""
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    half = np.inf
    if n >= 2:
        half = stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)
    mean = float(values.mean())
    return Paired(mean, mean - half, mean + half, int((values > 0).sum()), n)


def retention_differences(results: Results, method: str, rival: str, shots: int) -> dict[int, float]:
    """For each seed, how much more `method` keeps than `rival`, averaged over equal new-task accuracies.

    The range goes from the zero-shot accuracy to the highest that both reach. Seeds with fewer than two learning rates,
    and those on which one of the two learns nothing, are left out.
    """
    differences = {}
    for seed in sorted({result["seed"] for result in results}):
        cells = [
            [r for r in results if (r["method"], r["shots"], r["seed"]) == (m, shots, seed)] for m in (method, rival)
        ]
        if any(len(rates) < 2 for rates in cells):
            continue
        (our_new, our_kept), (their_new, their_kept) = (_front(rates) for rates in cells)
        low, high = our_new[0], min(our_new.max(), their_new.max())
        if low < high:
            levels = np.linspace(low, high, _LEVELS)
            difference = kept_at(our_new, our_kept, levels) - kept_at(their_new, their_kept, levels)
            differences[seed] = float(np.trapezoid(difference, levels) / (high - low))
    return differences


def _front(cells: Results) -> tuple[Array, Array]:
    ascending = sorted(cells, key=lambda cell: cell["learning_rate"])
    new = [cells[0]["zero_shot_new"], *(cell["new"] for cell in ascending)]
    kept = [cells[0]["zero_shot_kept"], *(cell["kept"] for cell in ascending)]
    return np.array(new), np.array(kept)


def differences_at_rate(results: Results, method: str, rival: str, learning_rate: float, name: str) -> list[float]:
    """For each seed, by how much `method` exceeds `rival` in the accuracy `name`, averaged over the shots of both."""

    def accuracies(method: str) -> dict[tuple[int, int], float]:
        runs = [r for r in results if (r["method"], r["learning_rate"]) == (method, learning_rate)]
        return {(r["seed"], r["shots"]): r[name] for r in runs}

    ours, theirs = accuracies(method), accuracies(rival)
    by_seed: dict[int, list[float]] = {}
    for cell in ours.keys() & theirs.keys():
        by_seed.setdefault(cell[0], []).append(ours[cell] - theirs[cell])
    return [float(np.mean(values)) for values in by_seed.values()]
