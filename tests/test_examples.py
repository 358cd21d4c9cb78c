"""The examples run, on small models with random weights in the place of those that they would download."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import test_documentation
import timm
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_digits

import complora_kernels as ck
from examples import own_folder, own_loop, predict, timm_head, transformers_clip

ROOT = Path(__file__).parents[1]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_they_are_short():
    for example in (ROOT / "examples").glob("*.py"):
        assert len(example.read_text().splitlines()) < 40, example


def test_a_loop_of_ones_own(tmp_path, monkeypatch):
    plain, *transforms = test_documentation.small_clip_and_transforms()
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda *_, **__: (copy.deepcopy(plain), *transforms))
    test_documentation.photographs(tmp_path / "photos")
    assert own_loop.main("photos", epochs=2) > 0
    assert max(row.relative_update for row in ck.subspace_report(ck.load_adapter(plain, "adapter"))) > 0


def test_a_folder_of_ones_own(tmp_path, monkeypatch):
    """On the bundled model, which knows digits."""
    monkeypatch.setattr(own_folder, "MODEL", ("--model", "glyphs"))
    digits: Any = load_digits()
    for name, digit in (("digit zero", 0), ("digit one", 1)):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for number, image in enumerate(digits.images[digits.target == digit][:16]):
            Image.fromarray((image * 15.9).astype(np.uint8)).resize((32, 32)).save(folder / f"{number}.png")
    assert own_folder.main("photos", "--learning-rates", "0.003", "--steps", "2", "--workers", "1") == 0
    assert (tmp_path / "runs" / "own" / "table.md").exists()
    (adapter,) = (tmp_path / "runs" / "own" / "runs").glob("output-*/adapter")
    assert predict.main(str(adapter), "photos/digit zero/0.png", "photos/digit one/0.png") == [
        "digit zero",
        "digit one",
    ]


def test_transformers_clip(tmp_path, monkeypatch):
    def small(_: str) -> transformers.CLIPModel:
        text = {**TOWER, "vocab_size": 40, "eos_token_id": 39, "bos_token_id": 0, "pad_token_id": 1}
        vision = {**TOWER, "image_size": 32, "patch_size": 16}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        return transformers.CLIPModel._from_config(config)

    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", small)
    texts = torch.tensor([[0, 5, 6, 39], [0, 7, 39, 1]])
    assert transformers_clip.main(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]), texts, steps=2) > 0
    assert (tmp_path / "clip-with-adapter" / "complora" / "adapter_model.safetensors").exists()


def test_timm_with_a_head(tmp_path, monkeypatch):
    create = timm.create_model
    small = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2}
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained, **options: create("vit_tiny_patch16_224", **small, **options)
    )
    assert timm_head.main(torch.randn(4, 3, 32, 32), torch.arange(4), 4, steps=2) > 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
