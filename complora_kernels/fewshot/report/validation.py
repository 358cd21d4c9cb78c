"""The table of accuracies where each method's settings are chosen on validation images."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from complora_kernels.fewshot.report.comparisons import whole_block
from complora_kernels.fewshot.report.formats import Table
from complora_kernels.fewshot.report.labels import family_name
from complora_kernels.fewshot.report.summary import Row, Summary
from complora_kernels.fewshot.report.wording import measure_names, shots_name


def validation_table(summary: Summary) -> Table | None:
    """Families of methods down, shots across; None without validation images.

    A family is the methods of one kind; it has the name of its only method, or that of the kind. On each data set and
    at each number of shots `best_row` represents it.
    """
    families: dict[str, list[str]] = {}
    for method in summary.methods:
        families.setdefault(family_name(summary.labels[method]), []).append(method)
    body = []
    for family, methods in families.items():
        name = methods[0] if len(methods) == 1 else family
        texts = [_cell(summary, name, methods, shots) for shots in summary.shots]
        if any(texts):
            body.append([name, *texts])
    if not body:
        return None
    over = "seeds" if len(summary.data_sets) == 1 else "data sets of means over seeds"
    text = [
        f"{' / '.join(measure_names(summary)[:2])} in percent, means over {over}, of the variant and the",
        "learning rate with the best mean accuracy on the new task's validation images; beside them how often which.",
    ]
    return Table(text, ["method", *map(shots_name, summary.shots)], body, heading="Chosen by validation")


def best_row(summary: Summary, methods: Collection[str], shots: int) -> Row | None:
    """The method and the learning rate with the best mean validation accuracy on one data set, the first of equals.

    They are compared over the seeds that all of them have or, if there is none, in a `whole_block`. A method and rate
    with a seed without validation accuracy do not count.
    """
    results = {row: summary.runs(row, shots) for row in summary.rows if row[0] in methods}
    values = {
        (row, result.seed): result.val
        for row, of in results.items()
        if all(result.val is not None for result in of)
        for result in of
        if result.val is not None
    }
    rows = {row for row, _ in values}
    common = {seed for _, seed in values if all((row, seed) in values for row in rows)}
    by_row: dict[Row, list[float]] = {}
    compared = {key: value for key, value in values.items() if key[1] in common} or whole_block(values)
    for (row, _), value in compared.items():
        by_row.setdefault(row, []).append(value)
    return max(by_row, key=lambda row: np.mean(by_row[row]), default=None)


def _cell(summary: Summary, name: str, methods: Collection[str], shots: int) -> str:
    chosen = {data: best_row(part, methods, shots) for data, part in summary.by_data.items()}
    rows = [row for row in chosen.values() if row is not None]
    if len(rows) < len(chosen):
        return ""
    cells = [summary.by_data[data].cells[(*row, shots)] for data, row in zip(chosen, rows, strict=True)]
    accuracies = [np.mean([cell.new.mean for cell in cells])]
    kept = [cell.kept.mean for cell in cells if cell.kept]
    if len(kept) == len(cells):
        accuracies.append(np.mean(kept))
    texts = [_name(row, name) for row in dict.fromkeys(rows)]
    counts = [f" ({rows.count(row)})" if len(rows) > 1 else "" for row in dict.fromkeys(rows)]
    choices = "; ".join(text + count for text, count in zip(texts, counts, strict=True) if text)
    return f"{' / '.join(f'{100 * accuracy:.1f}' for accuracy in accuracies)}{f': {choices}' if choices else ''}"


def _name(row: Row, family: str) -> str:
    method, rate = row
    setting = "" if method == family else method.removeprefix(f"{family}, ")
    return ", ".join(filter(None, [setting, "" if rate is None else f"{rate:g}"]))
