"""The machine that a benchmark ran on: `python -m benchmarks.machine` prints it.

Clocks and limits are read, never set.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import cpuinfo
import torch

import complora_kernels

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "peft", "open_clip_torch", "transformers")
GPU_FACTS = ("driver_version", "power.limit", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
# What a row keeps of the GPU, by the names of its fields.
GPU_STATE = {"sm_clock": "clocks.sm", "power": "power.draw", "slowed": "clocks_event_reasons.active"}
# What is written while benchmarks run: not code.
WRITTEN = (":!docs/speed.md", ":!docs/overview.png", ":!benchmarks/results")


def describe() -> dict[str, Any]:
    """Names, versions, threads, the revision of the code and, of a GPU, its driver, clocks and power limit."""
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, **gpu_facts()} if on_gpu() else {}
    return {
        **gpu,
        "cpu": cpuinfo.get_cpu_info().get("brand_raw", platform.processor()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "complora_kernels": complora_kernels.__version__,
        "revision": revision(),
    }


def on_gpu() -> bool:
    return torch.cuda.is_available()


def name(machine: dict[str, Any]) -> str:
    """What targets.toml calls it."""
    return machine.get("gpu") or machine["cpu"]


def file_name(machine: dict[str, Any]) -> str:
    """Of a results file: the machine and the date."""
    word = "-".join("".join(c if c.isalnum() else " " for c in name(machine)).lower().split())
    return f"{word}-{time.strftime('%Y-%m-%d')}.json"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def revision(checkout: Path = ROOT) -> str:
    """Of a checkout, with a + where its code differs from it; `COMPLORA_REVISION` where ours is none."""
    checkout = checkout.resolve()
    git = ["git", "--git-dir", str(checkout / ".git"), "--work-tree", str(checkout)]  # not those of a folder around it
    try:
        command = [*git, "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        command = [*git, "diff", "--quiet", "HEAD", "--", ".", *WRITTEN]
        return commit + ("+" if subprocess.run(command, cwd=checkout, capture_output=True).returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMPLORA_REVISION", "unknown") if checkout == ROOT else "unknown"


def gpu_facts() -> dict[str, str]:
    return _asked(GPU_FACTS)


def gpu_state() -> dict[str, Any]:
    """What the GPU did a moment ago: fields of a row; none where there is no GPU to ask."""
    found = _asked(tuple(GPU_STATE.values()))
    return {field: found[fact] for field, fact in GPU_STATE.items() if fact in found}


def _asked(facts: tuple[str, ...]) -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(facts)}", "--format=csv,noheader", "--id=0"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return {"nvidia-smi": f"{type(error).__name__}"}
    return dict(zip(facts, map(str.strip, line.split(",")), strict=True))


def ceilings() -> dict[str, float]:
    """Operations a second of a large product and bytes a second of a large copy, in the dtype of the benchmarks."""
    device = torch.device("cuda" if on_gpu() else "cpu")
    dtype, size, elements = (torch.bfloat16, 8192, 2**32) if on_gpu() else (torch.float32, 2048, 2**30)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = median_seconds(lambda: a @ b, device)
    rates = {"operations_per_s": 2 * size**3 / seconds}
    source = torch.ones(elements, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return rates | {"bytes_per_s": 2 * elements / median_seconds(lambda: target.copy_(source), device)}


def median_seconds(run: Any, device: torch.device, repeats: int = 20) -> float:
    from complora_kernels.replays import clock

    seconds = [clock(device)(run) for _ in range(3 + repeats)]
    return statistics.median(seconds[3:])


if __name__ == "__main__":
    print(json.dumps({**describe(), **ceilings()}, indent=1))
