"""Several adapters on one model: each computes as if it were alone, sums are exact, and files have PEFT's places."""

from __future__ import annotations

import copy
import pickle
from typing import Any, cast

import peft
import pytest
import torch
from calibrated import batches, run
from failures import Unchanged, contents, failing
from peft_adapters import peft_model, saved_by_peft
from process_group import process_group
from small_clip import assert_close, config, small_clip
from tiny_models import clip as calibrated_clip
from tiny_models import with_updates
from torch import nn
from torch.fx import symbolic_trace as trace
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from two_adapters import CONFIGS, SIZES, B, alone, both, clip, expected, expected_sum, features, frozen

import complora_kernels as ck
from complora_kernels.adapters import save_load
from complora_kernels.adapters.build import adapted_layers, all_layers
from complora_kernels.adapters.manage import load_raw_adapter_state, named_adapter_parameters, raw_adapter_state

EXACT = 1e-11  # sums of float64 in another order; bases of one decomposition
REORDERED = 5e-6  # sums of float32 in another order
LINEARS: dict[str, Any] = {"sides": "none", "target_modules": ("0", "2")}


def linears() -> Any:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


# ---- what is computed


@pytest.mark.parametrize("active", CONFIGS)
def test_each_adapter_computes_as_if_it_were_alone(active):
    model = both(active=active)
    truth = features(expected(active))
    assert (truth - features(clip())).norm() > 0.05 * truth.norm()
    assert_close(features(model), truth, EXACT)
    with ck.disable_adapter(model):
        assert_close(features(model), features(clip()), EXACT)
    assert ck.active_adapters(model) == {active: 1.0}
    assert ck.adapter_names(model)[0] == active
    assert set(ck.adapter_names(model)) == {"default", "b"}


def test_a_new_adapter_is_not_active_and_starts_at_nothing():
    model = alone("default")
    before = features(model)
    ck.add_adapter(model, "b", B, progress=False)
    assert torch.equal(features(model), before)
    ck.set_adapter(model, "b")
    assert_close(features(model), features(clip()), EXACT)


def test_switching_copies_nothing():
    model = both()
    memory, own = frozen(model), dict(named_adapter_parameters(model))
    for name in ("b", "default", "default", "b", "default"):
        ck.set_adapter(model, name)
        assert frozen(model) == memory
    assert {name: id(factor) for name, factor in named_adapter_parameters(model)} == {
        name: id(factor) for name, factor in own.items()
    }


@pytest.mark.parametrize("weights", [{"default": 0.7, "b": 0.3}, {"b": -1.5}, {"b": 1, "default": 1}], ids=str)
def test_a_weighted_sum_is_exact(weights):
    model = both()
    ck.set_adapter(model, weights)
    assert ck.active_adapters(model) == weights
    assert_close(features(model), features(expected_sum(weights)), EXACT)
    ck.set_adapter(model, "b")
    assert_close(features(model), features(expected("b")), EXACT)


def test_a_weighted_sum_is_merged():
    weights = {"default": 0.7, "b": 0.3}
    model = both()
    ck.set_adapter(model, weights)
    ck.merge_and_unload(model)
    torch.testing.assert_close(model.state_dict(), dict(expected_sum(weights).state_dict()), rtol=0, atol=EXACT)


def test_new_layers_keep_the_parameters_and_hooks_of_the_modules():
    """Only the newly adapted weights are frozen."""
    model = alone("default")
    model.logit_scale.requires_grad_(True)
    fc1, calls = model.transformer.resblocks[0].mlp.c_fc.requires_grad_(True), []
    hook = fc1.register_forward_hook(lambda *_: calls.append(True))
    own = dict(model.named_parameters())
    ck.add_adapter(model, "b", B, progress=False)
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in own.items())
    layer = model.transformer.resblocks[0].mlp.c_fc
    assert isinstance(layer, ck.CompLoRALinear)
    assert model.logit_scale.requires_grad
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    features(model)
    assert calls
    hook.remove()
    calls.clear()
    features(model)
    assert not calls


