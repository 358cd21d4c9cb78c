"""Writes the pictures and photos that come with the package: sheets of small images, and what each of them shows."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from complora_kernels.common.files import reading, write_atomically
from complora_kernels.fewshot.datasets.pictures import COLUMNS, FASHION, INDEX_FILE, KEPT, TEST, TRAIN
from complora_kernels.fewshot.pictures.augment import over
from complora_kernels.fewshot.pictures.sources import Sources

SIZE = 48  # of a picture, in pixels
SAME = 0.01  # the mean difference of two pictures below which they are one
SHOTS = 4  # pictures of other families for each class of the base half
FASHION_FILES = (
    *("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    *("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)


def write_data(folder: Path, sources: Sources, photos: Tensor) -> None:
    """Write the sheets and their index.

    Args:
        folder: where they go.
        sources: the rendered families.
        photos: those of `read_photos`.
    """
    concepts = sources.seen.concepts
    of = sources.seen.by_concept()
    unseen_images, seen_images = (over(1.0, part.pixels, SIZE) for part in (sources.unseen, sources.seen))
    kept = [
        i
        for i, number in enumerate(sources.unseen.shown.tolist())
        if concepts[number].group in KEPT and _is_new(unseen_images[i], seen_images[of[number]])
    ]
    unseen = sources.unseen.shown[kept].tolist()
    generator = torch.Generator().manual_seed(0)
    classes = [
        unseen[i] for i in torch.randperm(len(unseen), generator=generator).tolist() if len(of[unseen[i]]) >= SHOTS
    ]
    base = classes[: (len(classes) + 1) // 2]
    shots = torch.cat([of[number][torch.randperm(len(of[number]), generator=generator)[:SHOTS]] for number in base])
    sheets = {
        "unseen.webp": unseen_images[kept],
        "shots.webp": seen_images[shots],
        "fashion.webp": photos,
    }
    found = {
        "sheets": {name: _write_sheet(folder / name, images) for name, images in sheets.items()},
        "concepts": [[concept.name, concept.group] for concept in concepts],
        "unseen": unseen,
        "classes": classes,
        "shots": sources.seen.shown[shots].tolist(),
    }
    write_atomically(folder / INDEX_FILE, json.dumps(found) + "\n")


def _is_new(image: Tensor, seen: Tensor) -> bool:  # uint8 [3, s, s], [n, 3, s, s]
    """Whether a picture differs from all that are trained on: a few were taken over from one family into another."""
    differences = (seen.float() - image.float()).abs().mean((1, 2, 3)) / 255  # [n]
    return not len(seen) or float(differences.min()) >= SAME


def check_fashion(folder: Path) -> None:
    """Raise a FileNotFoundError that names the files of Fashion-MNIST that are missing."""
    missing = [name for name in FASHION_FILES if not any((folder / each).is_file() for each in (name, f"{name}.gz"))]
    if missing:
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} not found, expected Fashion-MNIST's four files")


def read_photos(folder: Path) -> Tensor:  # uint8 [10 (64 + 200), 1, 28, 28], class by class
    """The first photos of each class, of the training set and of the test set.

    Raises:
        OSError: a file of Fashion-MNIST is missing.
        ValueError: a file is damaged, or holds fewer photos; the message names the folder.
    """
    from torchvision.datasets.mnist import read_image_file, read_label_file

    with reading(folder, "Fashion-MNIST's four files"), tempfile.TemporaryDirectory() as unpacked:
        paths = []
        for name in FASHION_FILES:
            plain, packed = folder / name, folder / f"{name}.gz"
            content = gzip.decompress(packed.read_bytes()) if packed.is_file() else plain.read_bytes()
            paths.append(Path(unpacked, name))
            paths[-1].write_bytes(content)
        train, train_labels, test, test_labels = (
            (read_image_file if "images" in path.name else read_label_file)(str(path)) for path in paths
        )
    chosen = []
    for label, name in enumerate(FASHION):
        chosen += [train[train_labels == label][:TRAIN], test[test_labels == label][:TEST]]
        if len(chosen[-2]) < TRAIN or len(chosen[-1]) < TEST or train.shape[1:] != (28, 28):
            raise ValueError(f"{folder}: too few photos of {name}, expected {TRAIN} and {TEST} of 28 x 28 pixels")
    return torch.cat(chosen)[:, None]


def _write_sheet(path: Path, images: Tensor) -> str:  # uint8 [N, C, s, s]
    """Write a sheet as a whole, without loss, and return its SHA-256."""
    from PIL import Image

    N, C, s, _ = images.shape
    rows = -(-N // COLUMNS)
    tiles = torch.cat([images, images.new_zeros(rows * COLUMNS - N, C, s, s)]).view(rows, COLUMNS, C, s, s)
    sheet = tiles.permute(0, 3, 1, 4, 2).reshape(rows * s, COLUMNS * s, C)
    buffer = io.BytesIO()
    Image.fromarray(sheet.squeeze(-1).numpy()).save(buffer, "WEBP", lossless=True, quality=100)
    write_atomically(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()
