import dataclasses
import os
import signal
import time
from pathlib import Path

import fewshot_standin as standin
import pytest
import torch

from complora_kernels.fewshot import jobs, workers
from complora_kernels.fewshot.jobs import Job
from complora_kernels.fewshot.setting import Settings


class Said:
    def __init__(self):
        self.lines = []

    def step(self, job, done, loss):
        raise AssertionError("no job of these tests takes a step")

    def say(self, text):
        self.lines.append(text)


def die_if_told(job: Job) -> str:
    """Kill the worker process: always in `lora`, in `output` at the first try."""
    folder, method = Path(job.config.output), job.run.method
    if method == "lora" or (method == "output" and not (folder / method).exists()):
        (folder / method).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return f"result of {method}"


@pytest.mark.long
def test_a_killed_process_stops_only_its_own_run(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "run_in_worker", die_if_told)
    config = standin.config(tmp_path, methods=("lora", "output", "both", "input"))
    progress = Said()
    found = list(workers.in_processes([Job(config, run) for run in config.runs()], progress, 2))
    assert sorted(job.run.method for job, _ in found[:2]) == ["both", "input"]  # the others come last
    outcomes = {job.run.method: outcome for job, outcome in found}
    assert len(found) == len(outcomes) == 4
    assert [outcomes[method] for method in ("output", "both", "input")] == [
        f"result of {method}" for method in ("output", "both", "input")
    ]
    assert str(outcomes["lora"]).startswith("the process was killed, alone too")
    assert sorted(progress.lines) == [
        f"{name}-2shot-lr0.01-seed0: its process was killed; it goes on after the others, alone"
        for name in ("lora", "output")
    ]


@pytest.mark.parametrize(
    ("worker", "asked", "gpus", "expected"),
    [
        (0, "auto", 0, "auto"),
        (3, "auto", 2, "cuda:1"),
        (4, "cuda", 2, "cuda:0"),
        (3, "cuda:1", 4, "cuda:1"),
        (3, "cpu", 4, "cpu"),
    ],
)
def test_workers_share_the_gpus(worker, asked, gpus, expected):
    assert workers.device_of(worker, asked, gpus) == expected


def numbered(job: Job) -> int:
    """The number of a worker that has met the other one."""
    folder, number = Path(job.config.output), workers._Worker.number
    (folder / str(number)).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)
    return number


def test_each_worker_of_a_pool_has_a_number_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "run_in_worker", numbered)
    config = standin.config(tmp_path, seeds=(0, 1))
    found = workers.in_processes([Job(config, run) for run in config.runs()], Said(), 2)
    assert sorted(number for _, number in found) == [0, 1]


def test_every_run_uses_the_threads_of_its_options(tmp_path, trained, monkeypatch):
    counted = []
    monkeypatch.setattr(jobs, "train", lambda *arguments: counted.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    config = standin.config(tmp_path)
    (run,) = config.runs()
    for model, threads in (("glyphs", None), ("glyphs", 2), ("ViT-B-16", None), ("ViT-B-16", 3)):
        changed = dataclasses.replace(config, model=model, threads=threads)
        jobs.result_of(Job(changed, run), Settings(), lambda done, loss: None)
    assert counted == [1, 2, before, 3]
    assert torch.get_num_threads() == before
