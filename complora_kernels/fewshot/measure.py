"""What a run has learned and what it has kept: the accuracies of its line in results.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from complora_kernels.adapters.build import adapted_layers
from complora_kernels.fewshot.anchors import linear_probe, tip_adapter
from complora_kernels.fewshot.config import TrainConfig
from complora_kernels.fewshot.datasets import Dataset, Draw
from complora_kernels.fewshot.evaluate import Task
from complora_kernels.fewshot.setting import NEW_CLASSES, Setting
from complora_kernels.fewshot.team import Team

Accuracy = Callable[[Task, Tensor], float]  # of the images [N] of a task


class Measurement:
    """Which images the runs of one draw are measured on, and what the pretrained model answers to them.

    Args:
        config: how many images, and whether validation images too.
        setting: the model and the tasks.
        draw: the images of the new task that may be measured on.
        dtype: of the models, the pretrained one too: rounding is no forgetting.
        team: the processes that share the work, each of which calls every method. What goes wrong in one of them is
            raised as a SharedError in all.
    """

    def __init__(self, config: TrainConfig, setting: Setting, draw: Draw, dtype: torch.dtype, team: Team):
        self.config, self.setting, self.draw, self.dtype, self.team = config, setting, draw, dtype, team
        self.test = at_most(config.max_test_images, draw.test)
        if not len(self.test):
            raise ValueError(f"{setting.new.dataset.name}: the draw leaves no image to measure on")
        self.kept = {
            name: at_most(config.max_test_images, test_images(task.dataset)) for name, task in setting.kept.items()
        }

    def zero_shot(self) -> dict[str, Any]:
        """Accuracies before anything is trained."""
        before = self._all(self._zero_shot)
        return {"zero_shot_new": before["new"], "zero_shot_kept": before["kept"]}

    def trained(self, model: Any) -> dict[str, Any]:
        """Accuracies of an adapted model in eval mode, with shares of its update too where they are asked for."""
        accuracy = lambda task, indices: task.accuracy(model, indices, self.dtype, self.team)
        found = self._all(accuracy)
        interpolated = []
        for share in self.config.interpolations:
            with scaled_update(model, share):
                interpolated.append({"share": share, **self._all(accuracy)})
        return {**found, "interpolated": interpolated} if interpolated else found

    def anchor(self, method: str) -> dict[str, Any]:
        """Accuracies of Tip-Adapter or a linear probe. On tasks with other classes the model stays zero-shot.

        Tip-Adapter sees normalised features, the probe the model's own.
        """
        new, team = self.setting.new, self.team
        model, dtype = self.setting.backbone.in_dtype(self.dtype), self.dtype
        train_labels = new.dataset.labels[self.draw.train]
        with torch.no_grad():
            class_features = new.class_features(model, team).cpu()

        def features_of(task: Task, indices: Tensor) -> Tensor:  # [N, D]; the probe's penalty depends on their norm
            return task.image_features(model, indices, dtype, normalize=method == "tip-adapter").cpu()

        with team.together():
            train_features = features_of(new, self.draw.train)

        def accuracy(task: Task, indices: Tensor) -> float:
            columns = columns_of(task.dataset.class_names, new.dataset.class_names)
            if columns is None:
                return self._zero_shot(task, indices)
            own = team.share(indices)
            with team.together():
                features = features_of(task, own)
                if method == "tip-adapter":
                    scale = float(model.logit_scale.detach().exp())
                    logits = tip_adapter(features, train_features, train_labels, class_features, scale=scale)
                else:
                    logits = linear_probe(features, train_features, train_labels, len(class_features))
            of_classes = [logits[:, places].amax(-1) for places in columns]  # C times [N]
            return task.mean(task.agrees(torch.stack(of_classes, -1).argmax(-1), own), team)

        return self._all(accuracy)

    def _zero_shot(self, task: Task, indices: Tensor) -> float:
        return task.zero_shot_accuracy(indices, self.dtype, self.team)

    def _all(self, accuracy: Accuracy) -> dict[str, Any]:
        new = accuracy(self.setting.new, self.test)
        tasks = {
            name: [self._zero_shot(task, self.kept[name]), accuracy(task, self.kept[name])]
            for name, task in self.setting.kept.items()
        }
        found = {"new": new, "kept": _kept({name: after for name, (_, after) in tasks.items()}), "tasks": tasks}
        if not self.config.validation:
            return found
        return {**found, "val": accuracy(self.setting.new, self.draw.val) if len(self.draw.val) else None}


def _kept(accuracies: dict[str, float]) -> float | None:
    """That of the new classes, or the mean of all that should be kept."""
    if NEW_CLASSES in accuracies:
        return accuracies[NEW_CLASSES]
    return sum(accuracies.values()) / len(accuracies) if accuracies else None


def columns_of(names: Sequence[str], known: Sequence[str]) -> list[list[int]] | None:
    """Where each of the names is among the known ones; None where some are not.

    ImageNet has two classes of one name: where all of a name are asked for they keep their order, and where fewer are
    it is not known which, so that each of them is any.
    """
    places: dict[str, list[int]] = {}
    for place, name in enumerate(known):
        places.setdefault(name, []).append(place)
    if not set(names) <= places.keys():
        return None
    counts, seen = Counter(names), Counter[str]()
    columns = []
    for name in names:
        whole = counts[name] == len(places[name])
        columns.append([places[name][seen[name]]] if whole else places[name])
        seen[name] += 1
    return columns


@contextmanager
def scaled_update(model: Any, share: float) -> Iterator[None]:
    """The adapted model with `share` of its update: weights between the pretrained and the trained ones (WiSE-FT)."""
    layers = adapted_layers(model).values()
    factors = [layer.factors(name)[1] for layer in layers for name in layer.weights]
    trained = [B.detach().clone() for B in factors]
    try:
        with torch.no_grad():
            for B in factors:
                B.mul_(share)
        yield
    finally:
        with torch.no_grad():
            for B, kept in zip(factors, trained, strict=True):
                B.copy_(kept)


def test_images(dataset: Dataset) -> Tensor:
    """The images [N] that a task which is not trained on is measured on: its test set, or all where it has none."""
    return dataset.train if dataset.test is None else dataset.test


def at_most(n: int | None, indices: Tensor) -> Tensor:
    """All indices, or `n` of them chosen at random, always the same ones."""
    if n is None or n >= len(indices):
        return indices
    chosen = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:n]
    return indices[chosen.sort().values]
