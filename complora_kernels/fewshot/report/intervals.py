"""The figure of the paired comparisons: a row for each, with the mean difference and its 95% interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from complora_kernels.fewshot.escapes import for_figure
from complora_kernels.fewshot.report.comparisons import Comparison, Gain
from complora_kernels.fewshot.report.styles import Look, looks
from complora_kernels.fewshot.report.summary import Summary
from complora_kernels.fewshot.report.wording import words


def differences(summary: Summary) -> Figure | None:
    """Draw the differences at equal new-task accuracy or, for a single learning rate, at it: a panel per accuracy.

    Returns None where there is no comparison.
    """
    titles = _titles(summary)
    compared = [comparison for comparison in summary.comparisons if any(_gains(comparison, titles))]
    if not compared:
        return None
    names = [f"{comparison.method} − {comparison.baseline}" for comparison in compared]
    wide = max(3.2, 0.065 * max(map(len, names)))  # width of the names in inches, beside the panels
    figure = Figure(figsize=(wide + 3.2 * len(titles), 1.5 + 0.24 * len(compared)), layout="constrained")
    figure.suptitle("Paired differences in points, mean and 95% interval over seeds")
    controls = [row for row, of in enumerate(compared) if summary.labels[of.baseline].source == "random"]
    of, _ = looks(summary.labels, summary.stand_ins)
    for column, title in enumerate(titles.values()):
        axes = figure.add_subplot(1, len(titles), column + 1)
        axes.set_title(title, fontsize="medium")
        _draw(axes, of, compared, [_gains(comparison, titles)[column] for comparison in compared])
        for row in controls[:1]:
            axes.axhline(row - 0.5, color="grey", linewidth=0.8)
        axes.set_yticks(range(len(names)), [for_figure(name) for name in names], fontsize="small")
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(labelleft=column == 0)
    return figure


def _titles(summary: Summary) -> dict[tuple[float, str] | None, str]:
    """The panels' titles by learning rate and measure; the key None stands for equal new-task accuracy."""
    names = words(summary.protocol)
    if len(summary.learning_rates) != 1:
        return {None: f"{names.kept_accuracy}\nat equal {names.equal}"}
    (rate,) = summary.learning_rates
    name = {"new": names.equal, "kept": names.kept_accuracy, "H": "H"}
    return {(rate, measure): f"{name[measure]}\nat learning rate {rate:g}" for measure in summary.measures}


def _gains(comparison: Comparison, titles: dict[tuple[float, str] | None, str]) -> list[Gain | None]:
    return [comparison.at_rate.get((at[0], None), {}).get(at[1]) if at else comparison.overall for at in titles]


def _draw(axes: Axes, of: Mapping[str, Look], compared: Sequence[Comparison], gains: Sequence[Gain | None]) -> None:
    for row, (comparison, gain) in enumerate(zip(compared, gains, strict=True)):
        if gain:
            mean, _, high, _, seeds, _ = gain.over_seeds
            half = 100 * (high - mean) if seeds > 1 else None
            look = {**of[comparison.method], "linestyle": "none"}
            axes.errorbar(100 * mean, row, xerr=half, markersize=4.5, capsize=2, **look)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
