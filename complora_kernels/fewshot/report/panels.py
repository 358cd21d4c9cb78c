"""Figures of several panels with one legend, and the arrangement of their panels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from complora_kernels.fewshot.escapes import for_figure
from complora_kernels.fewshot.report.labels import SIDES, SOURCES
from complora_kernels.fewshot.report.styles import (
    FEW,
    LINE,
    SIDE_NAMES,
    SOURCE_NAMES,
    ZERO_SHOT,
    Look,
    is_spread,
    looks,
)
from complora_kernels.fewshot.report.summary import Spread, Summary
from complora_kernels.fewshot.report.wording import seeds_name

WIDE = 3  # panels side by side


class Panel(NamedTuple):
    """The content of one panel."""

    title: str
    summary: Summary
    methods: Sequence[str]
    at: Any  # the learning rate or the number of shots of all its points


Grid = Sequence[Sequence[Panel | None]]
Draw = Callable[[Axes, Panel, Mapping[str, Look]], None]
Group = tuple[str, list[str]]  # a title and methods


def arrange(panels: Sequence[Panel]) -> Grid:
    """Arrange panels in a grid. A few methods share each panel; many get a column per side, a row per panel or source.

    Args:
        panels: panels of one summary, each with all of its methods.
    """
    summary = panels[0].summary
    if len(summary.methods) <= FEW:
        return wrapped(panels, WIDE)
    if len(panels) > 1 or not is_spread(summary.labels.values()):
        sides = _by_side(summary)
        return [
            [panel._replace(title=_joined(title, panel.title), methods=of) for title, of in sides] for panel in panels
        ]
    (panel,) = panels
    return [[part and panel._replace(title=part[0], methods=part[1]) for part in row] for row in _by_source(summary)]


def wrapped(panels: Sequence[Panel], wide: int) -> Grid:
    """Arrange panels in reading order, `wide` of them in each row."""
    return [panels[start : start + wide] for start in range(0, len(panels), wide)]


def draw_figure(
    summary: Summary,
    grid: Grid,
    draw: Draw,
    title: str,
    x: str,
    y: str,
    share: Iterable[str] = "xy",
    height: float = 2.8,
) -> Figure:
    """Draw every panel of a grid, with labels at the edges and one legend for all.

    Args:
        summary: the summary that has all methods of the panels.
        grid: rows of panels; None leaves a place empty.
        draw: draws a panel.
        title: title of the figure.
        x: label of the horizontal axes.
        y: label of the vertical axes.
        share: the axes whose scale all panels share.
        height: height of a panel in inches.
    """
    of, legend = looks(summary.labels, summary.stand_ins)
    legend = [("zero-shot", ZERO_SHOT), *legend]
    columns = 3 if max(len(name) for name, _ in legend) < 30 else 2
    wide, high = max(map(len, grid)), len(grid)
    tall = 1.1 + height * high + 0.2 * -(-len(legend) // columns)
    figure = Figure(figsize=(1.2 + 3.2 * max(wide, 2), tall), layout="constrained")
    figure.suptitle(for_figure(title))
    first = None
    for row, column, panel in _placed(grid):
        shared = {f"share{axis}": first for axis in share}
        axes = figure.add_subplot(high, wide, row * wide + column + 1, **shared)
        first = first or axes
        axes.set_title(for_figure(panel.title), fontsize="medium")
        axes.grid(alpha=0.3)
        draw(axes, panel, of)
        axes.set_xlabel(
            "" if any(grid[row + 1][column : column + 1] if row + 1 < high else ()) else for_figure(x), fontsize="small"
        )
        axes.set_ylabel("" if any(grid[row][:column]) else for_figure(y), fontsize="small")
    for axes in figure.axes:
        _end_at_100(axes, [axis for axis, name in (("x", x), ("y", y)) if name.endswith("%")])
    handles = [Line2D([], [], label=for_figure(name), **{**LINE, **look}) for name, look in legend]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
    return figure


def caption(summary: Summary, deviations: bool = True) -> str:
    """The explanation of the lines and, for a few methods, of the error bars."""
    deviation = " ± sd" if deviations and len(summary.methods) <= FEW else ""
    if len(summary.seeds) == 1:
        return f"seed {summary.seeds[0]} alone"
    return f"mean{deviation} over {seeds_name(summary)}" if summary.seed_counts[1] > 1 else seeds_name(summary)


def error_bar(spreads: Iterable[Spread]) -> list[float]:
    """Deviations in percent; one seed has none."""
    return [0.0 if math.isnan(spread.sd) else 100 * spread.sd for spread in spreads]


def _end_at_100(axes: Axes, percent: Iterable[str]) -> None:
    """Limit axes of accuracies to 100%, with a margin for the markers."""
    for name in percent:
        low, high = getattr(axes, f"get_{name}lim")()
        axes.set(**{f"{name}lim": (low, min(high, 100 + 0.03 * (100 - low)))})


def _placed(grid: Grid) -> list[tuple[int, int, Panel]]:
    return [(i, j, panel) for i, row in enumerate(grid) for j, panel in enumerate(row) if panel]


def _by_side(summary: Summary) -> list[Group]:
    """Group methods: those that protect no subspace, then those of each side. Plain LoRA is in every group."""
    labels = summary.labels
    reference = [summary.plain] if summary.plain else []
    rest = [method for method, label in labels.items() if not label.source and method != summary.plain]
    sides = {side: [m for m, label in labels.items() if label.source and label.family == side] for side in SIDES}
    groups = {"LoRA and others": rest, **{SIDE_NAMES[side]: of for side, of in sides.items()}}
    return [(title, [*reference, *of]) for title, of in groups.items() if of]


def _by_source(summary: Summary) -> list[list[Group | None]]:
    """Group methods by side, with a row for each source of the subspace; those without one are in the first row."""
    labels = summary.labels
    rows: list[list[Group | None]] = []
    for source in [source for source in SOURCES if any(label.source == source for label in labels.values())]:
        row: list[Group | None] = []
        for title, of in _by_side(summary):
            chosen = [method for method in of if labels[method].source == source]
            if chosen:
                reference = [method for method in of if method == summary.plain]
                row.append((_joined(title, SOURCE_NAMES[source]), [*reference, *chosen]))
            else:
                protects = any(labels[method].source for method in of)
                row.append(None if protects or rows else (title, of))
        rows.append(row)
    return rows


def _joined(*titles: str) -> str:
    return ", ".join(filter(None, titles))
