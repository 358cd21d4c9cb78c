"""A model that was changed after its first step, on every plan of the triton backend: nothing old is computed with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_clip import adapted, small_clip
from torch import Tensor, nn
from triton_device import DEVICE

import complora_kernels as ck
from complora_kernels.backends import plans
from complora_kernels.backends.plans import Plan

HALF, FLOAT = torch.bfloat16, torch.float32
PLANS = {
    "fused": (Plan("fused", "inside"), HALF),
    "fused, h given": (Plan("fused", "given"), HALF),
    "concat": (Plan("concat"), HALF),
    "merge": (Plan("merge"), FLOAT),
    "addmm": (Plan("addmm"), FLOAT),
}
APART = {
    HALF: 0.1,
    torch.float16: 0.1,
    FLOAT: 1e-4,
}  # of the norm, two layers deep; what is old is apart by more than half


def frozen_modules(model: nn.Module) -> list[Any]:
    kinds = (nn.LayerNorm, nn.Linear)
    return [module for module in model.visual.transformer.modules() if isinstance(module, kinds)]  # pyright: ignore[reportAttributeAccessIssue]


def exchanged(model: Any) -> None:
    for module in frozen_modules(model):
        for name in ("weight", "bias"):
            setattr(module, name, nn.Parameter(-getattr(module, name).detach(), requires_grad=False))


def written(model: Any) -> None:
    for module in frozen_modules(model):
        module.weight.data.mul_(-1)
        module.bias.data.mul_(-1)


def factors_exchanged(model: Any) -> None:
    for layer in model.modules():
        if isinstance(layer, ck.CompLoRALinear):
            layer.lora_A, layer.lora_B = nn.Parameter(-layer.lora_A.detach()), nn.Parameter(2 * layer.lora_B.detach())


def cast(model: Any) -> None:
    written(model)
    model.to(torch.float16 if model.visual.proj.dtype == HALF else HALF)


def moved(model: Any) -> None:
    """As to another device and back: parameters and buffers in other memory, and the old one is overwritten."""
    for tensor in (*model.parameters(), *model.buffers()):
        old = tensor.data
        tensor.data = old.clone()
        old.zero_()


def merged(model: Any) -> None:
    ck.merge_adapter(model)


def merged_and_unmerged(model: Any) -> None:
    ck.merge_adapter(model)
    ck.unmerge_adapter(model)
    written(model)


def merged_by_hand(model: Any) -> None:
    """As PEFT merges: into the data of the weight, which no version shows."""
    for layer in model.modules():
        if isinstance(layer, ck.CompLoRALinear):
            layer.weight.data += layer.get_delta_weight().to(layer.weight.dtype)


def of_another_rank(model: Any) -> None:
    ck.unload(model)
    adapted(model, seed=5, r=3, target_modules=("q", "v", "o", "fc1", "fc2"))


def nothing(model: Any) -> None:
    """The batch alone is another one."""


CHANGES: dict[str, Callable[[Any], None]] = {
    change.__name__: change
    for change in (
        exchanged,
        written,
        factors_exchanged,
        cast,
        moved,
        merged,
        merged_and_unmerged,
        merged_by_hand,
        of_another_rank,
        nothing,
    )
}


def features_and_gradients(model: Any, images: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    monkeypatch.setenv("COMPLORA_BACKEND", backend)
    model.zero_grad()
    batch = torch.randn(images, 3, 16, 16, generator=torch.Generator().manual_seed(3)).to(
        DEVICE, model.visual.proj.dtype
    )
    features: Tensor = model.encode_image(batch)
    if features.requires_grad:
        features.float().square().sum().backward()
    gradients = [parameter.grad for parameter in ck.adapter_parameters(model) if parameter.grad is not None]
    return [features.detach().double().flatten(), *[gradient.double().flatten() for gradient in gradients]]


@pytest.mark.long  # together, by the interpreter
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", PLANS)
def test_a_step_after_a_change(name, change, monkeypatch):
    plan, dtype = PLANS[name]
    model = adapted(small_clip(layers=2), r=4, target_modules=("q", "k", "v", "o", "fc1", "fc2")).to(DEVICE, dtype)
    fresh = copy.deepcopy(model)  # shares no tensor, and runs on operations that keep nothing
    with plans.override(plan):
        before = features_and_gradients(model, 4, "triton", monkeypatch)
        CHANGES[change](model)
        after = features_and_gradients(model, 3, "triton", monkeypatch)
    CHANGES[change](fresh)
    exact = features_and_gradients(fresh.double(), 3, "reference", monkeypatch)
    assert len(after) == len(exact)
    for ours, expected in zip(after, exact, strict=True):  # features, and the gradient of each factor
        assert (ours - expected).norm() <= APART[model.visual.proj.dtype] * expected.norm()
    if change not in ("moved", "merged", "nothing"):
        assert (before[0][: after[0].numel()] - exact[0]).norm() > 0.5 * exact[0].norm()  # the change can be seen


@pytest.mark.parametrize("name", PLANS)
def test_weights_that_were_quantised_are_refused_by_name(name, monkeypatch):
    plan, dtype = PLANS[name]
    model = adapted(small_clip(layers=1), target_modules=("fc1", "fc2")).to(DEVICE, dtype)
    with plans.override(plan):
        features_and_gradients(model, 2, "triton", monkeypatch)
        layer = model.visual.transformer.resblocks[0].mlp.c_fc
        layer.weight.data = layer.weight.data.to(torch.int8)
        with pytest.raises(ValueError, match=r"resblocks\.0\.mlp\.c_fc holds torch\.int8 weights, expected floating"):
            features_and_gradients(model, 2, "triton", monkeypatch)
