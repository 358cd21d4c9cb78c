"""What a benchmark found, and the files that keep it.

A results file is `{"schema": SCHEMA, "machine": {...}, "rows": [...]}`; `Row` says what a row holds. It is written anew
after every row, so that an interrupted run keeps what it measured, and a later run of the same day on the same machine
replaces the rows that it measures again. The `.csv` beside it holds the same rows for a spreadsheet.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from complora_kernels.common.files import write_atomically

SCHEMA = 3


@dataclass(frozen=True)
class Row:
    """One baseline at one shape. Times are in seconds, ratios are times over ours in the same round.

    A row with `cold_s` was timed on a GPU without launches, as replays of a CUDA graph: `median_s`, and what is made of
    it, with a warm L2 cache (the step before it was the same one), `cold_s` with one that holds nothing of the step's.
    Without it, times are those of the step as Python runs it. A remark says which baseline of such rows could not be
    captured, and has its launches in both times. Of a GPU, `sm_clock`, `power` and `slowed` are what nvidia-smi said
    right after the comparison that the row is of.
    """

    benchmark: str  # the file: "layer" for bench_layer.py
    shape: str
    baseline: str
    remark: str = ""  # its known defects, or why it did not run
    rounds: int = 0  # paired repeats; 0: it did not run
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    ratio: float | None = None  # the median of the rounds' ratios
    ratio_low: float | None = None  # its 95% interval, from six rounds on
    ratio_high: float | None = None
    cold_s: float | None = None  # the median with a cold L2 cache
    cold_p20_s: float | None = None
    cold_p80_s: float | None = None
    cold_ratio: float | None = None  # the median of those rounds' ratios
    cold_ratio_low: float | None = None  # its 95% interval, from six rounds on
    cold_ratio_high: float | None = None
    roofline: float | None = None  # the least time that its operations and bytes take here, over median_s
    intensity: float | None = None  # operations a byte
    operations_per_s: float | None = None  # the ceilings of that roofline, as measured in the same run
    bytes_per_s: float | None = None
    peak_bytes: int | None = None  # the most memory of a step beyond what was there before it
    share: float | None = None  # the share of the update that arrives in the output
    target: str | None = None  # an id in targets.toml
    figure: float | None = None  # the measured value of that target
    revision: str = ""  # the revision that was measured
    sm_clock: str | None = None
    power: str | None = None
    slowed: str | None = None  # the bits of the reasons why the clock was not higher


@dataclass
class Results:
    """The rows of one machine."""

    machine: dict[str, Any]
    rows: list[Row]

    def add(self, row: Row) -> None:
        """In the place of an older row of the same baseline and shape."""
        key = (row.benchmark, row.shape, row.baseline)
        self.rows = [old for old in self.rows if (old.benchmark, old.shape, old.baseline) != key] + [row]


def read(path: Path) -> Results:
    """A results file.

    Raises:
        ValueError: it is none, or of another schema, or has a field that no schema knows.
    """
    try:
        content = json.loads(path.read_text())
        schema = content["schema"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no results file ({error!r}), expected JSON with schema={SCHEMA}") from error
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema={schema!r}, expected {SCHEMA}: measure again with `make bench`")
    unknown = {name for row in content["rows"] for name in row} - {field.name for field in fields(Row)}
    if unknown:
        raise ValueError(f"{path} has rows with {', '.join(sorted(unknown))}, expected fields of schema {SCHEMA} alone")
    return Results(content["machine"], [Row(**row) for row in content["rows"]])


def read_all(folder: Path) -> list[Results]:
    """The results files of a folder by name, which ends in the date."""
    return [read(path) for path in sorted(folder.glob("*.json"))]


def write(path: Path, results: Results) -> None:
    """The file and its `.csv`, each whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{name: value for name, value in asdict(row).items() if value not in (None, "")} for row in results.rows]
    content = {"schema": SCHEMA, "machine": results.machine, "rows": rows}
    write_atomically(path, json.dumps(content, indent=1) + "\n")
    write_atomically(path.with_suffix(".csv"), _csv(rows))


def _csv(rows: Iterable[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
