"""An adapted CLIP on the triton backend: what it computes, and how many kernels it launches for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from numerics import EPS
from small_clip import adapted, small_clip, small_clip_4
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction
from triton_device import DEVICE
from two_adapters import both
from two_adapters import features as features_of_both

import complora_kernels as ck

EVERY_TARGET = ("q", "k", "v", "o", "fc1", "fc2")
TOWERS, LAYERS = 2, 2


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each kernel was launched."""
    counts: Counter[str] = Counter()
    for kind in (JITFunction, InterpretedFunction):

        def run(self: Any, *arguments: Any, original: Any = kind.run, **options: Any) -> Any:
            counts[self.fn.__name__] += 1
            return original(self, *arguments, **options)

        monkeypatch.setattr(kind, "run", run)
    return counts


def step(model: nn.Module, backend: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """The features of both towers and the gradients of the adapters, under the seed that was set."""
    monkeypatch.setenv("COMPLORA_BACKEND", backend)
    model = model.to(DEVICE)
    model.zero_grad()
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(2, 3, 16, 16, generator=generator).to(DEVICE)
    texts = torch.randint(1, 20, (3, 6), generator=generator).to(DEVICE)
    features: Any = torch.cat([model.encode_image(images), model.encode_text(texts)]).float()  # type: ignore[operator]
    features.square().sum().backward()
    gradients = [parameter.grad for parameter in ck.adapter_parameters(model)]
    return features.detach(), torch.cat([g.flatten() for g in gradients if g is not None])


@pytest.mark.parametrize("make", [small_clip, small_clip_4])
@pytest.mark.parametrize("targets", [EVERY_TARGET, ("q", "v"), ("k",)], ids="-".join)
def test_computes_what_the_torch_backend_does(monkeypatch, make, targets):
    model = adapted(make(), target_modules=targets)
    expected = step(model, "torch", monkeypatch)
    for ours, theirs in zip(step(model, "triton", monkeypatch), expected, strict=True):
        assert (ours - theirs).norm() <= 10 * EPS[torch.float32] * theirs.norm()  # sums in another order, 2 layers deep


def test_launches(monkeypatch, launches):
    """One fold a tower and direction, and no pass that nobody asked for: the first layer computes no dX."""
    model = adapted(small_clip(layers=LAYERS), target_modules=EVERY_TARGET)
    step(model, "triton", monkeypatch)
    linears = TOWERS * (LAYERS * 4 + 1)  # q, k and v are one product, in the last layer two; o, fc1, fc2
    assert launches["fold_factors_kernel"] == 2 * TOWERS
    assert launches["packed_lora_linear_fwd_kernel"] == linears
    assert launches["packed_lora_linear_dx_kernel"] == linears - TOWERS
    assert launches["packed_lora_linear_db_kernel"] == launches["packed_lora_linear_da_kernel"] == linears


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_batch_of_several_adapters(monkeypatch, launches, dtype):
    """What the torch backend computes, in as many products as for one adapter."""
    model = both(small_clip(layers=LAYERS)).to(DEVICE, dtype)
    names, results, products = ["b", "__base__", "default", "b"], {}, {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("COMPLORA_BACKEND", backend)
        with ck.mixed_adapters(model, names):
            results[backend] = features_of_both(model).float()
        products[backend] = launches["packed_lora_linear_fwd_kernel"]
    apart = (results["triton"] - results["torch"]).norm() / results["torch"].norm()
    assert apart <= 10 * EPS[dtype]  # sums in another order, 2 layers deep
    # "b" adapts v, o and the MLP of both towers, "default" q, k and v of one; in its last layer q is another product.
    assert products == {"torch": 0, "triton": TOWERS * LAYERS * 4 + 1}


def test_a_batch_of_several_adapters_is_refused_where_operations_are_seen(monkeypatch):
    """The registered operations know of no columns. On "auto", the torch backend computes it."""
    model = both(small_clip(layers=1)).to(DEVICE)
    monkeypatch.setenv("COMPLORA_BACKEND", "triton")
    with ck.mixed_adapters(model, ["b", "default"] * 2), FlopCounterMode(display=False):
        with pytest.raises(RuntimeError, match=r"does not support .*columns of h are left out"):
            features_of_both(model)
        monkeypatch.setenv("COMPLORA_BACKEND", "auto")
        features_of_both(model)


def test_factors_of_q_k_and_v_are_not_copied(monkeypatch):
    """They lie side by side, as the product reads them, in the results of the one fold."""
    model = adapted(small_clip(layers=1))
    stacked: list[Any] = []
    stack = torch.stack

    def recorded(tensors: Any, *arguments: Any) -> Tensor:
        stacked.append(tensors)
        return stack(tensors, *arguments)

    step(model, "triton", monkeypatch)  # imports what else calls torch.stack
    monkeypatch.setattr(torch, "stack", recorded)
    step(model, "triton", monkeypatch)
    assert stacked == []


@pytest.mark.long
def test_trains_with_dropout(monkeypatch):
    """The same run twice, bit for bit, and a loss that falls."""
    runs = []
    for _ in range(2):
        model = adapted(small_clip(layers=1), lora_dropout=0.25, target_modules=("q", "k", "v")).train()
        optimizer = torch.optim.AdamW(ck.adapter_parameters(model), lr=0.01)
        torch.manual_seed(3)
        losses = []
        for _ in range(4):
            features, _ = step(model, "triton", monkeypatch)
            losses.append(features.square().sum())
            optimizer.step()
        runs.append(torch.stack(losses))
    assert torch.equal(runs[0], runs[1])
    assert runs[0][-1] < runs[0][0]
