"""Runs a grid: in several processes, or in all of a team together; a killed grid can be continued."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from complora_kernels.common.files import refuse_link, words_of
from complora_kernels.fewshot import config as options
from complora_kernels.fewshot.checks import check_data, check_options
from complora_kernels.fewshot.config import TrainConfig
from complora_kernels.fewshot.files import append_json_line, check_writable, read_json, write_json
from complora_kernels.fewshot.jobs import RUNS, Job, is_full
from complora_kernels.fewshot.outcomes import FAILURES, RESULTS, failures_of, results_of
from complora_kernels.fewshot.profile import PROFILE
from complora_kernels.fewshot.progress import GridProgress
from complora_kernels.fewshot.team import ALONE, Team
from complora_kernels.fewshot.training import CHECKPOINT
from complora_kernels.fewshot.workers import work_off

DESCRIPTION = "config.json"
FIGURES = "figures"
SLURM = "slurm"
"""The folder of submitit's files, below the folder of a sweep."""


def prepare(config: TrainConfig) -> None:
    """Find every error that would stop the grid, and open its folder, before anything is computed.

    Raises:
        ValueError: an option cannot work, or the folder holds the results of other options.
        FileNotFoundError: `pretrained` is neither a file nor a tag, or a data set is missing.
        OSError: the folder cannot be written to.
    """
    check_options(config)
    images = check_data(config)
    described, known = options.to_json(config), description(config.output)
    if known:
        check_same(known, described, config.output)
    check_images({run.name: images[run.shots, run.seed] for run in config.runs()}, config.output)
    open_folder(config.output, described)


def description(folder: Path) -> dict[str, Any]:
    """Read the options of a folder that holds results or unfinished runs; they are empty for any other folder.

    Raises:
        ValueError: its config.json is damaged.
    """
    begun = (RESULTS, f"{RUNS}/*/{CHECKPOINT}", f"{SLURM}/*_submitted.pkl")
    is_begun = any(True for pattern in begun for _ in folder.glob(pattern))
    path = folder / DESCRIPTION
    return read_json(path) if is_begun and path.exists() else {}


def open_folder(folder: Path, described: dict[str, Any]) -> None:
    """Make the folder of a grid, and write its options. Raises a ValueError for a damaged line of failures.jsonl."""
    failures_of(folder)  # the report at the end will read this file
    parts = folder / RUNS, folder / FIGURES
    for part in parts:
        refuse_link(part)
    for part in (folder, *parts):
        check_writable(part)
    write_json(folder / DESCRIPTION, described)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock the folder of a grid for this process. The system unlocks it when the process dies.

    Raises:
        ValueError: another process works in the folder.
    """
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"--output {folder}: another process works in it, expected another folder") from None
    try:
        yield
    finally:
        lock.release()


def check_images(images: Mapping[str, str], folder: Path) -> None:
    """Raise a ValueError for a result in a folder whose run would see other images now.

    Args:
        images: the fingerprint of each run's images, by its name.
        folder: the folder of the grid.
    """
    for result in results_of(folder):
        found, asked = result.get("images"), images.get(result["run"])
        if None not in (found, asked) and found != asked:
            raise ValueError(
                f"--output {folder}: the result of {result['run']} is of other images ({found}) than its run would see "
                f"now ({asked}); expected the same data, or another folder"
            )


def check_same(found: Any, asked: dict[str, Any], folder: Path) -> None:
    """Raise a ValueError that names the options whose values differ from those of the folder."""
    if not isinstance(found, dict):
        raise ValueError(f"{folder / DESCRIPTION}: expected the options of each variant, not {str(found)[:80]}")
    found = {**options.BEFORE, **found}
    differences = [
        f"--{name.replace('_', '-')} was {found.get(name)}, now {asked.get(name)}"
        for name in sorted(found.keys() | asked.keys())
        if found.get(name) != asked.get(name)
    ]
    if differences:
        raise ValueError(
            f"--output {folder}: holds results of other options ({'; '.join(differences)}); "
            "expected the same options, or another folder"
        )


def run_grid(config: TrainConfig, console: Console, team: Team = ALONE) -> list[dict[str, Any]]:
    """Do every run of the grid that results.jsonl does not hold yet, and return all results.

    A KeyboardInterrupt stops the workers and is raised again; the next call continues from the last checkpoints.

    Args:
        config: the grid, whose folder `prepare` has opened.
        console: shows the progress.
        team: processes that train each run together, each of which calls this.
    """
    jobs = [Job(config, run) for run in config.runs()]
    return run_jobs(jobs, config.output, console, workers=config.workers, team=team)


def run_jobs(
    jobs: Sequence[Job],
    output: Path,
    console: Console,
    *,
    workers: int | None = None,
    team: Team = ALONE,
    keep_going: bool = False,
) -> list[dict[str, Any]]:
    """Do every job that the folder's results do not hold yet, and return all results.

    Args:
        jobs: the jobs of one folder.
        output: the folder, opened by `open_folder`.
        console: shows the progress.
        workers: number of processes that share the jobs; None: one per core for the bundled model, otherwise one.
        team: as in `run_grid`.
        keep_going: write a run that fails to failures.jsonl and continue with the others.
    """
    finished = team.agree({result["run"] for result in results_of(output)})
    remaining = [job for job in jobs if job.run.name not in finished]
    if not remaining:
        return results_of(output)
    shown: Any = GridProgress(remaining, len(jobs) - len(remaining), console) if team.leads else nullcontext(_Silent())
    with shown as progress, closing(work_off(remaining, progress, workers, team)) as done:
        has_shown_profile = False
        for job, result in done:
            if isinstance(result, Exception) and not keep_going and not is_full(result):
                raise RuntimeError(f"run {job.run.name} failed: {words_of(result)}") from result
            if not team.leads:
                continue
            record(job, result, output)
            if isinstance(result, Exception):
                progress.fail(job, words_of(result))
                continue
            progress.finish(job, result)
            profile = job.folder / PROFILE
            if job.config.profile and profile.exists() and not has_shown_profile:
                has_shown_profile = True
                console.print(profile.read_text(), highlight=False, soft_wrap=True)
    team.wait()
    return results_of(output)


def record(job: Job, result: Any, output: Path) -> None:
    """Append the result of a job to the results, or the exception that it ended with to the failures.

    Raises:
        OSError: the disk is full; the exception `result` is raised itself where it tells so.
    """
    if not isinstance(result, Exception):
        append_json_line(output / RESULTS, result)
        job.end()
    elif is_full(result):
        raise result
    else:
        append_json_line(output / FAILURES, {"run": job.run.name, "error": words_of(result)})


class _Silent:
    """Shows no progress, in processes that do not lead."""

    def step(self, job: Job, done: int, loss: float) -> None:
        pass
