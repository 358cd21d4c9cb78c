"""The preservation loss of a run: its vocabulary, the names that each step draws, and the frozen model's features."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import complora_kernels as ck
from complora_kernels.fewshot.batches import training_pixels
from complora_kernels.fewshot.images import DeviceImages
from complora_kernels.fewshot.vocabulary import vocabulary_of, vocabulary_prompts

if TYPE_CHECKING:
    from complora_kernels.fewshot.training import RunContext

_NAMES = 2  # separates the random numbers of a step's names from those of its crops


@dataclass(frozen=True)
class Preservation:
    """What a run adds to its loss."""

    loss: ck.PreservationLoss
    weight: float
    sample: int  # names per step
    frozen_features: Tensor | None  # [N, D] of the training images; None: they are cropped anew in each step
    fingerprint: str  # 12 hexadecimal digits of a hash over the names

    def described(self) -> dict[str, Any]:
        """What the run's line in results.jsonl says of the loss."""
        return {"preserve": self.weight, "vocabulary": self.fingerprint}

    def batch(self, indices: Tensor, seed: int, step: int) -> tuple[Tensor, ...]:
        """What a step reads beside the images `indices` [B]: its names, [n], and the images' frozen features, [B, D].

        The names are a function of seed and step, the same in all processes of a team.
        """
        names = draw_names(len(self.loss.tokens), self.sample, seed, step).to(indices.device, non_blocking=True)
        return (names,) if self.frozen_features is None else (names, self.frozen_features[indices])

    def __call__(
        self, pixels: Tensor, image_features: Tensor, names: Tensor, frozen_features: Tensor | None = None
    ) -> Tensor:  # []
        """The weighted loss of images [B, 3, S, S] with their features [B, D] in training and what `batch` returned."""
        loss = self.loss(pixels, image_features, frozen_image_features=frozen_features, names=names)
        return self.weight * loss


def draw_names(n: int, sample: int, seed: int, step: int) -> Tensor:
    """The names of a step: int64 [min(sample, n)], distinct indices below n."""
    return torch.from_numpy(np.random.default_rng((seed, step, _NAMES)).permutation(n)[:sample].astype(np.int64))


def preservation_of(context: RunContext, model: Any, images: DeviceImages, logit_scale: Tensor) -> Preservation | None:
    """The preservation loss of a run's method; None where it has none.

    Args:
        context: the run.
        model: the adapted model, in the dtype of training.
        images: the N training images.
        logit_scale: [], the factor of cosines.
    """
    config, run, setting = context.config, context.run, context.setting
    weight = config.preservation_weight(run.method)
    if weight == 0:
        return None
    tasks = (setting.new, *setting.kept.values())
    names = vocabulary_of(config, [name for task in tasks for name in task.dataset.class_names])
    texts = vocabulary_prompts(config, names)
    classes = vocabulary_prompts(config, setting.new.dataset.class_names)
    loss = ck.PreservationLoss(
        model, texts, tokenize=setting.backbone.tokenize, new_classes=classes, logit_scale=logit_scale
    )
    frozen = None
    if config.augmentation == "none":
        parts = torch.arange(len(images)).split(config.test_batch_size)
        pixels = (training_pixels(images, part, setting, "none", run.seed, 0).to(context.dtype) for part in parts)
        frozen = torch.cat([loss.frozen_image_features(part) for part in pixels])
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
    return Preservation(loss, weight, config.vocabulary_sample, frozen, digest)
