"""The operations: accuracy of every output and gradient, what is computed and saved, autograd's uses, and refusals."""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    DTYPES,
    HALF,
    KINDS,
    LAYOUTS,
    LEAVES,
    SIZES,
    Layer,
    Recorder,
    assert_accurate,
    laid_out,
    make_layer,
    packed_reference,
    results,
)
from numerics import assert_as_accurate_as_reference, random_basis
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from complora_kernels import reference
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.backends import plans
from complora_kernels.dropout import dropout_mask, dropout_seed
from complora_kernels.functional import (
    complora_linear,
    fold_factors,
    lora_linear,
    packed_lora_linear,
    project_complement,
)

pytestmark = pytest.mark.usefixtures("torch_backend")  # the others have files of their own


def next_masks(like: Tensor, dropout_p: float, *, adapters: int = 1) -> list[Tensor] | None:
    """What the next call will draw, m = mask / (1 - p) in float64; test_dropout.py says what these draws must be."""
    if dropout_p == 0:
        return None
    state = torch.get_rng_state()
    masks = [dropout_mask(like, like.shape, dropout_seed(like), dropout_p) for _ in range(adapters)]
    torch.set_rng_state(state)
    return [mask.double() / (1 - dropout_p) for mask in masks]


def check_complora_linear(layers: Sequence[Layer], dropout_p: float = 0.0) -> None:
    ours, same_dtype, exact = [], [], []
    for layer in layers:
        (m,) = next_masks(layer.x, dropout_p) or [None]
        ours.append(results(complora_linear, layer, dropout_p=dropout_p))
        cast = None if m is None else m.to(layer.x.dtype)
        same_dtype.append(results(reference.complora_linear, layer, dropout_mask=cast))
        exact.append(results(reference.complora_linear, layer.double(), dropout_mask=m))
    assert_accurate(ours, same_dtype, exact)


