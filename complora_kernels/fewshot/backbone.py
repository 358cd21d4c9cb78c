"""The pretrained CLIP that runs start from: the bundled model, or a model of open_clip with a file or a tag."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import parse_model_name
from open_clip.pretrained import list_pretrained_tags_by_model
from safetensors.torch import save_file
from torch import Tensor

from complora_kernels.common.files import reading, words_of
from complora_kernels.fewshot.torchscript import is_torchscript, read_torchscript
from complora_kernels.fewshot.worlds import WORLDS, World


@dataclass(frozen=True)
class Backbone:
    """A CLIP with its tokenizer and its preprocessing of images."""

    model: Any  # open_clip.CLIP or another model of open_clip with encode_image and encode_text
    tokenize: Callable[[list[str]], Tensor]  # N texts -> int64 [N, L]
    preprocess: Callable[[Tensor], Tensor]  # uint8 [N, 3, H, W] -> float32 [N, 3, S, S], normalised
    device: torch.device
    size: tuple[int, int]  # height and width of the model's images
    normalize: Callable[[Tensor], Tensor]  # float32 [N, 3, H, W] in [0, 1] -> the same, normalised
    resize: Mapping[str, Any] = field(
        default_factory=dict
    )  # arguments of `load_crops` that resize files as the model expects
    _copies: dict[torch.dtype, Any] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device) -> Backbone:
        """The same on another device; the model is moved, and its copies in other dtypes are dropped."""
        return dataclasses.replace(self, model=self.model.to(device), device=device, _copies={})

    def in_dtype(self, dtype: torch.dtype) -> Any:
        """The model in a dtype; other dtypes than float32 are copies, each made once."""
        if dtype == torch.float32:
            return self.model
        if dtype not in self._copies:
            self._copies[dtype] = copy.deepcopy(self.model).to(dtype)
        return self._copies[dtype]


def load_backbone(
    model: str, pretrained: str | None = None, activation: str = "auto", device: str | torch.device = "cpu"
) -> Backbone:
    """Load a CLIP in eval mode and float32. The arguments are those of `check_backbone`, which is called first.

    Raises:
        ValueError: the weights cannot be loaded, or `check_backbone` refuses the arguments.
        OSError: a file cannot be read, or a download cannot be written.
    """
    check_backbone(model, pretrained, activation)
    with _named(model, pretrained):
        return _load(model, pretrained, activation, torch.device(device))


def load_tokenizer(model: str, pretrained: str | None = None) -> Callable[[list[str]], Tensor]:
    """Load `Backbone.tokenize` without the weights.

    Raises:
        ValueError: the tokenizer cannot be loaded.
        OSError: a file cannot be read, or a download cannot be written.
    """
    with _named(model, pretrained):
        if model in WORLDS:
            return WORLDS[model].load_tokenizer(_folder(WORLDS[model], pretrained))
        return open_clip.get_tokenizer(model)


@contextmanager
def _named(model: str, pretrained: str | None) -> Iterator[None]:
    """Add the names of the model and the weights to errors of their loading."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError):
        raise
    except Exception as error:  # readers of damaged or foreign weights raise errors of any kind
        if isinstance(error, OSError) and error.errno is not None:
            raise
        source = f"--pretrained {pretrained}" if pretrained else f"--model {model}"
        words = _words_of(error, Path(pretrained or ""))
        raise ValueError(f"{source}: cannot be loaded as {model}: {words}") from error


