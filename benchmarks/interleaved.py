"""Times rivals in turns and compares them pair by pair, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """One rival's seconds in every round, and its time over ours in the same round."""

    seconds: list[float]
    ratios: list[float]

    def spread(self) -> tuple[float, float, float]:
        """The 20th percentile, the median and the 80th percentile of the ratios."""
        fifths = statistics.quantiles(self.ratios, n=5, method="inclusive")
        return fifths[0], statistics.median(self.ratios), fifths[3]


def time_interleaved(steps: Mapping[str, Callable[[], object]], *, ours: str, rounds: int) -> dict[str, Timing]:
    """Runs every step once per round, in alternating order (ABBA), after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            steps[name]()
            elapsed = time.perf_counter() - start
            if number:
                seconds[name].append(elapsed)
    return {
        name: Timing(taken, [rival / own for rival, own in zip(taken, seconds[ours], strict=True)])
        for name, taken in seconds.items()
    }
