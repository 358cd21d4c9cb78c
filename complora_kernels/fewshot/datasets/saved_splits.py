"""Few-shot splits in files: the program's own JSON files, and CoOp's pickles."""

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
from complora_kernels.fewshot.datasets.few_shot_split import FewShotSplit, restrict, with_test_set
from complora_kernels.fewshot.files import read_json


def write_split(path: Path, dataset: Dataset, split: FewShotSplit) -> None:
    """Write the names of the chosen images, for `choose_split(..., kind=str(path))`. The file is whole or absent.

    It holds the name of the data set and the file names relative to its root or, for images in memory, their indices.
    The test set is not written, because it follows from the others.
    """
    content = {
        "dataset": dataset.name,
        "shots": split.shots,
        "seed": split.seed,
        "kind": split.kind,
        "train": dataset.image_names(split.train),
        "val": dataset.image_names(split.val),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(sealed(content), indent=1, ensure_ascii=False) + "\n"
    # Python holds the bytes of a file name that are not UTF-8 as lone surrogates, whose escapes are JSON's
    write_atomically(path, text.encode(errors="backslashreplace"))


def read_split(path: Path, dataset: Dataset) -> FewShotSplit:
    """Read a split from a file written by `write_split`, or from one of CoOp's pickles, whose name ends in .pkl.

    The split of a whole data set serves its halves too. CoOp's files hold the paths of the machine that wrote them, so
    that images are found by the ends of their paths.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another form, is of another data set, or names an image that the data set does not
            have, or has for testing only.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, expected a split of {dataset.name}")
    if path.suffix == ".pkl":
        if dataset.part_of is not None:
            return _read_for_half(path, dataset)
        return _read_pickle(path, dataset)
    content = read_json(path, "JSON, as an earlier run wrote it")
    name = content.get("dataset")
    if not isinstance(name, str) or any(not isinstance(content.get(subset), list) for subset in ("train", "val")):
        raise ValueError(f"{path}: expected a file written by an earlier run, with dataset, train and val")
    if name != dataset.name:
        if dataset.part_of is not None and name == dataset.part_of[0].name:
            return _read_for_half(path, dataset)
        raise ValueError(f"{path}: a split of {name}, expected one of {dataset.name}")
    places = _places(dataset)
    indices: dict[str, list[int]] = {"train": [], "val": []}
    for subset in indices:
        for i, image in enumerate(content[subset]):
            place = places[subset].get(image) if isinstance(image, (str, int)) else None
            if place is None:
                raise ValueError(_unknown(path, subset, i, image, dataset))
            indices[subset].append(place)
    shots, seed = (value if isinstance(value := content.get(key), int) else None for key in ("shots", "seed"))
    return _split(path, dataset, indices, shots, seed, str(content.get("kind", path)))


def _unknown(path: Path, subset: str, i: int, image: object, dataset: Dataset) -> str:
    use = {"train": "train on", "val": "validate on"}[subset]
    return f"{path}: {subset}[{i}] is {image!r:.300}, which {dataset.name} does not have to {use}"


def _read_pickle(path: Path, dataset: Dataset) -> FewShotSplit:
    if isinstance(dataset.images, Tensor):
        raise ValueError(f"{path}: a split of image files, expected one of {dataset.name}, whose images are no files")
    indices: dict[str, list[int]] = {}
    places = _places(dataset)
    for subset, records in read_coop_pickle(path).items():
        indices[subset] = []
        for i, record in enumerate(records):
            place = _place_of_path(record.impath, places[subset])
            if place is None:
                raise ValueError(_unknown(path, subset, i, record.impath, dataset))
            label = int(dataset.labels[place])
            if record.label != label:
                raise ValueError(
                    f"{path}: {subset}[{i}], {record.impath:.300}, has label {record.label}, in {dataset.name} it has "
                    f"{label}"
                )
            indices[subset].append(place)
    named = re.fullmatch(r"shot_(\d+)-seed_(\d+)", path.stem)
    shots, seed = (None, None) if named is None else map(int, named.groups())
    return _split(path, dataset, indices, shots, seed, "coop")


def _split(
    path: Path, dataset: Dataset, indices: dict[str, list[int]], shots: int | None, seed: int | None, kind: str
) -> FewShotSplit:
    if not indices["train"]:
        raise ValueError(f"{path}: train is empty, expected images to train on")
    train, val = (torch.tensor(indices.get(subset, []), dtype=torch.int64) for subset in ("train", "val"))
    return with_test_set(dataset, train, val, shots, seed, kind)


def _read_for_half(path: Path, dataset: Dataset) -> FewShotSplit:
    assert dataset.part_of is not None
    whole, members = dataset.part_of
    split = restrict(read_split(path, whole), members, len(whole.labels))
    if not len(split.train):
        raise ValueError(f"{path}: train has no image of {dataset.name}")
    return split


def _places(dataset: Dataset) -> dict[str, Mapping[str | int, int]]:
    """The indices of the images that a split may train on, and validate on, by their names in the file."""
    train, val = (
        dict(zip(dataset.image_names(indices), indices.tolist(), strict=True))
        for indices in (dataset.train, dataset.val)
    )
    # CLIP-LoRA validates on training images where there are no validation images
    return {"train": train, "val": ChainMap(val, train)}


def _place_of_path(path: str, places: Mapping[str | int, int]) -> int | None:
    """The index of the image whose name is the longest end of a path from any machine."""
    parts = path.replace("\\", "/").split("/")
    ends = ("/".join(parts[i:]) for i in range(len(parts)))
    return next((places[end] for end in ends if end in places), None)
