"""The bundled models: how each is loaded with its tokenizer and its preprocessing, from the package or a folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from complora_kernels.fewshot import glyphs
from complora_kernels.fewshot.config import GLYPHS, PICTURES
from complora_kernels.fewshot.pictures import model as pictures

Tokenizer = Callable[..., Tensor]  # N texts -> int64 [N, L]


class Loaded(NamedTuple):
    """A bundled model, as `Backbone` has it."""

    model: Any
    tokenize: Tokenizer
    preprocess: Callable[[Tensor], Tensor]  # uint8 [N, 3, H, W] -> float32 [N, 3, S, S], normalised
    size: int  # S
    normalize: Callable[[Tensor], Tensor]  # float32 [N, 3, H, W] in [0, 1] -> the same, normalised


class World(NamedTuple):
    """One of the bundled models."""

    assets: Path  # the folder of its files in the package
    weights_file: str
    command: str  # that makes another folder of such files
    load: Callable[[torch.device, Path], Loaded]
    load_tokenizer: Callable[[Path], Tokenizer]


def _load_glyphs(device: torch.device, folder: Path) -> Loaded:
    model, tokenize, preprocess = glyphs.load_glyph_clip(device, folder)
    return Loaded(model, tokenize, preprocess, glyphs.IMAGE_SIZE, glyphs.normalize)


def _load_pictures(device: torch.device, folder: Path) -> Loaded:
    model, tokenize, size = pictures.load_picture_clip(device, folder)
    return Loaded(model, tokenize, partial(pictures.preprocess, size=size), size, pictures.normalize)


WORLDS = {
    GLYPHS: World(
        glyphs.ASSETS, glyphs.WEIGHTS_FILE, "complora pretrain-glyphs", _load_glyphs, glyphs.load_glyph_tokenizer
    ),
    PICTURES: World(
        pictures.ASSETS,
        pictures.WEIGHTS_FILE,
        "complora pretrain-pictures",
        _load_pictures,
        pictures.load_picture_tokenizer,
    ),
}
