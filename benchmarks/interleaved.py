"""Times baselines in turns and compares them pair by pair, so that a machine that slows down slows all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import scipy.stats
import torch

from complora_kernels.replays import Clock, Step, free_memory


@dataclass(frozen=True)
class Timing:
    """One baseline's seconds in every round, and its time over ours in the same round."""

    seconds: list[float]
    ratios: list[float]

    def spread(self) -> tuple[float, float, float]:
        """The 20th percentile, the median and the 80th percentile of the seconds."""
        seconds = self.seconds if len(self.seconds) > 1 else self.seconds * 2
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return fifths[0], statistics.median(self.seconds), fifths[3]

    def ratio(self) -> tuple[float | None, float | None, float | None]:
        """The median of the ratios, and the 95% interval that their order gives it; fewer than six give none."""
        if not self.ratios:
            return None, None, None
        interval = scipy.stats.quantile_test(self.ratios, p=0.5).confidence_interval(0.95)
        low, high = (None if math.isnan(bound) else float(bound) for bound in interval)
        return statistics.median(self.ratios), low, high


def time_interleaved(
    steps: Mapping[str, Step],
    *,
    ours: str,
    rounds: int,
    measure: Clock,
    warm_up: int,
) -> dict[str, Timing]:
    """Runs every step once per round, in alternating order (ABBA), after some rounds that are not counted.

    One that runs out of memory has no timing; the others go on. Without ours there are no ratios.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-warm_up, rounds):
        for name in list(seconds)[:: 1 if number % 2 else -1]:
            elapsed = measured_or_none(measure, steps[name])
            if elapsed is None:
                del seconds[name]
            elif number >= 0:
                seconds[name].append(elapsed)
    own = seconds.get(ours)
    return {
        name: Timing(taken, [] if own is None else [baseline / mine for baseline, mine in zip(taken, own, strict=True)])
        for name, taken in seconds.items()
    }


def measured_or_none(measure: Clock, step: Step) -> float | None:
    """The seconds of a step; None where there is no memory for it, which is then as it was."""
    try:
        return measure(step)
    except torch.OutOfMemoryError:
        pass  # not here: the error holds what the step has made
    free_memory()
    return None
