"""How fast is one adapted layer, forward and backward, against other ways to compute it?

`make bench` runs it. Every rival starts from the same weights and factors and is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.interleaved import time_interleaved
from complora_kernels import reference
from complora_kernels.functional import complora_linear
from complora_kernels.subspace import principal_basis

TOKENS = 32 * 197  # M: a batch of 32 images in a ViT-B/16
RANK, K, SCALING = 16, 384, 1.0
OURS = "complora_linear"


@dataclass
class Layer:
    """One frozen weight, its factors and an input; base products 4·M·in·out operations (y and dX)."""

    x: Tensor  # [M, in]
    weight: Tensor  # [out, in]
    bias: Tensor  # [out]
    A: nn.Parameter  # [r, in]
    B: nn.Parameter  # [out, r]
    basis: Tensor  # [out, k]
    dY: Tensor  # [M, out]

    def step(self, forward: Callable[[], Tensor]) -> Tensor:
        """One forward and backward pass; gradients of x, A and B."""
        for tensor in (self.x, self.A, self.B):
            tensor.grad = None
        y = forward()
        y.backward(self.dY)
        return y.detach()


def make_layer(inputs: int, outputs: int) -> Layer:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    A = nn.Parameter(torch.randn(RANK, inputs) / inputs**0.5)
    B = nn.Parameter(torch.randn(outputs, RANK) / RANK**0.5)
    x = torch.randn(TOKENS, inputs, requires_grad=True)
    basis = principal_basis(linear.weight, k=K)
    return Layer(x, linear.weight, linear.bias, A, B, basis, torch.randn(TOKENS, outputs))


def ours(layer: Layer) -> Callable[[], Tensor]:
    return lambda: complora_linear(
        layer.x, layer.weight, layer.bias, layer.A, layer.B, output_basis=layer.basis, scaling=SCALING
    )


def frozen(layer: Layer) -> Callable[[], Tensor]:
    """The floor: no adapter, dX only."""
    return lambda: F.linear(layer.x, layer.weight, layer.bias)


def dense_projector(layer: Layer) -> Callable[[], Tensor]:
    """The formula as it stands, `x W + ((x A) B) P_perp` with P_perp [out, out]: 4·M·out² operations more."""
    P = torch.eye(layer.weight.shape[0]) - layer.basis @ layer.basis.mT

    def forward() -> Tensor:
        return F.linear(layer.x, layer.weight, layer.bias) + SCALING * (((layer.x @ layer.A.mT) @ layer.B.mT) @ P)

    return forward


def projected_activations(layer: Layer) -> Callable[[], Tensor]:
    """The projection in low-rank form on the activations: 8·M·out·k operations more."""

    def forward() -> Tensor:
        update = (layer.x @ layer.A.mT) @ layer.B.mT  # [M, out]
        update = update - (update @ layer.basis) @ layer.basis.mT
        return F.linear(layer.x, layer.weight, layer.bias) + SCALING * update

    return forward


def peft_linear(layer: Layer) -> Callable[[], Tensor]:
    """PEFT's LoRA layer around the same weight and factors: plain LoRA, it projects nothing."""
    base = nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
    base.weight, base.bias = nn.Parameter(layer.weight, False), nn.Parameter(layer.bias, False)
    config = peft.LoraConfig(r=RANK, lora_alpha=round(SCALING * RANK), target_modules=["base"])
    wrapped = peft.get_peft_model(nn.ModuleDict({"base": base}), config).get_submodule("base_model.model.base")
    assert isinstance(wrapped, peft.tuners.lora.Linear)
    wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight = layer.A, layer.B
    return lambda: wrapped(layer.x)


RIVALS = {
    OURS: (ours, ""),
    "frozen F.linear": (frozen, "the floor: no adapter"),
    "dense P_perp": (dense_projector, ""),
    "projection of the activations": (projected_activations, ""),
    "PEFT lora.Linear": (peft_linear, "plain LoRA: no projection"),
}


@pytest.mark.parametrize(("inputs", "outputs"), [(768, 768), (768, 3072)])
def test_forward_backward(benchmark, rounds, record, inputs, outputs):
    layer = make_layer(inputs, outputs)
    forwards = {name: make(layer) for name, (make, _) in RIVALS.items()}
    check(layer, forwards)
    steps = {name: partial(layer.step, forward) for name, forward in forwards.items()}
    for name, timing in time_interleaved(steps, ours=OURS, rounds=rounds).items():
        low, ratio, high = timing.spread()
        record(
            {
                "shape": f"{inputs}->{outputs} M={TOKENS} r={RANK} k={K}",
                "rival": name,
                "median_s": sorted(timing.seconds)[rounds // 2],
                "ratio": ratio,
                "ratio_p20": low,
                "ratio_p80": high,
                "rounds": rounds,
                "remark": RIVALS[name][1],
            }
        )
    benchmark.pedantic(steps[OURS], rounds=3)


def check(layer: Layer, forwards: dict[str, Callable[[], Tensor]]) -> None:
    """Everyone's output, and everyone's gradients but the frozen layer's, against float64."""
    wide = [tensor.detach().double() for tensor in (layer.x, layer.weight, layer.bias, layer.A, layer.B, layer.basis)]
    x, weight, bias, A, B, basis = wide
    for name, forward in forwards.items():
        leaves = [leaf.clone().requires_grad_() for leaf in (x, A, B)]
        projection = None if name == "PEFT lora.Linear" else basis
        factor = 0.0 if name == "frozen F.linear" else SCALING
        truth = reference.complora_linear(
            leaves[0], weight, bias, leaves[1], leaves[2], output_basis=projection, scaling=factor
        )
        truth.backward(layer.dY.double())
        y = layer.step(forward)
        pairs = [(y, truth.detach()), (layer.x.grad, leaves[0].grad)]
        if factor:
            pairs += [(layer.A.grad, leaves[1].grad), (layer.B.grad, leaves[2].grad)]
        for mine, true in pairs:
            assert mine is not None
            assert true is not None
            assert (mine - true).norm() <= 1e-5 * true.norm(), name  # float32 products of length 768 to 6304
