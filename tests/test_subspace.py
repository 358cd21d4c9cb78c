"""Which directions are protected: bases against weights with known singular vectors, sizes, the cache, and refusals."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import random_basis
from torch import Tensor, nn

import complora_kernels as ck
from complora_kernels import subspace
from complora_kernels.config import CompLoRAConfig
from complora_kernels.functional import project_complement
from complora_kernels.modules.update_limit import update_limit
from complora_kernels.subspace import (
    align_basis,
    clear_cache,
    complement_basis,
    principal_basis,
    projection_basis,
    singular_values,
)

SIDES: tuple[subspace.Side, ...] = ("output", "input")


def known_weight(out: int, in_: int, *, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`W = U diag(σ) V^T` in float64 with σ = m, m - 1, ..., 1; those beyond `rank` are zero."""
    m = min(out, in_)
    U, V = random_basis(out, m, torch.float64), random_basis(in_, m, torch.float64)
    sigma = torch.arange(m, 0, -1, dtype=torch.float64)
    sigma[m if rank is None else rank :] = 0
    return U * sigma @ V.T, U, sigma, V


def projector(basis: Tensor) -> Tensor:  # [d, d], which no sign or rotation of the columns changes
    return basis.double() @ basis.double().T


def distance(a: Tensor, b: Tensor) -> float:
    return float(torch.linalg.matrix_norm(projector(a) - projector(b)))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(out=st.sampled_from([1, 5, 12, 33]), in_=st.sampled_from([1, 7, 12, 33]), data=st.data())
