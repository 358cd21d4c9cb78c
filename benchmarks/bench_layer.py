"""How fast is one adapted layer, forward and backward, against other ways to compute it?

`make bench` runs it: on a CPU in float32, on a GPU in bfloat16, with and without dropout. Every baseline starts from
the same weights and factors and is checked before it is timed, on a GPU its CUDA graph too; with dropout, that the mean
and the size of what it drops are right, and that masks are drawn anew. `--lorafusion PATH`, a checkout of LoRAFusion,
adds its layer to those on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from benchmarks import lorafusion
from benchmarks.comparison import Comparison, Missing, Work, bounds, needed, pedantic
from complora_kernels import reference
from complora_kernels.backends import plans
from complora_kernels.functional import complora_linear
from complora_kernels.replays import Step, reason, replays
from complora_kernels.subspace import principal_basis

SCALING = 1.0
PEFT, LORAFUSION = "PEFT lora.Linear", "LoRAFusion's kernels"
OURS, FLOOR, FOLDED = "complora_linear", "frozen F.linear", "torch.compile of the folded layer"
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BATCH, PROMPTS = 8, 100  # sizes on a CPU
BARELY = 1e-30  # a dropout that drops nothing
HOST_SEED = "draws its seed on the host"


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


# Of a GPU, whose first shape the targets are about: `benchmarks/gpu.sh` times it first.
GPU_SHAPES = [
    Shape("ViT-B/16 o", 256 * 197, 768, 768),
    Shape("ViT-B/16 fc1", 256 * 197, 768, 3072),
    Shape("ViT-B/16 o", 32 * 197, 768, 768),  # fits in the L2 cache
    Shape("ViT-B/16 o", 256 * 197, 768, 768, rank=64),
    Shape("ViT-L/14 fc1", 256 * 257, 1024, 4096, k=512),
    Shape("text fc1", 1000 * 24, 512, 2048, k=256),
]
CPU_SHAPES = [
    Shape("ViT-B/16 o", BATCH * 197, 768, 768),
    Shape("ViT-B/16 fc1", BATCH * 197, 768, 3072),
    Shape("ViT-B/16 o", BATCH * 197, 768, 768, rank=2),
    Shape("ViT-B/16 o", BATCH * 197, 768, 768, rank=64),
    Shape("ViT-B/16 o", BATCH * 197, 768, 768, k=64),
    Shape("ViT-B/32 fc1", BATCH * 50, 768, 3072),
    Shape("ViT-L/14 o", BATCH * 257, 1024, 1024, k=512),
    Shape("text fc1", PROMPTS * 24, 512, 2048, k=256),
]
SHAPES = GPU_SHAPES if ON_GPU else CPU_SHAPES
MAIN = SHAPES[: 1 if ON_GPU else 2]  # the variants of ours, and what else takes long, are compared there alone
COMPILED = SHAPES[:1]  # torch.compile and Triton take their time for each


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
    plain: tuple[nn.Parameter, nn.Parameter]  # A and P B in the dtype of x: plain LoRA that computes the same
    dropout_p: float = 0.0

    def step(self, forward: Callable[[], Tensor]) -> list[Tensor]:
        """One forward and backward pass: y, and the gradients of x and of the factors that a baseline trains."""
        leaves = (self.x, self.A, self.B, *self.plain)
        for leaf in leaves:
            leaf.grad = None
        y = forward()
        y.backward(self.dY)
        return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def make_layer(shape: Shape) -> Layer:
    _, tokens, inputs, outputs, rank, k = shape
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs, device=DEVICE).requires_grad_(False)
    A = nn.Parameter(torch.randn(rank, inputs, device=DEVICE) / inputs**0.5)
    B = nn.Parameter(torch.randn(outputs, rank, device=DEVICE) / rank**0.5)
    x = torch.randn(tokens, inputs, device=DEVICE, dtype=DTYPE, requires_grad=True)
    basis = principal_basis(linear.weight, k=k)
    dY = torch.randn(tokens, outputs, device=DEVICE, dtype=DTYPE)
    projected = B.detach() - basis @ (basis.mT @ B.detach())  # P B
    plain = nn.Parameter(A.detach().to(DTYPE, copy=True)), nn.Parameter(projected.to(DTYPE))
    return Layer(x, linear.weight.to(DTYPE), linear.bias.to(DTYPE), A, B, basis, dY, plain)


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

    def forward() -> Tensor:
        return function(layer.x, layer.weight, layer.bias, layer.A, layer.B, layer.basis, layer.dropout_p)

    try:
        forward()
    except BackendCompilerFailed as error:  # there is no C++ compiler
        raise Missing(f"not compiled: {reason(error.inner_exception)}") from error
    return forward


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
    """PEFT's LoRA layer around the same weight."""
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
    wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight = layer.plain
    return lambda: wrapped(layer.x)


