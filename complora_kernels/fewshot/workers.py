"""Who works a grid off: this process, those of a team together, or several that share the jobs."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from complora_kernels.fewshot.config import GLYPHS
from complora_kernels.fewshot.jobs import Job, Outcome, result_of, sendable
from complora_kernels.fewshot.setting import Settings
from complora_kernels.fewshot.team import Team


def work_off(jobs: Sequence[Job], progress: Any, workers: int | None, team: Team) -> Generator[Outcome, None, None]:
    """Do the jobs, at least one, and yield what comes out of each as it ends.

    Args:
        jobs: in the order in which they are begun.
        progress: told of every step, and of workers that were killed.
        workers: processes that share the jobs; None: one per core for the bundled model, otherwise one.
        team: processes that do each job together, each of which calls this; then `workers` is no matter.
    """
    bundled = all(job.config.model == GLYPHS for job in jobs)
    workers = min(workers or (_cores() if bundled else 1), len(jobs))
    if workers > 1 and team.size == 1:
        yield from in_processes(jobs, progress, workers)
        return
    settings = Settings()
    for job in jobs:
        on_step = lambda done, loss, job=job: progress.step(job, done, loss)
        yield job, result_of(job, settings, on_step, team)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(jobs: Sequence[Job], progress: Any, workers: int) -> Iterator[Outcome]:
    """Do the jobs in several processes.

    Where one of these is killed, for want of memory mostly, the jobs that were under way go on from their checkpoints,
    each alone; one whose process is killed again has failed.
    """
    waiting = deque(jobs)
    while waiting:
        under_way = yield from _in_pool(waiting, progress, workers)
        if under_way:
            names = ", ".join(job.run.name for job in under_way)
            progress.say(f"a process was killed; what was under way goes on, each run alone: {names}")
        for job in under_way:
            if (yield from _in_pool(deque([job]), progress, 1)):
                yield job, RuntimeError("the process was killed, alone too; is memory short?")


def _in_pool(jobs: deque[Job], progress: Any, workers: int) -> Generator[Outcome, None, list[Job]]:
    """Take jobs until there are none, or until a process is killed: return those that were under way then."""
    # Spawned, not forked: a forked process would inherit torch's thread pools in an unknown state.
    context = multiprocessing.get_context("spawn")
    # What the workers read at every step has no lock: one that is killed would keep it.
    steps, stop, begun = context.Queue(), context.Value("b", 0, lock=False), context.Value("i", 0)
    running: dict[Future[Any], Job] = {}  # no more than there are processes: the others are not under way
    with ProcessPoolExecutor(workers, context, _start_worker, (steps, stop, begun)) as executor:
        try:
            while jobs or running:
                with _interrupts_held_back():
                    while jobs and len(running) < workers:
                        future = executor.submit(run_in_worker, jobs[0])
                        running[future] = jobs.popleft()
                done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                job_of = {job.run.name: job for job in running.values()}
                for name, step, loss in _drain(steps):
                    if name in job_of:  # a run's last words may come after its result
                        progress.step(job_of[name], step, loss)
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    job = running[future]
                    try:
                        result = future.result()
                    except BrokenProcessPool:
                        raise
                    except Exception as error:
                        raise RuntimeError(f"run {job.run.name} failed: {error}") from error
                    yield job, result
                    del running[future]
        except BrokenProcessPool:
            pass
        finally:
            stop.value = 1
            executor.shutdown(cancel_futures=True)
    return list(running.values())


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


def _drain(steps: Any) -> Iterator[tuple[str, int, float]]:
    while True:
        try:
            yield steps.get_nowait()
        except queue.Empty:
            return


class _Worker:
    """What a worker process keeps between its runs."""

    settings: Settings  # loaded with the first run, whose error it then is
    steps: Any  # a multiprocessing queue of (name of the run, steps done, loss)
    stop: Any  # shared: 1 where the parent wants the run to end
    number: int  # among those of the pool, from 0 on


def _start_worker(steps: Any, stop: Any, begun: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    steps.cancel_join_thread()  # a worker that ends does not wait for its progress to be read
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.settings, _Worker.steps, _Worker.stop = Settings(), steps, stop
    with begun.get_lock():
        _Worker.number = begun.value
        begun.value += 1


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Stopped(Exception):
    """The parent process asked a run to stop."""


def run_in_worker(job: Job) -> Any:
    """What comes out of a job, in a process of the pool."""

    def on_step(done: int, loss: float) -> None:
        if _Worker.stop.value:
            raise Stopped
        _Worker.steps.put((job.run.name, done, loss))

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = device_of(_Worker.number, job.config.device, gpus)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # what is not told where to go would go to the first one
    return sendable(result_of(job, _Worker.settings, on_step, device=device))


def device_of(worker: int, asked: str, gpus: int) -> str:
    """The device of a worker where "auto", "cpu", "cuda" or "cuda:N" is asked for: workers take the GPUs in turns."""
    return f"cuda:{worker % gpus}" if gpus and asked in ("auto", "cuda") else asked
