"""The two tasks of the bundled program: scanned digits, to be learned, and rendered letters, to be kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from complora_kernels.fewshot import glyphs


@dataclass(frozen=True)
class Dataset:
    """Labelled images, small enough to be held in memory."""

    name: str
    images: Tensor  # uint8 [N, 3, H, W]
    labels: Tensor  # int64 [N], indices into class_names
    class_names: tuple[str, ...]
    can_be_mirrored: bool = False  # a mirror image shows the same class: not so for characters


def digits() -> Dataset:
    """scikit-learn's 1,797 scanned handwritten digits, 8x8 pixels, bright on black.

    They come with scikit-learn: the test set of "Optical Recognition of Handwritten Digits", UCI repository.
    """
    from sklearn.datasets import load_digits

    scans: Any = load_digits()
    grey = torch.from_numpy(scans.images)  # float64 [N, 8, 8], 0 to 16
    images = (grey * (255 / 16)).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()
    names = tuple(f"digit {digit}" for digit in glyphs.DIGITS)
    return Dataset("digits", images, torch.from_numpy(scans.target).long(), names)


def letters() -> Dataset:
    """The 26 letters in fonts that the bundled model has never seen, 32x32 pixels, in colours on dark grounds."""
    images, labels = glyphs.letter_test_set()
    return Dataset("letters", images, labels, tuple(name.removeprefix("the ") for name in glyphs.LETTERS))
