"""`complora eval` and `complora export`: what becomes of an adapter that a run has saved."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table
from torch import Tensor

import complora_kernels as ck
from complora_kernels.fewshot.backbone import check_backbone, load_tokenizer
from complora_kernels.fewshot.checks import check_classes, check_device
from complora_kernels.fewshot.config import GLYPHS, PRESETS, TrainConfig, preset_for
from complora_kernels.fewshot.datasets import Dataset, read_draw
from complora_kernels.fewshot.evaluate import Task
from complora_kernels.fewshot.files import check_writable, write_atomically
from complora_kernels.fewshot.grid import DESCRIPTION
from complora_kernels.fewshot.measure import at_most, test_images
from complora_kernels.fewshot.recipe import DRAW, precision_for
from complora_kernels.fewshot.setting import Settings


@dataclass(frozen=True)
class EvalConfig:
    """Measure a saved adapter: the accuracy of the pretrained and of the adapted model on the test images of data sets.

    Options that are not given are those of the run that trained the adapter, where its config.json lies beside it.
    """

    adapter: tyro.conf.Positional[Path]
    """The adapter's folder, such as runs/glyphs/runs/both-1shot-lr0.01-seed0/adapter."""
    data: tuple[str, ...] = ()
    """Data sets, named as for complora train; none: those of the run."""
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
        FileNotFoundError: no adapter, weights or data set there.
        ValueError: an option that cannot work, or an adapter of other weights.
    """
    options = _of_run(config)
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
    model = ck.load_adapter(copy.deepcopy(backbone.model), config.adapter).to(dtype).eval()
    table = Table("data set", box=HORIZONTALS, title=f"Accuracy in percent, {config.adapter}")
    table.add_column("zero-shot", justify="right")
    table.add_column("adapted", justify="right")
    results = {}
    for name, task, indices in _measured(config, options, settings):
        indices = at_most(options.max_test_images, indices)
        results[name] = [task.zero_shot_accuracy(indices, dtype), task.accuracy(model, indices, dtype)]
        table.add_row(name, *(f"{100 * accuracy:.1f}" for accuracy in results[name]))
    console.print(table)
    if config.output is not None:
        write_atomically(config.output, json.dumps(results, indent=2) + "\n")
    return results


def export(config: ExportConfig, console: Console) -> None:
    """Write the adapter in PEFT's format.

    Raises:
        FileNotFoundError: no adapter or weights there.
        ValueError: an adapter of other weights, or one that PEFT cannot hold.
    """
    options = _of_run(config)
    check_backbone(options.model, options.pretrained, options.activation)
    check_writable(config.output)
    backbone = Settings().backbone(options, "cpu")
    ck.export_peft(ck.load_adapter(backbone.model, config.adapter), config.output)
    console.print(f"wrote {config.output}", highlight=False, soft_wrap=True)


def _measured(config: EvalConfig, options: TrainConfig, settings: Settings) -> Iterator[tuple[str, Task, Tensor]]:
    """The data sets with their test images: those that are asked for, or the run's; never those of the run's shots."""
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
    """The images [N] that the draw of the run leaves, where it is known."""
    drawn = config.adapter.parent / DRAW
    return read_draw(drawn, dataset).test if drawn.is_file() else test_images(dataset)


def _of_run(config: EvalConfig | ExportConfig) -> TrainConfig:
    """The options of the run that made an adapter, and what the command line says instead."""
    if not config.adapter.is_dir():
        raise FileNotFoundError(f"{config.adapter}: expected the folder of an adapter that `complora train` has saved")
    described, known = config.adapter.parent / DESCRIPTION, {}
    if described.is_file():
        known = json.loads(described.read_text())
    names = ("model", "pretrained", "activation", "template", "data_root", "precision", "max_test_images")
    run_names = (*names, "data", "protocol", "keep", "test_batch_size")
    asked = {name: value for name, value in vars(config).items() if value is not None}
    found: dict[str, Any] = {name: known[name] for name in run_names if name in known}
    found |= {name: asked[name] for name in (*names, "download", "test_batch_size") if name in asked}
    found["keep"] = None if found.get("keep") is None else tuple(found["keep"])
    found["data_root"] = None if found.get("data_root") is None else Path(found["data_root"])
    defaults = PRESETS[preset_for(None, found.get("model", GLYPHS))]
    return dataclasses.replace(defaults, **found)
