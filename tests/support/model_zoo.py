"""The models of every library: the table that `test_models.py` goes through.

A library has a file with its rows. To add a model, write a function that makes its `Row`.
"""

from __future__ import annotations

from typing import Any

from clip_models import OF_CLIP
from rows import Row, in_float64
from timm_models import OF_TIMM
from torch_models import OF_TORCH
from transformers_models import OF_TRANSFORMERS

MODELS = OF_TRANSFORMERS | OF_TIMM | OF_CLIP | OF_TORCH


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
