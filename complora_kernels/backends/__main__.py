"""Prints which backends can run here, and why not the others, and the plans in use."""

from __future__ import annotations

import sys

from complora_kernels import backends, plans


def main() -> None:
    """Prints both tables; a backend that was asked for and cannot be had is an error below them."""
    chosen, error = "", None
    try:
        chosen = backends.resolve()
    except (ValueError, RuntimeError) as refusal:
        error = str(refusal)
    for name, backend in backends.BACKENDS.items():
        reason = backend.unavailable()
        usable = "available" if backend.automatic() else "available by name"
        state = "in use" if name == chosen else usable if reason is None else "unavailable"
        print(f"{name:<10} {state:<18} {backend.purpose}{'' if reason is None else f': {reason}'}")
    print("\nplans")
    print("\n".join(plans.describe()))
    if error is not None:
        sys.exit(f"\n{error}")


if __name__ == "__main__":
    main()
