"""The figures of machine code that `make aot` holds: `benchmarks/budgets.toml`, its comparison and its renewal.

A figure may get worse by its tolerance. Registers are allocated to threads in eights, so that a change within eight
changes nothing. The schedule of the compiler moves the length of a loop by a few instructions when an address is
computed otherwise: 5%. Everything else is exact.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.aot.checks import Except
from benchmarks.aot.compiled import Kernel
from benchmarks.aot.launches import is_held
from benchmarks.comparison import tomllib

PATH = Path(__file__).parent.with_name("budgets.toml")
LOWER_IS_BETTER = ("registers", "shared", "loop", "narrow", "instructions", "special")
HIGHER_IS_BETTER = ("blocks", "products", "wide")
TOLERANCE = {"loop": 1.05, "instructions": 1.05}

Figures = Mapping[str, float]


class Budgets(NamedTuple):
    """The file: the Triton it was made with, the figures by chip and kernel, and the exceptions to the rules."""

    triton: str
    figures: Mapping[str, Mapping[str, Figures]]
    exceptions: Sequence[Except]


class Move(NamedTuple):
    """One figure that is not what the file says."""

    chip: str
    kernel: str
    figure: str  # "" for a kernel that one of the two does not have
    before: float | None
    now: float | None
    is_worse: bool

    def __str__(self) -> str:
        verdict = "worse" if self.is_worse else "better" if self.figure in LOWER_IS_BETTER + HIGHER_IS_BETTER else ""
        if not self.figure:
            change = "has no budget" if self.before is None else "has a budget and was not compiled"
            return f"{self.chip:<8} {self.kernel:<72} {change}"
        return f"{self.chip:<8} {self.kernel:<72} {self.figure:<12} {self.before:>8g} -> {self.now:<8g} {verdict}"


def figures(kernel: Kernel) -> dict[str, float]:
    """The figures of a kernel that a budget holds."""
    held: dict[str, float] = {
        "registers": kernel.registers,
        "shared": kernel.shared,
        "blocks": kernel.blocks,
    }
    if kernel.loop is not None:
        loop = kernel.loop
        held |= {"loop": loop.instructions, "products": loop.products, "wide": loop.wide, "narrow": loop.narrow}
    if kernel.per_element is not None:
        held |= kernel.per_element._asdict()
    return {name: value for name, value in held.items() if value}


def held(kernels: Iterable[Kernel]) -> dict[str, dict[str, dict[str, float]]]:
    """The figures of the kernels that the file holds, by chip and key, sorted."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for kernel in sorted(kernels, key=lambda kernel: (kernel.chip, kernel.key)):
        if is_held(kernel.label) and not kernel.error:
            lines = found.setdefault(kernel.chip, {})
            key, copies = kernel.key, 1
            while key in lines:  # one launch, two specializations
                copies += 1
                key = f"{kernel.key} ({copies})"
            lines[key] = figures(kernel)
    return found


def compare(budget: Mapping[str, Mapping[str, Figures]], now: Mapping[str, Mapping[str, Figures]]) -> list[Move]:
    """Every figure that moved, of the chips that were compiled; a kernel that one side lacks is worse, too."""
    moves = []
    for chip, kernels in now.items():
        before = budget.get(chip, {})
        for key in sorted({*kernels, *before}):
            if key not in kernels or key not in before:
                moves.append(Move(chip, key, "", 1 if key in before else None, 1 if key in kernels else None, True))
                continue
            for name in (*LOWER_IS_BETTER, *HIGHER_IS_BETTER):
                old, new = before[key].get(name, 0), kernels[key].get(name, 0)
                if old != new:
                    moves.append(Move(chip, key, name, old, new, is_worse(name, old, new)))
    return moves


def is_worse(figure: str, budget: float, now: float) -> bool:
    """Whether a figure is worse than its budget by more than its tolerance."""
    if figure in HIGHER_IS_BETTER:
        return now < budget
    if figure == "registers":
        return math.ceil(now / 8) > math.ceil(budget / 8)
    return now > budget * TOLERANCE.get(figure, 1)


def load(path: Path = PATH) -> Budgets:
    """The committed budgets."""
    content = tomllib.loads(path.read_text())
    exceptions = [Except(**{**e, "chips": tuple(e.get("chips", ()))}) for e in content.get("exception", ())]
    figures = {chip: lines for chip, lines in content.items() if chip not in ("triton", "exception")}
    return Budgets(content["triton"], figures, exceptions)


def save(budgets: Budgets, path: Path = PATH) -> None:
    """Writes the budgets: a line for each kernel, so that a difference can be read."""
    lines = [
        "# What compiled kernels cost: `make aot` holds it, `make aot ARGS=--update` rewrites it. Not measured.",
        "#",
        "# registers a thread, shared: bytes a block, blocks: that one multiprocessor holds; of the main loop: its",
        "# instructions, products: those for tensor cores, wide: global loads of 16 bytes a thread or of a whole tile,",
        "# narrow: of 4 bytes or less; of elementwise kernels: instructions and special functions an element.",
        f"triton = {json.dumps(budgets.triton)}",
    ]
    for exception in sorted(budgets.exceptions):
        lines += ["", "[[exception]]"]
        for name, value in exception._asdict().items():
            if value:
                lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
    for chip, kernels in sorted(budgets.figures.items()):
        lines += ["", f"[{chip}]"]
        for key, line in sorted(kernels.items()):
            pairs = ", ".join(f"{name} = {value:g}" for name, value in line.items())
            lines.append(f"{json.dumps(key)} = {{ {pairs} }}")
    path.write_text("\n".join(lines) + "\n")
