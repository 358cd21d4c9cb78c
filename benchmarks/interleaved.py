"""Times rivals in turns and compares them pair by pair, so that a machine that slows down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """One rival's seconds in every round, and its time over ours in the same round."""

    seconds: list[float]
    ratios: list[float]

    def spread(self) -> tuple[float, float, float]:
        """The 20th percentile, the median and the 80th percentile of the ratios."""
        fifths = statistics.quantiles(self.ratios, n=5, method="inclusive")
        return fifths[0], statistics.median(self.ratios), fifths[3]


def time_interleaved(
    steps: Mapping[str, Callable[[], object]], *, ours: str, rounds: int, device: torch.device
) -> dict[str, Timing]:
    """Runs every step once per round, in alternating order (ABBA), after three rounds that are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    clock = _device_seconds if device.type == "cuda" else _seconds
    for number in range(-3, rounds):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            elapsed = clock(steps[name])
            if number >= 0:
                seconds[name].append(elapsed)
    return {
        name: Timing(taken, [rival / own for rival, own in zip(taken, seconds[ours], strict=True)])
        for name, taken in seconds.items()
    }


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _device_seconds(step: Callable[[], object], repeats: int = 10) -> float:
    """Of one step among several in a row, by the device's own clock: the host runs ahead and is not in it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
