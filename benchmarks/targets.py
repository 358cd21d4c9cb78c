"""Prints every target of `targets.toml` as met, missed or not yet measured: `make targets`.

Where a figure has a 95% interval and the bound lies in it, the verdict adds "within noise".
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine, results
from benchmarks.comparison import bounds

RESULTS = Path(__file__).with_name("results")


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
    if figure.value <= bound if upper else figure.value >= bound:
        return f"met{noise}: {figure} {wanted}"
    return f"missed by {abs(figure.value / bound - 1):.0%}{noise}: {figure} {wanted} {target.get('reason', '')}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results files")
    figures = measured(results.read_all(parser.parse_args().results))
    for target in bounds().values():
        figure = figures.get((target["id"], target["machine"]))
        print(f"{target['machine']:<12} {target['id']:<26} {verdict(target, figure):<50} {target['what']}")


if __name__ == "__main__":
    main()
