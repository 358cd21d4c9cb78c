"""A few-shot split: the images of a data set that a run trains on, validates on and is tested on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

import torch
from torch import Tensor

from complora_kernels.fewshot.datasets.dataset import Dataset, within


@dataclass(frozen=True)
class FewShotSplit:
    """The indices of the chosen images in their data set, and how they were chosen."""

    train: Tensor  # int64 [S], class by class
    val: Tensor  # int64 [V], may be empty
    test: Tensor  # int64 [N], the data set's test set or, where it has none, the images that are left
    shots: int | None = None  # None: the file of the split does not say
    seed: int | None = None
    kind: str = "own"  # the rule that chose the images, or the file that names them


def with_test_set(
    dataset: Dataset, train: Tensor, val: Tensor, shots: int | None, seed: int | None, kind: str
) -> FewShotSplit:
    """The split with its test set: that of the data set or, where it has none, the images that are left.

    Raises:
        ValueError: no image is left.
    """
    test = dataset.test
    if test is None:
        is_test = torch.zeros(len(dataset.labels), dtype=torch.bool)
        is_test[dataset.train] = True
        is_test[train] = is_test[val] = False
        test = is_test.nonzero()[:, 0]
    if not len(test):
        raise ValueError(f"{dataset.name}: a split with {len(train)} training images leaves none to test on")
    return FewShotSplit(train, val, test, shots, seed, kind)


def restrict(whole: FewShotSplit, members: Tensor, n: int) -> FewShotSplit:
    """The split of a half whose images are the `members` among the n images of the whole data set."""
    train, val, test = (within(indices, members, n) for indices in (whole.train, whole.val, whole.test))
    return FewShotSplit(train, val, test, whole.shots, whole.seed, whole.kind)


def fingerprint(dataset: Dataset, split: FewShotSplit) -> str:
    """12 hexadecimal digits of a hash over the names and labels of all images of a split.

    They tell whether a result is of the same images as a new run.
    """
    parts = [
        [dataset.image_names(indices), dataset.labels[indices].tolist()]
        for indices in (split.train, split.val, split.test)
    ]
    return hashlib.sha256(json.dumps([dataset.class_names, parts]).encode()).hexdigest()[:12]