def test_bases_span_the_known_singular_vectors(out, in_, data):
    k = data.draw(st.integers(0, min(out, in_)))
    weight, U, _, V = known_weight(out, in_)
    for side, vectors, d in zip(SIDES, (U, V), (out, in_), strict=True):
        principal = principal_basis(weight, k=k, side=side)
        complement = complement_basis(weight, k=k, side=side)
        assert principal.shape == (d, k)
        assert complement.shape == (d, d - k)
        assert principal.dtype == complement.dtype == torch.float64
        assert principal.is_contiguous()
        assert complement.is_contiguous()
        # The gaps between singular values are 1 and the largest is 33: float64 rounding, with room.
        assert distance(principal, vectors[:, :k]) < 1e-12
        both = torch.cat([principal, complement], 1)  # [d, d]: orthonormal, so the complement is what is left
        assert torch.allclose(both.T @ both, torch.eye(d, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bases_are_float32_or_wider(dtype):
    weight = known_weight(20, 12)[0].to(dtype)
    basis = principal_basis(weight, k=5)
    assert basis.dtype == torch.float32
    exact = torch.linalg.svd(weight.double()).U[:, :5]
    assert distance(basis, exact) < 1e-5  # float32 rounding over gaps of 1 below a norm of 12


@pytest.mark.parametrize("shape", [(48, 48), (40, 72), (72, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smallest", [1e-1, 1e-3, 2e-5, 1e-7, 0.0], ids=lambda smallest: f"{smallest:g}")
def test_the_projection_is_that_of_a_float64_decomposition(shape, dtype, smallest):
    """To what rounding its vectors to float32 leaves, 4e-8 √m; a float32 decomposition is a hundred times as far."""
    m = min(shape)
    U, V = random_basis(shape[0], m, torch.float64), random_basis(shape[1], m, torch.float64)
    sigma = torch.logspace(0, math.log10(smallest or 1e-4), m, dtype=torch.float64)
    sigma[m - 3 :] = smallest  # three equal ones, or a weight of rank m - 3
    weight = (U * sigma @ V.T).to(dtype)
    exact_U, exact_sigma, exact_Vh = torch.linalg.svd(weight.double())
    for side, vectors in zip(SIDES, (exact_U, exact_Vh.T), strict=True):
        for k in range(m + 1):
            basis = principal_basis(weight, k=k, side=side)
            subspace.check_orthonormal(basis, side)
            squares = exact_sigma.square() / exact_sigma[0].square()
            if k == m or squares[k - 1] - squares[k] > 1e-7:
                assert distance(basis, vectors[:, :k]) < 2e-6


@pytest.mark.parametrize(
    ("energy", "k"),
    # σ² = 16, 9, 4, 1 of 30: the shares of the first 1, 2, 3, 4 are 0.533, 0.833, 0.967, 1.
    [(0.01, 1), (0.53, 1), (0.54, 2), (0.83, 2), (0.84, 3), (0.96, 3), (0.97, 4), (1.0, 4)],
)
def test_energy_is_the_smallest_k_that_holds_the_share(energy, k):
    weight = known_weight(4, 6)[0]
    assert principal_basis(weight, energy=energy).shape == (4, k)
    assert complement_basis(weight, energy=energy, side="input").shape == (6, 6 - k)


def test_energy_held_exactly_needs_no_further_direction():
    weight = torch.diag(torch.tensor([2.0, 2.0, 2.0, 2.0]))  # shares 1/4, 1/2, ... without rounding
    assert [principal_basis(weight, energy=share).shape[1] for share in (0.25, 0.5, 0.75, 1.0)] == [1, 2, 3, 4]


@pytest.mark.parametrize(("ratio", "k"), [(0.0, 0), (0.1, 1), (0.24, 2), (0.5, 5), (0.96, 10), (1.0, 10)])
def test_ratio_is_of_the_smaller_dimension(ratio, k):
    weight = known_weight(30, 10)[0]
    assert principal_basis(weight, ratio=ratio).shape == (30, k)
    assert principal_basis(weight, ratio=ratio, side="input").shape == (10, k)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rank_deficient_weight(dtype):
    weight, U, _, V = known_weight(20, 15, rank=3)
    weight = weight.to(dtype)
    assert principal_basis(weight, energy=1.0).shape == (20, 3)
    assert distance(principal_basis(weight, k=3), U[:, :3]) < 1e-5
    assert distance(principal_basis(weight, k=3, side="input"), V[:, :3]) < 1e-5
    beyond = principal_basis(weight, k=7)  # any four more directions
    assert torch.allclose(beyond.T @ beyond, torch.eye(7, dtype=dtype), atol=1e-5)
    assert torch.allclose(projector(beyond) @ U[:, :3], U[:, :3], atol=1e-5)


def test_zero_weight_protects_nothing_by_energy():
    assert principal_basis(torch.zeros(6, 4), energy=0.9).shape == (6, 0)
    basis = projection_basis(torch.zeros(6, 4), CompLoRAConfig(subspace_energy=0.9), "output")
    assert (basis.k, basis.energy, basis.matrix.shape) == (0, 0.0, (6, 0))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("k", "kind", "columns"), [(0, "principal", 0), (6, "principal", 6), (7, "complement", 5), (12, "complement", 0)]
)
def test_the_narrower_basis_is_stored(side, k, kind, columns):
    weight, U, sigma, V = known_weight(12, 12)
    basis = projection_basis(weight.float(), CompLoRAConfig(subspace_k=k), side)
    assert (basis.kind, basis.k, basis.matrix.shape) == (kind, k, (12, columns))
    assert basis.matrix.dtype == torch.float32
    assert basis.energy == pytest.approx(float(sigma[:k].square().sum() / sigma.square().sum()), abs=1e-6)
    factor = torch.randn(3, 12)
    protected = (U if side == "output" else V)[:, :k].float()
    expected = factor - factor @ protected @ protected.T
    projected = project_complement(factor, basis.matrix, basis_kind=basis.kind)
    assert torch.allclose(projected, expected, atol=1e-5)  # float32 rounding


@pytest.mark.parametrize(("out", "in_"), [(40, 8), (8, 40)])
def test_the_narrower_basis_of_a_rectangular_weight(out, in_):
    weight = known_weight(out, in_)[0]
    for side, d in zip(SIDES, (out, in_), strict=True):
        basis = projection_basis(weight, CompLoRAConfig(subspace_k=8), side)
        narrow, columns = ("principal", 8) if d == 40 else ("complement", 0)
        assert (basis.kind, basis.matrix.shape) == (narrow, (d, columns))


# ---- directions of activations


def known_activations(out: int, in_: int, M: int = 200) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, inputs X [M, in], and the right singular vectors of Y = X W^T and of X."""
    weight, X = torch.randn(out, in_, dtype=torch.float64), torch.randn(M, in_, dtype=torch.float64)
    X = X * torch.linspace(3, 1, in_, dtype=torch.float64)  # apart from each other
    Y = X @ weight.T
    return weight, X, torch.linalg.svd(Y).Vh.T, torch.linalg.svd(X).Vh.T


@pytest.mark.parametrize(("out", "in_"), [(12, 12), (20, 7), (7, 20), (1, 5), (5, 1)])
def test_bases_of_activations_are_the_right_singular_vectors_of_inputs_and_products(out, in_):
    weight, X, of_Y, of_X = known_activations(out, in_)
    for side, vectors, d in zip(SIDES, (of_Y, of_X), (out, in_), strict=True):
        for k in {0, 1, min(out, in_) // 2, min(out, in_)}:
            principal = principal_basis(weight, k=k, side=side, second_moment=X.T @ X)
            complement = complement_basis(weight, k=k, side=side, second_moment=X.T @ X)
            assert (principal.shape, complement.shape) == ((d, k), (d, d - k))
            assert principal.is_contiguous()
            assert distance(principal, vectors[:, :k]) < 1e-9  # 1e-16 of the largest eigenvalue, over the gaps
            both = torch.cat([principal, complement], 1)
            assert torch.allclose(both.T @ both, torch.eye(d, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_directions_of_activations_come_strongest_first_with_their_largest_entry_positive(dtype):
    weight, X, of_Y, of_X = known_activations(15, 10)
    weight = weight.to(dtype)
    of_Y = torch.linalg.svd(X @ weight.double().T).Vh.T
    for side, vectors in zip(SIDES, (of_Y, of_X), strict=True):
        basis = principal_basis(weight, k=6, side=side, second_moment=X.T @ X)
        assert basis.dtype == torch.promote_types(dtype, torch.float32)
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        assert torch.allclose(
            basis.double(), (vectors * largest.sign())[:, :6], atol=1e-6 if dtype != torch.float64 else 1e-10
        )


def test_the_energy_of_activations_is_the_share_of_the_trace():
    weight, X, *_ = known_activations(12, 12)
    for side, seen in zip(SIDES, (X @ weight.T, X), strict=True):
        shares = torch.linalg.svdvals(seen).square()
        shares /= shares.sum()
        for energy in (0.01, 0.3, 0.7, 0.999, 1.0):
            config = CompLoRAConfig(subspace_energy=energy, subspace_source="activations")
            basis = projection_basis(weight, config, side, second_moment=X.T @ X)
            k = min(int((shares.cumsum(0) < energy).sum()) + 1, 12)
            assert basis.k == k
            assert basis.energy == pytest.approx(float(shares[:k].sum()))
            assert basis.kind == ("principal" if k <= 6 else "complement")


def test_activations_of_less_than_full_rank():
    weight, X, *_ = known_activations(9, 12)
    X = X[:4]
    moment = X.T @ X
    for side, d in zip(SIDES, (9, 12), strict=True):
        assert principal_basis(weight, energy=1.0, side=side, second_moment=moment).shape == (d, 4)
        beyond = principal_basis(weight, k=6, side=side, second_moment=moment)  # any two more directions
        assert torch.allclose(beyond.T @ beyond, torch.eye(6, dtype=torch.float64), atol=1e-12)
    nothing = torch.zeros(12, 12)
    assert principal_basis(weight, energy=0.5, second_moment=nothing).shape == (9, 0)
    config = CompLoRAConfig(subspace_k=3, subspace_source="activations")
    assert projection_basis(weight, config, "output", second_moment=nothing)[1:] == ("principal", 3, 0.0)


def test_activations_are_decomposed_once(monkeypatch):
    weight, X, *_ = known_activations(12, 9)
    others, moment, shapes, eigh = weight + 1, X.T @ X, [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: shapes.append(matrix.shape) or eigh(matrix))
    for each in (weight, weight.clone(), others):
        for side in SIDES:
            principal_basis(each, k=2, side=side, second_moment=moment.clone())
    assert len(shapes) == 3  # one for X^T X, and one for Y^T Y of each of two weights
    basis = principal_basis(weight, k=2, second_moment=moment)
    before = basis.clone()
    basis.zero_()
    assert torch.equal(principal_basis(weight, k=2, second_moment=moment), before)
    principal_basis(weight, k=2, second_moment=moment + torch.eye(9))
    assert len(shapes) == 4
    subspace.clear_cache()
    principal_basis(weight, k=2, second_moment=moment)
    assert len(shapes) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 8}, "k=8, expected at most min(out, in)=7 for weight of shape (7, 9)"),
        ({"energy": 1.0, "side": "input"}, "energy=1.0, expected at most 0."),
        ({"k": 2, "side": "left"}, "side='left', expected 'output' or 'input'"),
        (
            {"k": 2, "second_moment": torch.eye(7)},
            "second_moment of weight has shape (7, 7) and dtype torch.float32, exp",
        ),
        (
            {"k": 2, "second_moment": torch.eye(9).int()},
            "second_moment of weight has shape (9, 9) and dtype torch.int32",
        ),
        ({"k": 2, "second_moment": torch.eye(9) / 0}, "second_moment of weight holds NaN or infinite values, expected"),
    ],
)
def test_refuses_activations(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        principal_basis(torch.randn(7, 9), **{"second_moment": torch.eye(9), **arguments})


@pytest.mark.parametrize(
    ("source", "given"),
    [("activations", None), ("weight", torch.eye(4)), ("ends", torch.eye(4)), ("random", torch.eye(4))],
)
def test_a_second_moment_belongs_to_activations_alone(source, given):
    config = CompLoRAConfig(subspace_k=1, subspace_source=source)
    with pytest.raises(ValueError, match=r"second_moment=.* of a\.b with subspace_source='.*', expected X\^T X with"):
        projection_basis(torch.randn(3, 4), config, "output", "a.b", second_moment=given)


def test_every_named_source_has_a_record():
    assert tuple(subspace.SOURCES) == get_args(subspace.SubspaceSource)


def test_a_source_is_added_by_its_record_alone(monkeypatch):
    """The weakest directions of a weight, under a name of their own."""
    weight, U, sigma, _ = known_weight(6, 8)

    def weakest(*arguments: Any) -> subspace.Directions:
        vectors, energies = subspace.SOURCES["weight"].directions(*arguments)
        return subspace.Directions(vectors.flip(1), energies.flip(0))

    def share(weight: Tensor, side: subspace.Side, directions: subspace.Directions, k: int) -> float:
        return float(directions.energies[:k].sum() / directions.energies.sum())

    monkeypatch.setitem(
        subspace.SOURCES,
        "weakest",
        subspace.Source(needs_data=False, recomputable=True, directions=weakest, energy=share),
    )
    config: Any = CompLoRAConfig(subspace_k=2, subspace_source="weakest", target_modules="0")  # type: ignore[arg-type]
    linear = nn.Linear(8, 6).double()
    linear.weight = nn.Parameter(weight)
    model: Any = ck.apply_complora(nn.Sequential(linear), config, progress=False)
    basis = model[0].basis("", "output")
    assert distance(basis.matrix, U[:, -2:]) < 1e-12
    assert ck.subspace_report(model)[0].energy == pytest.approx(float(sigma[-2:].square().sum() / sigma.square().sum()))


# ---- random directions


@pytest.mark.parametrize(("out", "in_"), [(8, 8), (12, 7), (7, 12)])
@pytest.mark.parametrize("k", [0, 1, 4, 5, 7])
@pytest.mark.parametrize("side", ["output", "input"])
def test_the_ends_of_the_spectrum_are_protected_in_turns(out, in_, k, side):
    """Against torch's own decomposition: of W' = P W the triples in the middle are left, the k outermost are gone."""
    torch.manual_seed(0)
    weight = torch.randn(out, in_)
    U, sigma, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    outermost = [*range((k + 1) // 2), *range(len(sigma) - k // 2, len(sigma))]
    vectors = (U if side == "output" else Vh.mT)[:, outermost]  # [d, k]
    basis = projection_basis(weight, CompLoRAConfig(subspace_k=k, subspace_source="ends"), side, "name")
    matrix = basis.matrix.double()
    onto = matrix @ matrix.mT
    kept = onto if basis.kind == "complement" else torch.eye(len(onto)).double() - onto
    torch.testing.assert_close(kept, torch.eye(len(kept)).double() - vectors @ vectors.mT, rtol=0, atol=1e-5)
    assert basis.k == k
    assert basis.energy == pytest.approx(float(sigma[outermost].square().sum() / sigma.square().sum()), abs=1e-6)


@pytest.mark.parametrize(("k", "top"), [(1, 1), (4, 2), (5, 3)])
def test_a_bound_by_the_next_singular_value_counts_the_upper_end(k, top):
    torch.manual_seed(0)
    weight = torch.randn(8, 8)
    sigma = torch.linalg.svdvals(weight.double())
    options = {"subspace_k": k, "subspace_source": "ends", "update_bound": 0.5}
    limits = [
        update_limit(weight, CompLoRAConfig(update_bound_relative_to=reference, **options), k, "name")
        for reference in ("next", "gap")
    ]
    assert limits == pytest.approx([float(sigma[top]) / 2, float(sigma[top - 1] - sigma[top]) / 2], rel=1e-6)


def test_random_directions_are_reproducible_and_of_their_own():
    weight = known_weight(60, 40)[0].float()

    def basis(name: str = "a", side: subspace.Side = "output", seed: int = 0) -> subspace.Basis:
        config = CompLoRAConfig(subspace_k=10, subspace_source="random", subspace_seed=seed)
        return projection_basis(weight, config, side, name)

    first = basis()
    torch.manual_seed(99)  # the directions belong to the configuration, not to the state of the generator
    subspace.clear_cache()
    assert torch.equal(first.matrix, basis().matrix)
    assert torch.allclose(first.matrix.T @ first.matrix, torch.eye(10), atol=1e-5)
    weight_basis = principal_basis(weight, k=10)
    # Unrelated spaces of 10 in 60 dimensions have |P - Q|² = 2·10·(1 - 10/60) on average, 4.08².
    for other in (basis("b").matrix, basis(seed=1).matrix, weight_basis):
        assert distance(first.matrix, other) > 3
    assert basis(side="input").matrix.shape == (40, 10)
    # A random direction holds the average share, 1/60 each, not the largest.
    assert first.energy == pytest.approx(10 / 60, abs=0.1)


def test_drawing_random_directions_leaves_the_default_generator_alone():
    weight = known_weight(9, 7)[0]
    before = torch.get_rng_state()
    projection_basis(weight, CompLoRAConfig(subspace_k=2, subspace_source="random"), "output", "name")
    assert torch.equal(torch.get_rng_state(), before)


def test_weight_and_its_gradient_stay_as_they_were():
    weight = torch.nn.Parameter(known_weight(9, 7)[0])
    before = weight.detach().clone()
    basis = projection_basis(weight, CompLoRAConfig(subspace_k=3), "output").matrix
    assert torch.equal(weight, before)
    assert not basis.requires_grad
    assert weight.grad is None


def test_strided_weights():
    weight = known_weight(12, 9)[0]
    spread = torch.zeros(24, 9, dtype=torch.float64)
    spread[::2] = weight
    assert distance(principal_basis(spread[::2], k=4), principal_basis(weight, k=4)) < 1e-12
    assert distance(principal_basis(weight.T, k=4), principal_basis(weight, k=4, side="input")) < 1e-12


@pytest.fixture
def decompositions(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the weights that were decomposed."""
    shapes: list[torch.Size] = []
    decompose = subspace._singular_vectors

    def counting(matrix: Tensor) -> tuple[subspace.Directions, subspace.Directions]:
        shapes.append(matrix.shape)
        return decompose(matrix)

    monkeypatch.setattr(subspace, "_singular_vectors", counting)
    return shapes


def test_a_weight_is_decomposed_once(decompositions):
    weight = known_weight(12, 9)[0].float()
    for k in (2, 5):
        for side in SIDES:
            principal_basis(weight, k=k, side=side)
            complement_basis(weight.clone(), k=k, side=side)
    assert len(decompositions) == 1
    subspace.clear_cache()
    principal_basis(weight, k=2)
    assert len(decompositions) == 2


def test_a_changed_weight_is_decomposed_again(decompositions):
    weight = known_weight(12, 9)[0].float()
    before = principal_basis(weight, k=3)
    weight[0, 0] += 5
    assert distance(principal_basis(weight, k=3), before) > 1e-2
    assert len(decompositions) == 2


@pytest.mark.parametrize("k", [0, 3, 12])
@pytest.mark.parametrize("basis_of", [principal_basis, complement_basis])
@pytest.mark.parametrize("side", SIDES)
def test_writing_to_a_basis_does_not_reach_the_cache(side, basis_of, k):
    weight = known_weight(12, 12)[0].float()
    basis = basis_of(weight, k=k, side=side)
    before = basis.clone()
    basis.zero_()
    assert torch.equal(basis_of(weight, k=k, side=side), before)


def test_the_cache_is_bounded(monkeypatch, decompositions):
    weights = [known_weight(8, 8)[0] for _ in range(3)]

    def decomposed(index: int) -> bool:
        """Whether a basis of this weight takes a decomposition."""
        known = len(decompositions)
        principal_basis(weights[index], k=1)
        return len(decompositions) > known

    one = 2 * (8 * 8 + 8) * 8  # bytes of the vectors and the energies of either side in float64
    monkeypatch.setattr(subspace, "CACHE_BYTES", 2 * one)
    assert [decomposed(index) for index in (0, 1, 0, 2)] == [True, True, False, True]  # 2 displaces 1, last used
    assert [decomposed(index) for index in (0, 2, 1)] == [False, False, True]
    monkeypatch.setattr(subspace, "CACHE_BYTES", 0)  # the newest is kept whatever its size
    assert [decomposed(index) for index in (0, 0, 1)] == [True, False, True]


def test_fingerprint_sees_every_bit_the_shape_and_the_dtype():
    weight = known_weight(6, 4)[0].float()
    seen = {subspace.fingerprint(weight)}
    for index in range(weight.numel()):
        changed = weight.clone()
        changed.view(-1)[index] = torch.nextafter(changed.view(-1)[index], torch.tensor(9.0))
        seen.add(subspace.fingerprint(changed))
    seen |= {subspace.fingerprint(weight.view(4, 6)), subspace.fingerprint(weight.view(torch.int32))}
    assert len(seen) == 1 + 24 + 2
    assert subspace.fingerprint(weight.T.contiguous().T) == subspace.fingerprint(weight)
    assert subspace.fingerprint(weight.bfloat16()) != subspace.fingerprint(weight.half())
    assert subspace.fingerprint(torch.empty(0, 4)) != subspace.fingerprint(torch.empty(4, 0))


def test_bases_from_inference_mode_can_be_trained_with():
    weight = known_weight(8, 8)[0].float()
    with torch.inference_mode():
        principal_basis(weight, k=8)
    basis = principal_basis(weight, k=8)[:, :3].contiguous()
    factor = torch.randn(2, 8, requires_grad=True)
    project_complement(factor, basis).sum().backward()
    assert factor.grad is not None


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({}, "k, energy, ratio=None, expected exactly one of the three"),
        ({"k": 2, "ratio": 0.5}, "k, energy, ratio={'k': 2, 'ratio': 0.5}, expected exactly one of the three"),
        ({"k": -1}, "k=-1, expected an integer of at least 0"),
        ({"k": 2.0}, "k=2.0, expected an integer of at least 0"),
        ({"k": 8}, "k=8, expected at most min(out, in)=7 for weight of shape (9, 7)"),
        ({"energy": 0.0}, "energy=0.0, expected a share in (0, 1]"),
        ({"energy": 1.5}, "energy=1.5, expected a share in (0, 1]"),
        ({"ratio": -0.5}, "ratio=-0.5, expected a share in [0, 1]"),
        ({"ratio": 2.0}, "ratio=2.0, expected a share in [0, 1]"),
        ({"k": 2, "side": "left"}, "side='left', expected 'output' or 'input'"),
    ],
)
@pytest.mark.parametrize("basis_of", [principal_basis, complement_basis])
def test_refuses_a_size_or_side(basis_of, size, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        basis_of(torch.randn(9, 7), **size)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.randn(3, 4).fill_diagonal_(torch.nan), "weight of shape (3, 4) holds NaN or infinite values"),
        (torch.randn(3, 4).fill_diagonal_(torch.inf), "weight of shape (3, 4) holds NaN or infinite values"),
        (torch.randn(3, 4, 5), "weight has shape (3, 4, 5), dtype torch.float32"),
        (torch.randn(3), "weight has shape (3,), dtype torch.float32"),
        (torch.ones(3, 4, dtype=torch.int8), "weight has shape (3, 4), dtype torch.int8"),
        (torch.randn(3, 4, device="meta"), "weight has shape (3, 4), dtype torch.float32 and device meta"),
    ],
)
def test_refuses_a_weight(weight, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.*expected"):
        principal_basis(weight, k=1)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_singular_values_are_the_same_whether_the_decomposition_is_kept_or_not(shape, dtype):
    rank = 3
    left, right = torch.randn(shape[0], rank, dtype=torch.float64), torch.randn(rank, shape[1], dtype=torch.float64)
    weight = (left @ right).to(dtype)
    clear_cache()
    alone = singular_values(weight)
    principal_basis(weight, k=2)
    kept = singular_values(weight)
    expected = torch.linalg.svdvals(weight.double())
    for found in (alone, kept):
        assert found.dtype == torch.float64
        # Those below the rounding of float32, the precision in which weights are told apart, are 0.
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-5 * float(expected[0]))
        if dtype != torch.bfloat16:  # whose rounding raises the rank
            assert (found > 0).tolist() == [i < rank for i in range(min(shape))]


