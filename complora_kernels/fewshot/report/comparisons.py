"""Comparisons of methods with their baselines on the same few-shot splits, paired by data set and seed."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from complora_kernels.fewshot.report.front import Paired, paired, retention_difference
from complora_kernels.fewshot.report.labels import LORA, Label, Variant, family_name, label_of, plain_lora
from complora_kernels.fewshot.report.results import Result

Split = tuple[str, int, int]  # data set, shots, seed
Cell = TypeVar("Cell", bound=Hashable)
Value = TypeVar("Value")

# Options that two compared methods need not share: those of the measurement, and those that one method reads
_BESIDE = ("data", "interpolations", "validation", "strong_weight_decay", "loraplus_lr_ratio")
_SUBSPACE = ("subspace_k", "subspace_energy", "subspace_ratio")  # options that LoRA does not read


class Gain(NamedTuple):
    """A difference over seeds, where each seed's difference is its mean over data sets."""

    over_seeds: Paired
    better: int  # number of data sets with a gain in the mean over seeds
    data_sets: int  # number of data sets


class Comparison(NamedTuple):
    """The differences of a method from a baseline."""

    method: str
    baseline: str
    shots: list[int]  # numbers of shots that both have
    by_shots: dict[int, Gain]  # retained accuracy at equal new-task accuracy
    overall: Gain | None  # the same, of each seed's mean over all numbers of shots; None: no seed has all of them
    at_rate: dict[tuple[float, int | None], dict[str, Gain]]  # by learning rate and shots (None: all), then by measure


def comparison_pairs(variants: Mapping[str, Variant]) -> list[tuple[str, str]]:
    """The pairs of a method and its baseline.

    Every method is compared with plain LoRA and with LoRA in the same setting, and every protected subspace with the
    random subspace of the same side and setting, the control that tells whether its directions matter. Activations that
    protect a share of energy have no control, because the share is another number of directions there.

    Where names do not tell which method has the same setting, it is the only method of its kind with the same options,
    if there is exactly one.
    """
    plain = plain_lora(variants)
    labels = {method: label_of(method, variant) for method, variant in variants.items()}
    named = {label: method for method, label in reversed(labels.items())}
    pairs = [(method, plain) for method in variants]
    for method, label in labels.items():
        alike = named.get(Label(LORA, "", label.setting)) if label.setting else None
        if variants[method].kind != LORA:
            alike = alike or _same_options(method, LORA, _SUBSPACE, variants)
        pairs.append((method, alike))
    for method, label in labels.items():
        if label.source in ("weight", "ends", "activations") and not _has_its_own_energy(label, variants[method]):
            control = label._replace(source="random")
            pairs.append((method, named.get(control) or _same_options(method, family_name(control), (), variants)))
    return [
        (method, baseline) for method, baseline in dict.fromkeys(pairs) if baseline is not None and baseline != method
    ]


def harmonic(new: float, kept: float) -> float:
    """The harmonic mean of two accuracies: H of base and new classes."""
    return 2 * new * kept / (new + kept) if new + kept else 0.0


def compare(results: Sequence[Result], method: str, baseline: str, measures: Iterable[str]) -> Comparison:
    """Compare two methods at equal new-task accuracy and at equal learning rate.

    A method without learning rates is compared with its baseline at each of the baseline's.

    Args:
        results: the results of these and of other methods.
        method: the method.
        baseline: the method it is compared with.
        measures: the accuracies to compare at equal learning rate: "new", "kept" or "H".
    """
    ours, theirs = _by_split(results, method), _by_split(results, baseline)
    common = sorted(ours.keys() & theirs.keys())
    shots = sorted({shots for _, shots, _ in common})
    fronts = [_front_differences(ours, theirs, [split for split in common if split[1] == n]) for n in shots]
    at_rate: dict[tuple[float, int | None], dict[str, Gain]] = {}
    for rate in sorted({rate for split in common for rate in (*ours[split], *theirs[split]) if rate is not None}):
        pairs = {split: (_at(ours[split], rate), _at(theirs[split], rate)) for split in common}
        for n in (*shots, None):
            chosen = {split: (a, b) for split, (a, b) in pairs.items() if a and b and n in (split[1], None)}
            gains = {measure: _gain_at_rate(chosen, measure) for measure in measures}
            if found := {measure: gain for measure, gain in gains.items() if gain}:
                at_rate[rate, n] = found
    by_shots = {n: gain for n, front in zip(shots, fronts, strict=True) if (gain := _mean_gain([front]))}
    return Comparison(method, baseline, shots, by_shots, _mean_gain(fronts), at_rate)


def whole_block(values: Mapping[tuple[Cell, int], Value]) -> dict[tuple[Cell, int], Value]:
    """Select a block of cells and seeds in which no value is missing.

    The candidates, of which the largest is chosen, are the cells of each seed, and the cells that the n fullest seeds
    have in common. In an unfinished sweep this drops a seed that has just begun, in a finished one a data set that one
    seed lacks.
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


def _by_split(results: Sequence[Result], method: str) -> dict[Split, dict[float | None, Result]]:
    found: dict[Split, dict[float | None, Result]] = {}
    for result in results:
        if result.method == method:
            found.setdefault((result.data, result.shots, result.seed), {})[result.learning_rate] = result
    return found


def _at(by_rate: Mapping[float | None, Result], rate: float) -> Result | None:
    return by_rate.get(rate, by_rate.get(None))


def _front_differences(
    ours: Mapping[Split, Mapping[float | None, Result]],
    theirs: Mapping[Split, Mapping[float | None, Result]],
    splits: Sequence[Split],
) -> dict[tuple[str, int], float]:
    differences = {}
    for data, shots, seed in splits:
        fronts = (list(by_split[data, shots, seed].values()) for by_split in (ours, theirs))
        if (difference := retention_difference(*fronts)) is not None:
            differences[data, seed] = difference
    return whole_block(differences)


def _mean_gain(fronts: Sequence[Mapping[tuple[str, int], float]]) -> Gain | None:
    """The mean gain over the seeds that all fronts have; None where there is no such seed."""
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


def _gain_at_rate(pairs: Mapping[Split, tuple[Result, Result]], measure: str) -> Gain | None:
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
    if measure == "H":  # H of the averages, which differs from the average of H
        ours, theirs = (np.mean([(r.new, r.kept) for r in results], axis=0) for results in zip(*pairs, strict=True))
        return harmonic(*map(float, ours)) - harmonic(*map(float, theirs))
    return float(np.mean([getattr(ours, measure) - getattr(theirs, measure) for ours, theirs in pairs]))


def _positive(differences: Iterable[float | np.floating]) -> int:
    return sum(bool(difference > 0) for difference in differences)


def _has_its_own_energy(label: Label, variant: Variant) -> bool:
    """Whether an energy determines another number of protected directions than it does of the weight's own."""
    by_energy = "energy" in label.setting or (variant.options or {}).get("subspace_energy") is not None
    return label.source in ("activations", "ends") and by_energy


def _same_options(method: str, kind: str, unread: Collection[str], variants: Mapping[str, Variant]) -> str | None:
    """The only method of a kind with the same share and options, except the unread ones; None if not exactly one."""

    def setting(variant: Variant) -> object:
        options = variant.options or {}
        return variant.share, {name: options[name] for name in options if name not in (*_BESIDE, *unread)}

    wanted = variants[method]
    known = {name: of for name, of in variants.items() if of.options is not None and of.kind == kind}
    found = [name for name, of in known.items() if name != method and setting(of) == setting(wanted)]
    return found[0] if wanted.options is not None and len(found) == 1 else None
