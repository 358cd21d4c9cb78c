"""What is particular to transformers' models: recorded outputs, checkpointing, attention, and truncated texts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from model_zoo import ALL, make
from small_clip import assert_close
from timm.layers.drop import DropPath
from tiny_models import config, randomise
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers_models import CONTEXT, END, WIDTH

import complora_kernels as ck
from complora_kernels import functional
from complora_kernels.integrations import activations, find, open_clip
from complora_kernels.integrations import torch as any_torch
from complora_kernels.integrations import transformers as library
from complora_kernels.integrations.selection import select
from complora_kernels.modules.block import BlockParts, CompLoRABlock

CHECKPOINTS_IN_CALL = "__call__" in vars(GradientCheckpointingLayer)  # of older versions


def adapted(model: nn.Module, **options: Any) -> Any:
    return randomise(ck.apply_complora(model, config(**{"target_modules": ALL, **options}), progress=False))


@pytest.fixture
def runs(monkeypatch) -> list[tuple[int, bool]]:
    """The length of the sequences that each residual block got, and whether it ran by fused operations."""
    seen, run = [], CompLoRABlock.run_fused

    def observed(block: CompLoRABlock, x: Tensor, *arguments: Any, **options: Any) -> Tensor | None:
        y = run(block, x, *arguments, **options)
        seen.append((x.shape[1], y is not None))
        return y

    monkeypatch.setattr(CompLoRABlock, "run_fused", observed)
    return seen


# ---- what is known


@pytest.mark.parametrize("name", ["CLIPModel", "CLIPVisionModel", "Siglip2Model", "Dinov2Model", "DINOv3ViTModel"])
def test_models_are_recognised_plain_adapted_and_in_wrappers(name):
    model = make(f"{name}, sdpa").model
    assert find(model) == [library, any_torch]
    assert open_clip not in find(adapted(model))
    assert find(model) == find(nn.DataParallel(model)) == find(nn.Sequential(nn.Linear(2, 2), model))
    assert len([block for block in library.residual_blocks(model) if block.tower == "image"]) == 2


def test_a_namesake_is_not_known():
    class CLIPEncoderLayer(nn.Module):
        pass

    assert not library.recognises(nn.Sequential(CLIPEncoderLayer()))


def test_targets_of_a_gated_mlp_are_both_products_in_the_place_of_fc1():
    model = make("DINOv3ViTModel, SwiGLU, sdpa").model
    paths = [target.path for target in select(model, config(target_modules=("fc1",)))]
    assert {path.rpartition(".")[2] for path in paths} == {"gate_proj", "up_proj"}
    assert len(paths) == 4


def test_activations_have_the_names_that_open_clip_gives_them():
    assert activations(make("CLIPModel, sdpa").model) == {"image": "QuickGELU", "text": "QuickGELU"}
    assert activations(make("Dinov2Model, sdpa").model) == {"image": "GELU"}
    assert activations(make("SiglipVisionModel, sdpa").model) == {"image": "GELUTanh"}


class OtherNorm(nn.LayerNorm):
    """It may compute something else."""


class OtherLinear(nn.Linear):
    """It may, too."""


def test_why_a_block_is_not_fused(caplog):
    (block, *_) = library.residual_blocks(make("CLIPVisionModel, sdpa").model)
    module: Any = block.module
    assert isinstance(library.parts_of_block(module), BlockParts)
    changed = copy.deepcopy(module)
    changed.mlp.activation_fn = nn.ReLU()
    assert "the activation of mlp is a ReLU, expected one of GELUActivation" in str(library.parts_of_block(changed))
    changed = copy.deepcopy(module)
    changed.layer_norm2 = nn.Identity()
    assert "layer_norm2 is a Identity, expected a LayerNorm" in str(library.parts_of_block(changed))
    changed.layer_norm2 = OtherNorm(WIDTH)
    assert "layer_norm2 is a OtherNorm, expected a LayerNorm" in str(library.parts_of_block(changed))
    changed = copy.deepcopy(module)
    changed.self_attn.v_proj = OtherLinear(WIDTH, WIDTH)
    assert "v is a OtherLinear, expected a linear layer" in str(library.parts_of_block(changed))
    (scaled, *_) = library.residual_blocks(make("Dinov2Model, sdpa").model)
    for dropping in (nn.Dropout(0.5), DropPath(0.1)):
        changed = copy.deepcopy(scaled.module)
        changed.drop_path = dropping
        assert f"drop_path is {dropping}, expected nn.Identity" in str(library.parts_of_block(changed))
    changed = copy.deepcopy(module)
    changed.dropout = nn.Dropout(0.5)
    assert "it consists of" in str(library.parts_of_block(changed))
    changed = copy.deepcopy(module)
    changed.self_attn.config._attn_implementation = "flash_attention_2"
    assert "its attention is 'flash_attention_2', expected 'eager' or 'sdpa'" in str(library.parts_of_block(changed))
    adapted(make("DINOv3ViTModel, SwiGLU, sdpa").model)
    assert (
        "layer.0 (and 1 more) keeps its own forward pass, with adapters in it: mlp is a DINOv3ViTGatedMLP"
        in caplog.text
    )


# ---- outputs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model", ["CLIPModel", "SiglipVisionModel", "Dinov2Model"])
def test_hidden_states_and_attentions_are_recorded(model, attention, runs):
    """Twice: the library leaves its hooks in the model, which is as fast as before where nothing is recorded."""
    plain, inputs, _, fused = make(f"{model}, {attention}")
    ours = ck.apply_complora(copy.deepcopy(plain), config(target_modules=ALL), progress=False)
    asked = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    for _ in range(2):
        for mine, theirs in zip(parts_of(ours(**inputs, **asked)), parts_of(plain(**inputs, **asked)), strict=True):
            assert mine.shape == theirs.shape
            assert_close(mine, theirs, 1e-6)  # eager attention takes its softmax in float32
    runs.clear()
    ours(**inputs)
    assert [fused for _, fused in runs] == [True] * fused


def parts_of(output: Any) -> list[Tensor]:
    """All tensors in an output, also those of the outputs and tuples in it."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in parts_of(value)]


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("name", ["CLIPVisionModel, sdpa", "SiglipModel, eager", "DINOv3ViTModel, sdpa"])
def test_checkpointing_computes_each_block_again_in_the_backward_pass(name, kind, monkeypatch):
    model, inputs, features, blocks = make(name)
    model = adapted(model, lora_dropout=0.3).train()
    calls, parts = [], CompLoRABlock._fusible_parts
    monkeypatch.setattr(CompLoRABlock, "_fusible_parts", lambda *given: [calls.append(1), parts(*given)][1])

    def results() -> list[Tensor]:
        torch.manual_seed(1)
        leaf = inputs["pixel_values"].clone().requires_grad_()  # reentrant checkpointing follows an input's gradient
        output = features(model, {**inputs, "pixel_values": leaf})
        calls.clear()
        output.square().sum().backward()
        gradients = [leaf.grad, *(parameter.grad for parameter in ck.adapter_parameters(model))]
        model.zero_grad()
        return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]

    expected = results()
    assert calls == []
    model.gradient_checkpointing_enable({"use_reentrant": kind})
    again = results()
    assert len(calls) == blocks
    assert len(again) == len(expected)
    for mine, theirs in zip(again, expected, strict=True):
        assert_close(mine, theirs, 1e-10)
    if not CHECKPOINTS_IN_CALL:  # there the library checkpoints its plain blocks without gradients, too
        with torch.no_grad():
            features(model, inputs)  # torch warns where nothing has a gradient that could be computed again
    calls.clear()
    model.eval()
    results()
    assert calls == []


