"""Measures rivals side by side and turns what was measured into rows of a results file."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks import results
from benchmarks.interleaved import Clock, Replays, Step, captured, clock, reason, time_interleaved, wall_seconds
from benchmarks.results import Row

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there  # pyright: ignore[reportMissingImports]

TARGETS = Path(__file__).with_name("targets.toml")
NOT_CAPTURED = "not captured: timed with launches"
Made = TypeVar("Made")


class Missing(Exception):
    """A rival's code is not here; says how to bring it."""


class Work(NamedTuple):
    """The least that a shape asks for, whoever computes it."""

    operations: float  # two for each product of two numbers
    bytes: float  # read or written once; 0 where they are not counted


@dataclass
class Comparison:
    """The rows of one benchmark file, and where they are kept after every measurement."""

    benchmark: str  # "layer" for bench_layer.py
    rounds: int
    device: torch.device
    found: results.Results
    path: Path | None  # of the results file

    def record(self, row: Row) -> None:
        self.found.add(replace(row, revision=self.found.machine["revision"]))
        if self.path is not None:
            results.write(self.path, self.found)

    def attempt(self, shape: str, rival: str, make: Callable[[], Made], *, foreign: bool = False) -> Made | None:
        """What `make` returns; None, and a row that says why, where the rival is not installed or does not fit.

        Args:
            foreign: whatever fails in it is a row too: code that is not ours to mend.
        """
        try:
            return make()
        except ModuleNotFoundError as error:
            remark = f"not installed: pip install {error.name}"
        except Missing as missing:
            remark = str(missing)
        except torch.OutOfMemoryError:
            remark = "does not fit in memory"
        except Exception as error:
            if not foreign:
                raise
            remark = f"fails: {reason(error)}"
        self.record(Row(self.benchmark, shape, rival, remark))
        return None

    def time(
        self,
        shape: str,
        steps: Mapping[str, Step],
        *,
        ours: str,
        work: Work | None = None,
        floors: Mapping[str, Work | None] | None = None,
        rounds: int | None = None,
        remarks: Mapping[str, str] | None = None,
        targets: Mapping[str, str | None] | None = None,
        warm_up: int | None = None,
        measure: Clock | None = None,
        replays: Replays | None = None,
        check: Callable[[str, Any], None] | None = None,
    ) -> None:
        """Times the steps, which were checked before, in turns, and records a row for each.

        Args:
            work: of the shape, whoever computes it.
            floors: the work of those that do less.
            rounds: fewer than those of the command line, for slow steps.
            targets: a rival's name -> the id of what it measures.
            warm_up: rounds that are not counted; None: three on a GPU, one on a CPU, where nothing is tuned meanwhile.
            measure: the clock; None: the device's.
            replays: instead of it, times the steps without their launches, with a warm and a cold L2 cache.
            check: what a replay gave, a rival's name first; it raises where that is wrong.
        """
        remarks, targets, floors = remarks or {}, targets or {}, floors or {}
        rounds = min(self.rounds, rounds or self.rounds)
        measure = measure or (clock(self.device) if replays is None else replays.warm)
        warm_up = (3 if self.device.type == "cuda" else 1) if warm_up is None else warm_up
        time_all = partial(time_interleaved, ours=ours, rounds=rounds)
        launched, cold = {}, {}
        try:
            if replays is not None:
                steps, launched = captured(steps, replays.recorder, check)
            timings = time_all(steps, measure=measure, warm_up=warm_up)
            if replays is not None:
                cold = time_all(steps, measure=replays.cold, warm_up=1)
        except torch.OutOfMemoryError:
            for rival in steps:
                self.record(Row(self.benchmark, shape, rival, "does not fit in memory beside the others"))
            return
        for rival, timing in timings.items():
            (p20, median, p80), (ratio, low, high) = timing.spread(), timing.ratio()
            known = [remarks.get(rival, ""), f"{NOT_CAPTURED} ({launched[rival]})" if rival in launched else ""]
            remark = "; ".join(filter(None, known))
            row = Row(self.benchmark, shape, rival, remark, rounds, median, p20, p80, ratio, low, high)
            if rival in cold:
                row = replace(row, cold_s=cold[rival].spread()[1], cold_ratio=cold[rival].ratio()[0])
            least = floors.get(rival, work)
            changes = {} if least is None else self._roofline(least, median)
            self.record(replace(row, **changes, **measures(targets.get(rival), ratio)))

    def _roofline(self, work: Work, seconds: float) -> dict[str, float]:
        limits = self.found.machine
        least = max(work.operations / limits["operations_per_s"], work.bytes / limits["bytes_per_s"])
        return {"roofline": least / seconds} | ({"intensity": work.operations / work.bytes} if work.bytes else {})


def needed(option: str, checkouts: Mapping[str, Path | None]) -> Path:
    """Where the code of a rival lies that no index has."""
    path = checkouts[option]
    if path is None:
        raise Missing(f"not given: {option} PATH")
    return path


def pedantic(benchmark: Any, step: Step) -> None:
    """A row of pytest-benchmark's own table, with everything that the step has asked of a GPU."""
    benchmark.pedantic(lambda: wall_seconds(step), rounds=3)


def measures(target: str | None, over_ours: float) -> dict[str, Any]:
    """The fields of a row that measures a target: what a rival takes over ours, or, of an upper bound, ours over it."""
    if target is None:
        return {}
    return {"target": target, "figure": 1 / over_ours if "at_most" in bounds()[target] else over_ours}


@functools.cache
def bounds() -> dict[str, dict[str, Any]]:
    """targets.toml by id."""
    return {target["id"]: target for target in tomllib.loads(TARGETS.read_text())["target"]}
