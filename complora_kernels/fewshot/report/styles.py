"""The looks of methods in figures: the colour, marker and dashes of each method's line, and its name in the legend."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import cycle
from typing import Any, NamedTuple

import matplotlib
from matplotlib.colors import to_hex

from complora_kernels.fewshot.report.labels import SIDES, SOURCES, Label, split_part

Look = dict[str, Any]  # arguments of matplotlib for a line

FEW = 6
"""The most methods that share a panel, with error bars."""

LINE: Look = {"linewidth": 1.4, "markersize": 4.5}
BARS: Look = {"capsize": 2, "elinewidth": 0.8}
ZERO_SHOT: Look = {"color": "grey", "linestyle": ":", "marker": "*"}

# The colours of Okabe and Ito, which colour-blind people can distinguish, then Tol's; each with a marker
_LOOKS: dict[str, Look] = {
    "lora": {"color": "#000000", "marker": "o"},
    "lora-wd": {"color": "#666666", "marker": "P"},
    "preserve": {"color": "#AA3377", "marker": "h"},
    "lora-plus": {"color": "#DDAA33", "marker": "<"},
    "eva": {"color": "#117733", "marker": ">"},
    "prilora": {"color": "#44AA99", "marker": "p"},
    "image-lora": {"color": "#332288", "marker": "d"},
    "output": {"color": "#0072B2", "marker": "s"},
    "input": {"color": "#CC79A7", "marker": "v"},
    "both": {"color": "#D55E00", "marker": "D"},
    "random": {"color": "#56B4E9", "marker": "s", "linestyle": "--"},
    "random-input": {"color": "#EE99AA", "marker": "v", "linestyle": "--"},
    "random-both": {"color": "#E69F00", "marker": "D", "linestyle": "--"},
    "activations": {"color": "#009E73", "marker": "s", "linestyle": "-."},
    "activations-input": {"color": "#997700", "marker": "v", "linestyle": "-."},
    "activations-both": {"color": "#661100", "marker": "D", "linestyle": "-."},
    "ends": {"color": "#004488", "marker": "s", "linestyle": ":"},
    "ends-input": {"color": "#BB5566", "marker": "v", "linestyle": ":"},
    "ends-both": {"color": "#EE8866", "marker": "D", "linestyle": ":"},
    "tip-adapter": {"color": "#882255", "marker": "^", "linestyle": ":"},
    "linear-probe": {"color": "#999933", "marker": "X", "linestyle": ":"},
    "lfa": {"color": "#CC6677", "marker": "*", "linestyle": ":"},
}
_NAMES = {
    "lora": "LoRA",
    "lora-wd": "LoRA, weight decay",
    "preserve": "LoRA, names preserved",
    "lora-plus": "LoRA+",
    "eva": "EVA",
    "prilora": "LoRA, rising ranks",
    "image-lora": "LoRA, values of the image tower",
    "output": "Comp-LoRA, output",
    "input": "Comp-LoRA, input",
    "both": "Comp-LoRA, both",
    "random": "random subspace, output",
    "random-input": "random subspace, input",
    "random-both": "random subspace, both",
    "activations": "activations' subspace, output",
    "activations-input": "activations' subspace, input",
    "activations-both": "activations' subspace, both",
    "ends": "ends of the spectrum, output",
    "ends-input": "ends of the spectrum, input",
    "ends-both": "ends of the spectrum, both",
    "tip-adapter": "Tip-Adapter",
    "linear-probe": "linear probe",
    "lfa": "LFA",
}
_OTHERS = ("#44AA99", "#332288", "#AA4499", "#DDAA33", "#117733", "#CC6677", "#88CCEE")
_OTHER_MARKERS = ("^", "v", "<", ">", "p")
_SOURCE_LOOKS: dict[str, Look] = {
    "weight": {"marker": "s", "linestyle": "-"},
    "ends": {"marker": "v", "linestyle": ":"},
    "activations": {"marker": "^", "linestyle": "-."},
    "random": {"marker": "D", "linestyle": "--"},
}
_SIDE_LOOKS: dict[str, Look] = {
    "output": {"fillstyle": "full"},
    "input": {"fillstyle": "left"},
    "both": {"fillstyle": "none"},
}
SIDE_NAMES = {"output": "output side", "input": "input side", "both": "both sides"}
SOURCE_NAMES = {
    "weight": "weight's subspace",
    "ends": "ends of the spectrum",
    "activations": "activations' subspace",
    "random": "random subspace",
}
_SQUARE: Look = {"color": "grey", "marker": "s", "linestyle": "none"}
_RAMPS = ("YlOrRd", "PuBu", "YlGn", "RdPu")  # colour maps for labels that differ in a number


class Looks(NamedTuple):
    """The line of each method, and the legend."""

    of: dict[str, Look]
    legend: list[tuple[str, Look]]


def display_name(method: str) -> str:
    """The name of a method in a legend, followed by the share of its update."""
    whole, part = split_part(method)
    return ", ".join(filter(None, [_NAMES.get(whole, whole), part]))


def is_spread(labels: Collection[Label]) -> bool:
    """Whether there are many methods, and among them protected subspaces in several settings.

    Shares of an update do not count as settings.
    """
    return len(labels) > FEW and len({split_part(label.setting)[0] for label in labels if label.source}) > 1


def looks(labels: Mapping[str, Label], stand_ins: Mapping[str, str]) -> Looks:
    """Choose a distinct line for each method.

    Where many methods differ in settings, colours show settings, dashes show sources, and filled markers show sides.

    Args:
        labels: the label of each method.
        stand_ins: the names in METHODS whose looks methods with other names get.
    """
    protecting = {method: label for method, label in labels.items() if label.source}
    settings = _sorted({label.setting for label in protecting.values()})
    if not is_spread(labels.values()):
        of = _apart(labels, stand_ins)
        return Looks(of, [(display_name(method), of[method]) for method in labels])
    colours = dict(zip(settings, _ramp("viridis", len(settings), 0.0, 0.85), strict=True))
    of = _apart([method for method in labels if method not in protecting], stand_ins)
    legend = [(display_name(method), look) for method, look in of.items()]
    for method, (side, source, setting) in protecting.items():
        of[method] = {"color": colours[setting], **_SOURCE_LOOKS[source], **_SIDE_LOOKS[side]}
    legend += [
        (setting or "no setting named", {"color": colour, "linewidth": 4}) for setting, colour in colours.items()
    ]
    sides, sources = ({label[part] for label in protecting.values()} for part in (0, 1))
    legend += [(SOURCE_NAMES[s], {"color": "grey", **_SOURCE_LOOKS[s]}) for s in SOURCES if s in sources]
    legend += [(SIDE_NAMES[s], {**_SQUARE, **_SIDE_LOOKS[s]}) for s in SIDES if s in sides]
    return Looks(of, legend)


def _apart(methods: Iterable[str], stand_ins: Mapping[str, str]) -> dict[str, Look]:
    """Distinct looks; the colours of labels that differ only in a number go from light to dark."""
    known = {method: stand_ins.get(method, method) for method in methods}
    groups: dict[str, list[str]] = {}
    for method, name in known.items():
        if name not in _LOOKS:
            groups.setdefault(re.sub(r"\d+(\.\d+)?", "", method), []).append(method)
    of = {method: _LOOKS[name] for method, name in known.items() if name in _LOOKS}
    pairs = [{"color": c, "marker": m} for c, m in zip(_OTHERS * 5, _OTHER_MARKERS * 7, strict=True)]
    singles, ramps = cycle(pairs), cycle(_RAMPS)
    for group in groups.values():
        if len(group) < 3:
            of |= {method: next(singles) for method in group}
        else:
            marker = _OTHER_MARKERS[len(of) % len(_OTHER_MARKERS)]
            colours = _ramp(next(ramps), len(group), 0.4, 0.95)
            of |= {m: {"color": c, "marker": marker} for m, c in zip(_sorted(group), colours, strict=True)}
    return {method: of[method] for method in known}


def _ramp(colormap: str, n: int, first: float, last: float) -> list[str]:
    sampled = matplotlib.colormaps[colormap]
    return [to_hex(sampled(first + (last - first) * i / max(n - 1, 1))) for i in range(n)]


def _sorted(labels: Iterable[str]) -> list[str]:
    """Sort labels by their text, and numbers in the text by value."""
    parts = {label: re.split(r"(\d+(?:\.\d+)?)", label) for label in labels}
    return sorted(parts, key=lambda label: [float(p) if i % 2 else p for i, p in enumerate(parts[label])])
