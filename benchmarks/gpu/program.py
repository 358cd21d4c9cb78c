"""Runs the entries within a limit of seconds, and writes a line of JSON for each row as soon as it is known.

A killed run loses no row, a failing check is a row, and a later call goes on with what is not done: what is right at
the first try is done, what failed is tried again, and what was stopped on the way comes last.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.entries import Entry
from benchmarks.gpu.problems import Bench, Row
from complora_kernels.replays import free_memory, reason

DONE, FAILED, UNFINISHED = 0, 1, 3  # exit statuses: a failing check comes before entries that wait


class Log:
    """The lines of a file: `{"entry": ..., "call": ..., "state": "started"}`, its rows, then "done" or "failed"."""

    def __init__(self, path: Path, call: str) -> None:
        self.path, self.call = path, call
        path.parent.mkdir(parents=True, exist_ok=True)
        self.states: dict[str, Row] = {}  # the last state of each entry
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a line that a killed run did not finish
            if "state" in row:
                self.states[row["entry"]] = row

    def write(self, entry: str, row: Row) -> None:
        """Appends one line, which is in the file when this returns, and prints it."""
        line = json.dumps({"entry": entry, "call": self.call, **row})
        if "state" in row:
            self.states[entry] = {"call": self.call, **row}
        with self.path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        if row.get("state") != "started":
            print(words(entry, row), flush=True)

    def is_done(self, entry: str) -> bool:
        """Whether an entry is done, or has failed in this call already."""
        state = self.states.get(entry, {})
        return state.get("state") == "done" or (state.get("state") == "failed" and state.get("call") == self.call)

    def was_stopped(self, entry: str) -> bool:
        return self.states.get(entry, {}).get("state") == "started"


class Outcome(NamedTuple):
    """The names of the entries that failed, and of those that did not fit what was left of the limit."""

    failed: list[str]
    waiting: list[str]
    broken: bool = False  # the device answers nothing any more: only another process can go on

    @property
    def status(self) -> int:
        return FAILED if self.failed else UNFINISHED if self.waiting else DONE


def run(
    entries: Sequence[Entry],
    bench: Bench,
    log: Log,
    deadline: float,
    *,
    counted: Callable[[], Row] = dict,
    alive: Callable[[], bool] = lambda: True,
    now: Callable[[], float] = time.time,
) -> Outcome:
    """Runs what is not done and fits what is left until `deadline`.

    Args:
        entries: in the order of their importance.
        counted: what is noted beside the state of an entry.
        alive: whether the device still answers, asked after a failure.
        now: the seconds by which the deadline is one.
    """
    failed = [entry.name for entry in entries if log.states.get(entry.name, {}).get("state") == "failed"]
    failed = [name for name in failed if log.is_done(name)]  # by this call, before another process took over
    waiting = []
    remaining = [entry for entry in entries if not log.is_done(entry.name)]
    for entry in sorted(remaining, key=lambda entry: log.was_stopped(entry.name)):
        if entry.seconds > deadline - now():
            waiting.append(entry.name)
            continue
        log.write(entry.name, {"state": "started"})
        start, right = now(), True
        try:
            for row in entry.run(bench):
                right &= row.get("ok", True)
                log.write(entry.name, row)
        except Exception as error:
            traceback.print_exc()
            log.write(entry.name, {"what": "exception", "error": reason(error), "ok": False})
            right = False
        log.write(entry.name, {"state": "done" if right else "failed", "took_s": round(now() - start, 2), **counted()})
        if right:
            continue
        failed.append(entry.name)
        if not alive():
            return Outcome(failed, waiting, broken=True)
        free_memory()
    return Outcome(failed, waiting)


def words(entry: str, row: Row) -> str:
    """A row for people."""
    verdict = "" if row.get("ok", True) and row.get("state") != "failed" else "FAILED "
    return f"{verdict}{entry}: " + ", ".join(f"{name} {short(value)}" for name, value in row.items() if name != "ok")


def short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(short, value)) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)
