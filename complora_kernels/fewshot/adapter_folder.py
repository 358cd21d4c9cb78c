"""Finds a saved adapter, and what it says of the model that it was trained on.

The folder may come from somebody else. Its options name data, of which only images and lists are read, and a model,
which is taken from it by a name of open_clip's tables alone.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from complora_kernels.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from complora_kernels.common.files import reading
from complora_kernels.fewshot.backbone import is_listed
from complora_kernels.fewshot.classifier_file import CLASSIFIER_FILE, read_classifier
from complora_kernels.fewshot.config import GLYPHS, PRESETS, TrainConfig, preset_for
from complora_kernels.fewshot.config import check as check_values
from complora_kernels.fewshot.datasets.dataset import MOST_NAMED
from complora_kernels.fewshot.files import read_json
from complora_kernels.fewshot.grid import DESCRIPTION

OF_A_MODEL = ("model", "pretrained", "activation")
OF_A_RUN = (
    *OF_A_MODEL,
    *("template", "data_root", "precision", "max_test_images", "data", "protocol", "keep", "test_batch_size"),
)


def find_adapter(folder: Path) -> Path:
    """The folder of an adapter: the given one, or the only one below it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several, which the message names.
    """
    if _holds_adapter(folder):
        return folder
    below = [path.parent for depth in range(1, 5) for path in sorted(folder.glob("*/" * depth + WEIGHTS_FILE))]
    expected = "expected the folder of an adapter that `complora train` has saved"
    if not below:
        raise FileNotFoundError(f"{folder}: {expected}")
    if len(below) > 1:
        more = f" and {len(below) - MOST_NAMED} more" if len(below) > MOST_NAMED else ""
        named = ", ".join(map(str, below[:MOST_NAMED]))
        raise ValueError(f"{folder}: {expected}; below it are {named}{more}")
    return below[0]


def _holds_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE))


def options_of(adapter: Path, asked: Mapping[str, Any], given: tuple[str, ...] = OF_A_MODEL) -> TrainConfig:
    """The options of the run that made an adapter, replaced by those that are asked for.

    Args:
        adapter: the folder of the adapter.
        asked: options of a command; None: not given.
        given: the names of those that are options of a run.

    Raises:
        ValueError: an option cannot work, or names a file, a folder or a hub that was not asked for here.
    """
    path, known = _described(adapter)
    own = {name: asked[name] for name in given if asked.get(name) is not None}
    check_trusted(path, known, own)
    found = known | own
    complete = dataclasses.replace(PRESETS[preset_for(None, found.get("model", GLYPHS))], **found)
    check_values(complete)
    return complete


def check_trusted(path: Path, known: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise a ValueError where a file asks for a model or weights outside of open_clip's tables, and no person does.

    Args:
        path: the file.
        known: the options in it.
        asked: the options that a person has given.
    """
    found = {**known, **asked}
    for name in ("model", "pretrained"):
        model = found.get("model", GLYPHS)
        if name in known and name not in asked and not is_listed(model, None if name == "model" else found[name]):
            raise ValueError(
                f"{path} asks for --{name} {known[name]}, which lies outside of open_clip's tables; where it comes "
                "from is for you to trust: expected it on the command line too"
            )


def _described(adapter: Path) -> tuple[Path, dict[str, Any]]:
    """The file that describes the run of an adapter, and its options in the types of `TrainConfig`.

    The file lies beside the folder of the adapter. A folder that was taken elsewhere has `classifier.json` alone, which
    names the model.
    """
    path = adapter.parent / DESCRIPTION
    if not path.exists() and (adapter / CLASSIFIER_FILE).exists():
        saved = read_classifier(adapter)
        model = saved["model"]
        known = {"model": model["name"], "pretrained": model["pretrained"], "activation": model["activation"]}
        template = {"template": saved["templates"][0]} if len(saved["templates"]) == 1 else {}
        return adapter / CLASSIFIER_FILE, {**known, **template, "precision": saved["precision"]}
    if not path.exists():
        return path, {}
    known, types = read_json(path, "the options of a run"), get_type_hints(TrainConfig)
    with reading(path, "the options of a run, as `complora train` writes them"):
        found = {name: _as_option(name, known[name], types[name]) for name in OF_A_RUN if name in known}
        check_values(dataclasses.replace(PRESETS[preset_for(None, found.get("model", GLYPHS))], **found))
    return path, found


def _as_option(name: str, value: Any, kind: Any) -> Any:
    """An option in its type from its value in JSON, which has lists for tuples and strings for paths."""
    for choice in get_args(kind) if get_origin(kind) is UnionType else (kind,):
        if get_origin(choice) is Literal and value in get_args(choice):
            return value
        if get_origin(choice) is tuple and isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        if choice is Path and isinstance(value, str):
            return Path(value)
        if type(value) is choice:
            return value
    raise ValueError(f"{name} is {str(value)[:80]!r}")


@contextmanager
def of_another_model(adapter: Path, asked: Mapping[str, Any]) -> Iterator[None]:
    """Wrap the loading of an adapter, so that errors tell where it was trained on another model than is asked for."""
    try:
        yield
    except ValueError as error:
        _, known = _described(adapter)
        given = {name: asked[name] for name in OF_A_MODEL if asked.get(name) is not None and name in known}
        differing = [name for name in given if known[name] != given[name]]
        if not differing:
            raise
        was, now = (", ".join(f"--{name} {of[name]}" for name in differing) for of in (known, given))
        words = textwrap.shorten(str(error), 300)
        raise ValueError(f"{adapter} was trained with {was}, not with {now}: {words}") from error
