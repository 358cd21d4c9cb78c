"""`complora eval`: measures a saved adapter."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator

from rich.box import HORIZONTALS
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import complora_kernels as ck
from complora_kernels.common.files import write_atomically
from complora_kernels.fewshot.adapter_folder import OF_A_RUN, find_adapter, of_another_model, options_of
from complora_kernels.fewshot.backbone import check_backbone, load_tokenizer
from complora_kernels.fewshot.checks import check_classes, check_device
from complora_kernels.fewshot.commands import EvalConfig
from complora_kernels.fewshot.config import TrainConfig
from complora_kernels.fewshot.datasets import Dataset, read_split
from complora_kernels.fewshot.escapes import say, visible
from complora_kernels.fewshot.evaluate import Task
from complora_kernels.fewshot.files import check_writable
from complora_kernels.fewshot.measure import at_most, test_images
from complora_kernels.fewshot.recipe import SPLIT_FILE, precision_for
from complora_kernels.fewshot.setting import Settings

_GIVEN = tuple(name for name in (*OF_A_RUN, "download") if name not in ("data", "protocol", "keep"))


def evaluate(config: EvalConfig, console: Console) -> dict[str, list[float]]:
    """Print and return each data set's accuracy before and after.

    Raises:
        FileNotFoundError: the adapter, the weights or a data set is missing.
        ValueError: an option cannot work, or the adapter is of other weights.
    """
    config = dataclasses.replace(config, adapter=find_adapter(config.adapter))
    options = options_of(config.adapter, vars(config), _GIVEN)
    with of_another_model(config.adapter, vars(config)):
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
    with of_another_model(config.adapter, vars(config)):
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
