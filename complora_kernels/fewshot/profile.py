"""Profiles a few training steps with torch's profiler, and writes a table and a trace."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from complora_kernels.common.files import write_atomically

FIRST_STEP, STEPS = 4, 8  # the first steps do work that later ones do not
PROFILE, TRACE = "profile.txt", "trace.json"
PHASES = ("data", "forward", "backward", "optimizer", "replay")
_ROWS = 12


class StepProfile:
    """Profiles `STEPS` steps of a run and writes profile.txt and trace.json (for ui.perfetto.dev) into its folder.

    Args:
        folder: the folder of the files; None: nothing is profiled.
        steps: the number of steps of the run.
    """

    def __init__(self, folder: Path | None, steps: int) -> None:
        self.folder = folder
        self.first = min(FIRST_STEP, max(steps - STEPS, 0))
        self.last = min(self.first + STEPS, steps)
        self.profiler: Any = None

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(self, *error: object) -> None:
        if self.profiler is not None:  # an error ended the run while it was profiled
            self.profiler.stop()
            self.profiler = None

    def before_step(self, step: int) -> None:
        """Start the profiler before the first profiled step."""
        if self.folder is not None and step == self.first:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            # Without acc_events torch 2.11 warns of a second cycle, which never happens here.
            self.profiler = profile(activities=activities, acc_events=True)
            self.profiler.start()

    def after_step(self, step: int) -> None:
        """Stop the profiler after the last profiled step, and write the files."""
        if self.profiler is None or step != self.last - 1 or self.folder is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profiler, self.profiler = self.profiler, None
        profiler.stop()
        # The trace is written to a temporary folder, because the profiler would follow a link in the place of its file.
        with tempfile.TemporaryDirectory(prefix=".profile-", dir=self.folder) as temporary:
            profiler.export_chrome_trace(str(Path(temporary, TRACE)))
            Path(temporary, TRACE).replace(self.folder / TRACE)
        write_atomically(self.folder / PROFILE, describe(profiler.key_averages(), self.last - self.first))


def describe(averages: Any, steps: int) -> str:
    """A table of a step's phases, and of the operations that took the most time, in milliseconds per step."""
    on_device = any(event.self_device_time_total > 0 for event in averages)

    def time_of(event: Any) -> float:  # microseconds
        return event.self_device_time_total if on_device else event.self_cpu_time_total

    phases = [event for name in PHASES for event in averages if event.key == name]
    operations = sorted((e for e in averages if e.key not in PHASES), key=time_of, reverse=True)
    total = sum(map(time_of, operations)) or 1.0
    where = "GPU" if on_device else "CPU"
    table = Table(title=f"a step, mean of {steps}", box=HORIZONTALS, pad_edge=False)
    for heading in ("", "calls", "ms", "share"):
        table.add_column(heading, justify="left" if not heading else "right", no_wrap=True)
    for i, event in enumerate(phases):
        milliseconds = event.cpu_time_total / 1000 / steps
        table.add_row(
            f"{event.key} (host)", _calls(event, steps), f"{milliseconds:.2f}", "", end_section=i + 1 == len(phases)
        )
    for event in operations[:_ROWS]:
        share = time_of(event) / total
        table.add_row(
            event.key[:70], _calls(event, steps), f"{time_of(event) / 1000 / steps:.2f}", f"{100 * share:.1f}%"
        )
    table.caption = f"shares of all time that operations took on the {where}"
    text = io.StringIO()
    Console(file=text, width=110).print(table)
    return text.getvalue()


def _calls(event: Any, steps: int) -> str:
    return f"{event.count / steps:.0f}" if event.count >= steps else f"{event.count / steps:.1f}"
