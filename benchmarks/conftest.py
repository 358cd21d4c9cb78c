"""Collects the comparisons of a run, prints them as one table and writes them to `--results FILE`."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import cpuinfo
import pytest
import torch

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results", type=Path, help="write the comparisons and the machine they were made on to this JSON file"
    )
    parser.addoption("--rounds", type=int, default=20, help="paired repeats of every comparison")
    parser.addoption("--threads", type=int, default=2, help="CPU threads of torch")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    options = request.config.option
    torch.set_num_threads(options.threads)
    return options.rounds


@pytest.fixture
def record(request: pytest.FixtureRequest):
    """Adds one row to the table: what was compared, the shape, the times and the ratio with its spread."""
    return request.config.stash[ROWS].append


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    machine = describe_machine()
    terminalreporter.section("time over ours, paired rounds")
    terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in machine.items()))
    for row in rows:
        terminalreporter.write_line(
            f"{row['shape']:<24} {row['rival']:<34} {1e3 * row['median_s']:8.2f} ms   "
            f"{row['ratio']:5.2f}x  [{row['ratio_p20']:.2f}, {row['ratio_p80']:.2f}]   {row['remark']}"
        )
    path = config.option.results
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def describe_machine() -> dict[str, object]:
    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "complora-kernels")}
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.processor()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
    }
