"""The record of a data set, and its two halves for the base-to-new protocol."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from complora_kernels.fewshot.escapes import visible

logger = logging.getLogger("complora_kernels")

MOST_NAMED = 5
"""The most classes or folders that a message names."""

Entry = tuple[Path, int]
"""An image file and its label."""


@dataclass(frozen=True)
class Dataset:
    """Labelled images and how they are split."""

    name: str
    images: Tensor | tuple[Path, ...]  # uint8 [N, 3, H, W] in memory, or N files
    labels: Tensor  # int64 [N], indices into class_names
    class_names: tuple[str, ...]
    train: Tensor  # int64, indices of the images that few-shot splits train on; empty: for testing only
    val: Tensor  # int64, may be empty
    test: Tensor | None  # int64; None: the images of `train` that a few-shot split leaves
    can_be_mirrored: bool = True  # whether a mirror image shows the same class, which is not so for characters
    root: Path | None = None  # the folder that file names in saved splits and messages are relative to
    asked_as: str = ""  # the name given to `load_dataset`, such as "folder:PATH"
    # For a half: the whole data set, and int64 [N], the indices of this half's images in it
    part_of: tuple[Dataset, Tensor] | None = field(default=None, repr=False, compare=False)

    def image_names(self, indices: Tensor) -> list[str] | list[int]:
        """The names of images in saved splits: paths relative to `root`, with "/"; for images in memory, indices."""
        if isinstance(self.images, Tensor):
            return indices.tolist()
        root = "" if self.root is None else f"{self.root}{os.sep}"
        names = (str(self.images[i]).removeprefix(root) for i in indices.tolist())
        return [name.replace(os.sep, "/") for name in names]


def assemble(
    name: str,
    root: Path,
    class_names: Sequence[str],
    splits: Mapping[str, Sequence[Entry]],
    *,
    source: Path | None = None,
    twins: bool = False,
) -> Dataset:
    """Make a data set of image files from its lists.

    Args:
        name: name of the data set.
        root: the folder that file names are relative to.
        class_names: a name for each label, in their order.
        splits: "train", "val" and "test", each a list of files with labels below the number of names. Without any
            training image the data set is for testing only.
        source: the file or folder that messages name; None: `root`.
        twins: allow two classes with the same name, as ImageNet has them.

    Raises:
        ValueError: no images, a single class, two classes whose names give one prompt, a name that is not UTF-8, or a
            class without an image to train on or, where there are none at all, to test on.
    """
    source = root if source is None else source
    if not splits["test"]:
        raise ValueError(f"{source}: there are no images to test on")
    if len(class_names) < 2:
        raise ValueError(f"{source}: there is 1 class, {class_names[0]!r}, expected at least 2")
    if not twins:
        check_distinct(class_names, source)
    required = "train" if splits["train"] else "test"
    present = {label for _, label in splits[required]}
    for label, class_name in enumerate(class_names):
        if any("\ud800" <= character <= "\udfff" for character in class_name):  # bytes that are not UTF-8
            raise ValueError(f"{source}: class {class_name!r} (label {label}) has a name that is not UTF-8")
        if label not in present:
            raise ValueError(f"{source}: class {class_name!r} (label {label}) has no {required} image")
    entries = [entry for split in ("train", "val", "test") for entry in splits[split]]
    sizes = [len(splits[split]) for split in ("train", "val", "test")]
    train, val, test = torch.arange(len(entries)).split(sizes)
    return Dataset(
        name,
        tuple(path for path, _ in entries),
        torch.tensor([label for _, label in entries]),
        tuple(class_names),
        train,
        val,
        test,
        root=root,
    )


def warn_of_untested(dataset: Dataset, source: Path) -> None:
    """Log a warning that names the classes without a test image, about which the accuracy says nothing."""
    if dataset.test is not None:
        tested = set(dataset.labels[dataset.test].tolist())
        untested = tuple(name for label, name in enumerate(dataset.class_names) if label not in tested)
        if untested:
            warn_once(
                f"{source}: there is no image to test on of {enumerated(untested)}, which the accuracy leaves out"
            )


@cache  # a run loads its data set more than once
def warn_once(message: str) -> None:
    """Log a warning, unless this process has logged it before."""
    logger.warning("%s", visible(message))


def enumerated(names: Sequence[str]) -> str:
    """The first few of the names, as a part of a message."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(map(repr, names[:MOST_NAMED])) + more


def check_distinct(class_names: Sequence[str], source: Path) -> None:
    """Raise a ValueError where the names of two classes give one prompt to CLIP."""
    labels: dict[str, int] = {}
    for label, name in enumerate(class_names):
        first = labels.setdefault(as_clip_reads(name), label)
        if first != label:
            raise ValueError(
                f"{source}: classes {first} and {label} are called {class_names[first]!r} and {name!r}, expected names "
                "that differ in more than case, blanks and underscores, which CLIP does not tell apart"
            )


def as_clip_reads(name: str) -> str:
    """The form of a name that reaches CLIP's tokenizers: prompts have blanks for underscores."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").lower().split())


def base_and_new(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """Divide the classes as CoCoOp's base-to-new protocol does: into the first half, rounded up, and the rest.

    Each half has its own labels from 0, its own images and lists. Its few-shot split is a part of that of the whole.

    Raises:
        ValueError: the data set has a single class.
    """
    n = len(dataset.class_names)
    if n < 2:
        raise ValueError(f"{dataset.name} has {n} class, expected at least 2")
    middle = (n + 1) // 2
    return _part(dataset, "base", 0, middle), _part(dataset, "new", middle, n)


def _part(dataset: Dataset, name: str, first: int, end: int) -> Dataset:
    is_member = (dataset.labels >= first) & (dataset.labels < end)
    members = is_member.nonzero()[:, 0]
    images = dataset.images
    images = images[members] if isinstance(images, Tensor) else tuple(images[i] for i in members.tolist())
    return Dataset(
        f"{dataset.name}-{name}",
        images,
        dataset.labels[members] - first,
        dataset.class_names[first:end],
        within(dataset.train, members, len(is_member)),
        within(dataset.val, members, len(is_member)),
        None if dataset.test is None else within(dataset.test, members, len(is_member)),
        dataset.can_be_mirrored,
        dataset.root,
        part_of=(dataset, members),
    )


def within(indices: Tensor, members: Tensor, n: int) -> Tensor:
    """The places in `members` of those indices, all below n, that are members; in the order of the indices."""
    places = torch.full([n], -1)
    places[members] = torch.arange(len(members))
    places = places[indices]
    return places[places >= 0]
