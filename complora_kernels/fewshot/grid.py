"""Grids of runs: worked off by several processes, or by all together, and resumable after any kill."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import queue
import re
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import closing, contextmanager, nullcontext
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from complora_kernels.fewshot import config as options
from complora_kernels.fewshot import datasets
from complora_kernels.fewshot.backbone import check_backbone
from complora_kernels.fewshot.config import GLYPHS, Run, TrainConfig
from complora_kernels.fewshot.files import append_json_line, check_writable, read_json_lines, write_atomically
from complora_kernels.fewshot.logs import check_loggers
from complora_kernels.fewshot.profile import PROFILE
from complora_kernels.fewshot.progress import GridProgress
from complora_kernels.fewshot.recipe import CHECKPOINT, train
from complora_kernels.fewshot.setting import Settings, load
from complora_kernels.fewshot.team import ALONE, Team

RESULTS = "results.jsonl"
FAILURES = "failures.jsonl"
DESCRIPTION = "config.json"


class Job(NamedTuple):
    """One run and the options it is done with."""

    config: TrainConfig
    run: Run

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return 0 if self.run.learning_rate is None else self.config.steps_for(self.run.shots)

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.config.output / "runs" / self.run.name

    def end(self) -> None:
        """Remove what an unfinished run needs, once its result is safe."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)


def prepare(config: TrainConfig) -> None:
    """Find everything that would stop the grid, and open its folder, before anything is computed.

    Raises:
        ValueError: an option cannot work, or the folder holds the results of other options.
        FileNotFoundError: `pretrained` is neither a file nor a tag; a data set is not there.
        OSError: the folder cannot be written to.
    """
    check(config)
    open_folder(config.output, options.to_json(config))


def check(config: TrainConfig) -> None:
    """Raise for options that cannot work: `prepare` without its folder."""
    check_options(config)
    check_data(config)


def check_options(config: TrainConfig) -> None:
    """`check` without the data."""
    options.check(config)
    check_backbone(config.model, config.pretrained, config.activation)
    check_device(config.device)
    if config.graph == "on" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise ValueError(f"--graph on: expected auto or off on a CPU (--device {config.device})")
    check_loggers(config)


def check_device(device: str) -> None:
    """Raise a ValueError for a device that is none, or not there."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device {device}: expected cpu, cuda or auto")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: expected cpu, because torch finds no CUDA device")


def check_data(config: TrainConfig) -> None:
    """Find out whether the data sets are there, or fetch them, and draw what every run will draw."""
    for name in config.kept():
        if config.download:
            load(config, name)
        else:
            datasets.check_dataset(name, config.data_root)
    learned = load(config, config.data)
    if config.protocol == "base-to-new":
        learned, _ = datasets.base_and_new(learned)
    is_file = config.draw.endswith((".json", ".pkl"))
    if is_file and len(config.seeds) > 1 and "{seed}" not in config.draw:
        raise ValueError(f"--draw {config.draw}: one draw for the seeds {config.seeds}, expected {{seed}} in the path")
    for seed in config.seeds:
        for shots in config.shots:
            datasets.draw(learned, shots, seed, config.draw)


def open_folder(folder: Path, described: dict[str, Any]) -> None:
    """Make the folder of a grid, and note what it is of; refuse one that holds something else."""
    description = folder / DESCRIPTION
    if description.exists() and is_begun(folder):
        check_same(json.loads(description.read_text()), described, folder)
    check_writable(folder)
    write_atomically(description, json.dumps(described, indent=2) + "\n")


def is_begun(folder: Path) -> bool:
    """Whether a folder holds results, or checkpoints from which runs would go on."""
    return (folder / RESULTS).exists() or any(folder.glob(f"runs/*/{CHECKPOINT}"))


def check_same(found: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    """Raise a ValueError with the options of a folder that are asked for with other values now."""
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

    A KeyboardInterrupt stops the workers and is raised again; the next call goes on from the last checkpoints.

    Args:
        config: the grid.
        console: where progress is shown.
        team: processes that train each run together, each of which calls this.
    """
    if team.leads:
        prepare(config)
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
        jobs: of one folder.
        output: the folder, which is open.
        console: where progress is shown.
        workers: processes that share the jobs; None: one per core for the bundled model, otherwise one.
        team: as in `run_grid`.
        keep_going: a run that fails is noted in failures.jsonl and does not stop the others.
    """
    results_file = output / RESULTS
    finished = team.agree({result["run"] for result in read_json_lines(results_file)})
    remaining = [job for job in jobs if job.run.name not in finished]
    if not remaining:
        return read_json_lines(results_file)
    shown: Any = GridProgress(remaining, len(jobs) - len(remaining), console) if team.leads else nullcontext(_Silent())
    with shown as progress, closing(_work_off(remaining, progress, workers, team)) as done:
        for number, (job, result) in enumerate(done):
            if isinstance(result, Exception) and not keep_going:
                raise result
            if not team.leads:
                continue
            if isinstance(result, Exception):
                if _is_full(result):
                    raise result
                append_json_line(output / FAILURES, {"run": job.run.name, "error": _words(result)})
                progress.fail(job, _words(result))
                continue
            append_json_line(results_file, result)
            job.end()
            progress.finish(job, result)
            if job.config.profile and number == 0:
                console.print((job.folder / PROFILE).read_text(), highlight=False, soft_wrap=True)
    team.wait()
    return read_json_lines(results_file)


def run_alone(job: Job) -> dict[str, Any] | RuntimeError:
    """The result of one job in a process of its own, or the error that it ended with."""
    torch.set_num_threads(_threads(job.config) or torch.get_num_threads())
    return _sendable(job, _outcome(job, Settings(), lambda done, loss: None))


class _Silent:
    """The progress of processes that do not lead."""

    def step(self, job: Job, done: int, loss: float) -> None:
        pass


def _is_full(error: Exception) -> bool:
    """Whether there is no room for the results of other runs either."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


