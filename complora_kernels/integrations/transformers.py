"""CLIP, SigLIP, SigLIP 2, DINOv2 and DINOv3 of Hugging Face transformers, as a whole, a tower alone or with a head.

A residual block is known by its class, which is looked up by its name and package: the library is not imported. Its
attention keeps q, k and v in three linear layers; SwiGLU keeps two, or one of twice the width, in the place of fc1.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from complora_kernels.common.wrappers import named_modules, unwrap
from complora_kernels.integrations import Block, Encoders, Target
from complora_kernels.integrations.parts import is_identity, wrong_linear
from complora_kernels.integrations.torch import linear_target, peft_modules, uncalled
from complora_kernels.modules.block import AttentionParts, BlockParts, CompLoRABlock, Projection, Rotation
from complora_kernels.modules.extend import Extension, has_user_hooks, own_class
from complora_kernels.modules.forward_scope import LastBlock, Reading, Scoped, run_in_scope
from complora_kernels.modules.truncation import length_of_texts

__all__ = ["FusedBlock", "peft_modules", "uncalled"]

BLOCKS = {  # classes of residual blocks, and what the names of the classes of their parts begin with
    "CLIPEncoderLayer": "CLIP",
    "SiglipEncoderLayer": "Siglip",
    "Siglip2EncoderLayer": "Siglip2",
    "Dinov2Layer": "Dinov2",
    "Dinov2WithRegistersLayer": "Dinov2WithRegisters",
    "DINOv3ViTLayer": "DINOv3ViT",
}
PLAIN = ("layer_norm1", "self_attn", "layer_norm2", "mlp")
SCALED = ("norm1", "attention", "norm2", "mlp", "layer_scale1", "layer_scale2", "drop_path")
LINEARS = {
    "q": ("q_proj", "query"),
    "k": ("k_proj", "key"),
    "v": ("v_proj", "value"),
    "o": ("out_proj", "o_proj", "dense"),
    "fc1": ("fc1", "up_proj", "gate_proj", "weights_in"),
    "fc2": ("fc2", "down_proj", "weights_out"),
}
WORDS = {name: word for word, names in LINEARS.items() for name in names}
ACTIVATIONS = {"GELUActivation": "gelu", "GELUTanh": "gelu_tanh", "QuickGELUActivation": "quick_gelu"}
IMAGE_TOWERS = ("CLIPVisionModel", "CLIPVisionTransformer")  # of newer and of older versions
RECORDED = ("output_hidden_states", "output_attentions")
EXACT = {"GELUActivation": "GELU", "QuickGELUActivation": "QuickGELU"}  # as adapters of other libraries name them


def recognises(model: nn.Module) -> bool:
    return any(True for _ in residual_blocks(model))


def _is_known(module: Any, names: Collection[str]) -> bool:
    """Whether a module is of a class of transformers with such a name: a namesake may compute something else."""
    cls = own_class(module)
    return cls.__name__ in names and cls.__module__.partition(".")[0] == "transformers"


# ---- what is adapted


def residual_blocks(model: nn.Module) -> Iterator[Block]:
    for path, module in named_modules(model):
        layer = path.rpartition(".")[2]
        if layer.isdigit() and _is_known(module, BLOCKS):
            config: Any = getattr(unwrap(module.get_submodule("mlp")), "config", None)
            is_text = "text" in getattr(config, "model_type", "")
            yield Block(path, module, "text" if is_text else "image", int(layer))


def targets_in(block: Block, names: Collection[str]) -> Iterator[Target]:
    for path, module in named_modules(block.module):
        if WORDS.get(path.rpartition(".")[2]) in names:
            yield linear_target(f"{block.path}.{path}", module)


def missing(model: nn.Module, tower: str) -> str | None:
    return None


def encoders(model: nn.Module) -> Encoders | None:
    clip: Any = unwrap(model)
    if not all(callable(getattr(clip, name, None)) for name in ("get_image_features", "get_text_features")):
        return None

    def feature(output: Any) -> Tensor:  # a tensor itself in older versions
        return getattr(output, "pooler_output", output)

    return Encoders(
        lambda images: feature(clip.get_image_features(pixel_values=images)),
        lambda tokens: feature(clip.get_text_features(input_ids=tokens)),
        getattr(clip, "logit_scale", None),
    )


def callers(model: nn.Module, layers: Collection[nn.Module]) -> list[tuple[nn.Module, type[Extension]]]:
    return []


def activations(model: nn.Module) -> dict[str, str]:
    found = {}
    for block in residual_blocks(model):
        name = type(_activation(block.module.get_submodule("mlp"))).__name__
        found[block.tower] = EXACT.get(name, name)
    return found


def _activation(mlp: Any) -> Any:
    return _first(mlp, "activation_fn", "act_fn", "activation")


# ---- towers


class Features(Extension):
    """A `CLIPModel` whose features cost no more positions than they read.

    `get_text_features` computes none after the longest text of the batch, in steps of 8; `last_hidden_state` of the
    texts and what hooks see end there, as if the tokenizer had padded to it. In `get_image_features` the last block
    computes the class token alone, where it is fused; the output then has no `last_hidden_state` (None), so that its
    first entry is the feature; `vision_model(...)` gives the states. The model's own forward pass calls both.

    Features and gradients are those of all positions, up to rounding; with dropout the masks are drawn for other
    shapes, so that they are equal in distribution only. All positions are computed under torch.compile, where hidden
    states, attentions or tuples are asked for, by the towers when they are called alone, and in the last block of the
    image tower where somebody hooked it, its encoder or the norm behind it, and where it is checkpointed.
    """

    text_model: Any
    vision_model: Any

    def get_text_features(
        self,
        input_ids: Tensor,  # [N, L]
        attention_mask: Tensor | None = None,  # [N, L]
        position_ids: Tensor | None = None,  # [1, L] or [N, L]
        **kwargs: Any,
    ) -> Any:
        plain: Any = super()
        given = (input_ids, attention_mask, position_ids)
        if _reads_features(self.text_model, kwargs) and all(t is None or t.dim() == 2 for t in given):
            eos_id = self.text_model.eos_token_id
            length = length_of_texts(input_ids, None if eos_id == 2 else eos_id)  # 2: a text ends at its largest id
            given = (None if tensor is None else tensor[:, :length] for tensor in given)
        return plain.get_text_features(*given, **kwargs)

    def get_image_features(
        self,
        pixel_values: Tensor,  # [N, 3, H, W]
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        plain: Any = super()
        tower = self.vision_model
        block = _last_block(tower)
        block = block if block is None or _reads_features(tower, kwargs) else None
        if block is None:
            return plain.get_image_features(pixel_values, *args, **kwargs)
        output = run_in_scope({}, Reading(block), plain.get_image_features, pixel_values, *args, **kwargs)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None or hidden.shape[1] > 1:
            return output
        return type(output)(**{name: value for name, value in output.items() if value is not hidden})


def _reads_features(tower: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call with these arguments gives the feature of a tower, and nothing else of its positions."""
    config = unwrap(tower).config
    asked = any(kwargs.get(name, getattr(config, name, False)) for name in RECORDED)
    return not torch.compiler.is_compiling() and not asked and kwargs.get("return_dict") is not False


