"""The user's own data sets: folders with a folder of images for each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from complora_kernels.fewshot.datasets.dataset import Dataset, assemble, enumerated, warn_of_untested, warn_once
from complora_kernels.fewshot.datasets.layouts import CLASS_NAMES
from complora_kernels.fewshot.datasets.listing import (
    class_folders,
    image_files,
    numbered_class_names,
    relative_name,
    subfolders,
    warn_of_left_out,
)
from complora_kernels.fewshot.datasets.ratio import ratio_split

_LAYOUT = """expected
  train/CLASS/*.jpg   the images that few-shot splits train on
  val/CLASS/*.jpg     for validation, if you like
  test/CLASS/*.jpg
or CLASS/*.jpg alone, to be split 50 : 20 : 30; classnames.txt, if there, has lines of a folder name and a class name"""

_SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


def read_folder(folder: Path) -> Dataset:
    """Read a data set that has a folder for each class, below the folders train, val and test if the split is given.

    These may also be called training, valid or validation, and testing, in upper or lower case. A folder of such a name
    that holds images itself is the folder of a class. The images of a class are those in its folder and in all folders
    below. Where the data set's folder holds nothing but another folder, as unpacked archives do, that folder is read.
    Classes are in the order of their folders' names, which are the class names where no classnames.txt gives others.
    Without train and test, `ratio_split` splits the images by their names "class folder/file". One warning counts the
    files that are left out, another names the classes without a test image.

    Raises:
        FileNotFoundError: the folder is missing or empty, or has only one of train and test.
        ValueError: there is a single class; a class has no training images, or no name in classnames.txt; a line of
            that file names a folder that does not exist; the names of two classes give one prompt; a split has two
            folders.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder:{folder}: there is no such folder, {_LAYOUT}")
    name, folder = folder.resolve().name, _innermost(folder)
    given = _splits(folder)
    for split in ("train", "test"):
        if given and split not in given:
            there = next(iter(given.values()))
            raise FileNotFoundError(f"folder:{folder}: there is {there}/CLASS/ and no {split}/CLASS/, {_LAYOUT}")
    parts = given or {".": "."}
    folders = sorted({found for part in parts.values() for found in subfolders(folder / part)})
    if not folders:
        raise FileNotFoundError(f"folder:{folder}: there are no folders of classes, {_LAYOUT}")
    class_names = folders
    if (folder / CLASS_NAMES).is_file():
        class_names = _class_names(folder / CLASS_NAMES, folders)
    others: list[Path] = []
    entries = {split: class_folders(folder / part, folders, others) for split, part in parts.items()}
    warn_of_left_out(folder, others, _outside(folder, given))
    if not given:
        if all(path.parent.parent != folder for path, _ in entries["."]) and entries["."]:
            warn_once(f"{folder}: {enumerated(folders)} hold images in folders below alone, and are taken for classes")
        names = [relative_name(path, folder) for path, _ in entries["."]]
        entries = ratio_split(entries["."], names, class_names, folder)
    dataset = assemble(name, folder, class_names, {"val": [], **entries})
    warn_of_untested(dataset, folder)
    return dataset


def _innermost(folder: Path) -> Path:
    """The innermost folder, below folders that hold nothing but one folder."""
    asked = folder
    while len(names := subfolders(folder)) == 1 and not (folder / CLASS_NAMES).exists():
        inner = folder / names[0]
        if _split_of(names[0]) or image_files(folder, below=False) or image_files(inner, below=False):
            break
        if not subfolders(inner):
            break
        folder = inner
    if folder != asked:
        warn_once(f"{asked}: the data set is the folder {relative_name(folder, asked)!r}, because it is alone there")
    return folder


def _class_names(path: Path, folders: Sequence[str]) -> list[str]:
    """The class names of these folders, each of which has one line in the file."""
    names = {}
    for number, folder, class_name in numbered_class_names(path):
        if folder not in folders:
            raise ValueError(
                f"{path}, line {number}: there is no folder {folder!r}, expected one of {enumerated(folders)}; a tab "
                "behind a folder's name allows blanks in it"
            )
        names[folder] = class_name
    for folder in folders:
        if folder not in names:
            raise ValueError(f"{path}: there is no line for the folder {folder!r}")
    return [names[folder] for folder in folders]


def _splits(folder: Path) -> dict[str, str]:
    """The folders of train, val and test by split; none unless one of train and test exists and holds folders."""
    found: dict[str, list[str]] = {}
    for name in subfolders(folder):
        if split := _split_of(name):
            found.setdefault(split, []).append(name)
    with_classes = [name for split in ("train", "test") for name in found.get(split, ()) if subfolders(folder / name)]
    # A single such folder that holds images beside folders belongs to a class
    if not with_classes or (len(with_classes) == 1 and image_files(folder / with_classes[0], below=False)):
        return {}
    given = {}
    for split in _SPLIT_NAMES:
        names = [name for name in found.get(split, ()) if split == "val" or name in with_classes]
        names = [split] if split in names else names
        if len(names) > 1:
            raise ValueError(f"folder:{folder}: {enumerated(names)} are all called like {split}/, expected one of them")
        if names:
            given[split] = names[0]
    return given


def _split_of(name: str) -> str | None:
    """The split that a folder of this name holds."""
    return next((split for split, names in _SPLIT_NAMES.items() if name.lower() in names), None)


def _outside(folder: Path, given: Mapping[str, str]) -> list[Path]:
    """The images that are in no folder of a class."""
    places = [folder, *(folder / name for name in given.values())]
    outside = [path for place in places for path in image_files(place, below=False)]
    beside = [name for name in subfolders(folder) if given and name not in given.values()]
    return outside + [path for name in beside for path in image_files(folder / name)]
