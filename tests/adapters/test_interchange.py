"""Exchange with other programs: stock PEFT reads an exported adapter, and CLIP-LoRA's files are read."""

from __future__ import annotations

import json
import math
import os
import pickle
from typing import Any

import peft
import pytest
import torch
from clip_lora import ATTRIBUTES, TOWERS, clip_lora_file
from failures import Unchanged, contents, failing
from small_clip import adapted, assert_close, config, features, saved, small_clip, small_clip_4, updates
from torch import nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.adapters.configuration import peft_fields
from complora_kernels.adapters.factors import adapted_weights, factor_tensors
from complora_kernels.adapters.files import CONFIG_FILE, WEIGHTS_FILE, write_files
from complora_kernels.modules.layer import CompLoRALayer, WeightRows

# PEFT adds ΔW to the weight and multiplies once, here the low-rank term is added: two orders of float32 sums.
REORDERED = 5e-6

EXPORTS: dict[str, dict[str, Any]] = {
    "q, k, v": {},
    "q, v": {"target_modules": ("q", "v")},
    "k": {"target_modules": ("k",)},
    "fc1, fc2": {"target_modules": ("fc1", "fc2")},
    "v, fc1": {"target_modules": ("v", "fc1")},
    "text": {"towers": ("text",), "target_modules": ("q", "k", "v", "fc2")},
    "layer 1": {"layers": (1,), "target_modules": ("q", "fc1")},
    "regex": {"target_modules": r".*mlp\.c_(fc|proj)"},
}


def in_stock_peft(directory, model=None):
    return peft.PeftModel.from_pretrained(small_clip() if model is None else model, directory).eval()


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("options", EXPORTS.values(), ids=EXPORTS)
def test_stock_peft_computes_the_exported_adapter(tmp_path, options, use_rslora):
    model = adapted(small_clip(), use_rslora=use_rslora, **options)
    assert (features(model) - features(small_clip())).norm() > 0.05 * features(model).norm()
    ck.export_peft(model, tmp_path)
    loaded = in_stock_peft(tmp_path)  # a warning about a key would be an error here
    assert_close(features(loaded.base_model.model), features(model), REORDERED)


def test_raw_factors_would_be_another_function_in_peft(tmp_path):
    options: dict[str, Any] = {"target_modules": ("fc1", "fc2")}
    model = adapted(small_clip(), **options)
    weights = adapted_weights(adapted_layers(model))
    raw = factor_tensors({path: layer.factors(name) for path, (layer, name) in weights.items()})
    write_files(tmp_path, peft_fields(config(**options), weights), raw)
    wrong = features(in_stock_peft(tmp_path).base_model.model)
    assert (wrong - features(model)).norm() > 0.05 * features(model).norm()


def test_the_form_of_an_exported_attention(tmp_path):
    model = adapted(small_clip(), target_modules=("q", "v", "fc1"), use_rslora=True)
    ck.export_peft(model, tmp_path)
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert "complora" not in fields
    assert (fields["r"], fields["lora_alpha"]) == (2, 3.0)
    assert list(fields["rank_pattern"].values()) == [4]
    assert list(fields["alpha_pattern"].values()) == [pytest.approx(3 * math.sqrt(2))]


def test_a_saved_linear_adapter_is_read_by_stock_peft(tmp_path):
    model = saved(tmp_path, target_modules=("fc1", "fc2"), use_rslora=True)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['complora'\]"):
        loaded = in_stock_peft(tmp_path)
    assert_close(features(loaded.base_model.model), features(model), REORDERED)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_a_saved_attention_adapter_does_not_load_in_stock_peft_in_silence(tmp_path):
    saved(tmp_path / "attention")
    with pytest.raises(ValueError, match="not found in the base model"):
        in_stock_peft(tmp_path / "attention")
    saved(tmp_path / "mixed", target_modules=("q", "fc1"))
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match any targeted module"):
        in_stock_peft(tmp_path / "mixed")


def test_export_of_a_merged_model(tmp_path):
    model = adapted(small_clip())
    ck.export_peft(model, tmp_path / "unmerged")
    ck.merge_adapter(model)
    ck.export_peft(model, tmp_path / "merged")
    assert contents(tmp_path / "merged") == contents(tmp_path / "unmerged")


