"""Products whose input is written with h in the same rows, and gradients whose second term their reader adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_as_accurate_as_reference
from torch import Tensor
from torch.nn import functional as F
from triton_device import DEVICE, masks_of, next_seed

from complora_kernels import reference
from complora_kernels.adapted_linear import AdaptedLinear, Deferred, Needs
from complora_kernels.backends import REGISTRY, plans
from complora_kernels.backends.torch import Norm, Normed, ProductInput
from complora_kernels.blocks import norm_lora_linear, norm_lora_mlp
from complora_kernels.kernels import activation

CONCAT = plans.Plan("concat")
TRITON = REGISTRY["triton"]
BF16 = torch.bfloat16


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def norm_of(width: int, dtype: torch.dtype = torch.float32) -> Norm:
    return Norm(1 + 0.3 * randn(width).to(dtype), randn(width).to(dtype), 1e-5)


def product(
    K: int, D: int, groups: int, adapted: tuple[int, ...], rank: int, dtype: torch.dtype, p: float = 0.0
) -> AdaptedLinear:
    """A product of `groups` groups of D rows, some of them with an adapter of a tenth of the weight's size."""
    weight, bias = randn(groups * D, K, dtype=dtype, scale=K**-0.5), randn(groups * D, dtype=dtype)
    As = [randn(rank, K, dtype=dtype, scale=K**-0.5).requires_grad_() for _ in adapted]
    Bs = [randn(D, rank, dtype=dtype, scale=rank**-0.5).requires_grad_() for _ in adapted]
    return AdaptedLinear(weight, bias, As, Bs, [(i * D, (i + 1) * D) for i in adapted], p)


def double(record: AdaptedLinear) -> AdaptedLinear:
    return record.with_tensors(
        [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in record.tensors()]
    )


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(
    ("groups", "adapted", "rank", "p", "M"),
    [
        (3, (0, 1, 2), 16, 0.0, 37),
        (3, (0, 1, 2), 2, 0.25, 70),
        (3, (0, 2), 12, 0.0, 33),
        (3, (0, 1, 2), 15, 0.1, 16),
        (1, (0,), 40, 0.0, 5),
        (1, (0,), 3, 0.25, 1),
    ],
)
def test_a_norm_and_its_product(dtype, groups, adapted, rank, p, M):
    K, D = 48, 40
    record, of_norm = product(K, D, groups, adapted, rank, dtype, p), norm_of(K, dtype)
    x, delta = randn(M, K, dtype=dtype, scale=2).requires_grad_(), randn(M, K, dtype=dtype)
    d_stream, dY = randn(M, K, dtype=dtype), randn(M, groups * D, dtype=dtype)

    def run(x: Tensor, delta: Tensor, of_norm: Norm, record: AdaptedLinear, masks: Any) -> list[Tensor]:
        if masks is None:
            stream, *ys = norm_lora_linear(x, delta, of_norm, record, heads=[(groups, 1)], backend="triton")
            y = torch.cat([part.flatten(-2) for part in ys], -1)
        else:
            stream, y = reference.norm_lora_linear(x, delta, of_norm, record, dropout_masks=masks or None)
        leaves = [x, *record.As, *record.Bs]
        return [stream, y, *torch.autograd.grad([stream, y], leaves, [d_stream.to(x.dtype), dY.to(x.dtype)])]

    seed = next_seed() if p else torch.zeros(1)
    with plans.override(CONCAT):
        ours = run(x, delta, of_norm, record, None)
    masks = masks_of(seed, len(adapted), (M, K), p) or []
    same = run(x, delta, of_norm, record, [mask.to(dtype) for mask in masks])
    wide_norm = Norm(of_norm.weight.double(), of_norm.bias.double(), 1e-5)  # type: ignore[union-attr]
    exact = run(x.detach().double().requires_grad_(), delta.double(), wide_norm, double(record), masks)
    names = ["stream", "y", "dx", *(f"{name}[{i}]" for name in ("dA", "dB") for i in adapted)]
    for name, value, expected, truth in zip(names, ours, same, exact, strict=True):
        assert_as_accurate_as_reference(value, expected.to(value.dtype), truth, name, dtype)


