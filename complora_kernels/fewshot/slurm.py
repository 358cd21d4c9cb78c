"""Hands runs to a Slurm cluster, through submitit."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from complora_kernels.common.files import reading
from complora_kernels.fewshot.escapes import say
from complora_kernels.fewshot.grid import SLURM, record
from complora_kernels.fewshot.jobs import Job, run_alone
from complora_kernels.fewshot.outcomes import results_of

_SUBMITTED = "_submitted.pkl"  # the end of the names of submitit's files of tasks
MAX_ARRAY_TASKS = 1000  # Slurm's default limit on the tasks of an array
_SECONDS_BETWEEN_LOOKS = 10.0


def check_submitit() -> None:
    """Raise a ValueError where submitit is not installed."""
    if importlib.util.find_spec("submitit") is None:
        raise ValueError("--slurm: submitit is not installed, expected `pip install submitit` before")


class ClusterRun:
    """Calls `run_alone` on a node; a run that is preempted or runs out of time is queued again, and continues."""

    def __call__(self, job: Job) -> dict[str, Any] | Exception:
        """Run the job, and return its result or the error that it ended with."""
        return run_alone(job)

    def checkpoint(self, job: Job) -> Any:
        """The submission that replaces an interrupted one: the same job, because a run finds its own checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, job)


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

    Ctrl-C leaves the submitted runs alone; the next call finds them again and collects their results.

    Args:
        jobs: the jobs of one folder.
        output: the folder, which every node sees. submitit's own files go to its folder slurm.
        parameters: parameters of submitit's AutoExecutor; `slurm_array_parallelism` limits how many run at once.
        console: shows the progress.
        cluster: "slurm", or "local" for processes of this machine.
        seconds_between_looks: seconds between two questions to the cluster.
    """
    import submitit

    folder = output / SLURM
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    try:
        executor.update_parameters(**{"name": output.name, **parameters})
    except (NameError, TypeError) as error:
        raise ValueError(f"slurm: {parameters}: {error}") from error
    finished = {result["run"] for result in results_of(output)}
    remaining = {job.run.name: job for job in jobs if job.run.name not in finished}
    under_way = tasks_under_way(folder, type(executor._executor).job_class)
    submitted = {name: task for name, task in under_way.items() if name in remaining}
    fresh = [job for name, job in remaining.items() if name not in submitted]
    console.print(f"{len(submitted)} runs were under way, {len(fresh)} are submitted", highlight=False)
    for first in range(0, len(fresh), MAX_ARRAY_TASKS):
        part = fresh[first : first + MAX_ARRAY_TASKS]
        tasks = executor.map_array(ClusterRun(), part)
        submitted |= {job.run.name: task for job, task in zip(part, tasks, strict=True)}
    while submitted:
        ended = [name for name, task in submitted.items() if task.done()]
        for name in ended:
            collect(remaining[name], submitted.pop(name), output, console)
        if submitted and not ended:
            time.sleep(seconds_between_looks)


def tasks_under_way(folder: Path, kind: Any) -> dict[str, Any]:
    """The tasks that earlier calls have submitted but not collected, by their runs' names, from submitit's files.

    A task that ended without an outcome is lost: its run is submitted again, and continues.
    """
    # All tasks are made before the first question, so that the cluster is asked about all of them at once.
    tasks = [kind(folder, path.name.removesuffix(_SUBMITTED)) for path in folder.glob(f"*{_SUBMITTED}")]
    found = {}
    for task in tasks:
        if task.done() and not task.paths.result_pickle.exists():
            task.paths.submitted_pickle.unlink()
            continue
        with reading(task.paths.submitted_pickle, "a file of a run as submitit writes it"):
            (job,) = task.submission().args
        found[job.run.name] = task
    return found


def collect(job: Job, task: Any, output: Path, console: Console) -> None:
    """Record the outcome of a task that has ended, and print it."""
    lost = task.exception()  # an error of the cluster: the process was killed, or never began
    try:
        with reading(task.paths.result_pickle, "a file of a run as submitit writes it"):
            result = task.result() if lost is None else RuntimeError(" ".join(str(lost).split()))
    except ValueError as error:
        result = error
    record(job, result, output)
    task.paths.submitted_pickle.unlink(missing_ok=True)  # the task is collected
    line = f"failed: {job.run.name}: {result}" if isinstance(result, Exception) else f"{job.run.name}: done"
    say(console, line, soft_wrap=True)