BATCHES = ((), (1,), (0,), (63,), (2, 0), (3, 5), (1, 137), (2, 3, 4), (5, 1, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_complora_linear(dtype, data):
    def draw(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    def draw_basis(d: int) -> tuple[int | None, str]:
        kind = draw(*KINDS)
        # A principal basis wider than d / 2 is never stored: what it leaves of a factor is mostly rounding.
        return draw(None, 0, d // 6, d // 2, *([d] if kind == "complement" else [])), kind

    out, in_ = draw(*SIZES), draw(*SIZES)
    (k_out, output_kind), (k_in, input_kind) = draw_basis(out), draw_basis(in_)
    drawn = {
        "batch": draw(*BATCHES),
        "out": out,
        "in_": in_,
        "r": draw(1, 2, 7, 16, 33),
        "k_out": k_out,
        "k_in": k_in,
        "output_basis_kind": output_kind,
        "input_basis_kind": input_kind,
        "bias": draw(True, False),
        "scaling": draw(1.0, 0.25, 2**0.5),
    }
    layout_x, layout_dY, dropout_p = draw(*LAYOUTS), draw(*LAYOUTS), draw(0.0, 0.0, 0.25)
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    layers = []
    for _ in range(1 if dtype == torch.float64 else 8):  # one element may round well or badly by chance
        layer = make_layer(dtype=dtype, **drawn)
        layers.append(replace(layer, x=laid_out(layer.x, layout_x), dY=laid_out(layer.dY, layout_dY)))
    check_complora_linear(layers, dropout_p)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_every_direction_protected_nothing_is_learned(dtype):
    layer = make_layer(batch=(63,), k_out=24, k_in=0, dtype=dtype)
    frozen = F.linear(layer.x, layer.weight, layer.bias)
    empty = replace(layer, output_basis=random_basis(24, 0), output_basis_kind="complement")
    ours = results(complora_linear, empty)
    assert torch.equal(ours["y"], frozen)
    assert not ours["dlora_A"].any()
    assert not ours["dlora_B"].any()
    ours = results(complora_linear, layer)  # I - U U^T, which is zero up to the rounding of U and of the product
    assert (ours["y"] - frozen).norm() <= 1e-5 * frozen.norm()
    assert ours["dlora_A"].norm() <= 1e-5 * layer.dY.norm()
    assert ours["dlora_B"].norm() <= 1e-5 * layer.dY.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_lora_linear(dtype, dropout_p):
    layer = make_layer(batch=(63,), r=5, k_out=None, k_in=None, dtype=dtype, scaling=3.0)
    (m,) = next_masks(layer.x, dropout_p) or [None]

    def ours(x, weight, bias, lora_A, lora_B, *, scaling, **_):
        folded_A, folded_B = lora_A.to(dtype), lora_B.to(dtype)
        return lora_linear(x, weight, bias, folded_A, folded_B, scaling=scaling, dropout_p=dropout_p)

    def plain(x, weight, bias, lora_A, lora_B, *, scaling, mask, **_):
        folded_A, folded_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        return reference.lora_linear(x, weight, bias, folded_A, folded_B, scaling=scaling, dropout_mask=mask)

    rounded = replace(layer, lora_A=layer.lora_A.to(dtype), lora_B=layer.lora_B.to(dtype))
    cast = None if m is None else m.to(dtype)
    assert_accurate(
        [results(ours, rounded)], [results(plain, rounded, mask=cast)], [results(plain, rounded.double(), mask=m)]
    )


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 8), (8, 16), (16, 24)],  # q, k, v
        [(0, 8), (16, 24)],  # q, v
        [(16, 24), (0, 8)],  # in any order
        [(3, 4), (4, 21)],
        [(0, 24), (5, 12)],  # overlapping: the updates add up
        [(7, 7), (0, 1)],  # of no rows at all
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("plan", "dropout_p"), [*itertools.product((None, "addmm", "concat"), (0.0, 0.25)), ("merge", 0.0)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_lora_linear(dtype, plan, dropout_p, rows):
    layer = make_layer(batch=(9, 7), dtype=dtype)
    As = [torch.randn(2 + i, 16).to(dtype) for i in range(len(rows))]  # unequal ranks
    Bs = [torch.randn(stop - start, 2 + i).to(dtype) for i, (start, stop) in enumerate(rows)]
    masks = next_masks(layer.x, dropout_p, adapters=len(rows))

    def run(function: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        frozen = (layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (layer.x, *As, *Bs)]
        x, *factors = leaves
        y = function(x, *frozen, factors[: len(rows)], factors[len(rows) :], rows, **options)
        gradients = torch.autograd.grad(y, leaves, layer.dY.to(dtype))
        names = ["dx", *(f"dA{i}" for i in range(len(rows))), *(f"dB{i}" for i in range(len(rows)))]
        return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}

    cast = None if masks is None else [m.to(dtype) for m in masks]
    with contextlib.nullcontext() if plan is None else plans.override(plans.Plan(plan)):
        ours = run(packed_lora_linear, dtype, dropout_p=dropout_p)
    same_dtype = run(packed_reference, dtype, dropout_masks=cast)
    assert_accurate([ours], [same_dtype], [run(packed_reference, torch.float64, dropout_masks=masks)])


@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_fold_factors(dtype, factor_dtype):
    shapes = [(24, 16, 3), (16, 40, 1), (33, 17, 7), (8, 8, 2)]  # out, in, r of four layers
    As = [torch.randn(r, in_).to(factor_dtype) for _, in_, r in shapes]
    Bs = [torch.randn(out, r).to(factor_dtype) for out, _, r in shapes]
    bases = {
        "output_bases": [random_basis(24, 5), None, random_basis(33, 20), random_basis(8, 0)],
        "input_bases": [None, random_basis(40, 9), random_basis(17, 4), random_basis(8, 8)],
        "output_basis_kinds": ["principal", "principal", "complement", "principal"],
        "input_basis_kinds": ["principal", "complement", "principal", "complement"],
    }
    grads = [torch.randn_like(factor, dtype=dtype) for factor in (*As, *Bs)]

    def run(function: Callable[..., Any], wide: torch.dtype | None = None) -> dict[str, Tensor]:
        leaves = [factor.to(wide or factor_dtype, copy=True).requires_grad_() for factor in (*As, *Bs)]
        folded = function(leaves[:4], leaves[4:], **bases, scaling=1.7, dtype=wide or dtype)
        outputs = [*folded[0], *folded[1]]
        gradients = torch.autograd.grad(outputs, leaves, [grad.to(wide) for grad in grads] if wide else grads)
        named = {"folded": outputs, "gradient": gradients}
        return {f"{name} {i}": tensor.detach() for name, part in named.items() for i, tensor in enumerate(part)}

    assert_accurate([run(fold_factors)], [run(reference.fold_factors)], [run(reference.fold_factors, torch.float64)])


def test_fold_factors_takes_one_kind_for_all_layers():
    A, B, U = torch.randn(2, 9), torch.randn(9, 2), random_basis(9, 4)
    together = fold_factors([A, A], [B, B], [U, U], [U, U], output_basis_kinds="complement", scaling=2.0)
    alone = fold_factors([A], [B], [U], [U], output_basis_kinds=["complement"], input_basis_kinds=["principal"])
    assert all(torch.equal(folded, alone[0][0]) for folded in together[0])
    assert all(torch.equal(folded, 2 * alone[1][0]) for folded in together[1])


def test_fold_factors_is_one_node_and_gives_unused_layers_no_gradient():
    factors = [torch.randn(*shape, requires_grad=True) for shape in ((2, 9), (2, 9), (9, 2), (9, 2))]
    U = random_basis(9, 4)
    (A, unused), (B, _) = fold_factors(factors[:2], factors[2:], [U, U], [U, U])
    assert A.grad_fn is unused.grad_fn is B.grad_fn
    (A.sum() + B.sum()).backward()
    assert [factor.grad is None for factor in factors] == [False, True, False, True]


@pytest.mark.parametrize("shape", [(24,), (3, 24), (0, 24), (2, 3, 24)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_complement(dtype, kind, shape):
    basis = random_basis(24, 7, torch.promote_types(dtype, torch.float32))
    factor, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        leaf = factor.to(dtype, copy=True).requires_grad_()
        projected = function(leaf, basis.to(torch.promote_types(dtype, basis.dtype)), basis_kind=kind)
        return {"projected": projected.detach(), "gradient": torch.autograd.grad(projected, leaf, grad.to(dtype))[0]}

    exact = run(reference.project_complement, torch.float64)
    assert_accurate([run(project_complement, dtype)], [run(reference.project_complement, dtype)], [exact])


@pytest.mark.parametrize("kind", KINDS)
def test_project_complement_gradients_of_gradients(kind):
    basis = random_basis(9, 4, torch.float64)
    factor = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)

    def cubed(factor: Tensor) -> Tensor:  # a projection alone is linear: its second derivative would be zero
        return project_complement(factor, basis, basis_kind=kind) ** 3

    assert torch.autograd.gradcheck(cubed, (factor,))
    assert torch.autograd.gradgradcheck(cubed, (factor,))


@pytest.mark.parametrize("kind", KINDS)
def test_complora_linear_gradcheck(kind):
    layer = make_layer(batch=(2, 3), out=6, in_=5, r=2, k_out=2, k_in=1, dtype=torch.float64).arguments()
    layer |= {"output_basis_kind": kind, "input_basis_kind": kind}
    leaves = [layer.pop(name).requires_grad_() for name in LEAVES]
    assert torch.autograd.gradcheck(lambda x, A, B: complora_linear(x, lora_A=A, lora_B=B, **layer), leaves)


def test_packed_lora_linear_gradcheck():
    layer = make_layer(batch=(4,), out=6, in_=5, dtype=torch.float64)
    factors = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5), (1, 5), (3, 2), (2, 1))]
    leaves = [tensor.requires_grad_() for tensor in (layer.x, *factors)]

    def function(x: Tensor, A0: Tensor, A1: Tensor, B0: Tensor, B1: Tensor) -> Tensor:
        return packed_lora_linear(x, layer.weight, layer.bias, [A0, A1], [B0, B1], [(0, 3), (4, 6)])

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(("k", "kind"), [(0, "principal"), (4, "principal"), (4, "complement"), (12, "complement")])
@pytest.mark.parametrize(("out", "in_"), [(12, 12), (12, 20), (20, 12)])
def test_protected_directions_stay(out, in_, k, kind):
    """`U_k^T W' = U_k^T W` with the output side projected, and `W' V_k = W V_k` too with both."""
    weight = torch.randn(out, in_, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(weight)  # [out, out], [in, in]
    V = Vh.mT
    columns = slice(k, None) if kind == "complement" else slice(0, k)
    A, B = torch.randn(3, in_, dtype=torch.float64), torch.randn(out, 3, dtype=torch.float64)

    def adapted(**bases: Any) -> Tensor:  # W' [out, in]
        identity = torch.eye(in_, dtype=torch.float64)
        kinds: dict[str, Any] = {f"{name}_kind": kind for name in bases}
        return complora_linear(identity, weight, None, A, B, **bases, **kinds, scaling=0.3).T

    output = {"output_basis": U[:, columns].contiguous()}
    both = {**output, "input_basis": V[:, columns].contiguous()}
    one_sided, two_sided = adapted(**output), adapted(**both)
    # float64 rounding of products of norm about ten
    assert torch.allclose(U[:, :k].T @ one_sided, U[:, :k].T @ weight, rtol=0, atol=1e-12)
    assert torch.allclose(U[:, :k].T @ two_sided, U[:, :k].T @ weight, rtol=0, atol=1e-12)
    assert torch.allclose(two_sided @ V[:, :k], weight @ V[:, :k], rtol=0, atol=1e-12)
    if 0 < k < out:  # one side alone lets the other change
        assert (one_sided @ V[:, :k] - weight @ V[:, :k]).norm() > 0.1
    if k < min(out, in_):  # and something is learned
        assert (two_sided - weight).norm() > 0.1


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("k", "kind"), [(1, "principal"), (384, "principal"), (600, "complement")])
def test_folded_factor_keeps_out_of_the_protected_directions(k, kind, factor_dtype):
    """`|U_k^T B̃| <= 1e-5 |B|` before the cast to the compute dtype, which is the design's bound for float32."""
    vectors = random_basis(768, 768)
    protected = vectors[:, :k]
    basis = protected if kind == "principal" else vectors[:, k:]
    B = torch.randn(768, 16).to(factor_dtype)
    arguments = {"output_basis_kinds": kind, "scaling": 1.0, "dtype": torch.float32}
    _, (folded,) = fold_factors([torch.randn(16, 8)], [B], [basis.contiguous()], [None], **arguments)
    inside = protected.double().T @ folded.double()
    assert inside.norm() <= 1e-5 * B.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [w for n in (1, 2) for w in itertools.combinations(LEAVES, n)], ids="-".join)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_any_subset_of_gradients_is_the_same(wanted, dropout_p, dtype):
    layer = make_layer(dtype=dtype)
    torch.manual_seed(1)
    every = results(complora_linear, layer, dropout_p=dropout_p)
    torch.manual_seed(1)
    some = results(complora_linear, layer, wanted, dropout_p=dropout_p)
    assert some.keys() == {"y", *(f"d{name}" for name in wanted)}
    assert all(torch.equal(tensor, every[name]) for name, tensor in some.items())