def test_export_refuses_what_peft_doubles(tmp_path):
    model = adapted(small_clip(), target_modules=("q", "o"))
    with pytest.raises(ValueError, match=r"attn cannot be exported: o is adapted, .*huggingface/peft/pull/3774"):
        ck.export_peft(model, tmp_path / "adapter")
    assert contents(tmp_path) == {}


def test_export_refuses_the_attention_of_open_clip_4(tmp_path):
    model = adapted(small_clip_4(), target_modules=("q", "v", "fc1"))
    with pytest.raises(ValueError, match=r"attn cannot be exported: q, v are adapted, expected an nn.Multihead"):
        ck.export_peft(model, tmp_path / "adapter")
    assert contents(tmp_path) == {}


def test_export_of_o_in_the_attention_of_open_clip_4(tmp_path):
    model = adapted(small_clip_4(), target_modules=("o", "fc2"))
    ck.export_peft(model, tmp_path)
    assert_close(features(in_stock_peft(tmp_path, small_clip_4()).base_model.model), features(model), REORDERED)


class OwnLayer(CompLoRALayer):
    """An adapted layer of a user's own, with a weight [5, 4] that is no `nn.Linear`."""

    def __init__(self, config: ck.CompLoRAConfig) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(5, 4), requires_grad=False)
        self._init_adapter(config, {"": WeightRows("kernel", 0, 5)}, "own")
        self.lora_A, self.lora_B = self._new_factors("")

    def factors(self, name: str = "") -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_A, self.lora_B


def test_export_refuses_a_layer_that_it_does_not_know(tmp_path):
    model = nn.ModuleDict({"own": OwnLayer(config(subspace_k=2))})
    with pytest.raises(ValueError, match="own cannot be exported: a OwnLayer has no modules "):
        ck.export_peft(model, tmp_path / "adapter")
    assert contents(tmp_path) == {}


def test_a_failed_export_leaves_the_files_as_they_were(tmp_path, monkeypatch):
    ck.export_peft(adapted(small_clip()), tmp_path)
    before = contents(tmp_path)
    failing(monkeypatch, os, "replace", {1}, OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        ck.export_peft(adapted(small_clip(), seed=2, r=3), tmp_path)
    assert contents(tmp_path) == before


def test_export_refuses_broken_updates_and_unwritable_folders(tmp_path):
    model = adapted(small_clip())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="expected a folder that can be written to"):
        ck.export_peft(model, tmp_path / "file")
    with torch.no_grad():
        model.get_parameter("visual.transformer.resblocks.1.attn.lora_A.q")[0] = float("inf")
    with pytest.raises(ValueError, match=r"visual.transformer.resblocks.1.attn.q_proj holds NaN or infinite"):
        ck.export_peft(model, tmp_path / "adapter")
    assert contents(tmp_path) == {"file": b"mine"}


def test_an_exported_adapter_is_not_read_back(tmp_path):
    ck.export_peft(adapted(small_clip()), tmp_path)
    model = small_clip()
    with Unchanged(model), pytest.raises(ValueError, match=f"{WEIGHTS_FILE} has no adapter_config in its metadata"):
        ck.load_adapter(model, tmp_path, progress=False)


# ---- CLIP-LoRA


def merged_by_hand(weights, blocks, r, alpha):
    """A plain model with `W + alpha / sqrt(r) · B A` in the given blocks, in the order of the file."""
    model = small_clip(layers=3)
    for block, layer in zip(blocks, weights.values(), strict=True):
        attention = model.get_submodule(f"{block}.attn")
        for i, name in enumerate("qkvo"):
            if ATTRIBUTES[name] in layer:
                A, B = layer[ATTRIBUTES[name]].values()
                rows = attention.out_proj.weight if name == "o" else attention.in_proj_weight[32 * i : 32 * (i + 1)]
                with torch.no_grad():
                    rows += alpha / math.sqrt(r) * B @ A
    return model


