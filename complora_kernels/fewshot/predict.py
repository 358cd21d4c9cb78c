"""`complora predict`: names images by a saved adapter."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from complora_kernels.common.files import words_of, write_atomically
from complora_kernels.fewshot.classifier import Classifier, Ranking, load_classifier
from complora_kernels.fewshot.commands import PredictConfig
from complora_kernels.fewshot.datasets.listing import image_files
from complora_kernels.fewshot.escapes import complain, for_csv, say, visible
from complora_kernels.fewshot.files import check_writable

Named = tuple[Path, Ranking]


def predict(config: PredictConfig, console: Console) -> int:
    """Print or write what the images are called; name the images that cannot be read on stderr.

    Returns:
        The exit code: 1 where no image could be read.

    Raises:
        FileNotFoundError: the adapter, the weights or an image is missing.
        ValueError: an option cannot work, or a folder holds no images.
        OSError: a file cannot be read or written.
    """
    _check(config)
    paths = _files(config.images)
    classifier = load_classifier(
        config.adapter,
        device=config.device,
        classes=config.classes or None,
        model=config.model,
        pretrained=config.pretrained,
        activation=config.activation,
        precision=config.precision,
    )
    if config.batch_size is not None:
        classifier.batch_size = config.batch_size
    named, unread = _named(classifier, paths, config.top)
    if named:
        _show(config, named, console)
    for path, error in unread:
        words = words_of(error)
        words = words if str(path) in words else f"{path}: {words}"
        complain(f"not read: {words}")
    if unread:
        complain(f"{len(unread)} of {len(paths)} images could not be read")
    return 0 if named else 1


def _check(config: PredictConfig) -> None:
    if not config.images:
        raise ValueError("expected at least one image or folder behind the adapter")
    for name in ("top", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if config.json and config.csv is not None and not _is_file(config.csv):
        raise ValueError("--json and --csv -: expected one of them, because both print")
    if config.csv is not None and _is_file(config.csv):
        check_writable(config.csv.parent, "--csv")
        if config.csv.is_dir():
            raise ValueError(f"--csv {config.csv}: a folder, expected a file or -")


def _is_file(path: Path) -> bool:
    return str(path) != "-"


def _files(given: Sequence[Path]) -> list[Path]:
    """The given files and the images in the given folders, each once.

    A file that is missing is left to be named with those that cannot be read.
    """
    found: dict[Path, None] = {}
    for path in given:
        if path.is_dir():
            inside = image_files(path)
            if not inside:
                raise ValueError(f"{path}: expected a folder with images in it or below it")
            found |= dict.fromkeys(inside)
        else:
            found[path] = None
    return list(found)


def _named(classifier: Classifier, paths: Sequence[Path], top: int) -> tuple[list[Named], list[tuple[Path, Exception]]]:
    """The images with their classes, and those that cannot be read with their errors."""
    named, unread = [], []
    # disable=None: no bar where stderr is no terminal
    with tqdm(total=len(paths), desc="naming images", unit="image", delay=1, leave=False, disable=None) as bar:
        for path, found in classifier.of_files(paths, top=top):
            (unread if isinstance(found, Exception) else named).append((path, found))
            bar.update()
    return named, unread


def _show(config: PredictConfig, named: Sequence[Named], console: Console) -> None:
    if config.csv is not None:
        if _is_file(config.csv):
            write_atomically(config.csv, _as_csv(named))
        else:
            sys.stdout.write(_as_csv(named))
    if config.json:
        print(json.dumps([_as_json(path, ranking) for path, ranking in named], indent=2))
    elif config.csv is None:
        console.print(_as_table(named))
    elif _is_file(config.csv):
        say(console, f"wrote {config.csv}: {len(named)} images", soft_wrap=True)


def _as_table(named: Sequence[Named]) -> Table:
    table = Table(box=HORIZONTALS)
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("%", justify="right")
    for path, ranking in named:
        for rank, (name, probability) in enumerate(zip(*ranking, strict=True)):
            image = escape(visible(str(path))) if rank == 0 else ""
            table.add_row(image, escape(visible(name)), f"{100 * probability:.1f}")
    return table


def _as_json(path: Path, ranking: Ranking) -> dict[str, Any]:
    rows = [{"name": name, "probability": share} for name, share in zip(*ranking, strict=True)]
    return {"image": str(path), "predictions": rows}


def _as_csv(named: Sequence[Named]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "rank", "name", "probability"))
    for path, ranking in named:
        for rank, (name, probability) in enumerate(zip(*ranking, strict=True), 1):
            writer.writerow((for_csv(str(path)), rank, for_csv(name), f"{probability:.6g}"))
    return text.getvalue()
