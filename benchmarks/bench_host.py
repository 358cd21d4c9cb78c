"""How long does the host take for an eager step, against PEFT's and the frozen model's?

`make bench` runs it: a forward and a backward pass and AdamW of an image tower of twelve blocks, so narrow that its
numbers take no time, in bfloat16 on the CPU. Times are of the processor. Ours runs by the triton backend as on a GPU,
Triton's own dispatch included, up to the launch (`benchmarks.dispatch`): the driver's part of a launch is in nobody's
time. Loss and gradients of all are checked before, ours by the torch backend: without launches there are no results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

from benchmarks import baselines, bench_step, dispatch
from benchmarks.comparison import pedantic
from benchmarks.interleaved import Step

OURS, IMAGES, CHIP = bench_step.OURS, 2, 90
BASELINES = {"PEFT eager": "host/PEFT", "frozen model": None}
WARM_UP = 5  # steps in which kernels and plans are found


@pytest.fixture
def in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dtype of a GPU, for `bench_step` on the CPU."""
    monkeypatch.setattr(bench_step, "DTYPE", torch.bfloat16)
    monkeypatch.setattr(bench_step, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(bench_step, "TOLERANCE", 1e-1)  # as there


def make_plain(layers: int = 12) -> Any:
    torch.manual_seed(0)
    image = CLIPVisionCfg(layers=layers, width=64, head_width=16, patch_size=16, image_size=32)
    text = CLIPTextCfg(context_length=16, vocab_size=100, width=64, heads=4, layers=1)
    model: Any = CLIP(64, image, text, quick_gelu=True)
    return model.to(torch.bfloat16).requires_grad_(False)


def make_steps(monkeypatch: pytest.MonkeyPatch, case: bench_step.Case, plain: Any) -> dict[str, Step]:
    """Ours and the baselines, whose results were right."""
    monkeypatch.setenv("COMPLORA_BACKEND", "torch")
    ours = bench_step.make_ours(plain, case.config)
    weights, batch = baselines.adapters(ours), bench_step.make_batch(case, plain)
    truth, _ = bench_step.true_results(case, plain, weights, batch)
    given = {"case": case, "plain": plain, "ours": ours, "weights": weights, "batch": batch, "truth": truth}
    return {name: bench_step.prepare(name, **given, checkouts={}) for name in (OURS, *BASELINES)}


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Ours by the triton backend, without compiled kernels; the names of those that are launched."""
    launched: list[str] = []
    with dispatch.kernels_uncompiled(CHIP, lambda kernel, *_: launched.append(kernel)):
        yield launched


def processor_seconds(step: Step) -> float:
    """Of this process, whatever else runs on the machine."""
    start = time.process_time()
    step()
    return time.process_time() - start


def python_calls(step: Step) -> int:
    """The calls of Python functions in a step."""
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    return calls


def test_host(benchmark, comparison, monkeypatch, in_half_precision, uncompiled):
    case = bench_step.Case("12 blocks of width 64", IMAGES, dict(BASELINES))
    if comparison.known(str(case), [OURS, *BASELINES]):
        return
    torch.set_num_threads(1)
    steps = make_steps(monkeypatch, case, make_plain())
    assert not uncompiled
    monkeypatch.setenv("COMPLORA_BACKEND", "triton")
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    uncompiled.clear()
    calls = {name: f"{python_calls(step)} calls of Python functions" for name, step in steps.items()}
    calls[OURS] += f", {len(uncompiled)} launches of Triton kernels"
    comparison.time(str(case), steps, ours=OURS, targets=BASELINES, remarks=calls, warm_up=1, measure=processor_seconds)
    pedantic(benchmark, steps[OURS])
