"""`bound_updates`: ΔW' = ΔW · min(1, limit / |ΔW|), against torch's decomposition of the dense ΔW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_as_accurate_as_reference
from torch import Tensor

from complora_kernels import reference
from complora_kernels.functional import bound_updates, fold_factors

SHAPES = [(1, 1, 1), (5, 2, 3), (3, 7, 9), (4, 9, 9)]  # r, out, in: r above the others too

every_norm = pytest.mark.parametrize("norm", ["frobenius", "spectral"])
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def factors(r: int, out: int, inputs: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    A, B = torch.randn(r, inputs, dtype=torch.float64), torch.randn(out, r, dtype=torch.float64)
    return A.to(dtype).requires_grad_(), B.to(dtype).requires_grad_()


def dense_norm(A: Tensor, B: Tensor, norm: str) -> Tensor:
    sigma = torch.linalg.svdvals(B.detach().double() @ A.detach().double())
    return sigma[0] if norm == "spectral" else sigma.square().sum().sqrt()


@every_norm
@every_shape
@pytest.mark.parametrize("bound", [reference.bound_updates, bound_updates], ids=["reference", "functional"])
def test_the_norm_is_the_limit_where_it_was_above(bound, shape, norm):
    A, B = factors(*shape)
    size = dense_norm(A, B, norm)
    for c in (0.01, 0.9, 1.1):
        (same_A,), (bounded,) = bound([A], [B], [c * size], norm=norm)
        assert torch.equal(same_A, A)
        torch.testing.assert_close(bounded, min(c, 1) * B, rtol=1e-12, atol=0)
        assert float(dense_norm(A, bounded, norm)) == pytest.approx(min(c, 1) * float(size), rel=1e-12)


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_within_its_limit_an_update_keeps_every_bit(norm, dtype):
    """Of the fold in the compute dtype too, which rounds once; and a bounded update that is bounded again."""
    wide = torch.promote_types(dtype, torch.float32)
    A, B = factors(3, 24, 20, wide)
    expected = fold_factors([A], [B], [None], [None], scaling=0.3, dtype=dtype)
    folded = fold_factors([A], [B], [None], [None], scaling=0.3)
    limit = dense_norm(folded[0][0], folded[1][0], norm)
    computed = bound_updates(*folded, [limit * (1 + 1e-9)], norm=norm, dtype=dtype)
    for ours, plain in zip(computed, expected, strict=True):
        assert torch.equal(ours[0], plain[0])
    weights = [torch.randn_like(part[0]) for part in expected]
    gradients = [
        torch.autograd.grad([part[0] for part in parts], (A, B), weights, retain_graph=True)
        for parts in (computed, expected)
    ]
    assert all(map(torch.equal, *gradients))


@every_norm
@pytest.mark.parametrize("seed", range(5))
def test_a_bounded_update_is_not_changed_again(norm, seed):
    torch.manual_seed(seed)
    A, B = factors(8, 96, 64, torch.float32)
    limit = 0.37 * dense_norm(A, B, norm)
    _, once = bound_updates([A], [B], [limit], norm=norm)
    _, twice = bound_updates([A], once, [limit], norm=norm)
    assert torch.equal(once[0], twice[0])


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy_of_outputs_and_gradients(norm, dtype):
    A, B = factors(4, 33, 40, torch.float32)
    limit = (0.5 * dense_norm(A, B, norm)).float()
    weights = torch.randn(4, 40, dtype=dtype), torch.randn(33, 4, dtype=dtype)

    def results(bound: Any, wide: torch.dtype, out: torch.dtype) -> list[Tensor]:
        leaves = [factor.detach().to(wide).requires_grad_() for factor in (A, B)]
        As, Bs = bound([leaves[0]], [leaves[1]], [limit.to(wide)], norm=norm, dtype=out)
        return [As[0], Bs[0], *torch.autograd.grad((*As, *Bs), leaves, [weight.to(out) for weight in weights])]

    ours = results(bound_updates, torch.float32, dtype)
    plain = results(reference.bound_updates, torch.float32, dtype)
    exact = results(reference.bound_updates, torch.float64, torch.float64)
    for name, mine, theirs, true in zip(("A", "B", "dA", "dB"), ours, plain, exact, strict=True):
        assert_as_accurate_as_reference(mine, theirs, true, name, dtype)


@every_norm
@every_shape
@pytest.mark.parametrize("c", [0.5, 2.0], ids=["active", "inactive"])
def test_gradients_are_those_of_finite_differences(norm, shape, c):
    A, B = factors(*shape)
    (first_A, first_B), (second_A, second_B) = (factors(*shape) for _ in range(2))
    limits = [c * dense_norm(A, B, norm), 0.5 * dense_norm(second_A, second_B, norm), None]

    def bounded(*given: Tensor) -> tuple[Tensor, ...]:
        As, Bs = bound_updates([*given[:2], first_A], [*given[2:], first_B], limits, norm=norm)
        return (*As, *Bs)

    assert torch.autograd.gradcheck(bounded, (A, second_A, B, second_B))
    assert torch.autograd.gradcheck(lambda A: bounded(A, second_A, B.detach(), second_B.detach()), (A,))
    assert torch.autograd.gradcheck(lambda B: bounded(A.detach(), second_A.detach(), B, second_B), (B,))


@every_norm
def test_gradients_can_be_differentiated_and_batched(norm):
    A, B = factors(2, 4, 5)
    limits = [0.5 * dense_norm(A, B, norm)]
    assert torch.autograd.gradgradcheck(lambda A, B: bound_updates([A], [B], limits, norm=norm)[1][0], (A, B))
    _, (bounded,) = bound_updates([A], [B], limits, norm=norm)
    several = torch.randn(3, *bounded.shape, dtype=torch.float64)
    batched = torch.autograd.grad(bounded, (A, B), several, retain_graph=True, is_grads_batched=True)
    for i, weights in enumerate(several):
        for ours, alone in zip(batched, torch.autograd.grad(bounded, (A, B), weights, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[i], alone, rtol=1e-10, atol=1e-12)  # two formulas in float64


@every_norm
def test_an_update_of_zero_gets_the_gradient_that_it_would_get_without_a_limit(norm):
    """B starts at zero, and so may both factors."""
    for A, B in ((torch.randn(3, 7), torch.zeros(6, 3)), (torch.zeros(3, 7), torch.zeros(6, 3))):
        A.requires_grad_()
        B.requires_grad_()
        As, Bs = bound_updates([A], [B], [torch.tensor(0.1)], norm=norm)
        weights = torch.randn_like(A), torch.randn_like(B)
        gradients = torch.autograd.grad((*As, *Bs), (A, B), weights)
        assert all(map(torch.equal, gradients, weights))


@every_norm
def test_a_layer_that_is_not_used_gets_no_gradient(norm):
    pairs = [factors(2, 5, 6) for _ in range(3)]
    As, Bs = map(list, zip(*pairs, strict=True))
    limits = [0.5 * dense_norm(A, B, norm) for A, B in pairs]
    bounded_As, bounded_Bs = bound_updates(As, Bs, limits, norm=norm)
    (bounded_Bs[1].sum() + bounded_As[2].sum()).backward()
    assert As[0].grad is None
    assert Bs[0].grad is None
    expected = reference.bound_updates(As[1:2], Bs[1:2], limits[1:2], norm=norm)[1][0].sum()
    for factor, gradient in zip((As[1], Bs[1]), torch.autograd.grad(expected, (As[1], Bs[1])), strict=True):
        torch.testing.assert_close(factor.grad, gradient, rtol=1e-10, atol=1e-12)
    assert torch.equal(As[2].grad, torch.ones_like(As[2]))
    assert not Bs[2].grad.any()


@every_norm
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(norm, value):
    A, B = (factor.detach() for factor in factors(2, 5, 6))
    B[1, 1] = value
    _, (bounded,) = bound_updates([A], [B], [torch.tensor(1.0)], norm=norm)
    assert not torch.isfinite(bounded).all()


@every_norm
def test_a_limit_may_be_small_and_an_update_large(norm):
    """No square of either overflows or vanishes."""
    A, B = (factor.detach() for factor in factors(3, 8, 9, torch.float32))
    for size in (1e-18, 1.0, 1e18):
        _, (bounded,) = bound_updates([A * size], [B * size], [torch.tensor(1e-10)], norm=norm)
        found = float(dense_norm(A * size, bounded, norm))
        assert found == pytest.approx(min(1e-10, size**2 * float(dense_norm(A, B, norm))), rel=1e-6)  # float32


def test_bad_arguments():
    A, B = factors(2, 5, 6)
    one = torch.tensor(1.0)
    for arguments, message in (
        (([A], [B], []), r"lengths \[1, 1, 0\], expected equal ones"),
        (([A], [B], [torch.ones(2)]), r"limit has shape \(2,\), expected a scalar"),
        (([A], [A], [one]), r"folded_A \(2, 6\) and scaled_B \(2, 6\), expected \[r, in\] and \[out, r\]"),
    ):
        with pytest.raises(ValueError, match=message):
            bound_updates(*arguments)
    with pytest.raises(ValueError, match="norm='nuclear', expected one of frobenius, spectral"):
        bound_updates([A], [B], [one], norm="nuclear")
    with pytest.raises(ValueError, match=r"dtype=torch\.int32, expected a floating-point one"):
        bound_updates([A], [B], [one], dtype=torch.int32)