def test_each_tower_folds_its_factors_in_one_call(monkeypatch):
    model, inputs, *_ = make("CLIPModel, sdpa")
    model, sizes, fold = adapted(model), [], functional.fold_factors

    def counted(As: Any, *rest: Any, **options: Any) -> Any:
        sizes.append(len(As))
        return fold(As, *rest, **options)

    monkeypatch.setattr(functional, "fold_factors", counted)
    model(**inputs)
    assert sizes == [2 * len(ALL)] * 2


def test_attention_that_cannot_be_fused_is_the_library_s(runs):
    model, inputs, *_ = make("CLIPVisionModel, sdpa")
    model = adapted(model)
    expected = model(**inputs).pooler_output
    model.config._attn_implementation = "flex_attention"
    with pytest.MonkeyPatch.context() as patch:
        interface = type(model.encoder.layers[0].self_attn).forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
        patch.setitem(interface, "flex_attention", interface["sdpa"])
        assert_close(model(**inputs).pooler_output, expected, 1e-12)
    assert [fused for _, fused in runs] == [True, True, False, False]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_block_of_a_text_tower_that_gets_no_mask(attention, runs):
    """By sdpa it is causal where it is told to be, by eager attention it is not."""
    plain = make(f"CLIPTextModel, {attention}").model
    ours = ck.apply_complora(copy.deepcopy(plain), config(target_modules=ALL, towers="text"), progress=False)
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    for (_, block, *_), (_, own, *_) in zip(*map(library.residual_blocks, (plain, ours)), strict=True):
        for is_causal in (True, False):
            (mine,), (theirs,) = (parts_of(module(x, None, is_causal=is_causal)) for module in (own, block))
            assert_close(mine, theirs, 1e-6)  # eager attention takes its softmax in float32
    assert runs == [(5, True)] * 4


