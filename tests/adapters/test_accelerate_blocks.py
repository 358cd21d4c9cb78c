"""Residual blocks of a model of PEFT, fused by `accelerate_peft`: PEFT's own numbers, and PEFT's own calls."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import peft
import pytest
import torch
from blocks import fusing
from model_zoo import OF_TIMM, OF_TRANSFORMERS, exact, make
from peft_adapters import peft_model
from rows import Row
from small_clip import assert_close
from torch import Tensor

import complora_kernels as ck
from complora_kernels.modules.block import CompLoRABlock

# PEFT asks transformers for a name of its older versions.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")

LINEARS = "q_proj|k_proj|v_proj|out_proj|o_proj|qkv|proj|fc1|fc2|up_proj|down_proj"
IN_BLOCKS = rf".*\b(layers?|blocks)\.\d+\.(.*\.)?({LINEARS})"
FUSED = [name for name in (*OF_TRANSFORMERS, *OF_TIMM) if not name.endswith(", eager") and make(name).fused]
CLIP = "CLIPModel, sdpa"
# BEiT reads the weight of qkv without calling it: PEFT's adapter of it has no effect, and its blocks are not fused.
READS_QKV = [name for name in FUSED if "BEiT" in name or name == "timm EVA"]


def in_peft(row: Row, **options: Any) -> Any:
    options = {"r": 3, "lora_alpha": 6, "target_modules": IN_BLOCKS, **options}
    model = peft_model(copy.deepcopy(row.model), **options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def results(model: Any, row: Row) -> dict[str, Tensor]:
    """The features and every gradient of the factors."""
    model.zero_grad()
    features = row.features(model.base_model.model, row.inputs)
    oracle.weighted(features).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"features": features.detach()} | {name: grad for name, grad in gradients.items() if grad is not None}


def blocks_of(model: Any) -> int:
    return sum(isinstance(module, CompLoRABlock) for module in model.modules())


@pytest.fixture
def runs(monkeypatch) -> list[bool]:
    """Whether each block that ran since was computed by fused operations."""
    seen: list[bool] = []
    run_fused = CompLoRABlock.run_fused

    def watched(block: CompLoRABlock, *arguments: Any, **options: Any) -> Tensor | None:
        y = run_fused(block, *arguments, **options)
        seen.append(y is not None)
        return y

    monkeypatch.setattr(CompLoRABlock, "run_fused", watched)
    return seen


@pytest.mark.parametrize("name", FUSED)
def test_features_and_gradients_are_those_of_peft(name, runs):
    row = make(name)
    theirs = exact(in_peft(row, use_rslora=True))
    ours = ck.accelerate_peft(copy.deepcopy(theirs))
    assert blocks_of(ours) == row.fused
    expected, found = results(theirs, row), results(ours, row)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
    assert len(runs) >= row.fused
    assert all(run is (name not in READS_QKV) for run in runs)


def test_the_calls_of_peft(runs):
    row = make(CLIP)
    theirs, ours = in_peft(row), ck.accelerate_peft(in_peft(row))

    def check(fused: bool) -> None:
        runs.clear()
        with torch.no_grad():
            found, expected = (row.features(model.base_model.model, row.inputs) for model in (ours, theirs))
        assert_close(found, expected, 1e-9)
        assert runs == [fused] * 4

    check(True)
    for model in (theirs, ours):
        other = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "fc1"], init_lora_weights=False)
        model.add_adapter("other", other)
        model.double()
    ours.load_state_dict(theirs.state_dict())
    check(True)
    for model in (theirs, ours):
        model.set_adapter("other")
    check(False)  # the other projections have no active adapter
    for model in (theirs, ours):
        model.set_adapter("default")
    with theirs.disable_adapter(), ours.disable_adapter():
        check(False)
    for model in (theirs, ours):
        model.merge_adapter()
    check(False)
    for model in (theirs, ours):
        model.unmerge_adapter()
    check(True)
    ck.decelerate_peft(ours)
    assert blocks_of(ours) == 0
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]


def test_in_half_precision_outside_and_under_autocast(runs):
    """As close to float64 as PEFT's own pass is."""
    row = make(CLIP)
    wide = in_peft(row)
    with torch.no_grad():
        truth = row.features(wide.base_model.model, row.inputs)
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        theirs = copy.deepcopy(wide).to(dtype)
        ours = ck.accelerate_peft(copy.deepcopy(theirs))
        inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in row.inputs.items()}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found, expected = (row.features(model.base_model.model, inputs) for model in (ours, theirs))
        assert (found - truth).norm() <= 1.5 * (expected - truth).norm()
        assert runs == [True] * 4
        runs.clear()


def test_dropout_is_drawn_in_training_alone():
    row = make(CLIP)
    model = ck.accelerate_peft(in_peft(row, lora_dropout=0.5))
    plain = in_peft(row)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        fusing(patch, True)
        expected = row.features(plain.base_model.model, row.inputs)
        assert_close(row.features(model.base_model.model, row.inputs), expected, 1e-9)
        model.train()
        one, other = (row.features(model.base_model.model, row.inputs) for _ in range(2))
    assert (one - other).norm() > 0.01 * one.norm()  # half of each update's inputs is dropped


def test_an_interrupt_leaves_the_model_as_it_was(monkeypatch):
    model = in_peft(make(CLIP))
    classes = [type(module) for module in model.modules()]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("complora_kernels.common.changes._call_each", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ck.accelerate_peft(model)
    assert [type(module) for module in model.modules()] == classes


def test_deceleration_after_peft_has_unloaded():
    model = ck.accelerate_peft(in_peft(make(CLIP)))
    plain = model.unload()
    assert blocks_of(plain) == 4
    ck.decelerate_peft(plain)
    assert blocks_of(plain) == 0
