"""Means and standard deviations over seeds, and the comparisons at equal new-task accuracy, out of results.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from complora_kernels.fewshot.config import METHODS
from complora_kernels.fewshot.front import Paired, paired, retention_differences

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
    """How much more `method` keeps than `rival` at equal new-task accuracy."""

    method: str
    rival: str
    by_shots: dict[int, Paired]
    overall: Paired | None  # of each seed's mean over the numbers of shots; None without a seed that has them all


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
        comparisons: at equal new-task accuracy, where two learning rates or more draw a front.
    """

    def __init__(self, results: Sequence[Mapping[str, Any]]):
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
            comparison
            for method, rival in _COMPARISONS
            if {method, rival} <= set(self.methods) and (comparison := _compare(results, method, rival, self.shots))
        ]


def _spread(runs: Iterable[Mapping[str, Any]], name: str) -> Spread:
    values = [run[name] for run in runs]
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan"))


def _compare(results: Sequence[Mapping[str, Any]], method: str, rival: str, shots: list[int]) -> Comparison | None:
    differences = {n: retention_differences(results, method, rival, n) for n in shots}
    by_shots = {n: paired(list(by_seed.values())) for n, by_seed in differences.items() if by_seed}
    if not by_shots:
        return None
    complete = set.intersection(*(set(by_seed) for by_seed in differences.values()))
    means = [float(np.mean([by_seed[seed] for by_seed in differences.values()])) for seed in sorted(complete)]
    return Comparison(method, rival, by_shots, paired(means) if means else None)