def _load(model: str, pretrained: str | None, activation: str, device: torch.device) -> Backbone:
    if model in WORLDS:
        clip, tokenize, preprocess, size, normalize = WORLDS[model].load(device, _folder(WORLDS[model], pretrained))
        return Backbone(clip, tokenize, preprocess, device, (size, size), normalize)
    quick_gelu = _wants_quick_gelu(model, activation)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("error", message="QuickGELU mismatch")
        if pretrained is not None:
            with reading(pretrained, "an archive of weights"):
                if is_torchscript(Path(pretrained)):
                    pretrained = _unpack_torchscript(Path(pretrained), Path(folder))
        clip = open_clip.create_model(
            model,
            pretrained,
            device=device,
            force_quick_gelu=quick_gelu,  # this argument can switch it on, the next one also off
            quick_gelu=quick_gelu,
            require_pretrained=True,
        )
    preprocess, size, normalize = _preprocessing(clip)
    expected = open_clip.get_model_preprocess_cfg(clip)
    resize = {name: expected[name] for name in ("resize_mode", "interpolation") if expected.get(name)}
    return Backbone(clip.eval(), open_clip.get_tokenizer(model), preprocess, device, size, normalize, resize)


def check_backbone(model: str, pretrained: str | None = None, activation: str = "auto") -> None:
    """Find every error that `load_backbone` would raise for its arguments, without loading anything.

    Args:
        model: the name of a bundled model, "glyphs" or "pictures", or a model name of open_clip.
        pretrained: a file with weights, whose code, if it has any, is not run, or a tag of open_clip; for a bundled
            model a folder written by `pretrain-glyphs` or `pretrain-pictures`, or None for the weights of the package;
            None for names that bring their weights (`hf-hub:`, `local-dir:`).
        activation: "gelu", "quick-gelu", or "auto" for the activation that the model's name implies.

    Raises:
        FileNotFoundError: `pretrained` is neither a file nor a tag.
        ValueError: an unknown name, or weights known to be trained with the other activation.
    """
    if model in WORLDS:
        _check_bundled(model, pretrained, activation)
        return
    schema, name = parse_model_name(model)
    if schema is not None:
        if pretrained is not None:
            raise ValueError(f"--pretrained {pretrained}: --model {model} brings its own weights, expected none")
        if activation != "auto":
            raise ValueError(f"--activation {activation}: expected auto with --model {model}, which brings its own")
        return
    if open_clip.get_model_config(name) is None:
        names = ", ".join([*WORLDS, *open_clip.list_models()])
        raise ValueError(f"--model {model}: expected one of {names}")
    if pretrained is None:
        raise ValueError(f"--pretrained: --model {model} needs a file with weights or one of {_tags(name)}")
    if not open_clip.get_pretrained_cfg(name, pretrained) and not Path(pretrained).is_file():
        raise FileNotFoundError(f"--pretrained {pretrained}: neither an existing file nor one of {_tags(name)}")
    trained_with, source = _trained_with_quick_gelu(name, pretrained)
    if trained_with is not None and trained_with != _wants_quick_gelu(model, activation):
        right, wrong = _activation_name(trained_with), _activation_name(not trained_with)
        raise ValueError(
            f"--model {model} --activation {activation} --pretrained {pretrained}: the weights were trained with "
            f"{right} (says {source}) and would run with {wrong}; expected --activation {right}, or a model name "
            "that says so"
        )


def is_listed(model: str, pretrained: str | None) -> bool:
    """Whether both names are in open_clip's own tables, or are the bundled model's; files, folders and hubs are not."""
    if model in WORLDS:
        return pretrained is None
    schema, name = parse_model_name(model)
    is_tag = pretrained is None or bool(open_clip.get_pretrained_cfg(name, pretrained))
    return schema is None and open_clip.get_model_config(name) is not None and is_tag


def _check_bundled(model: str, folder: str | None, activation: str) -> None:
    if activation != "auto":
        raise ValueError(f"--activation {activation}: expected auto with --model {model}, which brings its own")
    if folder is None and not (WORLDS[model].assets / WORLDS[model].weights_file).is_file():
        raise FileNotFoundError(
            f"--model {model}: its weights are missing from the package, expected --pretrained, a folder written "
            f"by `{WORLDS[model].command}`"
        )
    if folder is not None and not (Path(folder) / WORLDS[model].weights_file).is_file():
        raise FileNotFoundError(f"--pretrained {folder}: expected a folder written by `{WORLDS[model].command}`")


