"""What each method reaches when its settings are chosen on validation images."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from complora_kernels.fewshot.report.summary import Row, Summary
from complora_kernels.fewshot.report.tables import Table
from complora_kernels.fewshot.report.wording import measure_names, shots_name


def validation_table(summary: Summary) -> Table | None:
    """Families of methods down, shots across; None without validation images.

    A family is what stands before the first comma of a method's name. On each data set and at each number of shots it
    is represented by the method and the learning rate with the best mean validation accuracy over seeds.
    """
    families = list(dict.fromkeys(_family(method) for method, _ in summary.rows))
    body = []
    for family in families:
        texts = [_cell(summary, family, shots) for shots in summary.shots]
        if any(texts):
            body.append([family, *texts])
    if not body:
        return None
    text = [
        f"{' / '.join(measure_names(summary)[:2])} in percent, means over seeds and data sets, of the variant and the",
        "learning rate with the best mean accuracy on the new task's validation images; beside them how often which.",
    ]
    return Table(text, ["method", *map(shots_name, summary.shots)], body, heading="Chosen by validation")


def best_row(summary: Summary, family: str, shots: int) -> Row | None:
    """The method and the learning rate of a family with the best mean validation accuracy, the first of equal ones.

    Those of which a seed has none do not count.
    """
    means = {}
    for row in summary.rows:
        values = [result.val for result in summary.runs(row, shots)]
        if _family(row[0]) == family and values and None not in values:
            means[row] = float(np.mean([value for value in values if value is not None]))
    return max(means, key=lambda row: means[row]) if means else None


def _family(method: str) -> str:
    return method.split(", ")[0]


def _cell(summary: Summary, family: str, shots: int) -> str:
    chosen = {data: best_row(part, family, shots) for data, part in summary.by_data.items()}
    if None in chosen.values():
        return ""
    results = [summary.by_data[data].runs(row, shots) for data, row in chosen.items() if row is not None]
    accuracies = [_mean(result.new for part in results for result in part)]
    if all(result.kept is not None for part in results for result in part):
        accuracies.append(_mean(result.kept for part in results for result in part))
    rows = [row for row in chosen.values() if row is not None]
    names = [_name(row, family) for row in dict.fromkeys(rows)]
    counts = [f" ({rows.count(row)})" if len(rows) > 1 else "" for row in dict.fromkeys(rows)]
    choices = "; ".join(name + count for name, count in zip(names, counts, strict=True) if name)
    return f"{' / '.join(f'{100 * accuracy:.1f}' for accuracy in accuracies)}{f': {choices}' if choices else ''}"


def _name(row: Row, family: str) -> str:
    method, rate = row
    return ", ".join(
        filter(None, [method.removeprefix(family).removeprefix(", "), "" if rate is None else f"{rate:g}"])
    )


def _mean(values: Iterable[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))
