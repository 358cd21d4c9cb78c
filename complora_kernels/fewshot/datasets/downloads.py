"""Downloads data sets through torchvision, with torchvision's own split where it has one."""

from __future__ import annotations

import json
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from complora_kernels.common.files import write_atomically
from complora_kernels.fewshot.datasets.dataset import Entry
from complora_kernels.fewshot.datasets.layouts import LAYOUTS, missing_message
from complora_kernels.fewshot.datasets.listing import missing
from complora_kernels.fewshot.datasets.ratio import ratio_split

FOLDER = "torchvision"
"""The folder of the downloads, below the folder of all data sets; each download has a folder in it."""
SPLIT_FILE = "split.json"

_THREE = {split: {"split": split} for split in ("train", "val", "test")}
_WHOLE = "."
# The arguments of each data set's class for a split; without arguments the class gives the whole data set.
_SPLITS: dict[str, dict[str, dict[str, str]]] = {
    "dtd": _THREE,
    "oxford_flowers": _THREE,
    "fgvc_aircraft": _THREE,
    "food101": {"train": {"split": "train"}, "test": {"split": "test"}},
    "oxford_pets": {"train": {"split": "trainval"}, "test": {"split": "test"}},
}
# CoOp's names for classes whose own names make poor prompts
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
_LEFT_OUT = {"caltech101": {"Faces_easy"}}  # the images of Faces once more


class Size(NamedTuple):
    """The size of a data set as torchvision lists it, before classes are left out."""

    images: tuple[int, ...]  # images of every split in `_SPLITS`, or of the whole data set
    classes: int


SIZES = {
    "caltech101": Size((8677,), 101),  # without the background, which torchvision leaves out, with both kinds of faces
    "oxford_pets": Size((3680, 3669), 37),
    "oxford_flowers": Size((1020, 1020, 6149), 102),
    "food101": Size((75_750, 25_250), 101),
    "fgvc_aircraft": Size((3334, 3333, 3333), 100),
    "sun397": Size((108_754,), 397),
    "dtd": Size((1880, 1880, 1880), 47),
    "eurosat": Size((27_000,), 10),
}
# The errors of torchvision and of its libraries for damaged archives or lists
_ERRORS = (OSError, RuntimeError, EOFError, ValueError, LookupError, zipfile.BadZipFile, tarfile.TarError, zlib.error)


def downloaded(name: str, root: Path) -> Path | None:
    """The split file of an earlier download below `root`, None where there is none."""
    path = root / FOLDER / name / SPLIT_FILE
    return path if path.is_file() else None


def check_download(name: str, root: Path) -> None:
    """Raise a FileNotFoundError where torchvision cannot download the data set."""
    if not LAYOUTS[name].downloads:
        raise FileNotFoundError(missing_message(name, root))


def download(name: str, root: Path) -> Path:
    """Let torchvision download a data set, unless it is there, and write its split to a file of CoOp's form.

    Where torchvision has no split, `ratio_split` makes one; where it has no validation images, there are none. The
    split differs from CoOp's, except that of FGVC-Aircraft.

    Returns:
        The split file; its paths are relative to its folder.

    Raises:
        FileNotFoundError: torchvision cannot download the data set.
        OSError: the download failed, or this or an earlier download is incomplete.
    """
    check_download(name, root)
    folder = root / FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    listed, class_folders = _listed(name, root, folder)
    _check_whole(name, folder, listed, len(class_folders))
    class_names = [_class_name(name, class_folder) for class_folder in _kept(name, class_folders)]
    splits: dict[str, list[Entry]] = {"train": [], "val": [], "test": []}
    for split, entries in listed.items():
        splits[split] = _relabelled(name, entries, class_folders)
    if _WHOLE in splits:
        entries = splits[_WHOLE]
        names = [path.relative_to(folder).as_posix() for path, _ in entries]
        splits = ratio_split(entries, names, class_names, folder)
    lines = {
        split: [[path.relative_to(folder).as_posix(), label, class_names[label]] for path, label in entries]
        for split, entries in splits.items()
    }
    write_atomically(folder / SPLIT_FILE, json.dumps(lines))
    return folder / SPLIT_FILE


def _listed(name: str, root: Path, folder: Path) -> tuple[dict[str, list[Entry]], list[str]]:
    """Download missing files, and return the images of every split and the classes as torchvision lists them."""
    import torchvision.datasets

    make = getattr(torchvision.datasets, LAYOUTS[name].torchvision)
    listed: dict[str, list[Entry]] = {}
    class_folders: list[str] = []
    for split, argument in _SPLITS.get(name, {_WHOLE: {}}).items():
        try:
            data = make(folder, download=True, **argument)
        except _ERRORS as error:
            raise OSError(
                f"{name}: torchvision's download failed: {error}; if an earlier one was interrupted, delete {folder} "
                f"and try again\n{missing_message(name, root)}"
            ) from error
        listed[split], class_folders = _entries(name, data)
    return listed, class_folders


def _entries(name: str, data: Any) -> tuple[list[Entry], list[str]]:
    """The files and labels of a data set of torchvision, and the folders or names of its classes."""
    if name == "caltech101":
        class_folders: list[str] = data.categories
        images = Path(data.root) / "101_ObjectCategories"
        places = zip(data.index, data.y, strict=True)
        return [(images / class_folders[label] / f"image_{i:04d}.jpg", label) for i, label in places], class_folders
    samples = getattr(data, "samples", None)
    if samples is None:  # only ImageFolder has pairs, the others have two lists
        files = data._images if hasattr(data, "_images") else data._image_files
        samples = zip(files, data._labels, strict=True)
    return [(Path(file), label) for file, label in samples], list(data.classes)


def _check_whole(name: str, folder: Path, listed: dict[str, list[Entry]], classes: int) -> None:
    """Raise an OSError where images are missing.

    Torchvision takes any folder for a complete download, also one into which an archive was unpacked partly.
    """
    present = [len(entries) - sum(1 for _ in missing([file for file, _ in entries])) for entries in listed.values()]
    if (tuple(present), classes) != SIZES[name]:
        found, expected = (" + ".join(f"{n:,}" for n in images) for images in (present, SIZES[name].images))
        raise OSError(
            f"{name}: {folder} has {found} images of {classes} classes, expected {expected} of {SIZES[name].classes}: "
            "the download was interrupted; delete this folder and try again"
        )


def _kept(name: str, class_folders: list[str]) -> list[str]:
    return [class_folder for class_folder in class_folders if class_folder not in _LEFT_OUT.get(name, ())]


def _relabelled(name: str, entries: list[Entry], class_folders: list[str]) -> list[Entry]:
    """The images of the classes that are not left out, with the labels of these classes, sorted by file."""
    labels = {class_folder: label for label, class_folder in enumerate(_kept(name, class_folders))}
    return sorted((file, labels[class_folders[i]]) for file, i in entries if class_folders[i] in labels)


def _class_name(dataset_name: str, class_name: str) -> str:
    if dataset_name == "sun397":  # a name such as church/outdoor
        return " ".join(reversed(class_name.split("/")))
    return _RENAMED.get(dataset_name, {}).get(class_name, class_name)
