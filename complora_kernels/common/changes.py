"""Changes of a model that are made together or not at all.

An exception can reach Python code between any two of its lines: Ctrl-C, memory that ran out, a signal's handler.
Therefore code that changes a model first prepares all changes, which leaves the model alone, and then makes them in one
call into C that runs no Python code: an interrupt comes before it or after it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from complora_kernels.common.sharded import is_sharded, local, sharded_like

Table = TypeVar("Table", bound="dict[Any, Any] | set[Any]")


class Changes:
    """Prepared changes of modules and tensors: nothing is changed before `make`, which makes all of them at once."""

    def __init__(self) -> None:
        # The key is the id of a table; the values are the table, its contents now, and its contents after `make`.
        self._drafts: dict[int, tuple[Any, Any, Any]] = {}
        self._do: list[partial[Any]] = []
        self._undo: list[partial[Any]] = []

    def draft(self, table: Table) -> Table:
        """A copy of one of a module's dicts or sets, to be changed: `make` gives `table` the same contents."""
        if id(table) not in self._drafts:
            self._drafts[id(table)] = (table, table.copy(), table.copy())
        return self._drafts[id(table)][2]

    def set_attribute(self, owner: object, name: str, value: object) -> None:
        """Sets an attribute that is no entry of the owner's `__dict__`, such as `requires_grad` or `__class__`."""
        self._do.append(partial(object.__setattr__, owner, name, value))
        self._undo.append(partial(object.__setattr__, owner, name, getattr(owner, name)))

    def set_buffer(self, module: nn.Module, name: str, tensor: Tensor, *, persistent: bool = False) -> None:
        """Does what `register_buffer(name, tensor, persistent=persistent)` does."""
        stand_in = nn.Module()
        stand_in.register_buffer(name, tensor, persistent=persistent)
        self.draft(module._buffers).update(stand_in._buffers)
        self.draft(module._non_persistent_buffers_set).update(stand_in._non_persistent_buffers_set)

    def remove_buffer(self, module: nn.Module, name: str) -> None:
        """Removes a buffer, such as `set_buffer` sets."""
        del self.draft(module._buffers)[name]
        self.draft(module._non_persistent_buffers_set).discard(name)

    def add_hook(self, module: nn.Module, register: Callable[[nn.Module], RemovableHandle]) -> None:
        """Adds to `module` the hook that `register(module)` would."""
        register(stand_in := nn.Module())
        for name, table in vars(stand_in).items():
            if "_hooks" in name and table:
                for hook in table.values():
                    if getattr(hook, "with_module", False):  # torch's wrapper, which hands its module to the hook
                        hook.module = weakref.ref(module)
                self.draft(vars(module)[name]).update(table)

    def exchange(self, parameter: Tensor, values: Tensor) -> None:
        """Gives a parameter other memory, of the same shape, dtype and device; what it had stays as it is.

        A sharded parameter, whose memory `fully_shard` knows by its address, is written to.
        """
        if is_sharded(parameter):
            self.copy([parameter], [values])
        else:
            self.set_attribute(parameter, "data", values)
            # A backward pass that saved the parameter would find other values: torch then raises an error.
            self._do.append(partial(torch._C._increment_version, [parameter]))

    def copy(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Writes into the memory of the tensors, by whose address a CUDA graph or an optimizer may know them."""
        own = [local(tensor) for tensor in tensors]
        parts = [local(sharded_like(value.detach(), tensor)) for tensor, value in zip(tensors, values, strict=True)]
        given = [part.to(tensor) for tensor, part in zip(own, parts, strict=True)]
        copy: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
        self._do.append(partial(copy, own, given))
        self._undo.append(partial(copy, own, [tensor.clone() for tensor in own]))

    def make(self) -> None:
        """Makes all of them. If one is refused, those before it are undone, by another such call."""
        do, undo = list(self._do), list(self._undo)
        for table, before, after in self._drafts.values():
            if isinstance(table, set):
                do += [partial(table.update, after), partial(table.intersection_update, after)]
            else:
                do += [partial(table.__delitem__, key) for key in before if key not in after]
                do.append(partial(table.update, _changed(before, after)))
            undo += [partial(table.clear), partial(table.update, before)]
        try:
            _call_each(do)
        except BaseException:
            _call_each(undo)
            raise


@contextlib.contextmanager
def joined(changes: Changes | None) -> Iterator[Changes]:
    """`changes`, which the caller makes; for None, new ones, which are made when the block ends."""
    own = Changes() if changes is None else changes
    yield own
    if changes is None:
        own.make()


def _changed(before: dict[Any, Any], after: dict[Any, Any]) -> dict[Any, Any]:
    return {key: value for key, value in after.items() if key not in before or before[key] is not value}


def _call_each(calls: list[partial[Any]]) -> None:
    deque(map(partial.__call__, calls), maxlen=0)  # an interrupt cannot come between two calls: no Python line runs
