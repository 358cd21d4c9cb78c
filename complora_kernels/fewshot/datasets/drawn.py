"""A draw: which images of a data set are trained on, validated on and tested on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from complora_kernels.fewshot.datasets.dataset import Dataset, within


@dataclass(frozen=True)
class Draw:
    """Images to train on, to validate on and to test on, and where they come from."""

    train: Tensor  # int64, indices into the data set's images, class by class
    val: Tensor  # int64, may be empty
    test: Tensor  # int64, the data set's test set, or what the draw leaves
    shots: int | None = None
    seed: int | None = None
    kind: str = "own"


def complete(dataset: Dataset, train: Tensor, val: Tensor, shots: int | None, seed: int | None, kind: str) -> Draw:
    """A draw with its test set: the data set's, or what the draw leaves.

    Raises:
        ValueError: it leaves nothing.
    """
    test = dataset.test
    if test is None:
        is_test = torch.zeros(len(dataset.labels), dtype=torch.bool)
        is_test[dataset.train] = True
        is_test[train] = is_test[val] = False
        test = is_test.nonzero()[:, 0]
    if not len(test):
        raise ValueError(f"{dataset.name}: a draw of {len(train)} images leaves none to test on")
    return Draw(train, val, test, shots, seed, kind)


def restrict(whole: Draw, members: Tensor, n: int) -> Draw:
    """What a draw has of the images `members` among the n of its data set, as places in `members`."""
    train, val, test = (within(indices, members, n) for indices in (whole.train, whole.val, whole.test))
    return Draw(train, val, test, whole.shots, whole.seed, whole.kind)
