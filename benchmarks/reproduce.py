"""`make reproduce DATA=/path`: the eleven data sets in order of size, and one table beside the published accuracies.

Data sets that are not in the folder are named with what is missing, and the others run: `complora sweep` of
sweeps/few-shot.yaml on them. The same command goes on where it was stopped, and takes up data sets that have come. The
table, OUTPUT/reproduced.md, is written again after each call: accuracies, and each method's difference from plain LoRA
with its 95% interval over seeds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.comparison import tomllib
from complora_kernels.common.files import write_atomically
from complora_kernels.fewshot.__main__ import main as complora
from complora_kernels.fewshot.datasets import check_dataset
from complora_kernels.fewshot.outcomes import results_of
from complora_kernels.fewshot.report.comparisons import compare
from complora_kernels.fewshot.report.formats import Table, to_markdown
from complora_kernels.fewshot.report.results import Result
from complora_kernels.fewshot.report.summary import Summary, summaries

HERE = Path(__file__).parent
SWEEP = HERE / "sweeps" / "few-shot.yaml"
PUBLISHED = HERE / "published.toml"
TABLE = "reproduced.md"

BY_SIZE = (
    *("dtd", "oxford_flowers", "caltech101", "fgvc_aircraft", "oxford_pets", "ucf101", "stanford_cars", "eurosat"),
    *("sun397", "food101", "imagenet"),
)
"""The eleven, in ascending order of their test images."""


def available(root: Path, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The data sets that are in the folder, and by name what is missing of the others."""
    found, missing = [], {}
    for name in names:
        try:
            check_dataset(name, root)
            found.append(name)
        except (FileNotFoundError, ValueError) as error:
            missing[name] = str(error)
    return found, missing


def write_sweep(path: Path, data: Sequence[str], root: Path, changes: Mapping[str, Any]) -> None:
    """Write the sweep of the data sets that are there; `changes` are options, or keys of the file, that differ."""
    content = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    content.pop("slurm", None)
    cells = {name: value for name, value in changes.items() if name in content}
    options = {name: value for name, value in changes.items() if name not in content}
    options = {**content["options"], **options, "data_root": str(root)}
    write_atomically(path, yaml.safe_dump({**content, **cells, "data": list(data), "options": options}))


def tables(summary: Summary, names: Sequence[str]) -> list[Table]:
    """For each number of shots the accuracies beside the published ones, then the differences from plain LoRA."""
    published = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))["table"]
    made = []
    for shots in summary.shots:
        text = [
            "Top-1 accuracy in percent, mean ± standard deviation over seeds; the mean is over the eleven data sets."
        ]
        body = []
        for of in published:
            numbers = of["shots"].get(str(shots))
            if numbers:
                body.append([f"{of['name']}, published", *(_number(numbers.get(name)) for name in (*names, "mean"))])
                text.append(f"{of['name']}: {of['source']}.")
        for method, rate in summary.rows:
            cells = [_measured(summary.by_data.get(name), method, rate, shots) for name in names]
            whole = summary.cells.get((method, rate, shots)) if len(summary.complete[shots]) == len(names) else None
            body.append([method, *cells, _spread(whole)])
        made.append(Table(text, ["", *names, "mean"], body, heading=f"{shots} {'shot' if shots == 1 else 'shots'}"))
        if differences := _differences(summary.results, summary.plain, names, shots):
            text = ["Points more than lora, paired by seed, with the 95% interval (Student's t)."]
            made.append(Table(text, ["", *names], differences))
    return made


def _differences(results: Sequence[Result], plain: str | None, names: Iterable[str], shots: int) -> list[list[str]]:
    methods = dict.fromkeys(result.method for result in results if result.method != plain)
    rows = []
    for method in methods if plain is not None else ():
        row = [method]
        for name in names:
            own = [result for result in results if result.data == name and result.shots == shots]
            assert plain is not None
            gains = [at["new"] for at in compare(own, method, plain, ("new",)).at_rate.values()]
            row.append(
                "" if not gains else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in gains[0].over_seeds[:3]))
            )
        rows.append(row)
    return [row for row in rows if any(row[1:])]


def _measured(part: Summary | None, method: str, rate: float | None, shots: int) -> str:
    return "" if part is None else _spread(part.cells.get((method, rate, shots)))


def _spread(cell: Any) -> str:
    return "" if cell is None else f"{100 * cell.new.mean:.1f} ± {100 * cell.new.sd:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def write_table(output: Path, names: Sequence[str], missing: Mapping[str, str]) -> Path:
    """Write OUTPUT/reproduced.md from the results that are there."""
    lines = results_of(output)
    (summary,) = summaries(lines)
    parts = ["# The eleven data sets, reproduced", *map(to_markdown, tables(summary, names))]
    if missing:
        parts.append(f"Not there: {', '.join(missing)}.")
    write_atomically(output / TABLE, "\n\n".join(parts) + "\n")
    return output / TABLE


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets, laid out as CoOp's are")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"), help="folder of the results")
    parser.add_argument("--names", nargs="+", default=BY_SIZE, choices=BY_SIZE, metavar="DATA", help="of the eleven")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="OPTION=VALUE", help="other options than the sweep's, such as steps=100"
    )
    chosen = parser.parse_args(arguments)
    if unclear := [text for text in chosen.set if "=" not in text]:
        parser.error(f"--set {unclear[0]}: expected OPTION=VALUE")
    changes = {name: yaml.safe_load(value) for name, value in (text.split("=", 1) for text in chosen.set)}
    names = [name for name in BY_SIZE if name in chosen.names]
    found, missing = available(chosen.data, names)
    for name, message in missing.items():
        print(f"{name} is missing: {message}\n", file=sys.stderr)
    if not found:
        print(f"error: none of {', '.join(names)} is in {chosen.data}", file=sys.stderr)
        return 2
    print(f"{len(found)} of {len(names)} data sets are there: {', '.join(found)}", file=sys.stderr)
    sweep = chosen.output / SWEEP.name
    chosen.output.mkdir(parents=True, exist_ok=True)
    write_sweep(sweep, found, chosen.data, changes)
    status = complora(["sweep", str(sweep), "--output", str(chosen.output)])
    if status in (0, 1) and results_of(chosen.output):
        print(f"{write_table(chosen.output, names, missing)} holds the table", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
