"""The pictures model: an open_clip CLIP that knows some 1,900 things by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import load_file, save
from torch import Tensor

from complora_kernels.common.files import write_atomically
from complora_kernels.fewshot.datasets.pictures import ASSETS, KEPT
from complora_kernels.fewshot.glyphs import build_clip
from complora_kernels.fewshot.pictures.augment import MEAN, STD, normalize, over
from complora_kernels.fewshot.pictures.sources import Pictures
from complora_kernels.fewshot.pictures.tokenizer import PictureTokenizer, load_tokenizer

WEIGHTS_FILE = "picture_clip.safetensors"
CONFIG_FILE = "picture_clip.json"
TOKENIZER_FILE = "tokenizer.json"
HEAD_WIDTH = 32
TEMPLATE = "a photo of a {}."

__all__ = ["ASSETS", "MEAN", "STD", "load_picture_clip", "preprocess", "save_model", "zero_shot"]


def preprocess(images: Tensor, size: int) -> Tensor:
    """Resize uint8 images [N, 3, H, W] to float32 [N, 3, size, size], normalised."""
    pixels = images.float() / 255
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False, antialias=True)
    return normalize(pixels)


def save_model(folder: Path, model: CLIP, description: Mapping[str, Any], tokenizer: PictureTokenizer) -> None:
    """Write the weights in half precision, the configuration and the tokenizer, each as a whole."""
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    tokenizer.save(folder / TOKENIZER_FILE)
    write_atomically(folder / CONFIG_FILE, json.dumps(description, indent=2) + "\n")
    write_atomically(folder / WEIGHTS_FILE, save(weights))


def load_picture_clip(device: str | torch.device = "cpu", folder: Path = ASSETS) -> tuple[CLIP, PictureTokenizer, int]:
    """Load the bundled model, or one that `pretrain-pictures` wrote into another folder.

    Returns:
        The model in eval mode and float32, its tokenizer, and the height and width of its images.
    """
    described = json.loads((folder / CONFIG_FILE).read_text())
    model = build_clip(described["model_cfg"])
    weights = load_file(folder / WEIGHTS_FILE)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.to(device).eval(), load_picture_tokenizer(folder), described["preprocess_cfg"]["size"]


def load_picture_tokenizer(folder: Path = ASSETS) -> PictureTokenizer:
    """Load the tokenizer of the model in a folder."""
    described = json.loads((folder / CONFIG_FILE).read_text())
    return load_tokenizer(folder / TOKENIZER_FILE, described["model_cfg"]["text_cfg"]["context_length"])


@torch.no_grad()
def zero_shot(model: CLIP, tokenizer: Callable[[list[str]], Tensor], pictures: Pictures, size: int) -> dict[str, float]:
    """Top-1 accuracy by group: each picture, over white, named among all concepts of its group."""
    was_training = model.training
    model.eval()
    images = normalize(over(1.0, pictures.pixels, size).float() / 255)
    image_features = torch.cat([model.encode_image(chunk, normalize=True) for chunk in images.split(256)])  # [P, D]
    text_features = names_features(model, tokenizer, [concept.name for concept in pictures.concepts])  # [C, D]
    found = {"all": _top1(image_features @ text_features.T, pictures.shown)}
    groups = [concept.group for concept in pictures.concepts]
    for group in KEPT:
        members = torch.tensor([own == group for own in groups])
        own = members[pictures.shown]
        if not own.any():
            continue
        logits = (image_features[own] @ text_features.T).masked_fill(~members, float("-inf"))
        found[group] = _top1(logits, pictures.shown[own])
    model.train(was_training)
    return found


@torch.no_grad()
def names_features(
    model: CLIP, tokenizer: Callable[[list[str]], Tensor], names: Sequence[str], template: str = TEMPLATE
) -> Tensor:  # [C, D], normalised
    texts = [template.format(name) for name in names]
    chunks = [texts[i : i + 256] for i in range(0, len(texts), 256)]
    return torch.cat([model.encode_text(tokenizer(chunk), normalize=True) for chunk in chunks])


def _top1(logits: Tensor, labels: Tensor) -> float:
    return round((logits.argmax(-1) == labels).float().mean().item(), 4)
