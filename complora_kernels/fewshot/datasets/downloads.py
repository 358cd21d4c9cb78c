"""Data sets that torchvision downloads, with its own split where it has one."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from complora_kernels.fewshot.datasets.dataset import Entry
from complora_kernels.fewshot.datasets.layouts import LAYOUTS, missing_message
from complora_kernels.fewshot.datasets.ratio import ratio_split
from complora_kernels.fewshot.files import write_atomically

FOLDER = "torchvision"
"""Below the folder of all data sets: where downloads go, each into a folder of its own."""
SPLIT_FILE = "split.json"

_THREE = {split: {"split": split} for split in ("train", "val", "test")}
# The arguments with which each data set's class gives a split; without any it has none.
_SPLITS: dict[str, dict[str, dict[str, str]]] = {
    "dtd": _THREE,
    "oxford_flowers": _THREE,
    "fgvc_aircraft": _THREE,
    "food101": {"train": {"split": "train"}, "test": {"split": "test"}},
    "oxford_pets": {"train": {"split": "trainval"}, "test": {"split": "test"}},
}
# CoOp's names of classes whose own make poor prompts
_RENAMED = {
    "caltech101": {"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"},
    "eurosat": {
        "AnnualCrop": "Annual Crop Land",
        "HerbaceousVegetation": "Herbaceous Vegetation Land",
        "Highway": "Highway or Road",
        "Industrial": "Industrial Buildings",
        "Pasture": "Pasture Land",
        "PermanentCrop": "Permanent Crop Land",
        "Residential": "Residential Buildings",
        "SeaLake": "Sea or Lake",
    },
}
_LEFT_OUT = {"caltech101": {"Faces_easy"}}  # the faces again


def downloaded(name: str, root: Path) -> Path | None:
    """The split file of an earlier download below `root`, None where there is none."""
    path = root / FOLDER / name / SPLIT_FILE
    return path if path.is_file() else None


def check_download(name: str, root: Path) -> None:
    """Raise a FileNotFoundError where torchvision cannot download the data set."""
    if not LAYOUTS[name].downloads:
        raise FileNotFoundError(missing_message(name, root))


def download(name: str, root: Path) -> Path:
    """Let torchvision download a data set, unless it did, and write its split down in CoOp's form.

    Where torchvision has no split `ratio_split` decides; where it has no validation images there are none. The split is
    another one than CoOp's, except that of FGVC-Aircraft.

    Returns:
        The split file; its paths are relative to its folder.

    Raises:
        FileNotFoundError: torchvision has no download of it.
        OSError: the download failed.
    """
    check_download(name, root)
    import torchvision.datasets

    folder = root / FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    make = getattr(torchvision.datasets, LAYOUTS[name].torchvision)
    splits: dict[str, list[Entry]] = {"train": [], "val": [], "test": []}
    class_names: list[str] = []
    arguments = _SPLITS.get(name, {".": {}})
    for split, argument in arguments.items():
        try:
            data = make(folder, download=True, **argument)
        except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
            raise OSError(f"{name}: torchvision's download failed: {error}\n{missing_message(name, root)}") from error
        splits[split], class_names = _entries(name, data)
    if "." in splits:
        entries = splits["."]
        names = [path.relative_to(folder).as_posix() for path, _ in entries]
        splits = ratio_split(entries, names, class_names, folder)
    lines = {
        split: [[path.relative_to(folder).as_posix(), label, class_names[label]] for path, label in entries]
        for split, entries in splits.items()
    }
    write_atomically(folder / SPLIT_FILE, json.dumps(lines))
    return folder / SPLIT_FILE


def _entries(name: str, data: Any) -> tuple[list[Entry], list[str]]:
    """The files and labels of one of torchvision's data sets, sorted by file, and the names of its classes."""
    if name == "caltech101":
        class_folders: list[str] = data.categories
        images = Path(data.root) / "101_ObjectCategories"
        labels = data.y
        places = zip(data.index, labels, strict=True)
        files = [images / class_folders[label] / f"image_{i:04d}.jpg" for i, label in places]
    else:
        class_folders = list(data.classes)
        samples = getattr(data, "samples", None)
        if samples is None:  # all but ImageFolder keep them apart
            files = data._images if hasattr(data, "_images") else data._image_files
            samples = zip(files, data._labels, strict=True)
        files, labels = zip(*samples, strict=True)
    kept = [class_name for class_name in class_folders if class_name not in _LEFT_OUT.get(name, ())]
    new_labels = {class_name: label for label, class_name in enumerate(kept)}
    entries = [
        (Path(file), new_labels[class_folders[label]])
        for file, label in zip(files, labels, strict=True)
        if class_folders[label] in new_labels
    ]
    return sorted(entries), [_class_name(name, class_name) for class_name in kept]


def _class_name(dataset_name: str, class_name: str) -> str:
    if dataset_name == "sun397":  # church/outdoor
        return " ".join(reversed(class_name.split("/")))
    return _RENAMED.get(dataset_name, {}).get(class_name, class_name)
