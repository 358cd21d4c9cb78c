"""The pictures and photos that come with the package, as data sets: sheets of small images, made by `pack`."""

from __future__ import annotations

import hashlib
import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from complora_kernels.fewshot.datasets.dataset import Dataset

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "pictures"
INDEX_FILE = "pictures.json"
COLUMNS = 32  # of a sheet
TRAIN, TEST = 64, 200  # photos a class

KEPT = ("smileys", "animals", "food", "travel", "activities", "objects", "symbols")
"""The groups of concepts whose names are asked for to see what is kept."""
FASHION = (
    *("t-shirt", "trousers", "sweater", "dress", "coat"),
    *("sandal", "shirt", "running shoe", "handbag", "boot"),
)
"""Names for Fashion-MNIST's ten classes, in the order of its labels."""
NAMES = ("fashion", *KEPT, "pictures")
"""The data sets of this file."""


def index() -> dict[str, Any]:
    """What the sheets show."""
    return _read(ASSETS / INDEX_FILE)


@cache
def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def class_names(name: str) -> tuple[str, ...]:
    """The names of the classes of a data set, without reading its images."""
    if name == "fashion":
        return FASHION
    concepts = index()["concepts"]
    if name == "pictures":
        return tuple(concepts[number][0] for number in index()["classes"])
    return tuple(concept for concept, group in concepts if group == name)


def load_data(name: str) -> Dataset:
    """One of `NAMES`.

    - `fashion`: a part of Fashion-MNIST, 64 training and 200 test photos of each of ten kinds of clothing, grey on
      black, 28x28 pixels;
    - a group of concepts, such as `animals`: the pictures of the icon family that the model has never seen, each to be
      named among all names of the group, but for those that are classes of `fashion`; for testing only;
    - `pictures`: all of these groups at once, four pictures of other families for each class of the first half.
    """
    if name == "fashion":
        return _fashion()
    return _all_pictures() if name == "pictures" else _group(name)


def _fashion() -> Dataset:
    labels = torch.arange(len(FASHION)).repeat_interleave(TRAIN + TEST)
    images = _cut(_sheet("fashion"), len(labels))
    is_test = torch.arange(len(labels)) % (TRAIN + TEST) >= TRAIN
    train, test = (~is_test).nonzero()[:, 0], is_test.nonzero()[:, 0]
    return Dataset("fashion", images, labels, FASHION, train, train[:0], test)


def _group(name: str) -> Dataset:
    concepts, shown = index()["concepts"], index()["unseen"]
    of_group = [number for number, (_, group) in enumerate(concepts) if group == name]
    numbers = {number: label for label, number in enumerate(of_group)}
    members = [place for place, number in enumerate(shown) if number in numbers and concepts[number][0] not in FASHION]
    labels = torch.tensor([numbers[shown[place]] for place in members])
    images = _cut(_sheet("unseen"), len(shown))[members]
    everything = torch.arange(len(labels))
    return Dataset(name, images, labels, class_names(name), everything[:0], everything[:0], everything)


def _all_pictures() -> Dataset:
    classes = {number: label for label, number in enumerate(index()["classes"])}
    unseen, shots = index()["unseen"], index()["shots"]
    members = [place for place, number in enumerate(unseen) if number in classes]
    tested = _cut(_sheet("unseen"), len(unseen))[members]
    images = torch.cat([_cut(_sheet("shots"), len(shots)), tested])
    labels = torch.tensor([classes[number] for number in (*shots, *(unseen[place] for place in members))])
    train, test = torch.arange(len(shots)), torch.arange(len(shots), len(labels))
    return Dataset(
        "pictures",
        images,
        labels,
        class_names("pictures"),
        train,
        train[:0],
        test,
        can_be_mirrored=False,  # arrows
    )


def _sheet(name: str) -> Tensor:  # uint8 [3, H, W]
    from PIL import Image

    path = ASSETS / f"{name}.webp"
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != index()["sheets"][path.name]:
        raise ValueError(
            f"{path} is not the sheet that {INDEX_FILE} describes, expected files that were written together"
        )
    with Image.open(io.BytesIO(content)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _cut(sheet: Tensor, n: int) -> Tensor:  # uint8 [3, rows·s, 32·s] -> [n, 3, s, s]
    side = sheet.shape[2] // COLUMNS
    tiles = sheet.unfold(1, side, side).unfold(2, side, side)  # [3, rows, 32, s, s]
    return tiles.flatten(1, 2)[:, :n].transpose(0, 1).contiguous()
