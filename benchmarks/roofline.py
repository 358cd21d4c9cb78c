"""How long launches would take on an H200 by their operations and bytes: a model, of which nothing was measured there.

    matrix products   waves of tiles over 132 multiprocessors at the rate of a large product, or their bytes; where
                      ours compute the factors' gradients, too, what these read again is added to the waves
    attention         its operations at a rate of its own, or its bytes
    everything else   bytes over the rate of a large copy, each tensor once: caches save nothing, programs that read
                      again cost nothing, and instructions hide behind memory

and for each launch the time in which one kernel ends and the next begins. A step that Python launches takes at least
the host's time. Numbers stand in `ASSUMED`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from benchmarks.dispatch import ATTENTION, Launch, Memory


class Assumed(NamedTuple):
    """A number that the model takes from elsewhere."""

    value: float
    what: str
    source: str


PUBLISHED = "assumed, to be measured by `make gpu`"
ASSUMED = {
    "products": Assumed(695e12, "operations a second of a large bfloat16 product (cuBLAS)", PUBLISHED),
    "memory": Assumed(4.3e12, "bytes a second of a large copy, read and written", PUBLISHED),
    "attention": Assumed(450e12, "operations a second of attention at 197 tokens (cuDNN), for everyone", PUBLISHED),
    "multiprocessors": Assumed(132, "multiprocessors", "the data sheet"),
    "ours": Assumed(0.85, "of that rate in the main loop of our own products", "an estimate"),
    "tile": Assumed(2e-6, "seconds of a tile of ours before its first product and after its last", "3,500 cycles"),
    "between": Assumed(1e-6, "seconds between two kernels of a full queue or a CUDA graph", "an estimate"),
    "host": Assumed(15e-6, "seconds of the host for a launch of eager torch, its Python included", "an estimate"),
}
# Tiles of cuBLAS, and their share of its rate: smaller ones read more for each product.
TILES = ((128, 256, 1.0), (256, 128, 1.0), (128, 128, 0.9), (64, 256, 0.8))
SKINNY = 64  # products with a side of at most so many are bound by memory
PARTS = ("products", "attention", "skinny products", "elementwise and norms", "fold", "the rest")


def assumed(name: str) -> float:
    return ASSUMED[name].value


def sides(launch: Launch) -> tuple[int, int, int] | None:
    """M, N and K of a product of two matrices; None of another operation."""
    if not launch.operations or launch.kernel in ATTENTION:
        return None
    if launch.triton:
        return launch.numbers["M"], launch.numbers["N"], launch.numbers["K"]
    result = launch.shapes[-1]
    if len(result) != 2:
        return None
    M, N = result
    return M, N, round(launch.operations / (2 * M * N))


def part_of(launch: Launch) -> str:
    """The part of a step's table that a launch belongs to."""
    kernel, product = launch.kernel, sides(launch)
    if kernel in ATTENTION:
        return "attention"
    if "fold" in kernel:
        return "fold"
    if product is not None:
        return "products" if min(product[:2]) > SKINNY else "skinny products"
    if launch.operations:
        return "products"  # a convolution
    if launch.triton:
        return "elementwise and norms" if kernel.startswith(("norm", "activation")) else "skinny products"
    return "elementwise and norms" if launch.fusible else "the rest"


def seconds(launch: Launch) -> float:
    """What a launch takes on the GPU."""
    return max(_computing(launch), launch.bytes / assumed("memory")) + assumed("between")


def _computing(launch: Launch) -> float:
    product, rate = sides(launch), assumed("products")
    if launch.kernel in ATTENTION:
        return launch.operations / assumed("attention")
    if product is None or min(product) <= SKINNY:
        return launch.operations / rate if product is None else 0.0
    M, N, K = product
    units, blocks = assumed("multiprocessors"), launch.numbers
    if not launch.triton:  # the best of its tiles
        cuts = ((math.ceil(M / m) * math.ceil(N / n), m * n, share) for m, n, share in TILES)
        return min(math.ceil(tiles / units) * 2 * tile * K / (share * rate / units) for tiles, tile, share in cuts)
    # Ours: of tiles below 128·256 two share a multiprocessor, and hide each other's beginning and end.
    columns = blocks["BLOCK_N"] if launch.kernel.endswith("fwd_kernel") else blocks["BLOCK_K"]
    inner, tile = (K if launch.kernel.endswith("fwd_kernel") else N), blocks["BLOCK_M"] * columns
    together = 1 if tile >= 128 * 256 else 2
    programs = blocks.get("dx_programs", math.prod(launch.grid))
    waves = math.ceil(programs / (units * together))
    loops = waves * (together * 2 * tile * inner / (assumed("ours") * rate / units) + assumed("tile"))
    return loops + _behind_loops(launch) / assumed("memory")


def _behind_loops(launch: Launch) -> float:
    """Bytes that a product of ours reads for the gradients of the factors, when its loops no longer hide them.

    A tile of x for dÃ behind each tile of dX, and all of dY once more for dB̃.
    """
    numbers, size = launch.numbers, 2  # bytes of an element in half precision
    if "dx_programs" not in numbers:
        return 0.0
    of_x = numbers["M"] * numbers["K"] if numbers["COMPUTE_DA"] else 0
    of_dY = numbers["M"] * numbers["N"] if numbers["COMPUTE_DB"] else 0
    return float(size * (of_x + of_dY))


@dataclass(frozen=True)
class Modelled:
    """A step: seconds on the GPU by part, and of the host."""

    parts: dict[str, float]
    launches: int
    graphed: bool

    @property
    def host(self) -> float:
        return 0.0 if self.graphed else self.launches * assumed("host")

    @property
    def total(self) -> float:
        return max(sum(self.parts.values()), self.host)


def modelled(launches: Sequence[Launch], *, graphed: bool = False) -> Modelled:
    """The step that makes these launches, by Python or as one CUDA graph."""
    parts: dict[str, float] = defaultdict(float)
    for launch in launches:
        parts[part_of(launch)] += seconds(launch)
    return Modelled(dict(parts), len(launches), graphed)


def compiled(launches: Sequence[Launch]) -> list[Launch]:
    """The launches with neighbouring elementwise operations and norms joined, as a compiler does at its best.

    A joined launch reads what others have written, once, and writes what others read.
    """
    last_read: dict[int, int] = {}  # address -> the last launch that reads it
    for number, launch in enumerate(launches):
        last_read |= {memory.address: number for memory in launch.reads}
    joined: list[Launch] = []
    run: list[tuple[int, Launch]] = []

    def end() -> None:
        if run:
            joined.append(_joined(run, last_read))
            run.clear()

    for number, launch in enumerate(launches):
        if launch.fusible:
            run.append((number, launch))
        else:
            end()
            joined.append(launch)
    end()
    return joined


def _joined(run: Sequence[tuple[int, Launch]], last_read: dict[int, int]) -> Launch:
    reads: dict[int, Memory] = {}
    writes: dict[int, Memory] = {}
    for _, launch in run:
        reads |= {memory.address: memory for memory in launch.reads if memory.address not in writes}
        writes |= {memory.address: memory for memory in launch.writes}
    end = run[-1][0]
    kept = tuple(memory for address, memory in writes.items() if last_read.get(address, end + 1) > end)
    first = run[0][1]
    return replace(first, kernel="joined", reads=tuple(reads.values()), writes=kept)
