"""Means and standard deviations over seeds, and the comparisons at equal new-task accuracy, out of results.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from complora_kernels.fewshot.config import METHODS
from complora_kernels.fewshot.front import Paired, Results, differences_at_rate, paired, retention_differences

# Who is compared with whom: every side with plain LoRA, and with the random subspaces that control for it.
_COMPARISONS = (
    ("output", "lora"),
    ("input", "lora"),
    ("both", "lora"),
    ("random", "lora"),
    ("random-both", "lora"),
    ("output", "random"),
    ("both", "random-both"),
)


class Spread(NamedTuple):
    """Mean and sample standard deviation; the deviation of a single value is NaN."""

    mean: float
    sd: float


class Cell(NamedTuple):
    """New-task and retained accuracy over the seeds."""

    new: Spread
    kept: Spread


class Comparison(NamedTuple):
    """How `method` differs from `rival`, paired by seed."""

    method: str
    rival: str
    by_shots: dict[int, Paired]  # in what is kept at equal new-task accuracy
    overall: Paired | None  # of each seed's mean over the numbers of shots; None without a seed that has them all
    by_rate: dict[float, tuple[Paired, Paired]]  # in new-task and in retained accuracy at equal learning rate


class Summary:
    """The results of a grid, finished or not.

    Args:
        results: the lines of results.jsonl, at least one.

    Attributes:
        methods: those that the results hold, in the order of `METHODS`; so for the next three, in ascending order.
        learning_rates: peak learning rates.
        shots: numbers of images per class.
        seeds: the seeds.
        cells: by method, learning rate and shots; those that have no result are missing.
        zero_shot: the pretrained model, by shots, because the test set is what the shots leave.
        relative_updates: mean |ΔW| / |W|, by method and learning rate.
        comparisons: those of `_COMPARISONS` whose two methods are there.
    """

    def __init__(self, results: Results):
        self.methods = [method for method in METHODS if any(r["method"] == method for r in results)]
        self.learning_rates: list[float] = sorted({r["learning_rate"] for r in results})
        self.shots: list[int] = sorted({r["shots"] for r in results})
        self.seeds: list[int] = sorted({r["seed"] for r in results})

        def where(**values: Any) -> list[Mapping[str, Any]]:
            return [r for r in results if all(r[name] == value for name, value in values.items())]

        self.cells: dict[tuple[str, float, int], Cell] = {}
        self.relative_updates: dict[tuple[str, float], float] = {}
        for method in self.methods:
            for rate in self.learning_rates:
                for shots in self.shots:
                    if runs := where(method=method, learning_rate=rate, shots=shots):
                        self.cells[method, rate, shots] = Cell(_spread(runs, "new"), _spread(runs, "kept"))
                if runs := where(method=method, learning_rate=rate):
                    self.relative_updates[method, rate] = _spread(runs, "relative_update").mean
        self.zero_shot: dict[int, Cell] = {}
        for shots in self.shots:
            runs = list({r["seed"]: r for r in where(shots=shots)}.values())
            self.zero_shot[shots] = Cell(_spread(runs, "zero_shot_new"), _spread(runs, "zero_shot_kept"))
        self.comparisons = [
            _compare(results, method, rival, self.shots, self.learning_rates)
            for method, rival in _COMPARISONS
            if {method, rival} <= set(self.methods)
        ]


def _spread(runs: Iterable[Mapping[str, Any]], name: str) -> Spread:
    values = [run[name] for run in runs]
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"))


def _compare(results: Results, method: str, rival: str, shots: list[int], rates: list[float]) -> Comparison:
    by_seed = {n: retention_differences(results, method, rival, n) for n in shots}
    complete = sorted(set.intersection(*(set(differences) for differences in by_seed.values())))
    means = [float(np.mean([by_seed[n][seed] for n in shots])) for seed in complete]
    at_rate = {
        rate: [differences_at_rate(results, method, rival, rate, name) for name in ("new", "kept")] for rate in rates
    }
    return Comparison(
        method,
        rival,
        {n: paired(list(differences.values())) for n, differences in by_seed.items() if differences},
        paired(means) if means else None,
        {rate: (paired(new), paired(kept)) for rate, (new, kept) in at_rate.items() if new},
    )