Outcome = tuple[Job, Any]  # a result, or the exception that the run ended with


def _work_off(jobs: list[Job], progress: Any, workers: int | None, team: Team) -> Generator[Outcome, None, None]:
    config = jobs[0].config
    bundled = config.model == GLYPHS
    workers = min(workers or (_cores() if bundled and team.size == 1 else 1), len(jobs))
    if team.size > 1 and workers > 1:
        raise ValueError(f"--workers {workers}: expected 1 under torchrun, whose processes share each run")
    threads = _threads(config)
    if workers > 1:
        yield from _in_processes(jobs, progress, workers, threads)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    settings = Settings()
    try:
        for job in jobs:
            on_step = lambda done, loss, job=job: progress.step(job, done, loss)
            yield job, _outcome(job, settings, on_step, team)
    finally:
        torch.set_num_threads(before)


def _outcome(job: Job, settings: Settings, on_step: Any, team: Team = ALONE) -> Any:
    config = job.config
    try:
        setting = settings.load(config, team.device(config.device))
        return train(config, job.run, setting, job.folder, on_step, team)
    except (ValueError, ArithmeticError) as error:  # in a team all processes meet these alike
        return error.with_traceback(None)  # whose frames would keep the model
    except (OSError, RuntimeError) as error:
        if team.size > 1:
            raise  # the others wait for this one: all have to end
        return error.with_traceback(None)


def _threads(config: TrainConfig) -> int | None:
    """Of a process that trains; None: torch's own number."""
    return config.threads or (1 if config.model == GLYPHS else None)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(jobs: list[Job], progress: Any, workers: int, threads: int | None) -> Iterator[Outcome]:
    # Spawned, not forked: a forked process would inherit torch's thread pools in an unknown state.
    context = multiprocessing.get_context("spawn")
    steps, stop = context.Queue(), context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (threads, steps, stop)) as executor:
        try:
            with _interrupts_held_back():
                job_of = {executor.submit(_run_in_worker, job, number): job for number, job in enumerate(jobs)}
            pending = set(job_of)
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for number, step, loss in _drain(steps):
                    progress.step(jobs[number], step, loss)
                for future in done:
                    job, error = job_of[future], future.exception()
                    if error:
                        raise RuntimeError(f"run {job.run.name} failed: {error}") from error
                    yield job, future.result()
        finally:
            stop.set()
            executor.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Deliver Ctrl-C afterwards. Processes started here never see it: their parent tells them to stop."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _drain(steps: Any) -> Iterator[tuple[int, int, float]]:
    while True:
        try:
            yield steps.get_nowait()
        except queue.Empty:
            return


class _Worker:
    """What a worker process keeps between its runs."""

    settings: Settings  # loaded with the first run, whose error it then is
    steps: Any  # a multiprocessing queue of (number of the job, steps done, loss)
    stop: Event


def _start_worker(threads: int | None, steps: Any, stop: Event) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    steps.cancel_join_thread()  # a worker that ends does not wait for its progress to be read
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads or torch.get_num_threads())
    _Worker.settings, _Worker.steps, _Worker.stop = Settings(), steps, stop


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Stopped(Exception):
    """The parent process asked a run to stop."""


def _run_in_worker(job: Job, number: int) -> Any:
    def on_step(done: int, loss: float) -> None:
        if _Worker.stop.is_set():
            raise Stopped
        _Worker.steps.put((number, done, loss))

    return _sendable(job, _outcome(job, _Worker.settings, on_step))


def _sendable(job: Job, outcome: Any) -> Any:
    """An exception as one that can be sent to another process, which not every one can."""
    if isinstance(outcome, Exception):
        words = f"run {job.run.name} failed: {_words(outcome)}"
        return OSError(errno.ENOSPC, words) if _is_full(outcome) else RuntimeError(words)
    return outcome