def test_projection_basis_names_the_weight():
    config = CompLoRAConfig(subspace_k=8)
    with pytest.raises(
        ValueError, match=r"^subspace_k=8, expected at most min\(out, in\)=7 for resblocks.0.attn.q of shape \(9, 7\)$"
    ):
        projection_basis(torch.randn(9, 7), config, "output", "resblocks.0.attn.q")
    with pytest.raises(ValueError, match=r"^resblocks.0.attn.q of shape \(9, 9\) holds NaN"):
        projection_basis(torch.full((9, 9), torch.nan), config, "output", "resblocks.0.attn.q")


def test_check_orthonormal_looks_again_after_a_write():
    basis = random_basis(10, 3)
    subspace.check_orthonormal(basis, "U")
    basis[0, 0] += 0.1
    with pytest.raises(
        ValueError, match=r"^U of shape \(10, 3\) does not have orthonormal columns: expected U\^T U = I"
    ):
        subspace.check_orthonormal(basis, "U")


def test_check_orthonormal_ignores_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        subspace.check_orthonormal(random_basis(64, 16), "U")


@pytest.mark.parametrize("kind", ["principal", "complement"])
@pytest.mark.parametrize("noise", [1e-3, 1e-5])
def test_align_basis_keeps_the_factor(kind, noise):
    basis = random_basis(40, 10)
    factor = project_complement(torch.randn(3, 40), basis, basis_kind=kind)
    other = torch.linalg.qr(basis + noise * torch.randn(40, 10) / 40**0.5).Q  # a half-precision copy gives such a basis
    unaligned = project_complement(factor, other, basis_kind=kind)
    assert (unaligned - factor).norm() > 1e-6 * factor.norm()
    aligned = align_basis(other, factor, kind=kind)
    subspace.check_orthonormal(aligned, "aligned")
    assert aligned.shape == other.shape
    projected = project_complement(factor, aligned, basis_kind=kind)
    assert (projected - factor).norm() <= 2e-6 * factor.norm()  # float32 rounding of two short products
    assert distance(aligned, other) < 2 * noise * 10**0.5  # turned no further than the noise had turned it