def test_only_the_active_adapter_is_trained():
    model = both(active="b")
    inactive = {name: value.clone() for name, value in model.named_parameters() if "inactive_default" in name}
    assert inactive
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained == [name for name, _ in named_adapter_parameters(model)]
    optimizer = torch.optim.SGD(ck.adapter_parameters(model), lr=0.1)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    texts = torch.tensor([[3, 19, 0, 0, 0, 0], [4, 5, 19, 0, 0, 0]])
    torch.cat([model.encode_image(images), model.encode_text(texts)]).square().sum().backward()
    ck.check_gradients(model)
    optimizer.step()
    for name, value in inactive.items():
        assert torch.equal(model.get_parameter(name), value)
    ck.set_adapter(model, "default")
    assert_close(features(model), features(expected("default")), EXACT)


def test_reports_are_of_the_active_adapter():
    model = both(active="b")
    assert {row.k for row in ck.subspace_report(model)} == {10}
    assert {row.r for row in ck.explain(model)} == {3}
    assert {row.path for row in ck.subspace_report(model)} == {row.path for row in ck.subspace_report(alone("b"))}


def test_peft_computes_the_same_with_several_adapters(tmp_path):
    """PEFT reads what was exported, switches and merges by itself."""
    model = ck.apply_complora(linears(), config(r=2, **LINEARS), progress=False)
    ck.add_adapter(model, "b", config(r=4, sides="none", target_modules=("2",)), progress=False)
    generator = torch.Generator().manual_seed(1)
    for name in ("default", "b"):
        ck.set_adapter(model, name)
        for factor in ck.adapter_parameters(model):
            nn.init.normal_(factor, generator=generator)
    ck.export_peft(model, tmp_path, adapter_names=["default", "b"])
    ck.set_adapter(model, {"default": 0.7, "b": 0.3})
    ck.export_peft(model, tmp_path / "sum")
    theirs = peft.PeftModel.from_pretrained(linears(), str(tmp_path))
    theirs.load_adapter(str(tmp_path / "b"), "b")
    theirs.load_adapter(str(tmp_path / "sum"), "sum")
    theirs.add_weighted_adapter(["default", "b"], [0.7, 0.3], "cat", combination_type="cat")
    x = torch.randn(3, 6, generator=generator)
    for name in ("default", "b"):
        ck.set_adapter(model, name)
        theirs.set_adapter(name)
        assert_close(model(x), theirs(x), REORDERED)
    ck.set_adapter(model, {"default": 0.7, "b": 0.3})
    for name in ("sum", "cat"):
        theirs.set_adapter(name)
        assert_close(model(x), theirs(x), REORDERED)


def test_adapters_of_peft_are_added(tmp_path):
    theirs = peft_model(linears(), r=2, target_modules=["0", "2"])
    theirs.save_pretrained(str(tmp_path))
    model = ck.apply_complora(linears(), config(r=3, subspace_k=2, target_modules=("0",)), progress=False)
    ck.import_peft(model, tmp_path, adapter_name="theirs", progress=False)
    assert ck.active_adapters(model) == {"default": 1.0}
    ck.set_adapter(model, "theirs")
    x = torch.randn(3, 6)
    assert_close(model(x), theirs(x), REORDERED)


# ---- the life of an adapter


def test_an_adapter_is_deleted():
    model = both()
    ck.delete_adapter(model, "b")
    assert ck.adapter_names(model) == ["default"]
    assert_close(features(model), features(expected("default")), EXACT)
    one = alone("default")
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in one.named_parameters()}
    assert all_layers(model).keys() == all_layers(one).keys()  # what "b" alone adapted is plain again
    ck.add_adapter(model, "b", B, progress=False)  # the name is free again


def test_unload_gives_the_plain_model():
    model, plain = both(active="b"), clip()
    ck.unload(model)
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(features(model), features(plain))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_adapters(duplicate):
    model = duplicate(original := both())
    ck.set_adapter(model, "b")
    assert_close(features(model), features(expected("b")), EXACT)
    assert_close(features(original), features(expected("default")), EXACT)
    ck.delete_adapter(model, "default")
    assert "default" in ck.adapter_names(original)