def _folder(world: World, pretrained: str | None) -> Path:
    return world.assets if pretrained is None else Path(pretrained)


def _tags(name: str) -> str:
    return ", ".join(list_pretrained_tags_by_model(name)) or "no tags (this model has none)"


def _activation_name(quick_gelu: bool) -> str:
    return "quick-gelu" if quick_gelu else "gelu"


def _wants_quick_gelu(model: str, activation: str) -> bool:
    if activation != "auto":
        return activation == "quick-gelu"
    return bool((open_clip.get_model_config(model) or {}).get("quick_gelu", False))


def _trained_with_quick_gelu(name: str, pretrained: str) -> tuple[bool | None, str]:
    """Whether the weights were trained with QuickGELU (None: unknown), and the source of this knowledge."""
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if tag:
        return bool(tag.get("quick_gelu", False)), "open_clip's table of pretrained weights"
    path = Path(pretrained)
    described = path.parent / "open_clip_config.json"
    if described.is_file():
        with reading(described, "the configuration of a model, as open_clip writes it"):
            model_config = json.loads(described.read_bytes()).get("model_cfg", {})
            return bool(model_config.get("quick_gelu", False)), str(described)
    with reading(path, "a file of weights"):
        is_archive = is_torchscript(path)
    if is_archive:
        return True, "its TorchScript format, in which OpenAI published its models"
    for tag in list_pretrained_tags_by_model(name):
        known = open_clip.get_pretrained_cfg(name, tag)
        if Path(known.get("url", "")).name == path.name:
            return bool(known.get("quick_gelu", False)), f"its file name, that of open_clip's tag {tag}"
    return None, ""


def _unpack_torchscript(path: Path, folder: Path) -> str:
    """Write the weights of one of OpenAI's archives into a file that open_clip's loader reads."""
    not_weights = ("input_resolution", "context_length", "vocab_size")
    weights = {name: weight for name, weight in read_torchscript(path).items() if name not in not_weights}
    unpacked = folder / "weights.safetensors"
    save_file({name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}, unpacked)
    return str(unpacked)


def _words_of(error: Exception, path: Path) -> str:
    """The reason why a model's weights, in a file or elsewhere, cannot be loaded, in words."""
    if isinstance(error, StopIteration):  # open_clip asks for the first weight
        return "there are no weights in it"
    if isinstance(error, pickle.UnpicklingError) and path.is_file():
        with contextlib.suppress(Exception):  # the file may be no pickle at all
            if found := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                return (
                    f"beside tensors it holds Python objects ({', '.join(sorted(found))}), and a pickle of these can "
                    "run code; expected a file of weights alone, such as safetensors"
                )
        return "it is damaged, or holds more than weights"  # torch's own message advises to run the code in the file
    return textwrap.shorten(words_of(error), 400)  # torch may name every key of a state dict


def _preprocessing(
    clip: Any,
) -> tuple[Callable[[Tensor], Tensor], tuple[int, int], Callable[[Tensor], Tensor]]:
    """`preprocess`, `size` and `normalize` of a `Backbone`, as its weights expect images."""
    expected = open_clip.get_model_preprocess_cfg(clip)
    size = expected["size"]
    height, width = size if isinstance(size, (tuple, list)) else (size, size)

    @cache
    def mean_and_std(device: torch.device) -> list[Tensor]:  # copied to a device once, not with every batch
        return [torch.tensor(expected[name], device=device)[:, None, None] for name in ("mean", "std")]

    def normalize(pixels: Tensor) -> Tensor:
        mean, std = mean_and_std(pixels.device)
        return (pixels - mean) / std

    def preprocess(images: Tensor) -> Tensor:
        return normalize(
            F.interpolate(images.float() / 255, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
        )

    return preprocess, (height, width), normalize
