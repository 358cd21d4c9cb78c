"""Torch's own transformers and torchvision's ViT, with a few thousand weights, as rows of a table of models."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from rows import Row, called, with_random_weights
from torch import nn

N, L, D = 3, 7, 24


def encoder(fused: int = 2, **options: Any) -> Row:
    options = {"batch_first": True, "norm_first": True, "activation": "gelu", **options}
    layer = nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.0, **options)
    nests = options["batch_first"] and not options["norm_first"]
    model = with_random_weights(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nests))
    shape = (N, L, D) if options["batch_first"] else (L, N, D)
    return Row(model, {"src": torch.randn(shape)}, called, fused)


def decoder() -> Row:
    layer = nn.TransformerDecoderLayer(D, 2, 2 * D, dropout=0.0, batch_first=True)
    model = with_random_weights(nn.TransformerDecoder(layer, 2))
    return Row(model, {"tgt": torch.randn(N, 4, D), "memory": torch.randn(N, L, D)}, called, 0)


def vit(**options: Any) -> Row:
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, D, 2 * D, num_classes=5, **options)
    return Row(with_random_weights(model), {"x": torch.randn(N, 3, 32, 32)}, called, 2)


OF_TORCH: dict[str, Callable[[], Row]] = {
    "torchvision ViT": vit,
    "torch encoder": encoder,
    "torch encoder, sequence first": functools.partial(encoder, batch_first=False),
    "torch encoder, norms after": functools.partial(encoder, 0, norm_first=False),
    "torch encoder, ReLU": functools.partial(encoder, 0, activation="relu"),
    "torch encoder without biases": functools.partial(encoder, bias=False),
    "torch decoder": decoder,
}