def test_a_merged_model_comes_back():
    model = both()
    ck.merge_adapter(model)
    for call in (
        lambda: ck.set_adapter(model, "b"),
        lambda: ck.delete_adapter(model, "b"),
        lambda: ck.add_adapter(model, "c", B),
    ):
        with pytest.raises(RuntimeError, match="merged"):
            call()
    ck.unmerge_adapter(model)
    ck.set_adapter(model, "b")
    assert_close(features(model), features(expected("b")), EXACT)


def test_raw_state_is_that_of_the_active_adapter():
    model, other = both(active="b"), both(active="b")
    state = {name: tensor.clone() for name, tensor in raw_adapter_state(model).items()}
    assert state.keys() == raw_adapter_state(alone("b")).keys()
    with torch.no_grad():
        for factor in ck.adapter_parameters(other):
            factor.zero_()
    load_raw_adapter_state(other, state)
    assert torch.equal(features(other), features(model))


def test_factors_stay_float32_when_the_model_becomes_half():
    model = both(small_clip(layers=1)).half()
    dtypes = {value.dtype for name, value in model.named_parameters() if "lora_" in name}
    assert dtypes == {torch.float32}
    bases = {value.dtype for name, value in model.named_buffers() if "_basis" in name}
    assert bases == {torch.float32}
    ck.set_adapter(model, "b")
    assert features(model).dtype == torch.float16


# ---- state dicts


def test_a_state_dict_brings_all_adapters():
    model, source = both(), both()
    for name in ("b", "default"):
        ck.set_adapter(source, name)
        for factor in ck.adapter_parameters(source):
            nn.init.constant_(factor, len(name))
    model.load_state_dict(source.state_dict())
    for name in ("b", "default"):
        ck.set_adapter(source, name)
        ck.set_adapter(model, name)
        assert torch.equal(features(model), features(source))


def test_bases_of_all_adapters_follow_other_weights():
    other = small_clip(1, layers=1).double()
    model = both()
    model.load_state_dict(other.state_dict(), strict=True)  # a plain checkpoint: the factors stay
    for name in ("default", "b"):
        ck.set_adapter(model, name)
        truth = with_updates(other, model, CONFIGS[name], lambda _, k=SIZES[name]: k)
        assert_close(features(model), features(truth), EXACT)


def test_bases_of_a_loaded_adapter_follow_other_weights(tmp_path):
    """They are not computed yet when the weights come."""
    ck.save_adapter(both(), tmp_path, adapter_names=["default", "b"])
    model = ck.load_adapter(clip(), tmp_path, progress=False)
    ck.load_adapter(model, tmp_path / "b", adapter_name="b", progress=False)
    other = small_clip(1, layers=1).double()
    model.load_state_dict(other.state_dict())
    for name in ("default", "b"):
        ck.set_adapter(model, name)
        truth = with_updates(other, model, CONFIGS[name], lambda _, k=SIZES[name]: k)
        assert_close(features(model), features(truth), EXACT)


def test_a_state_dict_of_another_active_adapter_is_refused():
    model, state = both(), both(active="b").state_dict()
    with Unchanged(model), pytest.raises(RuntimeError, match=r"wait, in the state dict .*set_adapter"):
        model.load_state_dict(state, strict=False)


# ---- files


def test_files_have_the_places_that_peft_gives_them(tmp_path):
    model = both()
    ck.save_adapter(model, tmp_path, adapter_names=["default", "b"])
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert contents(tmp_path).keys() == names | {"b"} | {f"b/{name}" for name in names}
    for name, folder in (("default", tmp_path), ("b", tmp_path / "b")):
        loaded = ck.load_adapter(clip(), folder, progress=False)
        assert_close(features(loaded), features(expected(name)), EXACT)


