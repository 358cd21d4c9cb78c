r"""The keys of PEFT's `rank_pattern` and `alpha_pattern`, matched in a time that their length bounds.

PEFT reads a key as a regular expression for the end of a module's name, behind a dot. One that comes from a file could
run for hours in Python's `re`, so what is matched here is a part of that language: names with `\.`, `.`, `\d`, `\w` or
`[0-9]`, each with `*`, `+` or `?` behind it or not, and alternatives between `|` that are not in parentheses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

Number = TypeVar("Number", int, float)
Atom = tuple[str, str]  # one character's class as a regular expression, and "", "*" or "?"

WILDCARDS = 32  # alternatives that are more than a name, in all keys together
LENGTH = 200  # characters of one of them
ATOM = re.compile(r"(\\[dw.\-]|\[0-9\]|[.\w\-])([*+?]?)")
NAME = re.compile(r"(?:[\w\-]|\\[.\-])+")  # with dots that are escaped: one that is not stands for any character


def value_for(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    """The value of the first key that matches the module `name` or its end, else `default`."""
    return next((value for key, value in patterns.items() if _matches(key, name)), default)


def check_patterns(field: str, patterns: Mapping[str, object]) -> None:
    """Raises ValueError that names the first key which is not of the language above, or where it is too much."""
    wild = [(key, part) for key in patterns for part in key.split("|") if not NAME.fullmatch(_bare(part))]
    for key, part in wild:
        if len(part) > LENGTH or re.fullmatch(f"(?:{ATOM.pattern})+", _bare(part)) is None:
            raise ValueError(
                f"{field} has the key {key!r:.100}, expected names of modules, in which `.`, \\d, \\w and [0-9] may "
                "stand with * + ? behind them, joined by |: other regular expressions of a file are not matched"
            )
    if len(wild) > WILDCARDS:
        raise ValueError(f"{field} has {len(wild)} alternatives with wildcards, expected at most {WILDCARDS}")


def _matches(key: str, name: str) -> bool:
    ends = [name, *(name[i + 1 :] for i, character in enumerate(name) if character == ".")]
    for part in key.split("|"):
        candidates = ends[:1] if part.startswith("^") else ends
        bare = _bare(part)
        if NAME.fullmatch(bare):
            if re.sub(r"\\(.)", r"\1", bare) in candidates:
                return True
        elif any(_reaches_end(_atoms(bare), candidate) for candidate in candidates):
            return True
    return False


def _bare(part: str) -> str:
    return part.removeprefix("^").removesuffix("$")


def _atoms(part: str) -> list[Atom]:
    atoms: list[Atom] = []
    for atom, quantifier in ATOM.findall(part):
        atoms += [(atom, ""), (atom, "*")] if quantifier == "+" else [(atom, quantifier)]
    return atoms


def _reaches_end(atoms: list[Atom], text: str) -> bool:
    """Whether the atoms match the whole text: the set of atoms that may come next, character by character."""
    states = _with_skips({0}, atoms)
    for character in text:
        passed = {
            state if atoms[state][1] == "*" else state + 1
            for state in states
            if state < len(atoms) and re.fullmatch(atoms[state][0], character)
        }
        states = _with_skips(passed, atoms)
    return len(atoms) in states


def _with_skips(states: set[int], atoms: list[Atom]) -> set[int]:
    """The states, and those that are reached by leaving out atoms that may be absent."""
    reached = set(states)
    for state in states:
        while state < len(atoms) and atoms[state][1]:
            state += 1
            reached.add(state)
    return reached