M, IN, OUT, R, K_OUT, K_IN = 20, 64, 65, 2, 5, 3  # no two alike; M·out < in², so that a [d, d] result stands out


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("wanted", [w for n in range(4) for w in itertools.combinations(LEAVES, n)], ids="-".join)
def test_multiplications(wanted, dropout_p):
    """Forward `M·in·out + M·r·(in + out) + 2·r·(k_in·in + k_out·out)`; of backward what is asked for, and no more."""
    layer = make_layer(batch=(4, 5), out=OUT, in_=IN, r=R, k_out=K_OUT, k_in=K_IN)
    base, h, update = M * IN * OUT, M * IN * R, M * OUT * R
    fold_A, fold_B = 2 * R * K_IN * IN, 2 * R * K_OUT * OUT
    forward = base + h + update + fold_A + fold_B
    backward = {"x": base + h, "lora_A": h + fold_A, "lora_B": update + fold_B}  # dX; dÃ, dA; dB̃, dB
    needs_g = "x" in wanted or "lora_A" in wanted  # g = dY B̃, once for both
    complora_linear(**layer.arguments())  # the bases are looked at once, and no more
    with Recorder() as recorder:
        if wanted:
            results(complora_linear, layer, wanted, dropout_p=dropout_p)
        else:
            complora_linear(**layer.arguments(), dropout_p=dropout_p)
    assert recorder.multiplications == forward + sum(backward[name] for name in wanted) + update * needs_g


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_square_product_and_no_projected_activation(dtype, dropout_p):
    layer = make_layer(batch=(M,), out=OUT, in_=IN, r=R, k_out=K_OUT, k_in=K_IN, dtype=dtype)
    complora_linear(**layer.arguments())  # looks at the bases
    with Recorder() as recorder:
        results(complora_linear, layer, dropout_p=dropout_p)
    assert all(m * n < IN * IN for m, _, n in recorder.products)
    assert not {(M, K_OUT), (M, K_IN)} & {(m, n) for m, _, n in recorder.products}
    if dtype == torch.float32:  # in half precision `[W | B̃]` is a copy of the weight
        assert all(shape.numel() < IN * IN for shape in recorder.shapes)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_x_and_h_of_the_activations_are_saved(dtype, dropout_p):
    layer = make_layer(batch=(4, 5), out=OUT, in_=IN, r=R, k_out=K_OUT, k_in=K_IN, dtype=dtype)
    for name in LEAVES:
        getattr(layer, name).requires_grad_()
    saved: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    with Recorder() as recorder, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = complora_linear(**layer.arguments(), dropout_p=dropout_p)
    h_bytes = M * R * dtype.itemsize
    folded_bytes = (IN + OUT) * R * dtype.itemsize
    seed_bytes = 8 if dropout_p else 0
    assert sum(saved.values()) == layer.x.nbytes + layer.weight.nbytes + h_bytes + folded_bytes + seed_bytes
    # Nor does anything else that the forward pass computed stay alive, saved by autograd or not.
    assert recorder.live_bytes(y) == h_bytes + folded_bytes + seed_bytes


