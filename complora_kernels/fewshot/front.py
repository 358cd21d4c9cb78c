"""Is more kept at the same new-task accuracy? Fronts over learning rates, compared pair by pair over seeds.

A method's front for one seed is the line through its points (new-task accuracy, retained accuracy), one for each
learning rate, in the order of the learning rates. It is read only between measured points.
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
    """For each seed, how much more `method` keeps than `rival`, averaged over the new-task accuracies both reach.

    Seeds whose fronts share no range are left out.
    """
    differences = {}
    for seed in sorted({result["seed"] for result in results}):
        fronts = [_front(results, name, shots, seed) for name in (method, rival)]
        if any(len(new) < 2 for new, _ in fronts):
            continue
        low = max(new.min() for new, _ in fronts)
        high = min(new.max() for new, _ in fronts)
        if low < high:
            levels = np.linspace(low, high, _LEVELS)
            ours, theirs = (kept_at(new, kept, levels) for new, kept in fronts)
            differences[seed] = float((ours - theirs).mean())
    return differences


def _front(results: Results, method: str, shots: int, seed: int) -> tuple[Array, Array]:
    cells = [r for r in results if (r["method"], r["shots"], r["seed"]) == (method, shots, seed)]
    cells.sort(key=lambda result: result["learning_rate"])
    new, kept = (np.array([cell[name] for cell in cells], dtype=np.float64) for name in ("new", "kept"))
    return new, kept
