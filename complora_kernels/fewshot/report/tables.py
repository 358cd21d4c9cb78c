"""The tables of a report: accuracies, averages over data sets, changes of each retained task, comparisons."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from complora_kernels.fewshot.report.comparisons import Comparison
from complora_kernels.fewshot.report.formats import Table
from complora_kernels.fewshot.report.front import holm
from complora_kernels.fewshot.report.summary import Cell, Row, Summary
from complora_kernels.fewshot.report.validation import validation_table
from complora_kernels.fewshot.report.wording import (
    accuracies,
    average_name,
    gaps,
    interval,
    measure_names,
    sentences,
    short_name,
    shots_name,
    title,
    words,
)


def sections(summary: Summary) -> list[Table]:
    """All tables of a protocol; averages come first, and the tables of single data sets last."""
    several = len(summary.data_sets) > 1
    tables = [accuracy_table(summary)]
    if several:
        tables += [data_set_table(summary, shots) for shots in summary.shots]
    if summary.protocol != "base-to-new" and summary.tasks and (several or len(summary.tasks) > 1):
        tables += [kept_table(summary, shots) for shots in summary.shots]
    if (validated := validation_table(summary)) is not None:
        tables.append(validated)
    if summary.comparisons:
        tables += comparison_tables(summary)
    if several:
        tables += [accuracy_table(part, heading=data) for data, part in summary.by_data.items()]
    return tables


def rows(summary: Summary) -> Iterator[tuple[str, str, list[Cell | None]]]:
    """Yield method, learning rate and a cell for each number of shots; the zero-shot model comes first."""
    yield "zero-shot", "", [summary.zero_shot.get(shots) for shots in summary.shots]
    for method, rate in summary.rows:
        yield method, _rate(rate), [summary.cells.get((method, rate, shots)) for shots in summary.shots]


def accuracy_table(summary: Summary, heading: str | None = None) -> Table:
    """Methods and learning rates down, shots across."""
    parts = [f"{title(summary)}: {' / '.join(measure_names(summary))}", average_name(summary)]
    text = [f"{'; '.join(filter(None, parts))}."]
    head = ["method", "learning rate", *map(shots_name, summary.shots)]
    body = [[method, rate, *(_cell(cell, summary) for cell in cells)] for method, rate, cells in rows(summary)]
    if summary.relative_updates:
        over = f"layers, {'data sets, ' if len(summary.data_sets) > 1 else ''}shots and seeds"
        text.append(f"ΔW / W: Frobenius norm of the update against the weight's, mean over {over}.")
        head.append("ΔW / W")
        updates = [None, *(summary.relative_updates.get(row) for row in summary.rows)]
        body = [[*row, "" if of is None else f"{of:.3f}"] for row, of in zip(body, updates, strict=True)]
    return Table([*text, *gaps(summary)], head, body, labels=2, heading=heading)


def data_set_table(summary: Summary, shots: int) -> Table:
    """Methods and learning rates down, data sets and their average across, at one number of shots."""
    parts = [*summary.by_data.values(), summary]

    def texts(row: Row | None) -> list[str]:
        cells = [part.cells.get((*row, shots)) if row else part.zero_shot.get(shots) for part in parts]
        return [_cell(cell, summary, deviations=False) for cell in cells]

    found = [row for row in summary.rows if any(texts(row))]
    body = [["zero-shot", "", *texts(None)], *([row[0], _rate(row[1]), *texts(row)] for row in found)]
    n, of = len(summary.data_sets), len(summary.complete[shots])
    average = f"average over {of} of {n} data sets" if of < n else f"average over {n} data sets"
    text = [f"Means over seeds in percent: {' / '.join(measure_names(summary))}; {average}."]
    if "H" in summary.measures:
        text.append("The average's H is the harmonic mean of the averages.")
    head = ["method", "learning rate", *summary.data_sets, "average"]
    return Table(text, head, body, labels=2, heading=shots_name(shots))


def kept_table(summary: Summary, shots: int) -> Table:
    """Methods and learning rates down, retained tasks across: the points by which training changed their accuracy."""
    changes = {row: found for row in summary.rows if (found := summary.changes(row, shots))}
    before = {task: accuracy for found in changes.values() for task, (accuracy, _) in found.items()}
    tasks = [task for task in summary.tasks if task in before]
    zero_shot = [before[task] for task in tasks]
    body = [["zero-shot", "", *(f"{100 * accuracy:.1f}" for accuracy in [*zero_shot, *_mean(zero_shot)])]]
    for (method, rate), found in changes.items():
        points = [f"{100 * found[task][1]:+.1f}" if task in found else "" for task in tasks]
        mean = _mean([change for _, change in found.values()])
        body.append([method, _rate(rate), *points, *(f"{100 * change:+.1f}" for change in mean)])
    text = [
        "Accuracy of the zero-shot model in percent, and below it the points that training adds: the mean over seeds",
        "and over the data sets that were trained on; in the last column the mean over tasks.",
    ]
    head = ["method", "learning rate", *tasks, *(["mean"] if tasks else [])]
    return Table(text, head, body, labels=2, heading=f"Each task kept, {shots_name(shots)}")


def comparison_tables(summary: Summary) -> list[Table]:
    """The comparisons at equal new-task accuracy, where there are fronts, and at equal learning rate."""
    tables = [_at_rate_table(summary)]
    if any(comparison.by_shots for comparison in summary.comparisons):
        tables = [_front_table(summary), *tables]
    text = ["Differences paired by seed: mean, 95% interval (Student's t), seeds with a gain."]
    if len(summary.data_sets) > 1:
        tables[0].heading = "Comparisons"
        text = [
            "Differences paired by data set and seed, each seed's averaged over data sets, the same for every seed:",
            "mean, 95% interval (Student's t), seeds with a gain, data sets with a gain.",
        ]
    if any(0 < len(comparison.shots) < len(summary.shots) for comparison in summary.comparisons):
        text.append("All shots are those that both methods have.")
    tables[0].text = [*text, "", *tables[0].text]
    tables[0].after = [f"- {text}" for text in sentences(summary)]
    return tables


def _front_table(summary: Summary) -> Table:
    names = words(summary.protocol)
    text = [
        f"{names.more} at equal {names.equal}: fronts from the zero-shot model over the learning rates,",
        "interpolated between neighbours, averaged from the zero-shot accuracy to the highest that both reach.",
    ]
    head = [f"equal {names.equal}", *map(shots_name, summary.shots)]
    body = [
        [_pair(comparison), *(interval(comparison.by_shots.get(shots)) for shots in summary.shots)]
        for comparison in summary.comparisons
    ]
    if len(summary.shots) > 1:
        head.append("all shots")
        body = [[*row, interval(of.overall)] for row, of in zip(body, summary.comparisons, strict=True)]
    p_values = [of.overall.over_seeds.p if of.overall else float("nan") for of in summary.comparisons]
    tests = sum(map(math.isfinite, p_values))
    if tests:
        head.append("p")
        body = [[*row, _p_value(p)] for row, p in zip(body, holm(p_values), strict=True)]
        of_all = " of all shots" if len(summary.shots) > 1 else ""
        text.append(
            f"p{of_all}: two-sided paired t-test over the seeds, corrected for {tests} "
            f"{'test' if tests == 1 else 'tests'} by Holm's method."
        )
    return Table(text, head, body)


def _p_value(p: float) -> str:
    if math.isnan(p):
        return ""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _at_rate_table(summary: Summary) -> Table:
    rates: list[float] = summary.learning_rates
    columns: dict[tuple[float, int | None], str] = {(rate, None): f"{rate:g}" for rate in rates}
    text = "Points gained at equal learning rate, averaged over shots."
    if len(rates) == 1:
        columns = {(rates[0], shots): shots_name(shots) for shots in summary.shots}
        columns |= {(rates[0], None): "all shots"} if len(summary.shots) > 1 else {}
        text = f"Points gained at learning rate {rates[0]:g}."
    body = []
    for comparison in summary.comparisons:
        for measure in summary.measures:
            gains = [comparison.at_rate.get(column, {}).get(measure) for column in columns]
            body.append([f"{_pair(comparison)}, {short_name(summary, measure)}", *map(interval, gains)])
    return Table([text], ["equal learning rate", *columns.values()], body)


def _cell(cell: Cell | None, summary: Summary, deviations: bool = True) -> str:
    return " / ".join(accuracies(cell, summary, deviations)) if cell else ""


def _rate(rate: float | None) -> str:
    return "" if rate is None else f"{rate:g}"


def _mean(values: list[float]) -> list[float]:
    return [float(np.mean(values))] if values else []


def _pair(comparison: Comparison) -> str:
    return f"{comparison.method} - {comparison.baseline}"
