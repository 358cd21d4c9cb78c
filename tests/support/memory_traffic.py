"""The bytes that kernels move, counted in Triton's interpreter under the masks of their loads and stores."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor
from triton.runtime import interpreter


@dataclass
class Traffic:
    """What one launch moved."""

    kernel: str
    tensors: dict[str, Tensor]  # the arguments that are tensors
    accesses: dict[tuple[str, int], list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, addresses: Any, mask: Any, itemsize: int) -> None:
        """The addresses [...] of elements of so many bytes, of which those under the mask are moved."""
        moved = np.broadcast_to(np.asarray(mask), np.shape(addresses))
        self.accesses[kind, itemsize].append(np.asarray(addresses)[moved.astype(bool)].reshape(-1).astype(np.int64))

    def bytes(self, *kinds: str) -> int:
        """Of all loads and stores, or of these kinds ("load", "store")."""
        return sum(
            itemsize * sum(map(len, found))
            for (kind, itemsize), found in self.accesses.items()
            if not kinds or kind in kinds
        )

    def distinct(self) -> int:
        """The bytes that are loaded, each once, and those that are stored: what memory itself has to move."""
        return sum(itemsize * len(np.unique(np.concatenate(found))) for (_, itemsize), found in self.accesses.items())

    def by_argument(self) -> dict[str, tuple[int, int]]:
        """The bytes of all accesses of each argument, and of distinct ones."""
        starts = sorted({tensor.data_ptr(): name for name, tensor in reversed(self.tensors.items())}.items())
        places, found = np.array([start for start, _ in starts]), {}
        for (kind, itemsize), addresses in self.accesses.items():
            every = np.concatenate(addresses)
            owners = np.searchsorted(places, every, side="right") - 1
            for owner in np.unique(owners):
                own = every[owners == owner]
                name = f"{kind} {starts[owner][1] if owner >= 0 else 'elsewhere'}"
                found[name] = (itemsize * len(own), itemsize * len(np.unique(own)))
        return found


@contextlib.contextmanager
def watched() -> Iterator[list[Traffic]]:
    """What the launches within it move, one after the other."""
    launches: list[Traffic] = []
    builder, call = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    load, store, rmw = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def launched(self: Any, *arguments: Any, **keywords: Any) -> Any:
        given = {**dict(zip(self.arg_names, arguments, strict=False)), **keywords}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        launches.append(Traffic(self.fn.__name__, tensors))
        return call(self, *arguments, **keywords)

    def seen(kind: str, run: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
        def access(self: Any, pointers: Any, *arguments: Any, **keywords: Any) -> Any:
            mask = keywords["mask"] if "mask" in keywords else arguments[mask_at]
            itemsize = pointers.get_element_ty().primitive_bitwidth // 8 or 1
            launches[-1].add(kind, pointers.data, mask.data, itemsize)
            return run(self, pointers, *arguments, **keywords)

        return access

    def atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *others: Any) -> Any:
        for kind in ("load", "store"):
            launches[-1].add(kind, pointers.data, mask.data, value.dtype.scalar.primitive_bitwidth // 8)
        return rmw(self, operation, pointers, value, mask, *others)

    with (
        patch.object(interpreter.GridExecutor, "__call__", launched),
        patch.object(builder, "create_masked_load", seen("load", load, 0)),
        patch.object(builder, "create_masked_store", seen("store", store, 1)),
        patch.object(builder, "create_atomic_rmw", atomic),
    ):
        yield launches
