"""The tests' own tools: the accuracy rule fails when it should, and unwritten memory is poisoned."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_as_accurate_as_reference, random_basis, share_named_right


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_accuracy_rule_accepts_rounding_and_nothing_more(dtype):
    exact = torch.randn(40, 30, dtype=torch.float64)
    rounded = exact.to(dtype)
    assert_as_accurate_as_reference(rounded, rounded, exact, "y")
    worse = exact + 4 * (rounded.double() - exact) + {torch.float64: 1e-11, torch.float32: 1e-5}.get(dtype, 1e-2)
    with pytest.raises(AssertionError, match=r"^y .* of the allowed"):
        assert_as_accurate_as_reference(worse.to(dtype), rounded, exact, "y")


def test_accuracy_rule_rejects_nan_a_wrong_shape_and_a_wrong_dtype():
    exact = torch.randn(3, 4, dtype=torch.float64)
    rounded = exact.float()
    with pytest.raises(AssertionError, match="nan of the allowed"):
        assert_as_accurate_as_reference(rounded.clone().fill_diagonal_(torch.nan), rounded, exact, "y")
    with pytest.raises(AssertionError, match=r"expected torch.float32 \(3, 4\)"):
        assert_as_accurate_as_reference(rounded[:1], rounded, exact, "y")
    with pytest.raises(AssertionError, match=r"expected torch.float32 \(3, 4\)"):
        assert_as_accurate_as_reference(exact, rounded, exact, "y")


def test_an_image_between_two_classes_may_be_named_either_way_and_no_other():
    cosines = torch.eye(10)
    cosines[0, 1] = 1 - 1e-6
    share = share_named_right(cosines, torch.arange(10))
    assert share == 1.0
    assert share == 0.9
    assert share != 0.8
    with pytest.raises(AssertionError, match="do not tell"):
        share_named_right(torch.ones(10, 10), torch.arange(10))


def test_unwritten_memory_is_poisoned():
    like = torch.ones(3, 2)
    fresh = [torch.empty(3, 2), torch.empty_like(like), like.new_empty(3, 2), torch.empty_strided((3, 2), (1, 3))]
    assert all(tensor.isnan().all() for tensor in fresh)
    assert torch.empty(3, dtype=torch.bfloat16).isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


def test_random_basis_is_orthonormal():
    basis = random_basis(9, 4, torch.float64)
    assert torch.allclose(basis.T @ basis, torch.eye(4, dtype=torch.float64), atol=1e-14)  # float64 rounding
