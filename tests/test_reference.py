"""The reference against the formulas of the method, written out in float64 with dense projectors."""

from __future__ import annotations

import pytest
import torch
from numerics import random_basis
from torch import Tensor

from complora_kernels import reference

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
    y = reference.packed_lora_linear(x, W, b, As, Bs, rows, dropout_masks=masks)
    expected = x @ W.T + b
    expected[:, 5:9] += (masks[0] * x) @ (Bs[0] @ As[0]).T
    expected[:, 1:3] += (masks[1] * x) @ (Bs[1] @ As[1]).T
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
