"""Makes the tables of docs/speed.md and two figures of the results files: `make report`.

A table for each benchmark and machine: shapes down, baselines across, each cell the time over ours in the same round
with its 95% interval, on a GPU once with a warm and once with a cold L2 cache where steps were timed without launches.
The page's lines between `<!-- measured -->` and `<!-- /measured -->` are replaced; figures go to the results folder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import machine, results
from benchmarks.comparison import NOT_CAPTURED, bounds
from benchmarks.results import Results, Row
from benchmarks.targets import known, modelled, verdict

ROOT = Path(__file__).parents[1]
MARKS = "†‡§¶‖"  # marks of remarks about some shapes of a baseline, which stand below the table
WIDEST = 6  # baselines that stand side by side, ours among them; more continue in another table
WARM_AND_COLD = (
    "Times are of replays of a CUDA graph, without launches: with a warm L2 cache (the replay before was of the same "
    "step), then with a cold one."
)
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
OURS = ("complora_linear", "complora_kernels", "extension")  # other times are compared with these
TITLES = {
    "layer": "One layer, forward and backward",
    "factors": "The factors alone",
    "step": "A whole training step: forward, backward, AdamW",
    "host": "The host's time of an eager step, without launches and on tensors that take no time",
    "libraries": "A whole training step of other libraries' image models",
    "memory": "Memory that a step takes",
    "accuracy": "What of a small update arrives in the output",
    "train": "Until trained, everything before the first step included",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), help="folder of them")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "speed.md", help="whose tables are replaced")
    options = parser.parse_args()
    try:
        files = results.read_all(options.results)
        text = options.page.read_text()
        before, found, rest = text.partition(BEGIN)
        _, closed, after = rest.partition(END)
        if not (found and closed):
            raise ValueError(f"{options.page} has no {BEGIN} … {END}, expected both")
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    options.page.write_text(f"{before}{BEGIN}\n{tables(files)}\n{END}{after}")
    if files:
        speed_up(files, options.results / "speed-up.png")
        roofline(files, options.results / "roofline.png")
    print(f"{options.page}: {sum(len(file.rows) for file in files)} rows of {len(files)} files")


def tables(files: Iterable[Results]) -> str:
    """The tables of all files, then what is not yet measured."""
    parts = []
    for file in files:
        parts += [f"### {machine.name(file.machine)}", f"{', '.join(facts(file))}."]
        for benchmark in dict.fromkeys(row.benchmark for row in file.rows):
            rows = [row for row in file.rows if row.benchmark == benchmark]
            replayed = any(row.cold_s is not None for row in rows)
            parts += [f"#### {TITLES[benchmark]}", *([WARM_AND_COLD] if replayed else []), table(rows)]
    figures = known(files, modelled())
    parts += ["### Targets", "What each means is in [benchmarks/targets.toml](../benchmarks/targets.toml)."]
    lines = ["| target | machine | |", "| --- | --- | --- |"]
    for target in bounds().values():
        words = verdict(target, figures.get((target["id"], target["machine"])))
        lines.append(f"| {target['id']} | {target['machine']} | {words} |")
    return "\n\n".join([*parts, "\n".join(lines)])


def facts(file: Results) -> list[str]:
    """What a machine is, of a GPU with its driver and limit, and the revisions of all code that was measured on it."""
    names = ("driver_version", "cuda", "power.limit", "threads", "torch", "triton", "peft", "transformers")
    known = [f"{name} {file.machine[name]}" for name in names if name in file.machine]
    revisions = dict.fromkeys(row.revision or file.machine["revision"] for row in file.rows)
    return [*known, f"revision{'s' if len(revisions) > 1 else ''} {' '.join(revisions)}"]


def table(rows: list[Row]) -> str:
    """Shapes down, baselines across, then what is to be said of baselines, and of some of their shapes by marks."""
    notes: dict[str, str] = {}  # remark of some shapes -> its mark
    said: list[str] = []
    columns: dict[str, dict[str, str]] = {}  # baseline -> shape -> cell
    for baseline in dict.fromkeys(row.baseline for row in rows):
        own = {row.shape: row for row in rows if row.baseline == baseline}
        parts = {shape: remarks(row) for shape, row in own.items() if row.rounds}
        always = [part for part in next(iter(parts.values()), []) if all(part in other for other in parts.values())]
        marks = {shape: [mark(part, notes) for part in of if part not in always] for shape, of in parts.items()}
        columns[baseline] = {shape: cell(row) + "".join(marks.get(shape, "")) for shape, row in own.items()}
        said += [f"- {baseline}: {'; '.join(always)}"] if always else []
    ours = [baseline for baseline in columns if baseline in OURS][:1]
    others = [baseline for baseline in columns if baseline not in ours]
    width = WIDEST - len(ours)
    shapes = list(dict.fromkeys(row.shape for row in rows))
    tables = [_side_by_side([*ours, *others[i : i + width]], columns, shapes) for i in range(0, len(others), width)]
    said += [f"- {mark} {part}" for part, mark in notes.items()]
    return "\n\n".join([*(tables or [_side_by_side(ours, columns, shapes)]), *(["\n".join(said)] if said else [])])


def _side_by_side(baselines: list[str], columns: dict[str, dict[str, str]], shapes: list[str]) -> str:
    """A table of these baselines, with the shapes that any of them but ours has."""
    compared = baselines[1:] if baselines[0] in OURS and len(baselines) > 1 else baselines
    lines = [_line(["", *baselines]), "|" + " --- |" * (len(baselines) + 1)]
    shown = [shape for shape in shapes if any(shape in columns[baseline] for baseline in compared)]
    lines += [_line([shape, *(columns[baseline].get(shape, "") for baseline in baselines)]) for shape in shown]
    return "\n".join(lines)


def remarks(row: Row) -> list[str]:
    """The parts of a row's remark, without the reason why it was not captured."""
    always, launched, _ = row.remark.partition(NOT_CAPTURED)
    return [*filter(None, always.split("; ")), *([launched] if launched else [])]


