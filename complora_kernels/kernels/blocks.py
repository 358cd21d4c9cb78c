"""Which rows of a weight the adapters of one product update, as the kernels want to know it. Imports no Triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

NO_ADAPTER = 15
MAX_BLOCKS = 7  # four bits each in a positive int32
MAX_NORM_WIDTH = 2048  # a program of a LayerNorm holds whole rows


class Blocks(NamedTuple):
    """The rows of a weight [N, K] as blocks of one size, each with one adapter or none."""

    size: int  # D
    slots: tuple[int, ...]  # the adapter of each block, or NO_ADAPTER

    @property
    def adapter_of_block(self) -> int:
        """Four bits a block, the first block in the lowest."""
        return sum(slot << (4 * block) for block, slot in enumerate(self.slots))

    @property
    def block_of_adapter(self) -> int:
        """Four bits an adapter, the first adapter in the lowest."""
        return sum(block << (4 * slot) for block, slot in enumerate(self.slots) if slot != NO_ADAPTER)


def row_blocks(rows: Sequence[tuple[int, int]], N: int) -> Blocks | None:
    """The blocks that the adapters' rows are; None where they are not blocks of one size that fill the weight."""
    size = rows[0][1] - rows[0][0]
    starts = [start for start, _ in rows]
    if size < 1 or N % size or N // size > MAX_BLOCKS or len(set(starts)) < len(rows):
        return None
    if any(stop - start != size or start % size or not 0 <= start < N for start, stop in rows):
        return None
    slots = [NO_ADAPTER] * (N // size)
    for slot, start in enumerate(starts):
        slots[start // size] = slot
    return Blocks(size, tuple(slots))