def _last_block(tower: Any) -> nn.Module | None:
    """The last block of a `CLIPVisionModel`, where it is one of ours and nobody sees what comes out of it."""
    if not _is_known(tower, IMAGE_TOWERS) or not _is_known(tower.encoder, ["CLIPEncoder"]):
        return None  # it may read other positions; a wrapper may compute them again without knowing which are read
    layers, norm = tower.encoder.layers, tower.post_layernorm
    block = layers[-1] if type(layers) is nn.ModuleList and len(layers) else None
    if not isinstance(block, FusedBlock) or sum(layer is block for layer in layers) != 1:
        return None
    if type(norm) is not nn.LayerNorm or (block.gradient_checkpointing and block.training):
        return None
    seen = any(has_user_hooks(module, FusedBlock.recorders) for module in (tower, tower.encoder))
    return None if seen else LastBlock(block, tower.encoder, norm).alone


def towers(model: nn.Module) -> list[tuple[nn.Module, type[Scoped]]]:
    """The modules that hold the lists of blocks: every adapted layer of a tower is below one."""
    modules = dict(named_modules(model))
    lists = dict.fromkeys(block.path.rpartition(".")[0] for block in residual_blocks(model))
    return [(modules[path.rpartition(".")[0]], Scoped) for path in lists]


def truncation(model: nn.Module) -> list[tuple[nn.Module, type[Extension]]]:
    """A `CLIPModel`, whose text features are read where a text ends under a causal mask."""
    model = unwrap(model)
    if not _is_known(model, ["CLIPModel"]):
        return []
    text_model = unwrap(model.get_submodule("text_model"))
    return [(model, Features)] if _is_known(text_model, ["CLIPTextModel"]) else []


# ---- residual blocks


