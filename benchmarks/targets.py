"""Prints every target of `targets.toml` as met, missed or not yet measured: `make targets`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import machine, results
from benchmarks.comparison import bounds

RESULTS = Path(__file__).with_name("results")


def measured(files: Iterable[results.Results]) -> dict[tuple[str, str], float]:
    """The figures of results files by target and machine; of several the last file's."""
    return {
        (row.target, machine.name(file.machine)): row.figure
        for file in files
        for row in file.rows
        if row.target is not None and row.figure is not None
    }


def verdict(target: dict[str, Any], figure: float | None) -> str:
    """The words for one target."""
    if "at_most" in target:
        bound, wanted = target["at_most"], f"at most {target['at_most']:g}"
    else:
        bound, wanted = target["at_least"], f"at least {target['at_least']:g}"
    if figure is None:
        return f"not yet measured ({wanted})"
    if figure <= bound if "at_most" in target else figure >= bound:
        return f"met: {figure:.2f} ({wanted})"
    return f"missed by {abs(figure / bound - 1):.0%}: {figure:.2f} ({wanted}) {target.get('reason', '')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of results files")
    figures = measured(results.read_all(parser.parse_args().results))
    for target in bounds().values():
        figure = figures.get((target["id"], target["machine"]))
        print(f"{target['machine']:<12} {target['id']:<26} {verdict(target, figure):<40} {target['what']}")


if __name__ == "__main__":
    main()
