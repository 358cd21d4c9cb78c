"""Writes all means and deviations as one table of comma-separated values; accuracies are between 0 and 1."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from complora_kernels.fewshot.escapes import for_csv
from complora_kernels.fewshot.report.results import Result
from complora_kernels.fewshot.report.summary import Row, Summary


def to_csv(summaries: Sequence[Summary]) -> str:
    """A row for each protocol, data set, method, learning rate and number of shots; a column for each number.

    Retained tasks have the columns `<task>_before_mean` and so on.
    """
    lines = [line for summary in summaries for line in _lines(summary)]
    file = io.StringIO()
    columns = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.writer(file, lineterminator="\n")
    for row in (columns, *([line.get(column) for column in columns] for line in lines)):
        writer.writerow([for_csv(cell) if isinstance(cell, str) else cell for cell in row])
    return file.getvalue()


def _lines(summary: Summary) -> Iterator[dict[str, Any]]:
    for data, part in summary.by_data.items():
        for row in part.rows:
            for shots in part.shots:
                if results := part.runs(row, shots):
                    yield _line(data, row, shots, results)


def _line(data: str, row: Row, shots: int, results: list[Result]) -> dict[str, Any]:
    line: dict[str, Any] = {
        "protocol": results[0].protocol,
        "data": data,
        "method": row[0],
        "learning_rate": row[1],
        "shots": shots,
        "seeds": len(results),
    }
    for name in ("new", "kept", "zero_shot_new", "zero_shot_kept", "val", "relative_update"):
        line |= _mean_and_sd(name, (getattr(result, name) for result in results))
    for task in dict.fromkeys(task for result in results for task in result.tasks):
        for index, when in enumerate(("before", "after")):
            line |= _mean_and_sd(f"{task}_{when}", (r.tasks[task][index] for r in results if task in r.tasks))
    return line


def _mean_and_sd(name: str, values: Iterable[float | None]) -> dict[str, float | None]:
    measured = [value for value in values if value is not None]
    sd = float(np.std(measured, ddof=1)) if len(measured) > 1 else math.nan
    mean = float(np.mean(measured)) if measured else math.nan
    return {f"{name}_mean": _rounded(mean), f"{name}_sd": _rounded(sd)}


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
