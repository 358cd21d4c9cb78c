"""Draws in files: ours, in JSON, and CoOp's pickles."""

from __future__ import annotations

import json
import re
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from complora_kernels.common.files import sealed, write_atomically
from complora_kernels.fewshot.datasets.coop_pickles import read_coop_pickle
from complora_kernels.fewshot.datasets.dataset import Dataset
from complora_kernels.fewshot.datasets.drawn import Draw, complete, restrict
from complora_kernels.fewshot.files import read_json


def write_draw(path: Path, dataset: Dataset, draw: Draw) -> None:
    """Write down which images were drawn, for `draw(..., kind=path)`. The file is whole or absent.

    It has the names of the data set and of the files, relative to its root, or the indices of images in memory; the
    test set follows from them.
    """
    content = {
        "dataset": dataset.name,
        "shots": draw.shots,
        "seed": draw.seed,
        "kind": draw.kind,
        "train": dataset.image_names(draw.train),
        "val": dataset.image_names(draw.val),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(sealed(content), indent=1, ensure_ascii=False) + "\n"
    # The bytes of a file name that are not UTF-8 are lone surrogates in Python, whose escapes are JSON's
    write_atomically(path, text.encode(errors="backslashreplace"))


def read_draw(path: Path, dataset: Dataset) -> Draw:
    """A draw from a file written by `write_draw`, or from one of CoOp's pickles, which ends in .pkl.

    A draw of a whole data set serves its halves too. CoOp's files name images as they lay on the machine that wrote
    them: they are found by the end of their paths.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another form or data set, or a name that the data set does not have, or not to train on.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, expected a draw of {dataset.name}")
    if path.suffix == ".pkl":
        if dataset.part_of is not None:
            return _of_part(path, dataset)
        return _read_pickle(path, dataset)
    content = read_json(path, "JSON, as an earlier run wrote it")
    name = content.get("dataset")
    if not isinstance(name, str) or any(not isinstance(content.get(split), list) for split in ("train", "val")):
        raise ValueError(f"{path}: expected a file written by an earlier run, with dataset, train and val")
    if name != dataset.name:
        if dataset.part_of is not None and name == dataset.part_of[0].name:
            return _of_part(path, dataset)
        raise ValueError(f"{path}: a draw of {name}, expected one of {dataset.name}")
    places = _places(dataset)
    indices: dict[str, list[int]] = {"train": [], "val": []}
    for split in indices:
        for i, image in enumerate(content[split]):
            place = places[split].get(image) if isinstance(image, (str, int)) else None
            if place is None:
                raise ValueError(_unknown(path, split, i, image, dataset))
            indices[split].append(place)
    shots, seed = (value if isinstance(value := content.get(key), int) else None for key in ("shots", "seed"))
    return _complete(path, dataset, indices, shots, seed, str(content.get("kind", path)))


def _unknown(path: Path, split: str, i: int, image: object, dataset: Dataset) -> str:
    return f"{path}: {split}[{i}] is {image!r:.300}, which {dataset.name} does not have to {_USE[split]}"


_USE = {"train": "train on", "val": "validate on"}


def _read_pickle(path: Path, dataset: Dataset) -> Draw:
    if isinstance(dataset.images, Tensor):
        raise ValueError(f"{path}: a draw of files, expected one of {dataset.name}, whose images are no files")
    indices: dict[str, list[int]] = {}
    places = _places(dataset)
    for split, records in read_coop_pickle(path).items():
        indices[split] = []
        for i, record in enumerate(records):
            place = _place_of_path(record.impath, places[split])
            if place is None:
                raise ValueError(_unknown(path, split, i, record.impath, dataset))
            label = int(dataset.labels[place])
            if record.label != label:
                raise ValueError(
                    f"{path}: {split}[{i}], {record.impath:.300}, has label {record.label}, in {dataset.name} it has "
                    f"{label}"
                )
            indices[split].append(place)
    named = re.fullmatch(r"shot_(\d+)-seed_(\d+)", path.stem)
    shots, seed = (None, None) if named is None else map(int, named.groups())
    return _complete(path, dataset, indices, shots, seed, "coop")


def _complete(
    path: Path, dataset: Dataset, indices: dict[str, list[int]], shots: int | None, seed: int | None, kind: str
) -> Draw:
    if not indices["train"]:
        raise ValueError(f"{path}: train is empty, expected images to train on")
    train, val = (torch.tensor(indices.get(split, []), dtype=torch.int64) for split in ("train", "val"))
    return complete(dataset, train, val, shots, seed, kind)


def _of_part(path: Path, dataset: Dataset) -> Draw:
    assert dataset.part_of is not None
    whole, members = dataset.part_of
    drawn = restrict(read_draw(path, whole), members, len(whole.labels))
    if not len(drawn.train):
        raise ValueError(f"{path}: train has no image of {dataset.name}")
    return drawn


def _places(dataset: Dataset) -> dict[str, Mapping[str | int, int]]:
    """Where the images are that may serve to train on, and to validate on, by the names that draws call them by."""
    train, val = (
        dict(zip(dataset.image_names(indices), indices.tolist(), strict=True))
        for indices in (dataset.train, dataset.val)
    )
    # CLIP-LoRA validates on training images where there are no others
    return {"train": train, "val": ChainMap(val, train)}


def _place_of_path(path: str, places: Mapping[str | int, int]) -> int | None:
    """The place of the image whose name is the longest end of a path of any machine."""
    parts = path.replace("\\", "/").split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((places[end] for end in ends if end in places), None)
