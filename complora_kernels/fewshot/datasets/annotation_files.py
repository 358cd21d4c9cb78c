"""Data sets described by annotation files: CoOp's JSON files, FGVC-Aircraft's text files, CSV tables."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from complora_kernels.common.files import read_plain, reading
from complora_kernels.fewshot.datasets.dataset import Dataset, Entry, assemble, warn_of_untested
from complora_kernels.fewshot.datasets.layouts import Home
from complora_kernels.fewshot.datasets.listing import first_missing, read_lines, read_text
from complora_kernels.fewshot.datasets.ratio import ratio_split

SPLITS = ("train", "val", "test")
_TABLE = "a table with the columns path,label[,split]"


def read_json_split(name: str, root: Path, images: Path, path: Path) -> Dataset:
    """Read a data set from a JSON file of CoOp's form, which lists files, labels and class names.

    Args:
        name: name of the data set.
        root: the folder that file names in saved splits are relative to.
        images: the folder that file names in the JSON file are relative to.
        path: the JSON file: `{"train": [[file, label, class name], ...], "val": ..., "test": ...}`.

    Raises:
        ValueError: the file has another form, a label with two names or without any training image, or two labels
            whose names give one prompt; the message names the file and the entry.
        FileNotFoundError: the image of an entry does not exist.
    """
    with reading(path, "JSON"):
        content: Any = json.loads(read_plain(path))
    if not isinstance(content, dict) or any(not isinstance(content.get(split), list) for split in SPLITS):
        raise ValueError(f"{path}: expected an object with the three lists {', '.join(SPLITS)}")
    splits: dict[str, list[Entry]] = {}
    named: dict[int, tuple[str, str]] = {}  # by label: its name, and the first entry with that name
    for split in SPLITS:
        splits[split] = []
        for i, entry in enumerate(content[split]):
            where = f"{split}[{i}]"
            match entry:
                case [str(file), int(label), str(class_name)] if (
                    label >= 0 and not isinstance(label, bool) and class_name.strip()
                ):
                    splits[split].append((images / file, label))
                case _:
                    raise ValueError(
                        f"{path}: {where} is {str(entry)[:300]}, expected [file, label from 0, class name]"
                    )
            first_name, first = named.setdefault(label, (class_name, where))
            if class_name != first_name:
                raise ValueError(f"{path}: {where} calls label {label} {class_name!r}, {first} calls it {first_name!r}")
        with reading(path, "names of files"):
            missing = first_missing([file for file, _ in splits[split]])
        if missing is not None:
            raise FileNotFoundError(_no_file(f"{path}: {split}[{missing}]", splits[split][missing][0]))
    class_names = []
    for label in range(len(named)):
        if label not in named:
            raise ValueError(f"{path}: no image has label {label}, expected labels from 0 to {max(named)} without gaps")
        class_names.append(named[label][0])
    return assemble(name, root, class_names, splits, source=path)


def read_variants(name: str, home: Home) -> Dataset:
    """Read FGVC-Aircraft: variants.txt has a class name per line, the file of each split an image and its class.

    Raises:
        ValueError: variants.txt does not have a class; the message names the file and the line.
        FileNotFoundError: the image of a line does not exist.
    """
    class_names = [line for line in read_lines(home.folder / "variants.txt") if line]
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    splits: dict[str, list[Entry]] = {}
    for split in SPLITS:
        path = home.folder / f"images_variant_{split}.txt"
        splits[split], numbers = [], []
        for number, line in enumerate(read_lines(path), 1):
            if not line:
                continue
            image, _, class_name = line.partition(" ")
            if class_name not in labels:
                raise ValueError(f"{path}, line {number}: {line!r}, expected an image and a class of variants.txt")
            splits[split].append((home.images / f"{image}.jpg", labels[class_name]))
            numbers.append(number)
        with reading(path, "names of files"):
            missing = first_missing([file for file, _ in splits[split]])
        if missing is not None:
            raise FileNotFoundError(_no_file(f"{path}, line {numbers[missing]}", splits[split][missing][0]))
    return assemble(name, home.folder, class_names, splits)


def read_csv(path: Path) -> Dataset:
    """Read a data set from a table with the columns path, label and, if the split is given, split.

    Paths are relative to the table; labels are class names, in sorted order; splits are train, val and test. Without
    the column `ratio_split` decides, by the paths as they are written. A warning names classes without a test image.

    Raises:
        FileNotFoundError: the table, or the image of a row, does not exist.
        ValueError: the file is no CSV, lacks a column, or has an empty cell, a cell too many, an unknown split or an
            image that stands twice, in which case the message names the file and the line; or it has a single class.
    """
    if not path.is_file():
        raise FileNotFoundError(f"csv:{path}: there is no such file, expected {_TABLE}")
    rows, numbers = _rows(path)
    files = [path.parent / row[0] for row in rows]
    with reading(path, _TABLE):
        missing = first_missing(files)
    if missing is not None:
        raise FileNotFoundError(_no_file(f"{path}, line {numbers[missing]}", files[missing]))
    class_names = sorted({row[1] for row in rows})
    labels = {class_name: label for label, class_name in enumerate(class_names)}
    entries = [(file, labels[row[1]]) for file, row in zip(files, rows, strict=True)]
    if rows and len(rows[0]) == 3:
        splits = {
            split: [entry for entry, row in zip(entries, rows, strict=True) if row[2] == split] for split in SPLITS
        }
    else:
        splits = ratio_split(entries, [row[0] for row in rows], class_names, path)
    dataset = assemble(path.stem, path.parent, class_names, splits, source=path)
    warn_of_untested(dataset, path)
    return dataset


def _rows(path: Path) -> tuple[list[list[str]], list[int]]:
    """The cells of path, label and perhaps split of every row, and the numbers of the rows' lines."""
    rows, numbers, seen = [], [], dict[str, int]()
    for number, cells in _table(path):
        if len(cells) == 3 and cells[2] not in SPLITS:
            raise ValueError(f"{path}, line {number}: split is {cells[2]!r}, expected {', '.join(SPLITS)}")
        # An image has many paths: a.png, ./a.png, x/../a.png and the absolute one
        file = os.path.abspath(path.parent / cells[0])  # noqa: PTH100 (Path.resolve asks the disk for each)
        first = seen.setdefault(file, number)
        if first != number:
            raise ValueError(f"{path}, line {number}: {cells[0]!r} is the image of line {first} too, expected it once")
        rows.append(cells)
        numbers.append(number)
    return rows, numbers


def _table(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the cells of path, label and perhaps split of every row; no cell is empty."""
    # A reader that is not strict takes all rows after an unclosed quotation mark for one cell
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True, skipinitialspace=True)
    try:
        header = [name.strip() for name in next(filter(None, reader), [])]
        columns = [column for column in ("path", "label", "split") for name in header if name == column]
        if columns not in (["path", "label"], ["path", "label", "split"]):
            raise ValueError(
                f"{path}: the columns are {', '.join(header) or 'missing'}, expected path,label[,split], each once and "
                "with commas between them"
            )
        for row in filter(None, reader):  # empty lines are skipped
            where = f"{path}, line {reader.line_num}"
            if any(row[len(header) :]):
                raise ValueError(f"{where}: {len(row)} cells, expected {len(header)}; a cell with a comma needs quotes")
            filled = dict(zip(header, row, strict=False))
            cells = [filled.get(column, "").strip() for column in columns]
            for column, cell in zip(columns, cells, strict=True):
                if not cell:
                    raise ValueError(f"{where}: {column} is empty")
            yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}, expected {_TABLE}") from error


def _no_file(where: str, file: Path) -> str:
    return f"{where} names {file}, and there is no such file"
