"""How long until an adapter is trained, with everything before the first step: decomposing, compiling, capturing?

On a GPU the recipe of CLIP-LoRA, 200 steps of a ViT-B/16, q k v of both towers, batch 32, 100 classes. A baseline has a
process of its own there, `python -m benchmarks.bench_train BASELINE`, with empty caches of compiled kernels and without
the plans that `tune` has measured: all is as on a machine that never ran it. Starting Python and making the plain model
is not counted. On a CPU, where nothing is compiled, 100 steps of the bundled CLIP's image tower, in turns. The learning
rate is 0, for the same work in all runs; what a step computes is checked in `bench_step.py`.

A GPU also runs 400 steps of `complora train`, data included, which tell how long 8,000 take.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP

import complora_kernels as ck
from benchmarks import baselines, bench_step
from benchmarks.bench_step import (
    BASELINES,
    COMPILES,
    DEVICE,
    DTYPE,
    LOSES,
    ON_GPU,
    OURS,
    RECIPE,
    Batch,
    Case,
    cut,
    make_batch,
    make_graphed_step,
    make_ours,
    make_step,
)
from benchmarks.comparison import measures
from benchmarks.results import Row
from complora_kernels import subspace
from complora_kernels.fewshot.glyphs import load_glyph_clip
from complora_kernels.replays import wall_seconds

ROOT = Path(__file__).parents[1]
STEPS, ROUNDS = (200, 1) if ON_GPU else (30, 20)
GPU_CASE = Case(
    "ViT-B-16-quickgelu",
    32,
    {"PEFT eager, prompts cut": None, "PEFT, prompts cut, one CUDA graph": None},
    extra=("PEFT eager", "CLIP-LoRA's layer", "torch.compile of folded factors"),
    prompts=100,
    graphed=True,
    **RECIPE,
)
CPU_CASE = Case("bundled CLIP", 8, {"PEFT eager": None, "dense P_perp": None}, r=8, lora_alpha=8.0)
CASE = GPU_CASE if ON_GPU else CPU_CASE
NO_MEMORY = 77  # the exit code of a run that does not fit
CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH", "COMPLORA_PLANS", "COMPLORA_CACHE")
PROGRAM, PART, ITERATIONS = "ViT-B-16-quickgelu", 400, 8000  # a part of all iterations is run


def make_model() -> Any:
    """With different weights in all blocks: each has to be decomposed."""
    if not ON_GPU:
        model, _, _ = load_glyph_clip()
        return model.requires_grad_(False)
    return random_model(CASE.model).to(DEVICE, DTYPE).requires_grad_(False)


def random_model(name: str) -> Any:
    torch.manual_seed(0)
    return CLIP(**(open_clip.get_model_config(name) or {}))


def test_until_trained(comparison, extra):
    shape = f"{CASE}, {STEPS} steps"
    names = (OURS, *CASE.baselines, *(CASE.extra if extra else ()))
    if comparison.known(shape, names):
        return
    if ON_GPU:
        each_alone(comparison, shape, names)
        return
    plain = make_model()
    runs = {name: run_of(name, plain, make_batch(CASE, plain)) for name in names}
    remarks = {name: remark(name) for name in names}
    comparison.time(shape, runs, ours=OURS, rounds=ROUNDS, remarks=remarks, warm_up=0, measure=wall_seconds)


def each_alone(comparison: Any, shape: str, names: tuple[str, ...]) -> None:
    """A row after each run: they take minutes."""
    own = None
    for name in names:
        seconds = comparison.attempt(shape, name, partial(in_fresh_process, name), foreign=name != OURS)
        if seconds is not None:
            own = seconds if name == OURS else own
            ratio = None if own is None else seconds / own  # ours may not have fitted
            row = Row(comparison.benchmark, shape, name, remark(name), rounds=1, median_s=seconds, ratio=ratio)
            comparison.record(row)


def remark(name: str) -> str:
    if name == OURS:
        return ""
    return f"{bench_step.remark(name, CASE).replace(COMPILES, LOSES)}; nothing to decompose"


def in_fresh_process(name: str) -> float:
    """The seconds of a run; Triton and Inductor read the environment once, and keep what they have compiled."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {variable: str(Path(folder, variable)) for variable in CACHES}
        command = [sys.executable, "-m", "benchmarks.bench_train", name]
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode == NO_MEMORY:
        raise torch.OutOfMemoryError(name)
    done.check_returncode()
    return float(done.stdout.split()[-1])


def main(name: str) -> None:
    try:
        plain = make_model()
        run = run_of(name, plain, make_batch(CASE, plain))
        wall_seconds(lambda: None)  # waits for what was asked of a GPU
        print(wall_seconds(run))
    except torch.OutOfMemoryError:
        sys.exit(NO_MEMORY)


def run_of(name: str, plain: Any, batch: Batch) -> Callable[[], None]:
    if name == OURS:
        return partial(ours, plain, batch)
    # Random directions are not decomposed, and take as long to leave alone.
    config = dataclasses.replace(CASE.config, subspace_source="random")
    return partial(theirs, name, plain, baselines.adapters(make_ours(plain, config)), batch)


def ours(plain: Any, batch: Batch) -> None:
    subspace.clear_cache()
    model = ck.apply_complora(copy.deepcopy(plain), CASE.config, progress=False)
    trainee = baselines.of_ours(model)
    model.train()
    step = make_graphed_step(trainee, batch) if ON_GPU else make_step(trainee, batch)
    for _ in range(STEPS):
        step()


def theirs(name: str, plain: Any, weights: dict[str, baselines.Adapter], batch: Batch) -> None:
    """Their directions are given; a PEFT user has none."""
    baseline = BASELINES[name]
    assert baseline.make is not None
    torch.compiler.reset()
    trainee = baseline.make(plain, weights, CASE.config)
    trainee.model.train()
    step = make_step(trainee, cut(trainee.model, batch) if baseline.cut else batch, compiled=baseline.compiled)
    step = baselines.graphed(step) if baseline.graphed else step
    for _ in range(STEPS):
        step()


if ON_GPU:

    def test_8000_iterations(comparison, tmp_path):
        shape = f"complora train, {PROGRAM}, batch 32: {PART} steps, times {ITERATIONS // PART}"
        if comparison.known(shape, [OURS]):
            return
        found = comparison.attempt(shape, OURS, partial(iterations, PROGRAM, PART, tmp_path))
        if found is not None:
            seconds, others = (ITERATIONS / PART * found[0], found[1])
            about = measures("step/8000 iterations", 1.0) | {"figure": seconds}
            remark = f"and once {others:.0f} s to decompose, capture and measure accuracies"
            comparison.record(
                Row(comparison.benchmark, shape, OURS, remark, rounds=1, median_s=seconds, ratio=1.0, **about)
            )


def iterations(model: str, steps: int, folder: Path, *options: str) -> tuple[float, float]:
    """The seconds of the iterations of `complora train` on random weights, and those of all else that it does."""
    importlib.import_module("complora_kernels.fewshot.running")  # names a package that is missing
    weights, output = folder / "weights.pt", folder / "run"
    torch.save(random_model(model).state_dict(), weights)
    command = [sys.executable, "-m", "complora_kernels.fewshot", "train", "--model", model, "--pretrained", weights]
    choice = ["--methods", "output", "--shots", "16", "--seeds", "0", "--steps", str(steps), "--output", output]
    subprocess.run([*command, *choice, *options], cwd=ROOT, check=True)
    (line,) = (output / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    seconds = steps * 32 / result["images_per_second"]
    return seconds, result["seconds"] - seconds


if __name__ == "__main__":
    main(sys.argv[1])
