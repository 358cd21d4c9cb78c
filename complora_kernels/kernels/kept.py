"""Memory that a captured CUDA graph reads by its address and does not own. Imports no Triton."""

from __future__ import annotations

from torch import Tensor

from complora_kernels.common.thread_stack import ThreadStack

KEPT: ThreadStack[list[Tensor]] = ThreadStack("memory of the capture under way")


def keep(tensor: Tensor) -> Tensor:
    """Keeps `tensor`, from a cache that may drop it, for as long as the graph that is being captured."""
    if KEPT.anywhere:
        for kept in KEPT.values():
            kept.append(tensor)
    return tensor
