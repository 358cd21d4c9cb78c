"""The two pictures: accuracy against shots, and new-task accuracy against retained zero-shot accuracy."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from complora_kernels.fewshot.files import write_atomically
from complora_kernels.fewshot.summary import Summary

# Okabe and Ito's colours, which differ for colour-blind eyes too, and one marker each
_STYLES = {
    "lora": {"color": "#000000", "marker": "o"},
    "output": {"color": "#0072B2", "marker": "s"},
    "input": {"color": "#CC79A7", "marker": "v"},
    "both": {"color": "#D55E00", "marker": "D"},
    "random": {"color": "#56B4E9", "marker": "s", "linestyle": "--"},
    "random-both": {"color": "#E69F00", "marker": "D", "linestyle": "--"},
}
_LABELS = {
    "lora": "LoRA",
    "output": "Comp-LoRA, output",
    "input": "Comp-LoRA, input",
    "both": "Comp-LoRA, both",
    "random": "random subspace, output",
    "random-both": "random subspace, both",
}
_COLUMNS = 3
_ERROR_BARS = {"capsize": 2, "elinewidth": 0.8, "linewidth": 1.4, "markersize": 4.5}


def accuracy_against_shots(summary: Summary) -> Figure:
    """One panel per learning rate: new-task accuracy over the number of shots, mean and standard deviation."""
    figure = _figure(len(summary.learning_rates))
    figure.suptitle(f"New-task accuracy (handwritten digits); {_caption(summary)}")
    for axes, rate in zip(_panels(figure, len(summary.learning_rates)), summary.learning_rates, strict=True):
        axes.set_title(f"learning rate {rate:g}", fontsize="medium")
        for position, method in enumerate(summary.methods):
            cells = {n: summary.cells[method, rate, n] for n in summary.shots if (method, rate, n) in summary.cells}
            beside = 2 ** (0.07 * (position - (len(summary.methods) - 1) / 2))  # so that error bars do not overlap
            shots = [n * beside for n in cells]
            means = [100 * cell.new.mean for cell in cells.values()]
            bars = _error_bar(cell.new.sd for cell in cells.values())
            axes.errorbar(shots, means, bars, label=_LABELS[method], **_STYLES[method], **_ERROR_BARS)
        zero_shot = [100 * summary.zero_shot[n].new.mean for n in summary.shots]
        axes.plot(summary.shots, zero_shot, color="grey", linestyle=":", marker="*", label="zero-shot")
        axes.set_xscale("log", base=2)
        axes.set_xticks(summary.shots, [str(n) for n in summary.shots])
        axes.minorticks_off()
    return _label(figure, "shots (training images per class)", "new-task accuracy, %")


def new_against_kept(summary: Summary) -> Figure:
    """One panel per number of shots: each method's front, a point per learning rate, mean and standard deviation."""
    figure = _figure(len(summary.shots))
    figure.suptitle(f"Learned and kept: a point for each learning rate; {_caption(summary)}")
    for axes, shots in zip(_panels(figure, len(summary.shots)), summary.shots, strict=True):
        axes.set_title(f"{shots} shot{'s' if shots > 1 else ''}", fontsize="medium")
        for method in summary.methods:
            keys = [(method, rate, shots) for rate in summary.learning_rates]
            cells = [summary.cells[key] for key in keys if key in summary.cells]
            axes.errorbar(
                [100 * cell.new.mean for cell in cells],
                [100 * cell.kept.mean for cell in cells],
                xerr=_error_bar(cell.new.sd for cell in cells),
                yerr=_error_bar(cell.kept.sd for cell in cells),
                label=_LABELS[method],
                **_STYLES[method],
                **_ERROR_BARS,
            )
        zero_shot = summary.zero_shot[shots]
        axes.plot(100 * zero_shot.new.mean, 100 * zero_shot.kept.mean, "*", color="grey", ms=9, label="zero-shot")
    return _label(figure, "new-task accuracy (digits), %", "retained zero-shot accuracy (letters), %")


def write_figures(summary: Summary, folder: Path) -> list[Path]:
    """Write both figures as PNG files into `folder` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for draw in (accuracy_against_shots, new_against_kept):
        image = io.BytesIO()
        draw(summary).savefig(image, format="png", dpi=150)
        paths.append(folder / f"{draw.__name__}.png")
        write_atomically(paths[-1], image.getvalue())
    return paths


def _figure(panels: int) -> Figure:
    columns = min(panels, _COLUMNS)
    rows = -(-panels // _COLUMNS)
    return Figure(figsize=(1.2 + 3.2 * max(columns, 2), 1.5 + 2.8 * rows), layout="constrained")


def _panels(figure: Figure, n: int) -> Iterator[Axes]:
    columns = min(n, _COLUMNS)
    rows = -(-n // _COLUMNS)
    first = None
    for index in range(n):
        first = axes = figure.add_subplot(rows, columns, index + 1, sharex=first, sharey=first)
        axes.grid(alpha=0.3)
        yield axes


def _error_bar(sds: Iterable[float]) -> list[float]:
    return [0.0 if math.isnan(sd) else 100 * sd for sd in sds]  # one seed has no deviation


def _caption(summary: Summary) -> str:
    n = len(summary.seeds)
    return f"mean ± sd over {n} seeds" if n > 1 else f"seed {summary.seeds[0]} alone"


def _label(figure: Figure, x: str, y: str) -> Figure:
    for index, axes in enumerate(figure.axes):
        axes.set_xlabel(x, fontsize="small")
        if index % _COLUMNS == 0:
            axes.set_ylabel(y, fontsize="small")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure
