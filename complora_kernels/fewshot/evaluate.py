"""Measures how well a CLIP classifies the images of a data set by their prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from complora_kernels.fewshot.backbone import Backbone
from complora_kernels.fewshot.datasets import Dataset
from complora_kernels.fewshot.decode import load_crops
from complora_kernels.fewshot.team import ALONE, Team
from complora_kernels.fewshot.templates import prompts
from complora_kernels.fewshot.tokens import check_told_apart


class MemoryBudget:
    """A number of bytes that several tasks share, first come, first served; None sets no limit."""

    def __init__(self, total: int | None = None):
        self.free = float("inf") if total is None else total

    def take(self, size: int) -> bool:
        """Take `size` bytes if they are free; returns whether they were."""
        if size > self.free:
            return False
        self.free -= size
        return True

    def give_back(self, size: int) -> None:
        """Return `size` bytes that are no longer used."""
        self.free += size


class Task:
    """A data set on one backbone: its prompts, its images as inputs of the model, and the pretrained model's answers.

    Args:
        dataset: the images and the names of their classes.
        backbone: the pretrained model.
        templates: the prompts, each with {} for the class name; the features of several are averaged.
        batch_size: images per forward pass.
        budget: the memory for decoded images of files; None: no limit. Images beyond it are decoded at each use.
        training_template: the prompt of `training_features`; None: the first of `templates`.

    Raises:
        ValueError: the prompts of two classes are the same tokens.
    """

    def __init__(
        self,
        dataset: Dataset,
        backbone: Backbone,
        templates: Sequence[str],
        batch_size: int = 256,
        budget: MemoryBudget | None = None,
        training_template: str | None = None,
    ):
        self.dataset = dataset
        self.backbone = backbone
        self.templates = tuple(templates)
        self.batch_size = batch_size
        training_template = templates[0] if training_template is None else training_template
        source = dataset.asked_as or dataset.name
        check_told_apart(source, dataset.class_names, templates, training_template, backbone.tokenize)
        self.tokens = self._tokenize(templates)  # [T · C, L]
        self.training_tokens = self._tokenize([training_template])  # [C, L]
        self._zero_shot: dict[torch.dtype, Tensor] = {}  # int64 [N]: the pretrained model's answers, -1: not yet known
        self._crops: dict[int, Tensor] = {}  # by index of the image: uint8 [3, S, S]
        self._budget = MemoryBudget() if budget is None else budget

    def class_features(self, model: Any, team: Team = ALONE) -> Tensor:  # float32 [C, D]
        """The normalised features by which images are classified; for several templates their normalised mean.

        Every process of a team encodes its part of the prompts.
        """
        features = self._text_features(model, self.tokens, team)  # [T · C, D]
        if len(features) == len(self.dataset.class_names):
            return features
        return F.normalize(features.unflatten(0, (-1, len(self.dataset.class_names))).mean(0), dim=-1)

    def training_features(self, model: Any, team: Team = ALONE) -> Tensor:  # float32 [C, D]
        """The normalised features of one template, differentiable, that a training step compares images with.

        A step encodes every prompt, and keeps the activations of every layer: ImageNet's ensemble would be 80 prompts
        per class, 80,000 per step. An ensemble improves the classification of images; training does not need it.
        """
        return self._text_features(model, self.training_tokens, team)

    @torch.no_grad()
    def image_features(
        self, model: Any, indices: Tensor, dtype: torch.dtype = torch.float32, *, normalize: bool = True
    ) -> Tensor:
        """The features [N, D] of the images `indices` [N], float32 on the backbone's device.

        Args:
            model: the backbone's model or an adapted copy of it, in eval mode.
            indices: indices of the images.
            dtype: dtype of the model.
            normalize: divide each feature by its norm, as the cosine with the classes' features requires.
        """
        features = [model.encode_image(x.to(dtype), normalize=normalize).float() for x in self.pixels(indices)]
        return torch.cat(features) if features else self.class_features(model)[:0]

    @torch.no_grad()
    def answers(self, model: Any, indices: Tensor, dtype: torch.dtype = torch.float32, team: Team = ALONE) -> Tensor:
        """The class with the highest cosine to each image: int64 [N], on the CPU.

        Every process of a team encodes a part of the prompts, and classifies its own images.

        Raises:
            SharedError: in every process of a team, the error of one of them.
        """
        class_features = self.class_features(model, team)
        with team.together():
            nearest = [
                (model.encode_image(x.to(dtype), normalize=True).float() @ class_features.T).argmax(-1).cpu()
                for x in self.pixels(indices)
            ]
        return torch.cat(nearest) if nearest else indices[:0]

    def agrees(self, answers: Tensor, indices: Tensor) -> Tensor:
        """Whether the answers [N] are the labels of the images `indices` [N]: bool [N]."""
        return answers.cpu() == self.dataset.labels[indices]

    def accuracy(self, model: Any, indices: Tensor, dtype: torch.dtype = torch.float32, team: Team = ALONE) -> float:
        """The share of the images `indices` [N] that `model` classifies correctly; a team's processes divide them."""
        own = team.share(indices)
        return self.mean(self.agrees(self.answers(model, own, dtype, team), own), team)

    def zero_shot_accuracy(self, indices: Tensor, dtype: torch.dtype = torch.float32, team: Team = ALONE) -> float:
        """`accuracy` of the pretrained model."""
        own = team.share(indices)
        return self.mean(self.agrees(self.zero_shot_answers(own, dtype, team), own), team)

    def zero_shot_answers(self, indices: Tensor, dtype: torch.dtype = torch.float32, team: Team = ALONE) -> Tensor:
        """`answers` of the pretrained model, which are kept, so that it sees every image once."""
        answers = self._zero_shot.setdefault(dtype, torch.full([len(self.dataset.labels)], -1))
        unknown = indices[answers[indices] < 0]
        with team.together():
            if len(unknown):  # true in some processes only, so that each encodes all prompts by itself
                answers[unknown] = self.answers(self.backbone.in_dtype(dtype), unknown, dtype)
        return answers[indices]

    def mean(self, correct: Tensor, team: Team = ALONE) -> float:
        """The share of correct answers, bool [N], over all processes of a team."""
        counts = torch.stack([correct.sum(), torch.tensor(len(correct))]).to(self.backbone.device)
        right, asked = team.sum(counts).tolist()
        return right / asked if asked else float("nan")

    def pixels(self, indices: Tensor) -> Iterator[Tensor]:
        """The images in batches, as inputs of the model in a measurement: float32 [B, 3, S, S], on its device."""
        for batch in indices.split(self.batch_size):
            if isinstance(self.dataset.images, Tensor):
                yield self.backbone.preprocess(self.dataset.images[batch].to(self.backbone.device))
            else:
                crops = self._decoded(batch).to(self.backbone.device)
                yield self.backbone.normalize(crops.float() / 255)

    def forget(self) -> None:
        """Free the decoded images."""
        self._budget.give_back(sum(crop.numel() for crop in self._crops.values()))
        self._crops = {}

    def _tokenize(self, templates: Sequence[str]) -> Tensor:  # [T · C, L]
        texts = [text for template in templates for text in prompts(template, self.dataset.class_names)]
        return self.backbone.tokenize(texts).to(self.backbone.device)

    def _text_features(self, model: Any, tokens: Tensor, team: Team) -> Tensor:  # [N, L] to normalised float32 [N, D]
        own = team.rows_of(tokens)
        if torch.is_grad_enabled():  # a training step may be in a CUDA graph, where processes cannot exchange errors
            features = model.encode_text(own, normalize=True).float()
        else:
            parts = own.split(max(self.batch_size, 1))  # only one part at a time takes memory
            with team.together():
                features = torch.cat([model.encode_text(part, normalize=True).float() for part in parts])
        return team.gather(features, len(tokens))

    def _decoded(self, indices: Tensor) -> Tensor:  # uint8 [B, 3, S, S]
        images: Any = self.dataset.images
        unknown = [i for i in dict.fromkeys(indices.tolist()) if i not in self._crops]
        fresh: dict[int, Tensor] = {}
        if unknown:
            paths = [images[i] for i in unknown]
            crops = load_crops(paths, self.backbone.size, **self.backbone.resize, progress=False)
            fresh = dict(zip(unknown, crops, strict=True))
            if self._budget.take(crops.numel()):
                self._crops |= fresh
        return torch.stack([fresh[i] if i in fresh else self._crops[i] for i in indices.tolist()])
