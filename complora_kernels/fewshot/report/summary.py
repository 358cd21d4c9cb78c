"""Means and standard deviations over seeds and data sets, and the comparisons, out of results.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from complora_kernels.fewshot.report.comparisons import Comparison, compare, harmonic
from complora_kernels.fewshot.report.labels import in_order, plain_lora, rivals
from complora_kernels.fewshot.report.results import Result, read_results

Row = tuple[str, float | None]  # method and learning rate
Runs = dict[str, dict[int, Result]]  # by data set and seed


class Spread(NamedTuple):
    """Mean and sample standard deviation; the deviation of a single value is NaN."""

    mean: float
    sd: float


class Cell(NamedTuple):
    """New-task and retained accuracy over the seeds; `kept` is None where nothing is kept."""

    new: Spread
    kept: Spread | None

    @property
    def means(self) -> tuple[float, float, float]:
        """New, kept and H; NaN where nothing is kept."""
        return self.new.mean, self.kept.mean if self.kept else float("nan"), self.h

    @property
    def h(self) -> float:
        """The harmonic mean of both means."""
        return harmonic(self.new.mean, self.kept.mean) if self.kept else float("nan")


class Summary:
    """The results of one protocol, finished or not, on one data set or averaged over several.

    An average over data sets is the mean of their means over seeds, and its deviation that of the seeds' averages. Only
    data sets count in which every method and learning rate has a result, at the same number of shots.

    Args:
        results: those of one protocol, at least one.

    Attributes:
        protocol: how they were measured.
        data_sets: what was trained on, as they come in the results.
        by_data: a summary of each data set.
        methods: in the order of `labels.in_order`.
        learning_rates, shots, seeds: in ascending order.
        rows: methods with each of their learning rates.
        complete: by shots, the data sets that averages are over.
        cells: by method, learning rate and shots; those that have no result are missing.
        zero_shot: the pretrained model, by shots, because the test set may be what the shots leave.
        relative_updates: mean |ΔW| / |W| by row; those that adapt nothing are missing.
        tasks: the tasks that are kept.
    """

    def __init__(self, results: Sequence[Result]):
        self.results = results
        self.protocol = results[0].protocol
        self.data_sets = list(dict.fromkeys(result.data for result in results))
        self.by_data = {
            data: self if len(self.data_sets) == 1 else Summary([r for r in results if r.data == data])
            for data in self.data_sets
        }
        self.methods = in_order(result.method for result in results)
        self.learning_rates: list[float] = sorted({r.learning_rate for r in results if r.learning_rate is not None})
        self.shots = sorted({result.shots for result in results})
        self.seeds = sorted({result.seed for result in results})
        self.tasks = list(dict.fromkeys(task for result in results for task in result.tasks))

        runs: dict[tuple[str, float | None, int], Runs] = {}
        of_shots: dict[int, Runs] = {}
        updates: dict[Row, list[float]] = {}
        for r in results:
            for place in (runs.setdefault((r.method, r.learning_rate, r.shots), {}), of_shots.setdefault(r.shots, {})):
                place.setdefault(r.data, {})[r.seed] = r
            if r.relative_update is not None:
                updates.setdefault((r.method, r.learning_rate), []).append(r.relative_update)
        rows = {(method, rate) for method, rate, _ in runs}
        self._runs = runs
        self.rows = [(m, rate) for m in self.methods for rate in (*self.learning_rates, None) if (m, rate) in rows]
        self.relative_updates = {row: float(np.mean(values)) for row, values in updates.items()}
        self.complete = {
            shots: [data for data in self.data_sets if all(data in by for key, by in runs.items() if key[2] == shots)]
            for shots in self.shots
        }
        self.cells = {key: cell for key, by in runs.items() if (cell := _cell(by, self.complete[key[2]]))}
        self.zero_shot = {n: cell for n in self.shots if (cell := _cell(of_shots[n], self.complete[n], "zero_shot_"))}

    @property
    def measures(self) -> tuple[str, ...]:
        """What there is to compare: "new", "kept" where anything is kept, "H" of base and new classes."""
        if all(result.kept is None for result in self.results):
            return ("new",)
        return ("new", "kept", "H") if self.protocol == "base-to-new" else ("new", "kept")

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Of the methods that are compared with one another, over all data sets."""
        plain = plain_lora({result.method: result.kind for result in self.results})
        return [compare(self.results, *pair, self.measures) for pair in rivals(self.methods, plain)]

    def runs(self, row: Row, shots: int) -> list[Result]:
        """The results of a method at a learning rate and a number of shots."""
        return [r for by_seed in self._runs.get((*row, shots), {}).values() for r in by_seed.values()]

    def changes(self, row: Row, shots: int) -> dict[str, tuple[float, float]]:
        """Of each task that is kept: its accuracy before, and the mean change over data sets of means over seeds."""
        by_task: dict[str, list[tuple[float, float]]] = {}
        for data in self.complete[shots]:
            results = self._runs.get((*row, shots), {}).get(data, {}).values()
            for task in dict.fromkeys(task for result in results for task in result.tasks):
                pairs = [result.tasks[task] for result in results if task in result.tasks]
                before, after = np.mean(pairs, axis=0)
                by_task.setdefault(task, []).append((float(before), float(after - before)))
        means = {task: np.mean(pairs, axis=0) for task, pairs in by_task.items()}
        return {task: (float(means[task][0]), float(means[task][1])) for task in self.tasks if task in means}

    def gaps(self) -> dict[str, dict[str, list[int]]]:
        """Data sets in which something is missing, and at which shots: methods ("methods"), or only seeds ("seeds")."""
        found: dict[str, dict[str, list[int]]] = {"methods": {}, "seeds": {}}
        for data in self.data_sets:
            for shots in self.shots:
                seeds = {tuple(sorted(by.get(data, ()))) for key, by in self._runs.items() if key[2] == shots}
                if len(seeds) > 1 or () in seeds:
                    kind = "methods" if () in seeds else "seeds"
                    found[kind].setdefault(data, []).append(shots)
        return found


def summaries(lines: Iterable[Mapping[str, Any]]) -> list[Summary]:
    """A summary of each protocol in the lines of results.jsonl."""
    by_protocol: dict[str, list[Result]] = {}
    for result in read_results(lines):
        by_protocol.setdefault(result.protocol, []).append(result)
    return [Summary(results) for results in by_protocol.values()]


def _cell(runs: Runs, data_sets: Iterable[str], prefix: str = "") -> Cell | None:
    chosen = [runs[data] for data in data_sets]
    new, kept = (
        _spread([{seed: getattr(result, prefix + name) for seed, result in by_seed.items()} for by_seed in chosen])
        for name in ("new", "kept")
    )
    return Cell(new, kept) if new else None


def _spread(by_data: Iterable[Mapping[int, Any]]) -> Spread | None:
    """Over data sets and seeds; data sets in which a value is None do not count."""
    measured = [by_seed for by_seed in by_data if None not in by_seed.values()]
    if not measured:
        return None
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in measured)))
    averages = [np.mean([by_seed[seed] for by_seed in measured]) for seed in seeds]
    mean = float(np.mean([np.mean(list(by_seed.values())) for by_seed in measured]))
    return Spread(mean, float(np.std(averages, ddof=1)) if len(seeds) > 1 else float("nan"))
