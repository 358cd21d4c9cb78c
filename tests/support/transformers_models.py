"""Models of transformers with a few thousand random weights, as rows of a table of models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from rows import Row, with_random_weights
from torch import Tensor

N, WIDTH, PIXELS, PATCH, CONTEXT, WORDS = 2, 32, 16, 8, 20, 40
END = WORDS - 1  # the id that ends a text

VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": PIXELS,
    "patch_size": PATCH,
}
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": END,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "projection_size": WIDTH,
}
OUTPUTS = ("logits", "image_embeds", "text_embeds", "last_hidden_state", "pooler_output")


def read_outputs(model: Any, inputs: dict[str, Tensor]) -> Tensor:  # [N, D]
    """All results of a model that its users read."""
    output = model(**inputs)
    return torch.cat([output[key].flatten(1) for key in OUTPUTS if output.get(key) is not None], 1)


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(N, 3, PIXELS, PIXELS)}


def patches() -> dict[str, Tensor]:
    """Images of different sizes as SigLIP 2 takes them: patches, and which of them are padding."""
    sizes, count = torch.tensor([[2, 3], [2, 2]]), 6
    mask = (torch.arange(count) < sizes.prod(1, keepdim=True)).long()
    pixels = torch.randn(N, count, 3 * PATCH**2) * mask[..., None]
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": sizes}


def texts(*, masked: bool = False) -> dict[str, Tensor]:
    """Texts that end at different places; what follows is random, and left out by the mask where there is one."""
    ids, ends = torch.randint(2, END, (N, CONTEXT)), torch.tensor([4, 11])
    ids[torch.arange(N), ends] = END
    return {"input_ids": ids, **({"attention_mask": (torch.arange(CONTEXT) <= ends[:, None]).long()} if masked else {})}


def of_transformers(
    name: str,  # of the class, up to a comma
    options: dict[str, Any],  # of its configuration
    batch: Callable[[], dict[str, Tensor]],
    fused: int,
    attention: str,
) -> Row:
    cls = getattr(transformers, name.partition(",")[0])
    model = cls._from_config(cls.config_class(**options), attn_implementation=attention)
    if not any(path.endswith("q_proj") for path, _ in model.named_modules()):
        fused = 0  # DINOv2 of older versions keeps q, k and v deeper
    return Row(with_random_weights(model), batch(), read_outputs, fused)


CLIP = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 24, "num_labels": WIDTH}
OLDER = {**CLIP, "text_config": {**TEXT, "eos_token_id": 2}}  # a text ends at its largest id
PATCHED = {**VISION, "num_patches": 16}
DINO = {**VISION, "hidden_act": "gelu", "mlp_ratio": 2, "num_labels": WIDTH}
TABLE: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Tensor]], int]] = {
    "CLIPModel": (CLIP, lambda: images() | texts(), 4),
    "CLIPModel, masked texts": (OLDER, lambda: images() | texts(masked=True), 4),
    "CLIPVisionModel": (VISION, images, 2),
    "CLIPVisionModelWithProjection": (VISION, images, 2),
    "CLIPTextModel": (TEXT, texts, 2),
    "CLIPTextModelWithProjection": (TEXT, lambda: texts(masked=True), 2),
    "CLIPForImageClassification": (CLIP, images, 2),
    "SiglipModel": (CLIP, lambda: images() | texts(), 4),
    "SiglipVisionModel": (VISION, images, 2),
    "SiglipTextModel": (TEXT, lambda: texts(masked=True), 2),
    "Siglip2Model": ({**CLIP, "vision_config": PATCHED}, lambda: patches() | texts(), 4),
    "Siglip2VisionModel": (PATCHED, patches, 2),
    "Dinov2Model": (DINO, images, 2),
    "Dinov2Model, SwiGLU": ({**DINO, "use_swiglu_ffn": True}, images, 0),
    "Dinov2ForImageClassification": (DINO, images, 2),
    "Dinov2WithRegistersModel": (DINO, images, 2),
    "DINOv3ViTModel": ({**DINO, "num_register_tokens": 2}, images, 2),
    "DINOv3ViTModel, SwiGLU": ({**DINO, "num_register_tokens": 1, "use_gated_mlp": True}, images, 0),
}

OF_TRANSFORMERS: dict[str, Callable[[], Row]] = {
    f"{name}, {attention}": functools.partial(of_transformers, name, *arguments, attention)
    for name, arguments in TABLE.items()
    for attention in ("eager", "sdpa")
}
