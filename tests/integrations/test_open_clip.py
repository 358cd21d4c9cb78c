"""What the integration of open_clip says of its models: targets, parts of blocks, and PEFT's modules."""

from __future__ import annotations

from typing import Any

import pytest
import stand_in
import torch
from blocks import plain_block
from clip_models import TEXT as TEXT_OF_CLIP
from clip_models import coca, image_tower, openai, text_tower, with_trunk
from tiny_models import LAYOUTS, TEXT, clip, clip_4, config, frozen_weight
from torch import nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.integrations import find, open_clip, timm
from complora_kernels.integrations import torch as any_torch
from complora_kernels.integrations.selection import select
from complora_kernels.modules.block import BlockParts, CompLoRABlock

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
    attention = stand_in.Attention(TEXT["width"], 2)
    layer = open_clip.CompLoRAAttention.from_attention(attention, config())
    assert "has no modules of its own for its adapters" in any_torch.peft_modules("attn", layer)


def test_the_other_attention_is_recognised_by_what_it_has():
    assert open_clip.CompLoRAAttention.recognises(stand_in.Attention(8, 2))
    assert not open_clip.CompLoRAAttention.recognises(nn.MultiheadAttention(8, 2))


# ---- towers alone, and CoCa


def test_the_towers_of_a_tower_alone():
    image, text = image_tower().model, text_tower().model
    assert {block.tower for block in open_clip.residual_blocks(image)} == {"image"}
    assert {block.tower for block in open_clip.residual_blocks(text)} == {"text"}
    assert [module for module, _ in open_clip.towers(nn.DataParallel(image))] == [image]
    for model, absent in ((image, "text"), (text, "image")):
        with pytest.raises(ValueError, match=f"matched nothing in the {absent} tower"):
            ck.apply_complora(model, config(towers=absent), progress=False)


def test_an_image_tower_alone_computes_the_class_token_alone_in_its_last_block():
    assert positions_of_blocks(image_tower()) == [5, 1]


def test_a_text_tower_alone_truncates_and_computes_the_ends_alone():
    lengths: list[Any] = []
    model, inputs, features, _ = text_tower()
    ck.apply_complora(model, config(), progress=False)
    model.transformer.resblocks[0].ln_1.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    features(model, inputs)
    assert lengths == [8]  # the longest text has 7 of 12
    assert open_clip.text_tower(text_tower(pool_type="last", no_causal_mask=True).model) is None


def test_openais_image_tower_computes_the_class_token_alone_in_its_last_block():
    assert positions_of_blocks(openai()) == [5, 1, 12, 12]  # and texts, whose masks the blocks keep, as a whole


def positions_of_blocks(row: Any) -> list[int]:
    """The number of positions that each block of an adapted model computes."""
    ck.apply_complora(row.model, config(), progress=False)
    lengths = []
    fused = CompLoRABlock.run_fused

    def observed(block: CompLoRABlock, x: Any, mask: Any, **options: Any) -> Any:
        y, parts = fused(block, x, mask, **options), block.parts()
        assert y is not None
        assert isinstance(parts, BlockParts)
        lengths.append(y.shape[0 if parts.attention.sequence_first else 1])
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompLoRABlock, "run_fused", observed)
        row.features(row.model, row.inputs)
    return lengths


def test_blocks_of_cocas_decoder_come_after_those_of_its_text_tower(caplog):
    model = coca().model
    paths = [block.path for block in open_clip.residual_blocks(model) if block.tower == "text"]
    stems = ("text.transformer.resblocks", "text_decoder.resblocks", "text_decoder.cross_attn")
    assert paths == [f"{stem}.{i}" for stem in stems for i in range(2)]
    ck.apply_complora(model, config(towers="text", layers=[2, 5]), progress=False)
    assert list(adapted_layers(model)) == [f"{paths[2]}.attn", f"{paths[5]}.attn"]
    assert f"{paths[4]} (and 1 more) keeps its own forward pass, with adapters in it: it consists of" in caplog.text


def test_images_by_timm_and_texts_by_open_clip():
    model = with_trunk(TEXT_OF_CLIP, "token").model
    assert find(model) == [open_clip, timm, any_torch]
    found = select(model, config(target_modules=("q",), layers=[0]))
    assert [target.path for target in found] == [
        "visual.trunk.blocks.0.attn.qkv",
        "text.transformer.resblocks.0.attn",
    ]
    assert {module for module, _ in open_clip.truncation(model)} == {model, model.text.transformer}
    assert [module for module, _ in timm.towers(model)] == [model.visual.trunk]