@pytest.mark.parametrize("names", [["default", "b"], ["b", "default"]])
@pytest.mark.parametrize("existing", [True, False])
def test_a_save_that_fails_leaves_all_files(tmp_path, monkeypatch, names, existing):
    folder, model = tmp_path / "a", both()
    if existing:
        ck.save_adapter(model, folder, adapter_names=names)
    before = contents(tmp_path)
    nn.init.ones_(next(ck.adapter_parameters(model)))
    failing(monkeypatch, save_load, "write_adapter", {1}, OSError("full"))
    with pytest.raises(OSError, match="full"):
        ck.save_adapter(model, folder, adapter_names=names)
    assert contents(tmp_path) == before


def test_a_saved_adapter_is_the_same_active_or_not(tmp_path):
    ck.save_adapter(both(), tmp_path, adapter_names=["b"])
    ck.save_adapter(both(active="b"), tmp_path / "active")
    ck.save_adapter(alone("b"), tmp_path / "alone")
    ck.merge_adapter(merged := both())
    ck.save_adapter(merged, tmp_path / "merged", adapter_names=["b"])
    alone_files, *others = (contents(tmp_path / folder) for folder in ("alone", "b", "active", "merged/b"))
    assert all(files == alone_files for files in others)


def test_adapters_are_loaded_beside_the_active_one(tmp_path):
    ck.save_adapter(both(), tmp_path, adapter_names=["default", "b"])
    model = ck.load_adapter(clip(), tmp_path / "b", adapter_name="first", progress=False)
    assert ck.adapter_names(model) == ["first"]
    ck.load_adapter(model, tmp_path, adapter_name="second", progress=False)
    assert ck.active_adapters(model) == {"first": 1.0}
    for name, saved in (("first", "b"), ("second", "default")):
        ck.set_adapter(model, name)
        assert_close(features(model), features(expected(saved)), EXACT)
    with Unchanged(model), pytest.raises(ValueError, match="adapter_name='first', expected another name"):
        ck.load_adapter(model, tmp_path, adapter_name="first", progress=False)
    ck.load_adapter(model, tmp_path, adapter_name="second", progress=False)  # the active one: its factors are replaced


# ---- wrappers, activations


def test_a_model_in_a_wrapper_has_several_adapters_too():
    model = AveragedModel(alone("default"))
    ck.add_adapter(model, "b", B, progress=False)
    ck.set_adapter(model, "b")
    assert ck.active_adapters(model) == {"b": 1.0}
    assert all("module" not in name for name, _ in named_adapter_parameters(model))


@pytest.mark.long
def test_compiled_code_follows_the_active_adapter():
    model = both()
    encode: Any = torch.compile(model.encode_image, backend="aot_eager")
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for active in ("default", "b", {"default": 0.5, "b": 0.5}, "default"):
            ck.set_adapter(model, active)
            assert_close(encode(images), model.encode_image(images), EXACT)


def test_a_graphed_step_of_the_adapter_before_is_refused():
    model = both()
    optimizer = torch.optim.SGD(ck.adapter_parameters(model), lr=0.1)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    step = ck.GraphedTrainStep(model, lambda m, x: m.encode_image(x).square().mean(), optimizer, (images,))
    step(images)
    ck.set_adapter(model, "b")
    with pytest.raises(RuntimeError, match="after set_adapter make a new optimizer"):
        step(images)


def test_adapters_of_activations_have_their_own_bases():
    settings = config(subspace_source="activations", target_modules=("q", "fc2"), subspace_ratio=0.5)
    calibrate = run(batches())
    torch.manual_seed(0)
    plain = calibrated_clip().double()
    model = ck.apply_complora(copy.deepcopy(plain), config(target_modules=("v", "fc1")), progress=False)
    ck.add_adapter(model, "b", settings, calibrate=calibrate, progress=False)
    alone = ck.apply_complora(copy.deepcopy(plain), settings, calibrate=calibrate, progress=False)
    ck.set_adapter(model, "b")
    for path, layer in adapted_layers(alone).items():
        for name in layer.weights:
            basis, own = layer.basis(name, "output"), adapted_layers(model)[path].basis(name, "output")
            assert basis is not None
            assert own is not None
            assert_close(own.matrix @ own.matrix.mT, basis.matrix @ basis.matrix.mT, EXACT)
    ck.set_adapter(model, "default")
    with pytest.raises(RuntimeError, match="calibrated on"):
        model.load_state_dict({name: value + 1 for name, value in plain.state_dict().items()})


