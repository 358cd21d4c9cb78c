"""The kernels of a residual block against torch in float64: compiled on a GPU, interpreted elsewhere."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from blocks import ALL, Blocks, plain_block, random_input, results, stacked
from layers import laid_out
from numerics import assert_as_accurate_as_reference
from open_clip.transformer import QuickGELU
from small_clip import adapted
from torch import Tensor, nn
from triton_device import DEVICE, masks_of

from complora_kernels import set_recompute
from complora_kernels.adapted_linear import AdaptedLinear, Needs
from complora_kernels.backends import REGISTRY
from complora_kernels.backends.torch import Activated, Norm, ProductInput, TorchBackend, activate
from complora_kernels.blocks import ACTIVATIONS, norm_lora_linear
from complora_kernels.kernels import reductions

HALF = (torch.bfloat16, torch.float16)
SEED = torch.tensor([1234567890123], device=DEVICE)
TRITON, TORCH = REGISTRY["triton"], TorchBackend()


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def norm_of(width: int, dtype: torch.dtype, *, bias: bool = True) -> Norm:
    return Norm(1 + 0.3 * randn(width).to(dtype), randn(width).to(dtype) if bias else None, 1e-5)


def double(norm: Norm) -> Norm:
    return Norm(norm.weight.double(), None if norm.bias is None else norm.bias.double(), norm.eps)


def reader(As: list[Tensor], p: float = 0.0, seeds: list[Tensor] | None = None) -> AdaptedLinear:
    """The product that reads a norm or an activation, of which they see the adapters alone."""
    return AdaptedLinear(torch.empty(0), None, As, [], [(0, 0)] * len(As), p, seeds or [])


def assert_accurate(ours: Tensor, reference: Tensor, exact: Tensor, name: str, dtype: torch.dtype) -> None:
    assert_as_accurate_as_reference(ours, reference.to(ours.dtype), exact, name, dtype)


def h_of(x: Tensor, As: list[Tensor], p: float) -> Tensor:
    masks = masks_of(SEED, len(As), x.shape, p) or [torch.ones_like(x)] * len(As)
    return torch.cat([(x * mask.to(x.dtype)) @ A.to(x.dtype).mT for A, mask in zip(As, masks, strict=True)], 1)


@pytest.mark.parametrize(
    ("adapters", "rank", "p"),
    [(0, 1, 0.0), (1, 2, 0.25), (3, 2, 0.0), (3, 2, 0.25), (1, 16, 0.1), (2, 20, 0.25), (1, 70, 0.0)],
)
@pytest.mark.parametrize(
    ("stream", "compute"),
    [(torch.float32, torch.float32), (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.float32, torch.bfloat16)],
)
def test_norm_fwd(stream, compute, adapters, rank, p):
    for M, K, with_delta, bias in ((1, 96, False, True), (17, 80, True, True), (17, 80, True, False)):
        x = randn(M, K, dtype=stream, scale=3)
        delta = randn(M, K, dtype=compute) if with_delta else None
        norm, As = norm_of(K, stream, bias=bias), [randn(rank, K, dtype=compute) for _ in range(adapters)]
        seeds = [SEED] if p and adapters else []
        s, saved, given = TRITON.norm_fwd(x, delta, norm, compute, reader(As, p, seeds))
        n, h = given.x, given.h
        expected, _, (expected_n, *_) = TORCH.norm_fwd(x, delta, norm, compute, reader(As, p))
        exact, exact_saved, (exact_n, *_) = TORCH.norm_fwd(
            x.double(), None if delta is None else delta.double(), double(norm), torch.float64, reader(As, p)
        )
        assert (s.dtype, n.dtype) == (expected.dtype, compute)
        assert_accurate(s, expected, exact, "s", stream)
        assert_accurate(n, expected_n, exact_n, "n", compute)
        assert saved.x is s
        assert_accurate(saved.rstd, exact_saved.rstd.float(), exact_saved.rstd, "rstd", compute)
        eps = 1e-6 if compute == torch.float32 else 1e-3  # of a mean beside the values that were added
        assert (saved.mean - exact_saved.mean).abs().max() < eps * x.double().abs().max()
        if adapters:
            assert h is not None
            assert_accurate(h, h_of(expected_n, As, p), h_of(exact_n, [A.double() for A in As], p), "h", compute)
        else:
            assert h is None


@pytest.mark.parametrize("stream", [torch.float32, *HALF])
@pytest.mark.parametrize("compute", [torch.float32, *HALF])
def test_norm_bwd(stream, compute):
    for (M, K), with_d_stream in itertools.product(((1, 96), (19, 70)), (False, True)):
        x, norm = randn(M, K, dtype=stream, scale=2), norm_of(K, stream)
        _, normed, _ = TORCH.norm_fwd(x, None, norm, compute, reader([]))
        normed = normed._replace(mean=normed.mean.contiguous(), rstd=normed.rstd.contiguous())
        _, exact_normed, _ = TORCH.norm_fwd(x.double(), None, double(norm), torch.float64, reader([]))
        dn, d_stream = randn(M, K, dtype=compute), randn(M, K, dtype=stream) if with_d_stream else None
        ours, _ = TRITON.norm_bwd(dn, d_stream, normed)
        expected, _ = TORCH.norm_bwd(dn, d_stream, normed)
        wide = None if d_stream is None else d_stream.double()
        exact, _ = TORCH.norm_bwd(dn.double(), wide, exact_normed)
        assert_accurate(ours, expected, exact, "dx", stream)


def test_rows_and_weights_of_any_strides_make_no_difference():
    M, K, rank = 35, 70, 2
    x, dn, g, norm = randn(M, K), randn(M, K), randn(M, rank), norm_of(K, torch.float32)
    A = randn(rank, K)

    def results(place: Any) -> list[Tensor]:
        weight, bias = (place(part.expand(2, K))[0] for part in (norm.weight, norm.weight + 1))
        moved = Norm(weight, bias, norm.eps)
        stream, normed, (n, h, *_) = TRITON.norm_fwd(
            place(x), place(dn), moved, torch.float32, reader([A], 0.25, [SEED])
        )
        dx, _ = TRITON.norm_bwd(place(dn), place(x), normed)
        affine = (normed.mean, normed.rstd, *moved[:2])
        dA = reductions.packed_lora_linear_da(place(x), g, reader([A], 0.25, [SEED]), norm=affine)
        a, h2, *_ = TRITON.activation_fwd(place(x), "gelu", reader([A], 0.25, [SEED]))
        assert h is not None
        assert h2 is not None
        return [stream, n, h, dx, dA, a, h2, TRITON.activation_bwd(place(dn), place(x), "gelu")[0]]

    expected = results(lambda tensor: tensor)
    for layout in ("strided", "transposed"):
        placed = results(partial(laid_out, layout=layout))
        assert all(torch.equal(ours, other) for ours, other in zip(placed, expected, strict=True)), layout


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_activations(dtype, activation, p):
    for M, K, rank in ((1, 40, 2), (37, 100, 20), (37, 70, None), (0, 32, 2)):
        z, da = randn(M, K, dtype=dtype, scale=2), randn(M, K, dtype=dtype)
        As = [] if rank is None else [randn(rank, K, dtype=dtype)]
        a, h, *_ = TRITON.activation_fwd(z, activation, reader(As, p, [SEED] if p and As else []))
        exact = activate(z.double(), activation)
        expected = activate(z, activation)
        assert_accurate(a, expected, exact, "a", dtype)
        if As:
            assert h is not None
            assert_accurate(h, h_of(expected, As, p), h_of(exact, [A.double() for A in As], p), "h", dtype)
        dz, _ = TRITON.activation_bwd(da, z, activation)
        exact, _ = TORCH.activation_bwd(da.double(), z.double(), activation)
        assert_accurate(dz, TORCH.activation_bwd(da, z, activation)[0], exact, "dz", dtype)


@pytest.mark.parametrize("kind", ["normed", "normed without bias", *ACTIVATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_factor_gradients_of_what_is_computed_again(dtype, kind, p, monkeypatch):
    M, K, N, rank, adapters = 70, 72, 33, 2, 3
    x, dY = randn(M, K, dtype=dtype), randn(M, adapters * N, dtype=dtype)
    weight, h = randn(adapters * N, K, dtype=dtype, scale=K**-0.5), randn(M, adapters * rank, dtype=dtype)
    As = [randn(rank, K, dtype=dtype) for _ in range(adapters)]
    Bs = [randn(N, rank, dtype=dtype) for _ in range(adapters)]
    rows = [(i * N, (i + 1) * N) for i in range(adapters)]
    if kind.startswith("normed"):
        norm = norm_of(K, dtype, bias=kind == "normed")
        _, source, (value, *_) = TORCH.norm_fwd(x, None, norm, dtype, reader([]))
        _, _, (exact_value, *_) = TORCH.norm_fwd(x.double(), None, double(norm), torch.float64, reader([]))
    else:
        source, value = Activated(x, kind), activate(x, kind)
        exact_value = activate(x.double(), kind)

    def factor_grads(value: Tensor, dY: Tensor, Bs: list[Tensor]) -> list[Tensor]:
        masks = masks_of(SEED, adapters, x.shape, p) or [torch.ones_like(value)] * adapters
        gs = [dY[:, start:stop] @ B for B, (start, stop) in zip(Bs, rows, strict=True)]
        return [g.mT @ (value * mask.to(value.dtype)) for g, mask in zip(gs, masks, strict=True)]

    seeds = [SEED] if p else []
    for plan in ("fused", "concat") if dtype == torch.float32 else ("concat",):
        monkeypatch.setenv("COMPLORA_PLAN", plan)
        linear = AdaptedLinear(weight, None, As, Bs, rows, p, seeds)
        dX, dAs, dBs = TRITON.packed_lora_linear_bwd(dY, source, h, linear, Needs(True, True, True))
        exact = factor_grads(exact_value, dY.double(), [B.double() for B in Bs])
        for ours, expected, truth in zip(dAs, factor_grads(value, dY, Bs), exact, strict=True):
            assert ours is not None
            assert_accurate(ours, expected, truth, "dA", dtype)
        assert isinstance(dX, Tensor)
        assert dX.shape == x.shape
        assert len(dBs) == adapters


@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ["fused", "concat", "merge", "addmm"])
@pytest.mark.parametrize("given", [False, True])
def test_a_residual_is_added(residual, plan, given, monkeypatch):
    monkeypatch.setenv("COMPLORA_PLAN", plan)
    M, K, N, rank, dtype = 40, 48, 70, 3, torch.bfloat16
    x, weight, bias = randn(M, K, dtype=dtype), randn(N, K, scale=K**-0.5), randn(N)
    A, B, added = randn(rank, K, dtype=dtype), randn(N, rank, dtype=dtype), randn(M, N, dtype=residual)
    precision = "fast" if plan == "addmm" else "exact"

    def call(residual: Tensor | None, save_h: bool) -> tuple[Tensor, Tensor]:
        linear = AdaptedLinear(weight, bias, [A], [B], [(0, N)], save_h=save_h, precision=precision)
        return TRITON.packed_lora_linear_fwd(ProductInput(x, x @ A.mT if given else None), linear, residual=residual)

    y, h = call(added, save_h=True)
    plain, no_h = call(None, save_h=False)
    assert no_h.shape == (0, rank)
    assert (y.dtype, h.shape) == (residual, (M, rank))
    assert plain.dtype == dtype
    exact = x.double() @ weight.to(dtype).double().mT + bias.to(dtype).double()
    exact = exact + (x.double() @ A.double().mT) @ B.double().mT
    expected = (x @ weight.to(dtype).mT + bias.to(dtype)) + (x @ A.mT) @ B.mT
    assert_accurate(y, added + expected, added.double() + exact, "y", dtype)
    assert_accurate(plain, expected, exact, "plain", dtype)


@pytest.mark.parametrize(
    ("targets", "activation", "recompute"),
    [(ALL, nn.GELU, "none"), (ALL, QuickGELU, "mlp"), (("q", "v"), QuickGELU, "none"), (("fc2",), nn.GELU, "mlp")],
)
@pytest.mark.parametrize(
    ("dtype", "plan"), [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "concat")]
)
def test_a_block_on_the_kernels(dtype, plan, targets, activation, recompute, monkeypatch):
    monkeypatch.setenv("COMPLORA_PLAN", plan)
    model = adapted(Blocks(plain_block(activation=activation)), target_modules=targets, towers=("image",))
    model = model.to(DEVICE, dtype).train()
    set_recompute(model, recompute)
    x = random_input(dtype=dtype)[:2].to(DEVICE)
    ours = stacked(results(model, x, None, fused=True, backend="triton"))
    same = stacked(results(model, x, None, fused=False, backend="reference"))
    exact = stacked(results(copy.deepcopy(model).double(), x.double(), None, fused=False, backend="reference"))
    for name, value in ours.items():
        assert_as_accurate_as_reference(value, same[name], exact[name], name, dtype)


@pytest.mark.parametrize(
    ("dtype", "plan"), [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "concat")]
)
def test_a_block_draws_the_masks_of_its_layers(dtype, plan, monkeypatch):
    """Fused and not, the same seeds are drawn in the same order."""
    monkeypatch.setenv("COMPLORA_PLAN", plan)
    model = adapted(Blocks(plain_block()), target_modules=ALL, towers=("image",), lora_dropout=0.25)
    model = model.to(DEVICE, dtype).train()
    x = random_input(dtype=dtype)[:2].to(DEVICE)
    fused, own = (stacked(results(model, x, None, fused=fused, backend="triton")) for fused in (True, False))
    for name, value in fused.items():
        # Another mask would differ by half; two orders of rounding by a few units in the last place.
        assert (value - own[name]).norm() < (1e-5 if dtype == torch.float32 else 3e-2) * own[name].norm(), name


def test_equal_calls_give_equal_bits():
    model = adapted(Blocks(plain_block()), target_modules=ALL, towers=("image",), lora_dropout=0.25).to(DEVICE).train()
    x = random_input()[:2].to(DEVICE)
    first, second = (results(model, x, None, fused=True, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rows_that_are_too_wide_are_not_served():
    width = 2112
    x, linear = randn(2, width), AdaptedLinear(randn(4, width), None)
    norm = norm_of(width, torch.float32)
    with pytest.raises(RuntimeError, match="the kernels support rows of at most 2048"):
        norm_lora_linear(x, None, norm, linear, backend="triton")
    norm_lora_linear(x, None, norm, linear)
