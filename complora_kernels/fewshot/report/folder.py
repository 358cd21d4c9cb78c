"""Writes the report of a results folder: a table on the terminal, table.md, table.csv, table.tex and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import HORIZONTALS
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table as TerminalTable
from rich.text import Text

from complora_kernels.common.files import refuse_link, words_of, write_atomically
from complora_kernels.fewshot.escapes import for_markdown, say, visible
from complora_kernels.fewshot.files import read_json
from complora_kernels.fewshot.outcomes import failures_of, results_of
from complora_kernels.fewshot.report.figures import write_figures
from complora_kernels.fewshot.report.formats import LATEX_HEAD, to_latex, to_markdown
from complora_kernels.fewshot.report.gallery import write_gallery
from complora_kernels.fewshot.report.page import PAGE, missing_packages, write_page
from complora_kernels.fewshot.report.spreadsheet import to_csv
from complora_kernels.fewshot.report.summary import Summary, summaries
from complora_kernels.fewshot.report.tables import rows, sections
from complora_kernels.fewshot.report.wording import (
    accuracies,
    average_name,
    gaps,
    measure_names,
    sentences,
    shots_name,
    title,
)

_MOST_SENTENCES = 12  # the most comparisons printed on a terminal


def report(folder: Path, console: Console) -> None:
    """Print the table of a results folder and write its table.md, table.csv, table.tex and figures.

    Raises:
        FileNotFoundError: the folder holds no results.
        ValueError: one of its files is damaged; the message names the file and the line.
    """
    results = results_of(folder)
    failed = failures(results, failures_of(folder))
    if not results:
        because = f" ({len(failed)} failed, see failures.jsonl)" if failed else ""
        raise FileNotFoundError(
            f"{folder}: expected a folder in which `complora train` or `complora sweep` has finished a run{because}"
        )
    refuse_link(folder / "figures")
    protocols = summaries(results, variants(folder))
    for summary in protocols:
        console.print(terminal_table(summary))
        compared = sentences(summary)
        more = [f"{len(compared) - _MOST_SENTENCES} more comparisons are in table.md"] * (
            len(compared) > _MOST_SENTENCES
        )
        for text in (*gaps(summary), *compared[:_MOST_SENTENCES], *more):
            say(console, f"· {text}")
    for run, error in failed.items():
        say(console, f"failed: {run}: {error}")
    contents = {"md": markdown(protocols, failed), "csv": to_csv(protocols), "tex": latex(protocols)}
    for suffix, content in contents.items():
        write_atomically(folder / f"table.{suffix}", content)
    tables = [folder / f"table.{suffix}" for suffix in contents]
    figures = write_figures(protocols, folder / "figures")
    try:
        figures += write_gallery(folder, results)
    except (OSError, ValueError) as error:  # data sets may have been moved since
        say(console, f"no gallery: {words_of(error)}")
    if missing := missing_packages():
        say(console, f"no {PAGE}: pip install {' '.join(missing)}")
    else:
        figures.append(write_page(folder, protocols, results, failed))
    for path in (*tables, *figures):
        say(console, f"wrote {path}", soft_wrap=True)


def variants(folder: Path) -> list[str]:
    """The variants of a sweep, in the order of its file; `complora train` has none, because its config.json is flat."""
    path = folder / "config.json"
    described = read_json(path) if path.exists() else {}
    return [name for name, options in described.items() if isinstance(options, dict)]


def failures(results: Sequence[dict[str, Any]], failed: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The last error, on one line, of each run without a result, by the run's name."""
    finished = {result["run"] for result in results}
    errors = {line["run"]: " ".join(line["error"].split()) for line in failed if line["run"] not in finished}
    return dict(sorted(errors.items()))


def terminal_table(summary: Summary) -> Group:
    """Methods and learning rates down, shots across; in each cell one accuracy above the other.

    Their names stand in lines above the table, because rich would wrap a table's own title to its width.
    """
    names = measure_names(summary)
    lines_above = [
        ", ".join(filter(None, [title(summary), average_name(summary)])),
        f"above: {names[0]}; below: {', '.join(names[1:])}" if len(names) > 1 else names[0],
    ]
    table = TerminalTable(box=HORIZONTALS, pad_edge=False)
    table.add_column("method")
    table.add_column("rate", no_wrap=True)
    for shots in summary.shots:
        table.add_column(shots_name(shots), justify="right", no_wrap=True)
    lines = list(rows(summary))
    for (method, rate, cells), following in zip(lines, [*lines[1:], None], strict=True):
        texts = ["\n".join(accuracies(cell, summary)).replace(" ", "") if cell else "" for cell in cells]
        last_of_method = following is None or following[0] != method
        table.add_row(escape(visible(method)), rate, *texts, end_section=last_of_method)
    return Group(*(Text(visible(line)) for line in lines_above), table)


def markdown(protocols: Sequence[Summary], failed: dict[str, str] | None = None) -> str:
    """The content of table.md."""
    parts = []
    for summary in protocols:
        parts += [f"# {for_markdown(summary.protocol)}"] if len(protocols) > 1 else []
        parts += map(to_markdown, sections(summary))
    if failed:
        lines = [f"- {for_markdown(f'{run}: {error}')}" for run, error in failed.items()]
        parts += ["Failed runs without a result:", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def latex(protocols: Sequence[Summary]) -> str:
    """The content of table.tex."""
    tables = [to_latex(table) for summary in protocols for table in sections(summary)]
    return "\n\n".join([LATEX_HEAD, *tables]) + "\n"
