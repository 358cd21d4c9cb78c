"""The gallery: images that training has won and lost, with the names that they were given before and after."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from complora_kernels.common.files import reading
from complora_kernels.fewshot.datasets import Dataset, base_and_new, load_dataset
from complora_kernels.fewshot.decode import load_crops
from complora_kernels.fewshot.escapes import for_figure
from complora_kernels.fewshot.files import read_json
from complora_kernels.fewshot.jobs import RUNS
from complora_kernels.fewshot.predictions import PREDICTIONS, Prediction, read_predictions
from complora_kernels.fewshot.report.figures import remove_figure, write_figure
from complora_kernels.fewshot.setting import NEW_CLASSES

GALLERY = "gallery.png"
COLUMNS = 8
_SIDE = 96  # of a drawn image, in pixels


class Row(NamedTuple):
    """Images of one fate."""

    title: str
    found: list[Prediction]  # those that are drawn
    total: int
    of: int


def rows(predictions: Sequence[Prediction], columns: int = COLUMNS) -> list[Row]:
    """What training has won and lost: on the new task, and on all that is kept. Rows without an image are left out.

    The images are chosen evenly from all of a row, so that no class or data set fills it.
    """
    new_task = predictions[0].task if predictions else ""
    found = []
    for what, is_new in (("new task", True), ("kept", False)):
        own = [each for each in predictions if (each.task == new_task) == is_new]
        won = [each for each in own if each.before != each.label == each.after]
        lost = [each for each in own if each.before == each.label != each.after]
        for title, chosen in ((f"{what}: right only after training", won), (f"{what}: right only before", lost)):
            if chosen:
                places = torch.linspace(0, len(chosen) - 1, min(columns, len(chosen))).round().long().tolist()
                found.append(Row(title, [chosen[place] for place in places], len(chosen), len(own)))
    return found


def draw_gallery(predictions: Sequence[Prediction], options: dict[str, Any], title: str) -> Figure | None:
    """The rows with their images; None where training has changed no answer from or to the right one.

    Args:
        predictions: of one run, those of the new task first.
        options: the run's config.json, which names its data sets.
        title: title of the figure.

    Raises:
        OSError: an image or a data set is not there any more.
        ValueError: it has changed so that it cannot be read.
    """
    shown = rows(predictions)
    if not shown:
        return None
    data = DataSets(options, predictions[0].task)
    figure = Figure(figsize=(1.35 * COLUMNS, 0.5 + 2.05 * len(shown)), layout="constrained")
    figure.suptitle(for_figure(title))
    parts = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, row in zip(parts, shown, strict=True):
        part.suptitle(for_figure(f"{row.title} ({row.total} of {row.of})"), fontsize="medium", x=0.01, ha="left")
        axes = part.subplots(1, COLUMNS)
        for axis in axes:
            axis.set_axis_off()
        for axis, prediction in zip(axes, row.found, strict=False):
            axis.imshow(data.image(prediction).permute(1, 2, 0).numpy())
            names = (prediction.before, f"→ {prediction.after}")
            axis.set_title("\n".join(for_figure(textwrap.shorten(name, 20)) for name in names), fontsize="x-small")
    return figure


def write_gallery(folder: Path, results: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write the gallery of the trained run that learned and kept the most, and return its path.

    Nothing is written where no run has kept its predictions, or training has changed no answer. The errors are those of
    `draw_gallery`.
    """
    remove_figure(folder / "figures" / GALLERY)
    best = next(best_runs(folder, results), None)
    figure = None if best is None else draw_gallery(best.predictions, best.options, title_of(best.result))
    if figure is None:
        return []
    write_figure(folder / "figures" / GALLERY, figure)
    return [folder / "figures" / GALLERY]


class Shown(NamedTuple):
    """A run with what it said of its images."""

    result: Mapping[str, Any]  # its line in results.jsonl
    predictions: list[Prediction]
    options: dict[str, Any]  # those that name its data sets


def best_runs(folder: Path, results: Sequence[Mapping[str, Any]]) -> Iterator[Shown]:
    """Of each method the trained run that learned and kept the most, the best first; those that kept predictions.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged; the message names it.
    """
    trained = [each for each in results if each["learning_rate"] is not None]
    trained = [each for each in trained if (folder / RUNS / each["run"] / PREDICTIONS).is_file()]
    seen = set()
    for best in sorted(trained, key=lambda result: -(result["new"] + (result["kept"] or 0.0))):
        method = best.get("label", best["method"])
        if method in seen:
            continue
        seen.add(method)
        run = folder / RUNS / best["run"]
        options = read_json(run / "config.json", "the options of a run")
        with reading(run / "config.json", "the options of a run"):
            data_sets = {name: options.get(name) for name in ("data_root", "protocol")} | {"data": options["data"]}
        yield Shown(best, read_predictions(run / PREDICTIONS), data_sets)


def title_of(result: Mapping[str, Any]) -> str:
    """The name of a run with its accuracies before and after."""
    measures = [("new task", result["zero_shot_new"], result["new"])]
    if result["kept"] is not None:
        measures.append(("kept", result["zero_shot_kept"], result["kept"]))
    changes = (f"{name} {100 * before:.1f} → {100 * after:.1f}%" for name, before, after in measures)
    return f"{result['run']}: {', '.join(changes)}"


class DataSets:
    """The images of a run's data sets, each loaded at its first image."""

    def __init__(self, options: dict[str, Any], new_task: str) -> None:
        self._options, self._new_task = options, new_task
        self._loaded: dict[str, Dataset] = {}
        self._places: dict[str, dict[str, int]] = {}  # of images by their names

    def image(self, prediction: Prediction) -> Tensor:  # uint8 [3, 96, 96]
        dataset = self._of(prediction.task)
        place = self._places[prediction.task].get(prediction.image)
        if place is None:
            raise ValueError(f"{PREDICTIONS} names {prediction.image!r}, which is no image of {dataset.name}")
        if not isinstance(dataset.images, Tensor):
            return load_crops([dataset.images[place]], (_SIDE, _SIDE), progress=False)[0]
        return F.interpolate(dataset.images[place][None], size=(_SIDE, _SIDE), mode="nearest")[0]

    def _of(self, task: str) -> Dataset:
        if task not in self._loaded:
            own = task in (self._new_task, NEW_CLASSES)
            root = self._options.get("data_root")
            dataset = load_dataset(self._options["data"] if own else task, None if root is None else Path(root))
            if own and self._options.get("protocol") == "base-to-new":
                dataset = base_and_new(dataset)[task == NEW_CLASSES]
            names = dataset.image_names(torch.arange(len(dataset.labels)))
            self._places[task] = {str(name): place for place, name in enumerate(names)}
            self._loaded[task] = dataset
        return self._loaded[task]
