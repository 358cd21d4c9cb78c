"""The grid of methods, shots, learning rates and seeds: worked off by several processes, resumable after any kill."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import re
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import closing, contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from complora_kernels.fewshot import config as options
from complora_kernels.fewshot import datasets
from complora_kernels.fewshot.backbone import check_backbone
from complora_kernels.fewshot.config import GLYPHS, Run, TrainConfig
from complora_kernels.fewshot.files import append_json_line, check_writable, read_json_lines, write_atomically
from complora_kernels.fewshot.profile import PROFILE
from complora_kernels.fewshot.progress import GridProgress
from complora_kernels.fewshot.recipe import CHECKPOINT, Setting, load_setting, train
from complora_kernels.fewshot.sampler import draw_shots


def prepare(config: TrainConfig) -> None:
    """Find everything that would stop the grid, and open its folder, before anything is computed.

    Raises:
        ValueError: an option cannot work, or the folder holds the results of other options.
        FileNotFoundError: `pretrained` is neither a file nor a tag.
        OSError: the folder cannot be written to.
    """
    options.check(config)
    check_backbone(config.model, config.pretrained, config.activation)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.device):
        raise ValueError(f"--device {config.device}: expected cpu, cuda or auto")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {config.device}: expected cpu, because torch finds no CUDA device")
    if config.graph == "on" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise ValueError(f"--graph on: expected auto or off on a CPU (--device {config.device})")
    draw_shots(datasets.digits().labels, max(config.shots), seed=0)
    described = config.output / "config.json"
    begun = (config.output / "results.jsonl").exists() or any(config.output.glob(f"runs/*/{CHECKPOINT}"))
    if described.exists() and begun:
        _check_same(json.loads(described.read_text()), options.to_json(config), config.output)
    check_writable(config.output)
    write_atomically(described, json.dumps(options.to_json(config), indent=2) + "\n")


def _check_same(found: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
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


def run_grid(config: TrainConfig, console: Console) -> list[dict[str, Any]]:
    """Do every run of the grid that results.jsonl does not hold yet, and return all results.

    A KeyboardInterrupt stops the workers and is raised again; the next call goes on from the last checkpoints.
    """
    prepare(config)
    results_file = config.output / "results.jsonl"
    finished = {result["run"] for result in read_json_lines(results_file)}
    remaining = [run for run in config.runs() if run.name not in finished]
    if remaining:
        with (
            GridProgress(config, remaining, len(finished), console) as progress,
            closing(_work_off(config, remaining, progress)) as done,
        ):
            for run, result in done:
                append_json_line(results_file, result)
                (_folder(config, run) / CHECKPOINT).unlink(missing_ok=True)
                progress.finish(run, result)
                if config.profile and progress.finished == len(finished) + 1:
                    console.print((_folder(config, run) / PROFILE).read_text(), highlight=False, soft_wrap=True)
    return read_json_lines(results_file)


def _folder(config: TrainConfig, run: Run) -> Path:
    return config.output / "runs" / run.name


def _work_off(config: TrainConfig, runs: list[Run], progress: GridProgress) -> Generator[tuple[Run, dict[str, Any]]]:
    bundled = config.model == GLYPHS
    threads = config.threads or (1 if bundled else None)
    workers = min(config.workers or (_cores() if bundled else 1), len(runs))
    if workers > 1:
        yield from _in_processes(config, runs, progress, workers, threads)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        setting = load_setting(config)
        for run in runs:
            on_step = lambda done, loss, run=run: progress.step(run, done, loss)
            yield run, train(config, run, setting, _folder(config, run), on_step)
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_processes(
    config: TrainConfig, runs: list[Run], progress: GridProgress, workers: int, threads: int | None
) -> Iterator[tuple[Run, dict[str, Any]]]:
    # Spawned, not forked: a forked process would inherit torch's thread pools in an unknown state.
    context = multiprocessing.get_context("spawn")
    steps, stop = context.Queue(), context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (config, threads, steps, stop)) as executor:
        try:
            with _interrupts_held_back():
                run_of = {executor.submit(_run_in_worker, run): run for run in runs}
            pending = set(run_of)
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for step in _drain(steps):
                    progress.step(*step)
                for future in done:
                    if error := future.exception():
                        raise RuntimeError(f"run {run_of[future].name} failed: {error}") from error
                    yield run_of[future], future.result()
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


def _drain(steps: Any) -> Iterator[tuple[Run, int, float]]:
    while True:
        try:
            yield steps.get_nowait()
        except queue.Empty:
            return


class _Worker:
    """What a worker process keeps between its runs."""

    config: TrainConfig
    setting: Setting | None = None  # loaded with the first run, whose error it then is
    steps: Any  # a multiprocessing queue of (run, steps done, loss)
    stop: Event


def _start_worker(config: TrainConfig, threads: int | None, steps: Any, stop: Event) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    steps.cancel_join_thread()  # a worker that ends does not wait for its progress to be read
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads or torch.get_num_threads())
    _Worker.config, _Worker.steps, _Worker.stop = config, steps, stop


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Stopped(Exception):
    """The parent process asked a run to stop."""


def _run_in_worker(run: Run) -> dict[str, Any]:
    def on_step(done: int, loss: float) -> None:
        if _Worker.stop.is_set():
            raise Stopped
        _Worker.steps.put((run, done, loss))

    _Worker.setting = _Worker.setting or load_setting(_Worker.config)
    return train(_Worker.config, run, _Worker.setting, _folder(_Worker.config, run), on_step)
