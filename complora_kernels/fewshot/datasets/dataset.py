"""What a data set is, whoever made it, and its two halves for the base-to-new protocol."""

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
"""Classes or folders that a message names, at most."""

Entry = tuple[Path, int]
"""An image file and its label."""


@dataclass(frozen=True)
class Dataset:
    """Labelled images and how they are split."""

    name: str
    images: Tensor | tuple[Path, ...]  # uint8 [N, 3, H, W] in memory, or N files
    labels: Tensor  # int64 [N], indices into class_names
    class_names: tuple[str, ...]
    train: Tensor  # int64, indices of the images that shots are drawn from; empty: for testing only
    val: Tensor  # int64, may be empty
    test: Tensor | None  # int64; None: what the draw leaves of `train`
    can_be_mirrored: bool = True  # a mirror image shows the same class: not so for characters
    root: Path | None = None  # folder that file names in draws and messages are relative to
    asked_as: str = ""  # what `load_dataset` was asked for, such as "folder:PATH"
    # The data set that this is a half of, and int64 [N], where its images are there
    part_of: tuple[Dataset, Tensor] | None = field(default=None, repr=False, compare=False)

    def image_names(self, indices: Tensor) -> list[str] | list[int]:
        """What draws call these images: file names relative to `root`, with "/", or the indices of images in memory."""
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
    """A data set of files out of its lists.

    Args:
        name: of the data set.
        root: what file names are relative to.
        class_names: a name for each label, in their order.
        splits: "train", "val" and "test", each a list of files with labels below the number of names. Without any
            training image the data set is for testing only.
        source: the file or folder that messages blame; None: `root`.
        twins: allow two classes of one name, as ImageNet has them.

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
    drawn_from = "train" if splits["train"] else "test"
    present = {label for _, label in splits[drawn_from]}
    for label, class_name in enumerate(class_names):
        if any("\ud800" <= character <= "\udfff" for character in class_name):  # bytes of a folder's name as they are
            raise ValueError(f"{source}: class {class_name!r} (label {label}) has a name that is not UTF-8")
        if label not in present:
            raise ValueError(f"{source}: class {class_name!r} (label {label}) has no {drawn_from} image")
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
    """Log a warning where classes have no image to test on: the accuracy says nothing about them."""
    if dataset.test is not None:
        tested = set(dataset.labels[dataset.test].tolist())
        untested = tuple(name for label, name in enumerate(dataset.class_names) if label not in tested)
        if untested:
            warn_once(
                f"{source}: there is no image to test on of {enumerated(untested)}, which the accuracy leaves out"
            )


@cache  # a run loads its data set more than once, and says it once
def warn_once(message: str) -> None:
    """Log a warning that has not been logged yet."""
    logger.warning("%s", visible(message))


def enumerated(names: Sequence[str]) -> str:
    """Names in a message, the first few of them."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(map(repr, names[:MOST_NAMED])) + more


def check_distinct(class_names: Sequence[str], source: Path) -> None:
    """Raise a ValueError where the names of two classes give one prompt to CLIP."""
    labels: dict[str, int] = {}
    for label, name in enumerate(class_names):
        first = labels.setdefault(_as_clip_reads(name), label)
        if first != label:
            raise ValueError(
                f"{source}: classes {first} and {label} are called {class_names[first]!r} and {name!r}, expected names "
                "that differ in more than case, blanks and underscores, which CLIP does not tell apart"
            )


def _as_clip_reads(name: str) -> str:
    """A name as it comes to CLIP's tokenizers: prompts have blanks for underscores."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").lower().split())


def base_and_new(dataset: Dataset) -> tuple[Dataset, Dataset]:
    """The first half of the classes, rounded up, and the rest, as CoCoOp's base-to-new protocol has them.

    Each half has its own labels from 0, its own images and splits. Its shots are those that a draw of the whole data
    set gives its classes.

    Raises:
        ValueError: a single class.
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
    """Those of the indices, below n, that are among the members, as places in `members`, in their order."""
    places = torch.full([n], -1)
    places[members] = torch.arange(len(members))
    places = places[indices]
    return places[places >= 0]
