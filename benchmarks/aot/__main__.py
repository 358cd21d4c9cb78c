"""`python -m benchmarks.aot`: compiles, prints a line for each kernel, and fails on broken rules and budgets."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatchcase
from functools import partial

from benchmarks import aot
from benchmarks.aot import budgets
from benchmarks.aot.budgets import Budgets
from benchmarks.aot.checks import Except, violations
from benchmarks.aot.chips import BY_NAME
from benchmarks.aot.compiled import Kernel, compile_for

CHIPS = ("80", "89", "90", "100")


def row(kernel: Kernel) -> str:
    """A line of the table."""
    loop, each = kernel.loop, kernel.per_element
    parts = [
        f"{kernel.chip:<8} {kernel.key:<76} {kernel.registers:>4} registers {kernel.shared / 1024:6.1f} KiB",
        f"{kernel.blocks:>2} blocks {kernel.tensor_cores:<10}",
    ]
    if loop is not None:
        parts.append(f"loop {loop.instructions:>4}: {loop.products} products, {loop.wide} wide loads")
    if each is not None:
        parts.append(f"{each.instructions:g} instructions and {each.special:g} special functions an element")
    return " ".join(parts)


def broken(kernels: Iterable[Kernel], exceptions: Sequence[Except]) -> tuple[list[str], list[Except]]:
    """The rules that are broken without an exception, and the exceptions that were needed."""
    failures, needed = [], []
    for kernel in kernels:
        for violation in violations(kernel):
            covering = [exception for exception in exceptions if exception.covers(kernel, violation)]
            needed += covering
            if not covering:
                failures.append(f"{kernel.chip:<8} {kernel.key:<76} {violation.rule}: {violation.what}")
    return failures, [exception for exception in exceptions if exception in needed]


def judge(kernels: Sequence[Kernel], committed: Budgets, triton: str, *, complete: bool) -> list[str]:
    """Prints what moved. What fails: broken rules, exceptions without need, and budgets of this version of Triton.

    `complete`: all chips of the file were compiled, so that an exception that nothing needed is known to be one.
    """
    failures, needed = broken(kernels, committed.exceptions)
    if complete:
        spare = [exception for exception in committed.exceptions if exception not in needed]
        failures += [f"exception without need: {exception.rule}, {exception.kernels}" for exception in spare]
    if triton != committed.triton:
        print(f"\nThe budgets are for Triton {committed.triton}, this is {triton}: the rules alone were checked.")
        return failures
    moves = budgets.compare(committed.figures, budgets.held(kernels))
    if moves:
        print(f"\n{len(moves)} figures moved from benchmarks/budgets.toml (make aot ARGS=--update takes them over):")
        print("\n".join(map(str, sorted(moves, key=lambda move: (not move.is_worse, move.chip, move.kernel)))))
    return failures + [f"{move}" for move in moves if move.is_worse]


def update(kernels: Sequence[Kernel], committed: Budgets, triton: str, *, complete: bool) -> list[str]:
    """Takes the figures of the chips that were compiled over; with all of them drops the exceptions without need."""
    failures, needed = broken(kernels, committed.exceptions)
    figures = {**committed.figures, **budgets.held(kernels)}
    budgets.save(Budgets(triton, figures, needed if complete else committed.exceptions))
    return failures


def matching(committed: Budgets, only: str) -> Budgets:
    """The budgets of the kernels whose key matches a pattern."""
    figures = {
        chip: {key: line for key, line in lines.items() if fnmatchcase(re.sub(r" \(\d+\)$", "", key), only)}
        for chip, lines in committed.figures.items()
    }
    return committed._replace(figures=figures)


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=aot.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--chips", nargs="+", default=CHIPS, choices=BY_NAME, metavar="CHIP", help=f"of {', '.join(BY_NAME)}"
    )
    parser.add_argument("--held", action="store_true", help="compile only what the budgets hold: a fifth of all")
    parser.add_argument("--only", default="*", metavar="GLOB", help='compile only these kernels: "norm_bwd* K=512*"')
    parser.add_argument("--update", action="store_true", help="write the figures to benchmarks/budgets.toml")
    arguments = parser.parse_args()
    every = arguments.only == "*"
    if arguments.update and not every:
        parser.error(f"--update with --only {arguments.only}, expected one of them: it writes a whole chip's figures")
    os.environ.pop("TRITON_INTERPRET", None)
    kernels: list[Kernel] = []
    with ProcessPoolExecutor() as pool:
        for compiled in pool.map(partial(compile_for, held_alone=arguments.held, only=arguments.only), arguments.chips):
            kernels += compiled
            print("\n".join(row(kernel) for kernel in sorted(compiled, key=lambda kernel: kernel.key)), flush=True)
    committed = matching(budgets.load(), arguments.only)
    complete = every and not arguments.held and {*CHIPS} <= {*arguments.chips}
    failures = (update if arguments.update else judge)(kernels, committed, triton.__version__, complete=complete)
    if failures:
        sys.exit("\n".join([f"\n{len(failures)} failures:", *failures]))


if __name__ == "__main__":
    main()
