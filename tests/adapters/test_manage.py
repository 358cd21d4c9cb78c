"""Work with an adapted model: parameters, gradients, the report, and switching, merging and copying the adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from failures import Unchanged
from tiny_models import (
    LAYOUTS,
    batch,
    clip,
    config,
    features,
    frozen_weight,
    half_of,
    randomise,
    with_updates,
)
from torch import Tensor, nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.adapters.manage import load_raw_adapter_state, named_adapter_parameters, raw_adapter_state
from complora_kernels.modules import CompLoRALayer

ALL = ("q", "k", "v", "o", "fc1", "fc2")
BLOCK = "visual.transformer.resblocks.0"

every_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)


def adapted(make: Any = clip, **options: Any) -> nn.Module:
    return randomise(ck.apply_complora(make(), config(**{"target_modules": ALL, **options})))


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter that is not a factor."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if "lora_" not in name}


def assert_bit_identical(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in before.items():
        now = model.get_parameter(name)
        assert now.dtype == value.dtype
        assert torch.equal(now.view(torch.int16), value.view(torch.int16)) if now.dim() else now == value, name


def train_once(model: nn.Module, *inputs: Tensor) -> None:
    features(model, *inputs).square().sum().backward()


# ---- parameters


@every_layout
def test_adapter_parameters_are_the_factors_and_nothing_else(make):
    model = adapted(make)
    named = dict(named_adapter_parameters(model))
    assert {name: id(value) for name, value in named.items()} == {
        name: id(value) for name, value in model.named_parameters() if "lora_" in name
    }
    assert list(map(id, ck.adapter_parameters(model))) == list(map(id, named.values()))
    assert len(named) == 2 * 4 * len(ALL)


def test_a_single_layer_is_a_model_too():
    layer = ck.CompLoRALinear.from_linear(nn.Linear(6, 4).requires_grad_(False), config())
    assert dict(named_adapter_parameters(layer)) == {"lora_A": layer.lora_A, "lora_B": layer.lora_B}
    assert ck.subspace_report(layer)[0].k == 2
    assert set(raw_adapter_state(layer)) == {"lora_A", "lora_B", "output_basis"}


def test_trainable_parameters_are_printed_as_peft_prints_them(capsys):
    model = nn.Sequential(nn.Linear(1000, 10))
    ck.apply_complora(model, config(target_modules="0", r=4))
    ck.print_trainable_parameters(model)
    assert capsys.readouterr().out == "trainable params: 4,040 || all params: 14,050 || trainable%: 28.7544\n"


# ---- gradients


@every_layout
def test_check_gradients_is_content_after_a_backward_pass_through_everything(make):
    model = ck.apply_complora(make(), config(target_modules=ALL))  # B is zero, and so is the gradient of A
    train_once(model, *batch())
    ck.check_gradients(model)


def test_check_gradients_names_exactly_the_adapters_that_were_not_reached():
    model: Any = adapted(target_modules=("q", "fc2"))
    images, _ = batch()
    model.encode_image(images).sum().backward()
    with pytest.raises(RuntimeError) as error:
        ck.check_gradients(model)
    named = str(error.value).removeprefix("no gradient reached ").partition(":")[0].split(", ")
    assert set(named) == {name for name, _ in named_adapter_parameters(model) if not name.startswith("visual")}


def test_check_gradients_finds_a_weight_that_is_read_past_its_module():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.used(x), self.read.weight)

    model = ck.apply_complora(Reader(), config(target_modules="used|read"))
    model(torch.randn(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match=r"reached read\.lora_A, read\.lora_B:"):
        ck.check_gradients(model)


def test_check_gradients_before_any_backward_pass_or_without_an_adapter():
    with pytest.raises(RuntimeError, match=r"resblocks\.1\.mlp\.c_proj\.lora_B"):
        ck.check_gradients(adapted())
    with pytest.raises(ValueError, match="no Comp-LoRA adapter"):
        ck.check_gradients(clip())


# ---- report


def adapted_weights(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """The layer and the name in it of every adapted weight, by its path in the report."""
    layers = adapted_layers(model).items()
    return {f"{path}.{name}" if name else path: (layer, name) for path, layer in layers for name in layer.weights}


@pytest.mark.parametrize("source", ["weight", "ends", "random"])
@pytest.mark.parametrize("sides", ["output", "input", "both", "none"])
def test_the_report_is_what_the_dense_formulas_say(sides, source, monkeypatch):
    """For updates of any kind, which a projected one is not: the share inside is neither zero nor one."""
    size = {} if sides == "none" else {"subspace_ratio": 0.75}  # some bases are complements, some are not
    model = adapted(lambda: clip().double(), sides=sides, subspace_source=source, **size)
    updates: dict[tuple[int, str], Tensor] = {}
    for layer, name in adapted_weights(model).values():
        updates[id(layer), name] = torch.randn_like(frozen_weight(layer, name))
    monkeypatch.setattr(CompLoRALayer, "get_delta_weight", lambda layer, name: updates[id(layer), name])
    report = {row.path: row for row in ck.subspace_report(model)}
    assert report.keys() == adapted_weights(model).keys()
    for path, (layer, name) in adapted_weights(model).items():
        row, weight, update = report[path], frozen_weight(layer, name), updates[id(layer), name]
        k = 0 if sides == "none" else round(0.75 * min(weight.shape))
        allowed = dense_projector(layer, name, "output") @ update @ dense_projector(layer, name, "input")
        assert row.k == k
        assert row.share == pytest.approx(float((update - allowed).norm() ** 2 / update.norm() ** 2), abs=1e-12)
        assert row.relative_update == pytest.approx(float(update.norm() / weight.norm()))
        assert row.energy == pytest.approx(protected_energy(layer, name, weight), abs=1e-12)
        if source == "weight" and sides != "none":
            sigma = torch.linalg.svdvals(weight).square()
            assert row.energy == pytest.approx(float(sigma[:k].sum() / sigma.sum()))
        bases = [value for key, value in layer.named_buffers() if key.endswith(f"_basis_{name}".rstrip("_"))]
        assert len(bases) == {"none": 0, "both": 2}.get(sides, 1)
        assert row.basis_bytes == sum(basis.numel() * 8 for basis in bases)


@pytest.mark.parametrize("merged", [False, True])
def test_the_report_of_a_trained_adapter(merged):
    model = adapted(sides="both").double()
    weights = {path: frozen_weight(*found).detach().clone() for path, found in adapted_weights(model).items()}
    sizes = {path: layer.get_delta_weight(name).norm() for path, (layer, name) in adapted_weights(model).items()}
    if merged:
        ck.merge_adapter(model)
    for row in ck.subspace_report(model):
        assert row.share < 1e-10  # the square of the 1e-5 that float32 bases leave
        assert row.relative_update == pytest.approx(float(sizes[row.path] / weights[row.path].norm()))


def dense_projector(layer: Any, name: str, side: str) -> Tensor:  # [d, d]
    """Onto the complement in float64, from the basis in use; the identity where the side is free."""
    basis = layer.basis(name, side)
    identity = torch.eye(frozen_weight(layer, name).shape[side == "input"], dtype=torch.float64)
    if basis is None:
        return identity
    span = basis.matrix.double() @ basis.matrix.double().mT
    return identity - span if basis.kind == "principal" else span


def protected_energy(layer: Any, name: str, weight: Tensor) -> float:
    """The share of |W|² that the complement does not hold, on the output side if that is projected."""
    if layer.config.sides == "input":
        kept = weight @ dense_projector(layer, name, "input")
    else:
        kept = dense_projector(layer, name, "output") @ weight
    return float(1 - kept.norm() ** 2 / weight.norm() ** 2)


def test_the_report_of_an_untrained_adapter():
    for row in ck.subspace_report(ck.apply_complora(clip(), config())):
        assert (row.share, row.relative_update) == (0.0, 0.0)
        assert 0 < row.energy < 1


# ---- disable


@every_layout
def test_disabled_the_model_is_the_plain_one_and_enabled_again_after_an_error(make):
    plain = make()
    model = randomise(ck.apply_complora(copy.deepcopy(plain), config(target_modules=ALL, lora_dropout=0.5)))
    inputs = batch()
    before = features(model.eval(), *inputs)
    with ck.disable_adapter(model.train()):
        torch.testing.assert_close(features(model, *inputs), features(plain, *inputs))
    assert torch.equal(features(model.eval(), *inputs), before)
    with pytest.raises(ZeroDivisionError), ck.disable_adapter(model):
        raise ZeroDivisionError
    assert torch.equal(features(model, *inputs), before)
    assert not torch.allclose(before, features(plain, *inputs))


def test_disable_can_be_nested_and_refuses_a_merged_model():
    model, inputs = adapted(), batch()
    before = features(model, *inputs)
    with ck.disable_adapter(model):
        plain = features(model, *inputs)
        with ck.disable_adapter(model):
            pass
        assert torch.equal(features(model, *inputs), plain)
    assert torch.equal(features(model, *inputs), before)
    ck.merge_adapter(model)
    with pytest.raises(RuntimeError, match=r"merged: call unmerge_adapter first"), ck.disable_adapter(model):
        pass
    merged = features(model, *inputs)
    ck.unmerge_adapter(model)
    assert not torch.allclose(merged, plain)
    assert torch.equal(features(model, *inputs), before)


# ---- merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@every_layout
def test_unmerge_restores_every_bit(make, dtype):
    model = adapted(make, sides="both").to(dtype)
    inputs = batch()
    before, state = frozen(model), set(model.state_dict())
    outputs = features(model, inputs[0].to(dtype), inputs[1])
    ck.merge_adapter(model)
    assert set(model.state_dict()) == state | {f"{path}.lora_merged" for path in adapted_layers(model)}
    ck.unmerge_adapter(model)
    assert set(model.state_dict()) == state
    assert_bit_identical(model, before)
    assert torch.equal(features(model, inputs[0].to(dtype), inputs[1]), outputs)
    assert not any("unmerged" in name for name, _ in model.named_buffers())


@every_layout
def test_a_merged_model_computes_the_same_and_its_weights_load_into_a_plain_one(make):
    plain = make().double()
    options = config(target_modules=ALL, sides="both")
    model = randomise(ck.apply_complora(copy.deepcopy(plain), options))
    inputs = batch(torch.float64)
    outputs = features(model, *inputs)
    ck.merge_adapter(model)
    torch.testing.assert_close(features(model, *inputs), outputs)
    merged = {name: value for name, value in model.state_dict().items() if "lora_" not in name}
    torch.testing.assert_close(merged, dict(with_updates(plain, model, options, half_of).state_dict()))
    plain.load_state_dict(merged)
    torch.testing.assert_close(features(plain, *inputs), outputs)


@pytest.mark.parametrize("strict", [True, False])
def test_the_state_dict_of_a_merged_model_is_not_loaded_into_an_adapted_one(strict):
    """Its weights hold the update, which the factors would add a second time."""
    model, inputs = adapted(), batch()
    merged = copy.deepcopy(model)
    ck.merge_adapter(merged)
    for part in ("", f"{BLOCK}.attn"):
        state = merged.get_submodule(part).state_dict()
        with Unchanged(model), pytest.raises(RuntimeError, match="lora_merged: the state dict is of a merged model"):
            model.get_submodule(part).load_state_dict(state, strict=strict)
    ck.unmerge_adapter(merged)
    model.load_state_dict(merged.state_dict(), strict=strict)
    assert torch.equal(features(model, *inputs), features(merged, *inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_rounds_once_under_autocast_too(dtype):
    model = adapted(target_modules=("fc1",), sides="both").to(dtype)
    layer: Any = adapted_layers(model)[f"{BLOCK}.mlp.c_fc"]
    weight = layer.weight.detach().clone()
    A, B = (factor.detach().double() for factor in layer.factors())
    delta = layer.config.scaling * dense_projector(layer, "", "output") @ B @ A @ dense_projector(layer, "", "input")
    exact = weight.double() + delta
    with torch.autocast("cpu", torch.bfloat16):
        ck.merge_adapter(model)
    error = (layer.weight.double() - exact).abs()
    assert (error <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-6).all()  # half a unit, and float32's own rounding


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_named_and_nothing_is_merged(value):
    model = adapted()
    last = list(adapted_layers(model))[-1]
    with torch.no_grad():
        model.get_parameter(f"{last}.lora_B")[0, 0] = value
    before = frozen(model)
    with pytest.raises(ValueError, match=rf"{last}: the update .* NaN or infinite"):
        ck.merge_adapter(model)
    assert_bit_identical(model, before)
    assert not any(layer.merged for layer in adapted_layers(model).values())
    with pytest.raises(RuntimeError, match="not merged"):
        ck.unmerge_adapter(model)


def test_merging_or_unmerging_twice():
    model = adapted()
    before = frozen(model)
    with pytest.raises(RuntimeError, match="not merged: call merge_adapter first"):
        ck.unmerge_adapter(model)
    ck.merge_adapter(model)
    merged = frozen(model)
    with pytest.raises(RuntimeError, match="merged: call unmerge_adapter first"):
        ck.merge_adapter(model)
    assert_bit_identical(model, merged)
    layer = next(iter(adapted_layers(model).values()))
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    ck.unmerge_adapter(model)
    assert_bit_identical(model, before)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


def test_a_merged_copy_unmerges_on_its_own():
    model = adapted()
    before = frozen(model)
    ck.merge_adapter(model)
    twin = copy.deepcopy(model)
    ck.unmerge_adapter(twin)
    assert_bit_identical(twin, before)
    assert all(layer.merged for layer in adapted_layers(model).values())


def test_a_merged_model_can_be_converted():
    model = adapted()
    half = {name: value.half() for name, value in frozen(model).items()}
    ck.merge_adapter(model)
    model.half()
    ck.unmerge_adapter(model)
    assert_bit_identical(model, half)


def test_training_mode_merges_nothing():
    model = adapted()
    before = frozen(model)
    for mode in (True, False, True):
        model.train(mode)
        assert_bit_identical(model, before)
        assert not any(layer.merged for layer in adapted_layers(model).values())


def test_merging_gives_the_parameters_other_memory_and_unmerging_their_own():
    """A captured graph knows a weight by its memory, an optimizer by the parameter."""
    model = adapted_linears()
    parameters = dict(model.named_parameters())
    memory = {name: (parameter.data_ptr(), parameter.detach()) for name, parameter in parameters.items()}
    values = frozen(model)
    ck.merge_adapter(model)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model[0].weight.data_ptr() != memory["0.weight"][0]
    assert all(torch.equal(memory[name][1], value) for name, value in values.items())
    ck.unmerge_adapter(model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == {
        name: address for name, (address, _) in memory.items()
    }


def test_a_backward_pass_does_not_take_merged_weights_for_those_of_its_forward_pass():
    model = adapted_linears()
    output = model(torch.randn(3, 6, requires_grad=True)).sum()
    ck.merge_adapter(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_merging_in_inference_mode_makes_no_inference_tensors():
    model = adapted_linears()
    with torch.inference_mode():
        ck.merge_adapter(model)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


def adapted_linears() -> Any:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    return randomise(ck.apply_complora(model, config(target_modules=r"\d"), progress=False))


def test_a_tied_weight_is_not_merged():
    """Merging would change the embedding with the head."""
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False))
    model[2].weight = model[0].weight
    randomise(ck.apply_complora(model, config(target_modules=r"\d")))
    before = frozen(model)
    with pytest.raises(ValueError, match=r"^2\.weight: tied"):
        ck.merge_adapter(model)
    assert_bit_identical(model, before)


def test_a_module_with_two_names_is_merged_once():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    randomise(ck.apply_complora(model, config(target_modules="0"))).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    before, outputs = frozen(model), model(x)
    ck.merge_adapter(model)
    torch.testing.assert_close(model(x), outputs)
    ck.unmerge_adapter(model)
    assert_bit_identical(model, before)


@pytest.mark.parametrize(
    "act",
    [
        ck.merge_adapter,
        ck.unmerge_adapter,
        ck.subspace_report,
        raw_adapter_state,
        lambda model: list(ck.adapter_parameters(model)),
        lambda model: ck.disable_adapter(model).__enter__(),
    ],
    ids=["merge", "unmerge", "report", "raw state", "parameters", "disable"],
)
def test_a_plain_model_is_refused(act):
    with pytest.raises(ValueError, match="no Comp-LoRA adapter"):
        act(clip())


# ---- raw state


@pytest.mark.parametrize("sides", ["output", "both", "none"])
def test_raw_state_round_trip_is_exact_where_computed_bases_would_not_be(sides):
    model = adapted(sides=sides)
    state = {name: value.clone() for name, value in raw_adapter_state(model).items()}
    assert set(state) == {
        name for name, _ in (*model.named_parameters(), *model.named_buffers()) if "lora_" in name or "_basis" in name
    }
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in raw_adapter_state(twin).values():
            tensor.copy_(torch.linalg.qr(torch.randn_like(tensor)).Q if len(tensor) > tensor.shape[1] else tensor + 1)
    inputs = batch()
    assert not torch.allclose(features(twin, *inputs), features(model, *inputs))
    factors = list(map(id, ck.adapter_parameters(twin)))
    load_raw_adapter_state(twin, state)
    assert torch.equal(features(twin, *inputs), features(model, *inputs))
    assert list(map(id, ck.adapter_parameters(twin))) == factors  # an optimizer still holds them
    assert all(factor.requires_grad for factor in ck.adapter_parameters(twin))


def test_the_raw_state_has_the_names_of_the_model_that_was_adapted():
    model, inputs = adapted(sides="both"), batch()
    container = nn.Module()
    container.clip = model
    state = {name: value.clone() for name, value in raw_adapter_state(container).items()}
    assert state.keys() == raw_adapter_state(model).keys()
    other = adapted(sides="both")  # its weights, and so its bases, are others
    other.load_state_dict({name: value for name, value in model.state_dict().items() if "lora_" not in name})
    container.clip = other
    load_raw_adapter_state(container, state)
    assert torch.equal(features(other, *inputs), features(model, *inputs))
    with pytest.raises(ValueError, match=r"was adapted as .*: expected the whole model"):
        raw_adapter_state(model.get_submodule(BLOCK))


def test_a_raw_state_that_does_not_fit_changes_nothing():
    model = adapted()
    before = {name: value.clone() for name, value in raw_adapter_state(model).items()}
    name = f"{BLOCK}.attn.lora_B.q"
    zeros = {key: torch.zeros_like(value) for key, value in before.items()}
    wrong = [
        {key: value for key, value in zeros.items() if key != name},
        {**zeros, "stray": torch.zeros(1)},
        {**zeros, name: torch.zeros(1, 2)},
    ]
    for state, named in zip(wrong, (name, "stray", name), strict=True):
        with pytest.raises(ValueError, match=named.replace(".", r"\.")):
            load_raw_adapter_state(model, state)
    now = raw_adapter_state(model)
    assert all(torch.equal(now[key], value) for key, value in before.items())


def test_parameters_of_a_plain_model_are_refused_at_the_call():
    with pytest.raises(ValueError, match="no Comp-LoRA adapter"):
        ck.adapter_parameters(nn.Linear(2, 2))
