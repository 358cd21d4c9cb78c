"""What a step launches on a GPU, in order, followed on a machine without one.

Launching functions, plans, autograd and torch's dispatcher run as on a GPU, on tensors of the CPU. `kernels_uncompiled`
lets Triton's own dispatch run up to the launch and compiles nothing; `kernels_unlaunched` compiles each kernel and goes
no further. `Follower` records each Triton kernel, and each operation of torch that is neither a view nor an allocation
and so is one kernel or more. Large results of floating-point numbers are not computed, so that shapes may be those of a
GPU. An operation counts as one launch: torch launches more for some (the backward pass of attention three, a fused
AdamW one for every 36 tensors).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.flop_counter import flop_registry

from complora_kernels.backends import hardware
from complora_kernels.common import tracing

aten = torch.ops.aten
# Neither views by their schemas nor kernels: they allocate, or say something of a tensor.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}
ATTENTION = {  # operations of one product of queries and keys: two products forward, five backward
    "_scaled_dot_product_flash_attention_for_cpu": 4,
    "_scaled_dot_product_flash_attention_for_cpu_backward": 10,
}
AGAIN = {"norm_bwd_da_kernel": ("stream_ptr",)}  # what programs of two kinds read at different times
SMALL = 2**14  # elements: of such tensors operations are computed
LARGE_PRODUCTS = (
    "packed_lora_linear_fwd",
    "packed_lora_linear_dx",
    "packed_lora_linear_bwd",
)  # kernels of a product [M, N, K]
# Of their tensor they read the device, the dtype or the shape alone.
UNREAD = {f"{kind}_like" for kind in ("zeros", "ones", "full", "rand", "randn")} | {
    "philox_seed",
    "new_zeros",
    "new_full",
}
WRITE_ONLY = {"copy_", "zero_", "fill_", "normal_", "uniform_", "bernoulli_", "random_"}  # do not read what they write


class Memory(NamedTuple):
    """A tensor that a launch reads or writes: an address that is that of no other while launches are followed."""

    address: int
    bytes: int  # of its distinct elements


@dataclass(frozen=True)
class Launch:
    """One kernel: its name, what it computes on and what it moves, each tensor once but those that `AGAIN` names."""

    kernel: str
    phase: str
    operations: float  # two for each product of two numbers in matrix products and attention, else none
    reads: tuple[Memory, ...]
    writes: tuple[Memory, ...]  # of a Triton kernel empty: its reads are all its tensors
    grid: tuple[int, ...] = ()  # of a Triton kernel
    numbers: dict[str, Any] = field(default_factory=dict)  # of a Triton kernel: its arguments that are no tensors
    fusible: bool = False  # elementwise operations and norms, which a compiler joins
    shapes: tuple[tuple[int, ...], ...] = ()  # of an operation of torch: those of its tensors

    @property
    def triton(self) -> bool:
        return bool(self.grid)

    @property
    def bytes(self) -> int:
        return sum(memory.bytes for memory in (*self.reads, *self.writes))


class Follower(TorchDispatchMode):
    """Records the launches of what runs within it; `phase` is noted beside each.

    Memory is kept until the follower is dropped, so that an address stands for one tensor. Large floating-point
    results are memory that nobody has written to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.launches: list[Launch] = []
        self.kept: list[torch.UntypedStorage] = []  # not the tensors: autograd takes over those that nobody else has
        self.least_bytes: tuple[Memory, ...] | None = None  # of the Triton launches of a table of tensors

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if left_alone(func):
            result = func(*args, **kwargs)
            self.kept += [tensor.untyped_storage() for tensor in tensors_of(result)]
            return result
        result = computed(func, args, kwargs)
        written, read = operands(func, args, kwargs)
        results = [] if written else tensors_of(result)
        self.kept += [tensor.untyped_storage() for tensor in results]
        if not (read or written or results):
            return result  # a question about dtypes
        self.launches.append(
            Launch(
                name,
                self.phase,
                operations_of(func, args, kwargs, result),
                memories([*([] if name in UNREAD else read), *([] if name in WRITE_ONLY else written)]),
                memories([*written, *results]),
                fusible=torch.Tag.pointwise in func.tags or name.startswith(("native_layer_norm", "copy", "_to_copy")),
                shapes=tuple(tuple(tensor.shape) for tensor in (*read, *written, *results)),
            )
        )
        return result

    def launched(self, kernel: str, names: Iterable[str], grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """Records a launch of a Triton kernel."""
        given = dict(zip(names, arguments, strict=True))
        numbers = {name: value for name, value in given.items() if isinstance(value, (int, float))}
        tensors = memories(value for value in given.values() if isinstance(value, Tensor))
        tensors += memories(given[name] for name in AGAIN.get(kernel, ()))
        self.launches.append(
            Launch(kernel, self.phase, products_of(kernel, given), self.least_bytes or tensors, (), grid, numbers)
        )


class Uncomputed(TorchDispatchMode):
    """Large results of floating-point numbers are memory that nobody has written to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **kwargs) if left_alone(func) else computed(func, args, kwargs)


def left_alone(func: Any) -> bool:
    """Whether an operation is no kernel: a view, an allocation, a question about a tensor."""
    return func.is_view or func.overloadpacket.__name__ in ALLOCATIONS or func.namespace not in ("aten", "complora")


def computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation of torch; one of many floating-point numbers is memory with its shape."""
    given = tensors_of((args, kwargs))
    if given and max(tensor.numel() for tensor in given) <= SMALL:  # a mask, whose values decide what follows
        return func(*args, **kwargs)
    if func._schema.is_mutable:
        written, _ = operands(func, args, kwargs)
        if any(tensor.is_floating_point() for tensor in written):
            returned = [argument for argument, of in zip(args, func._schema.arguments, strict=False) if writes(of)]
            return None if not func._schema.returns else returned[0] if len(func._schema.returns) == 1 else returned
        return func(*args, **kwargs)
    on_meta = {"device": torch.device("meta")} if "device" in kwargs else {}
    meta = tree_map_only(Tensor, shape_of, (args, kwargs))
    try:
        shapes = func(*meta[0], **{**meta[1], **on_meta})
    except (NotImplementedError, RuntimeError):  # its shape depends on values
        return func(*args, **kwargs)
    found = tensors_of(shapes)
    if not any(shape.is_floating_point() for shape in found):
        return func(*args, **kwargs)
    return tree_map_only(Tensor, memory_like, shapes)


def shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def memory_like(shape: Tensor) -> Tensor:
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def writes(argument: Any) -> bool:
    """Whether an argument of a schema is written to."""
    return argument.alias_info is not None and argument.alias_info.is_write


def operands(func: Any, args: Any, kwargs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation writes to, and those that it only reads."""
    written, read = [], []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        (written if writes(argument) else read).extend(tensors_of(value))
    return written, read


def memories(tensors: Iterable[Tensor]) -> tuple[Memory, ...]:
    """Each tensor once. Where several begin at one address, and stand for what is not there, the largest."""
    found: dict[int, int] = {}
    for tensor in tensors:
        elements = 1
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            elements *= size if stride else 1  # expanded dimensions repeat the same elements
        address = tensor.data_ptr()
        found[address] = max(found.get(address, 0), elements * tensor.element_size())
    return tuple(Memory(address, size) for address, size in found.items() if size)


def operations_of(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Of an operation of torch: those of its matrix products."""
    name, packet = func.overloadpacket.__name__, func.overloadpacket
    if name in ATTENTION:
        first = 1 if name.endswith("backward") else 0  # after the gradient of the result
        queries, keys = args[first], args[first + 1]  # [N, heads, L, d / heads]
        return float(ATTENTION[name] * queries.numel() * keys.shape[-2])
    packet = getattr(aten, name.removesuffix("_"), packet)  # in place it computes the same
    return float(flop_registry[packet](*args, **kwargs, out_val=result)) if packet in flop_registry else 0.0


def products_of(kernel: str, arguments: dict[str, Any]) -> float:
    """Of a Triton kernel: those of its large product."""
    large = kernel.startswith(LARGE_PRODUCTS)
    return 2.0 * arguments["M"] * arguments["N"] * arguments["K"] if large else 0.0


LAUNCHED: list[Callable[..., None]] = []  # who is told of launches; Triton keeps a kernel for the whole process


class UncompiledKernel:
    """Stands for what Triton would have compiled; its launch is recorded."""

    function, packed_metadata = None, ()

    def __init__(self, source: Any, **_: Any) -> None:
        self.src, self.name = source, source.fn.__name__

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
        """The launcher: after the grid stream, function, metadata and hooks, then the kernel's arguments."""
        for launched in LAUNCHED:
            launched(self.name, self.src.fn.arg_names, (x, y, z), arguments[6:])

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self.run, *(*grid, 1, 1)[:3], *[None] * 6)


@contextlib.contextmanager
def on_chip(chip: int) -> Iterator[None]:
    """Within it CPU tensors count as those of a chip; for the rest of the process Triton's driver is that of the chip.

    Raises:
        RuntimeError: the kernels were imported for Triton's interpreter, which dispatches nothing.
    """
    import triton

    from benchmarks.aot import ChipDriver
    from complora_kernels.kernels import launch

    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 in this process, expected kernels that are dispatched as on a GPU")
    triton.runtime.driver.set_active(ChipDriver(chip))  # type: ignore[arg-type]
    with (
        patch.object(launch, "chip", lambda _device: chip),
        patch.object(hardware, "interpreted", lambda: True),  # CPU tensors are taken
        patch.object(hardware, "chip", lambda _name: chip),  # plans ask for it
        patch.object(tracing, "_len_torch_dispatch_stack", lambda: 0),  # a mode that only follows changes nothing
    ):
        yield


@contextlib.contextmanager
def kernels_uncompiled(chip: int, launched: Callable[..., None]) -> Iterator[None]:
    """Within it every launch of a Triton kernel is handed to `launched`, see `on_chip`.

    It takes the kernel's name, the names of its arguments, the grid and the arguments.
    """
    import triton

    with on_chip(chip), patch.object(triton.compiler, "compile", UncompiledKernel):
        LAUNCHED.append(launched)
        try:
            yield
        finally:
            LAUNCHED.remove(launched)


@contextlib.contextmanager
def kernels_unlaunched(chip: int, compiled: Callable[[Any], None]) -> Iterator[None]:
    """Within it a launch ends when its kernel is compiled, which `compiled` is given, see `on_chip`."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled(run(self, *args, grid=grid, warmup=True, **options))

    with on_chip(chip), patch.object(JITFunction, "run", compile_only), Uncomputed():
        yield


@contextlib.contextmanager
def following(chip: int = 90) -> Iterator[Follower]:
    """A follower, on CPU tensors that count as those of a chip."""
    from complora_kernels.kernels import factors

    follower, fold = Follower(), factors.fold_factors

    def fold_factors(tensors: Any, bases: Any, *others: Any, flat: Tensor | None = None) -> Tensor:
        # A table says where factors and bases lie: the kernel is given the first of each.
        out = sum(tensor.numel() for tensor in tensors) * others[-1].itemsize
        given = [*(tensors if flat is None else [flat]), *(basis for basis in bases if basis is not None)]
        follower.least_bytes = (*memories(given), Memory(0, out))
        try:
            return fold(tensors, bases, *others, flat=flat)
        finally:
            follower.least_bytes = None

    with kernels_uncompiled(chip, follower.launched), patch.object(factors, "fold_factors", fold_factors), follower:
        yield follower
