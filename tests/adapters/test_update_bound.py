"""`update_bound` in models: every path has the bounded update, against a dense ΔW and torch's decompositions."""

from __future__ import annotations

import copy
import json
from typing import Any

import peft
import pytest
import small_clip
import torch
from failures import Unchanged, contents
from tiny_models import (
    LAYOUTS,
    batch,
    clip,
    config,
    expected_delta,
    features,
    frozen_weight,
    half_of,
    randomise,
)
from torch import Tensor, nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.adapters.files import CONFIG_FILE, read_adapter, write_adapter
from complora_kernels.adapters.manage import load_raw_adapter_state, raw_adapter_state

ALL = ("q", "k", "v", "o", "fc1", "fc2")
NORMS = ("frobenius", "spectral")
REFERENCES = ("weight", "next", "gap")
# Two short products of float32 factors.
ROUNDING = 2e-6

every_norm = pytest.mark.parametrize("norm", NORMS)
every_reference = pytest.mark.parametrize("reference", REFERENCES)


def bound(c: float = 0.1, norm: str = "frobenius", reference: str = "weight", **options: Any) -> dict[str, Any]:
    own = {"update_bound": c, "update_bound_norm": norm, "update_bound_relative_to": reference}
    return {"sides": "both", "target_modules": ALL, **own, **options}


def adapted(plain: nn.Module, **options: Any) -> Any:
    return randomise(ck.apply_complora(plain, config(**options), progress=False))


