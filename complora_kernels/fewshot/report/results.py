"""The lines of results.jsonl, as the report reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from complora_kernels.fewshot.report.labels import part_of


@dataclass(frozen=True)
class Result:
    """What one adapted model has learned and kept."""

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
    kind: str = ""  # what the method is called in the vocabulary, where its name is another
    val: float | None = None  # accuracy on validation images of the new task


def read_results(lines: Iterable[Mapping[str, Any]]) -> list[Result]:
    """A result for every line and for every share of its update that was measured: the last one where one is repeated.

    A line without a protocol is of the handwritten digits, of which alone there were results before there were more.
    """
    results = {}
    for line in lines:
        for result in _results(line):
            key = (result.protocol, result.data, result.method, result.learning_rate, result.shots, result.seed)
            results[key] = result
    return list(results.values())


def _results(line: Mapping[str, Any]) -> Iterator[Result]:
    shares = [(part["share"], part) for part in line.get("interpolated") or () if part["share"] not in (0, 1)]
    update, name = line.get("relative_update"), line.get("label", line["method"])
    for share, part in ((1, line), *shares):
        yield Result(
            protocol=line.get("protocol", "few-shot"),
            data=line.get("data", "digits"),
            method=name if part is line else part_of(name, share),
            learning_rate=line["learning_rate"],
            shots=line["shots"],
            seed=line["seed"],
            new=part["new"],
            kept=part["kept"],
            zero_shot_new=line["zero_shot_new"],
            zero_shot_kept=line["zero_shot_kept"],
            tasks={task: (before, after) for task, (before, after) in _tasks(line, part).items()},
            relative_update=None if update is None else share * update,
            kind=line["method"] if part is line else "",
            val=part.get("val"),
        )


def _tasks(line: Mapping[str, Any], part: Mapping[str, Any]) -> Mapping[str, Any]:
    return part["tasks"] if "tasks" in line else {"letters": (line["zero_shot_kept"], part["kept"])}
