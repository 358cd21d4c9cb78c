"""How long until an adapter is trained, with everything before the first step: decomposing, compiling, capturing?

On a GPU the recipe of CLIP-LoRA at one shot: 500 steps of a ViT-B/16, q k v of both towers, batch 32, 100 classes. On
a CPU 100 steps of the bundled CLIP's image tower. The learning rate is 0, for the same work in all runs; what a step
computes is checked in `bench_step.py`. Kernels that the machine has compiled before come from the caches of Triton and
torch.compile, as they do in a user's second run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from open_clip.model import CLIP

import complora_kernels as ck
from benchmarks import rivals
from benchmarks.bench_step import (
    DEVICE,
    DTYPE,
    ON_GPU,
    OURS,
    RECIPE,
    RIVALS,
    Batch,
    Case,
    cut,
    make_batch,
    make_graphed_step,
    make_ours,
    make_step,
)
from benchmarks.interleaved import wall_seconds
from complora_kernels import subspace
from complora_kernels.fewshot.glyphs import load_glyph_clip

STEPS, ROUNDS = (500, 1) if ON_GPU else (100, 3)
CASE = (
    Case(
        "ViT-B-16-quickgelu",
        32,
        {"PEFT eager": None, "PEFT eager, prompts cut": None, "CLIP-LoRA's layer": None},
        prompts=100,
        graphed=True,
        **RECIPE,
    )
    if ON_GPU
    else Case("bundled CLIP", 8, {"PEFT eager": None, "dense P_perp": None}, r=8, lora_alpha=8.0)
)
COMPILED = "torch.compile of folded factors"


def make_model() -> Any:
    """With different weights in all blocks: each has to be decomposed."""
    if ON_GPU:
        import open_clip

        torch.manual_seed(0)
        model = CLIP(**(open_clip.get_model_config(CASE.model) or {}))
    else:
        model, _, _ = load_glyph_clip()
    return model.to(DEVICE, DTYPE).requires_grad_(False)


def test_until_trained(comparison):
    plain = make_model()
    batch = make_batch(CASE, plain)
    weights = rivals.adapters(make_ours(plain, CASE.config))
    runs: dict[str, Callable[[], object]] = {OURS: partial(ours, plain, batch)}
    for name in (*CASE.rivals, *([COMPILED] if ON_GPU else [])):
        runs[name] = partial(theirs, name, plain, weights, batch)
    shape = f"{CASE}, {STEPS} steps"
    remarks = {name: f"{RIVALS[name].remark}; nothing to decompose".removeprefix("; ") for name in runs if name != OURS}
    comparison.time(shape, runs, ours=OURS, rounds=ROUNDS, remarks=remarks, warm_up=0, measure=wall_seconds)


def ours(plain: Any, batch: Batch) -> None:
    subspace.clear_cache()
    model = ck.apply_complora(copy.deepcopy(plain), CASE.config, progress=False)
    trainee = rivals.of_ours(model)
    model.train()
    step = make_graphed_step(trainee, batch) if ON_GPU else make_step(trainee, batch)
    for _ in range(STEPS):
        step()


def theirs(name: str, plain: Any, weights: dict[str, rivals.Adapter], batch: Batch) -> None:
    """Their directions are given; a PEFT user has none."""
    rival = RIVALS[name]
    assert rival.make is not None
    torch.compiler.reset()
    trainee = rival.make(plain, weights, CASE.config)
    trainee.model.train()
    step = make_step(trainee, cut(trainee.model, batch) if rival.cut else batch, compiled=rival.compiled)
    for _ in range(STEPS):
        step()
