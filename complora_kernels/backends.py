"""Which backends there are, which can run here, and why not the others: `python -m complora_kernels.backends`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

ENVIRONMENT_VARIABLE = "COMPLORA_BACKEND"


class Backend(NamedTuple):
    """One way to compute the package's operations."""

    purpose: str
    unavailable: Callable[[], str | None]  # why it cannot run here, or None


BACKENDS = {
    "torch": Backend("folded factors on torch's own products, any device and dtype", lambda: None),
    "reference": Backend("the formulas in plain PyTorch, for comparison", lambda: None),
}
AUTO_ORDER = ("torch",)


def resolve(backend: str | None = None) -> str:
    """The name of the backend to use: the argument, else `COMPLORA_BACKEND`, else the first that can run here.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that was asked for by name cannot run here; the message gives the reason.
    """
    source = "backend" if backend is not None else ENVIRONMENT_VARIABLE
    name = backend if backend is not None else os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if name == "auto":
        return next(candidate for candidate in AUTO_ORDER if BACKENDS[candidate].unavailable() is None)
    if name not in BACKENDS:
        raise ValueError(f"{source}={name!r}, expected one of auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unavailable()
    if reason is not None:
        raise RuntimeError(f"{source}={name!r} cannot run here: {reason}")
    return name


def main() -> None:
    """Prints the table."""
    chosen = resolve()
    for name, backend in BACKENDS.items():
        reason = backend.unavailable()
        state = "in use" if name == chosen else "available" if reason is None else f"unavailable: {reason}"
        print(f"{name:<10} {state:<10} {backend.purpose}")


if __name__ == "__main__":
    main()
