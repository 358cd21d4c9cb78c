"""ImageNet and the four test sets that shift its domain: folders named by WordNet's or by labels' numbers."""

from __future__ import annotations

from pathlib import Path

from complora_kernels.fewshot.datasets.dataset import Dataset, assemble
from complora_kernels.fewshot.datasets.layouts import CLASS_NAMES, COOP, LAYOUTS, Home
from complora_kernels.fewshot.datasets.listing import class_folders, numbered_class_names, subfolders, warn_of_left_out

# How to sort the images of image-net.org's archives, which have no folders of classes
_TO_SORT = {
    "train": "unpack the archive of each class into a folder of its name, as "
    "https://github.com/pytorch/examples/blob/main/imagenet/extract_ILSVRC.sh does",
    "val": "its images must be sorted into them; run, in that folder, the script "
    "https://raw.githubusercontent.com/soumith/imagenetloader.torch/master/valprep.sh",
}


def read_imagenet(name: str, root: Path, home: Home) -> Dataset:
    """Read ImageNet: few-shot splits train on images of the folder train, and the folder val is the test set.

    Raises:
        ValueError: there are no folders of classes; a class is in one of the two folders alone, or has no images; a
            folder is no class of ImageNet.
    """
    folders, class_names = check_imagenet(root, home)
    others: list[Path] = []
    train, test = (class_folders(home.images / split, folders, others) for split in ("train", "val"))
    warn_of_left_out(home.images, others)
    return assemble(name, home.folder, class_names, {"train": train, "val": [], "test": test}, twins=True)


def check_imagenet(root: Path, home: Home) -> tuple[list[str], list[str]]:
    """The folders of the classes, which must be in train and in val, and the classes' names."""
    train, val = (subfolders(home.images / split) for split in ("train", "val"))
    for split, found in (("train", train), ("val", val)):
        if not found:
            raise ValueError(
                f"{home.images / split}: there are no folders of classes, expected n01440764/ and so on: "
                f"{_TO_SORT[split]}"
            )
    for folder in sorted(set(train) ^ set(val)):
        here, there = ("train", "val") if folder in train else ("val", "train")
        raise ValueError(f"{home.images}: the class {folder!r} is in {here}/ and not in {there}/, expected it in both")
    names = _class_names(root, home)
    return train, [_name_of(folder, names, home) for folder in train]


def read_shift(name: str, root: Path, home: Home) -> Dataset:
    """Read a test set with all or some of ImageNet's classes.

    Folders are named by WordNet's numbers or, in ImageNet-V2, by the label: 0, 1, 2 and so on.

    Raises:
        ValueError: a class has no images, or a folder is no class of ImageNet.
    """
    names = _class_names(root, home)
    folders = subfolders(home.images)
    if folders and all(folder.isdecimal() for folder in folders):
        folders = [str(label) for label in range(len(names))]
        class_names = list(names.values())
    else:
        class_names = [_name_of(folder, names, home) for folder in folders]
    others: list[Path] = []
    entries = class_folders(home.images, folders, others)
    warn_of_left_out(home.images, others)
    return assemble(
        name, home.folder, class_names, {"train": [], "val": [], "test": entries}, source=home.images, twins=True
    )


def _class_names(root: Path, home: Home) -> dict[str, str]:
    """CLIP's class names by WordNet number, in the order of the labels."""
    imagenets = [root / folder for folder in LAYOUTS["imagenet"].folders]
    for folder in (home.folder, *imagenets):
        if (folder / CLASS_NAMES).is_file():
            return {name: class_name for _, name, class_name in numbered_class_names(folder / CLASS_NAMES)}
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    try:
        from timm.data.imagenet_info import ImageNetInfo  # a dependency of open_clip
    except ImportError as error:
        raise FileNotFoundError(
            f"{home.folder / CLASS_NAMES} is missing, and timm, which knows the folder names of ImageNet's classes, "
            f"cannot be imported ({error}); get the file as {COOP}#imagenet says, or install timm"
        ) from error
    return dict(zip(ImageNetInfo().label_names(), IMAGENET_CLASSNAMES, strict=True))


def _name_of(folder: str, names: dict[str, str], home: Home) -> str:
    if folder not in names:
        raise ValueError(f"{home.images}: the folder {folder!r} is no class of ImageNet, or {CLASS_NAMES} lacks it")
    return names[folder]
