"""Every operation on every backend with a size of zero: what plain torch gives, or an error that says why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from small_clip import adapted, small_clip
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from triton_device import DEVICE

import complora_kernels as ck
from complora_kernels import blocks, functional, subspace
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.backends import plans
from complora_kernels.backends.plans import Plan
from complora_kernels.blocks import Norm
from complora_kernels.modules import CompLoRALinear, CompLoRAMultiheadAttention

SIZES = {"batch": 2, "length": 3, "in": 8, "out": 12, "hidden": 16, "r": 2, "k": 3, "adapters": 3, "height": 4}
REFUSED = {
    "in": r"expected \[out, in\] with in >= 1",
    "hidden": r"expected \[out, in\] with in >= 1",
    "r": r"expected \[r, in\] and \[out, r\] with r >= 1",
    "adapters": "expected equal ones of at least 1",
}
Tensors = dict[str, Tensor]


class Case(NamedTuple):
    """An operation of some leaves, ours and in plain torch."""

    leaves: Tensors
    ours: Callable[..., Sequence[Tensor]]
    plain: Callable[[Tensors], Sequence[Tensor]]


def projected(rows: Tensor, basis: Tensor) -> Tensor:  # [..., d]
    return rows - rows @ basis.to(rows) @ basis.to(rows).mT


def product(x: Tensor, W: Tensor, b: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], starts: Sequence[int]):
    update = torch.zeros_like(W)
    for A, B, start in zip(As, Bs, starts, strict=True):
        update = update + F.pad(B @ A, (0, 0, start, len(W) - start - len(B)))
    return F.linear(x, W + update, b)


def project_complement(s: dict[str, int]) -> Case:
    U = torch.eye(s["in"], min(s["k"], s["in"]), device=DEVICE)
    return Case(
        {"factor": torch.randn(s["batch"], s["length"], s["in"])},
        lambda t, **options: [functional.project_complement(t["factor"], U, **options)],
        lambda t: [projected(t["factor"], U)],
    )


def fold_factors(s: dict[str, int]) -> Case:
    n = s["adapters"]
    V, U = (torch.eye(s[d], min(s["k"], s[d]), device=DEVICE) for d in ("in", "out"))
    As = {f"A{i}": torch.randn(s["r"], s["in"]) for i in range(n)}
    Bs = {f"B{i}": torch.randn(s["out"], s["r"]) for i in range(n)}

    def ours(t: Tensors, **options: Any) -> list[Tensor]:
        factors = list(t.values())
        folded = functional.fold_factors(factors[:n], factors[n:], [U] * n, [V] * n, scaling=2.0, **options)
        return [*folded[0], *folded[1]]

    def plain(t: Tensors) -> list[Tensor]:
        return [projected(f, V) if f_name < "B" else 2 * projected(f.mT, U).mT for f_name, f in t.items()]

    return Case(As | Bs, ours, plain)


def complora_linear(s: dict[str, int]) -> Case:
    V, U = (torch.eye(s[d], min(s["k"], s[d]), device=DEVICE) for d in ("in", "out"))
    W, b = torch.randn(s["out"], s["in"], device=DEVICE), torch.randn(s["out"], device=DEVICE)
    x = torch.randn(s["batch"], s["length"], s["in"])

    def ours(t: Tensors, **options: Any) -> list[Tensor]:
        return [functional.complora_linear(t["x"], W, b, t["A"], t["B"], output_basis=U, input_basis=V, **options)]

    def plain(t: Tensors) -> list[Tensor]:
        A, B = projected(t["A"], V), projected(t["B"].mT, U).mT
        return [product(t["x"], W.double(), b.double(), [A], [B], [0])]

    return Case({"x": x, "A": torch.randn(s["r"], s["in"]), "B": torch.randn(s["out"], s["r"])}, ours, plain)


class Packed:
    """A product whose adapters update neighbouring rows, `height` each."""

    def __init__(self, s: dict[str, int], name: str = "", inputs: str = "in", outputs: str = "out") -> None:
        self.W, self.b = torch.randn(s[outputs], s[inputs], device=DEVICE), torch.randn(s[outputs], device=DEVICE)
        height = min(s["height"], s[outputs] // max(1, s["adapters"]))
        self.rows = [(i * height, (i + 1) * height) for i in range(s["adapters"])]
        self.names = [f"{name}{factor}{i}" for factor in "AB" for i in range(s["adapters"])]
        shapes = [(s["r"], s[inputs])] * s["adapters"] + [(height, s["r"])] * s["adapters"]
        self.leaves = {key: torch.randn(shape) for key, shape in zip(self.names, shapes, strict=True)}

    def factors(self, t: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        factors = [t[name] for name in self.names]
        return factors[: len(self.rows)], factors[len(self.rows) :]

    def adapted(self, t: Tensors, dropout_p: float) -> AdaptedLinear:
        return AdaptedLinear(self.W, self.b, *self.factors(t), self.rows, dropout_p)

    def plain(self, x: Tensor, t: Tensors) -> Tensor:
        return product(x, self.W.double(), self.b.double(), *self.factors(t), [start for start, _ in self.rows])


def packed_lora_linear(s: dict[str, int]) -> Case:
    fc = Packed(s)

    def ours(t: Tensors, **options: Any) -> list[Tensor]:
        return [functional.packed_lora_linear(t["x"], fc.W, fc.b, *fc.factors(t), fc.rows, **options)]

    x = torch.randn(s["batch"], s["length"], s["in"])
    return Case({"x": x, **fc.leaves}, ours, lambda t: [fc.plain(t["x"], t)])


def norm_lora_linear(s: dict[str, int]) -> Case:
    """Two products read the norm."""
    first, second, norm = Packed(s, "1"), Packed(s, "2"), Norm(torch.randn(s["in"], device=DEVICE), None, 1e-5)

    def ours(t: Tensors, dropout_p: float = 0.0, **options: Any) -> Sequence[Tensor]:
        linears = (first.adapted(t, dropout_p), second.adapted(t, dropout_p))
        return blocks.norm_lora_linear(t["x"], t["delta"], norm, *linears, **options)

    def plain(t: Tensors) -> list[Tensor]:
        stream = t["x"] + t["delta"]
        normed = F.layer_norm(stream, (s["in"],), norm.weight.double(), None, norm.eps)
        return [stream, first.plain(normed, t), second.plain(normed, t)]

    x = torch.randn(s["batch"], s["length"], s["in"])
    return Case({"x": x, "delta": x.roll(1), **first.leaves, **second.leaves}, ours, plain)


def norm_lora_mlp(s: dict[str, int]) -> Case:
    """fc2 has as many adapters as fc1: behind the activation too."""
    fc1, fc2 = Packed(s, "1", "in", "hidden"), Packed({**s, "height": s["height"] // 2}, "2", "hidden", "in")
    norm = Norm(torch.randn(s["in"], device=DEVICE), None, 1e-5)

    def ours(t: Tensors, dropout_p: float = 0.0, **options: Any) -> list[Tensor]:
        linears = (fc1.adapted(t, dropout_p), fc2.adapted(t, dropout_p))
        return [blocks.norm_lora_mlp(t["x"], t["delta"], norm, *linears, "gelu", **options)]

    def plain(t: Tensors) -> list[Tensor]:
        stream = t["x"] + t["delta"]
        normed = F.layer_norm(stream, (s["in"],), norm.weight.double(), None, norm.eps)
        return [stream + fc2.plain(F.gelu(fc1.plain(normed, t)), t)]

    x = torch.randn(s["batch"], s["length"], s["in"])
    return Case({"x": x, "delta": x.roll(1), **fc1.leaves, **fc2.leaves}, ours, plain)


OPERATIONS: dict[Callable[[dict[str, int]], Case], tuple[str, str]] = {  # which sizes may be zero, which are refused
    project_complement: ("batch length in k", ""),
    fold_factors: ("in out k", "adapters r"),
    complora_linear: ("batch length out k", "in r"),
    packed_lora_linear: ("batch length out height", "in r adapters"),
    norm_lora_linear: ("batch length out adapters height", "in r"),
    norm_lora_mlp: ("batch length adapters height", "hidden r"),
}
DROPPING = (complora_linear, packed_lora_linear, norm_lora_linear, norm_lora_mlp)


def gradients(outputs: Sequence[Tensor], leaves: Tensors) -> Iterator[Tensor]:
    if leaves:
        weights = [torch.linspace(1, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape) for y in outputs]
        grads = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
        yield from (torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves.values(), strict=True))


def check(case: Case, *, dropout_p: float = 0.0, **options: Any) -> None:
    """Results and gradients. With dropout B is zero: only the gradient of B sees the mask, and it is not compared."""
    here = {
        name: (0 * leaf if dropout_p and "B" in name else leaf).to(DEVICE).requires_grad_()
        for name, leaf in case.leaves.items()
    }
    there = {name: leaf.detach().double().requires_grad_() for name, leaf in here.items()}
    dropping = {"dropout_p": dropout_p} if dropout_p else {}
    ours, plain = case.ours(here, **dropping, **options), case.plain(there)
    names = [*(f"output {i}" for i in range(len(plain))), *(f"gradient of {name}" for name in here)]
    pairs = zip(names, [*ours, *gradients(ours, here)], [*plain, *gradients(plain, there)], strict=True)
    for name, mine, exact in pairs:
        assert mine.shape == exact.shape, name
        if dropout_p and "B" in name:
            assert mine.isfinite().all(), name
        else:
            tolerance = 1e-5 * exact.detach().norm() + 1e-6  # of float32
            assert (mine.double() - exact).norm() <= tolerance, name


@pytest.mark.parametrize("backend", ["reference", "torch", "triton", "extension"])
@pytest.mark.parametrize(
    ("operation", "zero"),
    [(operation, zero) for operation, sizes in OPERATIONS.items() for zero in " ".join(["nothing", *sizes]).split()],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_size_of_zero(operation, zero, backend):
    case = operation({**SIZES, zero: 0})
    for dropout_p in (0.0, 0.25) if operation in DROPPING else (0.0,):
        if zero in OPERATIONS[operation][1]:
            with pytest.raises(ValueError, match=REFUSED[zero]):
                check(case, dropout_p=dropout_p, backend=backend)
        elif backend == "triton" and operation in DROPPING and zero in ("out", "height"):
            with pytest.raises(RuntimeError, match=r"backend='triton' does not support .*: rows="):
                check(case, dropout_p=dropout_p, backend=backend)
        else:
            check(case, dropout_p=dropout_p, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("plan", ["concat", "merge", "addmm"])
@pytest.mark.parametrize("zero", ["nothing", "batch", "out", "height"])
def test_a_size_of_zero_by_every_plan(zero, plan, backend):
    if backend == "triton" and zero in ("out", "height"):
        return  # not served
    with plans.override(Plan(plan)):
        check(packed_lora_linear({**SIZES, zero: 0}), backend=backend)
        check(norm_lora_mlp({**SIZES, zero: 0}), backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch", "extension"])
def test_an_adapter_of_no_rows_beside_others(backend):
    """The extension serves equal heights."""
    x, W = torch.randn(5, 8), torch.randn(12, 8)
    As, Bs, rows = (
        [torch.randn(2, 8) for _ in range(3)],
        [torch.randn(n, 2) for n in (4, 0, 8)],
        [(0, 4), (4, 4), (4, 12)],
    )
    if backend == "extension":
        with pytest.raises(RuntimeError, match="backend='extension' does not support packed_lora_linear: rows="):
            functional.packed_lora_linear(x, W, None, As, Bs, rows, backend=backend)
        return
    y = functional.packed_lora_linear(x, W, None, As, Bs, rows, backend=backend)
    torch.testing.assert_close(y, product(x, W, torch.zeros(12), As, Bs, [0, 4, 4]))


CONFIG = ck.CompLoRAConfig(r=2, lora_alpha=2.0, subspace_ratio=0.5, sides="both", target_modules=("q", "k", "v", "o"))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_linear_layer_of_no_outputs_or_inputs():
    layer = CompLoRALinear.from_linear(nn.Linear(4, 0).requires_grad_(False), CONFIG)
    x = torch.randn(3, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer(x).shape == (3, 0)
    assert [g is not None and g.shape for g in (x.grad, layer.lora_A.grad, layer.lora_B.grad)] == [
        (3, 4),
        (2, 4),
        (0, 2),
    ]
    layer.merge()
    layer.unmerge()
    with pytest.raises(ValueError, match=r"fc has a weight of shape \(4, 0\), expected \[out, in\] with in >= 1"):
        CompLoRALinear.from_linear(nn.Linear(0, 4), CONFIG, path="fc")


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_of_an_empty_batch_or_sequence(shape, batch_first):
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first).requires_grad_(False)
    layer = CompLoRAMultiheadAttention.from_attention(plain, CONFIG)
    x = torch.randn(shape, requires_grad=True)
    padding = torch.zeros(shape[:-1] if batch_first or len(shape) == 2 else (shape[1], shape[0]), dtype=torch.bool)
    for need_weights in (False, True):
        y, weights = layer(x, x, x, need_weights=need_weights, key_padding_mask=padding)
        expected_y, expected_weights = plain(x, x, x, need_weights=need_weights)
        assert (y.shape, weights is None or weights.shape) == (
            expected_y.shape,
            expected_weights is None or expected_weights.shape,
        )
        assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize("shape", [(0, 6, 32), (2, 0, 32)], ids=str)
def test_a_residual_block_of_an_empty_batch_or_sequence(shape):
    model = adapted(small_clip())
    x = torch.empty(shape, requires_grad=True)
    y = model.transformer.resblocks[0](x)
    y.sum().backward()
    assert x.grad is not None
    assert y.shape == x.grad.shape == shape
    assert all(p.grad is None or not p.grad.any() for p in ck.adapter_parameters(model))


@pytest.mark.parametrize("size", [{"k": 0}, {"ratio": 0.0}, {"ratio": 1.0}, {"energy": 0.5}], ids=str)
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)], ids=str)
def test_bases_of_weights_of_no_elements(shape, size):
    """Nothing is protected, all is left."""
    weight = torch.empty(shape)
    sides: list[tuple[subspace.Side, int]] = [("output", shape[0]), ("input", shape[1])]
    for side, d in sides:
        for moment in (None, torch.eye(shape[1])):
            assert subspace.principal_basis(weight, side=side, second_moment=moment, **size).shape == (d, 0)
            left = subspace.complement_basis(weight, side=side, second_moment=moment, **size)
            torch.testing.assert_close(left @ left.mT, torch.eye(d))


# ---- what is no size, number or memory


def arguments(**changed: Any) -> dict[str, Any]:
    known = {"x": torch.ones(5, 8), "weight": torch.ones(12, 8), "bias": None, "lora_A": torch.ones(2, 8)}
    return {**known, "lora_B": torch.ones(12, 2), **changed}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scaling": float("nan")}, "scaling=nan, expected a finite number"),
        ({"scaling": float("inf")}, "scaling=inf, expected a finite number"),
        ({"dropout_p": 1.0}, r"dropout_p=1.0, expected a probability in [0, 1)"),
        ({"dropout_p": True}, r"dropout_p=True, expected a probability in [0, 1)"),
        ({"dropout_p": float("nan")}, r"dropout_p=nan, expected a probability in [0, 1)"),
        ({"lora_A": torch.ones(2, 8).long()}, "lora_A and lora_B have dtypes torch.int64 and torch.float32, expected"),
        (
            {"lora_B": torch.ones(12, 2) + 0j},
            "lora_A and lora_B have dtypes torch.float32 and torch.complex64, expected",
        ),
        (
            {"x": torch.ones(5, 8).long(), "weight": torch.ones(12, 8).long()},
            "x has dtype torch.int64, expected a floating-point one",
        ),
        (
            {"x": torch.ones(5, 8) + 0j, "weight": torch.ones(12, 8) + 0j},
            "x has dtype torch.complex64, expected a floating-point one",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch", "extension"])
def test_arguments_that_would_pass_for_others(backend, changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        functional.complora_linear(**arguments(**changed), backend=backend)


def test_folded_factors_are_floating_point():
    with pytest.raises(ValueError, match=r"dtype=torch\.int64, expected a floating-point one"):
        functional.fold_factors([torch.ones(2, 8)], [torch.ones(8, 2)], [None], [None], dtype=torch.int64)


@pytest.mark.parametrize("backend", ["reference", "torch", "extension"])
@pytest.mark.parametrize("rows", [[(8, 12), (0, 4)], [(2, 6), (4, 8)], [(1, 5), (1, 5)]], ids=str)
def test_rows_in_any_order_and_over_each_other(rows, backend):
    x, W, b = torch.randn(5, 8), torch.randn(12, 8), torch.randn(12)
    As, Bs = [torch.randn(2, 8) for _ in rows], [torch.randn(4, 2) for _ in rows]
    expected = product(x, W, b, As, Bs, [start for start, _ in rows])
    for plan in (None,) if backend == "reference" else ("concat", "merge", "addmm"):
        with plans.override(Plan(plan or "addmm")):
            y = functional.packed_lora_linear(x, W, b, As, Bs, rows, backend=backend)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_sizes_beyond_64_bits():
    """Factors that are one element of memory each: their sizes, summed, wrap around to a small one."""
    big = torch.zeros(1, 1).expand(2**31, 2**31)
    given = [big, big, torch.zeros(4, 4)]
    with pytest.raises(RuntimeError, match=r"a size is 4611686018427387904 \+ 4611686018427387904, expected less than"):
        functional.fold_factors(given, given, [None] * 3, [None] * 3, backend="extension")


@pytest.mark.parametrize("activation", blocks.ACTIVATIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_views_that_negate_their_memory_in_a_block(activation, dropout_p):
    """Kernels read memory: by name they do not serve such an input; a gradient of that kind is resolved."""
    x, W1, W2 = torch.randn(5, 8), torch.randn(16, 8), torch.randn(8, 16)
    fc1, fc2 = (
        AdaptedLinear(W1, None),
        AdaptedLinear(W2, None, [torch.randn(2, 16)], [torch.randn(8, 2)], [(0, 8)], dropout_p),
    )
    norm = Norm(torch.ones(8), None, 1e-5)
    x, norm, fc1, fc2 = tree_map_only(Tensor, lambda t: t.to(DEVICE), (x, norm, fc1, fc2))
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    with pytest.raises(RuntimeError, match=r"backend='triton' does not support norm_lora_mlp: .* negates"):
        blocks.norm_lora_mlp(negative, None, norm, fc1, fc2, activation, backend="triton")
    leaf = x.clone().requires_grad_()
    y = blocks.norm_lora_mlp(leaf, None, norm, fc1, fc2, activation, backend="triton")
    given = torch.autograd.grad(y, leaf, negative, retain_graph=True), torch.autograd.grad(y, leaf, negative.clone())
    assert torch.equal(given[0][0], given[1][0])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, which Triton's interpreter computes with
@pytest.mark.parametrize(
    ("backend", "plan"),
    [("torch", "merge"), ("torch", "addmm"), ("triton", "fused"), ("triton", "merge"), ("triton", "addmm")],
)
def test_an_infinite_adapter_stays_in_its_rows(backend, plan):
    x, W = torch.rand(5, 8, device=DEVICE), torch.randn(12, 8, device=DEVICE)
    As, Bs = [torch.rand(2, 8, device=DEVICE) for _ in range(3)], [torch.rand(4, 2, device=DEVICE) for _ in range(3)]
    As[1] *= torch.inf
    rows = [(0, 4), (4, 8), (8, 12)]
    with plans.override(Plan(plan)):
        y = functional.packed_lora_linear(x, W, None, As, Bs, rows, backend=backend)
    assert (y[:, 4:8] == torch.inf).all()
    assert torch.cat([y[:, :4], y[:, 8:]], 1).isfinite().all()
