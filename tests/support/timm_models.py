"""Models of timm with a few thousand weights, as rows of a table of models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import timm
import torch
from rows import Row, called, with_random_weights

SIZE = 32
TINY = {"img_size": SIZE, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
STAGES = {"embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3)}
SWIN = {"img_size": SIZE, "patch_size": 4, "window_size": 4, "num_classes": 5, **STAGES}


def of_timm(name: str, fused: int, **options: Any) -> Row:
    model = with_random_weights(timm.create_model(name, **options))
    return Row(model, {"x": torch.randn(3, 3, SIZE, SIZE)}, called, fused)


def vit(fused: int = 2, **options: Any) -> Row:
    return of_timm("vit_tiny_patch16_224", fused, **{**TINY, **options})


def tiny(name: str, fused: int = 0, **options: Any) -> Callable[[], Row]:
    return functools.partial(of_timm, name, fused, **TINY, **options)


SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}


OF_TIMM: dict[str, Callable[[], Row]] = {
    "timm ViT": vit,
    "timm ViT, mean of the tokens": functools.partial(vit, global_pool="avg"),
    "timm ViT, pooled by attention": functools.partial(vit, global_pool="map", class_token=False),
    "timm ViT without biases": functools.partial(vit, qkv_bias=False, proj_bias=False),
    "timm ViT, QuickGELU and a norm before": functools.partial(vit, act_layer="quick_gelu", pre_norm=True),
    "timm ViT, GELU by its tanh": functools.partial(vit, act_layer="gelu_tanh"),
    "timm ViT, norms of q and k": functools.partial(vit, 0, qk_norm=True),
    "timm DeiT, two class tokens": tiny("deit_tiny_distilled_patch16_224", 2),
    "timm DeiT 3, scaled residuals": tiny("deit3_small_patch16_224", 2),
    "timm EVA 02": tiny("eva02_tiny_patch14_224"),
    "timm EVA": tiny("eva_giant_patch14_224", 2),
    "timm EVA 02, three projections": tiny("eva02_base_patch16_clip_224"),
    "timm DINOv3": tiny("vit_small_patch16_dinov3", 2),
    "timm BEiT": tiny("beit_base_patch16_224", 2),
    "timm BEiT, one table of positions": tiny("beit_base_patch16_224", 2, **SHARED),
    "timm ViT, relative positions, norms after": tiny("vit_relpos_medium_patch16_rpn_224"),
    "timm Swin": functools.partial(of_timm, "swin_tiny_patch4_window7_224", 0, **SWIN),
    "timm Swin v2": functools.partial(of_timm, "swinv2_tiny_window8_256", 0, **SWIN),
}
