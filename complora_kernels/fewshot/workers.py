"""Runs the jobs of a grid: in this process, in all processes of a team together, or in several worker processes."""

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

from complora_kernels.fewshot.config import BUNDLED
from complora_kernels.fewshot.jobs import Job, Outcome, result_of, sendable
from complora_kernels.fewshot.setting import Settings
from complora_kernels.fewshot.team import Team


def work_off(jobs: Sequence[Job], progress: Any, workers: int | None, team: Team) -> Generator[Outcome, None, None]:
    """Run the jobs, at least one, and yield the outcome of each as it ends.

    Args:
        jobs: the jobs in the order in which they begin.
        progress: shows every step, and workers that were killed.
        workers: number of processes that share the jobs; None: one per core for a bundled model, otherwise one.
        team: processes that run each job together, each of which calls this; `workers` is ignored then.
    """
    bundled = all(job.config.model in BUNDLED for job in jobs)
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
    """Run the jobs in several processes.

    A job whose process is killed, mostly for lack of memory, continues from its checkpoint after all others, alone; if
    that process is killed too, the job has failed.
    """
    killed: list[Job] = []
    for job, result in _in_pool(jobs, progress, workers):
        if isinstance(result, BrokenProcessPool):
            progress.say(f"{job.run.name}: its process was killed; it goes on after the others, alone")
            killed.append(job)
        else:
            yield job, result
    for job in killed:
        for _, result in _in_pool([job], progress, 1):
            is_lost = isinstance(result, BrokenProcessPool)
            yield job, RuntimeError("the process was killed, alone too; is memory short?") if is_lost else result


def _in_pool(jobs: Sequence[Job], progress: Any, workers: int) -> Iterator[Outcome]:
    """Run the jobs. The outcome of a job whose process is killed is a BrokenProcessPool; a new process replaces it."""
    # Spawned, not forked: a forked process would inherit torch's thread pools in an unknown state.
    context = multiprocessing.get_context("spawn")
    stop = context.Value("b", 0, lock=False)  # without a lock, which a process that is killed would keep
    pool = [_Process(number, context, stop) for number in range(workers)]
    waiting, free = deque(jobs), deque(pool)
    running: dict[Future[Any], tuple[Job, _Process]] = {}
    try:
        while waiting or running:
            with _interrupts_held_back():
                while waiting and free:
                    job, process = waiting.popleft(), free.popleft()
                    running[process.submit(job)] = job, process
            done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for job, process in running.values():
                for step, loss in process.steps_of(job):
                    progress.step(job, step, loss)
            for future in done:
                job, process = running.pop(future)
                free.append(process)
                error = future.exception()
                if error is not None and not isinstance(error, BrokenProcessPool):
                    raise RuntimeError(f"run {job.run.name} failed: {error}") from error
                yield job, error or future.result()
    finally:
        stop.value = 1
        for process in pool:
            process.end()


class _Process:
    """The parent's side of a worker process: the only process of a pool, which tells when it dies."""

    def __init__(self, number: int, context: Any, stop: Any):
        self._number, self._context, self._stop = number, context, stop
        self._start()

    def _start(self) -> None:
        self._steps = (
            self._context.Queue()
        )  # each process has its own queue, because one that is killed may leave it locked
        arguments = (self._number, self._steps, self._stop)
        self._executor = ProcessPoolExecutor(1, self._context, _start_worker, arguments)

    def submit(self, job: Job) -> Future[Any]:
        """Start a job, in a new process where the last one was killed."""
        try:
            return self._executor.submit(run_in_worker, job)
        except BrokenProcessPool:
            self._start()
            return self._executor.submit(run_in_worker, job)

    def steps_of(self, job: Job) -> Iterator[tuple[int, float]]:
        """The steps of a job that have been done since the last call, with their losses."""
        while True:
            try:
                name, step, loss = self._steps.get_nowait()
            except queue.Empty:
                return
            if name == job.run.name:  # the last steps of a run may arrive after its result
                yield step, loss

    def end(self) -> None:
        """Wait until the process has ended."""
        self._executor.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Delay Ctrl-C. Processes started meanwhile never receive it: their parent tells them to stop."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """The state of a worker process between its runs."""

    number: int  # the worker's number, from 0
    settings: Settings  # loaded by the first run, so that errors are errors of that run
    steps: Any  # a multiprocessing queue of (name of the run, steps done, loss)
    stop: Any  # shared memory: 1 tells the run to end


def _start_worker(number: int, steps: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    steps.cancel_join_thread()  # a worker that ends does not wait for its progress to be read
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.number, _Worker.settings, _Worker.steps, _Worker.stop = number, Settings(), steps, stop


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Stopped(BaseException):
    """The parent process asked a run to stop; this is no outcome of the run."""


def run_in_worker(job: Job) -> Any:
    """Run a job in a worker process, and return its outcome."""

    def on_step(done: int, loss: float) -> None:
        if _Worker.stop.value:
            raise Stopped
        _Worker.steps.put((job.run.name, done, loss))

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = device_of(_Worker.number, job.config.device, gpus)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # otherwise calls without a device would use the first GPU
    return sendable(result_of(job, _Worker.settings, on_step, device=device))


def device_of(worker: int, asked: str, gpus: int) -> str:
    """The device of a worker for "auto", "cpu", "cuda" or "cuda:N": workers take the GPUs in turns."""
    return f"cuda:{worker % gpus}" if gpus and asked in ("auto", "cuda") else asked
