"""The gradient of a norm with dÃ of the product that reads it, in one launch and apart, against torch in float64."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from numerics import assert_as_accurate_as_reference
from torch import Tensor
from torch.nn import functional as F
from triton_device import DEVICE, masks_of, next_seed

from complora_kernels import reference
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.backends import plans
from complora_kernels.backends.torch import Norm
from complora_kernels.blocks import norm_lora_linear, norm_lora_mlp
from complora_kernels.kernels import launch
from complora_kernels.kernels.norm_bwd_da import norm_bwd_da

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SEED = torch.tensor([1234567890123], device=DEVICE)
JOINT, APART, ALONE = "norm_bwd_da", "norm_bwd_update", "packed_lora_linear_da"


def randn(*shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


@pytest.fixture
def launched(monkeypatch) -> Counter[str]:
    """The kernels that are launched, by their names."""
    found: Counter[str] = Counter()
    run = launch.run

    def counted(kernel: Any, *arguments: Any) -> None:
        found[kernel.fn.__name__.removesuffix("_kernel")] += 1
        run(kernel, *arguments)

    monkeypatch.setattr(launch, "run", counted)
    return found


@pytest.mark.parametrize(
    ("M", "K", "adapters", "rank", "p"),
    [
        (300, 40, 1, 8, 0.0),  # several splits of the rows
        (150, 70, 2, 3, 0.25),  # of two adapters with masks of their own
        (37, 48, 3, 25, 0.0),  # more ranks than a block of them
        (1, 33, 1, 1, 0.1),
        (0, 16, 2, 2, 0.25),
    ],
)
@pytest.mark.parametrize(("stream", "compute"), [(F32, F32), (BF16, BF16), (F16, F16), (F32, BF16)])
def test_norm_bwd_da(M, K, adapters, rank, p, stream, compute):
    whole = stream == BF16  # else without what a block may lack
    s, dn = randn(M, 2 * K, dtype=stream, scale=2)[:, :K], randn(M, K + 3, dtype=compute)[:, 1 : K + 1]
    weight, bias = 1 + 0.3 * randn(K), randn(K) if whole else None
    d_stream, g = randn(M, K, dtype=stream) if whole else None, randn(M, adapters * rank, dtype=compute)
    As = [randn(rank, K, dtype=compute, scale=rank**-0.5) for _ in range(adapters)]
    reader = AdaptedLinear(torch.empty(0), None, As, [], [(0, 0)] * adapters, p, [SEED] if p else [])
    masks = masks_of(SEED, adapters, (M, K), p) or [torch.ones(M, K, device=DEVICE)] * adapters

    def truth(dtype: torch.dtype) -> list[Tensor]:
        leaf, gs = s.to(dtype, copy=True).requires_grad_(), g.to(dtype).split(rank, 1)
        n = F.layer_norm(leaf, (K,), weight.to(dtype), None if bias is None else bias.to(dtype), 1e-5)
        own = [mask.to(dtype) for mask in masks]
        whole_dn = dn.to(dtype) + sum(m * (g_p @ A.to(dtype)) for m, g_p, A in zip(own, gs, As, strict=True))
        (ds,) = torch.autograd.grad(n, leaf, whole_dn)
        dA = torch.stack([g_p.mT @ (m * n.detach()) for m, g_p in zip(own, gs, strict=True)])
        return [ds if d_stream is None else ds + d_stream.to(dtype), dA]

    mean = s.float().mean(1)
    variance = (s.float() - mean[:, None]).square().mean(1)
    ours = norm_bwd_da(dn, d_stream, s, mean, (variance + 1e-5).rsqrt(), weight, bias, g, reader)
    assert [(t.dtype, t.shape) for t in ours] == [(stream, (M, K)), (compute, (adapters, rank, K))]
    for name, value, plain, exact in zip(("ds", "dA"), ours, truth(compute), truth(torch.float64), strict=True):
        assert_as_accurate_as_reference(value, plain.to(value.dtype), exact, name, compute)


def product(
    K: int, D: int, adapted: tuple[int, ...], rank: int, p: float = 0.0, frozen: str = "", dtype: torch.dtype = BF16
) -> AdaptedLinear:
    """A product of three groups of D rows, some of them with an adapter; `frozen`: factors without a gradient."""
    weight, bias = randn(3 * D, K, dtype=dtype, scale=K**-0.5), randn(3 * D, dtype=dtype)
    As = [randn(rank, K, dtype=dtype, scale=K**-0.5).requires_grad_("A" not in frozen) for _ in adapted]
    Bs = [randn(D, rank, dtype=dtype, scale=rank**-0.5).requires_grad_("B" not in frozen) for _ in adapted]
    return AdaptedLinear(weight, bias, As, Bs, [(i * D, (i + 1) * D) for i in adapted], p)


@pytest.mark.parametrize(
    ("frozen", "needs_dx", "p", "expected"),
    [
        ("", True, 0.0, {JOINT: 1}),
        ("B", True, 0.25, {JOINT: 1}),
        ("A", True, 0.25, {APART: 1}),
        ("", False, 0.25, {ALONE: 1}),  # the first adapted block: nothing below needs a gradient
        ("B", False, 0.0, {ALONE: 1}),
    ],
)
@pytest.mark.parametrize("stream", [BF16, F32])
def test_what_the_gradients_of_a_norm_and_its_product_launch(launched, stream, frozen, needs_dx, p, expected):
    M, K, D, adapted = 35, 32, 24, (0, 2)
    record, own = product(K, D, adapted, 3, p, frozen), Norm(1 + 0.3 * randn(K), randn(K), 1e-5)
    x, delta = randn(M, K, dtype=stream, scale=2).requires_grad_(needs_dx), randn(M, K, dtype=BF16)
    d_stream, dY = randn(M, K, dtype=stream), randn(M, 3 * D, dtype=BF16)

    def gradients(x: Tensor, record: AdaptedLinear, results: tuple[Tensor, ...]) -> list[Tensor]:
        leaves = [leaf for leaf in (x, *record.As, *record.Bs) if leaf.requires_grad]
        wanted = [result for result in results if result.requires_grad]
        given = [grad.to(result.dtype) for grad, result in zip((d_stream, dY), results, strict=True)]
        return list(torch.autograd.grad(wanted, leaves, given[-len(wanted) :]))

    seed = next_seed() if p else torch.zeros(1)
    with plans.override(plans.Plan("concat")), torch.autocast(DEVICE.type, BF16, enabled=stream == F32):
        results = norm_lora_linear(x, delta, own, record, backend="triton")
        launched.clear()
        ours = gradients(x, record, results)
    assert {name: launched[name] for name in (JOINT, APART, ALONE) if launched[name]} == expected
    masks = masks_of(seed, len(adapted), (M, K), p)

    def by_reference(dtype: torch.dtype) -> list[Tensor]:
        tensors = [
            None if t is None else t.detach().to(dtype).requires_grad_(t.requires_grad) for t in record.tensors()
        ]
        same, wide = record.with_tensors(tensors), x.detach().to(dtype).requires_grad_(needs_dx)
        norm = Norm(own.weight.to(dtype), own.bias.to(dtype), 1e-5)  # type: ignore[union-attr]
        own_masks = None if masks is None else [mask.to(dtype) for mask in masks]
        return gradients(
            wide, same, reference.norm_lora_linear(wide, delta.to(dtype), norm, same, dropout_masks=own_masks)
        )

    for i, (value, plain, exact) in enumerate(zip(ours, by_reference(BF16), by_reference(torch.float64), strict=True)):
        assert_as_accurate_as_reference(value, plain.to(value.dtype), exact, f"gradient {i}", BF16)


def test_several_products_of_one_norm_compute_their_factors_gradients_apart(launched):
    records = [product(32, 8, (0, 1, 2), 2) for _ in range(2)]
    x, own = randn(5, 32, dtype=BF16).requires_grad_(), Norm(torch.ones(32, device=DEVICE), None, 1e-5)
    with plans.override(plans.Plan("concat")):
        results = norm_lora_linear(x, None, own, *records, backend="triton")
        torch.cat(results, 1).sum().backward()
    assert (launched[JOINT], launched[ALONE], launched["norm_bwd"]) == (0, 2, 1)


@pytest.mark.parametrize(("K", "dtype"), [(32, F32), (36, BF16)])
def test_where_registers_would_not_do_the_factors_gradients_are_computed_apart(launched, K, dtype):
    record = product(K, 8, (0, 1, 2), 2, dtype=dtype)
    x, own = randn(5, K, dtype=dtype).requires_grad_(), Norm(torch.ones(K, device=DEVICE), None, 1e-5)
    with plans.override(plans.Plan("concat")):
        norm_lora_linear(x, None, own, record, backend="triton")[1].sum().backward()
    assert (launched[JOINT], launched[APART], launched[ALONE]) == (0, 1, 1)


@pytest.mark.parametrize(("plan", "expected"), [("concat", {JOINT: 1}), ("fused", {"norm_bwd": 1})])
def test_what_the_gradients_of_an_mlp_launch(launched, plan, expected):
    fc1 = product(16, 8, (0, 1, 2), 2)
    fc2 = AdaptedLinear(randn(16, 24, dtype=BF16), None)
    x, own = randn(5, 16, dtype=BF16).requires_grad_(), Norm(torch.ones(16, device=DEVICE), None, 1e-5)
    with plans.override(plans.Plan(plan)):
        norm_lora_mlp(x, None, own, fc1, fc2, "gelu", backend="triton").sum().backward()
    assert {name: launched[name] for name in (JOINT, APART, "norm_bwd") if launched[name]} == expected
    assert all(factor.grad is not None for factor in (*fc1.As, *fc1.Bs))
