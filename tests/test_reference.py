"""The reference against the formulas of the method, written out in float64 with dense projectors."""

from __future__ import annotations

import pytest
import torch
from numerics import random_basis
from randomness import SIGMAS, assert_unrelated
from torch import Tensor

from complora_kernels import reference
from complora_kernels.adapted_linear import AdaptedLinear

M, IN, OUT, R, K_OUT, K_IN = 11, 13, 9, 3, 4, 5
SCALING = 0.7


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture
def layer() -> dict[str, Tensor]:
    mask = (torch.rand(M, IN) > 0.25).double() / 0.75  # [M, in]
    return {"x": randn(M, IN), "W": randn(OUT, IN), "b": randn(OUT), "A": randn(R, IN), "B": randn(OUT, R), "m": mask}


def projector(basis: Tensor, kind: str) -> Tensor:  # [d, d], onto the complement of the protected directions
    return torch.eye(len(basis), dtype=torch.float64) - basis @ basis.T if kind == "principal" else basis @ basis.T


@pytest.mark.parametrize("input_kind", ["principal", "complement"])
@pytest.mark.parametrize("output_kind", ["principal", "complement"])
def test_complora_linear(layer, output_kind, input_kind):
    U, V = random_basis(OUT, K_OUT, torch.float64), random_basis(IN, K_IN, torch.float64)
    x, A, B = (layer[name].requires_grad_() for name in ("x", "A", "B"))
    W, b, m = layer["W"], layer["b"], layer["m"]
    y = reference.complora_linear(
        x,
        W,
        b,
        A,
        B,
        output_basis=U,
        input_basis=V,
        output_basis_kind=output_kind,
        input_basis_kind=input_kind,
        scaling=SCALING,
        dropout_mask=m,
    )
    dY = randn(M, OUT)
    y.backward(dY)

    P_out, P_in = projector(U, output_kind), projector(V, input_kind)
    with torch.no_grad():
        folded_A, folded_B = A @ P_in, P_out @ B  # Ã, B̃
        h = (m * x) @ folded_A.T  # [M, r]
        g = SCALING * dY @ folded_B  # [M, r]
        expected = {
            "y": (y, x @ W.T + b + SCALING * (m * x) @ (folded_B @ folded_A).T),
            "dX": (x.grad, dY @ W + m * (g @ folded_A)),
            "dA": (A.grad, (g.T @ (m * x)) @ P_in),
            "dB": (B.grad, P_out @ (SCALING * dY.T @ h)),
        }
    for name, (ours, formula) in expected.items():
        assert torch.allclose(ours, formula, rtol=0, atol=1e-12), name  # float64 rounding of sums of about ten terms


def test_packed_lora_linear(layer):
    x, W, b, m = (layer[name] for name in ("x", "W", "b", "m"))
    As, Bs, rows = [randn(2, IN), randn(3, IN)], [randn(4, 2), randn(2, 3)], [(5, 9), (1, 3)]
    masks = [m, m.flip(0)]
    y = reference.packed_lora_linear(x, AdaptedLinear(W, b, As, Bs, rows), dropout_masks=masks)
    expected = x @ W.T + b
    expected[:, 5:9] += (masks[0] * x) @ (Bs[0] @ As[0]).T
    expected[:, 1:3] += (masks[1] * x) @ (Bs[1] @ As[1]).T
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)


def test_rows_with_columns_of_their_own(layer):
    """Row by row, the update of the ranks that the row has."""
    x, W, b = (layer[name] for name in ("x", "W", "b"))
    As, Bs, rows = [randn(2, IN), randn(3, IN)], [randn(4, 2), randn(2, 3)], [(5, 9), (1, 3)]
    columns = torch.rand(len(x), 5) < 0.5
    with torch.no_grad():
        y = reference.packed_lora_linear(x, AdaptedLinear(W, b, As, Bs, rows, columns=columns))
        expected = x @ W.T + b
        for i, row in enumerate(columns):
            first, second = row[:2].double(), row[2:].double()
            expected[i, 5:9] += Bs[0] @ torch.diag(first) @ As[0] @ x[i]
            expected[i, 1:3] += Bs[1] @ torch.diag(second) @ As[1] @ x[i]
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)


