"""How well a CLIP names images, before it is adapted and after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from complora_kernels.fewshot.backbone import Backbone
from complora_kernels.fewshot.datasets import Dataset
from complora_kernels.fewshot.images import load_crops
from complora_kernels.fewshot.team import ALONE, Team
from complora_kernels.fewshot.templates import prompts


class Task:
    """A data set on one backbone: its prompts, its images as the model takes them, what the pretrained model answers.

    Args:
        dataset: the images and the names of their classes.
        backbone: the pretrained model.
        templates: the prompts, each with {} for the class name; the features of several are averaged.
        batch_size: images per forward pass.
        cache_bytes: images of files are kept decoded, up to this much for all of them, or decoded at each use.
    """

    def __init__(
        self,
        dataset: Dataset,
        backbone: Backbone,
        templates: Sequence[str],
        batch_size: int = 256,
        cache_bytes: int = 2**33,
    ):
        self.dataset = dataset
        self.backbone = backbone
        self.batch_size = batch_size
        texts = [text for template in templates for text in prompts(template, dataset.class_names)]
        self.tokens = backbone.tokenize(texts).to(backbone.device)  # [T · C, L]
        self._zero_shot: dict[torch.dtype, Tensor] = {}  # [N]: 1 correct, 0 wrong, -1 not asked yet
        self._crops: Tensor | None = None  # uint8 [N, 3, S, S], of which those are there that _is_decoded says
        self._is_decoded = torch.zeros(len(dataset.labels), dtype=torch.bool)
        self._cache_bytes = cache_bytes

    def class_features(self, model: Any, team: Team = ALONE) -> Tensor:  # float32 [C, D]
        """The normalised features of the classes, differentiable; every process of a team encodes its part of them."""
        tokens = team.rows_of(self.tokens)
        parts = [tokens] if torch.is_grad_enabled() else tokens.split(max(self.batch_size, 1))  # memory for one part
        features = torch.cat([model.encode_text(part, normalize=True).float() for part in parts])
        features = team.gather(features, len(self.tokens))  # [T · C, D]
        if len(features) == len(self.dataset.class_names):
            return features
        return F.normalize(features.unflatten(0, (-1, len(self.dataset.class_names))).mean(0), dim=-1)

    @torch.no_grad()
    def image_features(self, model: Any, indices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The normalised features [N, D] of the images `indices` [N], float32 on the backbone's device.

        `dtype` is that of the model, the backbone's or an adapted copy of it, in eval mode.
        """
        features = [model.encode_image(x.to(dtype), normalize=True).float() for x in self.pixels(indices)]
        return torch.cat(features) if features else self.class_features(model)[:0]

    @torch.no_grad()
    def is_correct(self, model: Any, indices: Tensor, dtype: torch.dtype = torch.float32, team: Team = ALONE) -> Tensor:
        """Whether the class nearest to each image, by the cosine of their features, is its own: bool [N], on the CPU.

        Every process of a team encodes a part of the prompts, and asks about its own images.
        """
        class_features = self.class_features(model, team)
        nearest = [
            (model.encode_image(x.to(dtype), normalize=True).float() @ class_features.T).argmax(-1).cpu()
            for x in self.pixels(indices)
        ]
        return self.agrees(torch.cat(nearest) if nearest else indices[:0], indices)

    def agrees(self, answers: Tensor, indices: Tensor) -> Tensor:
        """Whether the answers [N] are the labels of the images `indices` [N]: bool [N]."""
        return answers.cpu() == self.dataset.labels[indices]

    def accuracy(self, model: Any, indices: Tensor, dtype: torch.dtype = torch.float32, team: Team = ALONE) -> float:
        """Share of the images `indices` [N] that `model` names correctly; the processes of a team share them."""
        return self.mean(self.is_correct(model, team.share(indices), dtype, team), team)

    def zero_shot_accuracy(self, indices: Tensor, dtype: torch.dtype = torch.float32, team: Team = ALONE) -> float:
        """`accuracy` of the pretrained model, which is asked about every image once only."""
        answers = self._zero_shot.setdefault(dtype, torch.full([len(self.dataset.labels)], -1))
        indices = team.share(indices)
        unknown = indices[answers[indices] < 0]
        if len(unknown):
            answers[unknown] = self.is_correct(self.backbone.in_dtype(dtype), unknown, dtype).long()
        return self.mean(answers[indices] > 0, team)

    def mean(self, correct: Tensor, team: Team = ALONE) -> float:
        """The share of correct answers, bool [N], over all processes of a team."""
        counts = torch.stack([correct.sum(), torch.tensor(len(correct))]).to(self.backbone.device)
        right, asked = team.sum(counts).tolist()
        return right / asked if asked else float("nan")

    def pixels(self, indices: Tensor) -> Iterator[Tensor]:
        """The images as the model takes them when it is measured, float32 [B, 3, S, S], on its device."""
        for batch in indices.split(self.batch_size):
            if isinstance(self.dataset.images, Tensor):
                yield self.backbone.preprocess(self.dataset.images[batch].to(self.backbone.device))
            else:
                crops = self._decoded(batch).to(self.backbone.device)
                yield self.backbone.normalize(crops.float() / 255)

    def _decoded(self, indices: Tensor) -> Tensor:  # uint8 [B, 3, S, S]
        images: Any = self.dataset.images
        crop_bytes = 3 * self.backbone.size[0] * self.backbone.size[1]
        measured = len(images) if self.dataset.test is None else len(self.dataset.test)
        if self._crops is None and crop_bytes * measured > self._cache_bytes:
            return self._decode(indices)
        if self._crops is None:
            self._crops = torch.empty(len(images), 3, *self.backbone.size, dtype=torch.uint8)  # takes what is written
        unknown = indices[~self._is_decoded[indices]]
        if len(unknown):
            self._crops[unknown] = self._decode(unknown)
            self._is_decoded[unknown] = True
        return self._crops[indices]

    def _decode(self, indices: Tensor) -> Tensor:  # uint8 [B, 3, S, S]
        images: Any = self.dataset.images
        paths = [images[i] for i in indices.tolist()]
        return load_crops(paths, self.backbone.size, **self.backbone.resize, progress=False)
