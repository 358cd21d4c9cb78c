"""The data sets' layouts in miniature: a few coloured images a class, named, placed and split as the originals are."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {
    "red": (190, 20, 20),
    "green": (20, 190, 20),
    "dark_blue": (20, 20, 120),
    "yellow": (190, 190, 20),
    "pink": (190, 100, 150),
    "cyan": (100, 150, 190),
    "gray": (100, 100, 100),
    "brown": (100, 60, 20),
    "black": (0, 0, 0),
    "white": (200, 200, 200),
    "orange": (190, 100, 20),
    "purple": (110, 20, 190),
}
"""The classes, in the order of their labels where the data set does not sort them.

The bundled model tells their names apart: of the words it does not know there is one, "dark".
"""

# The first of ImageNet's classes, and some later ones, because ImageNet-A and -R have only some of the classes.
WNIDS = (
    *("n01440764", "n01443537", "n01484850", "n01491361", "n01494475", "n01496331"),
    *("n01498041", "n01514668", "n01514859", "n01518878", "n01530575", "n01531178"),
)

# The folders in both spellings, the folder of images, and the file of the split.
_PLACES = {
    "caltech101": (("caltech-101", "Caltech101"), "101_ObjectCategories", "split_zhou_Caltech101.json"),
    "oxford_pets": (("oxford_pets", "OxfordPets"), "images", "split_zhou_OxfordPets.json"),
    "stanford_cars": (("stanford_cars", "StanfordCars"), "", "split_zhou_StanfordCars.json"),
    "oxford_flowers": (("oxford_flowers", "Flower102"), "jpg", "split_zhou_OxfordFlowers.json"),
    "food101": (("food-101", "Food101"), "images", "split_zhou_Food101.json"),
    "sun397": (("sun397", "SUN397"), "SUN397", "split_zhou_SUN397.json"),
    "dtd": (("dtd", "DTD"), "images", "split_zhou_DescribableTextures.json"),
    "eurosat": (("eurosat", "eurosat"), "2750", "split_zhou_EuroSAT.json"),
    "ucf101": (("ucf101", "UCF101"), "UCF-101-midframes", "split_zhou_UCF101.json"),
}
_SHIFTS = {
    "imagenet_v2": ("imagenetv2", "imagenetv2-matched-frequency-format-val", "jpeg"),
    "imagenet_sketch": ("imagenet-sketch", "images", "JPEG"),
    "imagenet_a": ("imagenet-adversarial", "imagenet-a", "jpg"),
    "imagenet_r": ("imagenet-rendition", "imagenet-r", "jpg"),
}
SPLITS = ("train", "val", "test")
MINIATURES = ("imagenet", *_PLACES, "fgvc_aircraft", *_SHIFTS, "folder", "csv")


def make_miniature(
    root: Path, name: str, *, spelling: int = 0, classes: int = 4, per_class: Sequence[int] = (3, 1, 2)
) -> Path:
    """Write a miniature of a data set.

    Args:
        root: the folder of all data sets.
        name: one of `MINIATURES`; "folder" and "csv" come without a split.
        spelling: 0 for CoOp's names, 1 for CLIP-LoRA's; 1 leaves ImageNet's class names out too.
        classes: at most 12.
        per_class: images of every class to train on, to validate on and to test on.

    Returns:
        The data set's folder; of "csv", the table.
    """
    colours = list(COLOURS)[:classes]
    if name == "imagenet":
        return _imagenet(root, colours, per_class, spelling)
    if name in _SHIFTS:
        return _shift(root, name, colours, per_class[2])
    if name == "fgvc_aircraft":
        return _aircraft(root / name, colours, per_class)
    if name in ("folder", "csv"):
        return _own(root, name, colours, sum(per_class))
    folders, images, split_file = _PLACES[name]
    folder = root / folders[spelling]
    split: dict[str, list[list[str | int]]] = {part: [] for part in SPLITS}
    number = 0
    for label, colour in enumerate(colours):
        for part, n in zip(SPLITS, per_class, strict=True):
            for _ in range(n):
                number += 1
                file = _file(name, colour, part, number)
                draw_image(folder / images / file, colour, number)
                split[part].append([file, label, colour])
    (folder / split_file).write_text(json.dumps(split))
    return folder


def draw_image(path: Path, colour: str, number: int) -> None:
    """Write an image of one colour with some noise, 40 by 30 pixels or 30 by 40."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 50, (30, 40, 1) if number % 2 else (40, 30, 1))
    Image.fromarray((noise + COLOURS[colour]).astype(np.uint8)).save(path)


