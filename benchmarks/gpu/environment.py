"""What Triton needs beside a GPU, and how much of what it compiles it finds in its cache.

`python -m benchmarks.gpu.environment` says what is missing, in no time: it imports neither torch nor Triton.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

Row = dict[str, Any]

NEEDS = (
    "Triton builds its driver module with them when a kernel is first launched, and before version 3.7 a launcher for "
    "each kernel's signature; without them no kernel of this package runs"
)


def compiler() -> Row:
    """Whether there are a C compiler and Python's headers."""
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    command, headers = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"), Path(paths["include"])
    missing = [] if command else ["no C compiler (gcc, clang or CC)"]
    missing += [] if (headers / "Python.h").exists() else [f"no Python.h in {headers}"]
    row = {"what": "C compiler and Python's headers", "compiler": command or "", "headers": str(headers)}
    return row | {"ok": not missing, **({"error": f"{' and '.join(missing)}: {NEEDS}"} if missing else {})}


def versions() -> Row:
    """Those of everything that a result depends on."""
    import torch
    import triton

    from benchmarks import machine

    described = machine.describe() | {"triton": triton.__version__, "cudnn": torch.backends.cudnn.version()}
    try:
        smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.strip()
    except OSError:
        smi = "no nvidia-smi"
    return {"what": "versions", **described, "nvidia-smi": smi}


class Compilations:
    """Counts what Triton compiles, and what it finds compiled in its cache, from now on."""

    def __init__(self) -> None:
        from triton import knobs

        self.compiled: list[str] = []
        self.found = 0
        knobs.compilation.listener = self

    def __call__(self, *, src: Any, cache_hit: bool, **_: Any) -> None:
        if cache_hit:
            self.found += 1
        else:
            self.compiled.append(src.name)

    def row(self) -> Row:
        """What was counted since the last row."""
        row = {"compiled": len(self.compiled), "found_compiled": self.found}
        self.compiled, self.found = [], 0
        return row


if __name__ == "__main__":
    sys.exit(compiler().get("error", 0))
