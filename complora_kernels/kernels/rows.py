"""The rows of a weight that the adapters of one product update, as the kernels take them. Imports no Triton."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from complora_kernels.adapted_linear import AdaptedLinear

NO_ADAPTER = 15
MAX_GROUPS = 7  # a group takes four bits of a positive int32
MAX_NORM_WIDTH = 2048  # a program of a LayerNorm holds whole rows of x


class RowGroups(NamedTuple):
    """The rows of a weight [N, K] in groups of one size, each with one adapter or none."""

    size: int  # D
    adapters: tuple[int, ...]  # the adapter of each group, or NO_ADAPTER

    @property
    def adapter_of_group(self) -> int:
        """The adapters in four bits for each group, the first group in the lowest."""
        return sum(adapter << (4 * group) for group, adapter in enumerate(self.adapters))

    @property
    def group_of_adapter(self) -> int:
        """The groups in four bits for each adapter, the first adapter in the lowest."""
        return sum(group << (4 * adapter) for group, adapter in enumerate(self.adapters) if adapter != NO_ADAPTER)


def groups_of(linear: AdaptedLinear, *, traced: bool = False) -> RowGroups:
    """The groups of rows of a product's weight; `traced`: its numbers may be no keys, torch.compile traces.

    Raises:
        ValueError: groups of one size do not fill the weight.
    """
    rows, N = linear.rows, linear.weight.shape[0]
    groups = row_groups(rows, N) if traced else _kept_row_groups(tuple(map(tuple, rows)), N)
    if groups is None:
        raise ValueError(
            f"rows={list(linear.rows)}, expected distinct ones of at most {MAX_GROUPS} equal groups of {N} rows"
        )
    return groups


def row_groups(rows: Sequence[tuple[int, int]], N: int) -> RowGroups | None:
    """The groups that the adapters' rows are; None where groups of one size do not fill the N rows of the weight."""
    size = rows[0][1] - rows[0][0]
    starts = [start for start, _ in rows]
    if size < 1 or N % size or N // size > MAX_GROUPS or len(set(starts)) < len(rows):
        return None
    if any(stop - start != size or start % size or not 0 <= start < N for start, stop in rows):
        return None
    adapters = [NO_ADAPTER] * (N // size)
    for adapter, start in enumerate(starts):
        adapters[start // size] = adapter
    return RowGroups(size, tuple(adapters))


_kept_row_groups = functools.lru_cache(maxsize=1024)(row_groups)
