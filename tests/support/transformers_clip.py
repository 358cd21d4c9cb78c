"""transformers' `CLIPModel` with the weights of `small_clip`, which it names and arranges otherwise."""

from __future__ import annotations

from typing import Any

import torch
from small_clip import small_clip
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

SIZES = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2}
TEXT = {"vocab_size": 20, "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
VISION = {"image_size": 16, "patch_size": 8}
COMMON = {"projection_dim": 16, "hidden_act": "gelu"}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of open_clip's CLIP in the layout of transformers, written out by hand."""
    result = {
        "logit_scale": state["logit_scale"],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_projection.weight": state["text_projection"].T,
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "visual_projection.weight": state["visual.proj"].T,
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    towers = {"visual.transformer": "vision_model.encoder", "transformer": "text_model.encoder"}
    for kind in ("weight", "bias"):
        result |= {f"{new}.{kind}": state[f"{old}.{kind}"] for old, new in norms.items()}
        for old_tower, new_tower in towers.items():
            for i in range(2):
                old_block, new_block = f"{old_tower}.resblocks.{i}", f"{new_tower}.layers.{i}"
                result |= {
                    f"{new_block}.{new}.{kind}": state[f"{old_block}.{old}.{kind}"] for old, new in BLOCK.items()
                }
                packed = state[f"{old_block}.attn.in_proj_{kind}"].chunk(3)
                result |= {f"{new_block}.self_attn.{name}_proj.{kind}": packed["qkv".index(name)] for name in "qkv"}
    return result


def transformers_clip() -> Any:
    text, vision = {**SIZES, **TEXT, **COMMON}, {**SIZES, **VISION, **COMMON}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.load_state_dict(renamed(small_clip().state_dict()))
    return model


@torch.no_grad()
def features(model: Any) -> Tensor:
    """What both towers make of the images and texts of `small_clip.features`."""
    generator = torch.Generator().manual_seed(5)
    dtype = next(model.parameters()).dtype
    images = torch.randn(3, 3, 16, 16, generator=generator).to(dtype)
    texts = torch.randint(1, 20, (3, 6), generator=generator)
    pooled = [model.get_image_features(pixel_values=images), model.get_text_features(input_ids=texts)]
    return torch.cat([getattr(part, "pooler_output", part) for part in pooled])
