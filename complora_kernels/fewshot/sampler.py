"""Which images are trained on, and in which order. Both are functions of a seed, with no state to save."""

from __future__ import annotations

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
    if shots < 1:
        raise ValueError(f"shots={shots}: expected at least 1")
    random = np.random.default_rng(seed)
    drawn = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0]
        if len(members) <= shots:
            raise ValueError(f"shots={shots}: class {label} has {len(members)} images, expected more than the shots")
        drawn.append(members[torch.from_numpy(random.permutation(len(members))[:shots])])
    train = torch.cat(drawn)
    is_test = torch.ones(len(labels), dtype=torch.bool)
    is_test[train] = False
    return train, is_test.nonzero()[:, 0]


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
