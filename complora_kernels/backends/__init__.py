"""Which backends there are, which can run here, and why not the others: `python -m complora_kernels.backends`."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

from complora_kernels.backends import build

ENVIRONMENT_VARIABLE = "COMPLORA_BACKEND"
OLDEST_CHIP = (8, 0)  # compute capability; the kernels need bfloat16 on tensor cores

logger = logging.getLogger("complora_kernels")


class Backend(NamedTuple):
    """One way to compute the package's operations."""

    purpose: str
    unavailable: Callable[[], str | None]  # why it cannot run here, or None
    automatic: Callable[[], bool] = lambda: True  # whether it may be chosen without being asked for by name


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU: for tests of their numbers, thousands of times slower."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _triton_unavailable() -> str | None:
    if _missing("triton"):
        return "triton is not installed"
    return None if interpreted() else _gpu_unavailable()


@functools.lru_cache
def _missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


@functools.lru_cache
def _gpu_unavailable() -> str | None:
    import torch

    if torch.version.hip is not None or not torch.cuda.is_available():
        return "there is no CUDA GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU)"
    reasons = [too_old(index) for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


@functools.lru_cache
def too_old(index: int | None) -> str | None:
    """Why the kernels do not run on a GPU (None: the current one), or None where they do."""
    import torch

    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CHIP:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, expected at least 8.0"
    return None


def gpu_refusal(backend: str, index: int | None) -> str | None:
    """Why the kernels of a backend do not run on a GPU (None: the current one), or None where they do."""
    if backend != "extension":
        return too_old(index)
    import torch

    return build.failure("cuda") or build.chip_refusal(torch.cuda.get_device_capability(index))


def _extension_unavailable() -> str | None:
    return build.failure("cpu")


BACKENDS = {
    "triton": Backend("fused kernels on CUDA GPUs", _triton_unavailable, automatic=lambda: not interpreted()),
    "extension": Backend("compiled C++ and CUDA operations, torch's own large products", _extension_unavailable),
    "torch": Backend("folded factors on torch's own products, any device and dtype", lambda: None),
    "reference": Backend("the formulas in plain PyTorch, for comparison", lambda: None),
}
AUTO_ORDER = ("triton", "extension", "torch")
OPERATIONS = (
    "project_complement",
    "fold_factors",
    "packed_lora_linear",
    "complora_linear",
    "norm_lora_linear",
    "norm_lora_mlp",
)


def passed_over(operation: str, device: str, dropping: bool = False) -> tuple[str, ...]:
    """The backends that "auto" leaves out for an operation, because another one was measured to be faster.

    On the CPU, at the sizes of `benchmarks/bench_factors.py` and `bench_layer.py`, the extension is faster than the
    torch backend where factors are projected and where dropout masks are drawn; else the large products decide, which
    are torch's in any case.
    """
    faster = device != "cpu" or dropping or operation in ("project_complement", "fold_factors")
    return () if faster else ("extension",)


def resolve(
    backend: str | None = None,
    operation: str = "",
    unserved: Callable[[str], str | None] = lambda name: None,
    passed_over: tuple[str, ...] = (),
) -> str:
    """The name of the backend to use: the argument, else `COMPLORA_BACKEND`, else the first that can run here.

    Args:
        backend: a name, "auto" or None.
        operation: what is to be computed, for messages.
        unserved: why a backend does not serve the operation's arguments, or None. The choice passes over such a
            backend and says so once for each reason.
        passed_over: backends that only a choice by name takes for this operation, silently: others are faster.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that was asked for by name cannot run here, or does not serve the arguments; the message
            gives the reason.
    """
    source = "backend" if backend is not None else ENVIRONMENT_VARIABLE
    name = backend if backend is not None else os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if name == "auto":
        for candidate in _usable():
            if candidate in passed_over:
                continue
            reason = unserved(candidate)
            if reason is None:
                return candidate
            _say_once(f"{operation} does not run on the {candidate} backend: {reason}")
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r}, expected one of auto, {', '.join(BACKENDS)}")
    reason = _unavailable(name)
    if reason is not None:
        raise RuntimeError(f"{source}={name!r} cannot run here: {reason}")
    reason = unserved(name)
    if reason is not None:
        raise RuntimeError(f"{source}={name!r} does not serve {operation}: {reason}")
    return name


def _usable() -> list[str]:
    """What "auto" chooses from, in order."""
    return [name for name in AUTO_ORDER if BACKENDS[name].unavailable() is None and BACKENDS[name].automatic()]


def _unavailable(name: str) -> str | None:
    return BACKENDS[name].unavailable()


_said: dict[str, object] = {}  # by message, whose call said it


def _say_once(message: str) -> None:
    call = object()
    if _said.setdefault(message, call) is call:  # one step: of several threads one says it
        logger.warning(message)


# torch.compile calls these while it traces and takes the results for constants.
for _function in (_usable, _unavailable, _say_once, interpreted, too_old, gpu_refusal):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]