def mark(part: str, notes: dict[str, str]) -> str:
    """That of a remark below the table; as many letters as are needed."""
    number = len(notes)
    return notes.setdefault(part, MARKS[number % len(MARKS)] * (number // len(MARKS) + 1))


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def cell(row: Row) -> str:
    if row.share is not None:
        return f"{row.share:.2f}"
    if row.median_s is None:
        return row.remark if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"
    if row.baseline in OURS or row.ratio is None:  # ours did not fit
        return time_of(row.median_s) + ("" if row.cold_s is None else f"; cold {time_of(row.cold_s)}")
    return ratio(row) + ("" if row.cold_ratio is None else f"; cold {cold_ratio(row)}")


def ratio(row: Row) -> str:
    """`1.05 [1.04, 1.07]`, or without an interval `1.05 (3 rounds)`; nothing where ours did not fit."""
    return "" if row.ratio is None else _ratio(row.rounds, row.ratio, row.ratio_low, row.ratio_high)


def cold_ratio(row: Row) -> str:
    """The same with a cold L2 cache."""
    ratio, low, high = row.cold_ratio, row.cold_ratio_low, row.cold_ratio_high
    return "" if ratio is None else _ratio(row.rounds, ratio, low, high)


def _ratio(rounds: int, ratio: float, low: float | None, high: float | None) -> str:
    few = f"({rounds} round{'s' if rounds > 1 else ''})"
    return f"{ratio:.2f} {few if low is None else f'[{low:.2f}, {high:.2f}]'}"


def time_of(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def speed_up(files: list[Results], path: Path) -> None:
    """Every baseline's time over ours, a panel for each benchmark and machine."""
    panels = [
        (machine.name(file.machine), name, [r for r in file.rows if r.benchmark == name and r.ratio is not None])
        for file in files
        for name in dict.fromkeys(row.benchmark for row in file.rows)
    ]
    panels = [(where, name, [row for row in rows if row.baseline not in OURS]) for where, name, rows in panels]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return
    heights = [1 + 0.24 * len(rows) for _, _, rows in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, (where, name, rows) in zip(axes[:, 0], panels, strict=True):
        rows = rows[::-1]
        ratios = [row.ratio or 0.0 for row in rows]
        errors = [
            [ratio - (row.ratio_low or ratio) for row, ratio in zip(rows, ratios, strict=True)],
            [(row.ratio_high or ratio) - ratio for row, ratio in zip(rows, ratios, strict=True)],
        ]
        places = range(len(rows))
        axis.errorbar(ratios, places, xerr=errors, fmt="o", color="#1f5f8b", ecolor="#8fb3cc", capsize=2, markersize=4)
        axis.axvline(1, color="#888888", linewidth=1)
        axis.set_yticks(places, [f"{row.baseline}, {row.shape}" for row in rows], fontsize=7)
        axis.set_xscale("log")
        ticks = [tick for tick in (0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20) if min(ratios) / 1.2 <= tick <= max(ratios) * 1.2]
        axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
        axis.minorticks_off()
        axis.set_title(f"{TITLES[name]}: time over ours ({where})", loc="right", fontsize=9)
        axis.margins(y=0.6 / max(len(rows), 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def roofline(files: list[Results], path: Path) -> None:
    """How near each measured shape comes to the least time that its operations and bytes take on that machine."""
    placed = [[row for row in file.rows if row.roofline is not None and row.intensity is not None] for file in files]
    shown = [(file, rows) for file, rows in zip(files, placed, strict=True) if rows] or [(files[0], placed[0])]
    figure, axes = plt.subplots(1, len(shown), figsize=(6 * len(shown), 4.5), squeeze=False, layout="constrained")
    for axis, (file, rows) in zip(axes[0], shown, strict=True):
        roofs = {row: ceilings(row, file) for row in rows}
        if rows:
            for peak, rate in dict.fromkeys(roofs.values()):
                intensities = sorted({row.intensity or 1.0 for row in rows} | {peak / rate})
                ends = [intensities[0] / 3, *intensities, intensities[-1] * 3]
                axis.plot(ends, [min(peak, i * rate) for i in ends], color="#444444", linewidth=1)
            for ours, color in ((True, "#1f5f8b"), (False, "#d08c4a")):
                points = [row for row in rows if (row.baseline in OURS) == ours]
                axis.scatter(
                    [row.intensity or 0.0 for row in points],
                    [(row.roofline or 0.0) * under(roofs[row], row.intensity or 0.0) for row in points],
                    s=22 if ours else 10,
                    color=color,
                    label="ours" if ours else "baselines",
                    zorder=3 if ours else 2,
                )
            axis.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="operations a second")
            axis.legend(frameon=False)
        axis.set_title(machine.name(file.machine), loc="left", fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def ceilings(row: Row, file: Results) -> tuple[float, float]:
    """Operations and bytes a second that a row's roofline was made of; an older row has those of its file."""
    facts = file.machine
    return row.operations_per_s or facts["operations_per_s"], row.bytes_per_s or facts["bytes_per_s"]


def under(ceilings: tuple[float, float], intensity: float) -> float:
    peak, rate = ceilings
    return min(peak, intensity * rate)


if __name__ == "__main__":
    main()
