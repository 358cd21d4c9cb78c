"""The last block of a tower computes the one position that the tower's feature is read at.

Its keys and values are those of all positions; what else it would compute for the others would be thrown away. What is
read is said from outside, for as long as the tower runs, on the thread that runs it: nothing is left to be copied or
saved with the modules.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from complora_kernels.common.changes import Changes
from complora_kernels.modules.extend import Extension, extend, is_watched


class Pool(NamedTuple):
    """The way from the last block of a tower to its feature. A hook on any of these sees all positions."""

    last_block: nn.Module
    transformer: nn.Module
    norm: nn.Module  # behind the transformer


class Pooled(NamedTuple):
    """What a running tower asks of its last block: one position of each of N sequences."""

    block: nn.Module
    positions: Tensor | None  # [N]; None: the first of each
    lengths: tuple[int, ...]  # what L may be where positions are given


class _Running(threading.local):
    def __init__(self) -> None:
        self.pooled: Pooled | None = None  # of the innermost tower


_RUNNING = _Running()


class PooledImages(Extension):
    """An image tower that reads its feature at the class token: its last block computes no other position.

    Features and gradients are the same up to rounding; with dropout the masks are drawn for other shapes, so that they
    are equal in distribution only. All positions are computed under torch.compile, where the transformer's own
    activation checkpointing is on, and where somebody hooked the last block, the transformer or the norm behind it.
    """

    find_pool: Callable[[nn.Module], Pool | None]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:  # [N, 3, H, W] to [N, D]
        if torch.compiler.is_compiling():
            return super().forward(x, *args, **kwargs)
        with pooling(self.find_pool(self)):
            return super().forward(x, *args, **kwargs)


def pool_images(
    tower: nn.Module, find_pool: Callable[[nn.Module], Pool | None], fused: Sequence[nn.Module], changes: Changes
) -> None:
    """Extends `tower` by `PooledImages`, where it reads its feature so.

    Args:
        tower: left alone where `find_pool` finds nothing, or a last block that computes all positions in any case.
        find_pool: a function of a module (copies of the tower refer to it by name), asked again at each call.
        fused: the blocks that can compute one position alone.
        changes: to which the extension is added.
    """
    pool = find_pool(tower)
    if pool is not None and any(pool.last_block is block for block in fused) and not isinstance(tower, PooledImages):
        extend(tower, PooledImages, changes)
        changes.draft(vars(tower))["find_pool"] = find_pool


@contextlib.contextmanager
def pooling(
    pool: Pool | None, find_positions: Callable[[], Tensor] | None = None, lengths: tuple[int, ...] = ()
) -> Iterator[None]:
    """Within it, a pass through the tower asks its last block for one position alone, where nobody sees the others."""
    wanted = None
    if pool is not None and _is_alone(pool):
        wanted = Pooled(pool.last_block, None if find_positions is None else find_positions(), lengths)
    outer, _RUNNING.pooled = _RUNNING.pooled, wanted
    try:
        yield
    finally:
        _RUNNING.pooled = outer


def _is_alone(pool: Pool) -> bool:
    if not isinstance(pool.last_block, Extension) or any(map(is_watched, pool)):
        return False
    return not getattr(pool.transformer, "grad_checkpointing", False)  # the block would run again by itself


def pooled(
    block: nn.Module,
    x: Tensor,  # [N, L, d], or [L, N, d]
    *,
    sequence_first: bool,
) -> Pooled | None:
    """What the running tower asks of `block`, or None: all positions."""
    wanted = _RUNNING.pooled
    if wanted is None or wanted.block is not block:
        return None
    L, N = x.shape[:2] if sequence_first else (x.shape[1], x.shape[0])
    fits = wanted.positions is None or (len(wanted.positions) == N and L in wanted.lengths)
    return wanted if fits else None


def take(
    x: Tensor,  # [N, L, d], or [L, N, d]
    positions: Tensor | None,  # [N]; None: the first of each
    *,
    sequence_first: bool,
) -> Tensor:  # [N, 1, d], or [1, N, d]
    """One position of each sequence."""
    if positions is None:
        return x[:1] if sequence_first else x[:, :1]
    sequences = torch.arange(len(positions), device=x.device)
    return x[positions, sequences].unsqueeze(0) if sequence_first else x[sequences, positions].unsqueeze(1)
