"""Measures what a run has learned and retained: the accuracies of its line in results.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from complora_kernels.adapters.build import adapted_layers
from complora_kernels.fewshot.anchors import lfa, linear_probe, tip_adapter
from complora_kernels.fewshot.config import TrainConfig
from complora_kernels.fewshot.datasets import Dataset, FewShotSplit
from complora_kernels.fewshot.evaluate import Task
from complora_kernels.fewshot.setting import NEW_CLASSES, Setting
from complora_kernels.fewshot.team import Team

Answer = Callable[[Task, Tensor], Tensor]  # (task, indices of images [N]) -> their classes, int64 [N]


class Answers(NamedTuple):
    """The classes that the pretrained and the trained model gave to images."""

    task: Task
    indices: Tensor  # int64 [N]
    before: Tensor  # int64 [N]
    after: Tensor  # int64 [N]


class Measurement:
    """The images that the runs of one few-shot split are measured on, and the pretrained model's answers to them.

    Args:
        config: tells how many images, and whether validation images too.
        setting: the model and the tasks.
        split: the few-shot split of the new task.
        dtype: dtype of the models, also of the pretrained one, so that rounding does not look like forgetting.
        team: the processes that share the work, each of which calls every method. An error in one of them is raised as
            a SharedError in all.
    """

    def __init__(self, config: TrainConfig, setting: Setting, split: FewShotSplit, dtype: torch.dtype, team: Team):
        self.config, self.setting, self.split, self.dtype, self.team = config, setting, split, dtype, team
        self.test = at_most(config.max_test_images, split.test)
        if not len(self.test):
            raise ValueError(f"{setting.new.dataset.name}: the split leaves no image to measure on")
        self.kept = {
            name: at_most(config.max_test_images, test_images(task.dataset)) for name, task in setting.kept.items()
        }
        self._answers: dict[str, Answers] = {}

    def zero_shot(self) -> dict[str, Any]:
        """Accuracies before anything is trained."""
        before = self._all(self._zero_shot)
        return {"zero_shot_new": before["new"], "zero_shot_kept": before["kept"]}

    def trained(self, model: Any) -> dict[str, Any]:
        """Accuracies of an adapted model in eval mode and, with `interpolations`, of shares of its update."""
        answer = lambda task, indices: task.answers(model, indices, self.dtype, self.team)
        interpolated = []
        for share in self.config.interpolations:
            with scaled_update(model, share):
                interpolated.append({"share": share, **self._all(answer)})
        found = self._all(answer)
        return {**found, "interpolated": interpolated} if interpolated else found

    def anchor(self, method: str, seed: int = 0) -> dict[str, Any]:
        """Accuracies of Tip-Adapter, a linear probe or LFA.

        On tasks with other classes the model stays zero-shot, but for LFA, which maps the images of all tasks. The
        probe sees the model's own features, the others normalised ones.
        """
        new, team = self.setting.new, self.team
        model, dtype = self.setting.backbone.in_dtype(self.dtype), self.dtype
        train_labels = new.dataset.labels[self.split.train]
        with torch.no_grad():
            class_features = new.class_features(model, team).cpu()

        def features_of(task: Task, indices: Tensor) -> Tensor:  # [N, D], for the probe not normalised
            return task.image_features(model, indices, dtype, normalize=method != "linear-probe").cpu()

        with team.together():
            train_features = features_of(new, self.split.train)
            W = lfa(train_features, train_labels, class_features, seed=seed) if method == "lfa" else None  # [D, D]

        def mapped(task: Task, indices: Tensor) -> Tensor:
            assert W is not None
            with torch.no_grad():
                classes = task.class_features(model, team).cpu()
            with team.together():
                return (F.normalize(features_of(task, indices) @ W, dim=-1) @ classes.T).argmax(-1)

        def answer(task: Task, indices: Tensor) -> Tensor:
            columns = columns_of(task.dataset.class_names, new.dataset.class_names)
            if columns is None:
                return self._zero_shot(task, indices)
            with team.together():
                features = features_of(task, indices)
                if method == "tip-adapter":
                    scale = float(model.logit_scale.detach().exp())
                    logits = tip_adapter(features, train_features, train_labels, class_features, scale=scale)
                else:
                    logits = linear_probe(features, train_features, train_labels, len(class_features))
            of_classes = [logits[:, places].amax(-1) for places in columns]  # C times [N]
            return torch.stack(of_classes, -1).argmax(-1).cpu()

        return self._all(answer if W is None else mapped)

    def answers(self) -> dict[str, Answers]:
        """The last measured model's answers by task, those to the new one under the name it was asked for by.

        Every process of a team calls it, and gets the answers of all.
        """
        parts = self.team.collect([answers[1:] for answers in self._answers.values()])
        together = [tuple(map(torch.cat, zip(*of_task, strict=True))) for of_task in zip(*parts, strict=True)]
        return {
            name: Answers(own.task, *tensors)
            for (name, own), tensors in zip(self._answers.items(), together, strict=True)
        }

    def _zero_shot(self, task: Task, indices: Tensor) -> Tensor:
        return task.zero_shot_answers(indices, self.dtype, self.team)

    def _all(self, answer: Answer) -> dict[str, Any]:
        """The accuracies of all tasks; keeps this process's answers."""
        new = self.setting.new
        self._answers = {}
        (_, of_new), *of_kept = [
            self._before_and_after(name, task, indices, answer)
            for name, task, indices in (
                (
                    new.dataset.asked_as or new.dataset.name,
                    new,
                    self.test,
                ),  # as given, it differs from all that is kept
                *((name, task, self.kept[name]) for name, task in self.setting.kept.items()),
            )
        ]
        tasks = dict(zip(self.setting.kept, of_kept, strict=True))
        found = {"new": of_new, "kept": _kept({name: after for name, (_, after) in tasks.items()}), "tasks": tasks}
        if not self.config.validation:
            return found
        return {**found, "val": self._on_validation(answer) if len(self.split.val) else None}

    def _before_and_after(self, name: str, task: Task, indices: Tensor, answer: Answer) -> list[float]:
        """The accuracies of a task, whose answers are kept under its name."""
        own = self.team.share(indices)
        before, after = self._zero_shot(task, own), answer(task, own)
        self._answers[name] = Answers(task, own, before, after)
        return [task.mean(task.agrees(answers, own), self.team) for answers in (before, after)]

    def _on_validation(self, answer: Answer) -> float:
        new, own = self.setting.new, self.team.share(self.split.val)
        return new.mean(new.agrees(answer(new, own), own), self.team)


