"""The figures of learned against retained accuracy: all measurements, and the compared part of each front."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from complora_kernels.fewshot.report.panels import Panel, arrange, caption, draw_figure, error_bar
from complora_kernels.fewshot.report.styles import BARS, FEW, LINE, Look, display_name
from complora_kernels.fewshot.report.summary import Cell, Spread, Summary
from complora_kernels.fewshot.report.wording import axis_names, shots_name, words


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
