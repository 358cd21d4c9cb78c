"""Prints which backends can run here, and why not the others, and the plans in use."""

from __future__ import annotations

import sys

import torch

from complora_kernels import backends
from complora_kernels.backends import REFERENCE, REGISTRY, build, plans


def main() -> None:
    """Prints all tables; a backend that was asked for and cannot be had is an error below them."""
    chosen: dict[str, list[str]] = {}
    error = None
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def unsupported(backend: backends.Backend) -> str | None:
        return backend.unsupported_tensors("x", [torch.empty(0, device=device)])

    try:
        for operation in backends.OPERATIONS:
            names = [
                backends.resolve(None, operation, unsupported, backends.skipped(operation, device, dropping))
                for dropping in (False, True)
            ]
            chosen.setdefault(names[0], []).append(operation)
            if names[1] != names[0]:
                chosen.setdefault(names[1], []).append(f"{operation} with dropout")
    except (ValueError, RuntimeError) as refusal:
        error = str(refusal)
    rows = [(name, backend.purpose, backend.unavailable(), backend.automatic) for name, backend in REGISTRY.items()]
    rows.append((REFERENCE, "the formulas in plain PyTorch, for comparison", None, True))
    for name, purpose, reason, automatic in rows:
        usable = "available" if automatic else "available by name"
        state = "in use" if name in chosen else usable if reason is None else "unavailable"
        print(f"{name:<10} {state:<18} {purpose}{'' if reason is None else f': {reason}'}")
    for name, operations in chosen.items():
        if len(chosen) > 1:
            print(f"on {device:<7} {name:<18} {', '.join(operations)}")
    print("\nextension")
    print("\n".join(build.describe()))
    print("\nplans")
    print("\n".join(plans.describe()))
    if error is not None:
        sys.exit(f"\n{error}")


if __name__ == "__main__":
    main()
