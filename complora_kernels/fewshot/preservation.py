"""What keeps a run near the frozen model: the preservation loss, and the divergence at which the run is stopped."""

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
    """What a run adds to its loss, and by what it may be stopped."""

    loss: ck.PreservationLoss
    weight: float  # 0: nothing is added
    sample: int  # names per step
    frozen_features: Tensor | None  # [N, D] of the training images; None: they are cropped anew in each step
    fingerprint: str  # 12 hexadecimal digits of a hash over the names
    limit: float | None = None  # of `divergence`; None: the run is not stopped
    whole: tuple[tuple[Tensor, Tensor], ...] = ()  # whole images [B, 3, S, S] with their frozen features [B, D]

    def described(self) -> dict[str, Any]:
        """What the run's line in results.jsonl says of the loss."""
        added = {"preserve": self.weight} if self.weight else {}
        return {**added, "vocabulary": self.fingerprint}

    @torch.no_grad()
    def divergence(self) -> Tensor:  # []
        """The loss, without its weight, of all training images and the whole vocabulary, in evaluation mode."""
        model = self.loss.model
        was_training = model.training
        model.eval()
        try:
            losses = [self.loss(pixels, frozen_image_features=frozen) * len(pixels) for pixels, frozen in self.whole]
        finally:
            model.train(was_training)
        return torch.stack(losses).sum() / sum(len(pixels) for pixels, _ in self.whole)

    def batch(self, indices: Tensor, seed: int, step: int) -> tuple[Tensor, ...]:
        """What a step reads beside the images `indices` [B]: its names, [n], and the images' frozen features, [B, D].

        Nothing where the loss has no weight. The names are a function of seed and step, the same in all processes of a
        team.
        """
        if not self.weight:
            return ()
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
    """The preservation loss of a run's method; None where it has none, and is not stopped by it either.

    Args:
        context: the run.
        model: the adapted model, in the dtype of training.
        images: the N training images.
        logit_scale: [], the factor of cosines.
    """
    config, run, setting = context.config, context.run, context.setting
    weight, limit = config.preservation_weight(run.method), config.divergence_limit
    if weight == 0 and limit is None:
        return None
    tasks = (setting.new, *setting.kept.values())
    names = vocabulary_of(config, [name for task in tasks for name in task.dataset.class_names])
    texts = vocabulary_prompts(config, names)
    classes = vocabulary_prompts(config, setting.new.dataset.class_names)
    loss = ck.PreservationLoss(
        model, texts, tokenize=setting.backbone.tokenize, new_classes=classes, logit_scale=logit_scale
    )
    whole = []
    if config.augmentation == "none" or limit is not None:
        for part in torch.arange(len(images)).split(config.test_batch_size):
            pixels = training_pixels(images, part, setting, "none", run.seed, 0).to(context.dtype)
            whole.append((pixels, loss.frozen_image_features(pixels)))
    frozen = torch.cat([features for _, features in whole]) if config.augmentation == "none" else None
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()[:12]
    kept = () if limit is None else tuple(whole)
    return Preservation(loss, weight, config.vocabulary_sample, frozen, digest, limit, kept)
