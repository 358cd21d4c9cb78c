"""An adapter of one library's CLIP computes the same in the other's, in float64."""

from __future__ import annotations

import json
from typing import Any

import peft
import pytest
import torch
import transformers_clip as theirs
from failures import Unchanged, contents
from peft_adapters import saved_by_peft
from small_clip import adapted, assert_close, features, small_clip, small_clip_4, with_text_module
from torch import nn
from transformers_clip import transformers_clip

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.adapters.factors import adapted_weights
from complora_kernels.integrations.names import LIBRARIES, names_in, own_name

# peft 0.21 asks a model of transformers 5.24 for it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EXACT = 1e-12  # sums in float64, in other orders
OPTIONS: dict[str, dict[str, Any]] = {
    "q, k, v": {},
    "everything": {"target_modules": ("q", "k", "v", "o", "fc1", "fc2"), "use_rslora": True},
    "q, v, o of texts": {"target_modules": ("q", "v", "o"), "towers": ("text",)},
    "ranks of some": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"visual.transformer.resblocks.0.attn": 9.0}},
    "fc1 in one layer": {"target_modules": ("fc1",), "layers": (1,)},
}


def in_float64(model: Any) -> torch.Tensor:
    model.double()
    if hasattr(model, "encode_image"):
        generator = torch.Generator().manual_seed(5)
        images = torch.randn(3, 3, 16, 16, generator=generator).double()
        texts = torch.randint(1, 20, (3, 6), generator=generator)
        with torch.no_grad():
            return torch.cat([model.encode_image(images), model.encode_text(texts)])
    return theirs.features(model)


def test_the_two_plain_models_are_equal():
    assert_close(in_float64(transformers_clip()), in_float64(small_clip()), EXACT)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_adapter_goes_to_the_other_library_and_back(tmp_path, options):
    model = adapted(small_clip().double(), **options)  # the factors in the files are float64 then
    ck.export_peft(model, tmp_path / "there", library="transformers")
    stock = peft.PeftModel.from_pretrained(transformers_clip().double(), str(tmp_path / "there")).eval()
    imported = ck.import_peft(transformers_clip().double(), tmp_path / "there", progress=False)
    back = ck.import_peft(small_clip().double(), tmp_path / "there", progress=False)
    ck.export_peft(imported, tmp_path / "again")
    expected = in_float64(model)
    assert (expected - in_float64(small_clip())).norm() > 0.01 * expected.norm()
    assert_close(in_float64(back), expected, EXACT)
    assert_close(in_float64(imported), expected, EXACT)
    assert_close(in_float64(stock.base_model.model), expected, EXACT)
    weights = adapted_weights(adapted_layers(back))
    own = adapted_weights(adapted_layers(ck.import_peft(small_clip().double(), tmp_path / "again", progress=False)))
    assert weights.keys() == own.keys() == adapted_weights(adapted_layers(model)).keys()
    for path, (layer, name) in weights.items():
        other, _ = own[path]
        assert all(map(torch.equal, layer.factors(name), other.factors(name)))


def test_what_peft_trained_on_one_library_is_imported_into_the_other(tmp_path):
    targets = ["q_proj", "v_proj", "out_proj", "fc1"]
    options: dict[str, Any] = {"target_modules": targets, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"fc1": 9}}
    trained = saved_by_peft(tmp_path / "linear", transformers_clip(), r=4, lora_alpha=6, **options)
    model = ck.import_peft(small_clip(), tmp_path / "linear", progress=False)
    assert_close(in_float64(model), in_float64(trained.base_model.model), EXACT)
    saved_by_peft(tmp_path / "packed", small_clip(), r=4, lora_alpha=6, target_modules=["attn", "c_proj"])
    one = ck.import_peft(small_clip(), tmp_path / "packed", progress=False)
    other = ck.import_peft(transformers_clip(), tmp_path / "packed", progress=False)
    assert_close(in_float64(other), in_float64(one), EXACT)


def test_both_layouts_of_the_text_tower(tmp_path):
    ck.export_peft(adapted(small_clip()), tmp_path / "open_clip")
    ck.export_peft(adapted(small_clip()), tmp_path / "transformers", library="transformers")
    expected = features(adapted(small_clip_4()))
    for folder in ("open_clip", "transformers"):
        assert_close(features(ck.import_peft(small_clip_4(), tmp_path / folder, progress=False)), expected, 1e-5)
        model = ck.import_peft(with_text_module(context_length=6), tmp_path / folder, progress=False)
        assert "text.transformer.resblocks.1.attn" in adapted_layers(model)


def test_names():
    name = "transformer.resblocks.11.attn.q_proj"
    assert list(names_in("transformers", name)) == ["text_model.encoder.layers.11.self_attn.q_proj"]
    assert own_name("text_model.encoder.layers.3.mlp.fc2", ["text.transformer.resblocks.3.mlp.c_proj"]).startswith(
        "text."
    )
    for other in ("visual.transformer.resblocks.x.attn.q_proj", "visual.ln_post", "head", "", "transformer.resblocks."):
        assert [alias for library in LIBRARIES for alias in names_in(library, other)] == []
        assert own_name(other, []) == other


def test_an_export_that_the_library_has_no_names_for(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4))
    ck.apply_complora(model, ck.CompLoRAConfig(subspace_k=1, target_modules="0"), progress=False)
    with (
        Unchanged(model),
        pytest.raises(ValueError, match="CLIPModel has no 0, expected weights of CLIP's"),
    ):
        ck.export_peft(model, tmp_path / "a", library="transformers")
    other: Any = "timm"
    with Unchanged(model), pytest.raises(ValueError, match="library='timm', expected None or 'transformers'"):
        ck.export_peft(model, tmp_path / "a", library=other)
    model = adapted(small_clip(), modules_to_save=("ln_final",))
    with Unchanged(model), pytest.raises(ValueError, match=r"modules_to_save=\('ln_final',\), expected none"):
        ck.export_peft(model, tmp_path / "a", library="transformers")
    assert contents(tmp_path) == {}


def test_the_names_of_an_exported_folder(tmp_path):
    ck.export_peft(adapted(small_clip(), target_modules=("q",), layers=(0,)), tmp_path, library="transformers")
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    modules = fields["target_modules"].replace("\\", "").split("|")
    assert sorted(modules) == [f"{tower}_model.encoder.layers.0.self_attn.q_proj" for tower in ("text", "vision")]