def test_nothing_is_saved_without_a_gradient_to_compute():
    layer = make_layer()
    with Recorder() as recorder:
        y = complora_linear(**layer.arguments(), dropout_p=0.5)
    assert not y.requires_grad
    assert recorder.live_bytes(y) == 0
    layer.x.requires_grad_()
    with torch.no_grad():
        assert complora_linear(**layer.arguments()).grad_fn is None
    with torch.inference_mode():
        assert complora_linear(**layer.arguments()).is_inference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_used_twice_in_one_graph(dtype):
    layer = make_layer(out=16, in_=16, dtype=dtype)

    def twice(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, **others: function(function(x, **others).tanh(), **others)

    layers = [layer, layer.double()]
    same_dtype, exact = (results(twice(reference.complora_linear), each) for each in layers)
    assert_accurate([results(twice(complora_linear), layer)], [same_dtype], [exact])


def test_gradients_accumulate():
    layer = make_layer()
    leaves = [getattr(layer, name).requires_grad_() for name in LEAVES]
    complora_linear(**layer.arguments()).backward(layer.dY)
    first = [leaf.grad.clone() for leaf in leaves]
    complora_linear(**layer.arguments()).backward(layer.dY)
    assert all(torch.equal(leaf.grad, 2 * grad) for leaf, grad in zip(leaves, first, strict=True))


def test_two_runs_are_equal_to_the_bit():
    layer = make_layer(batch=(200,), out=137, in_=63)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(results(complora_linear, layer, dropout_p=0.25))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_stay_as_they_were(dtype):
    layer = make_layer(dtype=dtype)
    before = {name: value.clone() for name, value in layer.arguments().items() if isinstance(value, Tensor)}
    results(complora_linear, layer, dropout_p=0.25)
    assert all(torch.equal(value, getattr(layer, name)) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [(), (7,), (2, 3)], ids=str)
def test_the_result_may_be_written_to(batch, dtype):
    """As that of `nn.Linear`, before an `nn.ReLU(inplace=True)`."""
    layer = make_layer(batch=batch, dtype=dtype)
    in_place = results(lambda **arguments: complora_linear(**arguments).relu_(), layer)
    out_of_place = results(lambda **arguments: complora_linear(**arguments).relu(), layer)
    assert all(torch.equal(in_place[name], out_of_place[name]) for name in in_place)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_autocast(dtype, backward_inside, dropout_p):
    """Exactly what it computes from inputs cast by hand; gradients in the dtype of what they belong to."""
    layer = make_layer(batch=(5, 63))
    by_hand = replace(layer, **{name: getattr(layer, name).to(dtype) for name in ("x", "weight", "bias", "dY")})
    torch.manual_seed(1)
    expected = results(complora_linear, by_hand, dropout_p=dropout_p)

    torch.manual_seed(1)
    leaves = [getattr(layer, name).requires_grad_() for name in LEAVES]
    with torch.autocast("cpu", dtype=dtype):
        y = complora_linear(**layer.arguments(), dropout_p=dropout_p)
        if backward_inside:
            y.backward(by_hand.dY)
    if not backward_inside:
        y.backward(by_hand.dY)
    assert y.dtype == dtype
    assert torch.equal(y, expected["y"])
    for name, leaf in zip(LEAVES, leaves, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, expected[f"d{name}"].float())


def test_autocast_leaves_float64_alone():
    layer = make_layer(dtype=torch.float64)
    expected = complora_linear(**layer.arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(complora_linear(**layer.arguments()), expected)


def test_projections_stay_float32_under_autocast():
    factor, basis = torch.randn(4, 64, requires_grad=True), random_basis(64, 16)
    expected = project_complement(factor, basis)
    (gradient,) = torch.autograd.grad(expected.square().sum(), factor)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        projected = project_complement(factor, basis)
        assert torch.equal(projected, expected)
        assert torch.equal(torch.autograd.grad(projected.square().sum(), factor)[0], gradient)
        (A,), (B,) = fold_factors([factor], [factor.T], [basis], [basis])
        assert torch.equal(A, expected)
        torch.testing.assert_close(B, expected.T, rtol=0, atol=1e-6)  # summed in another order; bfloat16 is 4e-3 off


@pytest.mark.parametrize(("ratio", "addmm_share"), [(1e-4, (0.0, 0.2)), (1e-3, (0.3, 0.7)), (1e-2, (0.95, 1.05))])
def test_a_small_adapter_is_realised_in_bfloat16(ratio, addmm_share):
    """`<y - x W^T, x ΔW^T> / |x ΔW^T|²` is 1.00 ± 0.05 for `|ΔW| / |W|` down to 1e-4.

    Adding the update to a finished bfloat16 product, as `addmm` does, loses what is below half a unit in its last
    place: measured beside it, so that this test is seen to tell the two apart. Over 2²¹ outputs the rounding of y moves
    the share at 1e-4 by 0.008 (one standard deviation).
    """
    layer = make_layer(batch=(2048,), out=1024, in_=64, r=4, bias=False, k_in=None, dtype=torch.bfloat16)
    assert layer.output_basis is not None
    U, B = layer.output_basis.double(), layer.lora_B.double()
    delta = (B - U @ (U.T @ B)) @ layer.lora_A.double()  # ΔW, before scaling
    scaling = float(ratio * layer.weight.double().norm() / delta.norm())
    x, W = layer.x.double(), layer.weight.double()
    base, update = x @ W.T, scaling * x @ delta.T
    assert update.numel() >= 2**21

    def share(y: Tensor) -> float:
        return float(((y.double() - base) * update).sum() / update.square().sum())

    y = complora_linear(**replace(layer, scaling=scaling).arguments())
    assert share(y) == pytest.approx(1, abs=0.05)

    (A,), (scaled_B,) = fold_factors(
        [layer.lora_A], [layer.lora_B], [layer.output_basis], [None], scaling=scaling, dtype=torch.bfloat16
    )
    twice_rounded = torch.addmm(F.linear(layer.x, layer.weight), layer.x @ A.T, scaled_B.T)
    low, high = addmm_share
    assert low <= share(twice_rounded) <= high


@pytest.mark.parametrize(("ratio", "kept_in_half"), [(1e-4, (0.0, 0.2)), (1e-3, (0.3, 0.8)), (1e-2, (0.95, 1.05))])
def test_a_small_adapter_is_realised_by_merging_into_a_float32_weight(ratio, kept_in_half):
    """Its bits below bfloat16 decide as by chance how `W + ΔW` is rounded; a weight in bfloat16 has none, and loses ΔW.

    The share, as above, moves by 0.02 at 1e-4: y and 2¹⁹ elements of the weight are rounded.
    """
    x, weight = torch.randn(2048, 512).bfloat16(), torch.randn(1024, 512) / 512**0.5
    A, B = (torch.randn(shape).bfloat16().float() for shape in ((4, 512), (1024, 4)))
    B *= 2.0 ** round(math.log2(ratio * weight.norm() / (B @ A).norm()))  # exact in bfloat16, too
    update = (x.double() @ A.double().T) @ B.double().T

    def share(W: Tensor, precision: str) -> float:
        y = lora_linear(x, W, None, A, B, precision=precision)
        return float(((y.double() - x.double() @ W.double().T) * update).sum() / update.square().sum())

    with plans.override(plans.Plan("merge")), torch.autocast("cpu", dtype=torch.bfloat16):
        assert share(weight, "exact") == pytest.approx(1, abs=0.05)
        low, high = kept_in_half
        assert low <= share(weight.bfloat16(), "fast") <= high


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("ratio", [1e-4, 1e-3, 1e-2])
def test_a_small_adapter_is_realised_in_the_gradient_of_x(ratio, dropout_p):
    """`<dX - dY W, u> / |u|²` with `u = m ∘ (dY ΔW)` is 1.00 ± 0.05 in bfloat16, over 2²¹ elements of dX."""
    x, dY, W, A, B = (
        torch.randn(shape).bfloat16() for shape in ((2048, 1024), (2048, 64), (64, 1024), (4, 1024), (64, 4))
    )
    B = (ratio * W.double().norm() / (B.double() @ A.double()).norm() * B.double()).bfloat16()
    m = (next_masks(x, dropout_p) or [torch.ones(x.shape, dtype=torch.float64)])[0]
    base, update = dY.double() @ W.double(), m * ((dY.double() @ B.double()) @ A.double())
    y = lora_linear(x.requires_grad_(), W, None, A, B, dropout_p=dropout_p)
    (dX,) = torch.autograd.grad(y, x, dY)
    assert update.numel() >= 2**21
    share = ((dX.double() - base) * update).sum() / update.square().sum()
    assert float(share) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compile(dtype):
    """Traced whole, forward and backward; `aot_eager` needs no compiler. Then with another batch size."""
    compiled = torch.compile(complora_linear, fullgraph=True, backend="aot_eager")
    saved: set[torch.dtype] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.dtype)
        return tensor

    try:
        for batch in (7, 9):
            layer = make_layer(batch=(batch,), dtype=dtype)
            torch.manual_seed(1)
            expected = results(complora_linear, layer, dropout_p=0.25)
            torch.manual_seed(1)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                ours = results(compiled, layer, dropout_p=0.25)
            assert all(torch.equal(ours[name], expected[name]) for name in expected)
    finally:
        torch.compiler.reset()
    assert torch.int64 in saved  # the seed
    assert torch.bool not in saved  # and not the mask


def test_the_reference_backend_draws_the_same_masks(monkeypatch):
    layer = make_layer(dtype=torch.float64)
    torch.manual_seed(1)
    ours = results(complora_linear, layer, dropout_p=0.25)
    torch.manual_seed(1)
    truth = results(complora_linear, layer, dropout_p=0.25, backend="reference")
    assert_accurate([ours], [truth], [truth])
    monkeypatch.setenv("COMPLORA_BACKEND", "reference")
    torch.manual_seed(1)
    chosen = results(complora_linear, layer, dropout_p=0.25)
    assert all(torch.equal(chosen[name], truth[name]) for name in truth)
    layer.lora_A.requires_grad_()
    assert "LoRALinearFunction" not in str(complora_linear(**layer.arguments()).grad_fn)
    assert "LoRALinearFunction" in str(complora_linear(**layer.arguments(), backend="torch").grad_fn)


U = random_basis(24, 5)
V = random_basis(16, 4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"output_basis": 2 * U}, "output_basis of shape (24, 5) does not have orthonormal columns: expected"),
        ({"input_basis": V + 1e-3}, "input_basis of shape (16, 4) does not have orthonormal columns: expected"),
        ({"output_basis": U * torch.nan}, "output_basis of shape (24, 5) does not have orthonormal columns: expected"),
        ({"output_basis": U.bfloat16()}, "output_basis of shape (24, 5) does not have orthonormal columns: expected"),
        ({"output_basis": V}, "output_basis has shape (16, 4), expected [24, k] with k <= 24"),
        ({"input_basis": U}, "input_basis has shape (24, 5), expected [16, k] with k <= 16"),
        ({"input_basis": torch.eye(16, 17)}, "input_basis has shape (16, 17), expected [16, k] with k <= 16"),
        ({"output_basis": U[:, 0]}, "output_basis has shape (24,), expected [24, k]"),
        ({"output_basis_kind": "top"}, "output_basis_kind='top', expected 'principal' or 'complement'"),
        ({"input_basis_kind": "top"}, "input_basis_kind='top', expected 'principal' or 'complement'"),
        ({"lora_A": torch.ones(0, 16), "lora_B": torch.ones(24, 0)}, "lora_A (0, 16) and lora_B (24, 0), expected"),
        ({"lora_A": torch.ones(2, 16)}, "lora_A (2, 16) and lora_B (24, 3), expected [r, in] and [out, r] with r >= 1"),
        ({"lora_B": torch.ones(3)}, "lora_A (3, 16) and lora_B (3,), expected [r, in] and [out, r] with r >= 1"),
        ({"x": torch.ones(7, 15)}, "x (7, 15) and weight (24, 16), expected [..., in] and [out, in]"),
        ({"x": torch.tensor(1.0)}, "x () and weight (24, 16), expected [..., in] and [out, in]"),
        ({"weight": torch.ones(24)}, "x (7, 16) and weight (24,), expected [..., in] and [out, in]"),
        (
            {"weight": torch.ones(25, 16), "bias": None},
            "lora_A (3, 16) and lora_B (24, 3) do not fit weight (25, 16)",
        ),
        ({"bias": torch.ones(16)}, "bias (16,), expected [out] with out=24"),
        ({"weight": torch.ones(24, 16, requires_grad=True)}, "weight.requires_grad=True, expected a frozen weight"),
        ({"bias": torch.ones(24, requires_grad=True)}, "bias.requires_grad=True, expected a frozen bias"),
        ({"weight": torch.ones(24, 16).half()}, "weight has dtype torch.float16, expected that of x, torch.float32"),
        ({"bias": torch.ones(24).double()}, "bias has dtype torch.float64, expected that of x, torch.float32"),
        ({"dropout_p": 1.0}, "dropout_p=1.0, expected a probability in [0, 1)"),
        ({"dropout_p": -0.1}, "dropout_p=-0.1, expected a probability in [0, 1)"),
        ({"dropout_p": float("nan")}, "dropout_p=nan, expected a probability in [0, 1)"),
        ({"backend": "cublas"}, "backend='cublas', expected one of"),
    ],
)
def test_complora_linear_refuses(changed, message):
    layer = make_layer()
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=re.escape(message)):
        complora_linear(**{**layer.arguments(), "dropout_p": 0.5, **changed})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_trainable_weight_is_fine_where_no_gradient_is_recorded():
    layer = make_layer()
    layer.weight.requires_grad_()
    with torch.no_grad():
        complora_linear(**layer.arguments())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lora_As": []}, "lora_As, lora_Bs, bases and kinds have lengths [0, 1, 1, 1, 0, 0], expected equal ones"),
        ({"lora_Bs": [torch.ones(9, 2)] * 2}, "have lengths [1, 2, 1, 1, 1, 1], expected equal ones of at least 1"),
        ({"output_bases": []}, "have lengths [1, 1, 0, 1, 1, 1], expected equal ones of at least 1"),
        (
            {"input_basis_kinds": ["principal"] * 3},
            "have lengths [1, 1, 1, 1, 1, 3], expected equal ones of at least 1",
        ),
        ({"input_basis_kinds": ["top"]}, "input_basis_kind='top', expected 'principal' or 'complement'"),
        ({"output_bases": [torch.ones(9, 2)]}, "output_basis of shape (9, 2) does not have orthonormal columns"),
    ],
)
def test_fold_factors_refuses(changed, message):
    arguments = {"lora_As": [torch.ones(2, 8)], "lora_Bs": [torch.ones(9, 2)], "output_bases": [None]}
    with pytest.raises(ValueError, match=re.escape(message)):
        fold_factors(**{**arguments, "input_bases": [None], **changed})


