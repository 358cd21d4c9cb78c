"""The triton backend through the public functions: every plan's accuracy, autograd's uses, compilation, refusals."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import peft
import pytest
import torch
from layers import LEAVES, Layer, assert_accurate, laid_out, make_layer, packed_reference, results
from numerics import random_basis
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._mode_utils import no_dispatch
from torch.utils.checkpoint import checkpoint
from triton_device import DEVICE, masks_of, next_seed

from complora_kernels import backends, reference
from complora_kernels.backends import hardware, plans
from complora_kernels.backends.plans import Plan
from complora_kernels.backends.triton import TritonBackend
from complora_kernels.functional import (
    complora_linear,
    fold_factors,
    lora_linear,
    packed_lora_linear,
    project_complement,
)
from complora_kernels.kernels import tiles

OPS = torch.ops.complora_triton
GIVEN, INSIDE = Plan("fused", "given"), Plan("fused", "inside")
CONCAT, MERGE, ADDMM = Plan("concat"), Plan("merge"), Plan("addmm")
HALF = (torch.bfloat16, torch.float16)


def dtype_for(plan: Plan) -> torch.dtype:
    """In float32 h is never computed inside: there `INSIDE` is `GIVEN`."""
    return torch.bfloat16 if plan == INSIDE else torch.float32


def triton_layer(**options: Any) -> Layer:
    """As `make_layer`, where the kernels run."""
    layer = make_layer(**options)
    tensors = {field.name: getattr(layer, field.name) for field in fields(layer)}
    return replace(layer, **{name: value.to(DEVICE) for name, value in tensors.items() if isinstance(value, Tensor)})


def ours(layer: Layer, wanted: Sequence[str] = LEAVES, **options: Any) -> dict[str, Tensor]:
    return results(complora_linear, layer, wanted, backend="triton", **options)


def pooled(part: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Results of several shapes as one: a single element may round well or badly by chance."""
    return [{name: torch.cat([result[name].flatten() for result in part]) for name in part[0]}]


@pytest.mark.parametrize(
    ("plan", "dtype", "dropout_p"),
    [
        *itertools.product((GIVEN, INSIDE, CONCAT), (torch.float32, *HALF), (0.0, 0.25)),
        *itertools.product((GIVEN, INSIDE), (torch.bfloat16,), (0.1,)),
        *itertools.product((MERGE,), (torch.float32, *HALF), (0.0,)),
        *itertools.product((ADDMM,), (torch.float32,), (0.0, 0.25)),
    ],
    ids=str,
)
def test_complora_linear(plan, dtype, dropout_p):
    parts: tuple[list[Any], ...] = ([], [], [])
    for batch, out, in_, r in (((3, 5), 33, 12, 3), ((33,), 24, 33, 17), ((), 24, 16, 1), ((0,), 24, 16, 2)):
        layer = triton_layer(batch=batch, out=out, in_=in_, r=r, dtype=dtype)
        masks = masks_of(next_seed(), 1, layer.x.shape, dropout_p) or [None]
        with plans.override(plan):
            parts[0].append(ours(layer, dropout_p=dropout_p))
        cast = None if masks[0] is None else masks[0].to(dtype)
        parts[1].append(results(reference.complora_linear, layer, dropout_mask=cast))
        parts[2].append(results(reference.complora_linear, layer.double(), dropout_mask=masks[0]))
    assert_accurate(*map(pooled, parts))


@pytest.mark.parametrize("rank", [65, 130])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_ranks_above_those_that_are_fused(rank, dropout_p):
    layer = triton_layer(batch=(5,), out=33, in_=40, r=rank)
    facts = {"backend": "triton", "rank": rank, "adapters": 1, "dtype": torch.float32, "dropout": dropout_p > 0}
    assert plans.choose(plans.problem(layer.x, layer.weight, **facts)) == CONCAT
    masks = masks_of(next_seed(), 1, layer.x.shape, dropout_p) or [None]
    cast = None if masks[0] is None else masks[0].float()
    same_dtype = results(reference.complora_linear, layer, dropout_mask=cast)
    exact = results(reference.complora_linear, layer.double(), dropout_mask=masks[0])
    assert_accurate([ours(layer, dropout_p=dropout_p)], [same_dtype], [exact])