def test_align_basis_leaves_a_fitting_basis_alone():
    basis = random_basis(40, 10)
    factor = project_complement(torch.randn(3, 40), basis)
    assert align_basis(basis, factor, kind="principal") is basis
    assert align_basis(basis, torch.zeros(3, 40), kind="principal") is basis
    empty = basis[:, :0]
    assert align_basis(empty, factor, kind="complement") is empty


def test_align_basis_with_less_room_than_rows():
    basis = random_basis(12, 4)
    factor = project_complement(torch.randn(6, 12), basis, basis_kind="complement")  # rank 4
    factor += 1e-4 * torch.randn(6, 12)  # rounding makes it rank 6
    aligned = align_basis(basis, factor, kind="complement")
    assert aligned.shape == (12, 4)
    subspace.check_orthonormal(aligned, "aligned")
    assert (project_complement(factor, aligned, basis_kind="complement") - factor).norm() < 1e-3 * factor.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_decomposed_together_have_the_same_bases(dtype, monkeypatch):
    """One call for each shape; a weight whose small singular values its squares hide is decomposed by itself."""
    weights = [torch.randn(24, 40), torch.randn(24, 40), torch.randn(40, 24), torch.randn(40, 24), torch.randn(24, 40)]
    weights[1][12:] *= 1e-7
    weights = [weight.to(dtype) for weight in weights]
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(matrix.shape) or eigh(matrix))
    subspace.decompose_together([*weights, weights[0]])
    assert calls == [(3, 24, 24), (2, 24, 24)]
    config = CompLoRAConfig(subspace_k=8)
    together = [projection_basis(weight, config, side) for weight in weights for side in ("output", "input")]
    assert calls[2:] == [(24, 24)]
    for basis, (weight, side) in zip(together, itertools.product(weights, ("output", "input")), strict=True):
        U, _, Vh = torch.linalg.svd(weight.double())
        vectors = U[:, :8] if side == "output" else Vh[:8].T
        found = projector(basis.matrix)
        found = found if basis.kind == "principal" else torch.eye(len(found)) - found
        assert torch.linalg.matrix_norm(found - projector(vectors)) < 1e-5


def test_a_layer_decomposes_its_weights_together_where_that_is_faster(monkeypatch):
    attention = torch.nn.MultiheadAttention(16, 2)
    config = CompLoRAConfig(r=2, target_modules=("q", "k", "v", "o"))
    expected = ck.CompLoRAMultiheadAttention.from_attention(attention, config)
    expected.compute_bases()
    subspace.clear_cache()
    monkeypatch.setattr(subspace, "TOGETHER", ("cpu",))
    shapes = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: shapes.append(matrix.shape) or eigh(matrix))
    layer = ck.CompLoRAMultiheadAttention.from_attention(attention, config)
    layer.compute_bases()
    assert shapes == [(4, 16, 16)]
    for name in "qkvo":
        ours, theirs = layer.basis(name, "output"), expected.basis(name, "output")
        assert ours is not None
        assert theirs is not None
        assert distance(ours.matrix, theirs.matrix) < 1e-5
