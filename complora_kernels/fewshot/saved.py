"""`complora eval` and `complora export`: measures a saved adapter, or converts it to PEFT's format."""

from __future__ import annotations

import copy
import dataclasses
import json
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro
from rich.box import HORIZONTALS
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import complora_kernels as ck
from complora_kernels.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from complora_kernels.common.files import reading, write_atomically
from complora_kernels.fewshot.backbone import check_backbone, is_listed, load_tokenizer
from complora_kernels.fewshot.checks import check_classes, check_device
from complora_kernels.fewshot.config import GLYPHS, PRESETS, TrainConfig, preset_for
from complora_kernels.fewshot.config import check as check_values
from complora_kernels.fewshot.datasets import Dataset, read_split
from complora_kernels.fewshot.datasets.dataset import MOST_NAMED
from complora_kernels.fewshot.escapes import say, visible
from complora_kernels.fewshot.evaluate import Task
from complora_kernels.fewshot.files import check_writable, read_json
from complora_kernels.fewshot.grid import DESCRIPTION
from complora_kernels.fewshot.measure import at_most, test_images
from complora_kernels.fewshot.recipe import SPLIT_FILE, precision_for
from complora_kernels.fewshot.setting import Settings

_OF_A_RUN = (
    *("model", "pretrained", "activation", "template", "data_root", "precision", "max_test_images"),
    *("data", "protocol", "keep", "test_batch_size"),
)


@dataclass(frozen=True)
class EvalConfig:
    """Measure a saved adapter: the accuracy of the pretrained and of the adapted model on the test images of data sets.

    Options that are not given are those of the run that trained the adapter, where its config.json lies beside it. Only
    a model or weights outside of open_clip's tables have to be named here too.
    """

    adapter: tyro.conf.Positional[Path]
    """The adapter's folder, such as runs/glyphs/runs/both-1shot-lr0.01-seed0/adapter."""
    data: tuple[str, ...] = ()
    """Data sets, named as for complora train; none given: those of the run."""
    model: str | None = None
    """As for complora train."""
    pretrained: str | None = None
    """As for complora train."""
    activation: Literal["auto", "gelu", "quick-gelu"] | None = None
    """As for complora train."""
    data_root: Path | None = None
    """As for complora train."""
    download: bool = False
    """As for complora train."""
    template: str | None = None
    """As for complora train."""
    max_test_images: int | None = None
    """As for complora train."""
    test_batch_size: int | None = None
    """As for complora train."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] | None = None
    """As for complora train."""
    device: str = "auto"
    """As for complora train."""
    output: Path | None = None
    """A JSON file for the accuracies."""


@dataclass(frozen=True)
class ExportConfig:
    """Write a saved adapter in the format of PEFT.

    The factors are the same; see `complora_kernels.export_peft` for the modules that PEFT sees.
    """

    adapter: tyro.conf.Positional[Path]
    """The adapter's folder."""
    output: Path
    """The folder to write."""
    model: str | None = None
    """As for complora train."""
    pretrained: str | None = None
    """As for complora train."""
    activation: Literal["auto", "gelu", "quick-gelu"] | None = None
    """As for complora train."""


def evaluate(config: EvalConfig, console: Console) -> dict[str, list[float]]:
    """Print and return each data set's accuracy before and after.

    Raises:
        FileNotFoundError: the adapter, the weights or a data set is missing.
        ValueError: an option cannot work, or the adapter is of other weights.
    """
    options = _of_run(config)
    with _of_another_model(config):
        check_backbone(options.model, options.pretrained, options.activation)
    check_device(config.device)
    if config.output is not None:
        check_writable(config.output.parent)
    settings = Settings()
    tokenize = load_tokenizer(options.model, options.pretrained)
    for name in config.data:
        check_classes(options, name, tokenize)
    backbone = settings.backbone(options, config.device)
    dtype = precision_for(options.precision, backbone.device)
    with _of_another_model(config):
        model = ck.load_adapter(copy.deepcopy(backbone.model), config.adapter).to(dtype).eval()
    table = Table("data set", box=HORIZONTALS, title="Accuracy in percent")
    table.add_column("zero-shot", justify="right")
    table.add_column("adapted", justify="right")
    results = {}
    for name, task, indices in _measured(config, options, settings):
        indices = at_most(options.max_test_images, indices)
        results[name] = [task.zero_shot_accuracy(indices, dtype), task.accuracy(model, indices, dtype)]
        table.add_row(escape(visible(name)), *(f"{100 * accuracy:.1f}" for accuracy in results[name]))
    say(console, str(config.adapter), soft_wrap=True)
    console.print(table)
    if config.output is not None:
        write_atomically(config.output, json.dumps(results, indent=2) + "\n")
    return results


