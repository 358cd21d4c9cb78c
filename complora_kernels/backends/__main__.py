"""Prints which backends can run here, and why not the others, and the plans in use."""

from __future__ import annotations

import sys

import torch

from complora_kernels import backends
from complora_kernels.backends import REFERENCE, REGISTRY, build, plans
from complora_kernels.backends.plans import Problem
from complora_kernels.kernels.tiles import model_of


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
    print("\n".join(["", *tiles()]))
    if error is not None:
        sys.exit(f"\n{error}")


def tiles() -> list[str]:
    """The tiles of the fused kernels for the products of a block of ViT-B/16 at batch 32, on this GPU or an H100."""
    chip, processors = 90, model_of(90).processors
    if torch.cuda.is_available() and torch.version.hip is None:
        (major, minor), processors = (
            torch.cuda.get_device_capability(),
            torch.cuda.get_device_properties().multi_processor_count,
        )
        chip = 10 * major + minor
    lines = [
        f"tiles of the fused kernels, modelled for sm_{chip} with {processors} multiprocessors: ViT-B/16, batch 32"
    ]
    for layer, (K, N, P) in {"qkv": (1, 3, 3), "o": (1, 1, 1), "fc1": (1, 4, 1), "fc2": (4, 1, 1)}.items():
        problem = Problem("triton", "cuda", 32 * 197, 768 * K, 768 * N, 16, P, "bfloat16", "bfloat16", dropout=False)
        lines += [f"{layer:<4} {line}" for line in plans.explain(problem, chip, processors)]
    return lines


if __name__ == "__main__":
    main()