class FusedBlock(CompLoRABlock):
    """An encoder layer. Under other implementations of attention than eager and sdpa it runs its own forward pass."""

    recorders = "transformers.utils.output_capturing"
    gradient_checkpointing: bool
    _gradient_checkpointing_func: Callable[..., Tensor]

    def parts(self) -> BlockParts | str:
        return parts_of_block(self)

    def forward(
        self,
        hidden_states: Tensor,  # [N, L, d]
        attention_mask: Tensor | None = None,  # [N, 1, L, L]: added to the logits, or True where a pair takes part
        **kwargs: Any,
    ) -> Tensor:  # [N, L, d]
        # Newer versions checkpoint in the outermost `forward` of a class, which is this one, older ones in `__call__`.
        in_forward = type(self).__call__ is nn.Module.__call__
        if in_forward and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            run = functools.partial(self._run_layer, **kwargs)
            return self._gradient_checkpointing_func(run, hidden_states, attention_mask)
        return self._run_layer(hidden_states, attention_mask, **kwargs)

    def _run_layer(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        attention: Any = self._modules.get("self_attn") or self._modules["attention"]
        # Tensors that other implementations of attention take, such as a position bias, are unknown here.
        others = any(isinstance(value, Tensor) and value.dim() > 0 for value in kwargs.values())
        recorded = kwargs.get("output_attentions", attention.config.output_attentions)
        if not others and not recorded and (attention_mask is None or attention_mask.dim() == 4):
            is_causal = attention_mask is None and attention.config._attn_implementation == "sdpa"
            is_causal = is_causal and kwargs.get("is_causal", attention.is_causal)
            rotate = _rotation(self, kwargs.get("position_embeddings"))
            y = self.run_fused(hidden_states, attention_mask, is_causal=is_causal, rotate=rotate)
            if y is not None:
                return y
        return super().forward(hidden_states, attention_mask, **kwargs)


def _rotation(block: nn.Module, positions: tuple[Tensor, Tensor] | None) -> Rotation | None:
    """How the library rotates queries and keys by the cosines and sines of their positions."""
    if positions is None:
        return None
    rotate = sys.modules[own_class(block).__module__].apply_rotary_pos_emb
    return lambda q, k: rotate(q, k, *positions)


def parts_of_block(block: nn.Module) -> BlockParts | str:
    if not _is_known(block, BLOCKS):
        return f"it is a {own_class(block).__name__}, expected one of {', '.join(BLOCKS)}"
    kind, modules = BLOCKS[own_class(block).__name__], dict[str, Any](block._modules)
    names = SCALED if "layer_scale1" in modules else PLAIN
    if modules.keys() != set(names):
        return f"it consists of {', '.join(modules)}, expected {', '.join(names)}"
    norm1, attention, norm2, mlp, *others = parts = [modules[name] for name in names]
    expected = ("LayerNorm", f"{kind}Attention", "LayerNorm", f"{kind}MLP", *[f"{kind}LayerScale"] * 2)
    for name, part, cls in zip(names, parts, expected, strict=False):
        known = type(part) is nn.LayerNorm and part.weight is not None if cls == "LayerNorm" else _is_known(part, [cls])
        if not known:
            return f"{name} is a {type(part).__name__}, expected a {cls}"
    if others and not is_identity(others[2]) and getattr(others[2], "drop_prob", None) != 0:
        return f"drop_path is {others[2]}, expected nn.Identity"
    holders = {"fc1": mlp, "fc2": mlp}
    linears = {word: _first(holders.get(word, attention), *found) for word, found in LINEARS.items()}
    wrong = next(filter(None, itertools.starmap(wrong_linear, linears.items())), None)
    if wrong is not None:
        return wrong
    config, activation = attention.config, _activation(mlp)
    if config._attn_implementation not in ("eager", "sdpa"):
        return f"its attention is {config._attn_implementation!r}, expected 'eager' or 'sdpa'"
    if not _is_known(activation, ACTIVATIONS):
        return f"the activation of mlp is a {type(activation).__name__}, expected one of {', '.join(ACTIVATIONS)}"
    project_out = out = linears["o"]
    if others:
        project_out = lambda mixed: others[0](out(mixed))
    dropout_p = _first(attention, "dropout", "attention_dropout") if attention.training else 0.0
    heads, scale = _first(attention, "num_heads", "num_attention_heads"), _first(attention, "scale", "scaling")
    projections = tuple(Projection(name, linears[name], linears[name].weight, linears[name].bias) for name in "qkv")
    inner = AttentionParts(projections, out, project_out, heads, False, scale, dropout_p)
    mlp_scale = others[1].lambda1 if others else None
    kind = ACTIVATIONS[type(activation).__name__]
    return BlockParts(norm1, inner, norm2, linears["fc1"], kind, linears["fc2"], mlp_scale)


def _first(module: Any, *names: str) -> Any:
    """The first of these attributes that a module has; None where it has none."""
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