def test_a_block_runs_its_own_pass_where_it_is_given_what_is_not_known(runs):
    """A mask without dimensions for samples and heads, True where a pair takes part, and any other tensor."""
    plain = make("CLIPVisionModel, sdpa").model
    ours = ck.apply_complora(copy.deepcopy(plain), config(target_modules=ALL), progress=False)
    x, mask = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.ones(5, 5, dtype=torch.bool).tril()
    (_, block, *_), (_, own, *_) = (next(iter(library.residual_blocks(model))) for model in (plain, ours))
    for given, others in ((mask, {}), (None, {"another": x})):
        (mine,), (theirs,) = (parts_of(module(x, given, **others)) for module in (own, block))
        assert_close(mine, theirs, 1e-12)
    assert runs == []


@pytest.mark.parametrize("name", ["CLIPVisionModel, sdpa", "Dinov2Model, eager"])
def test_attention_with_a_scale_of_its_own(name, runs):
    plain, inputs, features, count = make(name)
    for module in plain.modules():
        for scale in {"scale", "scaling"} & vars(module).keys():
            setattr(module, scale, 0.05)
    ours = ck.apply_complora(copy.deepcopy(plain), config(target_modules=ALL), progress=False)
    assert_close(features(ours, inputs), features(plain, inputs), 1e-6)  # eager attention takes its softmax in float32
    assert [fused for _, fused in runs] == [True] * count


def test_dropout_of_attention_weights_is_drawn_in_training_alone():
    model, inputs, *_ = make("CLIPVisionModel, sdpa")
    model = adapted(model)
    for block in library.residual_blocks(model):
        attention: Any = block.module.get_submodule("self_attn")
        attention.dropout = 0.5
    assert torch.equal(model(**inputs).pooler_output, model(**inputs).pooler_output)
    model.train()
    assert not torch.equal(model(**inputs).pooler_output, model(**inputs).pooler_output)


# ---- truncated texts


@pytest.mark.parametrize("name", ["CLIPModel, sdpa", "CLIPModel, eager", "CLIPModel, masked texts, sdpa"])
def test_texts_are_truncated_in_steps_of_8(name, runs):
    model, inputs, *_ = make(name)
    model, whole = adapted(model), inputs["input_ids"]
    output = model.get_text_features(**{key: value for key, value in inputs.items() if key != "pixel_values"})
    assert runs == [(16, True)] * 2  # the longest text ends at the twelfth of 20 positions
    alone = model.text_model(**{key: value for key, value in inputs.items() if key != "pixel_values"})
    assert runs[2:] == [(CONTEXT, True)] * 2
    assert_close(output.pooler_output, model.text_projection(alone.pooler_output), 1e-12)
    assert_close(output.last_hidden_state, alone.last_hidden_state[:, :16], 1e-12)
    runs.clear()
    whole[0, CONTEXT - 1] = END  # another end, which is not the first
    model.get_text_features(whole)
    whole[0, : CONTEXT - 1] = 2
    model.get_text_features(whole)
    assert [length for length, _ in runs] == [16, 16, CONTEXT, CONTEXT]


@pytest.mark.parametrize(("end", "length"), [(5, 8), (17, CONTEXT)])
def test_a_text_ends_at_the_id_that_its_model_names(end, length, runs):
    """Though a larger one comes before it or after it."""
    plain, inputs, *_ = make("CLIPModel, sdpa")
    plain.text_model.eos_token_id = 7
    ids = inputs["input_ids"]
    ids[ids == 7] = 8
    ids[:, end] = 7
    ours = ck.apply_complora(copy.deepcopy(plain), config(target_modules=ALL), progress=False)
    features, expected = (model.get_text_features(ids).pooler_output for model in (ours, plain))
    assert_close(features, expected, 1e-12)
    assert runs == [(length, True)] * 2


def test_text_features_compile_in_one_graph_of_the_whole_context():
    model, inputs, *_ = make("CLIPModel, sdpa")
    model = adapted(model, layers=(1,), towers="text")
    expected = model.get_text_features(inputs["input_ids"]).pooler_output
    torch.compiler.reset()
    compiled: Any = torch.compile(model.get_text_features, backend="eager", fullgraph=True)
    output = compiled(inputs["input_ids"])
    assert output.last_hidden_state.shape[1] == CONTEXT
    assert_close(output.pooler_output, expected, 1e-12)


def test_texts_are_whole_where_all_their_positions_are_read(runs):
    model, inputs, *_ = make("SiglipModel, sdpa")
    adapted(model).get_text_features(inputs["input_ids"])
    model = adapted(make("CLIPModel, sdpa").model)
    output = model.get_text_features(inputs["input_ids"], output_hidden_states=True)
    assert output.hidden_states[0].shape[1] == CONTEXT
    mask = torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).tril().expand(2, 1, -1, -1)  # as the model itself makes it
    assert_close(model.get_text_features(inputs["input_ids"], mask).pooler_output, output.pooler_output, 1e-12)
    model.text_model.config.output_hidden_states = True
    assert model.get_text_features(inputs["input_ids"]).hidden_states[0].shape[1] == CONTEXT
    assert {length for length, _ in runs} == {CONTEXT}


