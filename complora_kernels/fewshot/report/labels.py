"""Methods by name: in which order, what a name is made of, and who is compared with whom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from complora_kernels.fewshot.methods import METHODS

LORA = "lora"
SIDES = ("output", "input", "both")
SOURCES = ("weight", "activations", "random")


class Label(NamedTuple):
    """What a method's name is made of: `both, energy 0.8, random` is ("both", "random", "energy 0.8")."""

    family: str  # the protected side; what stands before the first comma where nothing is protected
    source: str  # of the protected subspace; empty where there is none
    setting: str  # the rest


def parse(method: str) -> Label:
    """Read a name of the vocabulary, or a sweep's label that begins with one and goes on after a comma."""
    head, *rest = method.split(", ")
    words = head.split("-")
    if not set(words) <= {*SIDES, *SOURCES}:
        return Label(head, "", ", ".join(rest))
    side = next((word for word in words if word in SIDES), "output")
    source = next((word for word in (*words, *rest) if word in SOURCES), "weight")
    return Label(side, source, ", ".join(word for word in rest if word not in SOURCES))


def part_of(method: str, share: float) -> str:
    """The name of a method whose trained update is scaled by `share`."""
    return f"{method}, {share:g} of the update"


def in_order(methods: Iterable[str]) -> list[str]:
    """Each method once: those of `METHODS` in its order, then the others as they come."""
    seen = dict.fromkeys(methods)
    return [*(method for method in METHODS if method in seen), *(method for method in seen if method not in METHODS)]


def plain_lora(kinds: Mapping[str, str]) -> str | None:
    """The name of plain LoRA, given what each name is of the vocabulary: "lora" itself, or the first that is LoRA."""
    return LORA if LORA in kinds else next((name for name, kind in kinds.items() if kind == LORA), None)


def rivals(methods: list[str], plain: str | None = LORA) -> list[tuple[str, str]]:
    """Who is compared with whom.

    Every method with plain LoRA, then with LoRA in the same setting, and every protected subspace with the random one
    of the same side and setting: the control that tells whether its directions matter. A share of energy is not the
    same number of directions for activations, so that there it has no control.

    Args:
        methods: the names.
        plain: the one that is plain LoRA, if any.
    """
    method_of: dict[Label, str] = {}
    for method in methods:
        method_of.setdefault(parse(method), method)
    pairs = [(method, plain) for method in methods if plain is not None and plain in methods]
    for label, method in method_of.items():
        if label.setting:
            pairs.append((method, method_of.get(Label(LORA, "", label.setting), method)))
    for label, method in method_of.items():
        if label.source and not (label.source == "activations" and "energy" in label.setting):
            pairs.append((method, method_of.get(label._replace(source="random"), method)))
    return [(method, rival) for method, rival in pairs if method != rival]
