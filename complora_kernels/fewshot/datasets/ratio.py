"""Makes the split of a data set that comes without one."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from complora_kernels.fewshot.datasets.dataset import Entry

TEST, VAL = 0.3, 0.2
"""The shares of every class that `ratio_split` sets aside, as in CoOp's own splits."""


def ratio_split(
    entries: Sequence[Entry], names: Sequence[str], class_names: Sequence[str], source: Path
) -> dict[str, list[Entry]]:
    """Set 30% of every class aside for testing, at least one image, and 20% for validation; the rest is for training.

    The split depends on the names of the images alone: those with the lowest SHA-256 are for testing, the next ones for
    validation. So it is the same on every machine, and a few more images change little of it.

    Args:
        entries: files with labels.
        names: the files' names, unique.
        class_names: names of the labels.
        source: the file or folder that messages name.

    Returns:
        "train", "val" and "test", each in the order of `entries`.

    Raises:
        ValueError: a class has a single image.
    """
    members: dict[int, list[int]] = {}
    for i, (_, label) in enumerate(entries):
        members.setdefault(label, []).append(i)
    split_of: dict[int, str] = {}
    for label, indices in sorted(members.items()):
        n = len(indices)
        if n < 2:
            raise ValueError(f"{source}: class {class_names[label]!r} has 1 image, expected at least 2 to split it")
        n_test, n_val = round(TEST * n), round(VAL * n)
        shuffled = sorted(indices, key=lambda i: _digest(names[i]))
        split_of.update(dict.fromkeys(shuffled, "train"))
        split_of.update(dict.fromkeys(shuffled[: n_test + n_val], "val"))
        split_of.update(dict.fromkeys(shuffled[:n_test], "test"))
    return {
        split: [entries[i] for i in range(len(entries)) if split_of[i] == split] for split in ("train", "val", "test")
    }


def _digest(name: str) -> bytes:
    # A name has two Unicode forms, and file systems differ in the form that they return
    normal = unicodedata.normalize("NFC", name)
    return hashlib.sha256(normal.encode(errors="surrogateescape")).digest()  # file names need not be UTF-8
