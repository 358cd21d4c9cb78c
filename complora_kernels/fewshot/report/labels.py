"""Methods by name: in which order, what a name is made of, and who is compared with whom."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from complora_kernels.fewshot.methods import METHODS

LORA = "lora"
SIDES = ("output", "input", "both")
SOURCES = ("weight", "activations", "random")

# Options that do not tell apart what is compared: where and what is measured, and what lora-wd alone reads.
_BESIDE = ("data", "interpolations", "validation", "strong_weight_decay")
_PART = " of the update"
_SUBSPACE = ("subspace_k", "subspace_energy", "subspace_ratio")  # which LoRA does not read


class Label(NamedTuple):
    """What a method's name is made of: `both, energy 0.8, random` is ("both", "random", "energy 0.8")."""

    family: str  # the protected side; what stands before the first comma where nothing is protected
    source: str  # of the protected subspace; empty where there is none
    setting: str  # the rest


class Variant(NamedTuple):
    """What a method is, whatever its name."""

    kind: str = ""  # in the vocabulary; a name of no vocabulary where the line tells no more
    options: Mapping[str, Any] | None = None  # those that are not the preset's; None: not known
    share: float = 1  # of the trained update


def parse(method: str) -> Label:
    """Read a name of the vocabulary, or a sweep's label that begins with one and goes on after a comma."""
    head, *rest = method.split(", ")
    words = head.split("-")
    if not set(words) <= {*SIDES, *SOURCES}:
        return Label(head, "", ", ".join(rest))
    side = next((word for word in words if word in SIDES), "output")
    source = next((word for word in (*words, *rest) if word in SOURCES), "weight")
    return Label(side, source, ", ".join(word for word in rest if word not in SOURCES))


_NAMES = {parse(method): method for method in METHODS}


def label_of(method: str, variant: Variant) -> Label:
    """What the name says, or else what the method is of the vocabulary, with the whole name as its setting."""
    said = parse(method)
    if said.source or said.family in METHODS or variant.kind not in METHODS:
        return said
    return parse(variant.kind)._replace(setting=method)


def family_name(label: Label) -> str:
    """The name in the vocabulary of all methods that differ in their settings alone."""
    return _NAMES.get(label._replace(setting=""), label.family)


def part_of(method: str, share: float) -> str:
    """The name of a method whose trained update is scaled by `share`."""
    return f"{method}, {share:g}{_PART}"


def split_part(name: str) -> tuple[str, str]:
    """What `part_of` has joined, such as ("lora", "0.5 of the update"); the second is empty for a whole update."""
    *whole, last = name.split(", ")
    return (", ".join(whole), last) if last.endswith(_PART) else (name, "")


def plain_lora(variants: Mapping[str, Variant]) -> str | None:
    """The name of plain LoRA: "lora" itself, or the first that is LoRA."""
    found = [name for name, (kind, _, share) in variants.items() if kind == LORA and share == 1]
    return LORA if LORA in found else next(iter(found), None)


def stand_ins(variants: Mapping[str, Variant]) -> dict[str, str]:
    """The name in the vocabulary of the methods that stand for it: plain LoRA, and the only one of each other kind."""
    plain = plain_lora(variants)
    kinds = [kind for kind, _, share in variants.values() if share == 1]
    return {
        name: kind
        for name, (kind, _, share) in variants.items()
        if share == 1 and kind not in variants and (name == plain if kind == LORA else kinds.count(kind) == 1)
    }


def rivals(variants: Mapping[str, Variant]) -> list[tuple[str, str]]:
    """Who is compared with whom.

    Every method with plain LoRA, then with LoRA in the same setting, and every protected subspace with the random one
    of the same side and setting: the control that tells whether its directions matter. A share of energy is not the
    same number of directions for activations, so that there it has no control.

    Where no name tells who has the same setting, it is the one method of that kind with the same options, if there is
    one only.
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
        if label.source in ("weight", "activations") and not _has_its_own_energy(label, variants[method]):
            control = label._replace(source="random")
            pairs.append((method, named.get(control) or _same_options(method, family_name(control), (), variants)))
    return [(method, rival) for method, rival in dict.fromkeys(pairs) if rival is not None and rival != method]


def _has_its_own_energy(label: Label, variant: Variant) -> bool:
    """Whether activations choose how many directions are protected."""
    by_energy = "energy" in label.setting or (variant.options or {}).get("subspace_energy") is not None
    return label.source == "activations" and by_energy


def _same_options(method: str, kind: str, unread: Collection[str], variants: Mapping[str, Variant]) -> str | None:
    """The only method of a kind that has the same options, but those that are not read, and share of its update."""

    def setting(variant: Variant) -> object:
        options = variant.options or {}
        return variant.share, {name: options[name] for name in options if name not in (*_BESIDE, *unread)}

    wanted = variants[method]
    known = {name: of for name, of in variants.items() if of.options is not None and of.kind == kind}
    found = [name for name, of in known.items() if name != method and setting(of) == setting(wanted)]
    return found[0] if wanted.options is not None and len(found) == 1 else None
