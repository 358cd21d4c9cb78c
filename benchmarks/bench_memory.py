"""How much memory does a training step take, against other ways to do it?

On a GPU the peak of a step beyond what was there before it; on a CPU the activations that the backward pass keeps
alive, counted with saved-tensor hooks. Every baseline's loss and gradients are checked first.
"""

from __future__ import annotations

import contextlib
import gc
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import baselines
from benchmarks.baselines import Trainee
from benchmarks.bench_step import (
    BASELINES,
    ON_GPU,
    OURS,
    Batch,
    Case,
    check,
    compared,
    loss_of,
    make_batch,
    make_ours,
    make_plain,
    make_step,
    make_trainee,
    remark,
    true_results,
    without_dropout,
)
from benchmarks.comparison import measures
from benchmarks.results import Row

RECOMPUTE = 'ours, recompute="mlp"'
SIZE = (256 if ON_GPU else 8,)
MODEL = "ViT-B-16" if ON_GPU else "ViT-B-32"


def targets(name: str) -> str | None:
    """Those of targets.toml are for a GPU."""
    return name if ON_GPU else None


CASES = [
    Case(
        f"{MODEL}-quickgelu",
        *SIZE,
        {RECOMPUTE: None, "PEFT eager": targets("memory/PEFT"), "dense P_perp": None, "frozen model": None},
    ),
    Case(
        f"{MODEL}-quickgelu",
        *SIZE,
        {RECOMPUTE: None, "CLIP-LoRA's layer": targets("memory/CLIP-LoRA"), "CLIP-LoRA's own code": None},
        lora_dropout=0.25,
    ),
]
if ON_GPU:
    CASES.append(Case(MODEL, *SIZE, {RECOMPUTE: None, "PEFT eager": "memory/PEFT, GELU"}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_of_a_step(comparison, checkouts, case):
    if comparison.known(str(case), [OURS, *compared(case, checkouts)]):
        return
    plain = make_plain(case.model)
    ours = make_ours(plain, case.config)
    weights, batch = baselines.adapters(ours), make_batch(case, plain)
    truth, _ = true_results(case, plain, weights, batch)
    own = None

    def measure(name: str, trainee: Trainee) -> int:
        with without_dropout(trainee) if case.lora_dropout else contextlib.nullcontext():
            check(name, trainee, make_step(trainee, batch)(), weights, truth)
        return peak_bytes(trainee, batch) if ON_GPU else saved_bytes(trainee, batch)

    for name in (OURS, *compared(case, checkouts)):
        make = partial(make_trainee, name, case, plain, ours, weights, checkouts)
        foreign = name in BASELINES and bool(BASELINES[name].checkout)
        taken = comparison.attempt(str(case), name, lambda name=name, make=make: measure(name, make()), foreign=foreign)
        if taken is None:
            continue
        own = taken if name == OURS else own
        about = measures(case.baselines.get(name), None if own is None else taken / own)  # ours may not have fitted
        said = remark(name, case)
        comparison.record(Row(comparison.benchmark, str(case), name, said, rounds=1, peak_bytes=taken, **about))


def peak_bytes(trainee: Trainee, batch: Batch) -> int:
    """The most memory that a step takes beyond what is there before it: saved activations, and what is computed."""
    step = make_step(trainee, batch)
    step()
    torch.cuda.synchronize()
    gc.collect()  # cycles of baselines before, which would be given back in the middle of the step
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(trainee: Trainee, batch: Batch) -> int:
    """What the graph of a step keeps beside the model and the batch, each storage once."""
    kept: dict[int, int] = {}
    given = [*trainee.model.parameters(), *trainee.model.buffers(), *batch]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(trainee.model, *batch)
    assert loss.requires_grad
    return sum(kept.values())
