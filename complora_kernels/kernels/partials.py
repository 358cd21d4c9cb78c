"""Sums over splits of the rows, added up inside the launch that computes the splits.

Each program stores what its split adds to a tile of the result, and counts its arrival. The last one to arrive adds the
partial sums of all, in the order of the splits, whichever program it is: two runs give the same bits. Many splits are
added in groups, so that the last program does not read all of them alone.
"""

# A launch takes more than its kernel's arguments, and a kernel's names are bound where a constexpr says so.
# pyright: reportCallIssue=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportAssignmentType=false

from __future__ import annotations

import math
import threading
import weakref
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.kernels.kept import KEPT, keep

LEAST_COUNTERS = 16384  # 64 KiB: a larger buffer is rarely needed
UNGROUPED = 8  # so many partial sums are read by one program
READ_AHEAD = tl.constexpr(4)  # partial sums of a tile under way at a time, fewer where they would take many registers


class Splits(NamedTuple):
    """How the rows of a sum are shared out among programs."""

    number: int
    rows: int  # of each split, a multiple of a program's block of rows
    group: int  # so many neighbouring splits are added first

    @property
    def groups(self) -> int:
        return -(-self.number // self.group)

    @property
    def parts(self) -> int:
        """The partial sums to be stored for a tile: of the splits, then of their groups; none of a single split."""
        return 0 if self.number == 1 else self.number + (self.groups if self.groups > 1 else 0)

    @property
    def counters(self) -> int:
        """The counters of a tile: one for each group, and one for the groups."""
        return self.groups + 1


def split_rows(
    M: int,
    wanted: int,
    block_m: int,
) -> Splits:
    """At most `wanted` splits of M rows, each of whole blocks of `block_m` rows; by these numbers alone."""
    rows = -(-max(M, 1) // (max(wanted, 1) * block_m)) * block_m
    count = max(-(-M // rows), 1)
    return Splits(count, rows, count if count <= UNGROUPED else math.isqrt(count - 1) + 1)


class _Here(threading.local):
    def __init__(self) -> None:
        self.eager: dict[tuple[int, int], Tensor] = {}  # by device and stream
        self.captured: dict[tuple[int, int], weakref.ref[Tensor]] = {}


_HERE = _Here()


def counters(n: int, device: torch.device) -> Tensor:  # [n or more], int32
    """Zeros that count the arrivals of a launch on the current stream, and that the launch leaves zero again.

    Launches on one stream run one after the other and share them. A CUDA graph that is captured has its own, which it
    keeps: its replays may run beside other launches. A capture that nobody keeps memory for gets new ones each time.
    """
    if device.type != "cuda":
        where = (-1, 0)
    else:
        index = torch.cuda.current_device() if device.index is None else device.index
        where = (index, torch._C._cuda_getCurrentRawStream(index))
        if torch.cuda.is_current_stream_capturing():
            return _of_capture(n, where, device)
    buffer = _HERE.eager.get(where)
    if buffer is None or len(buffer) < n:
        buffer = _HERE.eager[where] = _zeros(n, device)
    return buffer


def _of_capture(n: int, where: tuple[int, int], device: torch.device) -> Tensor:
    """The counters of the capture under way on this thread: those that its kept memory holds already, or new ones."""
    known = _HERE.captured.get(where)
    buffer = None if known is None else known()
    kept = KEPT.values()
    if buffer is not None and len(buffer) >= n and kept and any(tensor is buffer for tensor in reversed(kept[-1])):
        return buffer
    buffer = keep(_zeros(n, device))
    _HERE.captured[where] = weakref.ref(buffer)
    return buffer


def _zeros(n: int, device: torch.device) -> Tensor:
    return torch.zeros(max(n, LEAST_COUNTERS), dtype=torch.int32, device=device)


@triton.jit
def is_last(counter_ptr, expected):
    """Counts this program's arrival; whether all `expected` programs have arrived, whose stores may then be read.

    The counter is zero again when the last one has arrived.
    """
    # The barrier orders the stores of all threads before the atomic of one of them, whose release orders them for the
    # device. The last arrival acquires what all earlier ones released (each atomic reads the one before it: one release
    # sequence), and Triton hands its result to the other threads through a barrier: their loads come after it. Those
    # loads pass by the L1 cache (.cg), which is not coherent. Nobody else touches the counter before the launch ends.
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_in_order(
    partials_ptr,  # into the first of [count, size], float32
    offsets,  # of a tile behind that pointer
    mask,
    size,
    count,
):
    """The sum of one tile of all partial sums, in order."""
    size_of_tile: tl.constexpr = offsets.shape[0] * offsets.shape[1]
    ahead: tl.constexpr = READ_AHEAD if size_of_tile <= 4096 else 2 if size_of_tile <= 8192 else 1
    total = tl.zeros_like(offsets).to(tl.float32)
    for first in range(0, count, ahead):
        for i in tl.static_range(ahead):
            part = tl.cast(first + i, tl.int64)
            ptrs = (partials_ptr + part * size) + offsets
            total += tl.load(ptrs, mask=mask & (part < count), other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def sum_when_last(
    tiles,  # a tuple of tiles, float32: the sums over the rows of this program's split
    offsets,  # a tuple: where they lie behind the pointers below
    masks,  # a tuple
    out_ptr,  # into the result, of `size` elements
    partials_ptr,  # likewise into the first of [SPLITS + GROUPS, size], float32
    counters_ptr,  # [GROUPS + 1] of these tiles
    size,
    split,
    splits,
    group,
    COUNT: tl.constexpr,  # of tiles
    SPLIT: tl.constexpr,  # whether there is more than one split
):
    """Stores the sum over all splits, rounded once, from the last program to arrive.

    Of one split it is stored at once. The bytes that move besides the result are those of the partial sums, written
    and read once, and those of the groups.
    """
    if not SPLIT:
        for j in tl.static_range(COUNT):
            tl.store(out_ptr + offsets[j], tiles[j].to(out_ptr.dtype.element_ty), mask=masks[j])
    else:
        step = tl.cast(size, tl.int64)
        groups = tl.cdiv(splits, group)
        mine = split // group
        first = mine * group
        for j in tl.static_range(COUNT):
            tl.store((partials_ptr + split * step) + offsets[j], tiles[j], mask=masks[j])
        members = tl.minimum(group, splits - first)
        if is_last(counters_ptr + mine, members):
            if groups == 1:
                for j in tl.static_range(COUNT):
                    total = sum_in_order(partials_ptr, offsets[j], masks[j], step, splits)
                    tl.store(out_ptr + offsets[j], total.to(out_ptr.dtype.element_ty), mask=masks[j])
            else:
                sums_ptr = partials_ptr + splits * step  # [GROUPS, size]
                for j in tl.static_range(COUNT):
                    total = sum_in_order(partials_ptr + first * step, offsets[j], masks[j], step, members)
                    tl.store((sums_ptr + mine * step) + offsets[j], total, mask=masks[j])
                if is_last(counters_ptr + groups, groups):
                    for j in tl.static_range(COUNT):
                        total = sum_in_order(sums_ptr, offsets[j], masks[j], step, groups)
                        tl.store(out_ptr + offsets[j], total.to(out_ptr.dtype.element_ty), mask=masks[j])