@pytest.mark.parametrize(
    ("As", "Bs", "rows", "message"),
    [
        ([], [], [], "folded_As, folded_Bs, rows have lengths 0, 0, 0, expected equal ones of at least 1"),
        ([(2, 16)], [(8, 2)], [(0, 8), (8, 16)], "folded_As, folded_Bs, rows have lengths 1, 1, 2, expected equal"),
        ([(2, 16)], [(8, 2)], [(0, 9)], "rows (0, 9) do not fit a weight of shape (24, 16): expected [r, in], [stop -"),
        ([(2, 16)], [(8, 2)], [(20, 28)], "rows (20, 28) do not fit a weight of shape (24, 16)"),
        ([(2, 16)], [(8, 2)], [(-8, 0)], "rows (-8, 0) do not fit a weight of shape (24, 16)"),
        ([(2, 15)], [(8, 2)], [(0, 8)], "folded_A (2, 15), folded_B (8, 2) and rows (0, 8) do not fit a weight"),
        ([(2, 16)], [(8, 3)], [(0, 8)], "folded_A (2, 16) and folded_B (8, 3), expected [r, in] and [out, r]"),
    ],
)
def test_packed_lora_linear_refuses(As, Bs, rows, message):
    folded_As, folded_Bs = ([torch.ones(shape) for shape in part] for part in (As, Bs))
    with pytest.raises(ValueError, match=re.escape(message)):
        packed_lora_linear(torch.ones(7, 16), torch.ones(24, 16), None, folded_As, folded_Bs, rows)


