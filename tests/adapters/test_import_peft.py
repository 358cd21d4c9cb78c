"""What PEFT saved computes the same here, what `export_peft` wrote comes back, and everything else is refused."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from failures import Unchanged, refusal
from peft_adapters import saved_by_peft
from small_clip import adapted, assert_close, config, features, small_clip, small_clip_4
from tiny_models import expected_delta
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from complora_kernels.adapters.peft_patterns import check_patterns, value_for

# PEFT adds ΔW to the weight and multiplies once, here the low-rank term is added: two orders of float32 sums.
REORDERED = 5e-6

X = torch.linspace(-1, 1, 60).reshape(5, 12)


def plain() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 7))


def imported(directory: Path, model: nn.Module | None = None, **options: Any) -> Any:
    return ck.import_peft(small_clip() if model is None else model, directory, progress=False, **options)


# ---- the same function

ADAPTERS: dict[str, dict[str, Any]] = {
    "linear layers": {"target_modules": ["c_fc", "c_proj"]},
    "attention": {"target_modules": ["attn"]},
    "attention and a linear layer": {"target_modules": ["attn", "c_fc"]},
    "a parameter of attention": {"target_modules": [], "target_parameters": ["attn.in_proj_weight"]},
    "a parameter and linear layers": {"target_modules": ["c_fc"], "target_parameters": ["attn.in_proj_weight"]},
    "a weight": {"target_modules": [], "target_parameters": ["c_proj.weight"]},
    "one tower": {"target_modules": r"visual\..*\.attn"},
    "one layer": {"target_modules": ["attn", "c_proj"], "layers_to_transform": [1], "layers_pattern": "resblocks"},
    "some linear layers": {"target_modules": r"(visual\.transformer\.resblocks\.0|.*resblocks\.1)\.mlp\.c_fc"},
    "alpha by name": {"target_modules": ["c_fc"], "alpha_pattern": {r"mlp\.c_fc": 9}},
    "rank by name": {"target_modules": ["attn", "c_fc"], "rank_pattern": {"attn": 3, r".*c_fc": 3}},
    "ranks and alphas of some": {
        "target_modules": ["attn", "c_fc", "c_proj"],
        "rank_pattern": {"attn": 3, r"resblocks\.0\.mlp\.c_\w+": 5},
        "alpha_pattern": {"c_proj": 9, "attn": 2},
    },
    "ranks of one tower": {"target_modules": ["attn", "c_fc"], "rank_pattern": {r"^transformer\..*": 2}},
    "layers of each tower": {"target_modules": r"visual\..*\.1\.(attn|mlp\.c_fc)|transformer\..*\.0\.(attn|mlp\.c_fc)"},
}  # fmt: skip


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_what_peft_saved_computes_the_same(tmp_path, options, use_rslora):
    theirs = saved_by_peft(tmp_path, small_clip(), r=4, lora_alpha=6, use_rslora=use_rslora, **options)
    expected = features(theirs.base_model.model)
    assert (expected - features(small_clip())).norm() > 0.05 * expected.norm()
    plain_model = small_clip()
    model = imported(tmp_path, plain_model)
    assert model is plain_model
    assert_close(features(model), expected, REORDERED)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}


def test_an_imported_adapter_trains_as_in_peft(tmp_path):
    theirs = saved_by_peft(tmp_path, plain(), r=3, lora_alpha=6, target_modules=["0", "2"]).double()
    model = imported(tmp_path, plain()).double()
    for parameter in theirs.parameters():
        parameter.requires_grad_(True)
    x = X.double()
    theirs(x).square().sum().backward()
    model(x).square().sum().backward()
    for index in ("0", "2"):
        layer = theirs.base_model.model.get_submodule(index)
        own = model.get_submodule(index)
        torch.testing.assert_close(own.lora_A.grad, layer.lora_A["default"].weight.grad)
        torch.testing.assert_close(own.lora_B.grad, layer.lora_B["default"].weight.grad)


def test_an_import_is_saved_loaded_and_exported(tmp_path):
    saved_by_peft(
        tmp_path / "peft", small_clip(), r=4, lora_alpha=6, lora_dropout=0.25, target_modules=["attn", "c_fc"]
    )
    model = imported(tmp_path / "peft")
    layer = next(iter(adapted_layers(model).values()))
    assert (layer.config.r, layer.config.lora_alpha, layer.config.lora_dropout) == (4, 6, 0.25)
    ck.save_adapter(model, tmp_path / "saved")
    loaded = ck.load_adapter(small_clip(), tmp_path / "saved", progress=False)
    assert torch.equal(features(loaded), features(model))


def test_peft_trains_the_output_projection_with_twice_its_update(tmp_path):
    """The reason why B of `o` is doubled. When PEFT counts it once, `TIMES_OUT_PROJ` is to depend on its version."""
    theirs = saved_by_peft(tmp_path, small_clip(), r=4, lora_alpha=4, target_modules=["attn"])
    attention = imported(tmp_path).visual.transformer.resblocks[0].attn
    B = theirs.base_model.model.visual.transformer.resblocks[0].attn.base_layer.out_proj.lora_B["default"].weight
    assert torch.equal(attention.lora_B.o, 2 * B)


def test_the_attention_of_open_clip_4(tmp_path):
    options: dict[str, Any] = {"target_modules": ["out_proj", "c_fc"], "target_parameters": ["attn.in_proj_weight"]}
    saved_by_peft(tmp_path / "o", small_clip_4(), r=4, lora_alpha=6, target_modules=["out_proj", "c_fc"])
    theirs = saved_by_peft(tmp_path / "o", small_clip_4(), r=4, lora_alpha=6, target_modules=options["target_modules"])
    expected = features(theirs.base_model.model)
    assert_close(features(imported(tmp_path / "o", small_clip_4())), expected, REORDERED)
    options["target_modules"] = ["c_fc"]
    theirs = saved_by_peft(tmp_path / "qkv", small_clip_4(), r=4, lora_alpha=6, **options)
    assert_close(features(imported(tmp_path / "qkv", small_clip_4())), features(theirs.base_model.model), REORDERED)


def test_modules_to_save(tmp_path):
    options: dict[str, Any] = {"target_modules": ["0"], "modules_to_save": ["2"]}
    theirs = saved_by_peft(tmp_path, plain(), r=3, lora_alpha=6, **options)
    model = imported(tmp_path, plain())
    torch.testing.assert_close(model(X), theirs(X))
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        "0.lora_A",
        "0.lora_B",
        "2.weight",
        "2.bias",
    }


# ---- what export_peft wrote

EXPORTS: dict[str, dict[str, Any]] = {
    "q, k, v": {},
    "q, v": {"target_modules": ("q", "v")},
    "k": {"target_modules": ("k",)},
    "fc1, fc2": {"target_modules": ("fc1", "fc2")},
    "v, fc1": {"target_modules": ("v", "fc1")},
    "text": {"towers": ("text",), "target_modules": ("q", "k", "v", "fc2")},
    "layer 1": {"layers": (1,), "target_modules": ("q", "fc1")},
    "plain LoRA": {"sides": "none", "lora_dropout": 0.25},
    "ranks of some": {
        "target_modules": ("q", "fc1", "fc2"),
        "rank_pattern": {"c_fc": 3},
        "alpha_pattern": {"visual.transformer.resblocks.0.mlp.c_proj": 7.0},
    },
    "an odd alpha": {"lora_alpha": 0.1, "target_modules": ("q", "k", "v", "fc1")},
}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("options", EXPORTS.values(), ids=EXPORTS)
def test_an_exported_adapter_comes_back(tmp_path, options, use_rslora):
    model = adapted(small_clip(), use_rslora=use_rslora, **options)
    ck.export_peft(model, tmp_path / "peft")
    back = imported(tmp_path / "peft")
    ck.save_adapter(model, tmp_path / "before")
    ck.save_adapter(back, tmp_path / "after")
    before, after = (safetensors.torch.load_file(tmp_path / name / WEIGHTS_FILE) for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    of_model, of_back = (next(iter(adapted_layers(each).values())).config for each in (model, back))
    for field in ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "towers", "layers"):
        assert getattr(of_back, field) == getattr(of_model, field)
    ck.export_peft(back, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == (tmp_path / "peft" / WEIGHTS_FILE).read_bytes()
    assert (tmp_path / "again" / CONFIG_FILE).read_bytes() == (tmp_path / "peft" / CONFIG_FILE).read_bytes()


def test_an_exported_adapter_without_updates_comes_back(tmp_path):
    model = ck.apply_complora(small_clip(), config(target_modules=("q", "k", "v", "fc1")), progress=False)
    ck.export_peft(model, tmp_path)
    back = imported(tmp_path)
    assert_close(features(back), features(model), 1e-7)
    A, folded = back.visual.transformer.resblocks[0].attn.lora_A.k, model.visual.transformer.resblocks[0].attn
    assert torch.equal(A, folded.fold_factors(("k",))[0][0])


# ---- projected


@pytest.mark.parametrize("sides", ["output", "input", "both"])
def test_a_projected_import(tmp_path, sides, caplog):
    theirs = saved_by_peft(tmp_path, plain(), r=3, lora_alpha=6, target_modules=["0", "2"])
    settings = ck.CompLoRAConfig(sides=sides, subspace_k=4, r=7, lora_dropout=0.5, exclude_modules=("2",))
    model = imported(tmp_path, plain(), projected=settings)
    rows = {row.path: row for row in ck.subspace_report(model)}
    for index in ("0", "2"):
        layer = theirs.base_model.model.get_submodule(index)
        A, B = (factors["default"].weight.detach() for factors in (layer.lora_A, layer.lora_B))
        own = model.get_submodule(index)
        assert torch.equal(own.lora_A, A)
        assert torch.equal(own.lora_B, B)
        kept = expected_delta(plain().get_parameter(f"{index}.weight"), A, B, own.config, 4)  # float64
        assert_close(own.get_delta_weight().double(), kept, 1e-5)  # bases are float32
        whole = 2 * B.double() @ A.double()
        assert rows[index].removed == pytest.approx(float((whole - kept).norm() ** 2 / whole.norm() ** 2), rel=1e-4)
        assert rows[index].share < 1e-9
    assert min(row.removed for row in rows.values()) > 0.01
    assert "the projections remove " in caplog.text


def test_a_projected_import_of_attention(tmp_path):
    saved_by_peft(tmp_path, small_clip(), r=4, lora_alpha=6, target_modules=["attn"])
    model = imported(tmp_path, projected=ck.CompLoRAConfig(subspace_ratio=0.5))
    assert len(ck.subspace_report(model)) == 16
    assert all(0.1 < row.removed < 0.9 for row in ck.subspace_report(model))
    with pytest.raises(ValueError, match="subspace_source='activations', expected a source that needs no calibration"):
        imported(tmp_path, projected=ck.CompLoRAConfig(subspace_k=3, subspace_source="activations"))


# ---- what is refused


def changed(source: Path, target: Path, fields: dict[str, Any], tensors: Any = None) -> Path:
    """The adapter in `source` with other fields, and with the tensors that a function of them gives."""
    target.mkdir()
    config = json.loads((source / CONFIG_FILE).read_text()) | fields
    (target / CONFIG_FILE).write_text(json.dumps(config))
    own = safetensors.torch.load_file(source / WEIGHTS_FILE)
    own = own if tensors is None else {name: tensor.contiguous() for name, tensor in tensors(own).items()}
    safetensors.torch.save_file(own, target / WEIGHTS_FILE)
    return target


FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "LOHA"}, "peft_type='LOHA', expected 'LORA'"),
    "no method": ({"peft_type": None}, "peft_type=None, expected 'LORA'"),
    "DoRA": ({"use_dora": True}, "use_dora=True cannot be imported, expected LoRA's B A alone"),
    "biases": ({"bias": "all"}, "bias='all' cannot be imported"),
    "biases of LoRA": ({"lora_bias": True}, "lora_bias=True cannot be imported"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] cannot be imported"),
    "quantised": ({"use_qalora": True}, "use_qalora=True cannot be imported"),
    "transposed weights": ({"fan_in_fan_out": True}, "fan_in_fan_out=True cannot be imported"),
    "tokens": ({"trainable_token_indices": [3]}, r"trainable_token_indices=\[3\] cannot be imported"),
    "KaSA": ({"kasa_config": {"beta": 1}}, r"kasa_config=\{'beta': 1\} cannot be imported"),
    "a variant of later": ({"use_new": True}, "use_new=True cannot be imported"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa', expected true, false or one of gaussian"),
    "ours": ({"complora": {}}, "it was written by save_adapter, expected a folder of PEFT: call load_adapter"),
    "rank": ({"r": 5}, r"0\.lora_A\.weight has shape \(3, 12\), expected \(5, 12\)"),
    "no rank": ({"r": 0}, "r=0, rank_pattern=.*, expected ranks of at least 1"),
    "type of the rank": ({"r": "3"}, "it.r='3', expected an integer"),
    "type of a flag": ({"use_rslora": 1}, "it.use_rslora=1, expected true or false"),
    "alpha": ({"lora_alpha": 0}, "lora_alpha=0.0, expected a positive number"),
    "dropout": ({"lora_dropout": 1.0}, r"lora_dropout=1.0, expected a probability in \[0, 1\)"),
    "a pattern": ({"alpha_pattern": {"(a+)+$": 3}}, r"has the key '\(a\+\)\+\$', expected names of modules"),
    "ranks of two layers": ({"rank_pattern": {"2": 4}}, r"2\.lora_A\.weight has shape \(3, 16\), expected \(4, 16\)"),
    "saved modules": ({"modules_to_save": ["2"]}, r"its tensors differ .*base_model\.model\.2\.bias"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), FIELDS.values(), ids=FIELDS)
def test_a_configuration_that_cannot_be_imported(tmp_path, fields, message):
    saved_by_peft(tmp_path / "saved", plain(), r=3, lora_alpha=6, target_modules=["0", "2"])
    folder = changed(tmp_path / "saved", tmp_path / "changed", fields)
    model = plain()
    with Unchanged(model), pytest.raises(ValueError, match=message) as error:
        imported(folder, model)
    assert str(folder) in str(error.value)


def key(name: str) -> str:
    return f"base_model.model.{name}.weight"


TENSORS: dict[str, tuple[Any, str]] = {
    "missing": (lambda t: {key("0.lora_A"): t[key("0.lora_A")]}, r"its tensors differ .*0\.lora_B"),
    "further": (lambda t: t | {"base_model.model.0.lora_magnitude_vector": torch.ones(16)}, "lora_magnitude_vector"),
    "an embedding": (lambda t: t | {"base_model.model.2.lora_embedding_A": torch.ones(3, 7)}, "lora_embedding_A"),
    "no such module": (
        lambda t: t | {key("5.lora_A"): torch.ones(3, 7), key("5.lora_B"): torch.ones(7, 3)},
        "the model has no nn.Linear and no packed attention for 5, expected one",
    ),
    "no linear layer": (
        lambda t: t | {key("1.lora_A"): torch.ones(3, 7), key("1.lora_B"): torch.ones(7, 3)},
        "the model has no nn.Linear and no packed attention for 1, expected one",
    ),
    "integers": (lambda t: {name: tensor.long() for name, tensor in t.items()}, "has dtype I64, expected one of F16"),
    "NaN": (lambda t: {name: tensor * math.nan for name, tensor in t.items()}, "the update of 0 holds NaN"),
    "none": (lambda _: {}, "there is no update in the files"),
    "a convolution": (
        lambda t: t | {key("0.lora_A"): torch.ones(3, 12, 1, 1)},
        r"0\.lora_A\.weight has shape \(3, 12, 1, 1\), expected \(3, 12\)",
    ),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_cannot_be_imported(tmp_path, change, message):
    saved_by_peft(tmp_path / "saved", plain(), r=3, lora_alpha=6, target_modules=["0", "2"])
    folder = changed(tmp_path / "saved", tmp_path / "changed", {}, change)
    model = plain()
    with Unchanged(model), pytest.raises(ValueError, match=message) as error:
        imported(folder, model)
    assert str(folder) in str(error.value)


def test_two_modules_for_one_weight(tmp_path):
    saved_by_peft(tmp_path / "saved", small_clip(), r=4, lora_alpha=6, target_modules=["attn"])
    ends = ("lora_A.weight", "lora_B.weight")

    def twice(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        path = "base_model.model.visual.transformer.resblocks.0.attn"
        return tensors | {
            f"{path}.out_proj.{end}": tensors[f"{path}.base_layer.out_proj.{end}"].clone() for end in ends
        }

    folder = changed(tmp_path / "saved", tmp_path / "changed", {}, twice)
    with pytest.raises(ValueError, match=r"attn\.base_layer\.out_proj and .*attn\.out_proj both update "):
        imported(folder)


def test_models_that_an_adapter_does_not_fit(tmp_path):
    saved_by_peft(tmp_path, small_clip(), r=4, lora_alpha=6, target_modules=["attn"])
    model = adapted(small_clip())
    with Unchanged(model), pytest.raises(ValueError, match="model has an adapter already, expected a plain model"):
        imported(tmp_path, model)
    model = small_clip(width=48)
    with Unchanged(model), pytest.raises(ValueError, match=r"has shape \(4, 32\), expected \(4, 48\)"):
        imported(tmp_path, model)
    model = small_clip(layers=1)
    with Unchanged(model), pytest.raises(ValueError, match=r"no packed attention for transformer\.resblocks\.1"):
        imported(tmp_path, model)


def test_a_layer_that_is_more_than_linear_is_named(tmp_path):
    saved_by_peft(tmp_path, plain(), r=3, lora_alpha=6, target_modules=["0", "2"])

    class Own(nn.Linear):
        pass

    model = plain()
    model[2] = Own(16, 7)
    with Unchanged(model), pytest.raises(ValueError, match=r"2 is a \S+Own, expected a plain nn\.Linear"):
        imported(tmp_path, model)


def test_missing_files_and_files_of_other_kinds(tmp_path):
    saved_by_peft(tmp_path, plain(), r=3, lora_alpha=6, target_modules=["0", "2"])
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        content = (tmp_path / name).read_bytes()
        for damaged in (b"", b"[]", b"\xff" * 50, content[:100], content[: len(content) // 2], b"[" * 100_000):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(ValueError, match=name):
                imported(tmp_path, plain())
        (tmp_path / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{name} is missing, expected the two files of PEFT"):
            imported(tmp_path, plain())
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is no regular file"):
            imported(tmp_path, plain())
        (tmp_path / name).unlink()
        (tmp_path / name).write_bytes(content)


def test_every_value_of_the_configuration_may_be_a_lie(tmp_path):
    theirs = saved_by_peft(tmp_path / "saved", plain(), r=3, lora_alpha=6, target_modules=["0", "2"])
    expected = theirs(X)
    fields = json.loads((tmp_path / "saved" / CONFIG_FILE).read_text())
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / WEIGHTS_FILE).write_bytes((tmp_path / "saved" / WEIGHTS_FILE).read_bytes())
    for name in fields:
        for value in (None, [], {}, "x", -1, True, [[{"a": [None]}]], 10**30, ...):
            lie = {other: content for other, content in fields.items() if other != name}
            lie |= {} if value is ... else {name: value}
            (tmp_path / "changed" / CONFIG_FILE).write_text(json.dumps(lie))
            if (name, value) in (("use_rslora", True), ("lora_alpha", 10**30)):
                continue  # another scaling
            model = plain()
            message = refusal(model, lambda model=model: imported(tmp_path / "changed", model))
            if message is None:
                torch.testing.assert_close(model(X), expected, msg=f"{name}={value}: another function")
            else:
                assert str(tmp_path / "changed") in message, (name, value)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made within."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def test_no_memory_is_taken_before_sizes_are_compared(tmp_path):
    saved_by_peft(tmp_path / "saved", plain(), r=3, lora_alpha=6, target_modules=["0", "2"])
    large = {key(f"{i}.lora_{factor}"): torch.zeros(3, 100_000) for i in (0, 2) for factor in "AB"}
    folder = changed(tmp_path / "saved", tmp_path / "changed", {}, lambda _: large)
    with Largest() as largest, pytest.raises(ValueError, match=r"lora_A\.weight has shape \(3, 100000\), expected"):
        imported(folder, plain())
    assert largest.nbytes < 10_000


# ---- patterns


NAMES = ("visual.blocks.10.mlp.c_fc", "c_fc", "mlp.c_proj", "xc_fc")
PATTERNS = [
    "c_fc", "mlp.c_fc", r"mlp\.c_fc", "^mlp.c_fc", "^visual.blocks.10.mlp.c_fc", r".*\.10\..*",
    r"blocks\.\d+\.mlp\.c_fc$", "c_proj|c_fc", "c_f", r"blocks.\d.mlp.c_fc", "c.fc", "x*c_fc", ".*",
    "[0-9]+.mlp.c_fc", r"\w+", r"mlp\.\w?_fc", "isual.blocks.10.mlp.c_fc", ".+c", "c_fc.*", ".", "c_fc.",
    "visual.blocks.1?0?.mlp.c_fc|nothing", ".*_proj", "visual.*|xc_fc",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(pattern):
    check_patterns("rank_pattern", {pattern: 1})
    for name in NAMES:
        assert value_for({pattern: 1}, name, 0) == bool(re.match(rf"(.*\.)?({pattern})$", name)), name


def test_the_first_of_several_patterns_counts():
    assert value_for({"c_proj": 1, "c_fc": 2, "mlp.c_fc": 3}, "mlp.c_fc", 0) == 2


@pytest.mark.parametrize("pattern", ["(.*)*x", "a{1000}", "[a-z]+", "(?=x)", r"\1", "x" * 250 + ".*"])
def test_other_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match="expected names of modules"):
        check_patterns("rank_pattern", {pattern: 1})


def test_a_hostile_pattern_takes_no_time():
    patterns = {".*" * 60 + "x" * n: 1 for n in range(1, 33)}
    check_patterns("alpha_pattern", patterns)
    start = time.process_time()
    assert value_for(patterns, "a" * 100, 0) == 0
    assert time.process_time() - start < 10  # in Python's re: longer than anybody waits
    with pytest.raises(ValueError, match="33 alternatives with wildcards, expected at most 32"):
        check_patterns("alpha_pattern", patterns | {".*": 1})


def test_the_patterns_of_an_export_are_names():
    model = adapted(copy.deepcopy(small_clip()), target_modules=("q", "fc1"))
    names = "|".join(path.replace(".", r"\.") for path in adapted_layers(model))
    check_patterns("rank_pattern", {names: 4})
    assert all(value_for({names: 4}, path, 0) == 4 for path in adapted_layers(model))
    assert value_for({names: 4}, "visual.transformer.resblocks.0.mlp.c_proj", 0) == 0
