"""The setting that runs share: the pretrained model, the task to learn and the tasks to retain."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from complora_kernels.fewshot.backbone import Backbone, load_backbone
from complora_kernels.fewshot.config import TrainConfig
from complora_kernels.fewshot.datasets import Dataset, base_and_new, load_dataset
from complora_kernels.fewshot.evaluate import MemoryBudget, Task
from complora_kernels.fewshot.images import DeviceImages
from complora_kernels.fewshot.templates import templates_for, training_template

NEW_CLASSES = "new classes"  # the name of the task that base-to-new retains


@dataclass(frozen=True)
class Setting:
    """The model and the tasks of all runs of a grid."""

    backbone: Backbone
    new: Task  # the task to learn
    kept: dict[str, Task]  # the tasks whose zero-shot accuracy should be retained
    # The decoded training images of the last few-shot split: other methods learn from the same ones.
    decoded: dict[tuple[object, ...], DeviceImages] = field(default_factory=dict)


class Settings:
    """Loads settings, and keeps those parts of the last one that the next one shares."""

    def __init__(self) -> None:
        self._backbones: dict[tuple[str, str | None, str, str], Backbone] = {}
        self._tasks: dict[tuple[object, ...], Task] = {}
        self._decoded: dict[tuple[object, ...], DeviceImages] = {}
        self._budgets: dict[float, MemoryBudget] = {}  # the budget of decoded images, by the last --image-memory-gib

    def backbone(self, config: TrainConfig, device: str) -> Backbone:
        """The pretrained model that `config` asks for."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        key = (config.model, config.pretrained, config.activation, device)
        if key not in self._backbones:
            self._keep({})
            self._decoded.clear()
            self._backbones = {key: load_backbone(*key)}
        return self._backbones[key]

    def load(self, config: TrainConfig, device: str) -> Setting:
        """The model and the data sets that `config` asks for."""
        backbone = self.backbone(config, device)
        halves = ("base", "new") if config.protocol == "base-to-new" else ("",)
        parts = [(config.data, half) for half in halves] + [(name, "") for name in config.kept()]
        gib, options = config.image_memory_gib, (config.data_root, config.template, config.test_batch_size)
        keys = [(name, half, *options, gib) for name, half in parts]
        self._keep({key: task for key, task in self._tasks.items() if key in keys})
        if gib not in self._budgets:
            self._budgets = {gib: MemoryBudget(round(gib * 2**30))}
        for key in keys:
            if key not in self._tasks:
                self._tasks[key] = _task(config, *key[:2], backbone, self._budgets[gib])
        tasks = {key: self._tasks[key] for key in keys}
        new, *kept = tasks.values()
        names = [NEW_CLASSES if half else name for name, half in parts[1:]]
        return Setting(backbone, new, dict(zip(names, kept, strict=True)), self._decoded)

    def _keep(self, tasks: dict[tuple[object, ...], Task]) -> None:
        for key, task in self._tasks.items():
            if key not in tasks:
                task.forget()
        self._tasks = tasks


def _task(config: TrainConfig, name: str, half: str, backbone: Backbone, budget: MemoryBudget) -> Task:
    dataset = load(config, name)
    if half:
        dataset = base_and_new(dataset)[half == "new"]
    templates = templates_for(config.template, dataset.name)
    for_steps = training_template(config.template, dataset.name)
    return Task(dataset, backbone, templates, config.test_batch_size, budget, for_steps)


def load(config: TrainConfig, name: str) -> Dataset:
    """Load one of the data sets of `config`."""
    return load_dataset(name, config.data_root, download=config.download)