# ---- refusals


@pytest.mark.parametrize("name", ["", " ", "a.b", "a/b", "a\\b", "__base__", "default", "b", None], ids=repr)
def test_names_that_are_taken_or_no_names_are_refused(name: Any):
    model = both()
    with Unchanged(model), pytest.raises(ValueError, match=r"adapter_name="):
        ck.add_adapter(model, name, B, progress=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: ck.set_adapter(model, "c"), "adapter_name='c', expected one of default, b"),
        (lambda model: ck.set_adapter(model, {"b": 1.0, "c": 1.0}), "expected one of default, b"),
        (lambda model: ck.set_adapter(model, {}), "expected one of default, b"),
        (lambda model: ck.set_adapter(model, {"b": float("nan")}), "a finite number as the weight of 'b'"),
        (lambda model: ck.set_adapter(model, cast("Any", {"b": "1"})), "a finite number as the weight of 'b'"),
        (lambda model: ck.delete_adapter(model, "c"), "adapter_name='c', expected one of default, b"),
        (lambda model: ck.delete_adapter(model, "default"), "is active, expected another one: call set_adapter first"),
        (lambda model: ck.save_adapter(model, "x", adapter_names=["c"]), "adapter_name='c', expected one of"),
        (lambda model: ck.save_adapter(model, "x", adapter_names="b"), "expected a list of names"),
        (lambda model: ck.add_adapter(model, "c", config(modules_to_save=("visual",))), "trained in place"),
        (lambda model: ck.add_adapter(model, "c", config(r=100, target_modules="nothing")), "nothing"),
        (lambda model: ck.apply_complora(model, B), "add_adapter adds another"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(tmp_path, monkeypatch, call, message):
    monkeypatch.chdir(tmp_path)
    model = both()
    with Unchanged(model), pytest.raises(ValueError, match=message):
        call(model)
    assert not contents(tmp_path)


@pytest.mark.parametrize(
    "call",
    [
        ck.adapter_parameters,
        ck.check_gradients,
        raw_adapter_state,
        lambda model: ck.save_adapter(model, "x"),
    ],
)
def test_a_sum_is_neither_trained_nor_saved(tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    model = both()
    ck.set_adapter(model, {"default": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match=r"the sum of \{'default': 0.5, 'b': 0.5\}.*set_adapter\(model, 'default'\)"):
        call(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_with_whole_modules_has_one_adapter(tmp_path):
    settings = config(target_modules="0", subspace_k=2, modules_to_save=("2",))
    ck.save_adapter(ck.apply_complora(linears(), settings, progress=False), tmp_path)
    model = ck.apply_complora(linears(), settings, progress=False)
    plain = config(target_modules="0", subspace_k=2)
    with Unchanged(model), pytest.raises(ValueError, match=r"modules_to_save.*trained in place"):
        ck.add_adapter(model, "b", plain, progress=False)
    model = ck.apply_complora(linears(), plain, progress=False)
    nn.init.zeros_(model[2].weight)
    with Unchanged(model), pytest.raises(ValueError, match=r"modules_to_save.*trained in place"):
        ck.load_adapter(model, tmp_path, adapter_name="b", progress=False)
    saved_by_peft(tmp_path / "peft", linears(), r=2, target_modules=["0"], modules_to_save=["2"])
    with Unchanged(model), pytest.raises(ValueError, match=r"modules_to_save.*trained in place"):
        ck.import_peft(model, tmp_path / "peft", adapter_name="b", progress=False)


def test_a_sharded_model_keeps_its_adapter():
    model = both()
    model.visual.reshard = model.visual.unshard = lambda: None  # what modules have that `fully_shard` was given
    for call in (lambda: ck.set_adapter(model, "b"), lambda: ck.add_adapter(model, "c", B)):
        with pytest.raises(ValueError, match="model is sharded, expected a whole one"):
            call()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("make", [lambda: linears().insert(1, torch.jit.script(nn.Tanh())), lambda: trace(linears())])
def test_parts_that_no_adapter_can_be_in_stay(make):
    model: Any = ck.apply_complora(make(), config(target_modules=("0",), subspace_k=2), progress=False)
    others = [module for module in model.modules() if not isinstance(module, nn.Linear)]
    ck.add_adapter(model, "b", config(target_modules=r"\d", subspace_k=2), progress=False)
    assert all(module in list(model.modules()) for module in others)
    x = torch.randn(3, 6)
    before = model(x)
    ck.set_adapter(model, "b")
    for factor in ck.adapter_parameters(model):
        nn.init.ones_(factor)
    assert not torch.equal(model(x), before)
    ck.set_adapter(model, "default")
    assert torch.equal(model(x), before)


def test_a_wrapper_that_has_listed_the_parameters_keeps_its_adapter(tmp_path):
    with process_group(tmp_path):
        model: Any = DistributedDataParallel(both())
        for call in (lambda model: ck.set_adapter(model, "b"), lambda model: ck.add_adapter(model, "c", B)):
            with pytest.raises(ValueError, match=r"has listed the parameters.*first and wrapped then"):
                call(model)
        del model


# ---- what a state dict, a file or a call may not do in silence


def two_of_linears() -> Any:
    model = ck.apply_complora(linears(), ck.CompLoRAConfig(r=2, **LINEARS), progress=False)
    ck.add_adapter(model, "b", ck.CompLoRAConfig(r=2, **LINEARS), progress=False)
    for factor in [factor for name, factor in model.named_parameters() if "lora_B" in name]:
        nn.init.normal_(factor, std=0.3)
    return model


def test_a_state_dict_from_before_the_second_adapter_is_refused():
    """It does not say of which adapter its factors are."""
    model = ck.apply_complora(linears(), ck.CompLoRAConfig(r=2, **LINEARS), progress=False)
    before = copy.deepcopy(model.state_dict())
    ck.add_adapter(model, "b", ck.CompLoRAConfig(r=2, **LINEARS), progress=False)
    ck.set_adapter(model, "b")
    with Unchanged(model), pytest.raises(RuntimeError, match="the adapters default wait, in the state dict none"):
        model.load_state_dict(before)
    model.load_state_dict(linears().state_dict(), strict=False)  # that of a plain model


def test_a_sum_loads_its_own_state_dict():
    model = two_of_linears()
    ck.set_adapter(model, {"default": 0.5, "b": 0.5})
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_an_adapter_of_a_part_is_refused_in_the_whole(tmp_path):
    def whole() -> Any:
        return nn.ModuleDict({"trunk": linears(), "head": nn.Linear(4, 3)})

    one = whole()
    ck.apply_complora(one["trunk"], ck.CompLoRAConfig(r=2, **LINEARS), progress=False)
    ck.save_adapter(one["trunk"], tmp_path)
    model = ck.apply_complora(whole(), ck.CompLoRAConfig(r=2, sides="none", target_modules="head"), progress=False)
    with Unchanged(model), pytest.raises(ValueError, match="expected an adapter of the whole model"):
        ck.load_adapter(model, tmp_path, adapter_name="b", progress=False)


@pytest.mark.parametrize("wrong", [["default", "b"], None, 3])
def test_adapters_to_set_are_a_name_or_weights(wrong):
    with pytest.raises(ValueError, match="expected a name, or weights by names"):
        ck.set_adapter(two_of_linears(), wrong)


@pytest.mark.parametrize("wrong", ["", "a.b", "__base__"])
def test_a_wrong_name_is_refused_before_a_file_is_read(wrong, tmp_path):
    for call in (ck.load_adapter, ck.import_peft):
        with pytest.raises(ValueError, match=r"^adapter_name="):
            call(linears(), tmp_path, adapter_name=wrong, progress=False)


def test_a_merge_within_a_mixed_batch_is_refused():
    model = two_of_linears().eval()
    with torch.no_grad(), ck.mixed_adapters(model, ["b", "default"]):
        ck.merge_adapter(model)
        with pytest.raises(RuntimeError, match="was merged within mixed_adapters"):
            model(torch.randn(2, 6))
