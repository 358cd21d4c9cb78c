"""Gives each benchmark its `comparison`, and prints all rows of a run as one table."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import machine, report, results
from benchmarks.comparison import Comparison
from benchmarks.results import Results, Row

COMPARISONS = pytest.StashKey[list[Comparison]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        help="keep what is measured in this JSON file, or in a file of this folder with the machine and the date",
    )
    parser.addoption("--clip-lora", type=Path, help="a checkout of CLIP-LoRA, whose layer is then a baseline of ours")
    parser.addoption("--lorafusion", type=Path, help="a checkout of LoRAFusion: a baseline on a GPU")
    parser.addoption("--go-on", action="store_true", help="leave what --results has of this revision as it is")
    parser.addoption("--extra", action="store_true", help="on a GPU, baselines too that no target asks for")
    parser.addoption(
        "--compiled",
        choices=("all", "without", "only"),
        default="all",
        help="leave out the baselines that torch.compile takes minutes for, or compare with them alone (all)",
    )
    parser.addoption("--rounds", type=int, default=20, help="paired repeats of every comparison")
    parser.addoption("--threads", type=int, default=2, help="CPU threads of torch")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[COMPARISONS] = []


@pytest.fixture
def checkouts(request: pytest.FixtureRequest) -> dict[str, Path | None]:
    """Where the code of baselines lies that no index has."""
    options = request.config.option
    return {"--clip-lora": options.clip_lora, "--lorafusion": options.lorafusion}


@pytest.fixture
def extra(request: pytest.FixtureRequest) -> bool:
    return request.config.option.extra


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> str:
    """Which of the compiled baselines are compared: "all", "without" them, or them "only"."""
    return request.config.option.compiled


@pytest.fixture
def comparison(request: pytest.FixtureRequest, checkouts: dict[str, Path | None]) -> Iterator[Comparison]:
    """Where a benchmark records what it measures; what failed of ours fails it once all is measured."""
    options, made = request.config.option, request.config.stash[COMPARISONS]
    torch.set_num_threads(options.threads)
    described = made[0].found.machine if made else described_with(checkouts)
    found, path = Results(described, []), options.results
    if path is not None:
        path = path if path.suffix == ".json" else path / machine.file_name(described)
        found = Results(described, results.read(path).rows if path.exists() else [])
    device = torch.device("cuda" if machine.on_gpu() else "cpu")
    benchmark = request.path.stem.removeprefix("bench_")
    made.append(Comparison(benchmark, options.rounds, device, found, path, options.go_on))
    yield made[-1]
    if made[-1].failed:
        pytest.fail("\n".join(made[-1].failed), pytrace=False)


def described_with(checkouts: dict[str, Path | None]) -> dict[str, Any]:
    """The machine, its ceilings, and the commits of what was given."""
    commits = {option.lstrip("-"): machine.revision(path) for option, path in checkouts.items() if path is not None}
    return {**machine.describe(), **commits, **machine.ceilings()}


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    comparisons = config.stash[COMPARISONS]
    if not comparisons:
        return
    described = comparisons[0].found.machine
    terminalreporter.section("time over ours, paired rounds")
    terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in described.items()))
    rows = {(row.benchmark, row.shape, row.baseline): row for each in comparisons for row in each.found.rows}
    for row in rows.values():
        terminalreporter.write_line(line(row))
    path = comparisons[0].path
    if path is not None:
        terminalreporter.write_line(f"kept in {path}")


def line(row: Row) -> str:
    words = f"{row.shape:<60} {row.baseline:<34} "
    if row.median_s is not None:
        words += f"{1e3 * row.median_s:9.2f} ms  {report.ratio(row):<19} "
    if row.cold_s is not None:
        words += f"warm L2; cold {1e3 * row.cold_s:.2f} ms  {report.cold_ratio(row)}  "
    if row.roofline is not None:
        words += f"{row.roofline:4.0%} of the roofline  "
    if row.peak_bytes is not None:
        words += f"peak {row.peak_bytes / 2**20:.0f} MiB  "
    if row.share is not None:
        words += f"{row.share:.2f} of the update  "
    return words + row.remark
