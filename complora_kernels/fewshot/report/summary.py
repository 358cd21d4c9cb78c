"""Computes means and standard deviations over seeds and data sets, and the comparisons, from results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from complora_kernels.fewshot.datasets import DOMAIN_SHIFTS, ELEVEN
from complora_kernels.fewshot.report.comparisons import Comparison, compare, comparison_pairs, harmonic
from complora_kernels.fewshot.report.labels import Variant, label_of, plain_lora, stand_ins
from complora_kernels.fewshot.report.results import Result, read_results

Row = tuple[str, float | None]  # method and learning rate
Runs = dict[str, dict[int, Result]]  # results by data set and seed


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

    An average over data sets is the mean of their means over seeds, and its deviation is that of the seeds' averages.
    Only data sets count in which every method and learning rate has a result at the same number of shots.

    Args:
        results: the results of one protocol, at least one, in the order of `read_results`.

    Attributes:
        protocol: the protocol of the measurements.
        data_sets: the data sets that were trained on, in the order of the results.
        by_data: a summary of each data set.
        methods: the methods, in the order of the results' places.
        variants: the variant of each method.
        labels: the parts of each method's name.
        plain: the name of plain LoRA, if there is one.
        stand_ins: the names in METHODS of methods that have another name.
        learning_rates, shots, seeds: the values in ascending order.
        rows: the methods with each of their learning rates.
        complete: the data sets that averages are over, by shots.
        cells: the accuracies by method, learning rate and shots; cells without a result are missing.
        zero_shot: the accuracies of the pretrained model, by shots, because the test set may depend on the shots.
        seed_counts: the fewest and the most seeds of a cell, or of a data set that it averages.
        relative_updates: mean |ΔW| / |W| by row; rows that adapt nothing are missing.
        tasks: the retained tasks: the known data sets in their order, then others in the order of the results.
    """

    def __init__(self, results: Sequence[Result]):
        self.results = results
        self.protocol = results[0].protocol
        self.data_sets = list(dict.fromkeys(result.data for result in results))
        self.by_data = {
            data: self if len(self.data_sets) == 1 else Summary([r for r in results if r.data == data])
            for data in self.data_sets
        }
        self.variants = _variants(results)
        self.methods = list(self.variants)
        self.labels = {method: label_of(method, variant) for method, variant in self.variants.items()}
        self.plain = plain_lora(self.variants)
        self.stand_ins = stand_ins(self.variants)
        self.learning_rates: list[float] = sorted({r.learning_rate for r in results if r.learning_rate is not None})
        self.shots = sorted({result.shots for result in results})
        self.seeds = sorted({result.seed for result in results})
        self.tasks = _tasks(results)

        runs: dict[tuple[str, float | None, int], Runs] = {}
        of_shots: dict[int, Runs] = {}
        for r in results:
            for place in (runs.setdefault((r.method, r.learning_rate, r.shots), {}), of_shots.setdefault(r.shots, {})):
                place.setdefault(r.data, {})[r.seed] = r
        rows = {(method, rate) for method, rate, _ in runs}
        self._runs = runs
        self.rows = [(m, rate) for m in self.methods for rate in (*self.learning_rates, None) if (m, rate) in rows]
        self.complete = {
            shots: [data for data in self.data_sets if all(data in by for key, by in runs.items() if key[2] == shots)]
            for shots in self.shots
        }
        self.cells = {key: cell for key, by in runs.items() if (cell := _cell(by, self.complete[key[2]]))}
        self.zero_shot = {n: cell for n in self.shots if (cell := _cell(of_shots[n], self.complete[n], "zero_shot_"))}
        self.seed_counts = self._seed_counts([(n, by) for (_, _, n), by in runs.items()] + list(of_shots.items()))
        updates = {row: self._relative_update(row) for row in self.rows}
        self.relative_updates = {row: update for row, update in updates.items() if update is not None}

    @property
    def measures(self) -> tuple[str, ...]:
        """The measured accuracies: "new", "kept" where there are retained tasks, "H" for base and new classes."""
        if all(result.kept is None for result in self.results):
            return ("new",)
        return ("new", "kept", "H") if self.protocol == "base-to-new" else ("new", "kept")

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """The comparisons of methods with their baselines, over all data sets."""
        return [compare(self.results, *pair, self.measures) for pair in comparison_pairs(self.variants)]

    def runs(self, row: Row, shots: int) -> list[Result]:
        """The results of a method at a learning rate and a number of shots."""
        return [r for by_seed in self._runs.get((*row, shots), {}).values() for r in by_seed.values()]

    def changes(self, row: Row, shots: int) -> dict[str, tuple[float, float]]:
        """For each retained task, its accuracy before and its mean change, over data sets of means over seeds."""
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
        """The data sets, and their shots, in which methods have no result ("methods") or fewer seeds ("seeds")."""
        found: dict[str, dict[str, list[int]]] = {"methods": {}, "seeds": {}}
        for data in self.data_sets:
            for shots in self.shots:
                seeds = {tuple(sorted(by.get(data, ()))) for key, by in self._runs.items() if key[2] == shots}
                if len(seeds) > 1 or () in seeds:
                    kind = "methods" if () in seeds else "seeds"
                    found[kind].setdefault(data, []).append(shots)
        return found

    def _seed_counts(self, runs: list[tuple[int, Runs]]) -> tuple[int, int]:
        counts = {len(by[data]) for shots, by in runs for data in self.complete[shots]}
        counts = counts or {len(by_seed) for _, by in runs for by_seed in by.values()}
        return min(counts), max(counts)

    def _relative_update(self, row: Row) -> float | None:
        """The mean over shots and over the averages' data sets of the means over seeds."""
        means = []
        for shots, data_sets in self.complete.items():
            for data in data_sets:
                results = self._runs.get((*row, shots), {}).get(data, {}).values()
                values = [result.relative_update for result in results if result.relative_update is not None]
                means += [np.mean(values)] if values else []
        return float(np.mean(means)) if means else None


