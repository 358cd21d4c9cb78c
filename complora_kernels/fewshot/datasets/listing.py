"""Files and folders as they lie on the disk, in an order that is the same everywhere."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from complora_kernels.fewshot.datasets.dataset import Entry

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif")


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder, told by their suffixes, sorted; hidden ones are left out."""
    # Of ImageNet there are a million: iterdir makes paths in half the time that joining them takes
    paths = (path for path in folder.iterdir() if path.name.lower().endswith(_SUFFIXES))
    return sorted((path for path in paths if not path.name.startswith(".")), key=lambda path: path.name)


def class_folders(folder: Path, names: Sequence[str]) -> list[Entry]:
    """The images in the folders of these names, each labelled with its folder's place among them."""
    return [
        (path, label)
        for label, name in enumerate(names)
        if (folder / name).is_dir()
        for path in image_files(folder / name)
    ]


def missing(paths: Sequence[Path]) -> Iterator[int]:
    """The places of the paths that are no files. Each folder is listed once."""
    folders: dict[str, set[str]] = {}
    for i, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = _files(folder)
        # Some file systems have one file for names of other case or Unicode form
        if name not in folders[folder] and not path.is_file():
            yield i


def first_missing(paths: Sequence[Path]) -> int | None:
    """The place of the first path that is no file, None where all are."""
    return next(missing(paths), None)


def _files(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def read_class_names(path: Path) -> dict[str, str]:
    """Class names by folder name, as `numbered_class_names` has them."""
    return {folder: name for _, folder, name in numbered_class_names(path)}


def numbered_class_names(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, folder name and class name, from lines of a folder name, a space and the class name.

    A tab instead of the space allows spaces in the folder's name.

    Raises:
        ValueError: a line without a class name, or a folder named twice; with the file and the line.
    """
    seen = set[str]()
    for number, line in enumerate(read_lines(path), 1):
        if not line:
            continue
        folder, _, name = line.partition("\t" if "\t" in line else " ")
        if not name.strip():
            raise ValueError(f"{path}, line {number}: {line!r}, expected a folder name, a space and a class name")
        if folder in seen:
            raise ValueError(f"{path}, line {number}: the folder {folder!r} has a name already")
        seen.add(folder)
        yield number, folder, name.strip()


def read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, without the white space at their ends.

    Raises:
        ValueError: it is not UTF-8; with the file and the line.
    """
    return [line.strip() for line in io.StringIO(read_text(path), newline=None)]


def read_text(path: Path) -> str:
    """What a file in UTF-8 holds, its line ends as they are.

    Raises:
        ValueError: it is not UTF-8; with the file and the line.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: {error}, expected text in UTF-8") from error
