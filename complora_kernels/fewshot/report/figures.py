"""The figures: accuracy against shots or learning rates, by data set, and learned against retained accuracy."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from complora_kernels.common.files import write_atomically
from complora_kernels.fewshot.config import PROTOCOLS
from complora_kernels.fewshot.escapes import for_figure
from complora_kernels.fewshot.report.intervals import differences
from complora_kernels.fewshot.report.panels import WIDE, Panel, arrange, caption, draw_figure, error_bar, wrapped
from complora_kernels.fewshot.report.styles import BARS, FEW, LINE, ZERO_SHOT, Look, display_name
from complora_kernels.fewshot.report.summary import Cell, Spread, Summary
from complora_kernels.fewshot.report.wording import average_name, axis_names, measure_names, new_name, shots_name, words

_SHOTS = "shots (training images per class)"
_SOFTWARE = "complora report"
_PATTERNS = (
    "accuracy_against_*.png",
    "accuracy_by_data_set*.png",
    "new_against_kept.png",
    "fronts.png",
    "differences.png",
)


def figures(summary: Summary) -> dict[str, Figure]:
    """The figures that suit the varied options of a protocol, by name."""
    several = len(summary.data_sets) > 1
    several_rates = len(summary.learning_rates) > 1
    drawn = {}
    if len(summary.shots) > 1 or not (several or several_rates):
        drawn["accuracy_against_shots"] = accuracy_against_shots(summary)
    elif several_rates:
        drawn["accuracy_against_rate"] = accuracy_against_rate(summary)
    if several:
        for rate in summary.learning_rates or [None]:
            suffix = f"_{rate:g}" if several_rates else ""
            drawn[f"accuracy_by_data_set{suffix}"] = accuracy_by_data_set(summary, rate)
    if "kept" in summary.measures:
        drawn["new_against_kept"] = new_against_kept(summary)
        if several_rates:
            drawn["fronts"] = fronts(summary)
    if figure := differences(summary):
        drawn["differences"] = figure
    return drawn


def accuracy_against_shots(summary: Summary) -> Figure:
    """One panel per learning rate: new-task accuracy over the number of shots, mean and standard deviation."""
    grid = arrange([Panel(_rate(rate), summary, summary.methods, rate) for rate in summary.learning_rates or [None]])
    return draw_figure(summary, grid, _over_shots, _title(summary), _SHOTS, axis_names(summary)[0])


def accuracy_against_rate(summary: Summary) -> Figure:
    """New-task accuracy over the learning rates, at one number of shots."""
    grid = arrange([Panel(shots_name(shots), summary, summary.methods, shots) for shots in summary.shots])
    return draw_figure(summary, grid, _over_rates, _title(summary), "learning rate", axis_names(summary)[0])


def accuracy_by_data_set(summary: Summary, rate: float | None) -> Figure:
    """Each data set at one learning rate: a panel with the shots across or, at one number of shots, a row of points."""
    title = ", ".join(filter(None, ["Accuracy by data set", _rate(rate)]))
    if len(summary.shots) == 1:
        names = measure_names(summary)
        panels = [Panel(name, summary, summary.methods, (rate, measure)) for measure, name in enumerate(names)]
        height = 0.6 * len(summary.data_sets) + 1
        title = f"{title}; {caption(summary, deviations=False)}"
        return draw_figure(summary, [panels], _rows_of_data_sets, title, "accuracy, %", "", share="y", height=height)
    panels = [Panel(data, part, part.methods, rate) for data, part in summary.by_data.items()]
    title = f"{title}; {caption(summary)}"
    return draw_figure(
        summary, wrapped(panels, WIDE + 1), _over_shots, title, _SHOTS, axis_names(summary)[0], share="x"
    )


def new_against_kept(summary: Summary) -> Figure:
    """A panel per number of shots with a point per learning rate; for a single rate, one panel with all shots."""
    by_shots = [Panel(shots_name(shots), summary, summary.methods, shots) for shots in summary.shots]
    over_rates = len(summary.learning_rates) > 1 or len(summary.shots) == 1
    panels = by_shots if over_rates else [Panel("", summary, summary.methods, None)]
    points = f"a point for each {'learning rate' if over_rates else 'number of shots'}"
    title = f"Learned and kept: {points}; {caption(summary)}"
    return draw_figure(summary, arrange(panels), _all_points, title, *axis_names(summary))


def fronts(summary: Summary) -> Figure:
    """The compared part of each front: from the zero-shot model to its highest new-task accuracy."""
    panels = [Panel(shots_name(shots), summary, summary.methods, shots) for shots in summary.shots]
    title = f"Kept on the way to the highest {words(summary.protocol).equal}; {caption(summary, deviations=False)}"
    share = "xy" if len(panels) == 1 else ""
    return draw_figure(summary, arrange(panels), _best_part, title, *axis_names(summary), share=share)


def write_figures(protocols: Sequence[Summary], folder: Path) -> list[Path]:
    """Write the figures as PNG files into `folder`, of several protocols into a folder each, and return their paths.

    Figures of an earlier report that no longer suit the results are removed, if their metadata say that a report wrote
    them.
    """
    paths = []
    for summary in protocols:
        inside = folder / summary.protocol if len(protocols) > 1 else folder
        inside.mkdir(parents=True, exist_ok=True)
        for name, figure in figures(summary).items():
            paths.append(inside / f"{name}.png")
            write_figure(paths[-1], figure)
    folders = [folder, *(folder / protocol for protocol in PROTOCOLS)]
    for stale in {path for pattern in _PATTERNS for inside in folders for path in inside.glob(pattern)} - set(paths):
        remove_figure(stale)
    return paths


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG file whose metadata say that a report wrote it."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150, metadata={"Software": _SOFTWARE})
    write_atomically(path, image.getvalue())


def remove_figure(path: Path) -> None:
    """Remove a figure, if its metadata say that a report wrote it."""
    if path.is_file() and _is_ours(path):
        path.unlink()


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return f"Software\0{_SOFTWARE}".encode() in file.read(1000)


def _over_shots(axes: Axes, panel: Panel, looks: Mapping[str, Look]) -> None:
    summary, rate = panel.summary, panel.at
    for position, method in enumerate(panel.methods):
        cells = {n: _cell(summary, method, rate, n) for n in summary.shots}
        beside = 2 ** (0.07 * (position - (len(panel.methods) - 1) / 2))  # shifted so that error bars do not overlap
        beside = beside if len(looks) <= FEW else 1
        _line(axes, {n * beside: cell.new for n, cell in cells.items() if cell}, method, looks)
    zero_shot = {n: 100 * cell.new.mean for n, cell in summary.zero_shot.items()}
    axes.plot(list(zero_shot), list(zero_shot.values()), label="zero-shot", **ZERO_SHOT)
    axes.set_xscale("log", base=2)
    axes.set_xticks(summary.shots, [str(n) for n in summary.shots])
    axes.minorticks_off()


def _over_rates(axes: Axes, panel: Panel, looks: Mapping[str, Look]) -> None:
    summary, shots = panel.summary, panel.at
    rates = summary.learning_rates
    for method in panel.methods:
        cells = {rate: _cell(summary, method, rate, shots) for rate in rates}
        _line(axes, {rate: cell.new for rate, cell in cells.items() if cell}, method, looks)
    if zero_shot := summary.zero_shot.get(shots):
        axes.plot(rates, [100 * zero_shot.new.mean] * len(rates), label="zero-shot", **ZERO_SHOT)
    axes.set_xscale("log")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()


def _line(axes: Axes, points: Mapping[float, Spread], method: str, looks: Mapping[str, Look]) -> None:
    means = [100 * spread.mean for spread in points.values()]
    bars = error_bar(points.values()) if len(looks) <= FEW else None
    axes.errorbar(list(points), means, bars, label=display_name(method), **LINE, **BARS, **looks[method])


def _rows_of_data_sets(axes: Axes, panel: Panel, looks: Mapping[str, Look]) -> None:
    summary, (shots,), (rate, measure) = panel.summary, panel.summary.shots, panel.at
    parts = {**summary.by_data, "average": summary}
    for position, method in enumerate([*panel.methods, None]):
        cells = [_cell(part, method, rate, shots) if method else part.zero_shot.get(shots) for part in parts.values()]
        beside = 0.7 * (position / len(panel.methods) - 0.5)
        points = [(100 * cell.means[measure], row + beside) for row, cell in enumerate(cells) if cell]
        look = looks[method] if method else ZERO_SHOT
        axes.plot(*zip(*points, strict=True), **{**LINE, **look, "linestyle": "none"})
    for row in range(0, len(parts), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="black", alpha=0.04, linewidth=0)
    axes.set_yticks(range(len(parts)), [for_figure(name) for name in parts])
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.tick_params(labelleft=measure == 0)


def _cell(summary: Summary, method: str, rate: float | None, shots: int) -> Cell | None:
    """The cell at a learning rate; methods without learning rates have one cell."""
    return summary.cells.get((method, rate, shots)) or summary.cells.get((method, None, shots))


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"learning rate {rate:g}"


def _title(summary: Summary) -> str:
    return "; ".join(filter(None, [f"Accuracy on the {new_name(summary)}", average_name(summary), caption(summary)]))


def _all_points(axes: Axes, panel: Panel, looks: Mapping[str, Look]) -> None:
    for method in panel.methods:
        cells = _cells(panel, method)
        new, kept = [cell.new for cell in cells], [cell.kept for cell in cells if cell.kept]
        bars = {"xerr": error_bar(new), "yerr": error_bar(kept)} if len(looks) <= FEW else {}
        axes.errorbar(
            _percent(new), _percent(kept), label=display_name(method), **bars, **LINE, **BARS, **looks[method]
        )
    _star(axes, panel)


def _best_part(axes: Axes, panel: Panel, looks: Mapping[str, Look]) -> None:
    for method in panel.methods:
        points = [cell.means for cell in (*_zero_shot(panel), *_cells(panel, method))]
        best = max(range(len(points)), key=lambda index: points[index][0], default=0)
        x, y = ([100 * point[measure] for point in points[: best + 1]] for measure in (0, 1))
        axes.plot(x, y, label=display_name(method), **LINE, **looks[method])
    _star(axes, panel)


def _star(axes: Axes, panel: Panel) -> None:
    x, y = ([100 * cell.means[measure] for cell in _zero_shot(panel)] for measure in (0, 1))
    axes.plot(x, y, "*", color="grey", markersize=9, label="zero-shot")


def _shots(panel: Panel) -> list[int]:
    return panel.summary.shots if panel.at is None else [panel.at]


def _cells(panel: Panel, method: str) -> list[Cell]:
    rates = (*panel.summary.learning_rates, None)
    found = [panel.summary.cells.get((method, rate, shots)) for shots in _shots(panel) for rate in rates]
    return [cell for cell in found if cell and cell.kept]


def _zero_shot(panel: Panel) -> list[Cell]:
    found = [panel.summary.zero_shot.get(shots) for shots in _shots(panel)]
    return [cell for cell in found if cell and cell.kept]


def _percent(spreads: list[Spread]) -> list[float]:
    return [100 * spread.mean for spread in spreads]
