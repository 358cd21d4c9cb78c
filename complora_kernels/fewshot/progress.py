"""Shows the progress of a grid: bars on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from complora_kernels.fewshot.escapes import say, visible
from complora_kernels.fewshot.report.wording import words as words_of

if TYPE_CHECKING:
    from complora_kernels.fewshot.jobs import Job

_SECONDS_BETWEEN_LINES = 30.0


class GridProgress:
    """Shows the progress of the grid and of the current runs, with their losses and the time left.

    Args:
        jobs: the jobs that remain.
        finished: the number of jobs that were done before.
        console: the console to write to.
    """

    def __init__(self, jobs: Sequence[Job], finished: int, console: Console):
        self.console = console
        self.finished = finished
        self.failed = 0
        self.total = finished + len(jobs)
        self.all_steps = sum(job.steps for job in jobs)
        self.steps_done: dict[str, int] = {}
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
        self.bar_of: dict[str, TaskID] = {}

    def __enter__(self) -> GridProgress:
        self.bars.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bars.stop()

    def step(self, job: Job, done: int, loss: float) -> None:
        """Show that a run has done `done` steps."""
        name = job.run.name
        if name not in self.bar_of:
            self.bar_of[name] = self.bars.add_task(_shown(name), total=job.steps)
        self.steps_done[name] = done
        self.bars.update(self.bar_of[name], completed=done, description=f"{_shown(name)}  loss {loss:.3f}")
        self.bars.update(self.overall, completed=sum(self.steps_done.values()))
        if not self.console.is_terminal and time.monotonic() - self.last_line > _SECONDS_BETWEEN_LINES:
            self.say(f"{name}: step {done} of {job.steps}, loss {loss:.3f}")

    def finish(self, job: Job, result: dict[str, Any]) -> None:
        """Show the result of a run that has ended."""
        self.finished += 1
        self._end(job)
        names = words_of(job.config.protocol)
        measured = ((names.short, result["new"]), (names.kept, result["kept"]))
        words = [f"{name} {100 * accuracy:.1f}%" for name, accuracy in measured if accuracy is not None]
        if job.steps:
            words = [f"loss {result['loss']:.3f}", *words, f"{result['images_per_second']:.0f} images/s"]
            words.append(_memory(result["peak_memory_mib"]))
        self.say(f"{self.finished}/{self.total} {job.run.name}: {', '.join(words)}")

    def fail(self, job: Job, error: str) -> None:
        """Show the error of a run that has failed; the others continue."""
        self.failed += 1
        self._end(job)
        self.say(f"failed: {job.run.name}: {' '.join(error.split())}")

    def _end(self, job: Job) -> None:
        self.steps_done[job.run.name] = job.steps
        if job.run.name in self.bar_of:
            self.bars.remove_task(self.bar_of.pop(job.run.name))
        self.bars.update(self.overall, completed=sum(self.steps_done.values()), description=self._overall())

    def _overall(self) -> str:
        return f"{self.finished} of {self.total} runs" + (f", {self.failed} failed" if self.failed else "")

    def say(self, line: str) -> None:
        """Print a line; where there are no bars, it ends with the time left."""
        self.last_line = time.monotonic()
        left = "" if self.console.is_terminal else f"; {self._time_left()} left"
        say(self.console, line + left, soft_wrap=True)

    def _time_left(self) -> str:
        done = sum(self.steps_done.values())
        seconds = (time.monotonic() - self.started) * (self.all_steps - done) / max(done, 1)
        return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _shown(name: str) -> str:
    return escape(visible(name))


def _memory(mib: float) -> str:
    return f"{mib:.0f} MiB" if mib < 1024 else f"{mib / 1024:.1f} GiB"