def lorafusion_linear(checkout: Path, layer: Layer) -> Callable[[], Tensor]:
    """LoRAFusion's layer, which takes tokens in three dimensions only."""
    fused, (A, B) = lorafusion.fused_linear_lora(checkout), layer.plain

    def forward() -> Tensor:
        x = layer.x[None]  # [1, M, in]
        y = fused(x, layer.weight, A, B, SCALING, dropout_p=layer.dropout_p, linear_bias=layer.bias)
        return y.flatten(0, 1)

    return forward


@dataclass(frozen=True)
class Baseline:
    make: Callable[..., Callable[[], Tensor]]  # takes a Layer, gives its step
    remark: str = ""
    plan: plans.Plan | None = None  # this baseline is ours with that plan
    shapes: Sequence[Shape] = tuple(MAIN)
    drops: bool = True  # it supports dropout
    plain: bool = False  # True: plain LoRA
    checkout: str = ""  # the option that says where its code lies, which `make` takes first
    checked_with: float = 0.0  # the dropout that its results are checked with
    host_seed: str = ""  # dropout's seed: "read" in each step, which no graph can hold, or "kept", one for all replays


TWICE = "in half precision it rounds twice and loses small updates"
BASELINES = {
    OURS: Baseline(complora, shapes=SHAPES),
    FLOOR: Baseline(frozen, "the floor: no adapter, of the gradients dX alone", shapes=SHAPES),
    "dense P_perp": Baseline(dense_projector, f"4·M·out² operations more; {TWICE}"),
    "projection of the activations": Baseline(projected_activations, f"8·M·out·k operations more; {TWICE}"),
    PEFT: Baseline(peft_linear, f"plain LoRA: no projection; {TWICE}", shapes=SHAPES, plain=True),
    "torch backend": Baseline(by_torch, "ours by another backend", host_seed="read"),
    "addmm": Baseline(
        partial(by_plan, "addmm"), f"ours by another plan, as Unsloth and Axolotl do; {TWICE}", plans.Plan("addmm")
    ),
    "merge": Baseline(
        partial(by_plan, "merge"),
        "ours by another plan, as RunLoRA does; from a float32 weight, else it loses small updates; not with dropout",
        plans.Plan("merge"),
        drops=False,
    ),
    "concat": Baseline(
        partial(by_plan, "concat"), "ours by another plan; copies x and the weight", plans.Plan("concat")
    ),
    FOLDED: Baseline(compiled, f"compiled anew for each shape, which is not in its time; {TWICE}", shapes=COMPILED),
}
if ON_GPU:
    BASELINES[LORAFUSION] = Baseline(
        lorafusion_linear,
        "plain LoRA: no projection; fails without dropout; keeps a dropped x and its mask; sums gradients by atomics, "
        "in any order; its seed is a number of the host, so that all replays have one mask; without TMA, for which it "
        "needs Triton 3.2; an H100's tiles where it does not list the GPU",
        shapes=COMPILED,
        plain=True,
        checkout=lorafusion.OPTION,
        checked_with=BARELY,
        host_seed="kept",
    )
TARGETS = {
    FLOOR: "layer/frozen",
    PEFT: "layer/PEFT",
    "dense P_perp": "layer/dense P_perp",
    FOLDED: "layer/compiled",
    "addmm": "layer/addmm",
    "merge": "layer/merge",
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES, ids=[f"shape-{n}, {shape}" for n, shape in enumerate(SHAPES, 1)])
def test_forward_backward(benchmark, comparison, checkouts, compiled, shape, dropout_p):
    _, M, inputs, outputs, rank, _ = shape
    # y and dX with W; h, h B^T, g, g A, dA and dB. x twice (y, dA), dY once, y and dX out, W twice.
    operations = 4 * M * inputs * outputs + 6 * M * rank * (inputs + outputs)
    work = Work(operations, DTYPE.itemsize * (M * (3 * inputs + 2 * outputs) + 2 * inputs * outputs))
    label = f"{shape}, p={dropout_p}" if dropout_p else str(shape)
    targets = {}
    if ON_GPU and shape == SHAPES[0]:
        targets = {name: f"{target}, dropout" if dropout_p else target for name, target in TARGETS.items()}
        targets = {name: target for name, target in targets.items() if target in bounds()}
    steps = compare(comparison, checkouts, shape, label, dropout_p, work, targets, compiling=compiled)
    pedantic(benchmark, steps.get(OURS))


