"""Dropout without a stored mask: its rate, its independence, its seeds, and one mask in both directions."""

from __future__ import annotations

import copy

import pytest
import torch
from randomness import SIGMAS, assert_unrelated
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from complora_kernels.dropout import drop, dropout_mask, dropout_seed
from complora_kernels.functional import lora_linear, packed_lora_linear

pytestmark = pytest.mark.usefixtures("torch_backend")  # the others have files of their own

M, D = 1000, 64


def dropped_ones(dropout_p: float, *, adapters: int = 1, rows: int = M) -> list[Tensor]:
    """`m = mask / (1 - p)` [rows, D] as the forward pass shows it: of ones, through W = 0 and A = B = I."""
    x, identity = torch.ones(rows, D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
    blocks = [(i * D, (i + 1) * D) for i in range(adapters)]
    weight = torch.zeros(adapters * D, D, dtype=torch.float64)
    y = packed_lora_linear(x, weight, None, [identity] * adapters, [identity] * adapters, blocks, dropout_p=dropout_p)
    return list(y.split(D, dim=1))


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_rate_and_scale(dropout_p):
    (m,) = dropped_ones(dropout_p)
    kept = int((m > 0).sum())
    n = m.numel()
    assert abs(kept - n * (1 - dropout_p)) <= SIGMAS * (n * dropout_p * (1 - dropout_p)) ** 0.5
    assert set(m.unique().tolist()) == {0.0, 1 / (1 - dropout_p)}
    # Nor does a row or a column have a rate of its own.
    for counts, size in ((m.count_nonzero(0), M), (m.count_nonzero(1), D)):
        deviation = (counts.double() - size * (1 - dropout_p)).square().mean() / (size * dropout_p * (1 - dropout_p))
        assert deviation == pytest.approx(
            1, abs=SIGMAS * (2 / len(counts)) ** 0.5 + 0.1
        )  # χ² / n, with room for p = 0.01


@pytest.mark.parametrize("dropout_p", [0.25, 0.5])
def test_adapters_calls_and_seeds_have_masks_of_their_own(dropout_p):
    masks = dropped_ones(dropout_p, adapters=3) + dropped_ones(dropout_p)
    torch.manual_seed(1)
    masks += dropped_ones(dropout_p)
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert_unrelated(first, second, dropout_p)
    # Nor is one mask another, moved by a few elements: streams that overlap would show so.
    for shift in (1, 4, D):
        assert_unrelated(masks[0].flatten()[shift:], masks[1].flatten()[:-shift], dropout_p)
        assert_unrelated(masks[0].flatten()[:-shift], masks[1].flatten()[shift:], dropout_p)


def test_follows_manual_seed():
    torch.manual_seed(7)
    first, second = dropped_ones(0.5), dropped_ones(0.5)
    torch.manual_seed(7)
    assert torch.equal(dropped_ones(0.5)[0], first[0])
    assert torch.equal(dropped_ones(0.5)[0], second[0])
    torch.manual_seed(8)
    assert not torch.equal(dropped_ones(0.5)[0], first[0])


@pytest.mark.parametrize("training", [False, True])
def test_without_dropout_nothing_is_drawn_and_nothing_dropped(training):
    x, weight, A, B = torch.ones(5, D), torch.randn(D, D), torch.randn(2, D), torch.randn(D, 2)
    before = torch.get_rng_state()
    expected = lora_linear(x, weight, None, A, B)
    y = lora_linear(x, weight, None, A, B, dropout_p=0.0 if training else 0.5, training=training)
    assert torch.equal(y, expected)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("adapters", [1, 3])
def test_backward_draws_the_mask_of_forward_and_nothing_from_the_generator(adapters):
    """With W = 0, A = B = I and x = 1 the output is m, so `dX = Σ m ∘ dY` and `dA = dY^T (m ∘ x) = dY^T m`."""
    x = torch.ones(M, D, dtype=torch.float64, requires_grad=True)
    As = [torch.eye(D, dtype=torch.float64, requires_grad=True) for _ in range(adapters)]
    Bs = [torch.eye(D, dtype=torch.float64, requires_grad=True) for _ in range(adapters)]
    blocks = [(i * D, (i + 1) * D) for i in range(adapters)]
    weight = torch.zeros(adapters * D, D, dtype=torch.float64)
    y = packed_lora_linear(x, weight, None, As, Bs, blocks, dropout_p=0.25)
    dY = torch.randn_like(y)
    torch.manual_seed(1234)  # what happens between forward and backward is no matter
    before = torch.get_rng_state()
    y.backward(dY, retain_graph=True)
    assert torch.equal(torch.get_rng_state(), before)

    ms, dYs = y.detach().split(D, 1), dY.split(D, 1)
    assert x.grad is not None
    # float64 rounding of sums of a thousand terms of size one
    expected = torch.stack([m * d for m, d in zip(ms, dYs, strict=True)]).sum(0)
    assert torch.allclose(x.grad, expected, rtol=0, atol=1e-11)
    for A, B, m, d in zip(As, Bs, ms, dYs, strict=True):
        assert A.grad is not None
        assert B.grad is not None
        assert torch.allclose(A.grad, d.T @ m, rtol=0, atol=1e-11)
        assert torch.allclose(B.grad, d.T @ m, rtol=0, atol=1e-11)

    first = [tensor.grad.clone() for tensor in (x, *As, *Bs) if tensor.grad is not None]
    y.backward(dY)  # a second time over the same graph
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip((x, *As, *Bs), first, strict=True) if t.grad is not None)


