"""What came out: a table on the terminal, table.md with the numbers and the comparisons in words, two figures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rich.box import HORIZONTALS
from rich.console import Console
from rich.table import Table

from complora_kernels.fewshot.figures import write_figures
from complora_kernels.fewshot.files import read_json_lines, write_atomically
from complora_kernels.fewshot.front import Paired
from complora_kernels.fewshot.summary import Cell, Comparison, Spread, Summary


def report(folder: Path, console: Console) -> None:
    """Print the table of a results folder and write its table.md and figures.

    Raises:
        FileNotFoundError: the folder holds no results.
    """
    results = read_json_lines(folder / "results.jsonl")
    if not results:
        raise FileNotFoundError(f"{folder}: expected a folder in which `complora train` has finished a run")
    summary = Summary(results)
    console.print(terminal_table(summary))
    for comparison in summary.comparisons:
        console.print(f"· {sentence(comparison)}", highlight=False)
    write_atomically(folder / "table.md", markdown(summary))
    for path in (folder / "table.md", *write_figures(summary, folder / "figures")):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def terminal_table(summary: Summary) -> Table:
    """Methods and learning rates down, shots across; in each cell the new-task accuracy above the retained one."""
    table = Table(
        title=_title(summary),
        caption="above: new task (digits); below: retained (letters)",
        box=HORIZONTALS,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    table.add_column("rate", no_wrap=True)
    for shots in summary.shots:
        table.add_column(_shots(shots), justify="right", no_wrap=True)
    for method, rate, cells in _rows(summary):
        texts = [f"{_percent(cell.new)}\n{_percent(cell.kept)}".replace(" ", "") if cell else "" for cell in cells]
        last_of_method = rate in (None, summary.learning_rates[-1])
        table.add_row(method, "" if rate is None else f"{rate:g}", *texts, end_section=last_of_method)
    return table


def markdown(summary: Summary) -> str:
    """The content of table.md."""
    head = ["method", "learning rate", *map(_shots, summary.shots), "ΔW / W"]
    body = []
    for method, rate, cells in _rows(summary):
        texts = [f"{_percent(cell.new)} / {_percent(cell.kept)}" if cell else "" for cell in cells]
        update = "" if rate is None else f"{summary.relative_updates[method, rate]:.3f}"
        body.append([method, "" if rate is None else f"{rate:g}", *texts, update])
    parts = [
        f"{_title(summary)}: new task (digits) / retained (letters).",
        "ΔW / W: Frobenius norm of the update against the weight's, mean over layers, shots and seeds.",
        "",
        _markdown_table(head, body),
    ]
    if summary.comparisons:
        parts += ["", *_comparisons(summary)]
    return "\n".join(parts) + "\n"


def _comparisons(summary: Summary) -> Iterator[str]:
    yield "Differences paired by seed: mean, 95% interval (Student's t), seeds with a gain."
    yield ""
    yield "Points more kept at equal new-task accuracy: fronts from the zero-shot model over the learning rates,"
    yield "interpolated between neighbours, averaged from the zero-shot accuracy to the highest that both reach."
    yield ""
    head = ["equal new-task accuracy", *map(_shots, summary.shots), "all shots"]
    body = []
    for comparison in summary.comparisons:
        name = f"{comparison.method} - {comparison.rival}"
        by_shots = [_interval(comparison.by_shots.get(shots)) for shots in summary.shots]
        body.append([name, *by_shots, _interval(comparison.overall)])
    yield _markdown_table(head, body)
    yield ""
    yield from (f"- {sentence(comparison)}" for comparison in summary.comparisons)
    yield ""
    yield "Points gained at equal learning rate, averaged over shots."
    yield ""
    head = ["equal learning rate", *(f"{rate:g}" for rate in summary.learning_rates)]
    body = []
    for comparison in summary.comparisons:
        name = f"{comparison.method} - {comparison.rival}"
        pairs = [comparison.by_rate.get(rate, (None, None)) for rate in summary.learning_rates]
        for task, by_rate in zip(("new", "retained"), zip(*pairs, strict=True), strict=True):
            body.append([f"{name}, {task}", *map(_interval, by_rate)])
    yield _markdown_table(head, body)


def sentence(comparison: Comparison) -> str:
    """The comparison over all numbers of shots in one sentence."""
    method, rival = comparison.method, comparison.rival
    if comparison.overall is None:
        return f"{method} and {rival}: no seed has two learning rates or more at every number of shots."
    mean, low, high, wins, seeds = comparison.overall
    points = round(100 * mean, 1)
    difference = f"{abs(points):.1f} points {'more' if points > 0 else 'less'} than" if points else "as much as"
    text = f"At equal new-task accuracy, {method} keeps {difference} {rival}"
    if seeds < 2:
        return f"{text} (one seed: no interval)."
    verdict = "the interval excludes zero" if low * high > 0 else "the interval includes zero: no difference shown"
    interval = f"95% interval {100 * low:+.1f} to {100 * high:+.1f}"
    return f"{text} ({interval} over {seeds} seeds, {wins} of them with a gain; {verdict})."


def _rows(summary: Summary) -> Iterator[tuple[str, float | None, list[Cell | None]]]:
    yield "zero-shot", None, [summary.zero_shot[shots] for shots in summary.shots]
    for method, rate in summary.relative_updates:
        yield method, rate, [summary.cells.get((method, rate, shots)) for shots in summary.shots]


def _title(summary: Summary) -> str:
    n = len(summary.seeds)
    return (
        f"Accuracy in percent, mean ± standard deviation over {n} seeds" if n > 1 else "Accuracy in percent, one seed"
    )


def _shots(n: int) -> str:
    return f"{n} shot" if n == 1 else f"{n} shots"


def _percent(spread: Spread) -> str:
    mean, sd = spread
    return f"{100 * mean:.1f}" if math.isnan(sd) else f"{100 * mean:.1f} ± {100 * sd:.1f}"


def _interval(paired: Paired | None) -> str:
    if paired is None:
        return "–"
    mean, low, high, wins, seeds = paired
    interval = f" [{100 * low:+.1f}, {100 * high:+.1f}]" if seeds > 1 else ""
    return f"{100 * mean:+.1f}{interval}, {wins}/{seeds}"


def _markdown_table(head: list[str], body: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
