"""Times on a GPU: of steps as Python launches them, and of replays of CUDA graphs, which leave the launches out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from complora_kernels.graphs import CUDAGraphs

Step = Callable[[], Any]
Clock = Callable[[Step], float]  # the seconds of a step
FLUSHED = 2**28  # bytes, twice the largest L2 cache
SHORT, TOGETHER = 50e-6, 10  # a replay of fewer seconds is repeated so often in one graph


def free_memory() -> None:
    """Gives back what a step that failed has left: cycles of its autograd graph, and memory that torch keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    """The clock of the current CUDA device."""
    return GPU(partial(torch.cuda.Event, enable_timing=True), torch.cuda.synchronize, flush)


def clock(device: torch.device) -> Clock:
    """What measures the seconds of a step on a device."""
    return gpu().seconds if device.type == "cuda" else wall_seconds


class Recorder(Protocol):
    """What captures steps: `CUDAGraphs`."""

    def warm_up(self, run: Step) -> None: ...

    def capture(self, run: Step) -> tuple[Callable[[], None], Any]: ...  # a function that repeats it, and its result


class Replays(NamedTuple):
    """How to time steps without their launches: as replays of CUDA graphs, with a warm and with a cold L2 cache."""

    recorder: Callable[[], Recorder]  # a new one
    warm: Clock
    cold: Clock
    launched: Clock  # of steps that cannot be captured


def replays(device: torch.device) -> Replays | None:
    """Those of a GPU; None: a CPU has no launches to leave out."""
    if device.type != "cuda":
        return None
    timer = gpu(flush=torch.empty(FLUSHED, dtype=torch.uint8, device=device).zero_)
    return Replays(partial(CUDAGraphs, device), timer.warm_seconds, timer.cold_seconds, timer.seconds)


class Replay(NamedTuple):
    """Repeats a step; its results are tensors that every replay writes anew."""

    step: Step  # keeps the tensors that the graph reads alive
    replay: Callable[[], None]
    results: Any
    several: Callable[[], None] | None = None  # repeats a short one `TOGETHER` times

    def __call__(self) -> Any:
        self.replay()
        return self.results


class Capturer:
    """Captures step after step, in memory that their graphs share."""

    def __init__(self, replays: Replays) -> None:
        self.replays, self.recorder = replays, replays.recorder()

    def __call__(self, step: Step) -> Replay | str:
        """A replay of the step, or why it cannot be captured."""
        try:
            self.recorder.warm_up(step)
            return self._captured(step)
        except NotCaptured as error:
            why = str(error)
        except BaseException:
            self.recorder = self.replays.recorder()
            raise
        self.recorder = self.replays.recorder()  # the old one's memory is of the broken capture
        free_memory()  # the rest of its autograd graph belongs to the old stream
        return why

    def _captured(self, step: Step) -> Replay:
        try:
            replay = Replay(step, *self.recorder.capture(step))
            if self.replays.warm(replay) >= SHORT:
                return replay
            # The launch of a graph takes a few microseconds, in which the GPU would wait.
            several, _ = self.recorder.capture(partial(several_times, step))
            return replay._replace(several=several)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise NotCaptured(reason(error)) from None


class NotCaptured(Exception):
    """Says why a step cannot be captured."""


def several_times(step: Step) -> None:
    """A short step often enough in one graph that its launch does not count."""
    for _ in range(TOGETHER):
        step()  # the results of the last are given back: all write the same memory


def warm_seconds(warm: Clock, run: Step) -> float:
    """The seconds of a replay, or of a step that was not captured, with a warm L2 cache."""
    several = getattr(run, "several", None)
    return warm(run) if several is None else warm(several) / TOGETHER


def reason(error: Exception) -> str:
    """Its kind and the beginning of what it says, for a remark."""
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said if len(said) <= 100 else f'{said[:100]}…'}"
