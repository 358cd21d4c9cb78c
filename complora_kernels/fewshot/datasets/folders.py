"""Data sets of one's own: a folder with a folder for each class."""

from __future__ import annotations

from pathlib import Path

from complora_kernels.fewshot.datasets.dataset import Dataset, assemble
from complora_kernels.fewshot.datasets.layouts import CLASS_NAMES
from complora_kernels.fewshot.datasets.listing import class_folders, read_class_names, subfolders
from complora_kernels.fewshot.datasets.ratio import ratio_split

_LAYOUT = """expected
  train/CLASS/*.jpg   the images that shots are drawn from
  val/CLASS/*.jpg     for validation, if you like
  test/CLASS/*.jpg
or CLASS/*.jpg alone, to be split 50 : 20 : 30; classnames.txt, if there, has lines of a folder name and a class name"""


def read_folder(folder: Path) -> Dataset:
    """A data set out of a folder for each class, in the folders train, val and test if the split is given.

    Classes are in the order of their folders' names, which are the class names where no classnames.txt gives others.
    Without train and test `ratio_split` decides, by "class folder/file".

    Raises:
        FileNotFoundError: no such folder, nothing in it, or train without test.
        ValueError: a class without training images, or without a name in classnames.txt; two of one name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder:{folder}: there is no such folder, {_LAYOUT}")
    found = subfolders(folder)
    has_splits = "train" in found
    splits = ("train", "val", "test") if has_splits else (".",)
    if has_splits and "test" not in found:
        raise FileNotFoundError(f"folder:{folder}: there is train/ and no test/, {_LAYOUT}")
    folders = sorted({name for split in splits if (folder / split).is_dir() for name in subfolders(folder / split)})
    if not folders:
        raise FileNotFoundError(f"folder:{folder}: there are no folders of classes, {_LAYOUT}")
    class_names = folders
    if (folder / CLASS_NAMES).is_file():
        names = read_class_names(folder / CLASS_NAMES)
        for name in folders:
            if name not in names:
                raise ValueError(f"{folder / CLASS_NAMES}: there is no line for the folder {name!r}")
        class_names = [names[name] for name in folders]
    entries = {split: class_folders(folder / split, folders) for split in splits}
    if not has_splits:
        names = [f"{path.parent.name}/{path.name}" for path, _ in entries["."]]
        entries = ratio_split(entries["."], names, class_names, folder)
    return assemble(folder.resolve().name, folder, class_names, entries)
