"""Whether values that come from a file have the types that are declared for them."""

from __future__ import annotations

import reprlib
import sys
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

_WORDS = {
    NoneType: "null",
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    list: "a list",
    tuple: "a list",
    dict: "an object",
}


def check_type(value: Any, hint: Any, name: str) -> None:
    """Raises ValueError that names the first part of `value` that is not of the type `hint`.

    Types are those of JSON: None, bool, int, float (finite, or an int), str, Literal of strings, unions, `list[T]`,
    `tuple[T, ...]` (of JSON's lists), `dict[str, T]`, and TypedDicts, which may hold more keys than they declare.
    """
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is Any:
        return
    if is_typeddict(hint):
        _require(isinstance(value, dict), value, name, "an object")
        for key, field in get_type_hints(hint).items():
            if key not in value:
                raise ValueError(f"{name} has no {key}, expected one")
            check_type(value[key], field, f"{name}.{key}")
    elif kind in (Union, UnionType):
        fitting = [option for option in arguments if _is_like(value, get_origin(option) or option)]
        words = (_WORDS[get_origin(option) or option] for option in arguments)
        _require(bool(fitting), value, name, " or ".join(words))
        check_type(value, fitting[0], name)
    elif kind is Literal:
        _require(isinstance(value, str) and value in arguments, value, name, f"one of {', '.join(arguments)}")
    else:
        _require(_is_like(value, kind), value, name, _WORDS[kind])
        if kind in (list, tuple):
            for i, part in enumerate(value):
                check_type(part, arguments[0], f"{name}[{i}]")
        elif kind is dict:
            for key, part in value.items():
                _require(isinstance(key, str), key, f"a key of {name}", "a string")
                check_type(part, arguments[1], f"{name}.{key}")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite float or an int of that range, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_int(value: Any) -> bool:
    """Whether `value` is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_like(value: Any, kind: Any) -> bool:
    """Whether `value` is of this type, whatever is in it."""
    if kind is float:
        return is_number(value)
    if kind is int:
        return is_int(value)
    return isinstance(value, (list, tuple) if kind in (list, tuple) else kind)


def _require(condition: bool, value: Any, name: str, expected: str) -> None:
    if not condition:
        is_short = value is None or isinstance(value, (bool, int, float, str))
        got = f"{name}={reprlib.repr(value)}" if is_short else f"{name} is a {type(value).__name__}"
        raise ValueError(f"{got}, expected {expected}")
