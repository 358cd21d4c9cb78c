"""How fast is one adapted layer, forward and backward, against other ways to compute it?

`make bench` runs it: on a CPU in float32, on a GPU in bfloat16, with and without dropout. Every rival starts from the
same weights and factors and is checked before it is timed.
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
from complora_kernels import plans, reference
from complora_kernels.functional import complora_linear
from complora_kernels.subspace import principal_basis

RANK, K, SCALING = 16, 384, 1.0
OURS = "complora_linear"
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOKENS = 197 * (256 if ON_GPU else 32)  # M: a batch of images in a ViT-B/16


@dataclass
class Layer:
    """One frozen weight, its factors and an input; base products 4·M·in·out operations (y and dX)."""

    x: Tensor  # [M, in]
    weight: Tensor  # [out, in]
    bias: Tensor  # [out]
    A: nn.Parameter  # [r, in], float32
    B: nn.Parameter  # [out, r], float32
    basis: Tensor  # [out, k]
    dY: Tensor  # [M, out]
    dropout_p: float = 0.0

    def step(self, forward: Callable[[], Tensor]) -> Tensor:
        """One forward and backward pass; gradients of x, A and B."""
        for tensor in (self.x, self.A, self.B):
            tensor.grad = None
        y = forward()
        y.backward(self.dY)
        return y.detach()


def make_layer(inputs: int, outputs: int) -> Layer:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, device=DEVICE).requires_grad_(False)
    A = nn.Parameter(torch.randn(RANK, inputs, device=DEVICE) / inputs**0.5)
    B = nn.Parameter(torch.randn(outputs, RANK, device=DEVICE) / RANK**0.5)
    x = torch.randn(TOKENS, inputs, device=DEVICE, dtype=DTYPE, requires_grad=True)
    basis = principal_basis(linear.weight, k=K)
    dY = torch.randn(TOKENS, outputs, device=DEVICE, dtype=DTYPE)
    return Layer(x, linear.weight.to(DTYPE), linear.bias.to(DTYPE), A, B, basis, dY)


def ours(layer: Layer, weight: Tensor | None = None, backend: str | None = None) -> Tensor:
    return complora_linear(
        layer.x,
        layer.weight if weight is None else weight,
        layer.bias,
        layer.A,
        layer.B,
        output_basis=layer.basis,
        scaling=SCALING,
        dropout_p=layer.dropout_p,
        backend=backend,
    )


def complora(layer: Layer) -> Callable[[], Tensor]:
    return lambda: ours(layer)


def by_torch(layer: Layer) -> Callable[[], Tensor]:
    return lambda: ours(layer, backend="torch")


def by_plan(name: str, layer: Layer) -> Callable[[], Tensor]:
    """Ours with another plan; merge from a float32 master, as under autocast."""
    weight = layer.weight.float() if name == "merge" else layer.weight

    def forward() -> Tensor:
        with torch.autocast(DEVICE.type, DTYPE, enabled=ON_GPU and name == "merge"):
            return ours(layer, weight)

    return forward


def frozen(layer: Layer) -> Callable[[], Tensor]:
    """The floor: no adapter, dX only."""
    return lambda: F.linear(layer.x, layer.weight, layer.bias)


def folded(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor, basis: Tensor, dropout_p: float) -> Tensor:
    """Plain torch with the projection in the factor: 4·r·out·k operations more."""
    B = B - basis @ (basis.mT @ B)  # P B
    dropped = F.dropout(x, dropout_p)
    return F.linear(x, weight, bias) + SCALING * F.linear(F.linear(dropped, A.to(x.dtype)), B.to(x.dtype))


def compiled(layer: Layer) -> Callable[[], Tensor]:
    function = torch.compile(folded)
    return lambda: function(layer.x, layer.weight, layer.bias, layer.A, layer.B, layer.basis, layer.dropout_p)


def dense_projector(layer: Layer) -> Callable[[], Tensor]:
    """The formula as it stands, `x W + ((x A) B) P_perp` with P_perp [out, out]: 4·M·out² operations more."""
    P = (torch.eye(layer.weight.shape[0], device=DEVICE) - layer.basis @ layer.basis.mT).to(DTYPE)

    def forward() -> Tensor:
        x, A, B = F.dropout(layer.x, layer.dropout_p), layer.A.to(DTYPE), layer.B.to(DTYPE)
        return F.linear(layer.x, layer.weight, layer.bias) + SCALING * (((x @ A.mT) @ B.mT) @ P)

    return forward


def projected_activations(layer: Layer) -> Callable[[], Tensor]:
    """The projection in low-rank form on the activations: 8·M·out·k operations more."""
    basis = layer.basis.to(DTYPE)

    def forward() -> Tensor:
        x, A, B = F.dropout(layer.x, layer.dropout_p), layer.A.to(DTYPE), layer.B.to(DTYPE)
        update = (x @ A.mT) @ B.mT  # [M, out]
        update = update - (update @ basis) @ basis.mT
        return F.linear(layer.x, layer.weight, layer.bias) + SCALING * update

    return forward


def peft_linear(layer: Layer) -> Callable[[], Tensor]:
    """PEFT's LoRA layer around the same weight and factors: plain LoRA, it projects nothing."""
    base = nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
    base.weight, base.bias = nn.Parameter(layer.weight, False), nn.Parameter(layer.bias, False)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=round(SCALING * RANK), lora_dropout=layer.dropout_p, target_modules=["base"]
    )
    wrapped = peft.get_peft_model(nn.ModuleDict({"base": base}), config).get_submodule("base_model.model.base")
    assert isinstance(wrapped, peft.tuners.lora.Linear)
    # PEFT keeps float32 factors and casts its input to them: the adapter in the dtype of the base is its fast form.
    wrapped.lora_A["default"].weight = layer.A if torch.float32 == DTYPE else nn.Parameter(layer.A.detach().to(DTYPE))
    wrapped.lora_B["default"].weight = layer.B if torch.float32 == DTYPE else nn.Parameter(layer.B.detach().to(DTYPE))
    return lambda: wrapped(layer.x)