@pytest.mark.parametrize(
    ("factor", "basis", "kind", "message"),
    [
        (torch.ones(3, 23), U, "principal", "basis has shape (24, 5), expected [23, k] with k <= 23"),
        (torch.ones(3, 24), U, "rest", "basis_kind='rest', expected 'principal' or 'complement'"),
        (torch.ones(3, 24), -3 * U, "principal", "basis of shape (24, 5) does not have orthonormal columns"),
    ],
)
def test_project_complement_refuses(factor, basis, kind, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        project_complement(factor, basis, basis_kind=kind)


def test_factors_that_do_not_fit_the_weight_are_named_as_the_caller_named_them():
    x, weight = torch.randn(3, 5), torch.randn(4, 5)
    with pytest.raises(ValueError, match=r"lora_A \(2, 6\) and lora_B \(4, 2\) do not fit weight \(4, 5\)"):
        complora_linear(x, weight, None, torch.randn(2, 6), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"folded_A \(2, 5\) and folded_B \(3, 2\) do not fit weight \(4, 5\)"):
        lora_linear(x, weight, None, torch.randn(2, 5), torch.randn(3, 2))


def test_a_basis_of_integers_is_refused():
    with pytest.raises(ValueError, match=r"basis has dtype .*, expected a floating-point one"):
        project_complement(torch.randn(2, 4), torch.eye(4, dtype=torch.int64))


# ---- rows with columns of their own


def mixed(dtype: torch.dtype, ranks: tuple[int, ...] = (3, 2, 2)) -> tuple[Tensor, AdaptedLinear, Tensor]:
    """Three samples of five positions; the columns of each sample, for all of its positions."""
    x, weight, bias = torch.randn(3, 5, 16), torch.randn(12, 16) / 4, torch.randn(12)
    As, Bs = [torch.randn(r, 16) / 4 for r in ranks], [torch.randn(4, r) for r in ranks]
    tensors = ([tensor.to(dtype) for tensor in part] for part in ([x, weight, bias], As, Bs))
    (x, weight, bias), As, Bs = tensors
    columns = torch.rand(3, 1, sum(ranks)) < 0.5
    return x, AdaptedLinear(weight, bias, As, Bs, ((0, 4), (4, 8), (8, 12))), columns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("plan", ["addmm", "concat"])
@pytest.mark.parametrize("sequence_first", [False, True])
@torch.no_grad()
def test_rows_with_columns_of_their_own(dtype, backend, plan, sequence_first):
    x, linear, columns = mixed(dtype)
    x, columns = (x.transpose(0, 1), columns.transpose(0, 1)) if sequence_first else (x, columns)
    given = (linear.weight, linear.bias, linear.As, linear.Bs, linear.rows)
    with plans.override(plans.Plan(plan)):
        y = packed_lora_linear(x, *given, precision="fast", columns=columns, backend=backend)
    exact = linear.with_tensors([None if tensor is None else tensor.double() for tensor in linear.tensors()])
    expected = reference.packed_lora_linear(x.double(), exact._replace(columns=columns))
    same_dtype = reference.packed_lora_linear(x, linear._replace(columns=columns))
    assert_as_accurate_as_reference(y, same_dtype, expected, "y")


@torch.no_grad()
def test_an_adapter_with_infinite_values_stays_in_its_own_rows():
    x, linear, _ = mixed(torch.float32, (2, 2, 2))
    linear.As[0][0] = torch.inf  # the first rank
    columns = torch.ones(3, 1, 6, dtype=torch.bool)
    columns[0, :, 0] = False
    given = (linear.weight, linear.bias, linear.As, linear.Bs, linear.rows)
    y = packed_lora_linear(x, *given, columns=columns)
    assert y[0].isfinite().all()
    assert not y[1:, :, :4].isfinite().all()


@pytest.mark.parametrize(
    "columns", [torch.ones(3, 1, 6), torch.ones(3, 7) > 0, torch.ones(2, 1, 7) > 0, torch.ones(3, 1, 6) > 0], ids=str
)
@torch.no_grad()
def test_columns_are_checked(columns):
    x, linear, _ = mixed(torch.float32)
    with pytest.raises(ValueError, match=r"columns is torch.*expected torch.bool that can be expanded to \(3, 5, 7\)"):
        packed_lora_linear(x, linear.weight, linear.bias, linear.As, linear.Bs, linear.rows, columns=columns)


@torch.no_grad()
def test_columns_of_h_are_in_no_merged_weight():
    x, linear, columns = mixed(torch.float32)
    given = (linear.weight, linear.bias, linear.As, linear.Bs, linear.rows)
    with plans.override(plans.Plan("merge")):
        packed_lora_linear(x, *given, precision="fast")
        with pytest.raises(ValueError, match="merge"):
            packed_lora_linear(x, *given, precision="fast", columns=columns)


def test_columns_are_for_inference():
    x, linear, columns = mixed(torch.float32)
    with pytest.raises(ValueError, match="columns is given with gradients enabled"):
        packed_lora_linear(x, linear.weight, linear.bias, linear.As, linear.Bs, linear.rows, columns=columns)
