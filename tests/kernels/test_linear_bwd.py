"""All gradients of a product with one adapter in one launch, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import laid_out
from numerics import assert_as_accurate_as_reference
from torch import Tensor
from triton_device import DEVICE, masks_of

from complora_kernels.adapted_linear import AdaptedLinear, Needs
from complora_kernels.backends import REGISTRY, plans
from complora_kernels.backends.torch import Activated, Norm, Normed, Source, activate, normalize
from complora_kernels.kernels import linear_bwd, partials
from complora_kernels.kernels.linear_bwd import packed_lora_linear_bwd

BF16, FP16 = torch.bfloat16, torch.float16
SEED = torch.tensor([2**62 + 12345], device=DEVICE)
INSIDE = plans.Plan("fused", h="inside")
TRITON = REGISTRY["triton"]


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def product(K: int, D: int, r: int, p: float, dtype: torch.dtype, groups: int = 1, owner: int = 0) -> AdaptedLinear:
    """A product of `groups` groups of D rows, one of which has an adapter as large as the weight."""
    weight, A = randn(groups * D, K, dtype=dtype, scale=K**-0.5), randn(r, K, dtype=dtype, scale=K**-0.5)
    seeds = [SEED] if p else []
    return AdaptedLinear(weight, None, [A], [randn(D, r, dtype=dtype)], [(owner * D, owner * D + D)], p, seeds)


def by_formulas(
    dY: Tensor, value: Tensor, h: Tensor, linear: AdaptedLinear, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """dX, dÃ and dB̃ in plain torch, of a value [M, K] that the product was given."""
    start, stop = linear.rows[0]
    dY, value, h, W, A, B = (t.to(dtype) for t in (dY, value, h, linear.weight, linear.As[0], linear.Bs[0]))
    mask = (masks_of(SEED, 1, value.shape, linear.dropout_p) or [torch.ones_like(value)])[0].to(dtype)
    own = dY[:, start:stop]
    g = own @ B
    return dY @ W + mask * (g @ A), g.mT @ (value * mask), own.mT @ h


def assert_right(
    ours: tuple[Tensor, ...],
    dY: Tensor,
    value: Tensor,
    exact_value: Tensor,
    h: Tensor,
    linear: AdaptedLinear,
    wanted: tuple[bool, bool] = (True, True),  # dÃ, dB̃
) -> None:
    """The accuracy rule for each gradient; one that nobody asked for has no elements."""
    same, exact = (
        by_formulas(dY, value, h, linear, dY.dtype),
        by_formulas(dY, exact_value, h, linear, torch.float64),
    )
    for name, mine, other, truth, asked in zip(("dX", "dA", "dB"), ours, same, exact, (True, *wanted), strict=True):
        assert (mine.numel() > 0) == asked
        if asked:
            assert_as_accurate_as_reference(mine.view(truth.shape), other, truth, f"{name}, M={len(dY)}")


CASES = [  # M, K, D, r, p, groups, the group with the adapter
    (1, 33, 33, 1, 0.0, 1, 0),
    (70, 40, 64, 4, 0.25, 1, 0),
    (31, 64, 97, 16, 0.0, 1, 0),
    (300, 30, 32, 20, 0.0, 1, 0),  # ten splits, in groups of four
    (64, 70, 33, 32, 0.1, 1, 0),
    (45, 48, 32, 12, 0.25, 3, 1),  # an adapter on some rows of the weight
    (33, 40, 33, 64, 0.0, 2, 0),
]


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
@pytest.mark.parametrize(("M", "K", "D", "r", "p", "groups", "owner"), CASES, ids=str)
def test_packed_lora_linear_bwd(M, K, D, r, p, groups, owner, dtype):
    linear = product(K, D, r, p, dtype, groups, owner)
    dY, x, h = randn(M, groups * D, dtype=dtype), randn(M, K, dtype=dtype), randn(M, r, dtype=dtype)
    ours = packed_lora_linear_bwd(dY, x, h, linear, compute_dA=True, compute_dB=True)
    assert_right(ours, dY, x, x, h, linear)


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_what_is_not_needed_is_not_computed(wanted):
    linear = product(40, 33, 5, 0.0, BF16)
    dY, x, h = randn(37, 33, dtype=BF16), randn(37, 40, dtype=BF16), randn(37, 5, dtype=BF16)
    ours = packed_lora_linear_bwd(dY, x, h, linear, compute_dA=wanted[0], compute_dB=wanted[1])
    assert_right(ours, dY, x, x, h, linear, wanted)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_operands_of_any_layout(layout):
    linear = product(40, 33, 5, 0.25, BF16)
    linear = linear._replace(weight=laid_out(linear.weight, layout))
    dY, x, h = (laid_out(randn(35, width, dtype=BF16), layout) for width in (33, 40, 5))
    ours = packed_lora_linear_bwd(dY, x, h, linear, compute_dA=True, compute_dB=True)
    assert_right(ours, dY, x, x, h, linear)


def test_x_in_several_parts(monkeypatch):
    """Tiles as a GPU has them: x, whose rows start anywhere, is read in 64 columns, each with a mask of its own."""
    monkeypatch.setattr(linear_bwd.launch, "tiles_for", lambda *_: linear_bwd.Tiles(64, 128, 32, 4, 1))
    linear = product(150, 33, 5, 0.25, FP16)
    dY, x, h = randn(70, 33, dtype=FP16), randn(70, 150, dtype=FP16), randn(70, 5, dtype=FP16)
    assert_right(packed_lora_linear_bwd(dY, x, h, linear, compute_dA=True, compute_dB=True), dY, x, x, h, linear)


def sources(x: Tensor, kind: str) -> tuple[Source, Tensor, Tensor]:
    """What computed the input of a product from x, and that input as it was rounded and exactly."""
    K, dtype = x.shape[1], x.dtype
    if kind == "plain":
        return x, x, x.double()
    if kind != "norm":
        return Activated(x, kind), activate(x, kind), activate(x.double(), kind)
    own = Norm(1 + 0.3 * randn(K, dtype=dtype), randn(K, dtype=dtype), 1e-5)
    value, mean, rstd = normalize(x, own, dtype)
    exact = normalize(x.double(), Norm(own.weight.double(), own.bias.double(), 1e-5), torch.float64)[0]  # type: ignore[union-attr]
    return Normed(x, mean.contiguous(), rstd.contiguous(), own, dtype), value, exact


@pytest.mark.parametrize(
    ("kind", "frozen", "dtype"),
    [
        *(("plain", frozen, BF16) for frozen in ("", "A", "B", "AB")),
        *((kind, "", BF16) for kind in ("norm", "gelu", "quick_gelu")),
        ("plain", "", torch.float32),
    ],
)
def test_by_the_backend(kind, frozen, dtype, monkeypatch):
    """In one launch in half precision; what is frozen has no gradient. float32 has g apart."""
    launches: list[Any] = []
    run = linear_bwd.launch.run

    def recorded(kernel: Any, *arguments: Any) -> None:
        launches.append(kernel)
        run(kernel, *arguments)

    monkeypatch.setattr(linear_bwd.launch, "run", recorded)
    M, p = 40, 0.25 if kind == "plain" else 0.0
    linear = product(40, 33, 6, p, dtype)
    source, value, exact_value = sources(randn(M, 40, dtype=dtype), kind)
    dY, h = randn(M, 33, dtype=dtype), randn(M, 6, dtype=dtype)
    with plans.override(INSIDE):
        grads = TRITON.packed_lora_linear_bwd(dY, source, h, linear, Needs(True, "A" not in frozen, "B" not in frozen))
    assert isinstance(grads.x, Tensor)
    found = [*grads.As, *grads.Bs]
    assert [gradient is None for gradient in found] == [name in frozen for name in "AB"]
    ours = [grads.x, *(torch.empty(0) if gradient is None else gradient for gradient in found)]
    wanted = ("A" not in frozen, "B" not in frozen)
    assert_right(tuple(ours), dY, value, exact_value, h, linear, wanted)
    if dtype == BF16:
        assert launches == [linear_bwd.packed_lora_linear_bwd_kernel]


@pytest.mark.parametrize("ratio", [1e-4, 1e-3])
def test_a_small_update_is_realised(ratio, monkeypatch):
    """dX holds all of a term that is smaller than what its rounding loses, as if the sum were rounded once.

    Of 2²⁰ outputs the share moves by 0.012 at 1e-4 (one standard deviation). Two roundings leave 0.01 to 0.07 of it.
    """
    M = K = 1024
    monkeypatch.setattr(linear_bwd.launch, "tiles_for", lambda *_: linear_bwd.Tiles(256, 256, 256, 4, 1))
    weight, B = randn(K, K, dtype=BF16, scale=K**-0.5), randn(K, 4, dtype=BF16)
    linear = AdaptedLinear(weight, None, [randn(4, K, dtype=BF16, scale=ratio / (4 * K) ** 0.5)], [B], [(0, K)])
    dY, x = randn(M, K, dtype=BF16), randn(M, K, dtype=BF16)
    dX, _, _ = packed_lora_linear_bwd(dY, x, x[:, :4], linear, compute_dA=False, compute_dB=False)
    update = (dY.double() @ B.double()) @ linear.As[0].double()
    share = ((dX.double() - dY.double() @ weight.double()) * update).sum() / update.square().sum()
    assert share.item() == pytest.approx(1, abs=0.06)


def test_without_rows():
    linear = product(8, 8, 2, 0.0, BF16)
    nothing = randn(0, 8, dtype=BF16)
    with plans.override(INSIDE):
        grads = TRITON.packed_lora_linear_bwd(nothing, nothing, nothing[:, :2], linear, Needs(True, True, True))
    assert isinstance(grads.x, Tensor)
    assert grads.x.shape == (0, 8)
    for gradient in (*grads.As, *grads.Bs):
        assert gradient is not None
        assert not gradient.any()


def test_what_it_does_not_compute_is_refused():
    x = randn(4, 8, dtype=BF16)
    for linear, rows in ((product(8, 8, 65, 0.0, BF16), 4), (product(8, 8, 2, 0.0, BF16), 0)):
        with pytest.raises(ValueError, match="expected 1 of at most 64, and 1 row or more"):
            packed_lora_linear_bwd(x[:rows], x[:rows], x[:rows], linear, compute_dA=True, compute_dB=True)


def test_counters_are_zero_again(monkeypatch):
    handed: list[Tensor] = []
    counters = partials.counters
    monkeypatch.setattr(partials, "counters", lambda n, device: handed.append(counters(n, device)) or handed[-1])
    linear = product(33, 40, 4, 0.0, BF16)
    dY, x, h = randn(300, 40, dtype=BF16), randn(300, 33, dtype=BF16), randn(300, 4, dtype=BF16)
    packed_lora_linear_bwd(dY, x, h, linear, compute_dA=True, compute_dB=True)
    assert len(handed) == 1
    assert not handed[0].any()
