"""The rules by which a seed draws images: ours, CoOp's and CLIP-LoRA's.

Each takes a data set with training images, the shots and the seed, and returns the indices of the images to train on
and to validate on. `draws.draw` says what each rule is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor

from complora_kernels.fewshot.datasets.dataset import Dataset
from complora_kernels.fewshot.sampler import draw_classes

MOST_VAL = 4
"""Validation images of a class, at most."""
_VAL = 2  # keeps the random numbers of validation images apart from all others of the seed


def _own(dataset: Dataset, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    labels, names = dataset.labels, dataset.class_names
    leave = 1 if dataset.test is None else 0
    if not leave:
        _check_enough(dataset, shots)
    train = dataset.train[draw_classes(labels[dataset.train], shots, seed, leave=leave, class_names=names)]
    val = dataset.val
    if len(val):
        val = val[draw_classes(labels[val], min(shots, MOST_VAL), (seed, 0, _VAL), strict=False)]
    return train, val


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
                    f"shots={shots}: {_training_images(dataset, label)}, expected at least {shots + most}: as "
                    f"CLIP-LoRA draws, {most} to validate on come out of them too"
                )
            sample = random.sample(members, shots + most)
            train += sample[:shots]
            val += sample[shots:]
    return _indices(train), _indices(val)


def _check_enough(dataset: Dataset, shots: int) -> None:
    """Raise a ValueError where a class has fewer training images than shots."""
    counts = dataset.labels[dataset.train].bincount()
    for label in ((counts > 0) & (counts < shots)).nonzero()[:, 0].tolist():
        raise ValueError(f"shots={shots}: {_training_images(dataset, label)}, expected at least {shots}")


def _training_images(dataset: Dataset, label: int) -> str:
    """How many images of a class there are to train on, of how many: a split leaves fewer than its folder holds."""
    n, of_all = int((dataset.labels[dataset.train] == label).sum()), int((dataset.labels == label).sum())
    return f"class {dataset.class_names[label]!r} has {n} training image{'s' * (n != 1)} (of {of_all} in all)"


def _classes(dataset: Dataset, indices: Tensor) -> list[list[int]]:
    """The indices by class, the classes in the order of their first images."""
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
