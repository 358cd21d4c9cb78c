"""Runs on a Slurm cluster, through submitit."""

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

_SUBMITTED = "_submitted.pkl"  # how submitit's files of tasks end
_MOST_TASKS = 1000  # of one array: Slurm's default limit
_SECONDS_BETWEEN_LOOKS = 10.0


def check_submitit() -> None:
    """Raise a ValueError where submitit is not installed."""
    if importlib.util.find_spec("submitit") is None:
        raise ValueError("--slurm: submitit is not installed, expected `pip install submitit` before")


class ClusterRun:
    """`run_alone` on a node of a cluster; what is preempted or runs out of time is queued again, and goes on."""

    def __call__(self, job: Job) -> dict[str, Any] | Exception:
        """The result of the job, or the error that it ended with."""
        return run_alone(job)

    def checkpoint(self, job: Job) -> Any:
        """What submitit queues instead: the same, since a run finds its own checkpoint."""
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

    folder = output / SLURM
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    try:
        executor.update_parameters(**{"name": output.name, **parameters})
    except (NameError, TypeError) as error:
        raise ValueError(f"slurm: {parameters}: {error}") from error
    finished = {result["run"] for result in results_of(output)}
    remaining = {job.run.name: job for job in jobs if job.run.name not in finished}
    under_way = _under_way(folder, type(executor._executor).job_class)
    submitted = {name: task for name, task in under_way.items() if name in remaining}
    fresh = [job for name, job in remaining.items() if name not in submitted]
    console.print(f"{len(submitted)} runs were under way, {len(fresh)} are submitted", highlight=False)
    for first in range(0, len(fresh), _MOST_TASKS):
        part = fresh[first : first + _MOST_TASKS]
        tasks = executor.map_array(ClusterRun(), part)
        submitted |= {job.run.name: task for job, task in zip(part, tasks, strict=True)}
    while submitted:
        ended = [name for name, task in submitted.items() if task.done()]
        for name in ended:
            _collect(remaining[name], submitted.pop(name), output, console)
        if submitted and not ended:
            time.sleep(seconds_between_looks)


def _under_way(folder: Path, kind: Any) -> dict[str, Any]:
    """What earlier calls have submitted and not collected, by the names of the runs: a file of submitit's tells each.

    A task that ended without an outcome is lost: its run is submitted again, and goes on.
    """
    # All tasks before the first question: the cluster is then asked once about all of them.
    tasks = [kind(folder, path.name.removesuffix(_SUBMITTED)) for path in folder.glob(f"*{_SUBMITTED}")]
    found = {}
    for task in tasks:
        if task.done() and not task.paths.result_pickle.exists():
            task.paths.submitted_pickle.unlink()
            continue
        with reading(task.paths.submitted_pickle, "what submitit wrote of a run"):
            (job,) = task.submission().args
        found[job.run.name] = task
    return found


def _collect(job: Job, task: Any, output: Path, console: Console) -> None:
    lost = task.exception()  # of the cluster: the process was killed, or never began
    try:
        with reading(task.paths.result_pickle, "what submitit wrote of a run"):
            result = task.result() if lost is None else RuntimeError(" ".join(str(lost).split()))
    except ValueError as error:
        result = error
    record(job, result, output)
    task.paths.submitted_pickle.unlink(missing_ok=True)  # it is no longer under way
    line = f"failed: {job.run.name}: {result}" if isinstance(result, Exception) else f"{job.run.name}: done"
    say(console, line, soft_wrap=True)
