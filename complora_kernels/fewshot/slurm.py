"""Runs on a Slurm cluster, through submitit."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from complora_kernels.fewshot.files import append_json_line, read_json_lines, write_atomically
from complora_kernels.fewshot.grid import FAILURES, RESULTS, Job, run_alone

SUBMITTED = "submitted.json"
_SECONDS_BETWEEN_LOOKS = 10.0


def check_submitit() -> None:
    """Raise a ValueError where submitit is not installed."""
    if importlib.util.find_spec("submitit") is None:
        raise ValueError("--slurm: submitit is not installed, expected `pip install submitit` before")


def run_on_slurm(
    jobs: Sequence[Job],
    output: Path,
    parameters: dict[str, Any],
    console: Console,
    *,
    cluster: str = "slurm",
    seconds_between_looks: float = _SECONDS_BETWEEN_LOOKS,
) -> None:
    """Submit every job that has no result and is not under way, and collect results until all have ended.

    Ctrl-C leaves what is submitted alone; the next call finds it again and goes on to collect.

    Args:
        jobs: of one folder.
        output: the folder, which every node sees. submitit's own files go to its folder slurm.
        parameters: of submitit's AutoExecutor; `slurm_array_parallelism` limits how many run at once.
        console: where progress is shown.
        cluster: "slurm", or "local" for processes of this machine.
        seconds_between_looks: how long to wait before asking the cluster again.
    """
    import submitit

    folder = output / "slurm"
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    try:
        executor.update_parameters(**{"name": output.name, **parameters})
    except (NameError, TypeError) as error:
        raise ValueError(f"slurm: {parameters}: {error}") from error
    finished = {result["run"] for result in read_json_lines(output / RESULTS)}
    remaining = {job.run.name: job for job in jobs if job.run.name not in finished}
    known = json.loads((output / SUBMITTED).read_text()) if (output / SUBMITTED).exists() else {}
    kind = type(executor._executor).job_class
    submitted = {name: kind(folder, known[name]) for name in remaining if name in known}
    submitted = {name: task for name, task in submitted.items() if not _is_lost(task)}
    fresh = [job for name, job in remaining.items() if name not in submitted]
    if fresh:
        tasks = executor.map_array(run_alone, fresh)
        submitted |= {job.run.name: task for job, task in zip(fresh, tasks, strict=True)}
        write_atomically(output / SUBMITTED, json.dumps({name: task.job_id for name, task in submitted.items()}))
    console.print(f"{len(fresh)} runs submitted, {len(submitted) - len(fresh)} were under way", highlight=False)
    while submitted:
        ended = [name for name, task in submitted.items() if task.done()]
        for name in ended:
            _collect(remaining[name], submitted.pop(name), output, console)
        if ended:
            write_atomically(output / SUBMITTED, json.dumps({name: task.job_id for name, task in submitted.items()}))
        elif submitted:
            time.sleep(seconds_between_looks)


def _is_lost(task: Any) -> bool:
    """Whether a task of an earlier call ended without an outcome: it is submitted again, and goes on."""
    return task.done() and not task.paths.result_pickle.exists()


def _collect(job: Job, task: Any, output: Path, console: Console) -> None:
    lost = task.exception()  # of the cluster: the process was killed, or never began
    outcome = task.result() if lost is None else RuntimeError(" ".join(str(lost).split()))
    if isinstance(outcome, Exception):
        append_json_line(output / FAILURES, {"run": job.run.name, "error": str(outcome)})
        console.print(f"failed: {job.run.name}: {outcome}", highlight=False, markup=False, soft_wrap=True)
        return
    append_json_line(output / RESULTS, outcome)
    job.end()
    console.print(f"{job.run.name}: done", highlight=False, markup=False, soft_wrap=True)