@pytest.mark.parametrize("kind", ["quick_gelu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("rank", "p"), [(8, 0.0), (3, 0.25), (40, 0.0)])  # 40: dÃ in a launch of its own
@pytest.mark.parametrize("frozen", [None, "A", "B"])
def test_an_mlp(kind, rank, p, frozen):
    M, K, hidden, dtype = 35, 32, 64, BF16
    fc1, fc2 = product(K, hidden, 1, (0,), rank, dtype, p), product(hidden, K, 1, (0,), rank, dtype, p)
    for record in (fc1, fc2):
        for factor in {"A": record.As, "B": record.Bs}.get(frozen or "", ()):
            factor.requires_grad_(False)
    of_norm, x, dY = norm_of(K, dtype), randn(M, K, dtype=dtype).requires_grad_(), randn(M, K, dtype=dtype)

    def run(x: Tensor, of_norm: Norm, fc1: AdaptedLinear, fc2: AdaptedLinear, masks: Any) -> list[Tensor]:
        if masks is None:
            y = norm_lora_mlp(x, None, of_norm, fc1, fc2, kind, backend="triton")
        else:
            stream, z = reference.norm_lora_linear(x, None, of_norm, fc1, dropout_masks=masks[0])
            y = stream + reference.activation_lora_linear(z, kind, fc2, dropout_masks=masks[1])
        leaves = [t for t in (x, *fc1.As, *fc1.Bs, *fc2.As, *fc2.Bs) if t.requires_grad]
        return [y, *torch.autograd.grad(y, leaves, dY.to(y.dtype))]

    torch.manual_seed(3)
    with plans.override(CONCAT):
        ours = run(x, of_norm, fc1, fc2, None)
    torch.manual_seed(3)
    seeds = [torch.ops.complora.philox_seed(torch.empty(0, device=DEVICE)) for _ in range(2)]
    masks = [masks_of(seeds[i], 1, (M, width), p) if p else None for i, width in enumerate((K, hidden))]
    rounded = [None if mask is None else [m.to(dtype) for m in mask] for mask in masks]
    same = run(x, of_norm, fc1, fc2, rounded)
    wide_norm = Norm(of_norm.weight.double(), of_norm.bias.double(), 1e-5)  # type: ignore[union-attr]
    exact = run(x.detach().double().requires_grad_(), wide_norm, double(fc1), double(fc2), masks)
    for i, (value, expected, truth) in enumerate(zip(ours, same, exact, strict=True)):
        assert_as_accurate_as_reference(value, expected.to(value.dtype), truth, f"result {i}", dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(
    ("rank", "p", "M", "bias", "with_delta"),
    [(1, 0.0, 37, True, True), (4, 0.25, 5, False, True), (16, 0.0, 70, True, False), (7, 0.0, 1, True, True)],
)
def test_an_mlp_is_added_to_the_stream_in_place(dtype, rank, p, M, bias, with_delta):
    """The result takes the memory that the norm wrote s to; the s that is saved stays as it is."""
    K, hidden = 48, 64
    fc1, fc2 = product(K, hidden, 1, (0,), rank, dtype), product(hidden, K, 1, (0,), rank, dtype)
    seeds = [next_seed()] if p else []
    fc2 = fc2._replace(bias=fc2.bias if bias else None, dropout_p=p, seeds=seeds)
    of_norm, x = norm_of(K, dtype), randn(M, K, dtype=dtype, scale=2)
    delta = randn(M, K, dtype=dtype) if with_delta else None
    with plans.override(CONCAT), torch.no_grad():
        s, saved, given = TRITON.norm_fwd(x, delta, of_norm, dtype, fc1, closing=fc2)
        z, _ = TRITON.packed_lora_linear_fwd(given, fc1)
        closing = TRITON.activation_fwd(z, "gelu", fc2, onto=s)
        y, h = TRITON.packed_lora_linear_fwd(closing, fc2, residual=s)
    assert y.data_ptr() == s.data_ptr() != saved.x.data_ptr()
    assert torch.equal(saved.x, x if delta is None else x + delta)
    masks = masks_of(seeds[0], 1, z.shape, p) if p else None
    rounded = None if masks is None else [mask.to(dtype) for mask in masks]
    same = saved.x + reference.activation_lora_linear(z, "gelu", fc2, dropout_masks=rounded)
    exact = saved.x.double() + reference.activation_lora_linear(z.double(), "gelu", double(fc2), dropout_masks=masks)
    assert_as_accurate_as_reference(y, same, exact, "y", dtype)
    assert h.shape == (M, rank)


def test_a_residual_is_read_alone_where_a_product_is_not_added_to_it():
    """Another plan, a stream or what is added to it in another dtype, columns of h, no adapters."""
    M, K, hidden = 5, 16, 32
    fc2, of_norm, x = product(hidden, K, 1, (0,), 2, BF16), norm_of(K), randn(M, K, dtype=BF16)
    none = AdaptedLinear(fc2.weight, fc2.bias)
    columns = fc2._replace(columns=torch.ones(M, 2, dtype=torch.bool, device=DEVICE))
    cases = [("fused", x, x, fc2), ("concat", x.float(), x, fc2), ("concat", x, x.float(), fc2)]
    for plan, stream, delta, closing in (*cases, ("concat", x, x, columns), ("concat", x, x, none)):
        with plans.override(plans.Plan(plan)):
            s, saved, _ = TRITON.norm_fwd(stream, delta, of_norm, BF16, none, closing=closing)
        assert s is saved.x, (plan, stream.dtype, delta.dtype)


def share(realised: Tensor, update: Tensor) -> float:
    """The share of an update that a result holds: `<realised, update> / |update|²`."""
    return float((realised.double() * update).sum() / update.square().sum())


@pytest.mark.long
@pytest.mark.parametrize("ratio", [1e-4, 1e-3])
class TestASmallUpdateIsRealised:
    """At every joint of a block, forward and backward, as if each sum were rounded once.

    Of 2²⁰ outputs the share moves by 0.012 at 1e-4 (one standard deviation). Two roundings leave 0.01 to 0.07 of it.
    """

    M, K, rank, ABS = 1024, 1024, 4, 0.06

    def factors(self, size: float, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        """Ã and B̃ whose product's entries have this size."""
        return randn(self.rank, inputs, dtype=BF16), randn(outputs, self.rank, dtype=BF16, scale=size / self.rank**0.5)

    def test_behind_a_norm_and_an_activation(self, ratio):
        weight = randn(self.K, self.K, dtype=BF16, scale=self.K**-0.5)
        A, B = self.factors(ratio * self.K**-0.5, self.K, self.K)
        record = AdaptedLinear(weight, None, [A], [B], [(0, self.K)])
        x = randn(self.M, self.K, dtype=BF16)
        with plans.override(CONCAT):
            _, _, normed = TRITON.norm_fwd(x, None, Norm(torch.ones(self.K), None, 1e-5), BF16, record)
            activated = TRITON.activation_fwd(x, "quick_gelu", record)
            for given in (normed, activated):
                assert given.beside is not None
                y, _ = TRITON.packed_lora_linear_fwd(given, record)
                update = (given.x.double() @ A.double().mT) @ B.double().mT
                exact = given.x.double() @ weight.double().mT
                assert share(y - exact, update) == pytest.approx(1, abs=self.ABS)

    def test_in_the_stream_that_a_product_is_added_to(self, ratio):
        inputs = 128
        weight, bias = randn(self.K, inputs, dtype=BF16, scale=inputs**-0.5), randn(self.K, dtype=BF16)
        A, B = self.factors(ratio * inputs**-0.5, inputs, self.K)
        record = AdaptedLinear(weight, bias, [A], [B], [(0, self.K)])
        x, z, of_norm = randn(self.M, self.K, dtype=BF16), randn(self.M, inputs, dtype=BF16), norm_of(self.K)
        with plans.override(CONCAT):
            s, _, _ = TRITON.norm_fwd(x, None, of_norm, BF16, AdaptedLinear(weight, None), closing=record)
            given = TRITON.activation_fwd(z, "quick_gelu", record, onto=s)
            y, _ = TRITON.packed_lora_linear_fwd(given, record, residual=s)
        exact = x.double() + given.x.double() @ weight.double().mT + bias.double()
        update = (given.x.double() @ A.double().mT) @ B.double().mT
        assert share(y - exact, update) == pytest.approx(1, abs=self.ABS)
        assert (y - exact - update).norm() < 1.05 * ((exact + update).to(BF16) - exact - update).norm()  # once rounded

    def deferred(self, ratio: float) -> tuple[Tensor, Tensor, Tensor, AdaptedLinear, Tensor]:
        """An exact `dY W`, what torch's product rounds it to, g, the product, and `g Ã`."""
        base, g = torch.randn(self.M, self.K, dtype=torch.float64).to(DEVICE), randn(self.M, self.rank, dtype=BF16)
        A = randn(self.rank, self.K, dtype=BF16, scale=ratio / self.rank**0.5)
        record = AdaptedLinear(torch.empty(0), None, [A], [], [(0, 0)])
        return base, base.to(BF16), g, record, g.double() @ A.double()

    def test_in_the_gradient_of_a_norm(self, ratio):
        base, rounded, g, record, update = self.deferred(ratio)
        x, d_stream, of_norm = randn(self.M, self.K, dtype=BF16), randn(self.M, self.K, dtype=BF16), norm_of(self.K)
        _, saved, _ = TRITON.norm_fwd(x, None, of_norm, BF16, AdaptedLinear(torch.empty(0), None))
        dx, _ = TRITON.norm_bwd(Deferred(rounded, g, record), d_stream, saved)
        exact_saved = Normed(x.double(), saved.mean.double(), saved.rstd.double(), norm_of_double(of_norm), BF16)
        exact, _ = REGISTRY["torch"].norm_bwd(base, d_stream.double(), exact_saved)
        true, _ = REGISTRY["torch"].norm_bwd(update, None, exact_saved)
        assert share(dx - exact, true) == pytest.approx(1, abs=self.ABS)

    @pytest.mark.parametrize("kind", ["gelu", "quick_gelu"])
    def test_in_the_gradient_of_an_activation(self, ratio, kind):
        base, rounded, g, record, update = self.deferred(ratio)
        z = randn(self.M, self.K, dtype=BF16)
        dz, _ = TRITON.activation_bwd(Deferred(rounded, g, record), z, kind)
        slope, _ = REGISTRY["torch"].activation_bwd(torch.ones_like(base), z.double(), kind)
        assert share(dz - base * slope, update * slope) == pytest.approx(1, abs=self.ABS)

    def test_in_the_gradient_of_the_input_of_a_layer(self, ratio):
        weight = randn(self.K, self.K, dtype=BF16, scale=self.K**-0.5)
        A, B = self.factors(ratio * self.K**-0.5, self.K, self.K)
        record = AdaptedLinear(weight, None, [A], [B], [(0, self.K)])
        x, dY = randn(self.M, self.K, dtype=BF16), randn(self.M, self.K, dtype=BF16)
        with plans.override(CONCAT):
            grads = TRITON.packed_lora_linear_bwd(dY, x, x[:, : self.rank], record, Needs(True, False, False))
        update = (dY.double() @ B.double()) @ A.double()
        assert isinstance(grads.x, Tensor)
        assert share(grads.x - dY.double() @ weight.double(), update) == pytest.approx(1, abs=self.ABS)


def norm_of_double(of_norm: Norm) -> Norm:
    return Norm(of_norm.weight.double(), None if of_norm.bias is None else of_norm.bias.double(), of_norm.eps)


def test_each_call_takes_weight_and_factors_as_they_are():
    """Two adapters in turn on one weight, which is written to in between, in ways that no version counts too."""
    weight, x = torch.nn.Parameter(randn(16, 16, dtype=BF16, scale=0.25), requires_grad=False), randn(5, 16, dtype=BF16)
    with plans.override(CONCAT):
        for number in range(3):
            for rank in (2, 8, 3):
                A, B = randn(rank, 16, dtype=BF16), randn(16, rank, dtype=BF16)
                record = AdaptedLinear(weight, None, [A], [B], [(0, 16)])
                y, _ = TRITON.packed_lora_linear_fwd(ProductInput(x), record)
                exact = x.double() @ weight.double().mT + (x.double() @ A.double().mT) @ B.double().mT
                plain = F.linear(x, weight) + (x @ A.mT) @ B.mT
                assert_as_accurate_as_reference(y, plain, exact, f"y, rank {rank}, {number}", BF16)
            weight.data.mul_(-1)


def test_heads_that_do_not_divide_a_product_are_refused():
    record = product(16, 10, 1, (0,), 2, BF16)
    x, of_norm = randn(3, 16, dtype=BF16), norm_of(16)
    for heads in ([(4, 1)], [(3, 1)], [(2, 1), (1, 1)]):
        with pytest.raises(ValueError, match="expected for each product"):
            norm_lora_linear(x, None, of_norm, record, heads=heads, backend="triton")


def test_nothing_is_read_from_memory_that_was_not_written(monkeypatch):
    """Behind h there may be columns of padding: what lies there could be NaN."""
    empty = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        result = empty(*arguments, **options)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    record = product(16, 16, 1, (0,), 3, BF16)
    x = randn(35, 16, dtype=BF16)
    monkeypatch.setattr(torch, "empty", poisoned)
    with plans.override(CONCAT):
        s, _, normed = TRITON.norm_fwd(x, None, norm_of(16), BF16, record, closing=record)
        for given in (
            normed,
            TRITON.activation_fwd(x, "gelu", record),
            TRITON.activation_fwd(x, "gelu", record, onto=s),
        ):
            assert given.beside is not None
            assert given.beside.inputs.isfinite().all()
            assert given.beside.weights.isfinite().all()
            assert TRITON.packed_lora_linear_fwd(given, record)[0].isfinite().all()
        assert TRITON.packed_lora_linear_fwd(ProductInput(x), record)[0].isfinite().all()


def test_the_terms_of_more_ranks_than_a_block_are_all_added():
    base, g, z = randn(20, 64, dtype=BF16), randn(20, 50, dtype=BF16), randn(20, 64, dtype=BF16)
    A = randn(50, 64, dtype=BF16, scale=0.1)
    record = AdaptedLinear(torch.empty(0), None, [A], [], [(0, 0)])
    dz, _ = activation.activation_bwd(base, z, "gelu", g=g, reader=record)
    slope, _ = REGISTRY["torch"].activation_bwd(torch.ones_like(z.double()), z.double(), "gelu")
    exact = (base.double() + g.double() @ A.double()) * slope
    assert_as_accurate_as_reference(dz, exact.to(BF16), exact, "dz", BF16)
    with pytest.raises(ValueError, match="compute_dA=True with 50 ranks, expected 1 to 32"):
        activation.activation_bwd(base, z, "gelu", g=g, reader=record, compute_dA=True)
