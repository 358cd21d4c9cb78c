"""Loads a data set by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from complora_kernels.fewshot.datasets.annotation_files import read_csv, read_json_split, read_variants
from complora_kernels.fewshot.datasets.bundled import BUNDLED, class_names
from complora_kernels.fewshot.datasets.dataset import Dataset
from complora_kernels.fewshot.datasets.downloads import check_download, download, downloaded
from complora_kernels.fewshot.datasets.folders import read_folder
from complora_kernels.fewshot.datasets.imagenet import check_imagenet, read_imagenet, read_shift
from complora_kernels.fewshot.datasets.layouts import DOMAIN_SHIFTS, ELEVEN, LAYOUTS, find, missing_message

_PATHS = {"folder": read_folder, "csv": read_csv}

NAMES = (*BUNDLED, *ELEVEN, *DOMAIN_SHIFTS)
"""Every name that `load_dataset` knows without a path."""


def load_dataset(name: str, root: Path | None = None, *, download: bool = False) -> Dataset:
    """Load the lists of files, labels and class names of a data set, without reading an image.

    Args:
        name: one of `NAMES`, "folder:PATH" for a folder with a folder for each class, or "csv:PATH" for a table.
        root: the folder that holds the named data sets, each in a folder with the name that CoOp or CLIP-LoRA use.
        download: let torchvision download a missing data set into root/torchvision. An earlier download is always used.

    Raises:
        ValueError: the name is unknown, a root is needed, or the lists contradict each other.
        FileNotFoundError: a folder or file is missing; the message shows the expected layout and how to get it.
        OSError: the download failed, or an earlier one was interrupted.
    """
    return dataclasses.replace(_load(name, root, download), asked_as=name)


def _load(name: str, root: Path | None, fetch: bool) -> Dataset:
    if name in BUNDLED:
        return BUNDLED[name]()
    kind, _, path = name.partition(":")
    if kind in _PATHS and path:
        return _PATHS[kind](Path(path).expanduser())
    root = _check_root(name, root)
    home = find(name, root)
    if home is None:
        return _load_download(name, root, fetch)
    if LAYOUTS[name].split == "variants":
        return read_variants(name, home)
    if LAYOUTS[name].split == "folders":
        return read_imagenet(name, root, home)
    if LAYOUTS[name].split == "test":
        return read_shift(name, root, home)
    return read_json_split(name, home.folder, home.images, home.folder / LAYOUTS[name].split)


def check_dataset(name: str, root: Path | None = None, *, download: bool = False) -> tuple[str, Sequence[str]]:
    """Find every error that `load_dataset` would raise, without downloading anything or listing all of ImageNet.

    The arguments and errors are those of `load_dataset`.

    Returns:
        The names of the data set and of its classes; no classes where it is still to be downloaded.
    """
    if name in BUNDLED:
        return name, class_names(name)
    if name in LAYOUTS and root is not None:
        root = _check_root(name, root)
        home = find(name, root)
        if home is None and downloaded(name, root) is None:
            if not download:
                raise FileNotFoundError(missing_message(name, root))
            check_download(name, root)
            return name, ()
        if home is not None and LAYOUTS[name].split == "folders":
            return name, check_imagenet(root, home)[1]
    dataset = load_dataset(name, root)
    return dataset.name, dataset.class_names


def _check_root(name: str, root: Path | None) -> Path:
    if name not in LAYOUTS:
        learned = ", ".join(known for known in NAMES if known not in DOMAIN_SHIFTS)
        raise ValueError(
            f"data set {name!r}: expected {learned}, folder:PATH or csv:PATH; for testing only: "
            f"{', '.join(DOMAIN_SHIFTS)}"
        )
    if root is None:
        raise ValueError(
            f"data set {name!r}: no folder of data sets is given, expected the one that holds "
            f"{LAYOUTS[name].folders[0]}/"
        )
    return root.expanduser()


def _load_download(name: str, root: Path, fetch: bool) -> Dataset:
    path = downloaded(name, root)
    if path is None:
        if not fetch:
            raise FileNotFoundError(missing_message(name, root))
        path = download(name, root)
    return read_json_split(name, path.parent, path.parent, path)