def plain_linear(out: int = 8, inputs: int = 6, **options: Any) -> Any:
    """A model of one linear layer, whose weight has the singular values of a trained one: no two are near."""
    layer = nn.Linear(inputs, out, dtype=options.get("dtype", torch.float64))
    U, V = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q for d in (out, inputs))
    m = min(out, inputs)
    sigma = torch.tensor(options.get("sigma", [2.0**-i for i in range(m)]), dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_((U[:, :m] * sigma) @ V[:, :m].T)
    return nn.Sequential(layer)


def norm_of(delta: Tensor, norm: str) -> float:
    sigma = torch.linalg.svdvals(delta.detach().double())
    return float(sigma[0] if norm == "spectral" else sigma.square().sum().sqrt())


def expected_limit(weight: Tensor, options: ck.CompLoRAConfig, k: int) -> float:
    """c times the reference, by torch's own decomposition of the weight."""
    sigma = [*torch.linalg.svdvals(weight.detach().double()).tolist(), 0.0]
    sizes = {
        "weight": norm_of(weight, options.update_bound_norm),
        "next": sigma[k],
        "gap": sigma[k - 1] - sigma[k],
    }
    assert options.update_bound is not None
    return options.update_bound * sizes[options.update_bound_relative_to]


def bounded_delta(weight: Tensor, A: Tensor, B: Tensor, options: ck.CompLoRAConfig, k: int) -> Tensor:  # [out, in]
    delta = expected_delta(weight, A, B, options, k)
    size = norm_of(delta, options.update_bound_norm)
    return delta * min(1.0, expected_limit(weight, options, k) / size)


def with_updates(plain: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of `plain` whose weights hold the bounded updates that `model` should compute."""
    updated = copy.deepcopy(plain)
    with torch.no_grad():
        for path, layer in adapted_layers(model).items():
            for name in layer.weights:
                weight = frozen_weight(updated.get_submodule(path), name)
                weight += bounded_delta(weight, *layer.factors(name), layer.config, half_of(weight))
    return updated


def updates(model: nn.Module) -> dict[str, Tensor]:
    layers = adapted_layers(model).items()
    return {f"{path}/{name}": layer.get_delta_weight(name) for path, layer in layers for name in layer.weights}


def limits_of(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if "update_limit" in name]


# ---- the forward pass and its gradients


@every_reference
@every_norm
@pytest.mark.parametrize("sides", ["output", "both"])
def test_a_layer_adds_the_bounded_update(sides, norm, reference):
    plain = plain_linear()
    for c, active in ((0.05, True), (50.0, False)):
        options = config(**bound(c, norm, reference, sides=sides, target_modules="0", subspace_k=3))
        model = randomise(ck.apply_complora(copy.deepcopy(plain), options, progress=False))
        layer, x = model[0], torch.randn(5, 6, dtype=torch.float64)
        delta = bounded_delta(layer.weight, layer.lora_A, layer.lora_B, options, 3)
        limit = expected_limit(layer.weight, options, 3)
        assert (norm_of(delta, norm) >= limit * (1 - 1e-9)) == active
        torch.testing.assert_close(model(x), plain(x) + x @ delta.T, rtol=0, atol=1e-12)
        assert torch.autograd.gradcheck(
            lambda A, B, model=model, x=x: torch.func.functional_call(model, {"0.lora_A": A, "0.lora_B": B}, x),
            tuple(factor.detach().clone().requires_grad_() for factor in layer.factors("")),
        )


@every_norm
@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_a_clip_computes_with_bounded_updates(make, norm):
    """In the fold of a tower, in packed products and in fused blocks, and after a merge."""
    plain = make().double()
    model = adapted(copy.deepcopy(plain), **bound(0.02, norm))
    inputs = batch(torch.float64)
    expected = features(with_updates(plain, model), *inputs)
    torch.testing.assert_close(features(model, *inputs), expected, rtol=0, atol=1e-10)
    ck.merge_adapter(model)
    torch.testing.assert_close(features(model, *inputs), expected, rtol=0, atol=1e-10)
    ck.unmerge_adapter(model)
    unloaded: Any = ck.merge_and_unload(model)
    torch.testing.assert_close(features(unloaded, *inputs), expected, rtol=0, atol=1e-10)
    assert limits_of(unloaded) == []


@every_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_its_limit_a_model_computes_the_same_bits(dtype, norm):
    images, texts = batch(dtype)
    results = []
    for options in ({"sides": "both", "target_modules": ALL}, bound(1e6, norm)):
        torch.manual_seed(3)
        model = adapted(clip().to(dtype), **options)
        out = features(model, images, texts)
        out.float().square().sum().backward()
        results.append([out.detach(), *(factor.grad for factor in ck.adapter_parameters(model))])
    assert all(map(torch.equal, *results))


@every_norm
def test_training_from_zero_stays_within_the_limit(norm):
    model: Any = ck.apply_complora(clip(), config(**bound(0.01, norm)), progress=False)
    optimizer = torch.optim.AdamW(ck.adapter_parameters(model), lr=0.1)
    inputs = batch()
    for _ in range(5):
        loss = features(model, *inputs).square().sum()
        loss.backward()
        ck.check_gradients(model)
        assert all(factor.grad.isfinite().all() for factor in ck.adapter_parameters(model) if factor.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
    shares = []
    for layer in adapted_layers(model).values():
        for name in layer.weights:
            limit = expected_limit(frozen_weight(layer, name), layer.config, half_of(frozen_weight(layer, name)))
            shares.append(norm_of(layer.get_delta_weight(name), norm) / limit)
    assert max(shares) == pytest.approx(1, rel=1e-5)  # float32 limits and factors
    assert max(shares) <= 1 + 1e-5


@pytest.mark.long
@every_norm
def test_compiled_in_one_graph(norm):
    model = adapted(plain_linear(), **bound(0.1, norm, target_modules="0"))
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = torch.autograd.grad(model(x).square().sum(), list(ck.adapter_parameters(model)))
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(compiled(x).square().sum(), list(ck.adapter_parameters(model)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # float64, sums in another order


def test_exported_for_inference():
    model = adapted(plain_linear(), **bound(target_modules="0")).eval()
    ck.subspace_report(model)
    x = torch.randn(5, 6, dtype=torch.float64)
    program: Any = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-12)  # float64, sums in another order


@every_norm
def test_limits_stay_float32_in_a_half_precision_model(norm):
    model = adapted(clip(), **bound(0.02, norm))
    before = updates(model)
    model.bfloat16()
    assert {limit.dtype for limit in limits_of(model)} == {torch.float32}
    assert all(torch.equal(update, before[name]) for name, update in updates(model).items())


# ---- what protects the top triples


def top(matrix: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projectors onto the top-k left and right singular vectors, and the top-k singular values."""
    U, sigma, Vh = torch.linalg.svd(matrix.detach().double())
    return U[:, :k] @ U[:, :k].T, sigma[:k], Vh[:k].T @ Vh[:k]


def along_the_next(model: Any, k: int) -> Tensor:
    """Gives a layer the ΔW that adds most to σ_{k+1}: along its own singular vectors. Returns W + ΔW."""
    layer = model[0]
    U, _, Vh = torch.linalg.svd(layer.weight)
    with torch.no_grad():
        layer.lora_A.copy_(Vh[k].expand_as(layer.lora_A))
        layer.lora_B.copy_(100 * U[:, k : k + 1].expand_as(layer.lora_B))
    return layer.weight + layer.get_delta_weight()


SIGMA = [2.0, 1.5, 1.0, 0.9, 0.3, 0.1]  # σ_3 and σ_4 are near


@every_norm
def test_a_gap_keeps_the_top_triples_of_the_weight_whatever_is_learned(norm):
    model = adapted(plain_linear(sigma=SIGMA), **bound(0.99, norm, "gap", target_modules="0", subspace_k=3))
    for update in (adapted_layers(model)["0"].get_delta_weight(), None):
        changed = model[0].weight + update if update is not None else along_the_next(model, 3)
        for found, expected in zip(top(changed, 3), top(model[0].weight, 3), strict=True):
            # The vectors of σ_3 = 1 beside 0.999: float64 bases are exact to 1e-15, over a distance of 1e-3.
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    (row,) = ck.subspace_report(model)
    assert row.top_triples == "guaranteed"
    assert row.limit == pytest.approx(0.99 * 0.1)
    assert row.against_last == pytest.approx(0.99 * 0.1 / 1.0)  # the last protected one is 1


def test_the_next_singular_value_keeps_them_where_the_gap_is_wide_and_else_may_not():
    """|ΔW| < σ_k alone is not enough: ΔW adds to what W has beside its top triples."""
    for sigma, c, kept in ((SIGMA, 0.5, False), ([2.0, 1.5, 1.0, 0.6, 0.3, 0.1], 0.6, True)):
        options = bound(c, "spectral", "next", target_modules="0", subspace_k=3)
        model = adapted(plain_linear(sigma=sigma), **options)
        changed = along_the_next(model, 3)
        distance = (top(changed, 3)[0] - top(model[0].weight, 3)[0]).norm()
        (row,) = ck.subspace_report(model)
        assert row.against_last == pytest.approx(c * sigma[3])
        assert c * sigma[3] < 1  # which is σ_k
        assert row.top_triples == ("guaranteed" if kept else "passed")
        assert (float(distance) < 1e-10) == kept


def test_the_report_says_that_triples_are_kept_without_a_bound():
    model = adapted(plain_linear(sigma=SIGMA), sides="both", target_modules="0", subspace_k=3)
    with torch.no_grad():
        model[0].lora_B.mul_(1e-3)
    (row,) = ck.subspace_report(model)
    assert (row.limit, row.top_triples) == (None, "kept")
    largest = torch.linalg.svdvals(model[0].get_delta_weight())[0]
    assert row.against_last == pytest.approx(float(largest / 1.0))
    along_the_next(model, 3)
    assert ck.subspace_report(model)[0].top_triples == "passed"
    for options in ({"sides": "output"}, {"sides": "both", "subspace_source": "random"}, {"subspace_k": 0}):
        chosen = {"sides": "both", "subspace_k": 3, **options}
        (row,) = ck.subspace_report(adapted(plain_linear(), target_modules="0", **chosen))
        assert (row.against_last, row.top_triples) == (None, "")


def test_what_the_projections_remove_is_told_without_what_the_bound_takes():
    torch.manual_seed(0)
    plain = plain_linear()
    rows = []
    for c in (1e-3, None):
        torch.manual_seed(1)
        model = adapted(copy.deepcopy(plain), sides="both", target_modules="0", subspace_k=3, update_bound=c)
        rows += ck.subspace_report(model)
    assert rows[0].removed == pytest.approx(rows[1].removed)
    assert rows[0].relative_update == pytest.approx(1e-3)


# ---- files


@every_reference
@every_norm
@pytest.mark.parametrize("sides", ["both", "output"])
def test_saved_factors_are_bounded_and_load_as_they_are(tmp_path, norm, reference, sides):
    model = small_clip.saved(tmp_path / "first", **bound(0.05, norm, reference, sides=sides))
    expected = updates(model)
    loaded = ck.load_adapter(small_clip.small_clip(), tmp_path / "first", progress=False)
    assert adapted_layers(loaded)["visual.transformer.resblocks.0.attn"].config == small_clip.config(
        **bound(0.05, norm, reference, sides=sides)
    )
    small_clip.assert_close(small_clip.features(loaded), small_clip.features(model), ROUNDING)
    assert limits_of(loaded) == []  # no weight was decomposed
    ck.save_adapter(loaded, tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    ck.subspace_report(loaded)
    assert len(limits_of(loaded)) == len(expected)
    for name, update in updates(loaded).items():
        small_clip.assert_close(update, expected[name], ROUNDING)
    ck.load_adapter(model, tmp_path / "second", progress=False)
    assert limits_of(model) == []
    for name, update in updates(model).items():
        small_clip.assert_close(update, expected[name], ROUNDING)


@every_norm
def test_a_rounded_copy_of_the_weights_gets_the_saved_update(tmp_path, norm):
    """Its own limits differ by a few percent: the gap between two singular values is small."""
    model = small_clip.saved(tmp_path, **bound(0.5, norm, "gap"))
    loaded = ck.load_adapter(small_clip.small_clip().bfloat16(), tmp_path, progress=False)
    ck.subspace_report(loaded)
    for name, update in updates(loaded).items():
        small_clip.assert_close(update, updates(model)[name], ROUNDING)


@every_norm
def test_stock_peft_computes_the_bounded_update(tmp_path, norm):
    model = small_clip.adapted(small_clip.small_clip(), **bound(0.05, norm, target_modules=("q", "k", "v", "fc1")))
    ck.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(small_clip.small_clip(), tmp_path).eval()
    # PEFT adds ΔW to the weight and multiplies once: two orders of float32 sums.
    small_clip.assert_close(small_clip.features(theirs.base_model.model), small_clip.features(model), 5e-6)


def test_files_from_before_the_fields_load(tmp_path):
    model = small_clip.saved(tmp_path / "new")
    saved, tensors = read_adapter(tmp_path / "new")
    fields = saved["complora"]["config"]
    for name in [name for name in fields if name.startswith("update_bound")]:
        del fields[name]
    (tmp_path / "old").mkdir()
    write_adapter(tmp_path / "old", saved, tensors, {})
    assert "update_bound" not in json.loads((tmp_path / "old" / CONFIG_FILE).read_text())["complora"]["config"]
    loaded = ck.load_adapter(small_clip.small_clip(), tmp_path / "old", progress=False)
    small_clip.assert_close(small_clip.features(loaded), small_clip.features(model), ROUNDING)


def test_a_raw_state_has_raw_factors_and_no_limits():
    model, other = (adapted(clip(), **bound(0.02)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    state = raw_adapter_state(model)
    for name, factor in model.named_parameters():
        if "lora_" in name:
            assert torch.equal(state[name], factor)
    assert not [name for name in state if "limit" in name]
    load_raw_adapter_state(other, state)
    assert all(torch.equal(update, updates(model)[name]) for name, update in updates(other).items())
    assert not [name for name in model.state_dict() if "limit" in name]


def test_limits_follow_other_base_weights(tmp_path):
    for sides in ("both", "none"):
        size: dict[str, Any] = {} if sides == "none" else {"subspace_k": 3}
        options = bound(0.1, target_modules="0", sides=sides, **size)
        for load in (False, True):
            plain = plain_linear()
            model = adapted(copy.deepcopy(plain), **options)
            if load:  # its limit is not computed yet
                ck.save_adapter(model, tmp_path / sides)
                model = ck.load_adapter(plain, tmp_path / sides, progress=False)
            other = plain_linear(sigma=[0.1, 0.08, 0.06, 0.04, 0.02, 0.01])
            model.load_state_dict(other.state_dict(), strict=False)
            expected = 0.1 * norm_of(other[0].weight, "frobenius")
            assert norm_of(model[0].get_delta_weight(), "frobenius") == pytest.approx(expected, rel=1e-6)


def test_bases_of_activations_and_a_bound(tmp_path):
    options = bound(0.1, "spectral", "next", target_modules="0", subspace_k=3, subspace_source="activations")
    plain = plain_linear(dtype=torch.float32)
    x = torch.randn(50, 6)
    model = randomise(ck.apply_complora(copy.deepcopy(plain), config(**options), calibrate=lambda model: model(x)))
    limit = 0.1 * float(torch.linalg.svdvals(plain[0].weight.detach().double())[3])
    assert norm_of(model[0].get_delta_weight(), "spectral") == pytest.approx(limit, rel=1e-6)
    ck.save_adapter(model, tmp_path)
    loaded = ck.load_adapter(copy.deepcopy(plain), tmp_path, progress=False)
    with torch.no_grad():
        loaded[0].lora_B.mul_(10)
    assert norm_of(loaded[0].get_delta_weight(), "spectral") == pytest.approx(limit, rel=1e-6)


# ---- several adapters


def test_each_adapter_has_its_own_bound(tmp_path):
    plain = plain_linear()
    options = {
        "default": bound(0.1, target_modules="0", subspace_k=3),
        "b": bound(0.3, "spectral", "next", target_modules="0", subspace_k=2),
        "free": {"sides": "output", "target_modules": "0", "subspace_k": 2},
    }
    model = adapted(copy.deepcopy(plain), **options["default"])
    deltas = {}
    for name in options:
        if name != "default":
            ck.add_adapter(model, name, config(**options[name]), progress=False)
        ck.set_adapter(model, name)
        randomise(model)
        deltas[name] = model[0].get_delta_weight()
    weight = plain[0].weight
    assert norm_of(deltas["default"], "frobenius") == pytest.approx(0.1 * norm_of(weight, "frobenius"))
    assert norm_of(deltas["b"], "spectral") == pytest.approx(0.3 * float(torch.linalg.svdvals(weight.detach())[2]))
    assert norm_of(deltas["free"], "spectral") > 1
    ck.set_adapter(model, "default")
    torch.testing.assert_close(model[0].get_delta_weight(), deltas["default"], rtol=0, atol=0)
    ck.set_adapter(model, {"default": 2.0, "b": -1.0, "free": 0.5})
    summed = 2 * deltas["default"] - deltas["b"] + 0.5 * deltas["free"]
    torch.testing.assert_close(model[0].get_delta_weight(), summed, rtol=0, atol=1e-12)
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad(), ck.mixed_adapters(model.eval(), list(options)):
        each = torch.stack([plain(row) + row @ deltas[name].T for row, name in zip(x, options, strict=True)])
        torch.testing.assert_close(model(x), each, rtol=0, atol=1e-12)
    ck.set_adapter(model, "free")
    ck.save_adapter(model, tmp_path, adapter_names=["default", "b", "free"])
    for name, folder in (("default", tmp_path), ("b", tmp_path / "b"), ("free", tmp_path / "free")):
        alone = ck.load_adapter(copy.deepcopy(plain), folder, progress=False)
        torch.testing.assert_close(alone[0].get_delta_weight(), deltas[name], rtol=0, atol=1e-12)
    ck.delete_adapter(model, "b")
    ck.unload(model)
    assert limits_of(model) == []


# ---- errors


def test_a_limit_of_zero_is_refused_and_the_model_stays_as_it_was():
    zero = plain_linear(sigma=[0.0] * 6)
    for plain, options, message in (
        (
            zero,
            bound(sides="none", target_modules="0"),
            "update_bound=0.1 times 0, which is update_bound_relative_to='weight' of 0",
        ),
        (plain_linear(), bound(1e-50, target_modules="0"), "update_bound=1e-50 times 1.15"),
        (
            plain_linear(),
            bound(1.0, "spectral", "next", sides="output", target_modules="0", subspace_k=6),
            r"update_bound=1.0 times 0, which is update_bound_relative_to='next' of 0 \(8, 6\) with k=6, expected more",
        ),
        (
            plain_linear(),
            bound(1.0, "spectral", "gap", target_modules="0", subspace_k=0),
            "update_bound_relative_to='gap' for 0, expected k >= 1 protected directions, not 0",
        ),
    ):
        with Unchanged(plain), pytest.raises(ValueError, match=message):
            ck.apply_complora(plain, config(**options), progress=False)


def test_another_bound_than_that_of_the_model_is_refused(tmp_path):
    small_clip.saved(tmp_path, **bound(0.05))
    model = small_clip.adapted(small_clip.small_clip(), **bound(0.06))
    with Unchanged(model), pytest.raises(ValueError, match=r"update_bound=0\.06 and 0\.05"):
        ck.load_adapter(model, tmp_path, progress=False)


def test_layers_of_peft_refuse_a_bound():
    with pytest.raises(ValueError, match=r"update_bound=0\.1, expected None: PEFT's layers do not bound"):
        ck.peft_config(config(update_bound=0.1), ["0"])
