"""The description of a base weight: half-precision copies are close to it, other weights are not."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import Tensor

from complora_kernels.common import base_weights


def signs(side: str, d: int) -> Tensor:  # [8, d]
    """The sign vectors of the format: one for each bit of the bytes of a hash."""
    hashed = hashlib.shake_256(side.encode()).digest(d)
    return torch.tensor([[1.0 if byte >> i & 1 else -1.0 for byte in hashed] for i in range(8)], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(64, 64), (7, 300), (1, 1)])
def test_description_of_a_weight(shape):
    W = torch.randn(shape)
    described = base_weights.describe(W)
    expected = [float(u @ W.double() @ v) for u, v in zip(signs("output", shape[0]), signs("input", shape[1]))]  # noqa: B905
    assert described["sketch"] == pytest.approx(expected, abs=1e-9)
    assert described["norm"] == pytest.approx(float(W.norm()))
    assert described["shape"] == list(shape)


def test_the_sign_vectors_are_independent():
    vectors = torch.cat([signs(side, 4096) for side in ("output", "input")])  # [16, 4096]
    gram = vectors @ vectors.T / 4096
    assert (gram - torch.eye(16)).abs().max() < 0.1  # 1/64 each, six standard deviations


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, 0.0015), (torch.float16, 0.0002)])
def test_distance_of_half_precision_copies(dtype, expected):
    weights = [torch.randn(200, 100) * 0.02 for _ in range(20)]
    known = [base_weights.describe(weight) for weight in weights]
    apart = [
        base_weights.relative_distance(base_weights.describe(w.to(dtype)), k)
        for w, k in zip(weights, known, strict=True)
    ]
    assert sum(apart) / len(apart) == pytest.approx(expected, rel=0.3)
    assert max(apart) < 0.004


@pytest.mark.parametrize("change", [0.03, 0.3, 1.0])
def test_distance_estimates_the_relative_change(change):
    apart = []
    for _ in range(50):
        W = torch.randn(60, 80)
        other = W + change * torch.randn(60, 80)
        apart.append(base_weights.relative_distance(base_weights.describe(other), base_weights.describe(W)))
    assert sum(apart) / len(apart) == pytest.approx(change, rel=0.15)  # 50 estimates of 25% each
    assert min(apart) > base_weights.TOLERANCE


def test_distance_of_a_zero_weight():
    zero = base_weights.describe(torch.zeros(3, 4))
    assert base_weights.relative_distance(zero, zero) == 0
    assert base_weights.relative_distance(base_weights.describe(torch.ones(3, 4)), zero) > base_weights.TOLERANCE
    assert base_weights.relative_distance(base_weights.describe(torch.zeros(4, 3)), zero) == float("inf")


@pytest.mark.parametrize("k", [0, 1, 5, 24])
def test_the_sketch_of_a_projection(k):
    U, V = (torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q[:, :k] for _ in range(2))
    sketch = base_weights.describe_projection(U)
    expected = base_weights.describe(U @ U.T)["sketch"]
    torch.testing.assert_close(sketch, torch.tensor(expected, dtype=torch.float64))
    turned = U @ torch.linalg.qr(torch.randn(k, k, dtype=torch.float64)).Q
    torch.testing.assert_close(base_weights.describe_projection(turned), sketch)  # another basis of the same subspace
    if 0 < k < 24:
        assert (base_weights.describe_projection(V) - sketch).norm() > 0.3 * (U @ U.T - V @ V.T).norm()
