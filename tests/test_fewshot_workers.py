import os
import signal
from pathlib import Path

import fewshot_standin as standin

from complora_kernels.fewshot import workers
from complora_kernels.fewshot.jobs import Job


class Said:
    def __init__(self):
        self.lines = []

    def step(self, job, done, loss):
        raise AssertionError("no job of these tests takes a step")

    def say(self, text):
        self.lines.append(text)


def die_if_told(job: Job) -> str:
    """In a process of the pool: `lora` always dies, `output` at its first try."""
    told = Path(job.config.output) / job.run.method
    if told.exists():
        if job.run.method == "output":
            told.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return f"result of {job.run.method}"


def test_a_killed_process_ends_its_own_run_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "run_in_worker", die_if_told)
    config = standin.config(tmp_path, methods=("lora", "output", "both"))
    for name in ("lora", "output"):
        (tmp_path / name).touch()
    progress = Said()
    found = list(workers.in_processes([Job(config, run) for run in config.runs()], progress, 2))
    outcomes = {job.run.method: outcome for job, outcome in found}
    assert len(found) == len(outcomes) == 3
    assert outcomes["output"] == "result of output"
    assert outcomes["both"] == "result of both"
    assert "run lora-2shot-lr0.01-seed0 failed: its process was killed" in str(outcomes["lora"])
    assert any("lora-2shot-lr0.01-seed0, which was under way, goes on alone" in line for line in progress.lines)
