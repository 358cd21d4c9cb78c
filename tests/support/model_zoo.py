"""The models of every library: the table that `test_models.py` goes through.

A library has a file with its rows. To add a model, write a function that makes its `Row`.
"""

from __future__ import annotations

import copy
from typing import Any

from clip_models import OF_CLIP
from rows import Row, in_float64
from timm_models import OF_TIMM
from tiny_models import config, randomise
from torch_models import OF_TORCH
from transformers_models import OF_TRANSFORMERS

import complora_kernels as ck

MODELS = OF_TRANSFORMERS | OF_TIMM | OF_CLIP | OF_TORCH
REPRESENTATIVES = (  # some of each library, where all would take too long
    "CLIPModel, sdpa",
    "Siglip2Model, sdpa",
    "Dinov2Model, sdpa",
    "timm ViT",
    "timm EVA",
    "timm BEiT",
    "open_clip CLIP",
    "open_clip SigLIP",
    "OpenAI's CLIP",
    "torchvision ViT",
)
ALL = ("q", "k", "v", "o", "fc1", "fc2")


def make(name: str) -> Row:
    """A row in float64 with a frozen model, the same at every call."""
    row = in_float64(MODELS[name])
    row.model.requires_grad_(False)
    return row


def exact(model: Any) -> Any:
    """`model`, computing in float64 throughout: eager attention of transformers takes its softmax in float32."""
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("sdpa")
    return model


def adapted(row: Row, *targets: str, **more: Any) -> Any:
    """A copy with random factors, which reach into the protected subspaces, as those of AdamW do."""
    options = config(target_modules=targets, sides="both", **more)
    return randomise(ck.apply_complora(copy.deepcopy(row.model), options, progress=False))
