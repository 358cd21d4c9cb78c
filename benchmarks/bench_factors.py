"""How fast are the operations on factors: projecting one, folding those of a whole model, and their gradients?

`make bench` runs it: the C++ half of the extension against torch's own products on a CPU, its CUDA half and the Triton
kernels against the time to read their operands once on a GPU. Everyone is checked against float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from benchmarks.interleaved import time_interleaved
from complora_kernels import backends, reference
from complora_kernels.functional import fold_factors, project_complement

RANK, WIDTH, LAYERS = 16, 768, 72  # q, k, v, o, fc1, fc2 of twelve blocks, were all of them square
OURS = "extension"
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # of activations; factors and bases are float32
TOKENS = 197 * (256 if ON_GPU else 32)
TOLERANCE = 1e-5 if torch.float32 == DTYPE else 1e-2  # sums of 768 to 50,432 products; roundings to bfloat16

Step = Callable[[], Sequence[Tensor]]


@pytest.fixture(autouse=True)
def built() -> None:
    reason = backends.BACKENDS[OURS].unavailable() or (backends.gpu_refusal(OURS, None) if ON_GPU else None)
    assert reason is None, reason


@pytest.mark.parametrize("k", [64, 384])
def test_project_complement(benchmark, rounds, record, k):
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
    compare(
        benchmark, rounds, record, shape, steps, exact, {"torch's two products": "factors/project"} if k > 64 else {}
    )


@pytest.mark.parametrize("k", [64, 384])
def test_fold_factors(benchmark, rounds, record, k):
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
    compare(benchmark, rounds, record, shape, steps, exact, targets)


def test_complora_factor_grads(benchmark, rounds, record):
    k = 384
    torch.manual_seed(0)
    dY, x = (torch.randn(TOKENS, WIDTH, device=DEVICE).to(DTYPE) for _ in range(2))  # [M, N], [M, K]
    h, g = (torch.randn(TOKENS, RANK, device=DEVICE).to(DTYPE) for _ in range(2))  # [M, r]
    basis = random_basis(k)  # [N, k]

    def extension() -> Sequence[Tensor]:
        dA, dB = torch.ops.complora.complora_factor_grads(
            dY, x, h, g, [0], WIDTH, [basis], [None], [False], [False], 1.0, 0.0, None, [True, True], torch.float32
        )
        return dA[0], dB[0]

    def products() -> Sequence[Tensor]:
        dB = (dY.mT @ h).float()
        return (g.mT @ x).float(), dB - basis @ (basis.mT @ dB)

    dB = dY.double().mT @ h.double()
    exact = [g.double().mT @ x.double(), reference.project_complement(dB.mT, basis.double()).mT]
    steps: dict[str, Step] = {OURS: extension, "torch's four products": products}
    targets = {}
    if ON_GPU:
        steps["one read of dY and x"] = lambda: [dY.sum(), x.sum()]
        targets["one read of dY and x"] = "factors/gradients, read"
    shape = f"complora_factor_grads M={TOKENS} N=K={WIDTH} r={RANK} k={k} {DTYPE}"
    compare(benchmark, rounds, record, shape, steps, exact, targets)


def random_basis(k: int) -> Tensor:  # [d, k]
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q[:, :k].float().contiguous().to(DEVICE)


def differentiated(result: Tensor, factor: Tensor, grad: Tensor) -> Sequence[Tensor]:
    return result.detach(), torch.autograd.grad(result, factor, grad)[0]


def folded(factors: tuple[list[Tensor], list[Tensor]]) -> Sequence[Tensor]:
    return [*factors[0], *factors[1]]


def compare(
    benchmark, rounds, record, shape: str, steps: dict[str, Step], exact: Sequence[Tensor], targets: dict[str, str]
) -> None:
    """Checks everyone's results but a mere read's, times all in turns and records the ratios."""
    for name, step in steps.items():
        if not name.startswith("one read"):
            for mine, true in zip(step(), exact, strict=True):
                assert (mine - true).norm() <= TOLERANCE * true.norm(), name
    for name, timing in time_interleaved(steps, ours=OURS, rounds=rounds, device=DEVICE).items():
        low, ratio, high = timing.spread()
        row = {
            "shape": shape,
            "rival": name,
            "median_s": sorted(timing.seconds)[rounds // 2],
            "ratio": ratio,
            "ratio_p20": low,
            "ratio_p80": high,
            "rounds": rounds,
            "remark": "",
        }
        if name in targets:
            row["target"], row["figure"] = targets[name], 1 / ratio if name.startswith("one read") else ratio
        record(row)
    benchmark.pedantic(steps[OURS], rounds=3)
