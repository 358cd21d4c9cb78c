"""The bundled data sets: scanned digits and photos to learn, rendered letters and pictures to retain."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from complora_kernels.fewshot import glyphs
from complora_kernels.fewshot.datasets import pictures
from complora_kernels.fewshot.datasets.dataset import Dataset

CHARACTERS = {
    "digits": tuple(f"digit {digit}" for digit in glyphs.DIGITS),
    "letters": tuple(name.removeprefix("the ") for name in glyphs.LETTERS),
}


def digits() -> Dataset:
    """scikit-learn's 1,797 scanned handwritten digits, 8x8 pixels, bright on black.

    They are a part of scikit-learn: the test set of "Optical Recognition of Handwritten Digits", UCI repository. The
    images that a few-shot split does not train on are its test set.
    """
    from sklearn.datasets import load_digits

    scans: Any = load_digits()
    grey = torch.from_numpy(scans.images)  # float64 [N, 8, 8], from 0 to 16
    images = (grey * (255 / 16)).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1).contiguous()
    return _characters("digits", images, torch.from_numpy(scans.target).long(), test=None)


def letters() -> Dataset:
    """The 26 letters in fonts that the bundled model has never seen, 32x32 pixels, in colours on dark grounds."""
    images, labels = glyphs.letter_test_set()
    return _characters("letters", images, labels, test=torch.arange(len(labels)))


def _characters(name: str, images: Tensor, labels: Tensor, test: Tensor | None) -> Dataset:
    everything = torch.arange(len(labels))
    return Dataset(name, images, labels, CHARACTERS[name], everything, everything[:0], test, can_be_mirrored=False)


BUNDLED: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "letters": letters,
    **{name: partial(pictures.load_data, name) for name in pictures.NAMES},
}
"""The data sets by name."""


def class_names(name: str) -> tuple[str, ...]:
    """The names of the classes of one of `BUNDLED`, without loading its images."""
    return CHARACTERS[name] if name in CHARACTERS else pictures.class_names(name)
