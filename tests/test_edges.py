"""Every operation on every backend with sizes of zero: what plain torch gives, or an error that says what was expected."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from triton_device import DEVICE

from complora_kernels import functional, functional_block
from complora_kernels.functional_block import AdaptedLinear, Norm

BACKENDS = ("reference", "torch", "triton", "extension")
SIZES = {"batch": 2, "length": 3, "in": 8, "out": 12, "hidden": 16, "r": 2, "k": 3, "adapters": 3, "height": 4}
Outputs = Sequence[Tensor]
Operation = tuple[dict[str, Tensor], Callable[[dict[str, Tensor], dict[str, Any]], Outputs], Callable[..., Outputs]]


def basis(d: int, k: int) -> Tensor:  # [d, k]
    return torch.eye(d, min(k, d))


def without(basis: Tensor, rows: Tensor) -> Tensor:  # [..., d]
    return rows - rows @ basis.to(rows) @ basis.to(rows).mT


def product(x: Tensor, W: Tensor, b: Tensor, As: Outputs, Bs: Outputs, starts: Sequence[int]) -> Tensor:
    delta = torch.zeros_like(W)
    for A, B, start in zip(As, Bs, starts, strict=True):
        delta = delta + F.pad(B @ A, (0, 0, start, len(W) - start - len(B)))
    return F.linear(x, W + delta, b)


def project_complement(s: dict[str, int]) -> Operation:
    U = basis(s["in"], s["k"])
    leaves = {"factor": torch.randn(s["batch"], s["length"], s["in"])}
    return (
        leaves,
        lambda t, o: [functional.project_complement(t["factor"], U.to(DEVICE), **o)],
        lambda t: [without(U, t["factor"])],
    )


def project_complement_(s: dict[str, int]) -> Operation:
    U = basis(s["in"], s["k"])
    leaves = {"factor": torch.randn(s["batch"], s["length"], s["in"])}
    return (
        leaves,
        lambda t, o: [functional.project_complement_(1 * t["factor"], U.to(DEVICE), **o)],
        lambda t: [without(U, t["factor"])],
    )


def fold_factors(s: dict[str, int]) -> Operation:
    layers = s["adapters"]
    V, U = basis(s["in"], s["k"]), basis(s["out"], s["k"])
    leaves = {f"A{i}": torch.randn(s["r"], s["in"]) for i in range(layers)}
    leaves |= {f"B{i}": torch.randn(s["out"], s["r"]) for i in range(layers)}

    def ours(t: dict[str, Tensor], o: dict[str, Any]) -> Outputs:
        factors = list(t.values())
        bases = [[U.to(DEVICE)] * layers, [V.to(DEVICE)] * layers]
        As, Bs = functional.fold_factors(factors[:layers], factors[layers:], *bases, scaling=2.0, **o)
        return [*As, *Bs]

    def exact(t: dict[str, Tensor]) -> Outputs:
        factors = list(t.values())
        return [without(V, A) for A in factors[:layers]] + [2 * without(U, B.mT).mT for B in factors[layers:]]

    return leaves, ours, exact


def complora_linear(s: dict[str, int]) -> Operation:
    V, U = basis(s["in"], s["k"]), basis(s["out"], s["k"])
    W, b = torch.randn(s["out"], s["in"]), torch.randn(s["out"])
    leaves = {
        "x": torch.randn(s["batch"], s["length"], s["in"]),
        "A": torch.randn(s["r"], s["in"]),
        "B": torch.randn(s["out"], s["r"]),
    }

    def ours(t: dict[str, Tensor], o: dict[str, Any]) -> Outputs:
        bases = {"output_basis": U.to(DEVICE), "input_basis": V.to(DEVICE)}
        return [functional.complora_linear(t["x"], W.to(DEVICE), b.to(DEVICE), t["A"], t["B"], **bases, **o)]

    def exact(t: dict[str, Tensor]) -> Outputs:
        return [product(t["x"], W.double(), b.double(), [without(V, t["A"])], [without(U, t["B"].mT).mT], [0])]

    return leaves, ours, exact


def packed(s: dict[str, int], name: str, inputs: str, outputs: int) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
    """As, Bs and rows: neighbours from the first row on."""
    rows = [(i * s["height"], (i + 1) * s["height"]) for i in range(s["adapters"])]
    rows = [(min(a, outputs), min(b, outputs)) for a, b in rows]
    As = {f"{name}A{i}": torch.randn(s["r"], s[inputs]) for i in range(len(rows))}
    return As | {f"{name}B{i}": torch.randn(b - a, s["r"]) for i, (a, b) in enumerate(rows)}, rows


def factors_of(t: dict[str, Tensor], name: str) -> tuple[list[Tensor], list[Tensor]]:
    return tuple([tensor for key, tensor in t.items() if key.startswith(name + part)] for part in "AB")  # type: ignore


def packed_lora_linear(s: dict[str, int]) -> Operation:
    W, b = torch.randn(s["out"], s["in"]), torch.randn(s["out"])
    factors, rows = packed(s, "", "in", s["out"])
    leaves = {"x": torch.randn(s["batch"], s["length"], s["in"]), **factors}

    def ours(t: dict[str, Tensor], o: dict[str, Any]) -> Outputs:
        return [functional.packed_lora_linear(t["x"], W.to(DEVICE), b.to(DEVICE), *factors_of(t, ""), rows, **o)]

    def exact(t: dict[str, Tensor]) -> Outputs:
        return [product(t["x"], W.double(), b.double(), *factors_of(t, ""), [start for start, _ in rows])]

    return leaves, ours, exact


def norm_lora_linear(s: dict[str, int]) -> Operation:
    W, b, w = torch.randn(s["out"], s["in"]), torch.randn(s["out"]), torch.randn(s["in"])
    factors, rows = packed(s, "", "in", s["out"])
    x = torch.randn(s["batch"], s["length"], s["in"])
    leaves = {"x": x, "delta": x.roll(1), **factors}

    def ours(t: dict[str, Tensor], o: dict[str, Any]) -> Outputs:
        p = o.pop("dropout_p", 0.0)
        linear = AdaptedLinear(W.to(DEVICE), b.to(DEVICE), *factors_of(t, ""), rows, p)
        norm = Norm(w.to(DEVICE), None, 1e-5)
        return functional_block.norm_lora_linear(t["x"], t["delta"], norm, linear, **o)

    def exact(t: dict[str, Tensor]) -> Outputs:
        stream = t["x"] + t["delta"]
        normed = F.layer_norm(stream, (s["in"],), w.double(), None, 1e-5)
        starts = [start for start, _ in rows]
        return [stream, product(normed, W.double(), b.double(), *factors_of(t, ""), starts)]

    return leaves, ours, exact


def norm_lora_mlp(s: dict[str, int]) -> Operation:
    W1, W2 = torch.randn(s["hidden"], s["in"]), torch.randn(s["in"], s["hidden"])
    b1, b2, w = torch.randn(s["hidden"]), torch.randn(s["in"]), torch.randn(s["in"])
    one = {**s, "adapters": min(s["adapters"], 1)}
    factors1, rows1 = packed({**one, "height": s["hidden"] if s["height"] else 0}, "fc1", "in", s["hidden"])
    factors2, rows2 = packed({**one, "height": s["in"] if s["height"] else 0}, "fc2", "hidden", s["in"])
    x = torch.randn(s["batch"], s["length"], s["in"])
    leaves = {"x": x, "delta": x.roll(1), **factors1, **factors2}

    def ours(t: dict[str, Tensor], o: dict[str, Any]) -> Outputs:
        p = o.pop("dropout_p", 0.0)
        fc1 = AdaptedLinear(W1.to(DEVICE), b1.to(DEVICE), *factors_of(t, "fc1"), rows1, p)
        fc2 = AdaptedLinear(W2.to(DEVICE), b2.to(DEVICE), *factors_of(t, "fc2"), rows2, p)
        norm = Norm(w.to(DEVICE), None, 1e-5)
        return [functional_block.norm_lora_mlp(t["x"], t["delta"], norm, fc1, fc2, "gelu", **o)]

    def exact(t: dict[str, Tensor]) -> Outputs:
        stream = t["x"] + t["delta"]
        normed = F.layer_norm(stream, (s["in"],), w.double(), None, 1e-5)
        z = product(normed, W1.double(), b1.double(), *factors_of(t, "fc1"), [start for start, _ in rows1])
        y = product(F.gelu(z), W2.double(), b2.double(), *factors_of(t, "fc2"), [start for start, _ in rows2])
        return [stream + y]

    return leaves, ours, exact


OPERATIONS = {
    project_complement: "batch length in k",
    project_complement_: "batch length in k",
    fold_factors: "adapters in out r k",
    complora_linear: "batch length in out r k",
    packed_lora_linear: "batch length in out r adapters height",
    norm_lora_linear: "batch length in out r adapters height",
    norm_lora_mlp: "batch length in hidden r adapters height",
}
CASES = [(operation, name) for operation, names in OPERATIONS.items() for name in names.split()]


def run(operation, sizes, backend, **options):
    leaves, ours, exact = operation(sizes)
    here = {name: leaf.to(DEVICE if backend == "triton" else DEVICE).requires_grad_() for name, leaf in leaves.items()}
    there = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    y = ours(here, {**options, "backend": backend})
    z = exact(there)

    def grads(outs, ls):
        if not ls:
            return []
        loss = sum((o * torch.arange(1, o.numel() + 1, dtype=o.dtype).view(o.shape).cos()).sum() for o in outs)
        return torch.autograd.grad(loss, list(ls.values()), allow_unused=True, materialize_grads=True)

    return leaves, y, z, grads(y, here), grads(z, there)


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operation", "zero"), CASES, ids=lambda v: getattr(v, "__name__", v))
def test_a_size_of_zero(operation, zero, backend, p):
    if p and operation in (project_complement, project_complement_, fold_factors):
        return
    sizes = {**SIZES, zero: 0}
    kw = {"dropout_p": p} if p else {}
    leaves, y, z, gy, gz = run(operation, sizes, backend, **kw)
    for a, b in zip([*y, *gy], [*z, *gz], strict=True):
        assert a.shape == b.shape
        assert a.isfinite().all()
        if not p:
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
