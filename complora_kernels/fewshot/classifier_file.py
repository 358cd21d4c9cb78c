"""`classifier.json` beside a saved adapter: what else its use needs, and a fingerprint of what the model computed.

The folder of an adapter may come from somebody else: the file is read as data and checked before a value is used. The
model that it names is loaded by name alone, see `saved`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from complora_kernels.common import base_weights
from complora_kernels.common.files import reading
from complora_kernels.common.schema import check_type
from complora_kernels.fewshot.backbone import Backbone
from complora_kernels.fewshot.files import read_json, write_json
from complora_kernels.fewshot.templates import prompts

CLASSIFIER_FILE = "classifier.json"
FORMAT_VERSION = 1

_EXPECTED = "what `complora train` writes beside an adapter"
_MOST_TEXTS = 32
# Rounding moves features by about 1e-6 in float32 (1e-3 where a GPU computes in TF32), and by 0.01 to 0.03 in bfloat16;
# another model or tokenizer moves them by about 1.
_APART = {True: 0.01, False: 0.1}  # by whether both were computed in float32


class SavedModel(TypedDict):
    """The arguments of `load_backbone`."""

    name: str
    pretrained: str | None
    activation: Literal["auto", "gelu", "quick-gelu"]


class Preprocessing(TypedDict):
    """How an image file becomes an input of the model, for programs without this package too."""

    size: list[int]  # height and width
    resize_mode: str
    interpolation: str
    mean: list[float]  # of each channel, of pixels in [0, 1]
    std: list[float]


class Fingerprint(TypedDict):
    """What a model made of the first prompts and of a fixed picture."""

    dtype: str
    tokens: str  # digest of all prompts' tokens
    texts: base_weights.Description  # of the features of the first prompts
    image: base_weights.Description  # of the features of the picture


class SavedClassifier(TypedDict):
    """The content of the file."""

    format_version: int
    package_version: str
    class_names: list[str]
    templates: list[str]  # each with {} for the class name; the features of several are averaged
    model: SavedModel
    precision: Literal["auto", "fp32", "bf16", "fp16"]
    batch_size: int  # images per forward pass
    preprocessing: Preprocessing
    fingerprint: Fingerprint
    run: dict[str, Any]  # how it was trained


def write_classifier(
    adapter: Path,
    model: Any,
    backbone: Backbone,
    *,
    class_names: Sequence[str],
    templates: Sequence[str],
    options: Any,
    run: dict[str, Any],
) -> None:
    """Write the file beside an adapter, as a whole.

    Args:
        adapter: the folder of the adapter.
        model: the adapted model, in eval mode.
        backbone: the pretrained model, for its tokenizer and its preprocessing.
        class_names: names of the classes.
        templates: the templates of their prompts.
        options: the `TrainConfig`, which tells how the model is loaded and measured.
        run: how the adapter was trained.
    """
    from complora_kernels import __version__

    saved: SavedClassifier = {
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "class_names": list(class_names),
        "templates": list(templates),
        "model": {"name": options.model, "pretrained": options.pretrained, "activation": options.activation},
        "precision": options.precision,
        "batch_size": options.test_batch_size,
        "preprocessing": preprocessing_of(backbone),
        "fingerprint": fingerprint(model, backbone, templates, class_names),
        "run": run,
    }
    write_json(adapter / CLASSIFIER_FILE, dict(saved))


def read_classifier(adapter: Path) -> SavedClassifier:
    """Read the file beside an adapter, and check every value in it.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is damaged, of a newer version, lacks a key, or a value cannot be; the message names it.
    """
    path = adapter / CLASSIFIER_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing, expected {_EXPECTED}: class names, prompts and the model. An adapter that was saved "
            "without it can be measured with `complora eval`, and loaded with `complora_kernels.load_adapter`"
        )
    saved: Any = read_json(path, _EXPECTED)
    with reading(path, _EXPECTED):
        check_type(saved.get("format_version"), int, "format_version")
        if not 1 <= saved["format_version"] <= FORMAT_VERSION:
            raise ValueError(
                f"format_version={saved['format_version']}, expected at most {FORMAT_VERSION}: it was written by the "
                f"newer complora_kernels {saved.get('package_version')}"
            )
        check_type(saved, SavedClassifier, "it")
        _check_values(saved)
    return saved


def _check_values(saved: SavedClassifier) -> None:
    for name in saved["templates"]:
        prompts(name, ())
    for name, least in (("class_names", 2), ("templates", 1)):
        if len(saved[name]) < least:
            raise ValueError(f"{name} has {len(saved[name])} entries, expected at least {least}")
    if saved["batch_size"] < 1:
        raise ValueError(f"batch_size={saved['batch_size']}, expected at least 1")


def preprocessing_of(backbone: Backbone) -> Preprocessing:
    """How files become inputs of a model."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device=backbone.device)[:, None, None, None].expand(2, 3, 1, 1)
    black, white = backbone.normalize(ends).flatten(1).cpu()  # [3] each: -mean / std, (1 - mean) / std
    std = 1 / (white - black)
    return {
        "size": list(backbone.size),
        "resize_mode": backbone.resize.get("resize_mode", "shortest"),
        "interpolation": backbone.resize.get("interpolation", "bicubic"),
        "mean": [round(value, 7) for value in (-black * std).tolist()],
        "std": [round(value, 7) for value in std.tolist()],
    }