@pytest.mark.parametrize("dropout_p", [0.999, 1 - 2**-20, 1 - 2**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_p_close_to_one(dropout_p, dtype):
    x = torch.ones(M, D, dtype=dtype, requires_grad=True)
    identity = torch.eye(D, dtype=dtype)
    y = lora_linear(x, torch.zeros_like(identity), None, identity, identity, dropout_p=dropout_p)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y)
    kept = y[y != 0].float()
    n = y.numel()
    assert len(kept) <= n * (1 - dropout_p) + SIGMAS * (n * (1 - dropout_p)) ** 0.5
    assert torch.equal(kept.unique(), torch.full_like(kept[:1], 1 / (1 - dropout_p)).to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_drop_rounds_once(dtype):
    x, mask = torch.randn(M, D).to(dtype), torch.rand(M, D) < 0.7
    assert torch.equal(drop(x, mask, 0.3), (x.double() * mask / 0.7).float().to(dtype))


def test_mask_follows_seed_shape_and_probability_alone():
    seed = torch.tensor([2**62 + 12345])
    mask = dropout_mask(torch.empty(1), (M, D), seed, 0.25)
    assert (mask.dtype, mask.shape, mask.is_contiguous()) == (torch.bool, (M, D), True)
    torch.manual_seed(3)
    assert torch.equal(dropout_mask(torch.ones(4, 4, dtype=torch.bfloat16), (M, D), seed, 0.25), mask)
    assert torch.equal(dropout_mask(torch.empty(1), (M * D,), seed, 0.25).view(M, D), mask)
    assert not torch.equal(dropout_mask(torch.empty(1), (M, D), seed + 1, 0.25), mask)


def test_seeds_are_single_integers_on_the_host():
    seeds = [dropout_seed(torch.empty(3)) for _ in range(100)]
    assert all((seed.dtype, seed.shape, seed.device.type) == (torch.int64, (1,), "cpu") for seed in seeds)
    assert len({int(seed) for seed in seeds}) == 100


def test_registered_operations():
    x, seed = torch.randn(3, 5), torch.tensor([11])
    torch.library.opcheck(torch.ops.complora.dropout_mask.default, (x, [3, 5], seed, 0.25))
    # Compiled and eager runs draw different seeds, as they should: their comparison is left out.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for draw in (torch.ops.complora.dropout_seed.default, torch.ops.complora.philox_seed.default):
        torch.library.opcheck(draw, (x,), test_utils=checks)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, D) / D**0.5, requires_grad=False)
        self.A, self.B = nn.Parameter(torch.randn(2, 3, D)), nn.Parameter(torch.randn(2, D, 3))

    def forward(self, x: Tensor) -> Tensor:
        for A, B in zip(self.A, self.B, strict=True):
            x = lora_linear(x, self.weight, None, A, B, dropout_p=0.5).tanh()
        return x


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_masks(use_reentrant):
    model = TwoLayers()
    recomputed = copy.deepcopy(model)
    x = torch.randn(7, D, requires_grad=True)
    torch.manual_seed(1)
    model(x).sum().backward()
    x_grad, x.grad = x.grad, None

    torch.manual_seed(1)
    y = checkpoint(recomputed, x, use_reentrant=use_reentrant)
    torch.manual_seed(2)
    y.sum().backward()
    assert x.grad is not None
    assert x_grad is not None
    assert torch.equal(x.grad, x_grad)
    for parameter, expected in zip((recomputed.A, recomputed.B), (model.A, model.B), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        assert torch.equal(parameter.grad, expected.grad)
