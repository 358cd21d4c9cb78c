"""Models of timm with a few thousand random weights, as rows of a table of models.

Each function gives a model, its inputs by name, a function (model, inputs) of the features [N, D], and the number of
residual blocks that are fused when all are adapted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

SIZE = 32
TINY = {"img_size": SIZE, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
STAGES = {"embed_dim": 12, "depths": (2, 1), "num_heads": (2, 3)}
SWIN = {"img_size": SIZE, "patch_size": 4, "window_size": 4, "num_classes": 5, **STAGES}

Row = tuple[nn.Module, dict[str, Tensor], Callable[[Any, dict[str, Tensor]], Tensor], int]


def of_timm(name: str, fused: int, **options: Any) -> Row:
    """In evaluation mode; parameters, biases too, are random and of the size that trained ones have."""
    model = timm.create_model(name, **options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
    return model, {"x": torch.randn(3, 3, SIZE, SIZE)}, lambda model, inputs: model(**inputs), fused


def vit(fused: int = 2, **options: Any) -> Row:
    return of_timm("vit_tiny_patch16_224", fused, **{**TINY, **options})


OF_TIMM: dict[str, Callable[[], Row]] = {
    "timm ViT": vit,
    "timm ViT, mean of the tokens": functools.partial(vit, global_pool="avg"),
    "timm ViT, pooled by attention": functools.partial(vit, global_pool="map", class_token=False),
    "timm ViT without biases": functools.partial(vit, qkv_bias=False, proj_bias=False),
    "timm ViT, QuickGELU and a norm before": functools.partial(vit, act_layer="quick_gelu", pre_norm=True),
    "timm ViT, norms of q and k": functools.partial(vit, 0, qk_norm=True),
    "timm DeiT, two class tokens": functools.partial(of_timm, "deit_tiny_distilled_patch16_224", 2, **TINY),
    "timm DeiT 3, scaled residuals": functools.partial(of_timm, "deit3_small_patch16_224", 0, **TINY),
    "timm EVA 02, three projections": functools.partial(of_timm, "eva02_tiny_patch14_224", 0, **TINY),
    "timm EVA": functools.partial(of_timm, "eva_giant_patch14_224", 0, **TINY),
    "timm EVA 02 in CLIP": functools.partial(of_timm, "eva02_base_patch16_clip_224", 0, **TINY),
    "timm DINOv3": functools.partial(of_timm, "vit_small_patch16_dinov3", 0, **TINY),
    "timm BEiT": functools.partial(of_timm, "beit_base_patch16_224", 0, **TINY),
    "timm ViT, relative positions, norms after": functools.partial(
        of_timm, "vit_relpos_medium_patch16_rpn_224", 0, **TINY
    ),
    "timm Swin": functools.partial(of_timm, "swin_tiny_patch4_window7_224", 0, **SWIN),
    "timm Swin v2": functools.partial(of_timm, "swinv2_tiny_window8_256", 0, **SWIN),
}
