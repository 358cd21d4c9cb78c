"""What the integration of open_clip says of its models: targets, parts of blocks, and PEFT's modules."""

from __future__ import annotations

from typing import Any

import pytest
import stand_in
import torch
from blocks import plain_block
from tiny_models import LAYOUTS, TEXT, clip, clip_4, config, frozen_weight
from torch import nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.integrations import find, open_clip
from complora_kernels.integrations import torch as any_torch
from complora_kernels.integrations.selection import select
from complora_kernels.modules.block import BlockParts

ALL = ("q", "k", "v", "o", "fc1", "fc2")

every_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)


@every_layout
def test_models_are_recognised_plain_adapted_and_in_wrappers(make):
    model = make()
    assert find(model) == [open_clip, any_torch]
    ck.apply_complora(model, config(), progress=False)
    assert find(model) == find(nn.DataParallel(model)) == [open_clip, any_torch]
    assert find(nn.Sequential(nn.Linear(3, 3))) == [any_torch]


@every_layout
@pytest.mark.parametrize("targets", [("q", "v"), ("o", "fc1"), ALL], ids="".join)
def test_targets_name_their_adapters_and_frozen_weights(make, targets):
    model = make()
    found = select(model, config(target_modules=targets))
    assert sum(len(target.weights) for target in found) == 4 * len(targets)  # two towers of two blocks
    for target in found:
        assert model.get_submodule(target.path) is target.module
        for name, (parameter, start, stop) in target.weights.items():
            rows = target.module.get_parameter(parameter)[start:stop]
            assert torch.equal(rows, frozen_weight(target.module, name))
            assert (name or target.path) in (*targets, target.path)
        layer = target.adapt(target.module, config(target_modules=targets), path=target.path)
        assert layer.weights == target.weights
        assert layer.path == target.path


@every_layout
def test_every_block_of_a_clip_has_parts(make):
    model = make()
    blocks = list(open_clip.residual_blocks(model))
    assert [(block.tower, block.layer) for block in blocks].count(("image", 1)) == 1
    assert len(blocks) == 4
    assert all(isinstance(open_clip.parts_of_block(block.module), BlockParts) for block in blocks)


@pytest.mark.parametrize("layout", ["batch first", "sequence first", "open_clip 4"])
def test_parts_of_a_block(layout):
    block = plain_block(layout)
    parts: Any = open_clip.parts_of_block(block)
    (qkv,) = parts.attention.projections
    assert qkv.names == "qkv"
    assert qkv.weight is block.attn.in_proj_weight
    assert qkv.bias is block.attn.in_proj_bias
    assert parts.attention.sequence_first == (layout == "sequence first")
    assert (parts.norm1, parts.norm2) == (block.ln_1, block.ln_2)
    assert (parts.fc1, parts.fc2, parts.activation) == (block.mlp.c_fc, block.mlp.c_proj, "gelu")


def test_activations():
    assert open_clip.activations(clip()) == {"image": "GELU", "text": "GELU"}
    assert open_clip.activations(clip(quick_gelu=True)) == {"image": "QuickGELU", "text": "QuickGELU"}


PEFT: dict[str, tuple[Any, tuple[str, ...], dict[str, str] | str]] = {
    "q and v": (clip, ("q", "v"), {"q": "attn", "v": "attn"}),
    "o": (clip, ("q", "o"), "PEFT adds the update of an nn.MultiheadAttention's output projection twice"),
    "open_clip 4, o": (clip_4, ("o",), {"o": "attn.out_proj"}),
    "open_clip 4, q": (clip_4, ("q", "o"), "this attention keeps q, k and v in one parameter"),
    "fc1": (clip, ("fc1",), {"": "mlp.c_fc"}),
}


@pytest.mark.parametrize("case", PEFT)
def test_modules_that_peft_adapts(case):
    make, targets, expected = PEFT[case]
    layers = adapted_layers(ck.apply_complora(make(), config(target_modules=targets), progress=False))
    for path, layer in layers.items():
        modules = open_clip.peft_modules(path, layer)
        if isinstance(expected, str):
            assert isinstance(modules, str)
            assert expected in modules
        else:
            block = path.split(".attn")[0].split(".mlp")[0]
            assert modules == {name: f"{block}.{module}" for name, module in expected.items()}


def test_modules_that_peft_adapts_in_any_model():
    model = ck.apply_complora(nn.Sequential(nn.Linear(6, 6)), config(target_modules="0"), progress=False)
    assert any_torch.peft_modules("0", adapted_layers(model)["0"]) == {"": "0"}
    attention = ck.CompLoRAMultiheadAttention.from_attention(nn.MultiheadAttention(TEXT["width"], 2), config())
    assert "has no modules of its own for its adapters" in any_torch.peft_modules("attn", attention)


def test_the_other_attention_is_recognised_by_what_it_has():
    assert open_clip.CompLoRAAttention.recognises(stand_in.Attention(8, 2))
    assert not open_clip.CompLoRAAttention.recognises(nn.MultiheadAttention(8, 2))
