"""What transformers' `save_pretrained` saves of an adapted model loads again, with the adapter."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_clip import adapted, config
from transformers import CLIPModel
from transformers_clip import features, transformers_clip

import complora_kernels as ck

PATTERN = r".*\.(q_proj|v_proj|fc1)"


def model() -> Any:
    return adapted(transformers_clip(), target_modules=PATTERN)


def test_the_model_and_its_adapter_are_saved(tmp_path):
    own = model()
    own.save_pretrained(tmp_path)
    loaded = CLIPModel.from_pretrained(tmp_path).eval()
    assert torch.equal(features(loaded), features(transformers_clip()))
    ck.load_adapter(loaded, tmp_path / "complora", progress=False)
    torch.testing.assert_close(features(loaded), features(own))


def test_all_adapters_are_saved(tmp_path):
    own = model()
    ck.add_adapter(own, "b", config(r=3, target_modules=PATTERN), progress=False)
    for active in ("b", {"default": 0.5, "b": 0.5}):
        ck.set_adapter(own, active)
        own.save_pretrained(tmp_path)
        loaded = ck.load_adapter(CLIPModel.from_pretrained(tmp_path).eval(), tmp_path / "complora", progress=False)
        ck.load_adapter(loaded, tmp_path / "complora" / "b", adapter_name="b", progress=False)
        ck.set_adapter(loaded, active)
        torch.testing.assert_close(features(loaded), features(own))


def test_from_pretrained_says_what_it_leaves_out(tmp_path, caplog):
    model().save_pretrained(tmp_path)
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.addHandler(caplog.handler)
    CLIPModel.from_pretrained(tmp_path)
    transformers_logger.removeHandler(caplog.handler)
    assert "lora_A" in caplog.text


def test_a_checkpoint_loads_into_an_adapted_model(tmp_path):
    own = model()
    own.save_pretrained(tmp_path)
    other = ck.apply_complora(transformers_clip(), own.vision_model.encoder.layers[0].mlp.fc1.config, progress=False)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    torch.testing.assert_close(features(other), features(own))


def test_a_merged_model_is_loaded_merged(tmp_path):
    own = model()
    ck.merge_adapter(own)
    own.save_pretrained(tmp_path)
    assert torch.equal(features(CLIPModel.from_pretrained(tmp_path).eval()), features(own))


def test_a_part_is_refused_before_anything_is_saved(tmp_path):
    own = model()
    with pytest.raises(ValueError, match="expected the whole model that apply_complora was given, no part of it"):
        own.vision_model.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()


def test_another_process_than_the_main_one_saves_nothing(tmp_path):
    model().save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "complora").exists()
