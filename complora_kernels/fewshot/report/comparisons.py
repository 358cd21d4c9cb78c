"""How one method differs from another on the same draws of training images: paired by data set and seed."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from complora_kernels.fewshot.report.front import Paired, paired, retention_difference
from complora_kernels.fewshot.report.results import Result

Draw = tuple[str, int, int]  # data set, shots, seed
Cell = TypeVar("Cell", bound=Hashable)
Value = TypeVar("Value")


class Gain(NamedTuple):
    """A difference over seeds; that of a seed is the mean over data sets."""

    over_seeds: Paired
    better: int  # data sets with a gain, averaged over seeds
    data_sets: int


class Comparison(NamedTuple):
    """How `method` differs from `rival`."""

    method: str
    rival: str
    shots: list[int]  # that both have
    by_shots: dict[int, Gain]  # in what is kept at equal new-task accuracy
    overall: Gain | None  # of each seed's mean over the numbers of shots; None without a seed that has them all
    at_rate: dict[tuple[float, int | None], dict[str, Gain]]  # by learning rate and shots (None: all), by measure


def harmonic(new: float, kept: float) -> float:
    """The harmonic mean of two accuracies: H of base and new classes."""
    return 2 * new * kept / (new + kept) if new + kept else 0.0


def compare(results: Sequence[Result], method: str, rival: str, measures: Iterable[str]) -> Comparison:
    """Compare two methods at equal new-task accuracy and at equal learning rate.

    A method without learning rates is compared with its rival at each of the rival's.

    Args:
        results: of these methods and others.
        method: the one whose gains are looked for.
        rival: the other one.
        measures: what is compared at equal learning rate: "new", "kept" or "H".
    """
    ours, theirs = _by_draw(results, method), _by_draw(results, rival)
    common = sorted(ours.keys() & theirs.keys())
    shots = sorted({shots for _, shots, _ in common})
    fronts = [_front_differences(ours, theirs, [draw for draw in common if draw[1] == n]) for n in shots]
    at_rate: dict[tuple[float, int | None], dict[str, Gain]] = {}
    for rate in sorted({rate for draw in common for rate in (*ours[draw], *theirs[draw]) if rate is not None}):
        pairs = {draw: (_at(ours[draw], rate), _at(theirs[draw], rate)) for draw in common}
        for n in (*shots, None):
            chosen = {draw: (a, b) for draw, (a, b) in pairs.items() if a and b and n in (draw[1], None)}
            gains = {measure: _gain_at_rate(chosen, measure) for measure in measures}
            if found := {measure: gain for measure, gain in gains.items() if gain}:
                at_rate[rate, n] = found
    by_shots = {n: gain for n, front in zip(shots, fronts, strict=True) if (gain := _mean_gain([front]))}
    return Comparison(method, rival, shots, by_shots, _mean_gain(fronts), at_rate)


def whole_block(values: Mapping[tuple[Cell, int], Value]) -> dict[tuple[Cell, int], Value]:
    """Of values by cell and seed, a block of cells and seeds in which none is missing, the largest of a few.

    These have the cells of one seed, or those that remain as seeds are added from the one with the most cells on: in an
    unfinished sweep a seed that has just begun goes, in a finished one a data set that one seed lacks.
    """
    cells: dict[int, set[Cell]] = {}
    for cell, seed in values:
        cells.setdefault(seed, set()).add(cell)
    fullest = sorted(cells, key=lambda seed: (-len(cells[seed]), seed))
    remaining = [set.intersection(*(cells[seed] for seed in fullest[: n + 1])) for n in range(len(fullest))]
    blocks = [({s for s in fullest if of <= cells[s]}, of) for of in (*remaining, *(cells[seed] for seed in fullest))]
    seeds, common = max(
        blocks, key=lambda block: (len(block[0]) * len(block[1]), len(block[0])), default=(set(), set())
    )
    return {(cell, seed): value for (cell, seed), value in values.items() if cell in common and seed in seeds}


def _by_draw(results: Sequence[Result], method: str) -> dict[Draw, dict[float | None, Result]]:
    found: dict[Draw, dict[float | None, Result]] = {}
    for result in results:
        if result.method == method:
            found.setdefault((result.data, result.shots, result.seed), {})[result.learning_rate] = result
    return found


def _at(by_rate: Mapping[float | None, Result], rate: float) -> Result | None:
    return by_rate.get(rate, by_rate.get(None))


def _front_differences(
    ours: Mapping[Draw, Mapping[float | None, Result]],
    theirs: Mapping[Draw, Mapping[float | None, Result]],
    draws: Sequence[Draw],
) -> dict[tuple[str, int], float]:
    differences = {}
    for data, shots, seed in draws:
        fronts = (list(by_draw[data, shots, seed].values()) for by_draw in (ours, theirs))
        if (difference := retention_difference(*fronts)) is not None:
            differences[data, seed] = difference
    return whole_block(differences)


def _mean_gain(fronts: Sequence[Mapping[tuple[str, int], float]]) -> Gain | None:
    """Over the seeds that all fronts have; None without any."""
    seeds_of = [{seed for _, seed in front} for front in fronts]
    seeds = sorted(set.intersection(*seeds_of)) if seeds_of else []
    if not seeds:
        return None
    by_seed = {seed: [[d for (_, of), d in front.items() if of == seed] for front in fronts] for seed in seeds}
    by_data: dict[str, list[float]] = {}
    for front in fronts:
        for (data, seed), difference in front.items():
            if seed in by_seed:
                by_data.setdefault(data, []).append(difference)
    means = [float(np.mean([np.mean(differences) for differences in by_seed[seed]])) for seed in seeds]
    return Gain(paired(means), _positive(np.mean(differences) for differences in by_data.values()), len(by_data))


def _gain_at_rate(pairs: Mapping[Draw, tuple[Result, Result]], measure: str) -> Gain | None:
    measured = {
        ((data, shots), seed): pair
        for (data, shots, seed), pair in pairs.items()
        if measure == "new" or all(result.kept is not None for result in pair)
    }
    by_seed: dict[int, list[tuple[Result, Result]]] = {}
    by_data: dict[str, list[tuple[Result, Result]]] = {}
    for ((data, _), seed), pair in whole_block(measured).items():
        by_seed.setdefault(seed, []).append(pair)
        by_data.setdefault(data, []).append(pair)
    if not by_seed:
        return None
    over_seeds = paired([_difference(pairs, measure) for pairs in by_seed.values()])
    return Gain(over_seeds, _positive(_difference(pairs, measure) for pairs in by_data.values()), len(by_data))


def _difference(pairs: Sequence[tuple[Result, Result]], measure: str) -> float:
    if measure == "H":  # of the averages, never an average of Hs
        ours, theirs = (np.mean([(r.new, r.kept) for r in results], axis=0) for results in zip(*pairs, strict=True))
        return harmonic(*map(float, ours)) - harmonic(*map(float, theirs))
    return float(np.mean([getattr(ours, measure) - getattr(theirs, measure) for ours, theirs in pairs]))


def _positive(differences: Iterable[float | np.floating]) -> int:
    return sum(bool(difference > 0) for difference in differences)
