"""What every test starts from: fixed seeds, no decomposition known, and memory that reads as NaN until written to."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from triton_device import HOW

from complora_kernels import subspace
from complora_kernels.integrations import open_clip

# Read when cuBLAS is first used: with it, products on a GPU are allowed in torch's deterministic mode.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# No file is there: the shipped plans run, not those that somebody measured on this machine.
os.environ["COMPLORA_PLANS"] = str(Path(__file__).with_name("plans.json"))
# No basis is kept on the disk of this machine, and none is read.
os.environ["COMPLORA_CACHE"] = "0"
# The tests' tensors are small: a second thread costs more than it brings, many times more on a busy machine.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    capability = torch.backends.cpu.get_cpu_capability()
    return f"Triton kernels: {HOW}; torch on the CPU: {capability}, threads: {torch.get_num_threads()}"


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer, as torch's deterministic mode fills it: a gap shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def empty_cache() -> None:
    subspace.clear_cache()


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else could run here."""
    monkeypatch.setenv("COMPLORA_BACKEND", "torch")


@pytest.fixture(autouse=True)
def stand_in_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for open_clip 4 counts as open_clip's."""
    monkeypatch.setattr(open_clip, "PACKAGES", (*open_clip.PACKAGES, "stand_in"))


@pytest.fixture
def trained(monkeypatch):
    """Runs of the few-shot program in this process on the stand-in; the list tells which runs were trained."""
    import fewshot_standin as standin

    from complora_kernels.fewshot import checks, jobs
    from complora_kernels.fewshot.recipe import train

    names = []

    def counted(config, run, *rest):
        names.append(run.name)
        return train(config, run, *rest)

    monkeypatch.setattr(jobs.Settings, "load", lambda settings, config, device: standin.setting())
    monkeypatch.setattr(checks, "load", lambda config, name: standin.setting().new.dataset)
    monkeypatch.setattr(jobs, "train", counted)
    return names
