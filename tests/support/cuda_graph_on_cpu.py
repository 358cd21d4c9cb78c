"""CUDA graphs without a GPU: operations are recorded while a function runs, and a replay repeats them in their memory.

As in a real graph, tensors are known by their memory and all else (numbers, shapes, which operations) stays as it was;
reading a value on the host ends a capture; what the graph computed before it was captured reads as NaN. Other than a
real capture, this one also executes: whoever captures restores what that changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from complora_kernels import graphs
from complora_kernels.kernels import fold_programs
from complora_kernels.modules import truncation

# `.item()`; the seed of the torch backend, made of numbers that a CUDA generator keeps on the host.
ON_THE_HOST = ("aten::_local_scalar_dense", "complora::dropout_seed", "aten::equal", "aten::nonzero")


class Call(NamedTuple):
    operation: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    outputs: list[Tensor]  # those in memory of their own


class Recording(TorchDispatchMode):
    """Keeps every operation with its tensors; so their memory is not given to others."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> Any:
        options = options or {}
        if operation.name().partition(".")[0] in ON_THE_HOST:
            raise RuntimeError(f"operation not permitted when stream is capturing: {operation.name()}")
        inputs = {memory(tensor) for tensor in tensors_in((arguments, options))}
        result = operation(*arguments, **options)
        if not operation.name().startswith("profiler::"):
            outputs = [tensor for tensor in tensors_in(result) if memory(tensor) not in inputs]
            if outputs or operation._schema.is_mutable:  # else views
                self.calls.append(Call(operation, arguments, options, outputs))
        return result

    def replay(self) -> None:
        with torch.no_grad():
            for operation, arguments, options, outputs in self.calls:
                inputs = {memory(tensor) for tensor in tensors_in((arguments, options))}
                results = tensors_in(operation(*arguments, **options))
                fresh = [tensor for tensor in results if memory(tensor) not in inputs]
                for output, tensor in zip(outputs, fresh, strict=True):
                    output.copy_(tensor)


class CUDAGraphsOnCPU:
    """In the place of `graphs.CUDAGraphs`, for tensors on the CPU."""

    device_type = "cpu"
    capturing = False

    def __init__(self, device: torch.device) -> None:
        pass

    def warm_up(self, run: Callable[[], Any]) -> None:
        for _ in range(graphs.WARM_UPS):
            run()

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        recording = Recording()
        CUDAGraphsOnCPU.capturing = True
        try:
            with recording:
                result = run()
        finally:
            CUDAGraphsOnCPU.capturing = False
        with torch.no_grad():
            for output in [output for call in recording.calls for output in call.outputs]:
                if output.is_floating_point():
                    output.fill_(torch.nan)
        return recording.replay, result


@contextmanager
def cuda_graphs_on_cpu() -> Iterator[None]:
    """The CPU is the device that graphs are for, and its tensors count as a device's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "CUDAGraphs", CUDAGraphsOnCPU)
        patch.setattr(truncation, "is_on_device", lambda _text: True)
        patch.setattr(truncation, "_is_capturing", lambda _text: CUDAGraphsOnCPU.capturing)
        patch.setattr(fold_programs, "is_capturing", lambda _device: CUDAGraphsOnCPU.capturing)
        yield


def tensors_in(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
