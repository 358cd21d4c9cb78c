"""The first run's program on a machine without a GPU: its kernels are compiled for a chip, and nothing is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.aot import ChipDriver
from complora_kernels.backends import hardware
from complora_kernels.common import tracing


class Uncomputed(TorchDispatchMode):
    """Operations with floating-point results give memory of the right shape, that nobody has written to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view or func.namespace != "aten":
            return func(*args, **kwargs)
        written = [
            args[i]
            for i, argument in enumerate(func._schema.arguments[: len(args)])
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if any(tensor.is_floating_point() for tensor in tree_leaves(written) if isinstance(tensor, Tensor)):
            return written[0] if func._schema.returns else None
        shapes = tree_map_only(Tensor, shape_of, (args, kwargs))
        on_meta = {"device": torch.device("meta")} if "device" in kwargs else {}
        try:
            found = func(*shapes[0], **{**shapes[1], **on_meta})
        except (NotImplementedError, RuntimeError):  # its shape depends on values
            return func(*args, **kwargs)
        results = [result for result in tree_leaves(found) if isinstance(result, Tensor)]
        if not any(result.is_floating_point() for result in results):
            return func(*args, **kwargs)
        return tree_map_only(Tensor, memory_like, found)


def shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def memory_like(shape: Tensor) -> Tensor:
    return torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)


@contextlib.contextmanager
def compiled_alone(chip: int, compiled: Callable[[Any], None] = lambda _: None) -> Iterator[None]:
    """Within it CPU tensors count as those of a chip, and a launch ends when its kernel is compiled.

    `compiled` is given Triton's kernel. For the rest of the process Triton's driver is that of the chip.

    Raises:
        RuntimeError: the kernels were imported for Triton's interpreter, which compiles nothing.
    """
    import triton
    from triton.runtime.jit import JITFunction

    from complora_kernels.kernels import launch

    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 in this process, expected kernels that are compiled as for a GPU")
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled(run(self, *args, grid=grid, warmup=True, **options))

    triton.runtime.driver.set_active(ChipDriver(chip))  # type: ignore[arg-type]
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(launch, "chip", lambda _device: chip),
        patch.object(hardware, "interpreted", lambda: True),  # CPU tensors are taken
        patch.object(tracing, "_len_torch_dispatch_stack", lambda: 0),  # kernels are launched as without the mode
        Uncomputed(),
    ):
        yield
