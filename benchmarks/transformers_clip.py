"""transformers' own CLIP with the weights of open_clip's: adapted by PEFT, which most people have, and by ours."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import complora_kernels as ck
from benchmarks import baselines
from benchmarks.baselines import Adapter, Trainee
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.config import CompLoRAConfig

ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu"}
BLOCKS = {
    r"^visual\.transformer\.resblocks": "vision_model.encoder.layers",
    r"^transformer\.resblocks": "text_model.encoder.layers",
    r"\.ln_([12])": r".layer_norm\1",
    r"\.([qkv]|out)_proj": r".self_attn.\1_proj",
    r"\.c_fc": ".mlp.fc1",
    r"\.c_proj": ".mlp.fc2",
}
OTHERS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}


class TransformersCLIP(nn.Module):
    """`CLIPModel` under the names of open_clip's methods."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.clip, self.logit_scale = clip, clip.logit_scale

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:  # [N, 3, H, W] to [N, D]
        features = self.clip.get_image_features(pixel_values=images).pooler_output
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, texts: Tensor, normalize: bool = False) -> Tensor:  # [C, context] to [C, D]
        features = self.clip.get_text_features(input_ids=texts).pooler_output
        return F.normalize(features, dim=-1) if normalize else features


def by_peft(plain: Any, weights: dict[str, Adapter], config: CompLoRAConfig) -> Trainee:
    model = with_weights_of(plain)
    paths = {name: f"clip.{their_name(name)}" for name in weights}
    return Trainee(model, baselines.adapt_by_peft(model, paths, weights, config), plain=True)


def by_ours(plain: Any, weights: dict[str, Adapter], config: CompLoRAConfig) -> Trainee:
    model, factors = with_weights_of(plain), {}
    ck.apply_complora(model.clip, config, progress=False)
    layers = adapted_layers(model)
    for name, (A, B, _) in weights.items():
        factors[name] = layers[f"clip.{their_name(name)}"].factors("")
        with torch.no_grad():
            factors[name][0].copy_(A)
            factors[name][1].copy_(B)
    return Trainee(model, factors)


def with_weights_of(plain: Any) -> TransformersCLIP:
    """A model that shares the frozen parameters of open_clip's; its projections [D, width] are copies, transposed."""
    import transformers

    config = transformers.CLIPConfig(
        vision_config={
            "image_size": plain.visual.image_size[0],
            "patch_size": plain.visual.conv1.kernel_size[0],
            **_tower(plain.visual.transformer),
        },
        text_config={
            "vocab_size": plain.token_embedding.num_embeddings,
            "max_position_embeddings": plain.context_length,
            "eos_token_id": 2,  # 2 means that a text ends at its largest id, as in OpenAI's and open_clip's
            **_tower(plain.transformer),
        },
        projection_dim=plain.text_projection.shape[1],
    )
    with torch.device("meta"):
        clip = transformers.CLIPModel._from_config(config, attn_implementation="sdpa")
    state = {their_name(name): tensor.detach() for name, tensor in baselines.with_blocks(plain).state_dict().items()}
    state |= {name: state[name].mT.contiguous() for name in ("visual_projection.weight", "text_projection.weight")}
    clip.load_state_dict(state, assign=True)
    for tower in (clip.vision_model, clip.text_model):
        embeddings = tower.embeddings
        positions = torch.arange(embeddings.position_ids.shape[1], device=plain.logit_scale.device)
        embeddings.register_buffer("position_ids", positions[None], persistent=False)
    return TransformersCLIP(clip.requires_grad_(False))


def _tower(transformer: Any) -> dict[str, Any]:
    block = transformer.resblocks[0]
    return {
        "hidden_size": block.ln_1.normalized_shape[0],
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": ACTIVATIONS[type(block.mlp.gelu).__name__],
        "layer_norm_eps": block.ln_1.eps,
    }


def their_name(name: str) -> str:
    """What transformers calls a parameter or a module of a model with `baselines.Block`s."""
    if "resblocks" in name:
        for pattern, replacement in BLOCKS.items():
            name = re.sub(pattern, replacement, name)
        return name
    ours = next(known for known in OTHERS if name == known or name.startswith(f"{known}."))
    return OTHERS[ours] + name.removeprefix(ours)
