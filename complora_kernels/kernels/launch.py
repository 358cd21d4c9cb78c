"""The parts that all launches share: layouts of operands, the chip, and the needs of the interpreter."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from complora_kernels.kernels.dropout import keep_mask
from complora_kernels.kernels.tiles import UNALIGNED_TILES, LargeProduct, Tiles, choose_tiles, model_of, tiles_of

# Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were first imported). It cannot multiply
# bfloat16 and truncates float32 to bfloat16, so there the kernels compute in float32 and torch rounds what they store.
INTERPRETED = not isinstance(keep_mask, triton.JITFunction)


def upcast(dtype: torch.dtype) -> bool:
    """Whether kernels must widen operands of this dtype."""
    return INTERPRETED and dtype.itemsize == 2


def has_ptx() -> bool:
    """Whether kernels may hold a line of Nvidia's own assembly."""
    return not INTERPRETED and torch.version.hip is None


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for what a kernel stores, to be handed to `rounded` afterwards."""
    return torch.empty(shape, dtype=torch.float32 if upcast(dtype) else dtype, device=device)


def rounded(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor that a kernel stored in the dtype that was asked for; on a GPU it has that dtype already."""
    return stored.to(dtype)


def has_tf32() -> bool:
    """Whether tensor cores multiply float32 as TF32. AMD's matrix cores take float32 itself."""
    return torch.version.hip is None


def input_precision(dtype: torch.dtype) -> str:
    """TF32 for float32 products only where torch itself would use it."""
    allowed = has_tf32() and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def stages(n: int) -> int:
    """Stages of a loop's loads in shared memory. AMD's chips have a third of it: there loads wait in registers."""
    return n if torch.version.hip is None else min(n, 2)


def stacked(tensors: Sequence[Tensor] | Tensor) -> Tensor:
    """Tensors of one shape as one contiguous tensor; without a copy where they lie one after the other, or are one."""
    if isinstance(tensors, Tensor):
        return tensors
    first = tensors[0]
    if len(tensors) == 1:
        return first.contiguous().unsqueeze(0)
    neighbours = (
        t.is_contiguous()
        and t.data_ptr() == first.data_ptr() + i * first.nbytes
        and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        for i, t in enumerate(tensors)
    )
    if all(neighbours):
        return first.as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))
    return torch.stack(list(tensors))


def contiguous_rows(matrix: Tensor) -> Tensor:
    """Rows at any distance from each other, each contiguous."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def aligned(matrix: Tensor) -> bool:
    """Whether its rows, or its columns, are contiguous and start on 16 bytes: loads then take 16 bytes at a time."""
    step, row = sorted(matrix.stride())
    return step == 1 and row * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


@functools.lru_cache
def capability(index: int) -> int | str:
    """The chip of a device: 90 for compute capability 9.0, with ROCm its name, as "gfx942"."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def chip(device: torch.device) -> int | str:
    """The chip that tiles are chosen for; 0 in the interpreter, where small tiles reach all the edges."""
    if INTERPRETED:
        return 0
    return capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """The streaming multiprocessors of a device; where there is none, as many as the chip has that is compiled for."""
    if device.type != "cuda":
        return model_of(chip(device)).processors
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


def candidate_tiles(device: torch.device, dtype: torch.dtype) -> tuple[Tiles, ...]:
    """The tiles worth trying on a device."""
    return tiles_of(chip(device), dtype)


def tiles_for(
    operands: tuple[Tensor, Tensor],  # the two of the large product
    product: LargeProduct,
    wanted: Sequence[int] | None,
) -> Tiles:
    """The tiles that were asked for, where the kernel can take them, else those that `choose_tiles` chooses."""
    device, dtype = operands[0].device, operands[0].dtype
    if not INTERPRETED and not all(aligned(operand) for operand in operands):
        return UNALIGNED_TILES
    if wanted is not None and wanted in tiles_of(chip(device), dtype, crowded=product.crowded):
        return Tiles(*wanted)
    return choose_tiles(product, chip(device), processors(device)).tiles


def spills_with_residual(device: torch.device) -> bool:
    """Whether an accumulator that starts from a residual leaves too few registers: Blackwell's lies in other memory."""
    name = chip(device)
    return isinstance(name, int) and name >= 100


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device: makes that the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def power_of_two(n: int, low: int, high: int) -> int:
    """The next power of two, between two of them."""
    return min(max(triton.next_power_of_2(n), low), high)