@pytest.mark.parametrize("shape", SHAPES[:1], ids=str)
def test_forward(benchmark, comparison, checkouts, shape):
    _, M, inputs, outputs, rank, _ = shape
    # y with W, h and h B^T; x, W and y once.
    operations = 2 * M * inputs * outputs + 2 * M * rank * (inputs + outputs)
    work = Work(operations, DTYPE.itemsize * (M * (inputs + outputs) + inputs * outputs))
    steps = compare(comparison, checkouts, shape, f"{shape}, forward", 0.0, work, {}, backward=False)
    pedantic(benchmark, steps.get(OURS))


def compare(
    comparison: Comparison,
    checkouts: Mapping[str, Path | None],
    shape: Shape,
    label: str,
    dropout_p: float,
    work: Work,
    targets: dict[str, str],
    *,
    backward: bool = True,
    compiling: str = "all",
) -> dict[str, Step]:
    """The steps that were timed; code of others comes last: a fault of the device would end what follows."""
    baselines = {name: r for name, r in BASELINES.items() if shape in r.shapes and (r.drops or not dropout_p)}
    if compiling == "without" or (ON_GPU and FOLDED not in targets):
        baselines.pop(FOLDED, None)  # compiled anew for each
    if compiling == "only":
        baselines = {name: r for name, r in baselines.items() if name in (OURS, FOLDED)}
        if FOLDED not in baselines:
            return {}
    if comparison.known(label, baselines):
        return {}
    torch.compiler.reset()
    layer, steps = make_layer(shape), {}
    truths = true_results(layer)
    theirs = [name for name, baseline in baselines.items() if baseline.checkout]
    product = Work((4 if backward else 2) * shape.tokens * shape.inputs * shape.outputs, work.bytes)
    time = partial(
        comparison.time,
        label,
        ours=OURS,
        work=work,
        floors={FLOOR: product},
        targets=targets,
        remarks={name: baseline.remark for name, baseline in BASELINES.items()},
        replays=replays(DEVICE),
        check=partial(check_dropout if dropout_p else check_step, truths, layer),
        launched={name: HOST_SEED for name, r in baselines.items() if dropout_p and r.host_seed == "read"},
        foreign=theirs,
    )

    def prepare_all(names: Collection[str]) -> None:
        for name in names:
            make = partial(prepare, name, layer, truths, checkouts, dropout_p, backward=backward)
            prepared = comparison.attempt(label, name, make, foreign=name in theirs)
            if prepared is not None:
                steps[name] = prepared
        layer.dropout_p = dropout_p

    prepare_all([name for name in baselines if name not in theirs])
    time(steps, again=[OURS] if compiling == "only" else [])
    prepare_all(theirs)
    if OURS in steps and any(name in steps for name in theirs):
        time({name: steps[name] for name in (OURS, *theirs) if name in steps}, again=[OURS])
    return steps


def prepare(
    name: str,
    layer: Layer,
    truths: Mapping[str, list[Tensor]],
    checkouts: Mapping[str, Path | None],
    dropout_p: float,
    *,
    backward: bool,
) -> Callable[[], Any]:
    """The step of a baseline, whose results are right without dropout."""
    baseline = BASELINES[name]
    make = partial(baseline.make, needed(baseline.checkout, checkouts)) if baseline.checkout else baseline.make
    layer.dropout_p = baseline.checked_with
    check(truths, name, step(layer, make(layer), baseline.plan)())
    layer.dropout_p = dropout_p
    run = step(layer, make(layer), baseline.plan, backward=backward)
    if baseline.checkout:
        run()  # finds a failure with this dropout alone
    return run