@pytest.mark.parametrize("encoder", TOWERS)
@pytest.mark.parametrize("params", ["qkv", "qv", "o"])
def test_import_clip_lora(tmp_path, encoder, params):
    weights = clip_lora_file(tmp_path / "w.pt", encoder=encoder, params=params, layers=3, r=3, alpha=2)
    blocks = [f"{tower}.resblocks.{i}" for tower in TOWERS[encoder] for i in range(3)]
    plain = small_clip(layers=3)
    model = ck.import_clip_lora(plain, tmp_path / "w.pt", progress=False)
    assert model is plain
    assert_close(features(model), features(merged_by_hand(weights, blocks, 3, 2)), REORDERED)
    assert {name.rpartition("/")[2] for name in updates(model)} == set(params)


@pytest.mark.parametrize(
    ("position", "indices"),
    {
        "bottom": [0],
        "mid": [1],
        "up": [2],
        "top3": [0, 1, 2],
        "half-bottom": [0],
        "half-up": [1, 2],
        "all": [0, 1, 2],
    }.items(),
)
def test_positions_of_clip_lora(tmp_path, position, indices):
    weights = clip_lora_file(tmp_path / "w.pt", position=position, layers=len(indices))
    blocks = [f"{tower}.resblocks.{i}" for tower in TOWERS["both"] for i in indices]
    model = ck.import_clip_lora(small_clip(layers=3), tmp_path / "w.pt", progress=False)
    assert_close(features(model), features(merged_by_hand(weights, blocks, 2, 1)), REORDERED)


def test_positions_are_those_of_the_tables_of_clip_lora():
    from complora_kernels.adapters.interchange import CLIP_LORA_POSITIONS

    twelve = {name: list(position(12)) for name, position in CLIP_LORA_POSITIONS.items()}
    assert twelve["bottom"] == [0, 1, 2, 3]
    assert twelve["mid"] == [4, 5, 6, 7]
    assert twelve["up"] == [8, 9, 10, 11]
    assert twelve["top3"] == [9, 10, 11]
    assert twelve["half-bottom"] == [0, 1, 2, 3, 4, 5]
    assert twelve["half-up"] == [6, 7, 8, 9, 10, 11]
    assert twelve["all"] == list(range(12))
    assert list(CLIP_LORA_POSITIONS["half-up"](24)) == list(range(12, 24))


def test_an_imported_adapter_is_saved_and_loaded(tmp_path):
    clip_lora_file(tmp_path / "w.pt")
    model = ck.import_clip_lora(small_clip(), tmp_path / "w.pt", progress=False)
    ck.save_adapter(model, tmp_path / "adapter")
    loaded = ck.load_adapter(small_clip(), tmp_path / "adapter", progress=False)
    assert torch.equal(features(loaded), features(model))
    layer = next(iter(adapted_layers(loaded).values()))
    assert (layer.config.sides, layer.config.use_rslora, layer.config.lora_alpha) == ("none", True, 1)


def rewritten(path, change):
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


