"""Lists of files and folders on the disk, in an order that is the same on every machine."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from complora_kernels.common.files import read_plain
from complora_kernels.fewshot.datasets.dataset import MOST_NAMED, Entry, warn_once
from complora_kernels.fewshot.decode import image_suffixes

# Names, beside hidden ones, that operating systems and programs give to files of their own
_NO_DATA = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini"}


def subfolders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones and those of the operating system."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_data(entry.name) and _is_folder(entry))


def image_files(folder: Path, others: list[Path] | None = None, *, below: bool = True) -> list[Path]:
    """The image files in a folder, recognised by their suffixes and sorted, without the names that `subfolders` omits.

    Args:
        folder: the folder to search.
        others: a list to which the other files are added.
        below: whether to search the folders below it too; links are followed, but each folder is searched once.
    """
    suffixes, found, folders, seen = image_suffixes(), [], [folder], set[str]()
    while folders:
        here = folders.pop()
        if here is not folder:
            seen = seen or {os.path.realpath(path) for path in (folder, *folder.absolute().parents)}
            if (real := os.path.realpath(here)) in seen:
                continue
            seen.add(real)
        further = []
        # ImageNet has a million files: iterdir makes paths in half the time that joining them takes
        for path in here.iterdir():
            if path.name.startswith("."):
                continue
            if path.name.lower().endswith(suffixes):
                found.append(path)
            elif not _is_data(path.name):
                continue
            elif path.is_dir():
                further.append(path)
            elif others is not None:
                others.append(path)
        folders += sorted(further, reverse=True) if below else []
    return sorted(found, key=Path.as_posix)


def class_folders(folder: Path, names: Sequence[str], others: list[Path]) -> list[Entry]:
    """The images in the folders of these names; the label of an image is the place of its folder's name.

    The other files in the folders are added to `others`.
    """
    return [
        (path, label)
        for label, name in enumerate(names)
        if (folder / name).is_dir()
        for path in image_files(folder / name, others)
    ]


def relative_name(path: Path, folder: Path) -> str:
    """The path of a file relative to a folder, with "/"."""
    return "/".join(path.parts[len(folder.parts) :])


def warn_of_left_out(source: Path, others: Sequence[Path], outside: Sequence[Path] = ()) -> None:
    """Log a warning where files are left out, with their suffixes and one file of each suffix.

    Args:
        source: the folder of the data set.
        others: files in the folders of classes that are not taken for images.
        outside: images that are in no folder of a class.
    """
    by_suffix: dict[str, list[Path]] = {}
    for path in sorted(others):
        by_suffix.setdefault(path.suffix.lower() or "without a suffix", []).append(path)

    def counted(paths: Sequence[Path], what: str = "") -> str:
        return f"{len(paths):,}{what} (such as {relative_name(paths[0], source)!r})"

    parts = []
    if others:
        most = sorted(by_suffix, key=lambda suffix: -len(by_suffix[suffix]))
        named = [counted(by_suffix[suffix], f" {suffix}") for suffix in most[:MOST_NAMED]]
        rest = sum(len(by_suffix[suffix]) for suffix in most[MOST_NAMED:])
        named += [f"{rest:,} of other suffixes"] if rest else []
        parts.append(f"files without the suffix of an image: {', '.join(named)}")
    if outside:
        parts.append(f"images outside of the folders of classes: {counted(sorted(outside))}")
    if parts:
        advice = "; .heic and .heif are read where pillow-heif is installed"
        needed = {".heic", ".heif"} & by_suffix.keys()
        warn_once(f"{source}: left out are {'; '.join(parts)}{advice if needed else ''}")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # For a link to itself `entry.is_dir()` would raise
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # noqa: PTH112


def _is_data(name: str) -> bool:
    return not name.startswith(".") and name.lower() not in _NO_DATA


def missing(paths: Sequence[Path]) -> Iterator[int]:
    """The indices of the paths that are no files. Each folder is listed once."""
    folders: dict[str, set[str]] = {}
    for i, path in enumerate(paths):
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = _files(folder)
            # Some file systems find a file by a name of another case or Unicode form
        if name not in folders[folder] and not path.is_file():
            yield i


def first_missing(paths: Sequence[Path]) -> int | None:
    """The index of the first path that is no file; None where all are files."""
    return next(missing(paths), None)


def _files(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def numbered_class_names(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line number, folder name and class name of each line: a folder name, a space and the class name.

    A tab instead of the space allows spaces in the folder's name.

    Raises:
        ValueError: a line has no class name, or names a folder again; the message names the file and the line.
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
        ValueError: the file is not UTF-8; the message names the file and the line.
    """
    return [line.strip() for line in io.StringIO(read_text(path), newline=None)]


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with its line ends unchanged.

    Raises:
        ValueError: the file is not UTF-8; the message names the file and the line.
    """
    try:
        return read_plain(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {number}: {error}, expected text in UTF-8") from error
