"""The parts that all launches share: layouts of operands, the chip, the needs of the interpreter, the launch itself.

A `Launch` is what a launch takes beside its tensors. It follows from shapes, strides and dtypes alone, so launching
functions keep it by these. It remembers what Triton compiled for the dtypes and alignments of the tensors, all that
Triton looks at beside its numbers: a later launch goes to the compiled kernel at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels.dropout import keep_mask
from complora_kernels.kernels.tiles import UNALIGNED_TILES, LargeProduct, Tiles, choose_tiles, model_of, tiles_of

# Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were first imported). It cannot multiply
# bfloat16 and truncates float32 to bfloat16, so there the kernels compute in float32 and torch rounds what they store.
INTERPRETED = not isinstance(keep_mask, triton.JITFunction)


def upcast(dtype: torch.dtype) -> bool:
    """Whether kernels must widen operands of this dtype."""
    return INTERPRETED and dtype.itemsize == 2


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which asks the dispatcher even where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def has_ptx() -> bool:
    """Whether kernels may hold a line of Nvidia's own assembly."""
    return not INTERPRETED and torch.version.hip is None


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for what a kernel stores, to be handed to `rounded` afterwards."""
    stored = torch.float32 if INTERPRETED and dtype.itemsize == 2 else dtype
    return torch.empty(shape, dtype=stored, device=device)


def rounded(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor that a kernel stored in the dtype that was asked for; on a GPU it has that dtype already."""
    return stored if stored.dtype == dtype else stored.to(dtype)


def has_tf32() -> bool:
    """Whether tensor cores multiply float32 as TF32. AMD's matrix cores take float32 itself."""
    return torch.version.hip is None


def input_precision(dtype: torch.dtype) -> str:
    """TF32 for float32 products only where torch itself would use it."""
    if dtype != torch.float32 or not has_tf32():
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def stages(n: int) -> int:
    """Stages of a loop's loads in shared memory. AMD's chips have a third of it: there loads wait in registers."""
    return n if torch.version.hip is None else min(n, 2)


def adapters_of(linear: AdaptedLinear) -> tuple[int, int]:
    """The number of a product's adapters, P, and the rank of each, r."""
    As = linear.As
    return (As.shape[0], As.shape[1]) if isinstance(As, Tensor) else (len(As), As[0].shape[0])


def stacked(tensors: Sequence[Tensor] | Tensor) -> Tensor:
    """Contiguous memory of P tensors [...]: one tensor [P, ...], or the tensor itself where it is alone.

    Nothing is copied where they lie one after the other. A view of one with another dimension takes longer than all
    else here.
    """
    if isinstance(tensors, Tensor):
        return tensors
    first = tensors[0]
    if len(tensors) == 1:
        return first if first.is_contiguous() else first.contiguous()
    elements, following, size = first.numel(), first.data_ptr(), first.nbytes
    for tensor in tensors:
        if tensor.data_ptr() != following or not tensor.is_contiguous():
            return torch.stack(list(tensors))
        following += size
    # What lies at neighbouring addresses may be of several allocations.
    behind = first.untyped_storage().nbytes() - first.storage_offset() * first.element_size()
    if behind < len(tensors) * size:
        return torch.stack(list(tensors))
    return first.as_strided((len(tensors), *first.shape), (elements, *first.stride()))


def contiguous_rows(matrix: Tensor) -> Tensor:
    """Rows at any distance from each other, each contiguous."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def aligned(matrix: Tensor) -> bool:
    """Whether its rows, or its columns, are contiguous and start on 16 bytes: loads then take 16 bytes at a time."""
    step, row = matrix.stride()
    if step > row:
        step, row = row, step
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
    if not INTERPRETED and not (aligned(operands[0]) and aligned(operands[1])):
        return UNALIGNED_TILES
    known = chip(device)
    if wanted is not None and wanted in tiles_of(known, dtype, crowded=product.crowded):
        return Tiles(*wanted)
    return choose_tiles(product, known, processors(device)).tiles


def spills_with_residual(device: torch.device) -> bool:
    """Whether an accumulator that starts from a residual leaves too few registers: Blackwell's lies in other memory."""
    name = chip(device)
    return isinstance(name, int) and name >= 100