# ---- image features


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The number of positions that each residual block has computed."""
    seen, run = [], CompLoRABlock.run_fused

    def observed(block: CompLoRABlock, x: Tensor, *arguments: Any, **options: Any) -> Tensor | None:
        y = run(block, x, *arguments, **options)
        seen.append(0 if y is None else y.shape[1])
        return y

    monkeypatch.setattr(CompLoRABlock, "run_fused", observed)
    return seen


def clip_of_images(**options: Any) -> tuple[Any, Tensor]:
    """An adapted CLIPModel, and images of five positions each."""
    row = make("CLIPModel, sdpa")
    return adapted(row.model, **options), row.inputs["pixel_values"]


def test_the_last_block_computes_the_class_token_alone_for_image_features(computed):
    model, images = clip_of_images()
    output = model.get_image_features(images)
    assert computed == [5, 1]
    assert output.last_hidden_state is None
    alone = model.vision_model(images)
    assert computed[2:] == [5, 5]
    features = model.visual_projection(alone.pooler_output)
    assert_close(output.pooler_output, features, 1e-12)
    weights = torch.linspace(-1, 2, features.numel(), dtype=torch.float64).view_as(features)
    factors = [p for name, p in model.named_parameters() if "vision_model" in name and p.requires_grad]
    found, expected = (torch.autograd.grad((weights * y).sum(), factors) for y in (output.pooler_output, features))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert any(gradient.norm() > 0.01 for gradient in expected)


WHOLE: dict[str, Any] = {
    "hidden states": lambda model, images: model.get_image_features(images, output_hidden_states=True),
    "the tower alone": lambda model, images: model.vision_model(images),
    "a hook": lambda model, images: hooked(model, "encoder").get_image_features(images),
    "a hook on the tower": lambda model, images: hooked(model, "").get_image_features(images),
    "checkpointing": lambda model, images: checkpointed(model).get_image_features(images),
    "a tower without an adapter": lambda _, images: clip_of_images(towers=("text",))[0].get_image_features(images),
    "an adapter that is off": lambda model, images: disabled(model, images),
}  # fmt: skip


def hooked(model: Any, part: str) -> Any:
    model.vision_model.get_submodule(part).register_forward_hook(lambda *_: None)
    return model


def checkpointed(model: Any) -> Any:
    model.train()
    model.gradient_checkpointing_enable()
    return model


def disabled(model: Any, images: Tensor) -> Any:
    with ck.disable_adapter(model):
        return model.get_image_features(images)


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("call", WHOLE.values(), ids=WHOLE)
def test_all_positions_of_images_are_computed_where_they_can_be_seen(call, computed):
    model, images = clip_of_images()
    output = call(model, images)
    assert output.last_hidden_state.shape[1] == 5
    assert 1 not in computed


def test_a_tuple_has_all_positions_of_images(computed):
    model, images = clip_of_images()
    hidden, pooled = model.get_image_features(images, return_dict=False)
    assert computed == [5, 5]
    assert hidden.shape[1] == 5
    assert_close(pooled, model.get_image_features(images).pooler_output, 1e-12)


class MeanOfPatches(transformers.CLIPVisionModel):
    """A tower of somebody's own that reads all positions."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().forward(*args, **kwargs)
        output.pooler_output = output.last_hidden_state[:, 1:].mean(1)
        return output


def own_tower(model: Any) -> None:
    tower = MeanOfPatches(model.vision_model.config).double().eval()
    tower.load_state_dict(model.vision_model.state_dict())
    model.vision_model = tower


def shared_block(model: Any) -> None:
    layers = model.vision_model.encoder.layers
    layers[0] = layers[-1]


def wrapped_encoder(model: Any) -> None:
    model.vision_model.encoder = checkpoint_wrapper(model.vision_model.encoder)


@pytest.mark.parametrize("change", [own_tower, shared_block, wrapped_encoder])
def test_all_positions_of_images_are_computed_where_they_are_needed(change, computed):
    row = make("CLIPModel, sdpa")
    change(row.model)
    images, plain = row.inputs["pixel_values"], copy.deepcopy(row.model)
    model = ck.apply_complora(row.model, config(target_modules=ALL, towers=("image",)), progress=False)
    features = model.get_image_features(images).pooler_output
    assert_close(features, plain.get_image_features(images).pooler_output, 1e-9)
    features.sum().backward()
    assert 1 not in computed