def _kept(accuracies: dict[str, float]) -> float | None:
    """The retained accuracy: on the new classes, or the mean over all tasks that are kept."""
    if NEW_CLASSES in accuracies:
        return accuracies[NEW_CLASSES]
    return sum(accuracies.values()) / len(accuracies) if accuracies else None


def columns_of(names: Sequence[str], known: Sequence[str]) -> list[list[int]] | None:
    """The places of each name among the known names; None where a name is unknown.

    ImageNet has classes with the same name. Where `names` has all of them, each gets one place, in their order; where
    it has fewer, it is unknown which, so that each gets the places of all.
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
    """Scale the update of an adapted model: its weights lie between the pretrained and the trained ones (WiSE-FT)."""
    weights = [(layer, name) for layer in adapted_layers(model).values() for name in layer.weights]
    factors = [layer.factors(name)[1] for layer, name in weights]
    trained = [B.detach().clone() for B in factors]
    with torch.no_grad():  # of the update as it is computed, which may be bounded: a share of raw factors may be, too
        folded = [layer.fold_factors((name,))[1][0] / layer.scaling_of(name) for layer, name in weights]
    try:
        with torch.no_grad():
            for B, own in zip(factors, folded, strict=True):
                B.copy_(share * own)
        yield
    finally:
        with torch.no_grad():
            for B, kept in zip(factors, trained, strict=True):
                B.copy_(kept)


def test_images(dataset: Dataset) -> Tensor:
    """The images [N] that measure a task without training: its test set or, where it has none, all images."""
    return dataset.train if dataset.test is None else dataset.test


def at_most(n: int | None, indices: Tensor) -> Tensor:
    """The indices, or `n` of them chosen at random, the same at every call."""
    if n is None or n >= len(indices):
        return indices
    chosen = torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))[:n]
    return indices[chosen.sort().values]
