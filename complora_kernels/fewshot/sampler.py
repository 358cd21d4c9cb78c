"""Which images are trained on, and in which order. Both are functions of a seed, with no state to save."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def draw_shots(labels: Tensor, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw `shots` images of every class; the rest is the test set.

    The draw of a seed is part of every larger draw of the same seed.

    Args:
        labels: int64 [N].
        shots: images per class, at least 1.
        seed: chooses the draw, at least 0.

    Returns:
        Indices of the training images [classes · shots], class by class, and of all other images, in their order.

    Raises:
        ValueError: a class has fewer images than `shots`, or none beyond them to test on.
    """
    train = draw_classes(labels, shots, seed, leave=1)
    is_test = torch.ones(len(labels), dtype=torch.bool)
    is_test[train] = False
    return train, is_test.nonzero()[:, 0]


def draw_classes(
    labels: Tensor,
    shots: int,
    seed: int | tuple[int, ...],
    *,
    leave: int = 0,
    strict: bool = True,
    class_names: Sequence[str] | None = None,
) -> Tensor:
    """Draw `shots` images of every class; a draw is part of every larger draw of the same seed.

    Args:
        labels: int64 [N].
        shots: images per class, at least 1.
        seed: chooses the draw, not negative.
        leave: so many images of every class must be left.
        strict: False: of a class with fewer images, draw all.
        class_names: what messages call the labels.

    Returns:
        int64, indices class by class, in ascending order of the labels.

    Raises:
        ValueError: a class has fewer images than `shots`, or than `leave` beyond them.
    """
    if shots < 1:
        raise ValueError(f"shots={shots}: expected at least 1")
    random = np.random.default_rng(seed)
    drawn = []
    classes, counts = labels.unique(return_counts=True)
    of_classes = labels.argsort(stable=True).split(counts.tolist())
    for label, members in zip(classes.tolist(), of_classes, strict=True):
        if strict and len(members) < shots + leave:
            name = label if class_names is None else repr(class_names[label])
            expected = f"at least {shots + leave}" + (", to test on the rest" if leave else "")
            raise ValueError(f"shots={shots}: class {name} has {len(members)} images, expected {expected}")
        drawn.append(members[torch.from_numpy(random.permutation(len(members))[:shots])])
    return torch.cat(drawn)


def batch_indices(n: int, batch_size: int, seed: int, step: int) -> Tensor:
    """The `step`-th batch of an endless stream that runs through a new permutation of `range(n)` in every epoch.

    Returns:
        int64 [min(batch_size, n)]; a batch at the seam of two epochs takes from both.
    """
    batch_size = min(batch_size, n)
    start = step * batch_size
    first, last = start // n, (start + batch_size - 1) // n
    epochs = [np.random.default_rng((seed, epoch)).permutation(n) for epoch in range(first, last + 1)]
    return torch.from_numpy(np.concatenate(epochs)[start - first * n :][:batch_size])
