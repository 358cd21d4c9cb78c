"""What runs share: the pretrained model, what it learns and what it should keep."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from complora_kernels.fewshot.backbone import Backbone, load_backbone
from complora_kernels.fewshot.config import TrainConfig
from complora_kernels.fewshot.datasets import Dataset, base_and_new, load_dataset
from complora_kernels.fewshot.evaluate import Task
from complora_kernels.fewshot.templates import templates_for

NEW_CLASSES = "new classes"  # what base-to-new keeps


@dataclass(frozen=True)
class Setting:
    """What all runs of a grid share."""

    backbone: Backbone
    new: Task  # what is learned
    kept: dict[str, Task]  # where zero-shot accuracy should be kept


class Settings:
    """Loads settings, and keeps of the last one what the next one needs too."""

    def __init__(self) -> None:
        self._backbones: dict[tuple[str, str | None, str, str], Backbone] = {}
        self._tasks: dict[tuple[object, ...], Task] = {}

    def backbone(self, config: TrainConfig, device: str) -> Backbone:
        """The pretrained model that `config` asks for."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        key = (config.model, config.pretrained, config.activation, device)
        if key not in self._backbones:
            self._tasks = {}
            self._backbones = {key: load_backbone(*key)}
        return self._backbones[key]

    def load(self, config: TrainConfig, device: str) -> Setting:
        """The model and the data sets that `config` asks for."""
        backbone = self.backbone(config, device)
        halves = ("base", "new") if config.protocol == "base-to-new" else ("",)
        parts = [(config.data, half) for half in halves] + [(name, "") for name in config.kept()]
        tasks: dict[tuple[object, ...], Task] = {}
        for name, half in parts:
            key = (name, half, config.data_root, config.template, config.test_batch_size, config.image_memory_gib)
            tasks[key] = self._tasks.get(key) or _task(config, name, half, backbone)
        self._tasks = tasks
        new, *kept = tasks.values()
        names = [NEW_CLASSES if half else name for name, half in parts[1:]]
        return Setting(backbone, new, dict(zip(names, kept, strict=True)))


def _task(config: TrainConfig, name: str, half: str, backbone: Backbone) -> Task:
    dataset = load(config, name)
    if half:
        dataset = base_and_new(dataset)[half == "new"]
    templates = templates_for(config.template, dataset.name)
    return Task(dataset, backbone, templates, config.test_batch_size, round(config.image_memory_gib * 2**30))


def load(config: TrainConfig, name: str) -> Dataset:
    """One of the data sets of `config`."""
    return load_dataset(name, config.data_root, download=config.download)
