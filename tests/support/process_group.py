"""The group of the processes of a test, which ends before its processes do."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Its functions have the default group at the time of its import among their defaults, and torch's compiler imports it:
# imported here, before there is a group, it holds none.
import torch.distributed.nn.functional  # noqa: F401
from torch import distributed


@contextmanager
def process_group(folder: str | Path, rank: int = 0, size: int = 1) -> Iterator[None]:
    """The default group, by gloo, of `size` processes that meet in `folder`.

    Its threads end with the last reference to it. Python ends a thread that still needs it at its own end, and with
    that aborts the process.
    """
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    assert distributed.group.WORLD is not None
    group = weakref.ref(distributed.group.WORLD)
    try:
        yield
    finally:
        distributed.destroy_process_group()
    gc.collect()  # modules and what trains them refer to each other
    assert group() is None, "something still holds the process group"