THREE = [(0, 20), (20, 40), (40, 60)]


VQ = [(40, 60), (0, 20)]


@pytest.mark.parametrize(
    ("plan", "dropout_p", "rows"),
    [
        *itertools.product((GIVEN,), (0.0, 0.25), (THREE, THREE[::2], VQ, [(20, 40)])),
        *itertools.product((INSIDE, CONCAT, ADDMM), (0.0, 0.25), (VQ,)),
        (MERGE, 0.0, VQ),
    ],
    ids=str,
)
def test_packed_lora_linear(plan, rows, dropout_p):
    dtype = dtype_for(plan)
    layer = triton_layer(batch=(7, 5), out=60, in_=33, dtype=dtype)
    As = [torch.randn(3, 33, device=DEVICE).to(dtype) for _ in rows]
    Bs = [torch.randn(20, 3, device=DEVICE).to(dtype) for _ in rows]
    masks = masks_of(next_seed(), len(rows), layer.x.shape, dropout_p)

    def run(function: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        frozen = (layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (layer.x, *As, *Bs)]
        x, *factors = leaves
        y = function(x, *frozen, factors[: len(rows)], factors[len(rows) :], rows, **options)
        gradients = torch.autograd.grad(y, leaves, layer.dY.to(dtype))
        return {f"{i} of y, dx, dAs, dBs": tensor.detach() for i, tensor in enumerate((y, *gradients))}

    with plans.override(plan):
        mine = run(packed_lora_linear, dtype, dropout_p=dropout_p, backend="triton")
    cast = None if masks is None else [m.to(dtype) for m in masks]
    same_dtype = run(packed_reference, dtype, dropout_masks=cast)
    assert_accurate([mine], [same_dtype], [run(packed_reference, torch.float64, dropout_masks=masks)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fold_factors(dtype):
    """Layers of several shapes, ranks and kinds, factors and bases of any strides; only some gradients."""
    shapes = [(24, 16, 3), (16, 40, 1), (33, 70, 40), (8, 8, 2), (40, 8, 5)]  # out, in, r
    As = [torch.randn(in_, r, device=DEVICE).T for _, in_, r in shapes]
    Bs = [torch.randn(out, 2 * r, device=DEVICE)[:, ::2] for out, _, r in shapes]
    U = random_basis(33, 33).to(DEVICE)
    bases = {
        "output_bases": [
            random_basis(24, 5),
            None,
            U[:, 13:],
            random_basis(8, 0),
            random_basis(40, 20).T.contiguous().T,
        ],
        "input_bases": [None, random_basis(40, 9), random_basis(70, 35), random_basis(8, 8), None],
    }
    bases = {side: [basis if basis is None else basis.to(DEVICE) for basis in part] for side, part in bases.items()}
    kinds = {
        "output_basis_kinds": ["principal", "principal", "complement", "complement", "principal"],
        "input_basis_kinds": ["principal", "complement", "principal", "complement", "principal"],
    }
    wanted = [0, 2, 4, 5, 6, 8]
    grads = [torch.randn(factor.shape, device=DEVICE).to(dtype) for factor in (*As, *Bs)]

    def run(function: Callable[..., Any], wide: torch.dtype, cast: torch.dtype, **options: Any) -> dict[str, Tensor]:
        leaves = [factor.to(wide, copy=True) for factor in (*As, *Bs)]
        for i in wanted:
            leaves[i].requires_grad_()
        folded = function(leaves[:5], leaves[5:], **bases, **kinds, scaling=1.7, dtype=cast, **options)
        outputs = [*folded[0], *folded[1]]
        given = [grad.to(cast) for grad in grads]
        gradients = torch.autograd.grad(
            [outputs[i] for i in wanted], [leaves[i] for i in wanted], [given[i] for i in wanted]
        )
        named = {"folded": outputs, "gradient": gradients}
        return {f"{name} {i}": tensor.detach() for name, part in named.items() for i, tensor in enumerate(part)}

    mine = run(fold_factors, torch.float32, dtype, backend="triton")
    same_dtype = run(reference.fold_factors, torch.float32, dtype)
    assert_accurate([mine], [same_dtype], [run(reference.fold_factors, torch.float64, torch.float64)])


def test_fold_factors_of_half_precision_that_nothing_projects():
    A, B = torch.randn(3, 40, device=DEVICE).bfloat16(), torch.randn(33, 3, device=DEVICE).bfloat16()
    (folded_A,), (scaled_B,) = fold_factors([A], [B], [None], [None], scaling=3.0, backend="triton")
    assert torch.equal(folded_A, A)
    assert torch.equal(scaled_B, (3.0 * B.float()).bfloat16())


@pytest.mark.parametrize(("k", "kind"), [(1, "principal"), (48, "principal"), (80, "complement")])
def test_folded_factor_keeps_out_of_the_protected_directions(k, kind):
    vectors = random_basis(96, 96).to(DEVICE)
    protected, rest = vectors[:, :k], vectors[:, k:]
    B = torch.randn(96, 16, device=DEVICE)
    basis = protected if kind == "principal" else rest
    _, (folded,) = fold_factors(
        [torch.randn(16, 8, device=DEVICE)], [B], [basis], [None], output_basis_kinds=kind, backend="triton"
    )
    inside = protected.double().T @ folded.double()
    assert inside.norm() <= 1e-5 * B.double().norm()  # the design's bound


@pytest.mark.parametrize("kind", ["principal", "complement"])
def test_project_complement(kind):
    basis, factor = random_basis(40, 13).to(DEVICE), torch.randn(2, 3, 40, device=DEVICE)
    grad = torch.randn_like(factor)

    def run(function: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        leaf = factor.to(dtype, copy=True).requires_grad_()
        projected = function(leaf, basis.to(dtype), basis_kind=kind, **options)
        (first,) = torch.autograd.grad((projected**3).sum(), leaf, create_graph=True)
        return {"y": projected.detach(), "d": first.detach(), "dd": torch.autograd.grad(first, leaf, grad.to(dtype))[0]}

    mine = run(project_complement, torch.float32, backend="triton")
    same_dtype = run(reference.project_complement, torch.float32)
    assert_accurate([mine], [same_dtype], [run(reference.project_complement, torch.float64)])


@pytest.mark.parametrize("plan", [GIVEN, INSIDE, CONCAT], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_any_subset_of_gradients_is_the_same(plan, dropout_p):
    layer = triton_layer(dtype=dtype_for(plan))
    with plans.override(plan):
        torch.manual_seed(1)
        every = ours(layer, dropout_p=dropout_p)
        for wanted in (w for n in (1, 2) for w in itertools.combinations(LEAVES, n)):
            torch.manual_seed(1)
            some = ours(layer, wanted, dropout_p=dropout_p)
            assert some.keys() == {"y", *(f"d{name}" for name in wanted)}
            # g inside is summed in another order than in a pass of its own; the interpreter does not round it there.
            for name, tensor in some.items():
                allowed = 2**-7 * every[name].norm() if plan == INSIDE else 0
                assert (tensor - every[name]).norm() <= allowed, name


@pytest.mark.parametrize("plan", [GIVEN, INSIDE, CONCAT], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_only_x_and_h_of_the_activations_are_saved(plan, dtype, dropout_p):
    layer = triton_layer(batch=(4, 5), out=65, in_=64, r=2, k_out=5, k_in=3, dtype=dtype)
    for name in LEAVES:
        getattr(layer, name).requires_grad_()
    saved: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with plans.override(plan), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        complora_linear(**layer.arguments(), dropout_p=dropout_p, backend="triton")
    h_bytes, folded_bytes, seed_bytes = 20 * 2 * dtype.itemsize, (64 + 65) * 2 * dtype.itemsize, 8 * (dropout_p > 0)
    assert sum(saved.values()) == layer.x.nbytes + layer.weight.nbytes + h_bytes + folded_bytes + seed_bytes

    saved.clear()
    layer.lora_B.requires_grad_(False)  # then dB̃, which takes h, is not asked for
    with plans.override(plan), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        complora_linear(**layer.arguments(), dropout_p=dropout_p, backend="triton")
    assert sum(saved.values()) == layer.x.nbytes + layer.weight.nbytes + folded_bytes + seed_bytes


@pytest.mark.parametrize("plan", [GIVEN, INSIDE], ids=str)
def test_two_runs_are_equal_to_the_bit_and_inputs_stay(plan):
    layer = triton_layer(batch=(70,), out=65, in_=33, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in layer.arguments().items() if isinstance(value, Tensor)}
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        with plans.override(plan):
            runs.append(ours(layer, dropout_p=0.25))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert all(torch.equal(value, getattr(layer, name)) for name, value in before.items())


def test_used_twice_in_one_graph_and_accumulated():
    layer = triton_layer(out=16, in_=16)

    def twice(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        return lambda x, **others: function(function(x, **others, **options).tanh(), **others, **options)

    mine = results(twice(complora_linear, backend="triton"), layer)
    same_dtype = results(twice(reference.complora_linear), layer)
    assert_accurate([mine], [same_dtype], [results(twice(reference.complora_linear), layer.double())])

    leaves = [getattr(layer, name).requires_grad_() for name in LEAVES]
    for _ in range(2):
        complora_linear(**layer.arguments(), backend="triton").backward(layer.dY)
    once = ours(layer)
    assert all(torch.equal(leaf.grad, 2 * once[f"d{name}"]) for name, leaf in zip(LEAVES, leaves, strict=True))


def test_the_result_may_be_written_to():
    layer = triton_layer(batch=(2, 3))
    in_place = results(lambda **arguments: complora_linear(**arguments, backend="triton").relu_(), layer)
    out_of_place = results(lambda **arguments: complora_linear(**arguments, backend="triton").relu(), layer)
    assert all(torch.equal(in_place[name], out_of_place[name]) for name in in_place)


def test_without_gradients():
    layer = triton_layer()
    layer.x.requires_grad_()
    with torch.no_grad():
        assert complora_linear(**layer.arguments(), backend="triton").grad_fn is None
    with torch.inference_mode():
        assert complora_linear(**layer.arguments(), backend="triton").is_inference()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("plan", "dropout_p"), [(GIVEN, 0.25), (INSIDE, 0.25), (CONCAT, 0.0)], ids=str)
def test_autocast(dtype, plan, dropout_p):
    """Exactly what it computes from inputs cast by hand; gradients in the dtype of what they belong to."""
    layer = triton_layer(batch=(5, 7))
    by_hand = replace(layer, **{name: getattr(layer, name).to(dtype) for name in ("x", "weight", "bias", "dY")})
    with plans.override(plan):
        torch.manual_seed(1)
        expected = ours(by_hand, dropout_p=dropout_p)
        torch.manual_seed(1)
        leaves = [getattr(layer, name).requires_grad_() for name in LEAVES]
        with torch.autocast(DEVICE.type, dtype=dtype):
            y = complora_linear(**layer.arguments(), dropout_p=dropout_p, backend="triton")
        y.backward(by_hand.dY)
    assert torch.equal(y, expected["y"])
    for name, leaf in zip(LEAVES, leaves, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, expected[f"d{name}"].float())


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32, device=DEVICE) / 6, requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(2, 3, 32)), nn.Parameter(torch.randn(2, 32, 3))
        self.to(DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        for A, B in zip(self.A, self.B, strict=True):
            x = lora_linear(x, self.weight, None, A, B, dropout_p=0.5, backend="triton").tanh()
        return x


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_masks(use_reentrant):
    model = TwoLayers()
    gradients = []
    for recompute in (False, True):
        x = torch.ones(7, 32, device=DEVICE, requires_grad=True)
        torch.manual_seed(1)
        y: Any = checkpoint(model, x, use_reentrant=use_reentrant) if recompute else model(x)
        torch.manual_seed(2)
        model.zero_grad()
        y.sum().backward()
        gradients.append([tensor.grad for tensor in (x, model.A, model.B)])
    for expected, recomputed in zip(*gradients, strict=True):
        assert torch.equal(recomputed, expected)


def test_a_subclass_sees_the_registered_operation():
    """A kernel would read its memory without its knowledge."""
    seen = []

    class Seen(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            with no_dispatch():
                return func(*args, **(kwargs or {}))

    x, weight, A, B = (torch.randn(shape, device=DEVICE) for shape in ((6, 5), (6, 5), (2, 5), (6, 2)))
    with torch.no_grad():
        y = packed_lora_linear(x, weight.as_subclass(Seen), None, [A], [B], [(0, 6)], backend="triton")
    assert "complora_triton::packed_lora_linear_fwd" in seen
    assert torch.equal(y, packed_lora_linear(x, weight, None, [A], [B], [(0, 6)], backend="triton"))


def test_registered_operations():
    x, weight, A, B = (torch.randn(shape, device=DEVICE) for shape in ((6, 5), (6, 5), (2, 5), (3, 2)))
    seed, dY, h = (
        torch.tensor([11], device=DEVICE),
        torch.randn(6, 6, device=DEVICE),
        torch.randn(6, 4, device=DEVICE),
    )
    for p, save_h in ((0.0, True), (0.25, False)):
        given = (x, weight, None, [A, A], [B, B], [0, 3], p, seed if p else None, save_h, "exact")
        torch.library.opcheck(OPS.packed_lora_linear_fwd.default, given)
        for needs in ([True, True, True], [False, True, False], [True, False, False], [False, False, True]):
            given = (dY, x, h, weight, [A, A], [B, B], [0, 3], p, seed if p else None, needs, "exact")
            torch.library.opcheck(OPS.packed_lora_linear_bwd.default, given)
    half = [tensor.bfloat16() for tensor in (dY, x, h[:, :2], weight, A, torch.randn(6, 2, device=DEVICE))]
    for needs in itertools.product([True, False], repeat=3):  # one adapter, all gradients in one launch
        given = (*half[:4], half[4:5], half[5:], [0], 0.0, None, list(needs), "exact")
        with plans.override(Plan("fused", "inside")):
            torch.library.opcheck(OPS.packed_lora_linear_bwd.default, given)
    U = random_basis(5, 2).to(DEVICE)
    fold = ([A, B], [U, None], [False, False], [False, True], 0.7, torch.bfloat16)
    torch.library.opcheck(OPS.fold_factors.default, fold)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_compile(dropout_p):
    """Traced whole, forward and backward, to the same bits; a second dynamic batch size compiles nothing anew."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(complora_linear, fullgraph=True, backend=counter)
    try:
        for batch in (7, 40):
            layer = triton_layer(batch=(batch,))
            torch.manual_seed(1)
            expected = ours(layer, dropout_p=dropout_p)
            torch.manual_seed(1)
            x = layer.x.detach().clone()
            torch._dynamo.mark_dynamic(x, 0)
            leaves = [x.requires_grad_(), layer.lora_A.requires_grad_(), layer.lora_B.requires_grad_()]
            arguments = {**layer.arguments(), "x": x}
            y = compiled(**arguments, dropout_p=dropout_p, backend="triton")
            gradients = torch.autograd.grad(y, leaves, layer.dY)
            assert torch.equal(y, expected["y"])
            for name, gradient in zip(LEAVES, gradients, strict=True):
                assert torch.equal(gradient, expected[f"d{name}"])
        assert counter.frame_count == 1
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize(("ratio", "twice_rounded"), [(1e-4, (0.0, 0.2)), (1e-3, (0.3, 0.7)), (1e-2, (0.95, 1.05))])
def test_a_small_adapter_is_realised_in_bfloat16(monkeypatch, ratio, twice_rounded):
    """`<y - x W^T, x ΔW^T> / |x ΔW^T|²` is 1.00 ± 0.05 for `|ΔW| / |W|` down to 1e-4, by every plan that rounds once.

    PEFT adds the update to the finished bfloat16 product, which loses what is below half a unit in its last place: it
    is measured beside them, so that this test is seen to tell the two apart. Over 2²¹ outputs the rounding of y moves
    the share at 1e-4 by 0.008 (one standard deviation).
    """
    monkeypatch.setitem(tiles.HALF_TILES, 0, (tiles.Tiles(512, 512, 64, 4, 1),))  # fewer programs to interpret
    M, N, K, r = 2048, 1024, 64, 4
    x, weight, delta_A, delta_B = (torch.randn(shape, device=DEVICE) for shape in ((M, K), (N, K), (r, K), (N, r)))
    x, A = x.bfloat16(), delta_A.bfloat16()
    size = (delta_B.double() @ A.double()).norm()
    B = (ratio * weight.double().norm() / size * delta_B).bfloat16()
    update = x.double() @ (B.double() @ A.double()).T  # x ΔW^T
    assert update.numel() >= 2**21

    def share(y: Tensor, weight: Tensor) -> float:
        base = x.double() @ weight.double().T
        return float(((y.double() - base) * update).sum() / update.square().sum())

    W = weight.bfloat16()
    for plan in (GIVEN, INSIDE, CONCAT):
        with plans.override(plan):
            y = lora_linear(x, W, None, A, B, backend="triton")
        assert share(y, W) == pytest.approx(1, abs=0.05), plan
    with plans.override(MERGE), torch.autocast(DEVICE.type, dtype=torch.bfloat16):  # a master weight of float32
        y = lora_linear(x, weight, None, A, B, backend="triton")
    assert share(y, weight) == pytest.approx(1, abs=0.05)

    base = nn.Linear(K, N, bias=False, device=DEVICE, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=["base"])
    wrapped = peft.get_peft_model(nn.ModuleDict({"base": base}), config).get_submodule("base_model.model.base")
    assert isinstance(wrapped, peft.tuners.lora.Linear)
    with torch.no_grad():
        for layer, value in ((base, W), (wrapped.lora_A["default"], A), (wrapped.lora_B["default"], B)):
            layer.weight = nn.Parameter(value)
        low, high = twice_rounded
        assert low <= share(wrapped(x), W) <= high


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": torch.float64}, "x: dtype torch.float64"),
    ({"rows": [(0, 8), (8, 24)]}, r"rows=\[\(0, 8\), \(8, 24\)\], expected distinct ones of at most 7 equal groups"),
    ({"rows": [(0, 12), (6, 18)]}, r"rows=\[\(0, 12\), \(6, 18\)\], expected distinct ones of at most 7 equal groups"),
    ({"rows": [(0, 3)]}, r"rows=\[\(0, 3\)\], expected distinct ones of at most 7 equal groups"),
    (
        {"rows": [(0, 12), (12, 24)], "ranks": (2, 3)},
        r"the adapters have ranks \[2, 3\], the kernels support equal ones",
    ),
]


def packed(dtype: torch.dtype = torch.float32, rows: Any = ((0, 24),), ranks: Any = None, **options: Any) -> Tensor:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 16, device=DEVICE, dtype=dtype), torch.randn(24, 16, device=DEVICE, dtype=dtype)
    ranks = ranks or [2] * len(rows)
    As = [torch.randn(r, 16, device=DEVICE, dtype=dtype) for r in ranks]
    Bs = [
        torch.randn(stop - start, r, device=DEVICE, dtype=dtype) for r, (start, stop) in zip(ranks, rows, strict=True)
    ]
    return packed_lora_linear(x, weight, None, As, Bs, list(rows), **options)


@pytest.mark.parametrize(("changed", "reason"), UNSUPPORTED, ids=[reason[:40] for _, reason in UNSUPPORTED])
def test_what_the_kernels_do_not_serve(monkeypatch, caplog, changed, reason):
    """Goes to torch, once said; by name it is an error."""
    with pytest.raises(RuntimeError, match=rf"^backend='triton' does not support packed_lora_linear: .*{reason}"):
        packed(**changed, backend="triton")
    monkeypatch.setenv("COMPLORA_BACKEND", "triton")
    with pytest.raises(
        RuntimeError, match=rf"^COMPLORA_BACKEND='triton' does not support packed_lora_linear: .*{reason}"
    ):
        packed(**changed)
    monkeypatch.delenv("COMPLORA_BACKEND")
    monkeypatch.setattr(TritonBackend, "automatic", True)
    monkeypatch.setattr(backends, "messages_said", {})
    caplog.set_level(logging.WARNING, "complora_kernels")
    expected = packed(**changed, backend="torch")
    for _ in range(2):
        assert torch.equal(packed(**changed), expected)
    (record,) = caplog.records
    assert record.getMessage().startswith("packed_lora_linear does not run on the triton backend: ")


def test_the_kernels_are_used_where_they_serve(monkeypatch):
    monkeypatch.setattr(TritonBackend, "automatic", True)
    assert torch.equal(packed(), packed(backend="triton"))


def test_fold_factors_of_what_the_kernels_do_not_serve():
    A, B, U = torch.randn(2, 9, device=DEVICE), torch.randn(9, 2, device=DEVICE), random_basis(9, 4).to(DEVICE)
    with pytest.raises(RuntimeError, match=r"does not support fold_factors: lora_As, lora_Bs: dtype torch.float64"):
        fold_factors([A.double()], [B.double()], [None], [None], backend="triton")
    with pytest.raises(RuntimeError, match=r"does not support fold_factors: .*float64"):
        fold_factors([A], [B], [U.double()], [None], backend="triton")
    with pytest.raises(RuntimeError, match="does not support fold_factors: lora_As, lora_Bs: several dtypes"):
        fold_factors([A], [B.bfloat16()], [None], [None], backend="triton")


@pytest.mark.parametrize("plan", [GIVEN, INSIDE], ids=str)
def test_gradients_that_are_not_contiguous(plan):
    layer = triton_layer(batch=(6, 7), dtype=dtype_for(plan))
    for dY in (layer.dY.transpose(0, 1).contiguous().transpose(0, 1), layer.dY[:1, :1].expand(layer.dY.shape)):
        strided = replace(layer, dY=dY)
        with plans.override(plan):
            mine, contiguous = ours(strided), ours(replace(layer, dY=dY.contiguous()))
        assert all(torch.equal(mine[name], contiguous[name]) for name in mine)


def test_tensors_that_do_not_fit_are_refused_by_name():
    layer = triton_layer()
    with pytest.raises(ValueError, match=r"weight has dtype torch.float16, expected that of x"):
        complora_linear(**replace(layer, weight=layer.weight.half()).arguments(), backend="triton")
    with pytest.raises(ValueError, match=r"weight is on meta, expected"):
        complora_linear(**replace(layer, weight=layer.weight.to("meta")).arguments(), backend="triton")
    assert layer.output_basis is not None
    elsewhere = replace(layer, output_basis=layer.output_basis.to("meta"))
    with pytest.raises(ValueError, match=r"output_basis is on meta, expected"):
        complora_linear(**elsewhere.arguments(), backend="triton")
    with pytest.raises(ValueError, match=r"precision='exat', expected 'exact' or 'fast'"):
        complora_linear(**layer.arguments(), precision="exat", backend="triton")


def test_fast_precision_allows_what_rounds_twice(monkeypatch):
    """It must be asked for, by the argument or by nobody."""
    layer = triton_layer(dtype=torch.bfloat16)
    monkeypatch.setenv("COMPLORA_PLAN", "addmm")
    with pytest.raises(ValueError, match=r"COMPLORA_PLAN='addmm' cannot compute .* it rounds twice in bfloat16"):
        complora_linear(**layer.arguments(), backend="triton")
    y = complora_linear(**layer.arguments(), precision="fast", backend="triton")
    (A,), (B,) = fold_factors(
        [layer.lora_A],
        [layer.lora_B],
        [layer.output_basis],
        [layer.input_basis],
        scaling=0.5,
        dtype=torch.bfloat16,
        backend="triton",
    )
    h = F.linear(layer.x, A)
    twice = torch.addmm(F.linear(layer.x, layer.weight, layer.bias), h, B.T)
    assert (y - twice).float().norm() <= 1e-2 * twice.float().norm()  # bfloat16, h summed in another order


@pytest.mark.parametrize("layout", ["strided", "transposed", "expanded"])
@pytest.mark.parametrize("plan", [GIVEN, INSIDE, CONCAT, MERGE], ids=str)
def test_any_layout_in_memory(plan, layout):
    """Strided, transposed or expanded arguments give, bit for bit, what contiguous copies of them do."""
    dtype = torch.float32 if plan == MERGE else torch.bfloat16
    layer = triton_layer(batch=(3, 5), out=12, in_=9, dtype=dtype, k_out=None, k_in=None)
    assert layer.bias is not None
    moved = {name: laid_out(getattr(layer, name), layout) for name in ("x", "weight", "lora_A", "lora_B", "dY")}
    moved["bias"] = layer.bias[:1].expand(12) if layout == "expanded" else laid_out(layer.bias, layout)
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in moved.items()}
    with plans.override(plan):
        there, here = ours(replace(layer, **moved)), ours(replace(layer, **copies))
    assert all(torch.equal(there[name], here[name]) for name in here)


def test_masks_follow_the_generator_and_nothing_else():
    x = torch.ones(20, 33, device=DEVICE)
    identity, weight = torch.eye(33, device=DEVICE), torch.zeros(33, 33, device=DEVICE)

    def draw(p: float, **options: Any) -> Tensor:
        return lora_linear(x, weight, None, identity, identity, dropout_p=p, backend="triton", **options)

    torch.manual_seed(7)
    first, second = draw(0.5), draw(0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(draw(0.5), first)
    before = next_seed()
    assert torch.equal(draw(0.0), x)
    assert torch.equal(draw(0.5, training=False), x)
    assert torch.equal(next_seed(), before)  # nothing was drawn
    assert torch.equal(draw(0.5), second)
    (m,) = masks_of(next_seed(), 1, x.shape, 0.5) or []
    y = lora_linear(x.requires_grad_(), weight, None, identity, identity, dropout_p=0.5, backend="triton")
    before = next_seed()
    (dX,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(next_seed(), before)
    assert torch.equal(dX, y)
    assert torch.equal(y, m.float())


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_factors_are_projected_in_float32(dtype):
    A, B = torch.randn(3, 40, device=DEVICE).to(dtype), torch.randn(33, 3, device=DEVICE).to(dtype)
    bases = ([random_basis(33, 9).to(DEVICE)], [random_basis(40, 11).to(DEVICE)])

    def run(function: Callable[..., Any], wide: torch.dtype | None, **options: Any) -> dict[str, Tensor]:
        (folded_A,), (scaled_B,) = function([A.to(wide or dtype)], [B.to(wide or dtype)], *bases, **options)
        return {"A": folded_A, "B": scaled_B}

    kinds: dict[str, Any] = {"output_basis_kinds": ["principal"], "input_basis_kinds": ["complement"], "scaling": 0.3}
    exact = run(reference.fold_factors, torch.float64, **kinds)
    assert_accurate(
        [run(fold_factors, None, **kinds, backend="triton")], [run(reference.fold_factors, None, **kinds)], [exact]
    )
    ours, truth = run(fold_factors, None, **kinds, dtype=torch.float32, backend="triton"), exact["B"]
    assert (ours["B"].double() - truth).norm() <= 1e-5 * truth.norm()  # not rounded on the way


def test_where_tensors_are_is_given_as_the_reason(monkeypatch):
    """As on a machine with a GPU, of tensors that are not on it."""
    monkeypatch.setattr(hardware, "interpreted", lambda: False)
    monkeypatch.setattr(hardware, "gpu_unavailable", lambda: None)
    A, B = torch.randn(2, 9), torch.randn(9, 2)
    with pytest.raises(
        RuntimeError, match=r"does not support fold_factors: .* on cpu, the kernels run on cuda devices"
    ):
        fold_factors([A], [B], [None], [None], backend="triton")
