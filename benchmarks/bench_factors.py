"""How fast are the operations on factors: projecting one, folding those of a whole model, and summing their gradients?

`make bench` runs it: the C++ half of the extension against torch's own products on a CPU, its CUDA half and the Triton
kernels against the time to read their operands once on a GPU. Everyone is checked against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.comparison import Comparison, Work, pedantic
from complora_kernels import backends, reference
from complora_kernels.backends.extension import ExtensionBackend
from complora_kernels.functional import fold_factors, project_complement
from complora_kernels.replays import replays

RANK, WIDTH, LAYERS = 16, 768, 72  # q, k, v, o, fc1, fc2 of twelve blocks, were all of them square
OURS = "extension"
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # activations have this dtype, factors and bases float32
TOKENS = 197 * (256 if ON_GPU else 32)
EXACT = 1e-5  # sums of 768 to 50,432 products in float32
REMARKS = {
    f"{LAYERS} calls of the torch backend": "ours, layer by layer",
    "torch backend": "ours by another backend",
    "triton": "ours by another backend",
    "one read of the bases": "the floor: computes nothing of it",
    "one read of dY and x": "the floor: computes nothing of it",
}

Step = Callable[[], Sequence[Tensor]]


@pytest.fixture(autouse=True)
def built() -> None:
    reason = backends.REGISTRY[OURS].unavailable() or (ExtensionBackend().gpu_refusal(None) if ON_GPU else None)
    assert reason is None, reason


@pytest.mark.parametrize("k", [64, 384])
def test_project_complement(benchmark, comparison, k):
    torch.manual_seed(0)
    factor = torch.randn(RANK, WIDTH, device=DEVICE, requires_grad=True)  # [r, d]
    basis, grad = random_basis(k), torch.randn(RANK, WIDTH, device=DEVICE)  # [d, k], [r, d]

    def by(backend: str) -> Step:
        return lambda: differentiated(project_complement(factor, basis, backend=backend), factor, grad)

    def two_products() -> Sequence[Tensor]:
        return differentiated(factor - (factor @ basis) @ basis.mT, factor, grad)

    exact = [reference.project_complement(tensor.detach().double(), basis.double()) for tensor in (factor, grad)]
    steps = {OURS: by(OURS), "torch's two products": two_products, "torch backend": by("torch")}
    shape = f"project_complement r={RANK} d={WIDTH} k={k}, forward and backward"
    targets = {"torch's two products": "factors/project"} if k > 64 else {}
    # Two products of two directions; the factor and its gradient in and out, the basis once.
    work = Work(2 * 4 * RANK * WIDTH * k, 4 * (4 * RANK * WIDTH + WIDTH * k))
    compare(benchmark, comparison, shape, steps, exact, targets, work)


@pytest.mark.parametrize("k", [64, 384])
def test_fold_factors(benchmark, comparison, k):
    torch.manual_seed(0)
    As = [torch.randn(RANK, WIDTH, device=DEVICE) for _ in range(LAYERS)]  # each [r, d]
    Bs = [torch.randn(WIDTH, RANK, device=DEVICE) for _ in range(LAYERS)]  # each [d, r]
    bases: list[Tensor] = list(torch.stack([random_basis(k)] * LAYERS))  # each [d, k], in memory of its own
    no_bases = [None] * LAYERS

    def in_one_call(backend: str) -> Step:
        return lambda: folded(fold_factors(As, Bs, bases, no_bases, backend=backend))

    def layer_by_layer() -> Sequence[Tensor]:
        layers = [fold_factors([A], [B], [U], [None], backend="torch") for A, B, U in zip(As, Bs, bases, strict=True)]
        return [*(A for (A,), _ in layers), *(B for _, (B,) in layers)]

    exact = [A.double() for A in As] + [
        reference.project_complement(B.double().mT, U.double()).mT for B, U in zip(Bs, bases, strict=True)
    ]
    steps = {OURS: in_one_call(OURS), f"{LAYERS} calls of the torch backend": layer_by_layer}
    steps["torch backend"] = in_one_call("torch")
    targets = {f"{LAYERS} calls of the torch backend": "factors/fold"} if k == 64 and not ON_GPU else {}
    if ON_GPU:
        everything = torch.stack(bases)
        steps["triton"] = in_one_call("triton")
        steps["one read of the bases"] = lambda: [everything.sum()]
        targets["one read of the bases"] = f"factors/fold, read, k={k}"
    shape = f"fold_factors of {LAYERS} layers r={RANK} d={WIDTH} k={k}"
    # Two products a layer; A and B in and out, each basis once.
    work = Work(LAYERS * 4 * RANK * WIDTH * k, LAYERS * 4 * (4 * RANK * WIDTH + WIDTH * k))
    compare(benchmark, comparison, shape, steps, exact, targets, work)


def test_factor_grads(benchmark, comparison):
    torch.manual_seed(0)
    dY, x = (torch.randn(TOKENS, WIDTH, device=DEVICE).to(DTYPE) for _ in range(2))  # [M, N], [M, K]
    h, g = (torch.randn(TOKENS, RANK, device=DEVICE).to(DTYPE) for _ in range(2))  # [M, r]

    def extension() -> Sequence[Tensor]:
        sums = torch.ops.complora.packed_lora_linear_factor_grads
        dA, dB = sums(dY, x, h, g, [0], WIDTH, 0.0, None, [True, True])
        return dA[0], dB[0]

    def two_products() -> Sequence[Tensor]:
        return g.mT @ x, dY.mT @ h

    exact = [g.double().mT @ x.double(), dY.double().mT @ h.double()]
    steps: dict[str, Step] = {OURS: extension, "torch's two products": two_products}
    targets = {}
    if ON_GPU:
        steps["one read of dY and x"] = lambda: [dY.sum(), x.sum()]
        targets["one read of dY and x"] = "factors/gradients, read"
    shape = f"packed_lora_linear_factor_grads M={TOKENS} N=K={WIDTH} r={RANK} {DTYPE}"
    # Two products; dY, x, h and g in, dA and dB out.
    work = Work(4 * TOKENS * RANK * WIDTH, DTYPE.itemsize * 2 * (TOKENS * (WIDTH + RANK) + RANK * WIDTH))
    # Everyone rounds the sums to the dtype of the activations.
    compare(benchmark, comparison, shape, steps, exact, targets, work, 1e-2 if ON_GPU else EXACT)


def random_basis(k: int) -> Tensor:  # [d, k]
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q[:, :k].float().contiguous().to(DEVICE)


def differentiated(result: Tensor, factor: Tensor, grad: Tensor) -> Sequence[Tensor]:
    return result.detach(), torch.autograd.grad(result, factor, grad)[0]


def folded(factors: tuple[list[Tensor], list[Tensor]]) -> Sequence[Tensor]:
    return [*factors[0], *factors[1]]


def compare(
    benchmark,
    comparison: Comparison,
    shape: str,
    steps: dict[str, Step],
    exact: Sequence[Tensor],
    targets: dict[str, str],
    work: Work,
    tolerance: float = EXACT,
) -> None:
    """Checks everyone's results but a mere read's, and times all in turns."""
    if comparison.known(shape, steps):
        return

    def check(name: str, run: Step) -> None:
        if not name.startswith("one read"):
            for mine, true in zip(run(), exact, strict=True):
                assert (mine - true).norm() <= tolerance * true.norm(), name

    reads = {name: None for name in steps if name.startswith("one read")}
    comparison.time(
        shape,
        steps,
        ours=OURS,
        targets=targets,
        work=work,
        floors=reads,
        remarks=REMARKS,
        replays=replays(DEVICE),
        check=check,
    )
    pedantic(benchmark, steps[OURS])
