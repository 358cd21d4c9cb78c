"""How fast is one adapted layer, forward and backward, against other ways to compute it?

`make bench` runs it: on a CPU in float32, on a GPU in bfloat16, with and without dropout. Every rival starts from the
same weights and factors and is checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.comparison import Comparison, Work, bounds, pedantic
from complora_kernels import plans, reference
from complora_kernels.functional import complora_linear
from complora_kernels.subspace import principal_basis

SCALING = 1.0
PEFT = "PEFT lora.Linear"
OURS, FLOOR, FOLDED = "complora_linear", "frozen F.linear", "torch.compile of the folded layer"
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BATCH = 256 if ON_GPU else 8


class Shape(NamedTuple):
    """A weight of a CLIP model and what is adapted in it."""

    where: str
    tokens: int  # M
    inputs: int  # in
    outputs: int  # out
    rank: int = 16
    k: int = 384

    def __str__(self) -> str:
        sizes = f"{self.inputs}→{self.outputs}, M={self.tokens}, r={self.rank}, k={self.k}"
        return f"{self.where} {sizes}, {str(DTYPE).removeprefix('torch.')}"


SHAPES = [Shape("ViT-B/16 o", BATCH * 197, 768, 768), Shape("ViT-B/16 fc1", BATCH * 197, 768, 3072)]
if ON_GPU:
    SHAPES += [
        Shape("ViT-B/16 o", BATCH * 197, 768, 768, rank=2),
        Shape("ViT-B/16 o", BATCH * 197, 768, 768, rank=64),
        Shape("ViT-B/16 o", BATCH * 197, 768, 768, k=64),
        Shape("ViT-B/32 fc1", BATCH * 50, 768, 3072),
        Shape("ViT-L/14 o", BATCH * 257, 1024, 1024, k=512),
        Shape("ViT-L/14 fc1", BATCH * 257, 1024, 4096, k=512),
        Shape("text fc1", 1000 * 24, 512, 2048, k=256),
    ]
COMPILED = SHAPES[:2]  # torch.compile takes its time for each


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
    copies: tuple[nn.Parameter, ...] = ()  # of A and B, where a rival trains those

    def step(self, forward: Callable[[], Tensor]) -> Tensor:
        """One forward and backward pass; gradients of x, A and B."""
        for tensor in (self.x, self.A, self.B, *self.copies):
            tensor.grad = None
        y = forward()
        y.backward(self.dY)
        return y.detach()


def make_layer(shape: Shape) -> Layer:
    _, tokens, inputs, outputs, rank, k = shape
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, device=DEVICE).requires_grad_(False)
    A = nn.Parameter(torch.randn(rank, inputs, device=DEVICE) / inputs**0.5)
    B = nn.Parameter(torch.randn(outputs, rank, device=DEVICE) / rank**0.5)
    x = torch.randn(tokens, inputs, device=DEVICE, dtype=DTYPE, requires_grad=True)
    basis = principal_basis(linear.weight, k=k)
    dY = torch.randn(tokens, outputs, device=DEVICE, dtype=DTYPE)
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
    function = torch.compile(folded, dynamic=False)
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
    import peft

    rank = len(layer.A)
    base = nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
    base.weight, base.bias = nn.Parameter(layer.weight, False), nn.Parameter(layer.bias, False)
    config = peft.LoraConfig(
        r=rank, lora_alpha=round(SCALING * rank), lora_dropout=layer.dropout_p, target_modules=["base"]
    )
    wrapped = peft.get_peft_model(nn.ModuleDict({"base": base}), config).get_submodule("base_model.model.base")
    assert isinstance(wrapped, peft.tuners.lora.Linear)
    # PEFT keeps float32 factors and casts its input to them: the adapter in the dtype of the base is its fast form.
    layer.copies = tuple(nn.Parameter(factor.detach().to(DTYPE)) for factor in (layer.A, layer.B))
    wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight = layer.copies
    return lambda: wrapped(layer.x)


@dataclass(frozen=True)
class Rival:
    make: Callable[[Layer], Callable[[], Tensor]]
    remark: str = ""
    plan: plans.Plan | None = None  # that this rival is ours with


RIVALS = {
    OURS: Rival(complora),
    FLOOR: Rival(frozen, "the floor: no adapter"),
    "dense P_perp": Rival(dense_projector, "4·M·out² operations more"),
    "projection of the activations": Rival(projected_activations, "8·M·out·k operations more"),
    PEFT: Rival(peft_linear, "plain LoRA: no projection; in half precision it rounds twice"),
    "torch backend": Rival(by_torch, "ours by another backend"),
    "addmm": Rival(partial(by_plan, "addmm"), "ours by another plan; rounds twice", plans.Plan("addmm")),
    "merge": Rival(partial(by_plan, "merge"), "ours by another plan", plans.Plan("merge")),
    "concat": Rival(partial(by_plan, "concat"), "ours by another plan", plans.Plan("concat")),
}
if ON_GPU:
    RIVALS[FOLDED] = Rival(compiled)
TARGETS = {
    FLOOR: "layer/frozen",
    PEFT: "layer/PEFT",
    "dense P_perp": "layer/dense P_perp",
    FOLDED: "layer/compiled",
    "addmm": "layer/addmm",
    "merge": "layer/merge",
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_backward(benchmark, comparison, shape, dropout_p):
    _, M, inputs, outputs, rank, _ = shape
    # y and dX with W; h, h B^T, g, g A, dA and dB. x twice (y, dA), dY once, y and dX out, W twice.
    operations = 4 * M * inputs * outputs + 6 * M * rank * (inputs + outputs)
    work = Work(operations, DTYPE.itemsize * (M * (3 * inputs + 2 * outputs) + 2 * inputs * outputs))
    label = f"{shape}, p={dropout_p}" if dropout_p else str(shape)
    targets = {}
    if ON_GPU and shape == SHAPES[0]:
        targets = {name: f"{target}, dropout" if dropout_p else target for name, target in TARGETS.items()}
        targets = {name: target for name, target in targets.items() if target in bounds()}
    steps = compare(comparison, shape, label, dropout_p, work, targets)
    pedantic(benchmark, steps[OURS])


@pytest.mark.parametrize("shape", SHAPES[: 2 if ON_GPU else 1], ids=str)
def test_forward(benchmark, comparison, shape):
    _, M, inputs, outputs, rank, _ = shape
    # y with W, h and h B^T; x, W and y once.
    operations = 2 * M * inputs * outputs + 2 * M * rank * (inputs + outputs)
    work = Work(operations, DTYPE.itemsize * (M * (inputs + outputs) + inputs * outputs))
    steps = compare(comparison, shape, f"{shape}, forward", 0.0, work, {}, backward=False)
    pedantic(benchmark, steps[OURS])


def compare(
    comparison: Comparison,
    shape: Shape,
    label: str,
    dropout_p: float,
    work: Work,
    targets: dict[str, str],
    *,
    backward: bool = True,
) -> dict[str, Callable[[], Tensor]]:
    torch.compiler.reset()
    layer, steps = make_layer(shape), {}
    for name, rival in RIVALS.items():
        if not (dropout_p and name == "merge") and (name != FOLDED or shape in COMPILED):
            steps[name] = comparison.attempt(label, name, partial(step, layer, rival))
    steps = {name: step for name, step in steps.items() if step is not None}
    check(layer, steps)
    layer.dropout_p = dropout_p
    steps = {name: step(layer, RIVALS[name], backward=backward) for name in steps}
    remarks = {name: rival.remark for name, rival in RIVALS.items()}
    product = Work((4 if backward else 2) * shape.tokens * shape.inputs * shape.outputs, work.bytes)
    floors = {FLOOR: product}
    comparison.time(label, steps, ours=OURS, work=work, floors=floors, targets=targets, remarks=remarks)
    return steps


def step(layer: Layer, rival: Rival, *, backward: bool = True) -> Callable[[], Tensor]:
    """One training step of a rival, or its forward pass as it is taken in training."""
    forward = rival.make(layer)
    run = partial(layer.step, forward) if backward else forward
    if rival.plan is None:
        return run

    def planned() -> Tensor:
        assert rival.plan is not None
        with plans.override(rival.plan):
            return run()

    return planned


def check(layer: Layer, steps: dict[str, Callable[[], Tensor]]) -> None:
    """Everyone's output, and everyone's gradients but the frozen layer's, against float64; without dropout."""
    wide = [tensor.detach().double() for tensor in (layer.x, layer.weight, layer.bias, layer.A, layer.B, layer.basis)]
    x, weight, bias, A, B, basis = wide
    for name, run in steps.items():
        leaves = [leaf.clone().requires_grad_() for leaf in (x, A, B)]
        projection = None if name == PEFT else basis
        factor = 0.0 if name == FLOOR else SCALING
        truth = reference.complora_linear(
            leaves[0], weight, bias, leaves[1], leaves[2], output_basis=projection, scaling=factor
        )
        truth.backward(layer.dY.double())
        y = run()
        pairs = [(y, truth.detach()), (layer.x.grad, leaves[0].grad)]
        if name != FLOOR:
            factors = layer.copies if name == PEFT else (layer.A, layer.B)
            pairs += [(factor.grad, leaf.grad) for factor, leaf in zip(factors, leaves[1:], strict=True)]
        # Sums of 768 to 6304 products in float32; roundings of intermediate results to bfloat16.
        tolerance = 1e-5 if torch.float32 == DTYPE else 2e-2
        for mine, true in pairs:
            assert mine is not None
            assert true is not None
            assert (mine - true).norm() <= tolerance * true.norm(), name
