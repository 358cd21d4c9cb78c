"""The names of methods: their parts, and the methods that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from complora_kernels.fewshot.methods import METHODS

LORA = "lora"
SIDES = ("output", "input", "both")
SOURCES = ("weight", "ends", "activations", "random")

_PART = " of the update"


class Label(NamedTuple):
    """The parts of a method's name: `both, energy 0.8, random` is ("both", "random", "energy 0.8")."""

    family: str  # the protected side or, where nothing is protected, the text before the first comma
    source: str  # source of the protected subspace; empty where nothing is protected
    setting: str  # the rest of the name


class Variant(NamedTuple):
    """The kind and the options of a method, whatever its name."""

    kind: str = ""  # its name in METHODS, or another name where the result tells no more
    options: Mapping[str, Any] | None = None  # options that differ from the preset; None: unknown
    share: float = 1  # the share of the trained update that is applied


def parse(method: str) -> Label:
    """Parse a name in METHODS, or a sweep's label that begins with one and continues after a comma."""
    head, *rest = method.split(", ")
    words = head.split("-")
    if not set(words) <= {*SIDES, *SOURCES}:
        return Label(head, "", ", ".join(rest))
    side = next((word for word in words if word in SIDES), "output")
    source = next((word for word in (*words, *rest) if word in SOURCES), "weight")
    return Label(side, source, ", ".join(word for word in rest if word not in SOURCES))


_NAMES = {parse(method): method for method in METHODS}


def label_of(method: str, variant: Variant) -> Label:
    """The parts of a method's name; where it tells nothing, those of its kind, with the whole name as the setting."""
    said = parse(method)
    if said.source or said.family in METHODS or variant.kind not in METHODS:
        return said
    return parse(variant.kind)._replace(setting=method)


def family_name(label: Label) -> str:
    """The name in METHODS that methods share which differ only in their settings."""
    return _NAMES.get(label._replace(setting=""), label.family)


def part_of(method: str, share: float) -> str:
    """The name of a method whose trained update is scaled by `share`."""
    return f"{method}, {share:g}{_PART}"


def split_part(name: str) -> tuple[str, str]:
    """The inverse of `part_of`, such as ("lora", "0.5 of the update"); the second part is empty for a whole update."""
    *whole, last = name.split(", ")
    return (", ".join(whole), last) if last.endswith(_PART) else (name, "")


def plain_lora(variants: Mapping[str, Variant]) -> str | None:
    """The name of plain LoRA: "lora" itself, or the first method of its kind."""
    found = [name for name, (kind, _, share) in variants.items() if kind == LORA and share == 1]
    return LORA if LORA in found else next(iter(found), None)


def stand_ins(variants: Mapping[str, Variant]) -> dict[str, str]:
    """The names in METHODS of methods with other names: of plain LoRA, and of the only method of each other kind."""
    plain = plain_lora(variants)
    kinds = [kind for kind, _, share in variants.values() if share == 1]
    return {
        name: kind
        for name, (kind, _, share) in variants.items()
        if share == 1 and kind not in variants and (name == plain if kind == LORA else kinds.count(kind) == 1)
    }
