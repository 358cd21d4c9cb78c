"""Adapted models become plain ones again, with or without the update, and compute and behave as such."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from calibrated import adapt as calibrated
from failures import Unchanged
from tiny_models import LAYOUTS, batch, clip, config, expected_delta, features, half_of, randomise, with_updates
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.modules import CompLoRALayer

ALL = ("q", "k", "v", "o", "fc1", "fc2")
UNLOADS = {"unload": ck.unload, "merge_and_unload": ck.merge_and_unload}

every_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
every_unload = pytest.mark.parametrize("unload", UNLOADS.values(), ids=UNLOADS)


def adapted(plain: nn.Module, **options: Any) -> Any:
    """A copy of `plain`, frozen as it is, with an adapter of random factors."""
    options = {"target_modules": ALL, "sides": "both"} | options
    return randomise(ck.apply_complora(copy.deepcopy(plain), config(**options), progress=False))


def linears() -> Any:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))


def make_up(model: nn.Module) -> list[Any]:
    """The class of every module, the names of its attributes and all its hooks."""
    return [
        (path, type(module), sorted(vars(module)), module.training, hooks_of(module))
        for path, module in model.named_modules()
    ]


def hooks_of(module: nn.Module) -> list[Any]:
    return [list(table.values()) for name, table in sorted(vars(module).items()) if "hooks" in name and table]


# ---- what comes out


@pytest.mark.parametrize("merged", [False, True])
@every_unload
@every_layout
def test_classes_keys_and_hooks_are_those_of_the_plain_model(make, unload, merged):
    plain = make().train()
    expected, keys = make_up(plain), list(plain.state_dict())
    model = adapted(plain)
    ck.set_recompute(model, "mlp") if make is clip else None
    parameters = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    if merged:
        ck.merge_adapter(model)
    assert unload(model) is model
    assert make_up(model) == expected
    assert list(model.state_dict()) == keys
    assert all(p is parameters[name] and not p.requires_grad for name, p in model.named_parameters())
    plain.load_state_dict(model.state_dict())


@pytest.mark.parametrize("merged", [False, True])
@every_layout
def test_unloaded_without_the_update_every_bit_is_the_plain_models(make, merged):
    plain, inputs = make().requires_grad_(False), batch()
    model = adapted(plain)
    if merged:
        ck.merge_adapter(model)
    ck.unload(model)
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert torch.equal(features(model, *inputs), features(plain, *inputs))


@every_layout
def test_unloaded_with_the_update_the_weights_are_those_of_the_dense_formula(make):
    plain, inputs = make().double(), batch(torch.float64)
    model = adapted(plain)
    expected = with_updates(plain, model, config(target_modules=ALL, sides="both"), half_of)
    before = features(model, *inputs)
    ck.merge_and_unload(model)
    torch.testing.assert_close(dict(model.state_dict()), dict(expected.state_dict()))
    torch.testing.assert_close(features(model, *inputs), before)


def test_a_merged_model_keeps_its_weights_and_the_originals_are_dropped():
    model = adapted(clip())
    ck.merge_adapter(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    ck.merge_and_unload(model)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in clip().named_buffers()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_update_is_rounded_once(dtype):
    model = adapted(linears().to(dtype), target_modules="0")
    layer = model[0]
    exact = layer.weight.double() + expected_delta(layer.weight, *layer.factors(), layer.config, 3)
    ck.merge_and_unload(model)
    assert model[0].weight.dtype == dtype
    # Half a unit in the last place, and what float32 rounds in ΔW.
    assert ((model[0].weight.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all()


@every_unload
def test_it_can_be_adapted_again(unload):
    plain, inputs = clip(), batch()
    model = adapted(plain)
    unload(model)
    before = features(model, *inputs)
    ck.apply_complora(model, config(target_modules=("q", "fc1")), progress=False)
    torch.testing.assert_close(features(model, *inputs), before)
    features(model, *inputs).sum().backward()
    ck.check_gradients(model)
    model.load_state_dict(plain.state_dict())


def test_a_calibrated_model_loads_any_weights_again():
    model = randomise(calibrated(clip()))
    other = clip().state_dict()
    with pytest.raises(RuntimeError, match="other base weights"):
        model.load_state_dict(other)
    ck.unload(model).load_state_dict(other)


def test_what_the_user_put_on_the_model_stays():
    model, calls = adapted(clip()), []
    for module in (model.visual, model.visual.transformer.resblocks[0].attn):
        module.register_forward_hook(lambda *_: calls.append(1))
        module.note = "mine"
    attention = model.visual.transformer.resblocks[0].attn
    model.visual.train()
    ck.unload(model)
    model.encode_image(batch()[0])
    assert (attention.note, attention.training, model.transformer.training, len(calls)) == ("mine", True, False, 2)
    assert model.visual.transformer.resblocks[0].attn is attention


def test_a_layer_alone_and_one_that_stands_at_two_places():
    linear = nn.Linear(6, 4).requires_grad_(False)
    layer = ck.CompLoRALinear.from_linear(linear, config())
    ck.unload(layer)
    assert type(layer) is nn.Linear
    assert vars(layer).keys() == vars(linear).keys()
    shared = nn.Linear(6, 6)
    model = adapted(nn.Sequential(shared, nn.Tanh(), shared).double(), target_modules="0")
    x = torch.randn(3, 6, dtype=torch.float64)
    before = model(x)
    ck.merge_and_unload(model)
    assert type(model[0]) is nn.Linear
    assert model[0] is model[2]
    torch.testing.assert_close(model(x), before)


# ---- what takes plain models alone


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("make", [LAYOUTS["open_clip 3"], LAYOUTS["open_clip 3, CustomTextCLIP"]])
def test_the_result_is_scripted_and_exported_as_the_plain_model_is(make):
    model = ck.merge_and_unload(adapted(make()))
    inputs = batch()
    with torch.no_grad():
        expected = model(*inputs)
        scripted: Any = torch.jit.script(model)
        exported: Any = torch.export.export(model, inputs).module()
        for found in (scripted(*inputs), exported(*inputs)):
            torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization")
def test_every_linear_of_the_result_is_quantised():
    plain = linears()

    def quantised(model: nn.Module) -> int:
        quantise = torch.ao.quantization.quantize_dynamic
        return sum("dynamic" in type(module).__module__ for module in quantise(model, {nn.Linear}).modules())

    assert quantised(ck.merge_and_unload(adapted(plain, target_modules=r"\d"))) == quantised(plain) == 2


# ---- wrappers, containers and parts


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@every_unload
def test_a_compiled_model_computes_what_it_has_become(unload):
    model = adapted(linears(), target_modules=r"\d").requires_grad_(False)
    compiled: Any = torch.compile(model, backend="eager")
    x = torch.randn(3, 6)
    before = compiled(x)
    ck.merge_adapter(reference := copy.deepcopy(model))
    expected = unload(copy.deepcopy(model))(x)
    assert unload(compiled) is compiled
    torch.testing.assert_close(compiled(x), expected)
    assert torch.allclose(before, expected, atol=1e-5) == (unload is ck.merge_and_unload)
    torch.testing.assert_close(reference(x), before)


def test_the_adapted_part_of_a_container_is_unloaded_and_a_part_of_the_adapted_model_is_refused():
    container = nn.ModuleDict({"clip": adapted(clip()), "head": nn.Linear(16, 2)})
    with Unchanged(container), pytest.raises(ValueError, match=r"was adapted as .*: expected the whole model"):
        ck.unload(container["clip"].get_submodule("visual"))
    ck.unload(container)
    assert make_up(container["clip"]) == make_up(clip())
    assert all(parameter.requires_grad for parameter in container["head"].parameters())
    with Unchanged(container), pytest.raises(ValueError, match="no Comp-LoRA adapter"):
        ck.unload(container)


def test_a_wrapper_that_lists_parameters_is_refused(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = DistributedDataParallel(adapted(linears(), target_modules="0"))
        with Unchanged(model), pytest.raises(ValueError, match=r"^0 is inside a Distributed.* unloaded first"):
            ck.unload(model)
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("path", ["", "visual.transformer.resblocks.1", "transformer.resblocks.0.attn"])
@every_unload
def test_a_module_whose_class_was_changed_since_is_refused(unload, path):
    model = adapted(clip())
    module = model.get_submodule(path)
    module.__class__ = type("Sharded", (type(module),), {})  # as fully_shard does
    with Unchanged(model), pytest.raises(ValueError, match=rf"^{path or 'the model'}: .* has become a Sharded"):
        unload(model)


# ---- what is not merged


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_not_finite_is_merged_on_request_alone(value):
    model = adapted(linears(), target_modules=r"\d")
    with torch.no_grad():
        model[2].lora_B[0, 0] = value
    with Unchanged(model), pytest.raises(ValueError, match=r"^2: the update .* NaN or infinite"):
        ck.merge_and_unload(model)
    ck.merge_and_unload(model, safe_merge=False)
    assert not model[2].weight.isfinite().all()


def test_a_tied_weight_is_not_merged():
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False))
    model[2].weight = model[0].weight
    model = adapted(model, target_modules=r"\d")
    with Unchanged(model), pytest.raises(ValueError, match=r"^2\.weight: tied"):
        ck.merge_and_unload(model)
    ck.unload(model)
    assert not any(isinstance(module, CompLoRALayer) for module in model.modules())
    with pytest.raises(ValueError, match="no Comp-LoRA adapter"):
        adapted_layers(model)