REFUSED = {
    "missing factor": (
        lambda s: s["weights"]["layer_2"]["k_proj"].pop("w_lora_B"),
        r"missing layer_2\.k_proj\.w_lora_B",
    ),
    "missing layer": (lambda s: s["weights"].pop("layer_3"), r"missing layer_3\.k_proj\.w_lora_A"),
    "another layer": (
        lambda s: s["weights"].update(layer_4=s["weights"]["layer_0"]),
        r"missing nothing, unexpected layer_4\.k_proj",
    ),
    "another rank": (
        lambda s: s["metadata"].update(r=4),
        r"resblocks\.0\.attn\.q_proj has factors A and B of shapes \(2, 32\) and \(32, 2\), expected \(4, 32\)",
    ),
    "NaN": (
        lambda s: s["weights"]["layer_1"]["v_proj"]["w_lora_A"].fill_(float("nan")),
        r"the update of transformer\.resblocks\.1\.attn\.v_proj holds NaN",
    ),
    "no tensor": (
        lambda s: s["weights"]["layer_0"]["q_proj"].update(w_lora_A=3),
        r"layer_0\.q_proj\.w_lora_A that are no",
    ),
    "no metadata": (
        lambda s: s.pop("metadata"),
        r"expected weights of layer_0, .*lora_weights\.pt \(it has no metadata, expected one\)",
    ),
    "no rank": (lambda s: s["metadata"].pop("r"), "it.metadata has no r, expected one"),
    "flat weights": (lambda s: s.update(weights=[1]), "it.weights is a list, expected an object"),
    "encoder": (lambda s: s["metadata"].update(encoder="image"), "encoder='image', expected one of text, vision, both"),
    "position": (lambda s: s["metadata"].update(position="top"), "position='top', expected one of all, bottom"),
    "params": (lambda s: s["metadata"].update(params=["x"]), "params has x, expected some of q, k, v, o"),
    "alpha": (lambda s: s["metadata"].update(alpha="1"), "it.metadata.alpha='1', expected a finite number"),
    "no alpha": (lambda s: s["metadata"].update(alpha=0), "make no configuration: lora_alpha=0, expected a positive"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_clip_lora_file_that_does_not_fit(tmp_path, change, message):
    clip_lora_file(tmp_path / "w.pt")
    rewritten(tmp_path / "w.pt", change)
    model = small_clip()
    with Unchanged(model), pytest.raises(ValueError, match=message):
        ck.import_clip_lora(model, tmp_path / "w.pt", progress=False)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small_clip(layers=3), r"missing layer_4\.k_proj"),
        (small_clip(width=48), r"shapes \(2, 32\) and \(32, 2\), expected \(2, 48\)"),
        (adapted(small_clip()), "model has an adapter already"),
        (nn.Linear(3, 3), "the model has no text tower"),
    ],
    ids=["depth", "width", "adapted", "no CLIP"],
)
def test_a_model_that_a_clip_lora_file_does_not_fit(tmp_path, model, message):
    clip_lora_file(tmp_path / "w.pt")
    with Unchanged(model), pytest.raises(ValueError, match=message):
        ck.import_clip_lora(model, tmp_path / "w.pt", progress=False)


def test_blocks_that_differ_between_towers(tmp_path):
    """The file numbers the chosen blocks, those of the text tower first: 2 and 3 of four, then 1 of two."""
    weights = clip_lora_file(tmp_path / "w.pt", position="half-up", layers=2)
    del weights["layer_3"]
    saved = torch.load(tmp_path / "w.pt")
    torch.save({**saved, "weights": weights}, tmp_path / "w.pt")
    model = small_clip()
    for _ in range(2):
        model.transformer.resblocks.append(small_clip().transformer.resblocks[0])
    ck.import_clip_lora(model, tmp_path / "w.pt", progress=False)
    layers = adapted_layers(model)
    paths = ["transformer.resblocks.2", "transformer.resblocks.3", "visual.transformer.resblocks.1"]
    assert set(layers) == {f"{path}.attn" for path in paths}
    for i, path in enumerate(paths):
        for name, attribute in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")):
            A, B = layers[f"{path}.attn"].factors(name)
            assert torch.equal(A, weights[f"layer_{i}"][attribute]["w_lora_A"])
            assert torch.equal(B, weights[f"layer_{i}"][attribute]["w_lora_B"])


class Exploit:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_a_clip_lora_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = small_clip()
    torch.save({"weights": Exploit(), "metadata": {}}, "w.pt")
    with Unchanged(model), pytest.raises(ValueError, match=r"w\.pt cannot be read as tensors"):
        ck.import_clip_lora(model, "w.pt")
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Exploit()))
    with Unchanged(model), pytest.raises(ValueError, match=r"w\.pt cannot be read as tensors"):
        ck.import_clip_lora(model, "w.pt")
    assert not (tmp_path / "executed").exists()


def test_a_damaged_or_missing_clip_lora_file(tmp_path):
    clip_lora_file(tmp_path / "w.pt")
    content = (tmp_path / "w.pt").read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2]):
        (tmp_path / "w.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"w\.pt cannot be read as tensors"):
            ck.import_clip_lora(small_clip(), tmp_path / "w.pt")
    with pytest.raises(FileNotFoundError, match="nothing"):
        ck.import_clip_lora(small_clip(), tmp_path / "nothing.pt")
