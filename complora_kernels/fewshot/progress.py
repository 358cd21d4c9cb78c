"""What a person sees while a grid is worked off: bars on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from complora_kernels.fewshot.config import Run, TrainConfig

_SECONDS_BETWEEN_LINES = 30.0


class GridProgress:
    """Shows the whole grid and the runs that are under way, with their losses and the time left.

    Args:
        config: for the number of steps of each run.
        runs: those that are still to be done.
        finished: how many were done before.
        console: where to show it.
    """

    def __init__(self, config: TrainConfig, runs: list[Run], finished: int, console: Console):
        self.config = config
        self.console = console
        self.finished = finished
        self.total = finished + len(runs)
        self.all_steps = sum(config.steps_for(run.shots) for run in runs)
        self.steps_done: dict[Run, int] = {}
        self.started = self.last_line = time.monotonic()
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.overall = self.bars.add_task(self._overall(), total=self.all_steps)
        self.bar_of: dict[Run, TaskID] = {}

    def __enter__(self) -> GridProgress:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()

    def step(self, run: Run, done: int, loss: float) -> None:
        """`run` has done so many steps."""
        if run not in self.bar_of:
            self.bar_of[run] = self.bars.add_task(run.name, total=self.config.steps_for(run.shots))
        self.steps_done[run] = done
        self.bars.update(self.bar_of[run], completed=done, description=f"{run.name}  loss {loss:.3f}")
        self.bars.update(self.overall, completed=sum(self.steps_done.values()))
        if not self.console.is_terminal and time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES:
            self._print(f"{run.name}: step {done} of {self.config.steps_for(run.shots)}, loss {loss:.3f}")

    def finish(self, run: Run, result: dict[str, Any]) -> None:
        """`run` has ended."""
        self.finished += 1
        self.steps_done[run] = self.config.steps_for(run.shots)
        if run in self.bar_of:
            self.bars.remove_task(self.bar_of.pop(run))
        self.bars.update(self.overall, completed=sum(self.steps_done.values()), description=self._overall())
        self._print(
            f"{self.finished}/{self.total} {run.name}: new {100 * result['new']:.1f}%, "
            f"kept {100 * result['kept']:.1f}%, {result['images_per_second']:.0f} images/s, "
            f"{_memory(result['peak_memory_mib'])}"
        )

    def _overall(self) -> str:
        return f"{self.finished} of {self.total} runs"

    def _print(self, line: str) -> None:
        self.last_line = time.monotonic()
        left = "" if self.console.is_terminal else f"; {self._time_left()} left"
        self.console.print(line + left, highlight=False, soft_wrap=True)

    def _time_left(self) -> str:
        done = sum(self.steps_done.values())
        seconds = (time.monotonic() - self.started) * (self.all_steps - done) / max(done, 1)
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _memory(mib: float) -> str:
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"
