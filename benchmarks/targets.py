"""Prints every target of `targets.toml` as met, missed or not yet measured: `make targets`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there  # pyright: ignore[reportMissingImports]

HERE = Path(__file__).parent


def measured(results: Iterable[Path]) -> dict[tuple[str, str], float]:
    """The figures of results files by target and machine; of several the last file's, by name."""
    figures = {}
    for path in sorted(results):
        content = json.loads(path.read_text())
        for row in content["rows"]:
            if "target" in row:
                machine = content["machine"].get("gpu", content["machine"]["cpu"])
                figures[row["target"], machine] = row["figure"]
    return figures


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
    targets = tomllib.loads((HERE / "targets.toml").read_text())["target"]
    figures = measured((HERE / "results").glob("*.json"))
    for target in targets:
        figure = figures.get((target["id"], target["machine"]))
        print(f"{target['machine']:<12} {target['id']:<26} {verdict(target, figure):<40} {target['what']}")


if __name__ == "__main__":
    main()
