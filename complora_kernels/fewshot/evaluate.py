"""How well a CLIP names images, before it is adapted and after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from complora_kernels.fewshot.backbone import Backbone
from complora_kernels.fewshot.datasets import Dataset
from complora_kernels.fewshot.templates import prompts


@torch.no_grad()
def is_correct(
    model: Any,
    backbone: Backbone,
    images: Tensor,  # uint8 [N, 3, H, W]
    labels: Tensor,  # int64 [N]
    tokens: Tensor,  # [C, L]
    batch_size: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Whether the prompt nearest to each image, by the cosine of their features, is that of its own class.

    Args:
        model: the backbone's model or an adapted copy of it, in eval mode.
        backbone: how images become inputs.
        images: uint8 [N, 3, H, W].
        labels: int64 [N], indices into `tokens`.
        tokens: the tokenized prompts, one per class.
        batch_size: images per forward pass.
        dtype: that of the model.

    Returns:
        bool [N], on the CPU.
    """
    class_features = model.encode_text(tokens, normalize=True).float()  # [C, D]
    nearest = []
    for batch in images.split(batch_size):
        pixels = backbone.preprocess(batch.to(backbone.device)).to(dtype)  # [N, 3, S, S]
        features = model.encode_image(pixels, normalize=True).float()  # [N, D]
        nearest.append((features @ class_features.T).argmax(-1).cpu())
    return torch.cat(nearest) == labels


class Task:
    """A data set on one backbone: its prompts, and what the pretrained model answers to its images.

    Args:
        dataset: the images and the names of their classes.
        backbone: the pretrained model.
        template: the prompt, with {} for the class name.
        batch_size: images per forward pass.
    """

    def __init__(self, dataset: Dataset, backbone: Backbone, template: str, batch_size: int = 256):
        self.dataset = dataset
        self.backbone = backbone
        self.batch_size = batch_size
        self.tokens = backbone.tokenize(prompts(template, dataset.class_names)).to(backbone.device)  # [C, L]
        self._zero_shot = torch.full([len(dataset.labels)], -1)  # 1 correct, 0 wrong, -1 not asked yet

    def accuracy(self, model: Any, indices: Tensor, dtype: torch.dtype = torch.float32) -> float:
        """Share of the images `indices` [N] that `model`, the backbone's or an adapted copy, names correctly.

        `dtype` is that of the model.
        """
        return self._is_correct(model, indices, dtype).double().mean().item()

    def zero_shot_accuracy(self, indices: Tensor) -> float:
        """`accuracy` of the pretrained model, which is asked about every image once only."""
        unknown = indices[self._zero_shot[indices] < 0]
        if len(unknown):
            self._zero_shot[unknown] = self._is_correct(self.backbone.model, unknown, torch.float32).long()
        return self._zero_shot[indices].double().mean().item()

    def _is_correct(self, model: Any, indices: Tensor, dtype: torch.dtype) -> Tensor:
        images, labels = self.dataset.images[indices], self.dataset.labels[indices]
        return is_correct(model, self.backbone, images, labels, self.tokens, self.batch_size, dtype)
