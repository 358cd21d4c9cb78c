"""The training images of a run, and the batch of each step: a function of the seed and the step, without any state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from complora_kernels.fewshot.config import TrainConfig
from complora_kernels.fewshot.crops import draw_boxes, resample
from complora_kernels.fewshot.decode import load_crops
from complora_kernels.fewshot.images import DeviceImages
from complora_kernels.fewshot.setting import Setting
from complora_kernels.fewshot.team import ALONE, Team


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The batch number `step` of an endless stream that runs through a new permutation of `range(n)` in every epoch.

    Returns:
        int64 [min(batch_size, n)]; a batch may hold the end of an epoch and the beginning of the next one.
    """
    batch_size = min(batch_size, n)
    start = step * batch_size
    first, last = start // n, (start + batch_size - 1) // n
    epochs = [np.random.default_rng((seed, epoch)).permutation(n) for epoch in range(first, last + 1)]
    return torch.from_numpy(np.concatenate(epochs)[start - first * n :][:batch_size])


def training_images(setting: Setting, indices: Tensor, config: TrainConfig) -> DeviceImages:
    """The training images [N], decoded once per split: whole for augmentation, otherwise in the size of the model."""
    dataset, device = setting.new.dataset, setting.backbone.device
    budget = round(config.image_memory_gib * 2**30)
    if isinstance(dataset.images, Tensor):
        return DeviceImages.from_tensors(dataset.images[indices], device, budget_bytes=budget)
    key = (dataset.asked_as, dataset.root, *indices.tolist(), config.augmentation, budget)
    if key not in setting.decoded:
        setting.decoded.clear()
        setting.decoded[key] = _decoded(setting, [dataset.images[i] for i in indices.tolist()], config, budget)
    return setting.decoded[key]


def _decoded(setting: Setting, paths: Sequence[Path], config: TrainConfig, budget: int) -> DeviceImages:
    device = setting.backbone.device
    if config.augmentation == "none":
        crops = load_crops(paths, setting.backbone.size, **setting.backbone.resize, progress=False)
        return DeviceImages.from_tensors(crops, device, budget_bytes=budget)
    # A crop of a quarter of an image's length then needs no enlarging, and large photos take less memory.
    shorter_side = 4 * max(setting.backbone.size)
    return DeviceImages.from_files(paths, device, budget_bytes=budget, shorter_side=shorter_side, progress=False)


def training_pixels(
    images: DeviceImages,
    indices: Tensor,
    setting: Setting,
    augmentation: str,
    seed: int,
    step: int,
    team: Team = ALONE,
) -> Tensor:
    """The images of a step, as the input of the model.

    Args:
        images: the N training images.
        indices: int64 [B], on the host: the images of the batch.
        setting: tells the input of the model, and whether images may be mirrored.
        augmentation: "none", or "crop-flip" for random crops and flips, a function of seed and step.
        seed: seed of the run.
        step: number of the step.
        team: the processes that share the batch.

    Returns:
        float32 [B, 3, S, S], on the device; in a team this process's share of the batch.
    """
    backbone = setting.backbone
    if augmentation == "none":
        indices = team.share(indices)
        return backbone.preprocess(torch.stack([images[i] for i in indices.tolist()]).to(backbone.device))
    boxes, flips = draw_boxes(images.sizes[indices], seed, step)
    flips &= setting.new.dataset.can_be_mirrored
    indices, boxes, flips = map(team.share, (indices, boxes, flips))
    return backbone.normalize(resample(images, indices, boxes, flips, backbone.size))
