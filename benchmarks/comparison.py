"""Measures baselines side by side and turns what was measured into rows of a results file."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks import machine, results
from benchmarks.interleaved import Timing, time_interleaved
from benchmarks.results import Row
from complora_kernels.replays import (
    Capturer,
    Clock,
    Replays,
    Step,
    clock,
    free_memory,
    reason,
    wall_seconds,
    warm_seconds,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there  # pyright: ignore[reportMissingImports]

TARGETS = Path(__file__).with_name("targets.toml")
NOT_CAPTURED = "not captured: timed with launches"
FAILS = "fails: "
Made = TypeVar("Made")


class Missing(Exception):
    """A baseline's code is not here; says how to bring it."""


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
    path: Path | None  # the results file
    go_on: bool = False  # True: shapes that the file has at this revision are skipped
    failed: list[str] = field(default_factory=list)  # of ours: each is a row, and the run fails when all are measured

    def record(self, row: Row) -> None:
        self.found.add(replace(row, revision=self.found.machine["revision"]))
        if self.path is not None:
            results.write(self.path, self.found)

    def known(self, shape: str, baselines: Collection[str]) -> bool:
        """Whether an earlier run of this revision measured a shape, which is then left as it is; not what failed."""
        now, rows = self.found.machine["revision"], [r for r in self.found.rows if not r.remark.startswith(FAILS)]
        found = {r.baseline for r in rows if (r.benchmark, r.shape, r.revision) == (self.benchmark, shape, now)}
        told = now != "unknown" and not now.endswith("+")  # else nobody knows what code it was
        return self.go_on and told and set(baselines) <= found

    def attempt(
        self, shape: str, baseline: str, make: Callable[[], Made], *, foreign: bool = False, again: bool = False
    ) -> Made | None:
        """What `make` returns; None, and a row that says why, where the baseline is missing, does not fit or fails.

        Args:
            foreign: code that is not ours to mend: the run does not fail with it.
            again: it has its row from an earlier comparison, which stays.
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
            remark = FAILS + reason(error)
            if not foreign:
                traceback.print_exc()
                self.failed.append(f"{shape}, {baseline}: {reason(error)}")
        if not again:
            self.record(Row(self.benchmark, shape, baseline, remark))
        free_memory()  # not while the error is handled, which holds what `make` has made
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
        check: Callable[[str, Step], None] | None = None,
        launched: Mapping[str, str] | None = None,
        foreign: Collection[str] = (),
        again: Collection[str] = (),
    ) -> None:
        """Times the steps, which were checked before, in turns, and records a row for each.

        Args:
            work: of the shape, whoever computes it.
            floors: the work of those that do less.
            rounds: fewer than those of the command line, for slow steps.
            targets: a baseline's name -> the id of what it measures. It has a figure where it was timed as ours was.
            warm_up: rounds that are not counted; None: three on a GPU, one on a CPU, where nothing is tuned meanwhile.
            measure: the clock; None: the device's.
            replays: instead of it, times the steps without their launches, with a warm and a cold L2 cache.
            check: what is timed, step or replay, a baseline's name first; it raises where its results are wrong,
                which is a row in place of a time.
            launched: why a step is not to be captured, by the baseline's name.
            foreign: whose code is not ours to mend: the run does not fail with it.
            again: those that are here to compare with and have their rows from an earlier comparison.
        """
        remarks, targets, floors = remarks or {}, targets or {}, floors or {}
        rounds = min(self.rounds, rounds or self.rounds)
        warm_up = (3 if self.device.type == "cuda" else 1) if warm_up is None else warm_up
        runs, launched = self._ready(shape, steps, replays, check, launched or {}, foreign, again)
        time_all, cold = partial(time_interleaved, ours=ours, rounds=rounds), {}
        if replays is None:
            timings = time_all(runs, measure=measure or clock(self.device), warm_up=warm_up)
        else:
            timings = time_all(runs, measure=partial(warm_seconds, replays.warm), warm_up=warm_up)
            cold = time_all({baseline: runs[baseline] for baseline in timings}, measure=replays.cold, warm_up=1)
        state = machine.gpu_state() if self.device.type == "cuda" else {}
        for baseline in (baseline for baseline in runs if baseline not in again):
            if baseline not in timings:
                self.record(Row(self.benchmark, shape, baseline, "does not fit in memory beside the others"))
                continue
            why = f"{NOT_CAPTURED} ({launched[baseline]})" if baseline in launched else ""
            row = Row(
                self.benchmark, shape, baseline, "; ".join(filter(None, [remarks.get(baseline, ""), why])), rounds
            )
            row = replace(row, **state, **times_of(timings[baseline]))
            row = replace(row, **times_of(cold[baseline], "cold_")) if baseline in cold else row
            least, alike = floors.get(baseline, work), (baseline in launched) == (ours in launched)
            roofline = {} if least is None else self._roofline(least, timings[baseline].spread()[1])
            self.record(replace(row, **roofline, **measures(targets.get(baseline) if alike else None, row.ratio)))

    def _ready(
        self,
        shape: str,
        steps: Mapping[str, Step],
        replays: Replays | None,
        check: Callable[[str, Step], None] | None,
        launched: Mapping[str, str],
        foreign: Collection[str],
        again: Collection[str],
    ) -> tuple[dict[str, Step], dict[str, str]]:
        """What is timed, whose results are right, and why some of it is no replay, where replays are timed."""
        runs, reasons, capture = {}, {}, None if replays is None else Capturer(replays)
        for baseline, step in steps.items():
            make = partial(ready, baseline, step, capture, check, launched.get(baseline, ""))
            made = self.attempt(shape, baseline, make, foreign=baseline in foreign, again=baseline in again)
            if made is not None:
                runs[baseline], why = made
                reasons |= {baseline: why} if why else {}
        return runs, reasons

    def _roofline(self, work: Work, seconds: float) -> dict[str, float]:
        limits = {name: self.found.machine[name] for name in ("operations_per_s", "bytes_per_s")}
        least = max(work.operations / limits["operations_per_s"], work.bytes / limits["bytes_per_s"])
        intensity = {"intensity": work.operations / work.bytes} if work.bytes else {}
        return {"roofline": least / seconds, **intensity, **limits}


def ready(
    baseline: str, step: Step, capture: Capturer | None, check: Callable[[str, Step], None] | None, launched: str
) -> tuple[Step, str]:
    """A step or its replay, and why it is no replay, where there are some; `launched` says so beforehand."""
    run, why = step, ""
    if capture is not None:
        made = launched or capture(step)
        run, why = (step, made) if isinstance(made, str) else (made, "")
    if check is not None:
        check(baseline, run)
    return run, why


def times_of(timing: Timing, kind: str = "") -> dict[str, Any]:
    """The fields of a row; `kind` begins the names of those of a cold L2 cache."""
    (p20, median, p80), (ratio, low, high) = timing.spread(), timing.ratio()
    median_name = "s" if kind else "median_s"
    seconds = {f"{kind}p20_s": p20, f"{kind}{median_name}": median, f"{kind}p80_s": p80}
    return seconds | {f"{kind}ratio": ratio, f"{kind}ratio_low": low, f"{kind}ratio_high": high}


def needed(option: str, checkouts: Mapping[str, Path | None]) -> Path:
    """Where the code of a baseline lies that no index has."""
    path = checkouts[option]
    if path is None:
        raise Missing(f"not given: {option} PATH")
    return path


def pedantic(benchmark: Any, step: Step | None) -> None:
    """A row of pytest-benchmark's own table, with everything that the step has asked of a GPU."""
    if step is not None:  # None: it does not fit, or was measured before
        benchmark.pedantic(lambda: wall_seconds(step), rounds=3)


def measures(target: str | None, over_ours: float | None) -> dict[str, Any]:
    """The fields of a row that measures a target: a baseline's time over ours, for an upper bound ours over it."""
    if target is None or over_ours is None:
        return {}
    return {"target": target, "figure": 1 / over_ours if "at_most" in bounds()[target] else over_ours}


@functools.cache
def bounds() -> dict[str, dict[str, Any]]:
    """targets.toml by id."""
    return {target["id"]: target for target in tomllib.loads(TARGETS.read_text())["target"]}