def export(config: ExportConfig, console: Console) -> None:
    """Write the adapter in PEFT's format.

    Raises:
        FileNotFoundError: the adapter or the weights are missing.
        ValueError: the adapter is of other weights, or PEFT's format cannot hold it.
    """
    options = _of_run(config)
    with _of_another_model(config):
        check_backbone(options.model, options.pretrained, options.activation)
    check_writable(config.output)
    backbone = Settings().backbone(options, "cpu")
    with _of_another_model(config):
        model = ck.load_adapter(backbone.model, config.adapter)
    ck.export_peft(model, config.output)
    say(console, f"wrote {config.output}", soft_wrap=True)


def _measured(config: EvalConfig, options: TrainConfig, settings: Settings) -> Iterator[tuple[str, Task, Tensor]]:
    """Yield the given data sets, or those of the run, with their test images, which exclude the run's shots."""
    if not config.data:
        setting = settings.load(options, config.device)
        yield options.data, setting.new, _test_images(config, setting.new.dataset)
        for name, task in setting.kept.items():
            yield name, task, test_images(task.dataset)
    for name in config.data:
        alone = dataclasses.replace(options, data=name, protocol="few-shot", keep=())
        task = settings.load(alone, config.device).new
        is_whole = name == options.data and options.protocol != "base-to-new"
        yield name, task, _test_images(config, task.dataset) if is_whole else test_images(task.dataset)


def _test_images(config: EvalConfig, dataset: Dataset) -> Tensor:
    """The test images [N] of the run's few-shot split, where its file is there, otherwise those of the data set."""
    split = config.adapter.parent / SPLIT_FILE
    return read_split(split, dataset).test if split.exists() else test_images(dataset)


def _of_run(config: EvalConfig | ExportConfig) -> TrainConfig:
    """The options of the run that made an adapter, replaced by those of the command line."""
    _check_is_adapter(config.adapter)
    known = _described(config.adapter.parent / DESCRIPTION)
    asked = {name: value for name, value in vars(config).items() if value is not None}
    given = {*_OF_A_RUN, "download"} - {"data", "protocol", "keep"}
    found = known | {name: value for name, value in asked.items() if name in given}
    for name in ("model", "pretrained"):
        if name in known and name not in asked and not is_listed(*_named(found, name)):
            raise ValueError(
                f"{config.adapter.parent / DESCRIPTION} asks for --{name} {known[name]}, which lies outside of "
                "open_clip's tables; where it comes from is for you to trust: expected it on the command line too"
            )
    complete = dataclasses.replace(PRESETS[preset_for(None, found.get("model", GLYPHS))], **found)
    check_values(complete)
    return complete


def _named(found: dict[str, Any], name: str) -> tuple[str, str | None]:
    model = found.get("model", GLYPHS)
    return (model, None) if name == "model" else (model, found["pretrained"])


def _described(path: Path) -> dict[str, Any]:
    """Read the options of a run that a measurement needs, in the types of `TrainConfig`.

    The folder may come from somebody else. Its options name data, of which only images and lists are read, and a model,
    which `_of_run` does not trust.
    """
    if not path.exists():
        return {}
    known, types = read_json(path, "the options of a run"), get_type_hints(TrainConfig)
    with reading(path, "the options of a run, as `complora train` writes them"):
        found = {name: _as_option(name, known[name], types[name]) for name in _OF_A_RUN if name in known}
        check_values(dataclasses.replace(PRESETS[preset_for(None, found.get("model", GLYPHS))], **found))
    return found


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


def _check_is_adapter(folder: Path) -> None:
    """Raise a FileNotFoundError for a folder that holds no adapter; its message names adapters below the folder."""
    if any((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        return
    below = [path.parent for depth in range(1, 5) for path in sorted(folder.glob("*/" * depth + WEIGHTS_FILE))]
    hint = f"; below it are {', '.join(map(str, below[:MOST_NAMED]))}" if below else ""
    more = f" and {len(below) - MOST_NAMED} more" if len(below) > MOST_NAMED else ""
    raise FileNotFoundError(f"{folder}: expected the folder of an adapter that `complora train` has saved{hint}{more}")


@contextmanager
def _of_another_model(config: EvalConfig | ExportConfig) -> Iterator[None]:
    """Wrap the loading of an adapter, so that errors tell where it was trained on another model than is asked for."""
    try:
        yield
    except ValueError as error:
        known = _described(config.adapter.parent / DESCRIPTION)
        asked = {name: getattr(config, name) for name in ("model", "pretrained", "activation")}
        differing = [name for name, value in asked.items() if value is not None and name in known]
        differing = [name for name in differing if known[name] != asked[name]]
        if not differing:
            raise
        was, now = (", ".join(f"--{name} {of[name]}" for name in differing) for of in (known, asked))
        words = textwrap.shorten(str(error), 300)
        raise ValueError(f"{config.adapter} was trained with {was}, not with {now}: {words}") from error
