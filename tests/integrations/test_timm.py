"""What the integration of timm says of its models, and what it guards against."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
from oracle import expected, results
from peft_adapters import saved_by_peft
from rows import Row, in_float64
from timm.layers.drop import DropPath
from timm.layers.mlp import GluMlp
from timm.layers.norm import RmsNorm
from timm.models.beit import Attention
from timm.models.vision_transformer_sam import Attention as SamAttention
from timm_models import OF_TIMM, TINY, vit
from tiny_models import config, randomise
from torch import nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.integrations import find
from complora_kernels.integrations import timm as integration
from complora_kernels.integrations import torch as any_torch
from complora_kernels.integrations.selection import select
from complora_kernels.modules.block import BlockParts, CompLoRABlock
from complora_kernels.modules.packed import CompLoRAPackedLinear


def made(name: str) -> Row:
    return in_float64(OF_TIMM[name])


# ---- what the integration says


def test_models_are_recognised_alone_in_wrappers_and_in_other_models():
    model = vit()[0]
    container = nn.Sequential(nn.Identity(), model)
    for each in (model, nn.DataParallel(model), container):
        assert find(each) == [integration, any_torch]
    assert [block.path for block in integration.residual_blocks(container)] == ["1.blocks.0", "1.blocks.1"]
    ck.apply_complora(container, config(), progress=False)
    assert list(adapted_layers(container)) == ["1.blocks.0.attn.qkv", "1.blocks.1.attn.qkv"]


def test_layers_count_through_the_stages_of_a_model():
    model = made("timm Swin")[0]
    paths = {block.layer: block.path for block in integration.residual_blocks(model)}
    assert paths == {0: "layers.0.blocks.0", 1: "layers.0.blocks.1", 2: "layers.1.blocks.0"}
    ck.apply_complora(model, config(layers=[0, 2]), progress=False)
    assert list(adapted_layers(model)) == [f"{paths[0]}.attn.qkv", f"{paths[2]}.attn.qkv"]


def test_a_gated_mlp_has_two_first_products():
    found = select(made("timm EVA 02, three projections")[0], config(target_modules=("fc1", "fc2"), layers=[1]))
    assert [target.path for target in found] == [f"blocks.1.mlp.{name}" for name in ("fc1_g", "fc1_x", "fc2")]


def test_activations():
    assert integration.activations(vit()[0]) == {"image": "GELU"}
    assert integration.activations(vit(act_layer="quick_gelu")[0]) == {"image": "QuickGELU"}


def set_part(path: str, part: nn.Module) -> Any:
    def change(block: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, part)

    return change


def set_fast_norm(block: Any) -> None:
    block.norm2._fast_norm = True


OTHER_PARTS: dict[str, tuple[Any, str]] = {
    "dropped paths": (set_part("drop_path1", DropPath(0.1)), "drop_path1 is DropPath"),
    "other scale": (set_part("ls2", nn.RMSNorm(24)), "ls2 is RMSNorm"),
    "dropout": (set_part("mlp.drop1", nn.Dropout(0.1)), "mlp.drop1 is Dropout"),
    "norm in the MLP": (set_part("mlp.norm", nn.LayerNorm(96)), "mlp.norm is LayerNorm"),
    "dropped projection": (set_part("attn.proj_drop", nn.Dropout(0.1)), "attn.proj_drop is Dropout"),
    "gate": (set_part("attn.gate", nn.Linear(24, 24)), "attn has a gate"),
    "other activation": (set_part("mlp.act", nn.ReLU()), "mlp.act is ReLU"),
    "other norm": (set_part("norm1", RmsNorm(24)), "norm1 is a RmsNorm"),
    "fast norm": (set_fast_norm, "norm2 computes in the dtype of autocast"),
    "other MLP": (set_part("mlp", GluMlp(24)), "mlp is a timm.layers.mlp.GluMlp"),
    "other attention": (set_part("attn", SamAttention(24)), "attn is a timm.models.vision_transformer_sam"),
    "one adapter on all of qkv": (
        lambda block: set_part("attn.qkv", ck.CompLoRALinear.from_linear(block.attn.qkv, config()))(block),
        "attn.qkv is a CompLoRALinear",
    ),
}


@pytest.mark.parametrize("case", OTHER_PARTS)
def test_a_block_with_other_parts_is_not_fused(case):
    change, reason = OTHER_PARTS[case]
    block: Any = vit()[0].get_submodule("blocks.0")
    assert isinstance(integration.parts_of_block(block), BlockParts)
    change(block)
    parts = integration.parts_of_block(block)
    assert isinstance(parts, str)
    assert reason in parts


@pytest.mark.parametrize("mask", ["additive", "causal"])
def test_a_masked_model_runs_its_own_forward_pass(mask):
    plain, inputs, *_ = made("timm ViT")
    options: dict[str, Any] = {"is_causal": True}
    if mask == "additive":
        options = {"attn_mask": torch.randn(5, 5, dtype=torch.float64)}

    def features(model: Any, inputs: Any) -> Any:
        return model(**inputs, **options)

    model = randomise(ck.apply_complora(copy.deepcopy(plain), config(sides="both"), progress=False))
    ours, oracle = results(model, inputs, features), expected(plain, model, config(sides="both"), inputs, features)
    torch.testing.assert_close(ours, oracle)


READ: dict[str, tuple[dict[str, Any], int]] = {  # the number of positions that the last block computes
    "class token": ({}, 1),
    "class token, no norm": ({"final_norm": False}, 1),
    "class token among registers": ({"reg_tokens": 2}, 1),
    "mean of the tokens": ({"global_pool": "avg"}, 5),
    "attention over the tokens": ({"global_pool": "map", "class_token": False}, 4),
}


@pytest.mark.parametrize("case", READ)
def test_the_last_block_computes_the_position_that_is_read(case, monkeypatch):
    options, read = READ[case]
    model, inputs, features, _ = vit(**options)
    ck.apply_complora(model, config(), progress=False)
    lengths = []
    fused = CompLoRABlock.run_fused

    def observed(block: CompLoRABlock, x: Any, mask: Any, **options: Any) -> Any:
        y = fused(block, x, mask, **options)
        assert y is not None
        lengths.append(y.shape[1])
        return y

    monkeypatch.setattr(CompLoRABlock, "run_fused", observed)
    features(model, inputs)
    tokens = 5 if case.startswith("mean") else lengths[0]
    assert lengths == [tokens, read]
    lengths.clear()
    assert model.forward_features(inputs["x"]).shape[1] == tokens  # all positions are handed on
    model.blocks.register_forward_hook(lambda *_: None)
    features(model, inputs)
    assert lengths == [tokens] * 4


# ---- traps


BIASES_APART = ["timm EVA", "timm EVA 02", "timm BEiT", "timm Swin v2"]


@pytest.mark.parametrize("name", BIASES_APART)
@pytest.mark.parametrize("target_modules", [("q", "v"), ["qkv"], r".*attn\.qkv"], ids=str)
def test_attention_that_does_not_call_qkv_is_made_to(name, target_modules):
    model, inputs, features, _ = made(name)
    calls: list[Any] = []
    model = ck.apply_complora(model, config(target_modules=target_modules), progress=False)
    for layer in adapted_layers(model).values():
        layer.register_forward_hook(lambda layer, *_: calls.append(layer))
    features(model, inputs)
    assert calls == list(adapted_layers(model).values())
    assert all(isinstance(layer, CompLoRAPackedLinear) for layer in calls)
    model = ck.unload(model)
    assert not any(block.module.get_submodule("attn").qkv_bias_separate for block in integration.residual_blocks(model))


@pytest.mark.parametrize("name", BIASES_APART)
def test_calibration_reaches_the_projections_of_such_attention(name):
    model, inputs, features, _ = made(name)
    given: list[Any] = []
    attention: Any = next(iter(integration.residual_blocks(model))).module.get_submodule("attn")
    hook = attention.register_forward_pre_hook(lambda _, args: given.append(args[0].flatten(0, -2)))
    options = config(subspace_source="activations", sides="input", subspace_k=2, layers=[0])
    ck.apply_complora(model, options, calibrate=lambda model: features(model, inputs), progress=False)
    hook.remove()
    V = torch.linalg.svd(given[0]).Vh[:2].T  # [in, 2]
    for name in "qkv":
        basis = attention.qkv.basis(name, "input").matrix
        torch.testing.assert_close(basis @ basis.T, V @ V.T)


def test_attention_alone_that_does_not_call_qkv_is_refused():
    model = nn.ModuleDict({"attention": Attention(24, qkv_bias=True)})
    with pytest.raises(
        ValueError, match=r"matched attention\.qkv, which its parent, a Attention, uses without calling"
    ):
        ck.apply_complora(model, config(target_modules=r".*qkv"), progress=False)
    ck.apply_complora(model, config(target_modules=r".*proj"), progress=False)


def test_attention_of_an_older_timm_without_the_switch_is_refused():
    model = made("timm BEiT")[0]
    for block in integration.residual_blocks(model):
        del vars(block.module.get_submodule("attn"))["qkv_bias_separate"]
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv is used by its timm\.models\.beit\.Attention without"):
        ck.apply_complora(model, config(), progress=False)
    assert [type(module) for module in model.modules()] == before


def test_attention_whose_rows_are_not_known_is_refused():
    small: dict[str, Any] = {"embed_dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    model = timm.create_model("tiny_vit_5m_224", **small)
    with pytest.raises(ValueError, match=r"attn is a timm\.models\.tiny_vit\.Attention, whose rows of q, k and v"):
        ck.apply_complora(model, config(), progress=False)


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match=r"its timm\.models\.resnet\.ResNet has no blocks"):
        ck.apply_complora(timm.create_model("resnet18", num_classes=0), config(), progress=False)


# ---- PEFT


@pytest.mark.parametrize("name", ["timm ViT", "timm Swin", "timm EVA 02, three projections"])
@pytest.mark.parametrize("targets", [("q", "k", "v"), ("q", "v", "o", "fc1", "fc2"), ("fc2",)], ids="".join)
@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rsLoRA"])
def test_peft_computes_what_was_exported(name, targets, use_rslora, tmp_path):
    plain, inputs, features, _ = made(name)
    options = config(target_modules=targets, use_rslora=use_rslora)
    model = randomise(ck.apply_complora(copy.deepcopy(plain), options, progress=False))
    ck.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    torch.testing.assert_close(features(theirs, inputs), features(model, inputs))


@pytest.mark.parametrize("name", BIASES_APART)
def test_an_adapter_of_a_projection_that_peft_could_not_reach_is_not_exported(name, tmp_path: Path):
    model = ck.apply_complora(made(name)[0], config(), progress=False)
    with pytest.raises(ValueError, match="uses its weights without calling it, so PEFT's adapter has no effect"):
        ck.export_peft(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_the_packed_layer_shows_its_adapters():
    layer = adapted_layers(ck.apply_complora(vit()[0], config(target_modules=("q", "v")), progress=False))
    assert all(isinstance(each, CompLoRAPackedLinear) for each in layer.values())
    assert "adapters=q, v" in repr(layer["blocks.0.attn.qkv"])
    assert TINY["embed_dim"] == layer["blocks.0.attn.qkv"].weights["v"].start // 2


# ---- PEFT


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["qkv"]},
        {"target_modules": ["qkv", "proj", "fc1"], "exclude_modules": r".*patch_embed.*"},
        {"target_modules": ["qkv", "fc2"], "rank_pattern": {"qkv": 6}, "alpha_pattern": {"qkv": 3}, "use_rslora": True},
    ],
)
def test_what_peft_trained_is_imported_into_packed_weights(options, tmp_path):
    """PEFT has one A for q, k and v: each of the three gets a copy."""
    row = made("timm ViT")
    theirs = saved_by_peft(tmp_path, copy.deepcopy(row.model), r=4, lora_alpha=6, **options)
    ours = ck.import_peft(copy.deepcopy(row.model), tmp_path, progress=False)
    layer = ours.blocks[0].attn.qkv
    assert isinstance(layer, CompLoRAPackedLinear)
    with torch.no_grad():
        features = row.features(theirs.base_model.model, row.inputs)
        assert (features - row.features(row.model, row.inputs)).norm() > 0.01 * features.norm()
        torch.testing.assert_close(row.features(ours, row.inputs), features, rtol=1e-5, atol=1e-5)  # float32 files


def test_a_packed_weight_without_an_update_is_imported(tmp_path):
    row = made("timm ViT")
    wrapped: Any = peft.get_peft_model(copy.deepcopy(row.model), peft.LoraConfig(r=6, target_modules=["qkv"]))
    wrapped.save_pretrained(str(tmp_path))
    ours = ck.import_peft(copy.deepcopy(row.model), tmp_path, progress=False)
    A, B = ours.blocks[0].attn.qkv.factors("k")
    assert A.shape == (6, 24)  # as PEFT trains it further
    assert not B.any()
    trained = wrapped.base_model.model.blocks[0].attn.qkv.lora_A["default"].weight
    torch.testing.assert_close(A.float(), trained.float(), rtol=1e-6, atol=1e-6)