def step(
    layer: Layer, forward: Callable[[], Tensor], plan: plans.Plan | None, *, backward: bool = True
) -> Callable[[], Any]:
    """One training step of a baseline, or its forward pass as it is taken in training."""
    run = partial(layer.step, forward) if backward else lambda: [forward().detach()]
    if plan is None:
        return run

    def planned() -> list[Tensor]:
        with plans.override(plan):
            return run()

    return planned


def true_results(layer: Layer) -> dict[str, list[Tensor]]:
    """Those of a step in float64 without dropout: y, dX, dA, dB. Of the layer, of plain LoRA, of the frozen layer."""
    x, weight, bias, basis = (t.detach().double() for t in (layer.x, layer.weight, layer.bias, layer.basis))
    factors = {"ours": (layer.A, layer.B), "plain": layer.plain}
    truths = {}
    for name, (A, B) in factors.items():
        leaves = [leaf.detach().double().requires_grad_() for leaf in (x, A, B)]
        projection = basis if name == "ours" else None
        y = reference.complora_linear(leaves[0], weight, bias, *leaves[1:], output_basis=projection, scaling=SCALING)
        truths[name] = [y.detach(), *torch.autograd.grad(y, leaves, layer.dY.double())]
    truths["frozen"] = [F.linear(x, weight, bias), layer.dY.double() @ weight]
    return truths


def check_step(truths: Mapping[str, list[Tensor]], _layer: Layer, name: str, run: Step) -> None:
    check(truths, name, run())


def check_dropout(truths: Mapping[str, list[Tensor]], layer: Layer, name: str, run: Step) -> None:
    """What a baseline adds to the frozen layer is the update in the mean, scatters as it must, and is drawn anew.

    Its noise is n A^T B^T with n = x ∘ (mask / (1 - p) - 1): numbers of mean 0 and variance x² p / (1 - p).
    """
    if name == FLOOR:
        check(truths, name, run())
        return
    kind, (A, B) = ("plain", layer.plain) if BASELINES[name].plain else ("ours", (layer.A, layer.B))
    base, odds = truths["frozen"][0], layer.dropout_p / (1 - layer.dropout_p)
    update = truths[kind][0] - base  # [M, out]
    first, second = (run()[0].double() for _ in range(2))  # a replay writes to the same memory
    noise, weight = first - base - update, update_of(layer, A, B, kind)
    squares = layer.x.detach().double().square()  # [M, in]
    expected = odds * (squares @ weight.square().sum(0)).sum()  # the mean of |noise|²
    deviation = (odds * (squares * (update @ weight).square()).sum()).sqrt() / update.square().sum()
    share = (first - base).mul(update).sum() / update.square().sum()
    assert (share - 1).abs() <= 6 * deviation + 1e-2, f"{name}: {share:.3f} of the update arrives with dropout"
    # A sum of M squares in r directions; one in a hundred for roundings.
    scatter, tolerance = noise.square().sum() / expected, 6 * (2 / len(A) / len(update)) ** 0.5 + 1e-2
    assert (scatter - 1).abs() <= tolerance, f"{name}: drops {scatter:.3f} times what its rate says"
    if BASELINES[name].host_seed != "kept":
        between = (first - second).square().sum() / (2 * expected)
        assert (between - 1).abs() <= tolerance, f"{name}: two runs differ by {between:.3f} of two independent masks"


def update_of(layer: Layer, A: Tensor, B: Tensor, kind: str) -> Tensor:  # [out, in]
    """s P B A, or of plain LoRA s B A, in float64."""
    A, B, basis = A.detach().double(), B.detach().double(), layer.basis.double()
    return SCALING * (B - basis @ (basis.mT @ B) if kind == "ours" else B) @ A


def check(truths: Mapping[str, list[Tensor]], name: str, results: Sequence[Tensor]) -> None:
    """The output and all gradients of a baseline's step, or the output of its forward pass."""
    true = truths["frozen" if name == FLOOR else "plain" if BASELINES[name].plain else "ours"]
    assert len(results) in (1, len(true)), name
    # Sums of 512 to 6304 products in float32; roundings of intermediate results to bfloat16.
    tolerance = 1e-5 if torch.float32 == DTYPE else 2e-2
    for mine, value in zip(results, true, strict=False):
        assert (mine - value).norm() <= tolerance * value.norm(), name