def summaries(lines: Iterable[Mapping[str, Any]], variants: Iterable[str] = ()) -> list[Summary]:
    """Summarise each protocol in the lines of results.jsonl, in the order of a sweep's variants (`read_results`)."""
    by_protocol: dict[str, list[Result]] = {}
    for result in read_results(lines, variants):
        by_protocol.setdefault(result.protocol, []).append(result)
    return [Summary(results) for results in by_protocol.values()]


def _tasks(results: Iterable[Result]) -> list[str]:
    found = dict.fromkeys(task for result in results for task in result.tasks)
    known = [task for task in (*ELEVEN, *DOMAIN_SHIFTS) if task in found]
    return [*known, *(task for task in found if task not in known)]


def _variants(results: Sequence[Result]) -> dict[str, Variant]:
    """The variant of each method, in the order of tables; results that tell a method's options take precedence."""
    variants: dict[str, Variant] = {}
    for result in sorted(results, key=lambda result: result.place):
        if result.method not in variants or variants[result.method].options is None:
            variants[result.method] = result.variant
    return variants


def _cell(runs: Runs, data_sets: Iterable[str], prefix: str = "") -> Cell | None:
    chosen = [runs[data] for data in data_sets]
    new, kept = (
        _spread([{seed: getattr(result, prefix + name) for seed, result in by_seed.items()} for by_seed in chosen])
        for name in ("new", "kept")
    )
    return Cell(new, kept) if new else None


def _spread(by_data: Iterable[Mapping[int, Any]]) -> Spread | None:
    """The spread over data sets and seeds; data sets in which a value is None do not count."""
    measured = [by_seed for by_seed in by_data if None not in by_seed.values()]
    if not measured:
        return None
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in measured)))
    averages = [np.mean([by_seed[seed] for by_seed in measured]) for seed in seeds]
    mean = float(np.mean([np.mean(list(by_seed.values())) for by_seed in measured]))
    return Spread(mean, float(np.std(averages, ddof=1)) if len(seeds) > 1 else float("nan"))
