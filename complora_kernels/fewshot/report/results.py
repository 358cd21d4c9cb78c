"""Reads the lines of results.jsonl for the report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from complora_kernels.fewshot.config import Run
from complora_kernels.fewshot.methods import METHODS
from complora_kernels.fewshot.report.labels import Variant, part_of


@dataclass(frozen=True)
class Result:
    """The accuracies of one adapted model."""

    protocol: str
    data: str  # the data set it was trained on
    method: str
    learning_rate: float | None  # None: the method has none
    shots: int
    seed: int
    new: float  # accuracies: of the new task, and the mean of the tasks that are kept
    kept: float | None
    zero_shot_new: float
    zero_shot_kept: float | None
    tasks: Mapping[str, tuple[float, float]]  # each task that is kept: before and after
    relative_update: float | None  # |ΔW| / |W|
    val: float | None  # accuracy on validation images of the new task
    variant: Variant
    place: int  # place of the method in tables


class _Cell(NamedTuple):
    """The values that identify a run of a folder."""

    data: str
    name: str  # name of the method in tables
    shots: int
    learning_rate: float | None
    seed: int
    protocol: str


def read_results(lines: Iterable[Mapping[str, Any]], variants: Iterable[str] = ()) -> list[Result]:
    """Make a result for every run and for every measured share of its update.

    A line without a protocol is few-shot, and a line without a data set is of the handwritten digits.

    Args:
        lines: the lines of results.jsonl. Of several lines of one run, the last one counts; otherwise the order does
            not matter.
        variants: in a sweep, `Run.variant` of all of its runs, in the order of its file. The results have this order of
            data sets and methods; others follow, methods in the order of `METHODS`, then by name. Equal ones ascend by
            shots, learning rate and seed.
    """
    last = {_cell(line): line for line in lines}
    data_sets, names = _places(last, variants)

    def place(cell: _Cell) -> tuple[float | str, ...]:
        rate = -1.0 if cell.learning_rate is None else cell.learning_rate
        return data_sets[cell.data], names[cell.name], cell.shots, rate, cell.seed, cell.protocol

    return [result for cell in sorted(last, key=place) for result in _results(cell, last[cell], names[cell.name])]


def _cell(line: Mapping[str, Any]) -> _Cell:
    return _Cell(
        data=line.get("data", "digits"),
        name=line.get("label", line["method"]),
        shots=line["shots"],
        learning_rate=line["learning_rate"],
        seed=line["seed"],
        protocol=line.get("protocol", "few-shot"),
    )


def _places(cells: Iterable[_Cell], variants: Iterable[str]) -> tuple[dict[str, int], dict[str, int]]:
    """The places of data sets and of methods in the order, by name."""
    at = {variant: place for place, variant in enumerate(variants)}
    data_sets, names = {cell.data for cell in cells}, {cell.name for cell in cells}
    known = {(data, name): at.get(Run("lora", 0, None, 0, data, name).variant) for data in data_sets for name in names}
    vocabulary: list[str] = list(METHODS)

    def first(places: Iterable[int | None]) -> int:
        return min((place for place in places if place is not None), default=len(at))

    def by_data(data: str) -> tuple[int, str]:
        return first(known[data, name] for name in names), data

    def by_name(name: str) -> tuple[int, int, str]:
        usual = vocabulary.index(name) if name in vocabulary else len(vocabulary)
        return first(known[data, name] for data in data_sets), usual, name

    ordered = sorted(data_sets, key=by_data), sorted(names, key=by_name)
    of_data, of_name = ({name: place for place, name in enumerate(names)} for names in ordered)
    return of_data, of_name


def _results(cell: _Cell, line: Mapping[str, Any], place: int) -> Iterator[Result]:
    shares = [(part["share"], part) for part in line.get("interpolated") or () if part["share"] not in (0, 1)]
    update = line.get("relative_update")
    for share, part in ((1, line), *shares):
        yield Result(
            protocol=cell.protocol,
            data=cell.data,
            method=cell.name if part is line else part_of(cell.name, share),
            learning_rate=cell.learning_rate,
            shots=cell.shots,
            seed=cell.seed,
            new=part["new"],
            kept=part["kept"],
            zero_shot_new=line["zero_shot_new"],
            zero_shot_kept=line["zero_shot_kept"],
            tasks={task: (before, after) for task, (before, after) in _tasks(line, part).items()},
            relative_update=None if update is None else share * update,
            val=part.get("val"),
            variant=Variant(line["method"], line.get("options"), share),
            place=place,
        )


def _tasks(line: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    return part["tasks"] if "tasks" in line else {"letters": (line["zero_shot_kept"], part["kept"])}
