"""Data sets of one's own: a folder with a folder for each class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from complora_kernels.fewshot.datasets.dataset import Dataset, assemble, enumerated, warn_of_untested
from complora_kernels.fewshot.datasets.layouts import CLASS_NAMES
from complora_kernels.fewshot.datasets.listing import class_folders, image_files, numbered_class_names, subfolders
from complora_kernels.fewshot.datasets.ratio import ratio_split
from complora_kernels.fewshot.datasets.split_files import SPLITS

_LAYOUT = """expected
  train/CLASS/*.jpg   the images that shots are drawn from
  val/CLASS/*.jpg     for validation, if you like
  test/CLASS/*.jpg
or CLASS/*.jpg alone, to be split 50 : 20 : 30; classnames.txt, if there, has lines of a folder name and a class name"""


def read_folder(folder: Path) -> Dataset:
    """A data set out of a folder for each class, in the folders train, val and test if the split is given.

    A folder of such a name that holds images itself is a class's. Classes are in the order of their folders' names,
    which are the class names where no classnames.txt gives others. Without train and test `ratio_split` decides, by
    "class folder/file". A warning names classes without a test image.

    Raises:
        FileNotFoundError: no such folder, nothing in it, or only one of train and test.
        ValueError: a single class, one without training images, or without a name in classnames.txt; a line there for
            a folder that does not exist; two classes whose names give one prompt.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder:{folder}: there is no such folder, {_LAYOUT}")
    given = _splits(folder)
    splits = SPLITS if given else (".",)
    for split in ("train", "test"):
        if given and split not in given:
            raise FileNotFoundError(f"folder:{folder}: there is {given[0]}/CLASS/ and no {split}/CLASS/, {_LAYOUT}")
    folders = sorted({name for split in splits if (folder / split).is_dir() for name in subfolders(folder / split)})
    if not folders:
        raise FileNotFoundError(f"folder:{folder}: there are no folders of classes, {_LAYOUT}")
    class_names = folders
    if (folder / CLASS_NAMES).is_file():
        class_names = _class_names(folder / CLASS_NAMES, folders)
    entries = {split: class_folders(folder / split, folders) for split in splits}
    if not given:
        names = [f"{path.parent.name}/{path.name}" for path, _ in entries["."]]
        entries = ratio_split(entries["."], names, class_names, folder)
    dataset = assemble(folder.resolve().name, folder, class_names, entries)
    warn_of_untested(dataset, folder)
    return dataset


def _class_names(path: Path, folders: Sequence[str]) -> list[str]:
    """The names of the classes in these folders, each of which has one line in the file."""
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


def _splits(folder: Path) -> list[str]:
    """Which of train and test are there and hold the folders of classes."""
    found = [split for split in ("train", "test") if (folder / split).is_dir() and subfolders(folder / split)]
    is_class = len(found) == 1 and image_files(folder / found[0])  # that holds folders beside its images
    return [] if is_class else found
