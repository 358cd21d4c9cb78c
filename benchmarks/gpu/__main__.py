"""The first run on a GPU: `python -m benchmarks.gpu --results FOLDER --limit SECONDS`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import environment
from benchmarks.gpu.program import UNFINISHED, Log, run

SETTLES = 10  # seconds, at the end, for what was begun with a small estimate


def main(arguments: Sequence[str] | None = None) -> int:
    """Exits with 0 when all is done and right, 1 when something failed, 3 when entries wait for another call."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--results", type=Path, required=True, help="the folder of the file that keeps the rows")
    parser.add_argument("--limit", type=float, default=220.0, help="seconds that all of it may take (220)")
    parser.add_argument("--cache", type=Path, help="what `make gpu-cache` has packed")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)  # of a process that takes over
    parser.add_argument("--call", default=time.strftime("%Y-%m-%dT%H:%M:%S"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    until = options.until or time.time() + options.limit
    compiler = environment.compiler()

    import torch

    from benchmarks import machine
    from benchmarks.gpu import cache
    from benchmarks.gpu.entries import entries
    from benchmarks.gpu.problems import Bench

    name = machine.name({"cpu": "cpu", **({"gpu": torch.cuda.get_device_name()} if machine.on_gpu() else {})})
    word = "-".join("".join(c if c.isalnum() else " " for c in name).lower().split())
    log = Log(options.results / f"first-{word}-{machine.revision()}.jsonl", options.call)
    log.write("environment", compiler)
    log.write("environment", environment.versions())
    if options.cache is not None and options.cache.exists():
        log.write("environment", cache.unpack(options.cache))
    compilations = environment.Compilations()

    def alive() -> bool:
        try:
            torch.cuda.synchronize()
        except Exception:
            return False
        return True

    bench = Bench(torch.device("cuda"))
    table = entries(bench)
    torch.manual_seed(0)
    outcome = run(table, bench, log, until - SETTLES, counted=compilations.row, alive=alive)
    if outcome.broken and until - time.time() > 2 * SETTLES:
        sys.stdout.flush()
        again = ["--results", options.results, "--until", until, "--call", options.call]
        again += ["--cache", options.cache] if options.cache is not None else []
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *map(str, again)])
    failing = [*outcome.failed, *([] if compiler["ok"] else ["C compiler"])]
    print(f"{len(table)} entries, failed: {', '.join(failing) or 'none'}; waiting: {len(outcome.waiting)}")
    return 1 if failing or outcome.broken else UNFINISHED if outcome.waiting else 0


if __name__ == "__main__":
    sys.exit(main())
