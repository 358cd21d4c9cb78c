"""What a run called each image that it was measured on, before and after training: predictions.csv."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from complora_kernels.common.files import read_plain, reading, write_atomically
from complora_kernels.fewshot.measure import Answers

PREDICTIONS = "predictions.csv"


class Prediction(NamedTuple):
    """One image."""

    task: str  # the data set to learn, or one of those that are kept
    image: str  # its name in saved splits: a path, or its number in a bundled data set
    label: str  # the name of its class
    before: str  # the pretrained model's answer
    after: str  # the trained model's answer


def write_predictions(path: Path, answers: Mapping[str, Answers]) -> None:
    """Write the answers to all tasks, by their names. An OSError leaves the old file."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Prediction._fields)
    for name, (task, indices, before, after) in answers.items():
        names, labels = task.dataset.class_names, task.dataset.labels[indices]
        images = task.dataset.image_names(indices)
        columns = (each.tolist() for each in (labels, before, after))
        writer.writerows((name, image, *(names[c] for c in own)) for image, *own in zip(images, *columns, strict=True))
    write_atomically(path, text.getvalue())


def read_predictions(path: Path) -> list[Prediction]:
    """Read a file that `write_predictions` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds something else; the message names it.
    """
    with reading(path, "the predictions of a run"):
        header, *rows = csv.reader(io.StringIO(read_plain(path).decode(), newline=""))
        if tuple(header) != Prediction._fields:
            raise ValueError(f"columns {', '.join(header)}, expected {', '.join(Prediction._fields)}")
        return [Prediction(*row) for row in rows]