def test_fold_factors_without_bases_is_plain_lora(layer):
    (A,), (B,) = reference.fold_factors(
        [layer["A"]],
        [layer["B"]],
        [None],
        [None],
        output_basis_kinds=["principal"],
        input_basis_kinds=["principal"],
        scaling=SCALING,
    )
    assert torch.equal(A, layer["A"])
    assert torch.equal(B, SCALING * layer["B"])


def test_projection_is_float32_for_half_precision_factors_and_under_autocast():
    factor, basis = torch.randn(4, 64), random_basis(64, 16)
    expected = reference.project_complement(factor, basis)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reference.project_complement(factor, basis), expected)
    half = factor.bfloat16()
    assert torch.equal(
        reference.project_complement(half, basis), reference.project_complement(half.float(), basis).bfloat16()
    )


ZEROS, ONES = "00000000 " * 4, "ffffffff " * 4
PI = "243f6a88 85a308d3 13198a2e 03707344"  # and the key a4093822 299f31d0, the digits of π that follow


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (7, ZEROS, 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, ONES, 2**64 - 1, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (10, ZEROS, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, ONES, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (10, PI, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox4x32_gives_the_known_answers_of_random123(rounds, counter, key, expected):
    words = reference.philox4x32([torch.tensor(int(word, 16)) for word in counter.split()], key, rounds)
    assert " ".join(f"{int(word):08x}" for word in words) == expected


SEED = 2**62 + 12345  # above 32 bits


@pytest.mark.parametrize("p", [2**-16, 0.01, 0.1, 0.25, 0.5, 0.9, 0.999])
def test_keep_mask_rate(p):
    keep = reference.keep_mask(SEED, 0, (1000, 77), p).double()
    deviation = SIGMAS * (p * (1 - p) / keep.numel()) ** 0.5
    assert keep.mean().item() == pytest.approx(1 - p, abs=deviation + 2**-17)  # p itself is rounded to 2^-16
    # Nor does a row or a column have a rate of its own: χ² / n, with room for small p
    if p >= 0.1:
        for dim in (0, 1):
            size = keep.shape[dim]
            spread = (keep.sum(dim) - size * (1 - p)).square().mean().item() / (size * p * (1 - p))
            assert spread == pytest.approx(1, abs=SIGMAS * (2 * keep.shape[dim] / keep.numel()) ** 0.5 + 0.1)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_keep_masks_of_adapters_and_seeds_are_unrelated(p):
    shape = (1000, 77)
    masks = [reference.keep_mask(SEED, adapter, shape, p) for adapter in range(3)]
    masks += [reference.keep_mask(seed, 0, shape, p) for seed in (SEED + 1, SEED + 2**32, 0, 2**63 - 1)]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert_unrelated(first, second, p)
    for mask in masks[:2]:  # nor is one, or another, moved by a few lanes, words, rows
        for shift in (1, 4, 8, 16, 77, 80):
            assert_unrelated(mask.flatten()[shift:], masks[0].flatten()[:-shift], p)


@pytest.mark.parametrize("p", [0.1, 0.25])
def test_keep_mask_of_a_part_is_a_part_of_the_mask(p):
    whole = reference.keep_mask(SEED, 1, (50, 77), p)
    assert torch.equal(reference.keep_mask(SEED, 1, (31, 33), p), whole[:31, :33])


def test_keep_mask_close_to_zero_and_one():
    assert reference.keep_mask(SEED, 0, (100, 64), 1e-9).all()
    assert reference.keep_mask(SEED, 0, (100, 64), 1 - 2**-53).double().mean() <= 10 * 2**-16  # expected: 2^-16
