"""The layouts of the known data sets below the folder that holds them all, and the sources of their images."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple

COOP = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
CLASS_NAMES = "classnames.txt"


class Home(NamedTuple):
    """The folders of a data set that was found."""

    folder: Path

    images: Path  # the folder that the paths in its split are relative to


@dataclass(frozen=True)
class Layout:
    """The layout of a data set on the disk, in the spellings of CoOp and of CLIP-LoRA.

    Attributes:
        folders: names of its folder; the first is CoOp's.
        images: names of the folder of images inside; "." is the data set's own folder.
        split: source of the split: the name of CoOp's file, "variants" for the text files of FGVC-Aircraft, "folders"
            for ImageNet's train and val, or "test" for folders of classes that are all for testing.
        source: address of the images.
        torchvision: the class of torchvision that downloads it, or the reason why none does.
        anchor: anchor of its instructions in CoOp's DATASETS.md.
    """

    folders: tuple[str, ...]
    images: tuple[str, ...]
    split: Literal["variants", "folders", "test"] | str
    source: str
    torchvision: str
    anchor: str

    @property
    def files(self) -> tuple[str, ...]:
        """The files that have to be in the folder beside the images."""
        if self.split == "variants":
            return ("variants.txt", *(f"images_variant_{split}.txt" for split in ("train", "val", "test")))
        return (self.split,) if self.split.endswith(".json") else ()

    @property
    def splits(self) -> tuple[str, ...]:
        """The folders that have to be in the folder of images."""
        return ("train", "val") if self.split == "folders" else ()

    @property
    def downloads(self) -> bool:
        """Whether torchvision can download it."""
        return " " not in self.torchvision


def _split(file: str) -> str:
    return f"split_zhou_{file}.json"


_NOT_THERE = "torchvision does not have it"
_BY_HAND = "torchvision does not download it"
_CARS = "torchvision's download of it is dead: its address is gone"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_TEST = "test"

LAYOUTS = {
    "imagenet": Layout(
        ("imagenet",), ("images", "."), "folders", "https://image-net.org (free, with an account)", _BY_HAND, "imagenet"
    ),
    "caltech101": Layout(
        ("caltech-101", "Caltech101"),
        ("101_ObjectCategories",),
        _split("Caltech101"),
        "https://data.caltech.edu/records/mzrjq-6wc02",
        "Caltech101",
        "caltech101",
    ),
    "oxford_pets": Layout(
        ("oxford_pets", "OxfordPets"),
        ("images",),
        _split("OxfordPets"),
        f"{_OXFORD}/pets",
        "OxfordIIITPet",
        "oxfordpets",
    ),
    "stanford_cars": Layout(
        ("stanford_cars", "StanfordCars"),
        (".",),  # the paths in its split begin with cars_train/ and cars_test/
        _split("StanfordCars"),
        "the address of its authors is gone; mirrors have cars_train/ and cars_test/",
        _CARS,
        "stanfordcars",
    ),
    "oxford_flowers": Layout(
        ("oxford_flowers", "Flower102"),
        ("jpg",),
        _split("OxfordFlowers"),
        f"{_OXFORD}/flowers/102",
        "Flowers102",
        "flowers102",
    ),
    "food101": Layout(
        ("food-101", "Food101"),
        ("images",),
        _split("Food101"),
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101",
        "Food101",
        "food101",
    ),
    "fgvc_aircraft": Layout(
        ("fgvc_aircraft",),
        ("images",),
        "variants",
        f"{_OXFORD}/fgvc-aircraft (the folder data/ of its archive)",
        "FGVCAircraft",
        "fgvcaircraft",
    ),
    "sun397": Layout(
        ("sun397", "SUN397"),
        ("SUN397",),
        _split("SUN397"),
        "https://vision.princeton.edu/projects/2010/SUN",
        "SUN397",
        "sun397",
    ),
    "dtd": Layout(("dtd", "DTD"), ("images",), _split("DescribableTextures"), f"{_OXFORD}/dtd", "DTD", "dtd"),
    "eurosat": Layout(
        ("eurosat", "EuroSAT"),
        ("2750",),
        _split("EuroSAT"),
        "https://github.com/phelber/EuroSAT",
        "EuroSAT",
        "eurosat",
    ),
    "ucf101": Layout(
        ("ucf101", "UCF101"),
        ("UCF-101-midframes",),
        _split("UCF101"),
        "the middle frames of the videos, from CoOp",
        _NOT_THERE,
        "ucf101",
    ),
    "imagenet_v2": Layout(
        ("imagenetv2",),
        ("imagenetv2-matched-frequency-format-val",),
        _TEST,
        "https://github.com/modestyachts/ImageNetV2 (matched frequency)",
        _NOT_THERE,
        "imagenetv2",
    ),
    "imagenet_sketch": Layout(
        ("imagenet-sketch",),
        ("images",),
        _TEST,
        "https://github.com/HaohanWang/ImageNet-Sketch",
        _NOT_THERE,
        "imagenet-sketch",
    ),
    "imagenet_a": Layout(
        ("imagenet-adversarial",),
        ("imagenet-a",),
        _TEST,
        "https://github.com/hendrycks/natural-adv-examples",
        _NOT_THERE,
        "imagenet-a",
    ),
    "imagenet_r": Layout(
        ("imagenet-rendition",),
        ("imagenet-r",),
        _TEST,
        "https://github.com/hendrycks/imagenet-r",
        _NOT_THERE,
        "imagenet-r",
    ),
}

DOMAIN_SHIFTS = ("imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r")
ELEVEN = tuple(name for name in LAYOUTS if name not in DOMAIN_SHIFTS)


def find(name: str, root: Path) -> Home | None:
    """The folders of the data set below `root`; None where one of its files or folders is missing."""
    layout = LAYOUTS[name]
    for folder, images in product(layout.folders, layout.images):
        home = Home(root / folder, root / folder / images)
        if not _missing(layout, home):
            return home
    return None


def missing_message(name: str, root: Path) -> str:
    """A message that names a missing file or folder, and tells the expected layout and how to get the data set."""
    layout = LAYOUTS[name]
    homes = [Home(root / folder, root / folder / images) for folder, images in product(layout.folders, layout.images)]
    nearest = min(homes, key=lambda home: (not home.folder.is_dir(), len(_missing(layout, home))))
    if not root.is_dir():
        problem = f"there is no folder {root}"
    elif nearest.folder.is_dir():
        problem = f"{_missing(layout, nearest)[0]} is missing"
    else:
        problem = f"there is no folder {' or '.join(str(root / folder) for folder in layout.folders)}"
    download = f"Or let torchvision download its {layout.torchvision}, which is split in another way (--download)."
    return "\n".join(
        [
            f"{name}: {problem}; expected in {root}",
            *_tree(layout),
            f"Images: {layout.source}. Instructions and the split: {COOP}#{layout.anchor}",
            download if layout.downloads else f"There is no download: {layout.torchvision}.",
        ]
    )


def _missing(layout: Layout, home: Home) -> list[Path]:
    folders = [home.images, *(home.images / split for split in layout.splits)]
    files = [home.folder / file for file in layout.files]
    return [path for path in folders if not path.is_dir()] + [path for path in files if not path.is_file()]


def _tree(layout: Layout) -> list[str]:
    folder, *others = layout.folders
    also = f"  (or {', '.join(other + '/' for other in others)})" if others else ""
    images = ["cars_train/", "cars_test/"] if layout.images == (".",) else [f"{layout.images[0]}/"]
    optional = " (or in the folder above)" if len(layout.images) > 1 else ""
    lines = [f"  {folder}/{also}", *(f"    {name}{optional}" for name in images)]
    lines += [f"      {split}/" for split in layout.splits]
    if layout.split in ("folders", "test"):
        lines.append(f"    {CLASS_NAMES}  (a line for each class: folder name, class name; CLIP's names without it)")
    return lines + [f"    {file}" for file in layout.files]