def cdiv(n: int, step: int) -> int:
    """`ceil(n / step)`. Triton's own function is for kernels: on the host it unwraps each argument."""
    return -(-n // step)


@functools.lru_cache(maxsize=1024)
def power_of_two(n: int, low: int, high: int) -> int:
    """The next power of two, between two of them."""
    return min(max(1 << max(n - 1, 0).bit_length(), low), high)


KEPT_LAUNCHES = 4096  # of each kernel: ragged batches have many shapes
cached = functools.lru_cache(maxsize=KEPT_LAUNCHES)  # of functions of shapes, strides, dtypes and flags


class Launch:
    """All that one kernel is launched with but its tensors, which stand between `before` and `numbers`.

    It is of that kernel alone, whose compiled forms it remembers.
    """

    __slots__ = ("before", "compiled", "constexprs", "grid", "numbers", "options")

    def __init__(
        self,
        grid: tuple[int, ...],
        numbers: Sequence[float],  # the arguments behind the tensors, in order
        constexprs: dict[str, Any],
        *,
        num_warps: int,
        num_stages: int,
        before: Sequence[int] = (),  # the arguments before the tensors
    ) -> None:
        self.grid, self.before, self.numbers = grid, tuple(before), tuple(numbers)
        self.constexprs, self.options = constexprs, {"num_warps": num_warps, "num_stages": num_stages}
        # By the device, and the dtype and the alignment of each tensor.
        self.compiled: dict[tuple[Any, ...], Callable[..., None]] = {}


class Work:
    """What some programs of a launch compute, by numbers alone: a kernel's own launch, or part of a common one."""

    __slots__ = ("constexprs", "counters", "numbers", "partials", "programs")

    def __init__(
        self, programs: int, counters: int, partials: int, numbers: Mapping[str, float], constexprs: dict[str, Any]
    ) -> None:
        self.programs, self.counters, self.partials = programs, counters, partials  # the last two: as in `partials`
        self.numbers, self.constexprs = numbers, constexprs  # by the names of the kernel's arguments


@cached
def alone(work: Work, num_warps: int, num_stages: int) -> Launch:
    """The launch of a kernel whose first argument is the number of its first program."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return Launch((work.programs,), tuple(work.numbers.values()), work.constexprs, before=(0,), **options)


def run(kernel: Any, launch: Launch, tensors: Sequence[Tensor]) -> None:
    """Launches the kernel that these are the tensors, numbers and constexprs of, on the device of its tensors."""
    device = tensors[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):  # Triton launches on the current one
            return run(kernel, launch, tensors)
    if not _is_direct(kernel):
        _dispatch(kernel, launch, tensors)
        return None
    driver: Any = triton.runtime.driver.active
    index = driver.get_current_device()
    key = (index, *[(tensor.dtype, tensor.data_ptr() % 16) for tensor in tensors])
    compiled = launch.compiled.get(key)
    if compiled is None:
        dispatched = _dispatch(kernel, launch, tensors)
        if dispatched is not None:  # a hook of the user's took the compilation over
            launch.compiled[key] = _direct(dispatched, kernel, launch)
    else:
        compiled(driver.get_current_stream(index), tensors)
    return None


def _dispatch(kernel: Any, launch: Launch, tensors: Sequence[Tensor]) -> Any:
    """A launch by Triton, which compiles what it has not compiled yet, and returns it."""
    arguments = (*launch.before, *tensors, *launch.numbers)
    return kernel[launch.grid](*arguments, **launch.constexprs, **launch.options)


def _direct(compiled: Any, kernel: Any, launch: Launch) -> Callable[..., None]:
    """A launch of a compiled kernel by the driver, as `JITFunction.run` ends with it where nobody has hooked it."""
    x, y, z = (*launch.grid, 1, 1)[:3]
    start, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    order = kernel.arg_names[-len(launch.constexprs) :]
    before, after = launch.before, (*launch.numbers, *(launch.constexprs[name] for name in order))

    def launched(stream: int, tensors: Sequence[Tensor]) -> None:
        start(x, y, z, stream, function, metadata, None, None, None, *before, *tensors, *after)

    return launched


def _is_direct(kernel: Any) -> bool:
    """Whether a launch by Triton would do no more than find the compiled kernel and start it."""
    if _UNHOOKED is None or type(kernel) is not triton.JITFunction or triton.JITFunction.run is not _UNHOOKED:
        return False  # interpreted, another version of Triton, or somebody follows the launches
    knobs: Any = triton.knobs  # pyright: ignore[reportAttributeAccessIssue]
    runtime, compilation = knobs.runtime, knobs.compilation
    return not (
        runtime.debug
        or getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        or getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        or runtime.add_stages_inspection_hook
        or compilation.instrumentation_mode
        or kernel.pre_run_hooks
    )


def _unhooked() -> Any:
    """Triton's launch, where this is a version with all that `run` reads, and on Nvidia's GPUs.

    Of tensors AMD's compiler also looks at the size of their memory.
    """
    knobs: Any = getattr(triton, "knobs", None)
    known = {
        "runtime": ("debug", "launch_enter_hook", "launch_exit_hook", "add_stages_inspection_hook"),
        "compilation": ("instrumentation_mode",),
    }
    if torch.version.hip is not None or INTERPRETED:
        return None
    complete = all(hasattr(getattr(knobs, group, None), name) for group, names in known.items() for name in names)
    return triton.JITFunction.run if complete else None


_UNHOOKED = _unhooked()