def colour_of(path: Path) -> str:
    """The colour of an image of `draw_image`."""
    with Image.open(path) as image:
        mean = np.array(image.convert("RGB")).mean((0, 1)) - 25
    return min(COLOURS, key=lambda colour: float(np.abs(mean - COLOURS[colour]).sum()))


def _file(name: str, colour: str, part: str, number: int) -> str:
    capitals = colour.title()
    return {
        "caltech101": f"{colour}/image_{number:04d}.jpg",
        "oxford_pets": f"{capitals}_{number}.jpg",
        "stanford_cars": f"cars_{'test' if part == 'test' else 'train'}/{number:05d}.jpg",
        "oxford_flowers": f"image_{number:05d}.jpg",
        "food101": f"{colour}/{number}.jpg",
        "sun397": f"{colour[0]}/{colour}/sun_{number:016x}.jpg",
        "dtd": f"{colour}/{colour}_{number:04d}.jpg",
        "eurosat": f"{capitals}/{capitals}_{number}.jpg",
        "ucf101": f"{capitals}/v_{capitals}_g01_c{number:02d}.jpg",
    }[name]


def _imagenet(root: Path, colours: list[str], per_class: Sequence[int], spelling: int) -> Path:
    folder = root / "imagenet"
    images = folder / "images" if spelling == 0 else folder
    for label, colour in enumerate(colours):
        wnid = WNIDS[label]
        for number in range(per_class[0]):
            draw_image(images / "train" / wnid / f"{wnid}_{number}.JPEG", colour, number)
        for number in range(per_class[2]):
            draw_image(images / "val" / wnid / f"ILSVRC2012_val_{100 * label + number:08d}.JPEG", colour, number)
    if spelling == 0:
        _class_names(folder, colours)
    return folder


def _shift(root: Path, name: str, colours: list[str], per_class: int) -> Path:
    folder, images, suffix = _SHIFTS[name]
    for label, colour in enumerate(colours):
        class_folder = str(label) if name == "imagenet_v2" else WNIDS[label]
        for number in range(per_class):
            draw_image(root / folder / images / class_folder / f"{number}.{suffix}", colour, number)
    if name in ("imagenet_a", "imagenet_r"):
        (root / folder / images / "README.txt").write_text("no class")
    _class_names(root / folder, colours)
    return root / folder


def _class_names(folder: Path, colours: list[str]) -> None:
    lines = (f"{wnid} {colour.replace('_', ' ')}\n" for wnid, colour in zip(WNIDS, colours, strict=False))
    (folder / "classnames.txt").write_text("".join(lines))


def _aircraft(folder: Path, colours: list[str], per_class: Sequence[int]) -> Path:
    number = 0
    for part, n in zip(SPLITS, per_class, strict=True):
        lines = []
        for colour in colours:
            for _ in range(n):
                number += 1
                draw_image(folder / "images" / f"{number:07d}.jpg", colour, number)
                lines.append(f"{number:07d} {colour}\n")
        (folder / f"images_variant_{part}.txt").write_text("".join(lines))
    (folder / "variants.txt").write_text("".join(f"{colour}\n" for colour in colours))
    return folder


def _own(root: Path, name: str, colours: list[str], per_class: int) -> Path:
    folder = root / f"my {name}"
    rows = []
    for colour in colours:
        for number in range(per_class):
            path = folder / colour / f"{number} é.png"
            draw_image(path, colour, number)
            rows.append({"path": path.relative_to(folder).as_posix(), "label": colour})
    if name == "folder":
        return folder
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["path", "label"])
        table.writeheader()
        table.writerows(rows)
    return folder / "table.csv"
