"""Prints every target of `targets.toml` as met, missed or not yet measured: `make targets`.

Where a figure has a 95% interval and the bound lies in it, the verdict adds "within noise". What `benchmarks.model`
expects of a GPU stands behind it as "modelled", with its error where the figure was measured. Targets of the model
itself have the machine `MODEL`: what they say was measured nowhere.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine, results
from benchmarks.comparison import bounds

RESULTS = Path(__file__).with_name("results")
MODELLED = Path(__file__).with_name("modelled.json")  # `python -m benchmarks.model --write`
MODEL = "model of an H200"
MODELLED_GPU = "NVIDIA H200"
ERROR = "model/step"  # the target that is the model's error


class Figure(NamedTuple):
    """What was measured for a target, with its 95% interval where it has one."""

    value: float
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        between = "" if self.interval is None else " [{:.2f}, {:.2f}]".format(*self.interval)
        return f"{self.value:.2f}{between}"


def measured(files: Iterable[results.Results]) -> dict[tuple[str, str], Figure]:
    """The figures of results files by target and machine; of several the last file's."""
    return {
        (row.target, machine.name(file.machine)): Figure(row.figure, interval(row))
        for file in files
        for row in file.rows
        if row.target is not None and row.figure is not None
    }


class Modelled(NamedTuple):
    """What the model expects: figures by target, and seconds of our steps by shape."""

    figures: dict[str, float]
    seconds: dict[str, float]


def modelled(path: Path = MODELLED) -> Modelled:
    """The figures that are kept; none where there is no file."""
    return Modelled(**json.loads(path.read_text())) if path.exists() else Modelled({}, {})


def known(files: Iterable[results.Results], model: Modelled) -> dict[tuple[str, str], Figure]:
    """The measured figures, those of the model's own targets, and its error where our steps were measured."""
    files = list(files)
    found = measured(files) | {
        (target["id"], MODEL): Figure(model.figures[target["id"]])
        for target in bounds().values()
        if target["machine"] == MODEL and target["id"] in model.figures
    }
    errors = [
        abs(model.seconds[row.shape] / row.median_s - 1)
        for file in files
        if machine.name(file.machine) == MODELLED_GPU
        for row in file.rows
        if (row.benchmark, row.baseline) == ("step", "complora_kernels")
        and row.shape in model.seconds
        and row.median_s is not None
    ]
    return found | ({(ERROR, MODELLED_GPU): Figure(max(errors))} if errors else {})


def beside(target: dict[str, Any], figure: Figure | None, model: Modelled) -> str:
    """The modelled figure of a target that is measured on a GPU, and its error where that was done."""
    expected = model.figures.get(target["id"])
    if expected is None or target["machine"] == MODEL:
        return ""
    error = "" if figure is None else f", {abs(expected / figure.value - 1):.0%} off"
    reason = "" if is_met(target, expected) else f" ({target.get('model_reason', 'no reason known')})"
    return f"modelled {expected:.2f}{error}{reason}"


def is_met(target: dict[str, Any], value: float) -> bool:
    """Whether a figure lies within the bound of its target."""
    return value <= target["at_most"] if "at_most" in target else value >= target["at_least"]


def interval(row: results.Row) -> tuple[float, float] | None:
    """That of a row's figure: its ratio's, or, of an upper bound, that of the reciprocal."""
    if row.ratio_low is None or row.ratio_high is None:
        return None
    if "at_most" in bounds().get(row.target or "", {}):
        return 1 / row.ratio_high, 1 / row.ratio_low
    return row.ratio_low, row.ratio_high


def verdict(target: dict[str, Any], figure: Figure | None) -> str:
    """The words for one target."""
    upper = "at_most" in target
    bound = target["at_most" if upper else "at_least"]
    wanted = f"({'at most' if upper else 'at least'} {bound:g})"
    if figure is None:
        return f"not yet measured {wanted}"
    low, high = figure.interval or (figure.value, figure.value)
    noise = ", within noise" if (low <= bound < high if upper else low < bound <= high) else ""
    if is_met(target, figure.value):
        return f"met{noise}: {figure} {wanted}"
    return f"missed by {abs(figure.value / bound - 1):.0%}{noise}: {figure} {wanted} {target.get('reason', '')}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results files")
    model = modelled()
    figures = known(results.read_all(parser.parse_args().results), model)
    for target in bounds().values():
        figure = figures.get((target["id"], target["machine"]))
        words = f"{verdict(target, figure):<50} {beside(target, figure, model):<16}"
        print(f"{target['machine']:<16} {target['id']:<26} {words} {target['what']}")


if __name__ == "__main__":
    main()
