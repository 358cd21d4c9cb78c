"""Words for the accuracies of a protocol, for gaps in the results, and for comparisons."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

from complora_kernels.fewshot.report.comparisons import Comparison, Gain
from complora_kernels.fewshot.report.summary import Cell, Row, Spread, Summary

_MOST_NAMES = 4  # the most methods that a sentence names


class Words(NamedTuple):
    """The names of both accuracies in a protocol."""

    new: str = "new task"
    kept: str = "retained"
    short: str = "new"  # the short form of `new`, for the names of rows
    equal: str = "new-task accuracy"  # the accuracy at which fronts are compared
    keeps: str = "keeps {} {}"  # filled with a difference and the baseline
    kept_accuracy: str = "retained accuracy"
    more: str = "Points more kept"


def _elsewhere(kept: str) -> dict[str, str]:
    return {
        "kept": kept,
        "keeps": f"reaches {{}} {{}} on the {kept}",
        "kept_accuracy": f"accuracy on the {kept}",
        "more": f"Points gained on the {kept}",
    }


_WORDS = {
    "base-to-new": Words("base classes", short="base", equal="base-class accuracy", **_elsewhere("new classes")),
    "transfer": Words(**_elsewhere("other data sets")),
    "domain-shift": Words(**_elsewhere("shifted data sets")),
}


def words(protocol: str) -> Words:
    """The names that suit a protocol."""
    return _WORDS.get(protocol, Words())


def new_name(summary: Summary) -> str:
    """The name of the learned task, such as "new task (digits)"."""
    return words(summary.protocol).new + _data_set(summary)


def kept_name(summary: Summary) -> str:
    """The name of the retained tasks, such as "retained (letters)"."""
    return words(summary.protocol).kept + _tasks(summary)


def axis_names(summary: Summary) -> tuple[str, str]:
    """The labels of both axes, such as "new-task accuracy (digits), %" and "retained accuracy (letters), %"."""
    names = words(summary.protocol)
    return f"{names.equal}{_data_set(summary)}, %", f"{names.kept_accuracy}{_tasks(summary)}, %"


def _data_set(summary: Summary) -> str:
    return f" ({summary.data_sets[0]})" if len(summary.data_sets) == 1 else ""


def _tasks(summary: Summary) -> str:
    """The retained tasks in brackets: their names, or the number of tasks in each run's mean."""
    kept = [result for result in summary.results if result.tasks]
    if set(summary.tasks) <= {words(summary.protocol).kept}:
        return ""
    counts = {len(result.tasks) for result in kept}
    if counts == {len(summary.tasks)} and len(summary.tasks) <= 3:
        return f" ({', '.join(summary.tasks)})"
    others = len(summary.tasks) - 1
    if counts == {others} and all(result.data in {*summary.tasks} - {*result.tasks} for result in kept):
        return f" (mean of the {others} others)" if others > 1 else " (the other data set)"
    return f" (mean of {_range(counts)})" if max(counts) > 1 else " (one task each)"


def measure_names(summary: Summary) -> list[str]:
    """The names of the accuracies in a cell, in their order."""
    return [new_name(summary), kept_name(summary), "H (their harmonic mean)"][: len(summary.measures)]


def short_name(summary: Summary, measure: str) -> str:
    """The short name of a measure, for the names of rows."""
    return {"new": words(summary.protocol).short, "kept": words(summary.protocol).kept}.get(measure, measure)


def title(summary: Summary) -> str:
    """The title of a table of accuracies."""
    several = summary.seed_counts[1] > 1
    return f"Accuracy in percent, {'mean ± standard deviation over ' if several else ''}{seeds_name(summary)}"


def seeds_name(summary: Summary) -> str:
    """The number of seeds of the cells, such as "10 seeds" or "1 to 10 seeds"."""
    if summary.seed_counts[1] == 1:
        return "one seed" if len(summary.seeds) == 1 else "one seed each"
    return f"{_range(summary.seed_counts)} seeds"


def average_name(summary: Summary) -> str:
    """The description of averages over data sets; it is empty for a single data set."""
    n = len(summary.data_sets)
    if n == 1:
        return ""
    complete = all(len(data_sets) == n for data_sets in summary.complete.values())
    return f"average of {n} data sets" if complete else "average of the data sets that every method has"


def gaps(summary: Summary) -> list[str]:
    """Sentences about an unfinished sweep: the data sets that averages leave out, and unequal numbers of seeds."""
    if len(summary.data_sets) == 1:
        return _fewer_seeds(summary)
    missing = {"methods": "Left out of averages, because a method has no result", "seeds": "Unequal seeds"}
    lines = []
    for kind, by_data in summary.gaps().items():
        if found := [f"{data} ({', '.join(map(str, shots))})" for data, shots in by_data.items()]:
            lines.append(f"{missing[kind]} (data set, shots): {'; '.join(found)}.")
    return lines


def _fewer_seeds(summary: Summary) -> list[str]:
    """A sentence that names the methods and rates with fewer seeds than others, those with the fewest first."""
    gaps = {row: _seed_gap(summary, row) for row in summary.rows}
    found: list[tuple[int, str]] = []
    for method in summary.methods:
        by_rate = {f" at {rate:g}" if rate else "": gap for (of, rate), gap in gaps.items() if of == method}
        if len(set(by_rate.values())) == 1:
            by_rate = {"": next(iter(by_rate.values()))}
        found += [(gap[0], f"{method}{at} ({gap[1]})") for at, gap in by_rate.items() if gap]
    names = [name for _, name in sorted(found, key=lambda gap: gap[0])]
    shown = ", ".join(names[:_MOST_NAMES])
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return [f"Fewer than {len(summary.seeds)} seeds: {shown}{more}."] if names else []


