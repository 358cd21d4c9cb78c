"""Reads pickles of other programs, without running any code that they may hold."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

_CONTAINERS = (
    *("PROTO", "FRAME", "STOP", "MARK", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    *("GLOBAL", "STACK_GLOBAL", "EMPTY_TUPLE", "NEWOBJ", "BUILD"),
)
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_CALLS = (*_TUPLES, "REDUCE", "BINPERSID")
_MOST_MARKS = 100  # the deepest nesting


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, find: Callable[[str, str], Any], load: Callable[[Any], Any] | None):
        super().__init__(io.BytesIO(content))
        self._find, self._load = find, load

    def find_class(self, module_name: str, global_name: str) -> Any:
        return self._find(module_name, global_name)

    def persistent_load(self, pid: Any) -> Any:
        if self._load is None:
            raise pickle.UnpicklingError("it refers to data outside of it")
        return self._load(pid)


def read_pickle(
    content: bytes, find: Callable[[str, str], Any], load: Callable[[Any], Any] | None = None, *, calls: bool = False
) -> Any:
    """Read a pickle in time and memory that are linear in its length.

    Args:
        content: the bytes of the pickle.
        find: returns the substitute for a module's class or function, and raises for unknown ones. Nothing is imported.
        load: returns the object of a persistent id.
        calls: whether the pickle may hold tuples and call the objects that `find` returns.

    Raises:
        Exception: the pickle is damaged or asks for more; the error may be of almost any kind, and is to be caught with
            `files.reading`.
    """
    allowed = {*_CONTAINERS, *(_CALLS if calls else ())}
    marks = 0
    kinds: dict[int, str] = {}  # the instruction that made each remembered object, by its index
    last = ""
    for instruction, argument, _ in pickletools.genops(content):
        name = instruction.name
        if name not in allowed:
            raise pickle.UnpicklingError(f"it uses the instruction {name}")
        marks += (name == "MARK") - (name in ("APPENDS", "SETITEMS", "TUPLE"))
        if marks > _MOST_MARKS:
            raise pickle.UnpicklingError(f"it is nested more than {_MOST_MARKS} times")
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(kinds) if name == "MEMOIZE" else int(argument or 0)
            if index > len(kinds) + 1:  # the unpickler would allocate memory for as many
                raise pickle.UnpicklingError(f"it remembers something as the {index}th after {len(kinds)}")
            kinds[index] = last
        elif name in ("BINGET", "LONG_BINGET") and kinds.get(int(argument or 0)) in _TUPLES:
            # Each tuple that holds another tuple twice doubles the time of hashing.
            raise pickle.UnpicklingError("it uses a tuple twice")
        else:
            last = name
    return _Unpickler(content, find, load).load()
