"""Times rivals in turns and compares them pair by pair, so that a machine that slows down slows all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import scipy.stats
import torch


@dataclass(frozen=True)
class Timing:
    """One rival's seconds in every round, and its time over ours in the same round."""

    seconds: list[float]
    ratios: list[float]

    def spread(self) -> tuple[float, float, float]:
        """The 20th percentile, the median and the 80th percentile of the seconds."""
        seconds = self.seconds if len(self.seconds) > 1 else self.seconds * 2
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return fifths[0], statistics.median(self.seconds), fifths[3]

    def ratio(self) -> tuple[float, float | None, float | None]:
        """The median of the ratios, and the 95% interval that their order gives it; fewer than six give none."""
        interval = scipy.stats.quantile_test(self.ratios, p=0.5).confidence_interval(0.95)
        low, high = (None if math.isnan(bound) else float(bound) for bound in interval)
        return statistics.median(self.ratios), low, high


def time_interleaved(
    steps: Mapping[str, Callable[[], object]],
    *,
    ours: str,
    rounds: int,
    measure: Callable[[Callable[[], object]], float],  # the seconds of a step
    warm_up: int,
) -> dict[str, Timing]:
    """Runs every step once per round, in alternating order (ABBA), after some rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-warm_up, rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            elapsed = measure(steps[name])
            if number >= 0:
                seconds[name].append(elapsed)
    return {
        name: Timing(taken, [rival / own for rival, own in zip(taken, seconds[ours], strict=True)])
        for name, taken in seconds.items()
    }


def wall_seconds(step: Callable[[], object]) -> float:
    """With everything that the step has asked of a GPU."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """What measures the seconds of a step on a device."""
    return _device_seconds if device.type == "cuda" else wall_seconds


def _device_seconds(step: Callable[[], object]) -> float:
    """Of one step among several in a row, by the device's own clock.

    The host runs ahead: what it takes to launch is in it only where that is longer than the work. The L2 cache is as
    the step before it left it: warm.
    """
    once = _seconds_between_events(step, 1)
    repeats = min(10, int(0.02 / once))
    return _seconds_between_events(step, repeats) if repeats > 1 else once


def _seconds_between_events(step: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