def _seed_gap(summary: Summary, row: Row) -> tuple[int, str] | None:
    """For a row with too few seeds: their lowest number, and a text with their numbers and shots; otherwise None."""
    counts = {shots: n for shots in summary.shots if (n := len(summary.runs(row, shots)))}
    fewer = {shots: n for shots, n in counts.items() if n < len(summary.seeds)}
    if not fewer:
        return None
    *others, last = fewer
    where = ", ".join([*map(str, others), shots_name(last)])
    how_many = _range(fewer.values())
    return min(fewer.values()), how_many if len(fewer) == len(counts) else f"{where}: {how_many}"


def _range(counts: Collection[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"


def shots_name(n: int) -> str:
    """The number of shots in words, such as "4 shots"."""
    return f"{n} shot" if n == 1 else f"{n} shots"


def percent(spread: Spread) -> str:
    """Mean and deviation in percent, such as "63.1 ± 0.4"; a single value has no deviation."""
    mean, sd = spread
    return f"{100 * mean:.1f}" if math.isnan(sd) else f"{100 * mean:.1f} ± {100 * sd:.1f}"


def accuracies(cell: Cell, summary: Summary, deviations: bool = True) -> list[str]:
    """The accuracies of a cell as texts, one for each of the summary's measures."""
    spreads = [cell.new, *([cell.kept or Spread(math.nan, math.nan)] if "kept" in summary.measures else [])]
    texts = [percent(spread if deviations else Spread(spread.mean, math.nan)) for spread in spreads]
    if "H" in summary.measures:
        texts.append(f"{100 * cell.h:.1f}")
    return [text.replace("nan", "–") for text in texts]


def interval(gain: Gain | None) -> str:
    """A gain as text: mean, 95% interval, seeds with a gain and, for several data sets, data sets with a gain."""
    if gain is None:
        return "–"
    mean, low, high, wins, seeds, _ = gain.over_seeds
    bounds = f" [{100 * low:+.1f}, {100 * high:+.1f}]" if seeds > 1 else ""
    data_sets = f", {gain.better}/{gain.data_sets}" if gain.data_sets > 1 else ""
    return f"{100 * mean:+.1f}{bounds}, {wins}/{seeds}{data_sets}"


def sentences(summary: Summary) -> list[str]:
    """Each comparison in words: at equal new-task accuracy, where there are fronts, else at the one learning rate."""
    if len(summary.learning_rates) == 1:
        return [text for comparison in summary.comparisons for text in _at_rate(comparison, summary)]
    if "kept" not in summary.measures:
        return []
    rated = {method for method, rate in summary.rows if rate is not None}
    return [sentence(c, summary.protocol) for c in summary.comparisons if {c.method, c.baseline} <= rated]


def sentence(comparison: Comparison, protocol: str = "few-shot") -> str:
    """The comparison at equal new-task accuracy, over all numbers of shots, in one sentence."""
    method, baseline = comparison.method, comparison.baseline
    names = words(protocol)
    if not comparison.shots:
        return f"{method} and {baseline} have no data set, number of shots and seed in common."
    if comparison.overall is None:
        front = f"two learning rates or more, of which one gains {names.equal}"
        return f"{method} and {baseline}: no seed counts at every number of shots that both have (it takes {front})."
    return f"At equal {names.equal}, {_difference(method, names.keeps, baseline, comparison.overall)}."


def _at_rate(comparison: Comparison, summary: Summary) -> list[str]:
    names = words(summary.protocol)
    verbs = {"new": f"reaches {{}} {{}} on the {names.new}", "kept": names.keeps, "H": "reaches {} {} in H"}
    rate = summary.learning_rates[0]
    gains = comparison.at_rate.get((rate, None), {})
    where = "At" if (comparison.method, rate) in summary.rows else f"With {comparison.baseline} at"
    return [
        f"{where} learning rate {rate:g}, {_difference(comparison.method, verbs[measure], comparison.baseline, gain)}."
        for measure, gain in gains.items()
    ]


def _difference(method: str, verb: str, baseline: str, gain: Gain) -> str:
    mean, low, high, wins, seeds, _ = gain.over_seeds
    if mean == low == high == gain.better == 0:
        return f"{method} {verb.format('exactly as much as', baseline)} in each of {seeds} seeds"
    points = round(100 * mean, 1)
    shown = seeds > 1 and low * high > 0
    amount = f"{abs(points):.1f}" if points else "less than 0.1"
    difference = f"{amount} points {'more' if mean > 0 else 'less'} than" if points or shown else "as much as"
    data_sets = f"a gain on {gain.better} of {gain.data_sets} data sets" if gain.data_sets > 1 else ""
    text = f"{method} {verb.format(difference, baseline)}"
    if seeds < 2:
        return f"{text} ({'; '.join(filter(None, ['one seed: no interval', data_sets]))})"
    verdict = "the interval excludes zero" if shown else "the interval includes zero: no difference shown"
    over = f"95% interval {100 * low:+.1f} to {100 * high:+.1f} over {seeds} seeds, {wins} of them with a gain"
    return f"{text} ({'; '.join(filter(None, [over, data_sets, verdict]))})"
