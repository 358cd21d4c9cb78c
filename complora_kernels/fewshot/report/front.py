"""Compares retained accuracy at equal new-task accuracy: fronts over learning rates, paired over seeds.

A method's front for one seed is the line through (new-task accuracy, retained accuracy) of the zero-shot model, which
is learning rate 0, and of each learning rate in ascending order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from complora_kernels.fewshot.report.results import Result

Array = NDArray[np.float64]

_LEVELS = 101  # new-task accuracies at which fronts are compared, evenly over the range that they share


def kept_at(new: Array, kept: Array, levels: Array) -> Array:
    """The retained accuracy of a front at given new-task accuracies: its best point at each level, NaN without one.

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
    low: float  # lower end of the mean's 95% interval (Student's t)
    high: float  # upper end
    wins: int  # seeds with a positive difference
    seeds: int
    p: float  # of the two-sided paired t-test that the mean is 0; NaN for fewer than two seeds


def paired(differences: Sequence[float]) -> Paired:
    """The mean of paired differences [seeds] with its 95% interval; infinitely wide for fewer than two seeds."""
    values = np.asarray(differences, dtype=np.float64)
    n = len(values)
    half, p = np.inf, float("nan")
    mean = float(values.mean())
    if n >= 2:
        error = values.std(ddof=1) / np.sqrt(n)
        half = stats.t.ppf(0.975, n - 1) * error
        p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Paired(mean, mean - half, mean + half, int((values > 0).sum()), n, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of tests that are reported together (Holm, Scand. J. Statist. 6, 1979).

    The i-th smallest of m is multiplied by m - i + 1, and none is less than a smaller one, or more than 1. Where a
    corrected one is below 0.05, the chance of one false difference or more among all is below 5%. NaNs are no tests.
    """
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values)[: int(np.isfinite(values).sum())]  # NaNs are sorted to the end
    factors = np.arange(len(order), 0, -1)
    corrected = np.full(len(values), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1)
    return corrected.tolist()


def retention_difference(ours: Sequence[Result], theirs: Sequence[Result]) -> float | None:
    """The difference of two fronts in retained accuracy, averaged over equal new-task accuracies.

    The range goes from the zero-shot accuracy to the highest that both reach. The result is None where one of the two
    learns nothing, has fewer than two learning rates, or has no retained accuracy.

    Args:
        ours: the results of a method on one few-shot split, one for each learning rate.
        theirs: the results of its baseline on the same split.
    """
    fronts = [_front(results) for results in (ours, theirs)]
    if any(front is None for front in fronts):
        return None
    (our_new, our_kept), (their_new, their_kept) = (front for front in fronts if front is not None)
    low, high = our_new[0], min(our_new.max(), their_new.max())
    if low >= high:
        return None
    levels = np.linspace(low, high, _LEVELS)
    difference = kept_at(our_new, our_kept, levels) - kept_at(their_new, their_kept, levels)
    return float(np.trapezoid(difference, levels) / (high - low))


def _front(results: Sequence[Result]) -> tuple[Array, Array] | None:
    ascending = sorted((r.learning_rate, r.new, r.kept) for r in results if r.learning_rate and r.kept is not None)
    if len(ascending) < 2 or results[0].zero_shot_kept is None:
        return None
    _, new, kept = zip(*ascending, strict=True)
    return np.array([results[0].zero_shot_new, *new]), np.array([results[0].zero_shot_kept, *kept])
