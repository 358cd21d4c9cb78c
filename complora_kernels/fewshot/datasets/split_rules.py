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


def sample_shots(
    labels: Tensor,
    shots: int,
    seed: int | tuple[int, ...],
    *,
    leave: int = 0,
    strict: bool = True,
    class_names: Sequence[str] | None = None,
) -> Tensor:
    """Sample `shots` images of every class; the sample is part of every larger sample of the same seed.

    Args:
        labels: int64 [N].
        shots: images per class, at least 1.
        seed: seed of the random numbers, not negative.
        leave: the number of images of every class that must be left over.
        strict: False: a class with fewer images gives all of them.
        class_names: the names of the labels in messages.

    Returns:
        int64 [S], indices class by class, in ascending order of the labels.

    Raises:
        ValueError: a class has fewer images than `shots` and `leave` together.
    """
    random = np.random.default_rng(seed)
    chosen = []
    classes, counts = labels.unique(return_counts=True)
    members_by_class = labels.argsort(stable=True).split(counts.tolist())
    for label, members in zip(classes.tolist(), members_by_class, strict=True):
        if strict and len(members) < shots + leave:
            name = label if class_names is None else repr(class_names[label])
            expected = f"at least {shots + leave}" + (", to test on the rest" if leave else "")
            raise ValueError(f"shots={shots}: class {name} has {len(members)} images, expected {expected}")
        chosen.append(members[torch.from_numpy(random.permutation(len(members))[:shots])])
    return torch.cat(chosen)


def _own(dataset: Dataset, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    labels, names = dataset.labels, dataset.class_names
    leave = 1 if dataset.test is None else 0
    if not leave:
        _check_enough(dataset, shots)
    train = dataset.train[sample_shots(labels[dataset.train], shots, seed, leave=leave, class_names=names)]
    val = dataset.val
    if len(val):
        val = val[sample_shots(labels[val], min(shots, MOST_VAL), (seed, 0, _VAL_STREAM), strict=False)]
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
                    f"shots={shots}: {_training_images(dataset, label)}, expected at least {shots + most}: in "
                    f"CLIP-LoRA's split {most} validation images come out of them too"
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
