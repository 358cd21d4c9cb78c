"""Models that open_clip and OpenAI's package build, with a few thousand weights, as rows of a table of models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import openai_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, VisionTransformer
from rows import Row, called, with_random_weights
from timm_models import TINY, timm
from torch import Tensor

N, WIDTH, CONTEXT, WORDS, DIM = 3, 24, 12, 20, 16
TEXT: dict[str, Any] = {"context_length": CONTEXT, "vocab_size": WORDS, "width": WIDTH, "heads": 2, "layers": 2}
SIGLIP_TEXT = {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
SIGLIP2_TEXT = {**SIGLIP_TEXT, "act_kwargs": {"approximate": "tanh"}}


def images() -> Tensor:
    return torch.randn(N, 3, 32, 32)


def texts() -> Tensor:
    """Texts that end, with the largest id, at different places."""
    ids = torch.randint(1, WORDS - 1, (N, CONTEXT))
    ids[torch.arange(N), torch.tensor([6, 3, 4])] = WORDS - 1
    return ids


def both_features(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return torch.cat([model.encode_image(inputs["image"]), model.encode_text(inputs["text"])], 1)


def captions(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """All that CoCa's training reads."""
    output = model(**inputs)
    return torch.cat([output[key].flatten(1) for key in ("image_features", "text_features", "logits")], 1)


def image_tower() -> Row:
    model = VisionTransformer(32, 16, WIDTH, layers=2, heads=2, mlp_ratio=2.0, output_dim=DIM)
    return Row(with_random_weights(model), {"x": images()}, called, 2)


def text_tower(**options: Any) -> Row:
    model = TextTransformer(**{**TEXT, "output_dim": DIM, **options})
    return Row(with_random_weights(model), {"text": texts()}, called, 2)


def clip() -> Row:
    vision: Any = {"image_size": 32, "patch_size": 16, "width": WIDTH, "layers": 2, "head_width": WIDTH // 2}
    model = CLIP(DIM, vision, TEXT)  # type: ignore[arg-type]
    return Row(with_random_weights(model), {"image": images(), "text": texts()}, both_features, 4)


def with_trunk(text: dict[str, Any], pool: str) -> Row:
    """A `CustomTextCLIP` whose image tower is timm's."""
    vision: Any = {"timm_model_name": "test_vit", "timm_pool": pool, "timm_proj": "none", "image_size": 32}
    model: Any = CustomTextCLIP(WIDTH, vision, text)  # type: ignore[arg-type]
    options: dict[str, Any] = {"global_pool": pool, "class_token": pool != "map", "num_classes": 0}
    model.visual.trunk = timm.create_model("vit_tiny_patch16_224", **{**TINY, **options})  # a smaller one
    return Row(with_random_weights(model), {"image": images(), "text": texts()}, both_features, 4)


def coca() -> Row:
    vision: dict[str, Any] = {"image_size": 32, "patch_size": 16, "width": WIDTH, "layers": 2, "head_width": 12}
    pooling = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True}
    text = {**TEXT, "embed_cls": True, "output_tokens": True}
    model = CoCa(WIDTH, {**TEXT, "vocab_size": WORDS}, text, {**vision, **pooling})  # type: ignore[arg-type]
    return Row(with_random_weights(model), {"image": images(), "text": texts()}, captions, 6)


def openai() -> Row:
    model = openai_clip.CLIP(DIM, 32, 2, WIDTH, 16, CONTEXT, WORDS, WIDTH, 2, 2)
    return Row(with_random_weights(model), {"image": images(), "text": texts()}, both_features, 4)


OF_CLIP: dict[str, Callable[[], Row]] = {
    "open_clip CLIP": clip,
    "open_clip image tower": image_tower,
    "open_clip text tower": text_tower,
    "open_clip text tower, all tokens": functools.partial(text_tower, no_causal_mask=True, pool_type="last"),
    "open_clip with timm": functools.partial(with_trunk, TEXT, "token"),
    "open_clip SigLIP": functools.partial(with_trunk, SIGLIP_TEXT, "map"),
    "open_clip SigLIP 2": functools.partial(with_trunk, SIGLIP2_TEXT, "map"),
    "open_clip CoCa": coca,
    "OpenAI's CLIP": openai,
}
