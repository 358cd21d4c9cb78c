"""Frozen weights with room for the factors, `[W | B̃ | 0]` and `[W ; Ã ; 0]`, kept from step to step.

A product of the plan `concat` is one of `[x | h | 0]` [M, C] and `[W | B̃ | 0]` [N, C]. W is copied once, when its
buffer is made, and B̃ whenever it is used, by the kernel that computes h. Rows are of C elements, a multiple of 8, so
that each starts on 16 bytes. Its input gradient is one of `[dY | g | 0]` [M, E] and `[W ; Ã ; 0]` [E, K].

A buffer belongs to the tensor that owns the memory of its weight and lives as long. A weight that was moved, exchanged,
cast or written to has another buffer; what is written through `.data` is not seen, as everywhere in torch. A buffer is
used by one thread: two forward passes at a time may be of two adapters.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels.kept import keep

MAX_THREADS = 2  # that keep buffers of a weight: one for forward passes, and autograd's, where they are computed again


class _State(NamedTuple):
    """What a buffer was made of; another state asks for another one."""

    address: int
    version: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    rows: tuple[tuple[int, int], ...]
    rank: int


# By the owner of a weight's memory, then by the offset and shape of the weight in it, the thread and what stands beside
# it: the state and the buffer.
_KEPT: Any = WeakTensorKeyDictionary()


def width(inputs: int, rank: int) -> int:
    """C, the elements of a row of x [M, inputs] and h [M, rank] side by side."""
    return -(-(inputs + rank) // 8) * 8


def wide_weight(linear: AdaptedLinear, dtype: torch.dtype) -> Tensor:  # [N, C]
    """`[W | … | 0]` in `dtype`; the columns of B̃ hold what was last written there, 0 outside each adapter's rows."""
    return _buffer(linear, dtype, "B")


def tall_weight(linear: AdaptedLinear, dtype: torch.dtype) -> Tensor:  # [E, K]
    """`[W ; Ã ; 0]` in `dtype`, complete."""
    tall, N = _buffer(linear, dtype, "A"), linear.weight.shape[0]
    A = linear.As.flatten(0, 1) if isinstance(linear.As, Tensor) else torch.cat(list(linear.As))  # [R, K]
    tall[N : N + A.shape[0]] = A
    return tall


def _buffer(linear: AdaptedLinear, dtype: torch.dtype, factor: str) -> Tensor:
    weight = linear.weight
    owner = weight if weight._base is None else weight._base
    version = -1 if weight.is_inference() else weight._version
    shape, rows = tuple(map(int, weight.shape)), tuple(linear.rows)
    state = _State(weight.data_ptr(), version, shape, weight.stride(), weight.device, dtype, rows, linear.rank)
    kept: dict[tuple[int, tuple[int, ...], int, str], tuple[_State, Tensor]] = _KEPT.setdefault(owner, {})
    thread = threading.get_ident()
    key = (int(weight.storage_offset()), shape, thread, factor)
    found = kept.get(key)
    if found is not None and found[0] == state:
        return keep(found[1])
    buffer = _made(linear, dtype, factor)
    threads = {entry[2] for entry in tuple(kept)} | {thread}
    if len(threads) <= MAX_THREADS and not _is_captured(weight):
        kept[key] = (state, buffer)
    return buffer


def _made(linear: AdaptedLinear, dtype: torch.dtype, factor: str) -> Tensor:
    N, K = linear.weight.shape
    shape = (N, width(K, linear.rank)) if factor == "B" else (width(N, linear.rank), K)
    with torch.inference_mode(False), torch.no_grad():
        buffer = torch.zeros(shape, dtype=dtype, device=linear.weight.device)
        buffer[:N, :K] = linear.weight
    return buffer


def _is_captured(weight: Tensor) -> bool:
    """Whether memory that is taken now belongs to a CUDA graph, which gives it back with itself."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
