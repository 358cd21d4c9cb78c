"""Values that hold within a `with` on one thread, and on the threads that compute its backward passes."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch

Value = TypeVar("Value")


class _Entry(Generic[Value]):
    """An open context. No two entries are equal, whatever their values."""

    def __init__(self, value: Value) -> None:
        self.value = value


class _Here(threading.local):
    def __init__(self) -> None:  # no class attribute: torch.compile guards on the contents of a thread's own dict
        self.entries: list[_Entry[Any]] = []


class ThreadStack(Generic[Value]):
    """The values of all `holding` contexts that are open on a thread.

    A backward pass on a GPU runs on threads of its own, where activation checkpointing computes a forward pass again.
    Those threads see the values of the thread that called `backward`. Contexts may be left in any order, and on another
    thread than the one that entered them, as generators do.
    """

    def __init__(self, name: str) -> None:
        self._key = f"complora_kernels: {name}"
        self._here = _Here()
        self._open: set[_Entry[Value]] = set()  # entries of all threads

    @property
    def anywhere(self) -> bool:
        """Whether a context is open on any thread: the cheaper question, where nothing is compiled."""
        return bool(self._open)

    def values(self) -> list[Value]:
        """The values of the contexts that are open on this thread, the innermost last."""
        if torch.compiler.is_compiling():
            return [entry.value for entry in self._here.entries]  # compiled code guards on them
        return [entry.value for entry in self._entries()] if self._open else []

    @contextlib.contextmanager
    def holding(self, value: Value) -> Iterator[None]:
        """A context in which `value` is one of `values()`."""
        entry, entries = _Entry(value), self._entries()

        def leave() -> None:
            with contextlib.suppress(ValueError):
                entries.remove(entry)
            if not torch.compiler.is_compiling():
                self._open.discard(entry)

        try:
            try:
                if not torch.compiler.is_compiling():
                    if not torch._C._is_key_in_tls(self._key):
                        _hand_to_torch(self._key, entries)
                    self._open.add(entry)
                entries.append(entry)
                yield
            finally:
                leave()
        finally:
            leave()  # again: an interrupt may have broken the first call off

    def _entries(self) -> list[_Entry[Value]]:
        """The entries of this thread; on a thread of a backward pass, those of the thread that called `backward`."""
        # Compiled code would get a copy of the list from torch's own storage.
        if torch.compiler.is_compiling() or not torch._C._is_key_in_tls(self._key):
            return self._here.entries
        return torch._C._get_obj_in_tls(self._key)


def _hand_to_torch(key: str, entries: list[_Entry[Any]]) -> None:
    """Puts the list of this thread into torch's own storage, which the threads of a backward pass share.

    The storage releases a reference when the thread ends. torch 2.11 takes no reference before, so one is added here.
    """
    references = sys.getrefcount(entries)
    torch._C._stash_obj_in_tls(key, entries)
    if sys.getrefcount(entries) == references:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(entries))
