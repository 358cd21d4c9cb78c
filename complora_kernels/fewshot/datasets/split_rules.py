"""The rules by which a seed chooses a few-shot split: the project's own, CoOp's and CLIP-LoRA's.

Each takes a data set with training images, the shots and the seed, and returns the indices of the training images and
of the validation images. `choose_split` describes each rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import torch
from torch import Tensor

from complora_kernels.fewshot.datasets.dataset import Dataset

MOST_VAL = 4
"""The most validation images of a class."""
_VAL_STREAM = 2  # separates the random numbers of validation images from all others of the seed


def _own(dataset: Dataset, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    _check_enough(dataset, shots)
    train = dataset.train[_sample(dataset.labels[dataset.train], shots, seed)]
    val = dataset.val
    if len(val):
        val = val[_sample(dataset.labels[val], min(shots, MOST_VAL), (seed, 0, _VAL_STREAM))]
    return train, val


def _sample(labels: Tensor, shots: int, seed: int | tuple[int, ...]) -> Tensor:
    """Indices of `shots` images of every class, or of all that it has, in ascending order of the labels [N].

    The sample is part of every larger sample of the same seed.
    """
    random = np.random.default_rng(seed)
    members_by_class = labels.argsort(stable=True).split(labels.unique(return_counts=True)[1].tolist())
    chosen = [members[torch.from_numpy(random.permutation(len(members))[:shots])] for members in members_by_class]
    return torch.cat(chosen)


def _coop(dataset: Dataset, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    random = Random(seed)
    train = [index for members in _classes(dataset, dataset.train) for index in _up_to(random, members, shots)]
    most = min(shots, MOST_VAL)
    val = [index for members in _classes(dataset, dataset.val) for index in _up_to(random, members, most)]
    return _indices(train), _indices(val)


def _clip_lora(dataset: Dataset, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    random = Random(seed)
    most = min(shots, MOST_VAL)
    train, val = [], []
    if len(dataset.val):
        for members in _classes(dataset, dataset.val):
            val += _exactly(random, members, most)
        for members in _classes(dataset, dataset.train):
            train += _exactly(random, members, shots)
    else:
        for members in _classes(dataset, dataset.train):
            if len(members) < shots + most:
                label = int(dataset.labels[members[0]])
                raise ValueError(
                    f"shots={shots}: {_training_images(dataset, label)}, expected at least {shots + most}: in "
                    f"CLIP-LoRA's split {most} validation images come out of them too"
                )
            sample = random.sample(members, shots + most)
            train += sample[:shots]
            val += sample[shots:]
    return _indices(train), _indices(val)


def _check_enough(dataset: Dataset, shots: int) -> None:
    """Raise a ValueError where a class has too few training images for the shots and, without a test set, a test."""
    n, why = (shots, "") if dataset.test is not None else (shots + 1, ", to test on the rest")
    counts = dataset.labels[dataset.train].bincount()
    for label in ((counts > 0) & (counts < n)).nonzero()[:, 0].tolist():
        raise ValueError(f"shots={shots}: {_training_images(dataset, label)}, expected at least {n}{why}")


def _training_images(dataset: Dataset, label: int) -> str:
    """The number of training images of a class beside that of all its images, as a part of a message."""
    n, total = int((dataset.labels[dataset.train] == label).sum()), int((dataset.labels == label).sum())
    return f"class {dataset.class_names[label]!r} has {n} training image{'s' * (n != 1)} (of {total} in all)"


def _classes(dataset: Dataset, indices: Tensor) -> list[list[int]]:
    """The indices of each class; the classes come in the order of their first images."""
    members: dict[int, list[int]] = {}
    for index, label in zip(indices.tolist(), dataset.labels[indices].tolist(), strict=True):
        members.setdefault(label, []).append(index)
    return list(members.values())


def _up_to(random: Random, members: Sequence[int], n: int) -> Sequence[int]:
    return random.sample(members, n) if len(members) >= n else members


def _exactly(random: Random, members: Sequence[int], n: int) -> Sequence[int]:
    return random.sample(members, n) if len(members) >= n else random.choices(members, k=n)


def _indices(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


RULES: dict[str, Callable[[Dataset, int, int], tuple[Tensor, Tensor]]] = {
    "own": _own,
    "coop": _coop,
    "clip-lora": _clip_lora,
}