@torch.no_grad()
def fingerprint(model: Any, backbone: Backbone, templates: Sequence[str], class_names: Sequence[str]) -> Fingerprint:
    """The fingerprint of an adapted model in eval mode, with the tokenizer and the preprocessing of its backbone."""
    tokens = backbone.tokenize([text for template in templates for text in prompts(template, class_names)])  # [T, L]
    dtype = next(model.parameters()).dtype
    texts = model.encode_text(tokens[:_MOST_TEXTS].to(backbone.device), normalize=True)
    pixels = backbone.preprocess(_picture(*backbone.size).to(backbone.device))
    image = model.encode_image(pixels.to(dtype), normalize=True)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": hashlib.sha256(tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest()[:16],
        "texts": base_weights.describe(texts),
        "image": base_weights.describe(image),
    }


def check_same(saved: SavedClassifier, model: Any, backbone: Backbone, path: Path) -> None:
    """Raise a ValueError where the model, its tokenizer or its preprocessing is not that of the file."""
    known, found = saved["fingerprint"], fingerprint(model, backbone, saved["templates"], saved["class_names"])
    if found["tokens"] != known["tokens"]:
        raise ValueError(
            f"{path}: the model's tokenizer makes other tokens of the prompts, such as "
            f"{prompts(saved['templates'][0], saved['class_names'][:1])[0]!r}, than when the adapter was trained; "
            "expected the same tokenizer"
        )
    expected, own = saved["preprocessing"], preprocessing_of(backbone)
    for name, value in own.items():
        if value != expected[name]:
            raise ValueError(f"{path}: preprocessing.{name} is {expected[name]}, and the model's is {value}")
    most = _APART[found["dtype"] == known["dtype"] == "float32"]
    for part, words in (("texts", "first prompts"), ("image", "picture that is compared")):
        apart = base_weights.relative_distance(found[part], known[part])
        if not apart <= most:
            raise ValueError(
                f"{path}: the features of the {words} are about {apart:.2g} of their length away from what they were "
                f"when the adapter was trained, expected at most {most}: the model is another one, or was changed"
            )


def _picture(height: int, width: int) -> Tensor:  # uint8 [1, 3, H, W]
    """A fixed picture with edges in two directions."""
    rows, columns, channels = torch.arange(height)[:, None], torch.arange(width), torch.arange(3)[:, None, None]
    return ((5 * rows + 3 * columns + 80 * channels) % 256).to(torch.uint8)[None]