@dataclass(frozen=True)
class Rival:
    make: Callable[[Layer], Callable[[], Tensor]]
    remark: str = ""
    plan: plans.Plan | None = None  # that this rival is ours with


RIVALS = {
    OURS: Rival(complora),
    "frozen F.linear": Rival(frozen, "the floor: no adapter"),
    "dense P_perp": Rival(dense_projector),
    "projection of the activations": Rival(projected_activations),
    "PEFT lora.Linear": Rival(peft_linear, "plain LoRA: no projection"),
    "torch backend": Rival(by_torch, "ours by another backend"),
    "addmm": Rival(partial(by_plan, "addmm"), "ours by another plan; rounds twice", plans.Plan("addmm")),
    "merge": Rival(partial(by_plan, "merge"), "ours by another plan", plans.Plan("merge")),
    "concat": Rival(partial(by_plan, "concat"), "ours by another plan", plans.Plan("concat")),
}
if ON_GPU:
    RIVALS["torch.compile of the folded layer"] = Rival(compiled)
TARGETS = {
    "frozen F.linear": "layer/frozen",
    "PEFT lora.Linear": "layer/PEFT",
    "dense P_perp": "layer/dense P_perp",
    "torch.compile of the folded layer": "layer/compiled",
    "addmm": "layer/addmm",
    "merge": "layer/merge",
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(("inputs", "outputs"), [(768, 768), (768, 3072)])
def test_forward_backward(benchmark, rounds, record, inputs, outputs, dropout_p):
    layer = make_layer(inputs, outputs)
    rivals = {name: rival for name, rival in RIVALS.items() if not (dropout_p and name == "merge")}
    check(layer, rivals)
    layer.dropout_p = dropout_p
    steps = {name: step(layer, rival) for name, rival in rivals.items()}
    for name, timing in time_interleaved(steps, ours=OURS, rounds=rounds, device=DEVICE).items():
        low, ratio, high = timing.spread()
        row = {
            "shape": f"{inputs}->{outputs} M={TOKENS} r={RANK} k={K} {DTYPE} p={dropout_p}",
            "rival": name,
            "median_s": sorted(timing.seconds)[rounds // 2],
            "ratio": ratio,
            "ratio_p20": low,
            "ratio_p80": high,
            "rounds": rounds,
            "remark": RIVALS[name].remark,
        }
        target = TARGETS.get(name)
        if target and inputs == outputs:
            row["target"] = f"{target}, dropout" if dropout_p else target
            row["figure"] = 1 / ratio if name == "frozen F.linear" else ratio
        record(row)
    benchmark.pedantic(steps[OURS], rounds=3)


def step(layer: Layer, rival: Rival) -> Callable[[], Tensor]:
    """One training step of a rival."""
    forward = rival.make(layer)
    if rival.plan is None:
        return partial(layer.step, forward)

    def planned() -> Tensor:
        assert rival.plan is not None
        with plans.override(rival.plan):
            return layer.step(forward)

    return planned


def check(layer: Layer, rivals: dict[str, Rival]) -> None:
    """Everyone's output, and everyone's gradients but the frozen layer's, against float64; without dropout."""
    wide = [tensor.detach().double() for tensor in (layer.x, layer.weight, layer.bias, layer.A, layer.B, layer.basis)]
    x, weight, bias, A, B, basis = wide
    for name, rival in rivals.items():
        leaves = [leaf.clone().requires_grad_() for leaf in (x, A, B)]
        projection = None if name == "PEFT lora.Linear" else basis
        factor = 0.0 if name == "frozen F.linear" else SCALING
        truth = reference.complora_linear(
            leaves[0], weight, bias, leaves[1], leaves[2], output_basis=projection, scaling=factor
        )
        truth.backward(layer.dY.double())
        y = step(layer, rival)()
        pairs = [(y, truth.detach()), (layer.x.grad, leaves[0].grad)]
        if layer.A.grad is not None:
            pairs += [(layer.A.grad, leaves[1].grad), (layer.B.grad, leaves[2].grad)]
        # Sums of 768 to 6304 products in float32; roundings of intermediate results to bfloat16.
        tolerance = 1e-5 if torch.float32 == DTYPE else 2e-2
        for mine, true in pairs:
            assert mine is not None
            assert true is not None
            assert (mine - true).norm() <= tolerance * true.norm(), name
