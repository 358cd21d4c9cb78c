"""The GPUs of this machine, and whether the kernels run on them. Nothing is asked before the first question."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

OLDEST_CHIP = (8, 0)  # compute capability; the kernels need bfloat16 on tensor cores
AMD_CHIPS = ("gfx942", "gfx1100")  # for which `make aot` compiles the kernels; they have run on none


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU: for tests of their numbers, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.lru_cache
def is_missing(package: str) -> bool:
    """Whether a package is not installed; it is not imported."""
    return importlib.util.find_spec(package) is None


@functools.lru_cache
def gpu_unavailable() -> str | None:
    """Why no GPU of this machine runs the kernels, or None."""
    if not torch.cuda.is_available():
        return "there is no CUDA GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU)"
    reasons = [too_old(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@functools.lru_cache
def too_old(index: int | None) -> str | None:
    """Why the kernels do not run on a GPU (None: the current one), or None where they do."""
    if torch.version.hip is not None:
        device = torch.cuda.current_device() if index is None else index
        chip = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return None if chip in AMD_CHIPS else f"the GPU is a {chip}, expected one of {', '.join(AMD_CHIPS)}"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CHIP:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, expected at least 8.0"
    return None


@functools.lru_cache
def chip(name: str) -> int:
    """The chip of a GPU of this machine, by its name: 90 for compute capability 9.0; 0 without one, and under ROCm."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return 0
    named = (i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_name(i) == name)
    capabilities = [torch.cuda.get_device_capability(index) for index in named]
    return max((10 * major + minor for major, minor in capabilities), default=0)


# torch.compile calls these while it traces and takes the results for constants.
interpreted._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
too_old._dynamo_marked_constant = True  # pyright: ignore[reportAttributeAccessIssue]
