"""Times rivals in turns and compares them pair by pair, so that a machine that slows down slows all of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import scipy.stats
import torch

from complora_kernels.graphs import CUDAGraphs

Step = Callable[[], Any]
Clock = Callable[[Step], float]  # the seconds of a step
FLUSHED = 2**28  # bytes, twice the largest L2 cache


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
    steps: Mapping[str, Step],
    *,
    ours: str,
    rounds: int,
    measure: Clock,
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


def wall_seconds(step: Step) -> float:
    """With everything that the step has asked of a GPU."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class GPU(NamedTuple):
    """What a clock asks of a GPU."""

    event: Callable[[], Any]  # a new one, that has a time
    synchronize: Step
    flush: Step  # writes more than the L2 cache holds

    def seconds(self, step: Step) -> float:
        """Of one step among several in a row.

        The host runs ahead: what it takes to launch is in it only where that is longer than the work. The L2 cache is
        as the step before it left it: warm.
        """
        return self._among_several(step, [])

    def warm_seconds(self, replay: Step) -> float:
        """The same of a step that is one launch, none of which is waited for: the GPU has a buffer to write meanwhile.

        A replay that is not counted brings back to the L2 cache what that took from it.
        """
        return self._among_several(replay, [self.flush, replay])

    def cold_seconds(self, replay: Step) -> float:
        """Of one step that finds nothing of its own in the L2 cache."""
        return self._between_events(replay, 1, [self.flush])

    def _among_several(self, step: Step, before: Sequence[Step]) -> float:
        once = self._between_events(step, 1, before)
        repeats = min(10, int(0.02 / once))
        return self._between_events(step, repeats, before) if repeats > 1 else once

    def _between_events(self, step: Step, repeats: int, before: Sequence[Step]) -> float:
        start, end = self.event(), self.event()
        self.synchronize()
        for run in before:
            run()
        start.record()
        for _ in range(repeats):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats


def gpu(*, flush: Step = lambda: None) -> GPU:
    return GPU(partial(torch.cuda.Event, enable_timing=True), torch.cuda.synchronize, flush)


def clock(device: torch.device) -> Clock:
    """What measures the seconds of a step on a device."""
    return gpu().seconds if device.type == "cuda" else wall_seconds


class Recorder(Protocol):
    """What captures steps: `CUDAGraphs`."""

    def warm_up(self, run: Step) -> None: ...

    def capture(self, run: Step) -> tuple[Callable[[], None], Any]: ...  # what repeats it, what it returned


class Replays(NamedTuple):
    """How to time steps without their launches: as replays of CUDA graphs, with a warm and with a cold L2 cache."""

    recorder: Callable[[], Recorder]  # a new one
    warm: Clock
    cold: Clock


def replays(device: torch.device) -> Replays | None:
    """Those of a GPU; None: a CPU has no launches to leave out."""
    if device.type != "cuda":
        return None
    timer = gpu(flush=torch.empty(FLUSHED, dtype=torch.uint8, device=device).zero_)
    return Replays(partial(CUDAGraphs, device), timer.warm_seconds, timer.cold_seconds)


class Replay(NamedTuple):
    """Repeats a step; its results are tensors that every replay writes anew."""

    step: Step  # whose tensors the graph reads: they live as long as it does
    replay: Callable[[], None]
    results: Any

    def __call__(self) -> Any:
        self.replay()
        return self.results


def captured(
    steps: Mapping[str, Step],
    make_recorder: Callable[[], Recorder],
    check: Callable[[str, Any], None] | None = None,  # of a name and the results of its replay
) -> tuple[dict[str, Step], dict[str, str]]:
    """The steps as replays; one that cannot be captured as it is, its name with the reason."""
    runs, reasons, recorder = dict(steps), {}, make_recorder()
    for name, step in steps.items():
        recorder.warm_up(step)
        try:
            runs[name] = replay = Replay(step, *recorder.capture(step))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reasons[name], recorder = reason(error), make_recorder()  # the old one's memory is of the broken capture
            continue
        if check is not None:
            check(name, replay())
    return runs, reasons


def reason(error: Exception) -> str:
    """Its kind and the beginning of what it says, for a remark."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said if len(said) <= 100 else f'{said[:100]}…'}"
