"""What a configuration selects in a model by names, expressions and "all-linear", and with what rank and scaling."""

from __future__ import annotations

import copy
import logging
from typing import Any

import peft
import pytest
import torch
from tiny_models import batch, clip, clip_4, config, features, frozen_weight, randomise
from torch import Tensor, nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.integrations.selection import select

BLOCKS = [f"{tower}.resblocks.{i}" for tower in ("visual.transformer", "transformer") for i in range(2)]


class Net(nn.Module):
    """No known library: a layer `proj` twice, at two depths, and layers with similar names."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.reproj = nn.Linear(6, 6), nn.Linear(6, 6)
        self.deep = nn.ModuleDict({"proj": nn.Linear(6, 6), "norm": nn.LayerNorm(6)})
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:  # [M, 6] to [M, 3]
        return self.head(self.deep["norm"](self.deep["proj"](self.reproj(self.proj(x)))))


def selected(model: nn.Module, **options: Any) -> list[str]:
    return [target.path for target in select(model, config(**options))]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["proj"]}, ["proj", "deep.proj"]),
        ({"target_modules": ["deep.proj", "head"]}, ["deep.proj", "head"]),
        ({"target_modules": "all-linear"}, ["proj", "reproj", "deep.proj", "head"]),
        ({"target_modules": "all-linear", "exclude_modules": ["head"]}, ["proj", "reproj", "deep.proj"]),
        ({"target_modules": ["proj", "head"], "exclude_modules": r"deep\..*"}, ["proj", "head"]),
        ({"target_modules": r".*proj", "exclude_modules": ["proj"]}, ["reproj"]),
        ({"target_modules": ["q", "proj"]}, "matched no nn.Linear by its whole name or its ending 'q'"),
        (
            {"target_modules": ["norm"]},
            r"ending 'norm'; deep.norm is a .*LayerNorm, expected a match among: proj, rep",
        ),
        ({"target_modules": ["proj"], "exclude_modules": ".*"}, "leaves nothing to adapt of proj, deep.proj"),
        ({}, r'expression, target_modules=r"\(\.\*\\\.\)\?\(head\|proj\|reproj\)"'),
    ],
)
def test_names_as_peft_reads_them(options, expected):
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            selected(Net(), **options)
        return
    assert selected(Net(), **options) == expected
    peft_config = peft.LoraConfig(
        target_modules=options["target_modules"], exclude_modules=options.get("exclude_modules")
    )
    adapted_by_peft = peft.inject_adapter_in_model(peft_config, Net())
    paths = [path for path, module in adapted_by_peft.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert paths == expected


def test_the_pattern_of_the_message_selects_every_linear():
    with pytest.raises(ValueError, match="Choose other towers") as refusal:
        selected(Net())
    pattern = str(refusal.value).rpartition('target_modules=r"')[2].removesuffix('"')
    assert selected(Net(), target_modules=pattern) == ["proj", "reproj", "deep.proj", "head"]


@pytest.mark.parametrize("make", [clip, clip_4])
def test_residual_blocks_by_names(make):
    """An attention that is one module has an adapter for each of its projections; "all-linear" is all of them."""
    assert selected(make(), target_modules=["attn"]) == [f"{block}.attn" for block in BLOCKS]
    everything = select(make(), config(target_modules="all-linear"))
    assert [target.path for target in everything] == [
        f"{block}.{part}" for block in BLOCKS for part in ("attn", "mlp.c_fc", "mlp.c_proj")
    ]
    assert {tuple(target.weights) for target in everything} == {("q", "k", "v", "o"), ("",)}
    without = selected(
        make(), target_modules="all-linear", exclude_modules=["attn", "visual.transformer.resblocks.0.mlp.c_fc"]
    )
    assert len(without) == 2 * len(BLOCKS) - 1
    with pytest.raises(ValueError, match=r"'q_proj', .*\(in residual blocks, target_modules=\(\"q\",\) adapts it"):
        selected(make(), target_modules=["q_proj", "v_proj"])


def test_layers_of_each_tower():
    paths = selected(clip(), layers={"image": 1, "text": (0, 1)})
    assert paths == [f"{block}.attn" for block in BLOCKS[1:]]
    with pytest.raises(ValueError, match=r"indices of the text tower's blocks, 0 to 1: there is no \[2\]"):
        selected(clip(), layers={"image": 1, "text": 2})


PATTERNS = {"rank_pattern": {"c_fc": 4, "attn.q_proj": 1}, "alpha_pattern": {"attn": 6.0, "c_proj": 2.0}}


@pytest.mark.parametrize("make", [clip, clip_4])
def test_ranks_and_alphas_of_their_own(make, tmp_path):
    """Against a plain model with the updates in its weights; they are in the files, and so in another model."""
    plain = make().double()
    own = config(target_modules=("q", "v", "fc1", "fc2"), sides="none", **PATTERNS)
    model = randomise(ck.apply_complora(copy.deepcopy(plain), own, progress=False))
    updated = copy.deepcopy(plain)
    ranks = {"q": (1, 6.0), "v": (2, 6.0), "c_fc": (4, 3.0), "c_proj": (2, 2.0)}
    with torch.no_grad():
        for path, layer in adapted_layers(model).items():
            for name in layer.weights:
                r, alpha = ranks[name or path.rpartition(".")[2]]
                A, B = layer.factors(name)
                assert len(A) == B.shape[1] == r
                weight = frozen_weight(updated.get_submodule(path), name)
                weight += alpha / r * B @ A
    images, texts = batch(torch.float64)
    expected = features(updated, images, texts)
    torch.testing.assert_close(features(model, images, texts), expected, rtol=0, atol=1e-11)
    ck.save_adapter(model, tmp_path)
    loaded = ck.load_adapter(copy.deepcopy(plain), tmp_path, progress=False)
    torch.testing.assert_close(features(loaded, images, texts), expected, rtol=0, atol=1e-5)  # factors are float32
    ck.merge_adapter(model)
    torch.testing.assert_close(features(model, images, texts), expected, rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments.*complora")
def test_stock_peft_reads_ranks_and_alphas_of_their_own(tmp_path):
    plain, x = Net(), torch.randn(5, 6)
    own = config(target_modules="all-linear", rank_pattern={"deep.proj": 3, "head": 1}, alpha_pattern={"proj": 5.0})
    model = randomise(ck.apply_complora(copy.deepcopy(plain), own, progress=False))
    ck.save_adapter(model, tmp_path)
    loaded: Any = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    assert loaded.base_model.model.deep["proj"].r == {"default": 3}
    torch.testing.assert_close(loaded(x), model(x))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_fc", "attn"]},
        {"target_modules": "all-linear", "exclude_modules": r"visual\..*"},
        {"target_modules": ("q", "o"), "exclude_modules": ("visual.transformer.resblocks.1.attn",)},
        {"target_modules": ("q", "fc1"), "exclude_modules": r"(visual\.)?transformer\.resblocks\.1\.attn"},
        {"layers": {"text": (1,), "image": (0,)}},
    ],
    ids=str,
)
def test_every_selection_is_saved_and_loaded(options, tmp_path):
    plain = clip()
    model = randomise(ck.apply_complora(copy.deepcopy(plain), config(**options), progress=False))
    ck.save_adapter(model, tmp_path)
    loaded = ck.load_adapter(copy.deepcopy(plain), tmp_path, progress=False)
    assert adapted_layers(loaded).keys() == adapted_layers(model).keys()
    images, texts = batch()
    torch.testing.assert_close(features(loaded, images, texts), features(model, images, texts))


def test_explain_says_how_each_weight_is_computed(caplog, monkeypatch):
    monkeypatch.setenv("COMPLORA_BACKEND", "torch")
    caplog.set_level(logging.INFO, "complora_kernels")
    model: Any = clip()
    model.visual.transformer.resblocks[0].ln_1 = nn.Identity()
    ck.apply_complora(model, config(target_modules=("q", "v", "fc1"), rank_pattern={"c_fc": 3}), progress=False)
    (message,) = caplog.messages
    assert message.startswith(
        "3 of 4 residual blocks are fused, texts are truncated; visual.transformer.resblocks.0 keeps"
    )
    rows = {row.name: row for row in ck.explain(model, tokens=100)}
    assert len(rows) == 3 * len(BLOCKS)
    assert rows["transformer.resblocks.1.attn.q_proj"] == (
        "transformer.resblocks.1.attn.q_proj",
        2,
        12,
        rows["transformer.resblocks.1.attn.q_proj"].energy,
        "torch",
        "addmm",
        "fused",
    )
    assert rows["visual.transformer.resblocks.0.mlp.c_fc"].block.startswith("ln_1 is a Identity")
    assert rows["visual.transformer.resblocks.0.mlp.c_fc"].r == 3
    report = {row.path: row for row in ck.subspace_report(model)}
    assert rows["transformer.resblocks.0.mlp.c_fc"].energy == report["transformer.resblocks.0.mlp.c_fc"].energy
    assert {row.plan for row in ck.explain(model, dtype=torch.bfloat16)} == {"concat"}
    header, *lines = str(ck.explain(model)).splitlines()
    assert header.split() == ["weight", "r", "k", "energy", "backend", "plan", "block"]
    assert len(lines) == len(rows)
    with pytest.raises(ValueError, match="tokens=0, expected at least 1"):
        ck.explain(model, tokens=0)


def test_a_model_without_residual_blocks_is_said_to_have_adapters_only(caplog):
    caplog.set_level(logging.INFO, "complora_kernels")
    model = ck.apply_complora(Net(), config(target_modules="all-linear", r=4), progress=False)
    assert caplog.messages == [
        "r is above min(out, in), the highest rank of an update, for head [3, 6]",
        "0 residual blocks are fused: adapters only, because the model has none of a known library",
    ]
    assert {row.block for row in ck.explain(model)} == {""}


def test_a_projection_that_leaves_nothing_to_train_is_refused():
    model = Net()
    with pytest.raises(ValueError, match="proj: 6 of 6 output directions are protected, which leaves nothing to train"):
        ck.apply_complora(model, config(target_modules="all-linear", subspace_ratio=1.0), progress=False)
    assert type(model.proj) is nn.Linear


def test_a_merged_adapter_gets_no_gradient_and_the_message_says_why():
    model = ck.apply_complora(Net(), config(target_modules=["proj"]), progress=False)
    ck.merge_adapter(model)
    with pytest.raises(RuntimeError, match=r"proj, deep\.proj are merged: call unmerge_adapter first"):
        ck.check_gradients(model)


def test_weights_by_name_that_the_model_does_not_have_are_named():
    """An adapter of a file is not loaded in part."""
    model, settings = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config(target_modules=r"\d")
    assert [target.path for target in select(model, settings, ["0", "1"])] == ["0", "1"]
    with pytest.raises(ValueError, match="the model has no module for 2, 3"):
        select(model, settings, ["0", "3", "2"])
