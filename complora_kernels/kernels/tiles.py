"""The tiles of the large products, and which of them a model of the chip expects to take least time.

One program computes a tile [BLOCK_M, BLOCK_OUT] of the output and sums BLOCK_IN of the inner dimension at a time. The
model is a function of shapes and of the chip alone: nothing is measured and nothing is kept, so that two runs choose
alike. Its cycles are no measurement. With c programs at a time on a multiprocessor (SM), n programs for each SM and

    loop    = ceil(inner / BLOCK_IN) steps, each as long as the slower of its multiply-adds and its loads from the L2
    outside = the first loads, the stores, and what else is read or drawn outside of the loop

an SM is busy for `max(n loop + outside, ceil(n / c) (loop + outside))` cycles: programs that share an SM share its
rate, and each hides what the others do outside of their loops. Imports no Triton.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

MAX_INSIDE_R = 64  # ranks that h and g have inside the kernel of a large product
MAX_BLOCK_R = {torch.float32: 16, torch.bfloat16: 64, torch.float16: 64}  # float32 has no tensor cores: fewer registers


class Tiles(NamedTuple):
    """The tiles of a large product: [BLOCK_M, BLOCK_OUT] of the output, BLOCK_IN of the inner dimension at a time."""

    block_m: int
    block_out: int
    block_in: int
    num_warps: int
    num_stages: int


class Chip(NamedTuple):
    """What the model knows of a chip: its data sheet, and rates of the L2 and the memory as others have measured."""

    processors: int  # SMs, where no device says how many
    multiply_adds: int  # of half-precision operands, a cycle and SM
    cache_bytes: int  # that an SM loads from the L2 in a cycle
    memory_bytes: int  # of the memory's in a cycle, an SM's share
    shared: int  # KiB of an SM
    registers: int = 65536  # of an SM, or of what takes its place: CDNA's compute unit, RDNA's pair of them
    warp_size: int = 32


class LargeProduct(NamedTuple):
    """A product [rows, inner] x [inner, columns] as its tiles see it."""

    rows: int
    columns: int  # of all groups
    inner: int
    groups: int  # of columns, which no tile crosses: each has its adapter
    rank: int  # of the low-rank term
    itemsize: int  # bytes of an element of the operands
    moved: int  # bytes that an element of the output costs outside of the loop: it is stored, a residual is read
    masks: int = 0  # dropout masks of the output that are drawn outside of the loop
    crowded: bool = False  # whether a mask needs registers beside the accumulator

    @property
    def dtype(self) -> torch.dtype:
        """One that has tiles of its own: those of bfloat16 are float16's."""
        return torch.float32 if self.itemsize == 4 else torch.bfloat16


class Choice(NamedTuple):
    """Tiles for a product, and what the model expects of them on a number of SMs."""

    tiles: Tiles
    programs: int
    resident: int  # programs at a time on an SM
    waves: float  # programs for each SM; the busiest has the next whole number
    utilisation: float  # the product's multiply-adds, of those that all SMs do in as many whole tiles as the busiest
    cycles: float  # modelled

    def __str__(self) -> str:
        tiles = "{}x{}x{}, {} warps, {} stages".format(*self.tiles)
        return f"{tiles}: {self.programs} programs, {self.waves:.2f} waves, {self.utilisation:.0%} of the SMs"


# By the oldest chip that a row is for. The rate of the L2 limits what large tiles reach: 5.5 TB/s on an H100.
CHIPS = {
    120: Chip(170, 512, 20, 4, 100),
    100: Chip(148, 4096, 36, 28, 228),
    90: Chip(132, 2048, 32, 19, 228),
    89: Chip(128, 512, 16, 3, 100),
    80: Chip(108, 1024, 40, 10, 164),
    0: Chip(1, 64, 64, 64, 64),  # the interpreter: it has one tile
    "gfx942": Chip(304, 1024, 54, 8, 64, 131072, 64),
    "gfx950": Chip(256, 2048, 54, 13, 160, 131072, 64),
    "gfx1100": Chip(48, 512, 64, 8, 128, 196608),
    "gfx1201": Chip(32, 1024, 64, 7, 128, 196608),
}
LATENCY = 1500  # cycles until the first loads are there and after the last store was issued
MASK_CYCLES = 0.09  # of an element of a mask: 11 instructions, of which an SM issues 128 in a cycle
REGISTERS = 110  # a thread, beside its accumulator

# By the oldest chip that a row is for. `make aot` prints what each costs in registers and shared memory.
HALF_TILES = {
    120: (Tiles(128, 128, 32, 8, 3), Tiles(64, 128, 32, 4, 4)),  # has the shared memory of 89
    100: (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 4)),
    90: (
        Tiles(128, 256, 64, 8, 3),
        Tiles(128, 128, 64, 4, 3),  # two at a time on an SM
        Tiles(128, 128, 64, 8, 4),
        Tiles(64, 256, 64, 8, 4),
        Tiles(64, 128, 64, 4, 4),
    ),
    89: (Tiles(128, 128, 32, 8, 3), Tiles(64, 128, 32, 4, 4)),
    80: (Tiles(128, 128, 32, 8, 4), Tiles(64, 128, 32, 4, 4)),
    0: (Tiles(32, 32, 32, 4, 1),),
    # AMD's CDNA and RDNA keep one stage of a loop in registers, on its way to 64 KiB of shared memory.
    "gfx9": (Tiles(128, 128, 64, 8, 2), Tiles(128, 128, 32, 4, 2), Tiles(64, 128, 32, 4, 2)),
    "gfx1": (Tiles(128, 128, 32, 8, 2), Tiles(64, 128, 32, 8, 2)),
}
FLOAT32_TILES = {
    80: (Tiles(64, 64, 32, 4, 3),),
    0: (Tiles(32, 32, 32, 4, 1),),
    "gfx9": (Tiles(64, 64, 32, 4, 2),),
    "gfx1": (Tiles(64, 64, 16, 8, 2),),
}

# Loads of single elements need an address each: registers that larger tiles do not leave.
UNALIGNED_TILES = Tiles(64, 64, 32, 4, 2)


def tiles_of(chip: int | str, dtype: torch.dtype, *, crowded: bool = False) -> tuple[Tiles, ...]:
    """The tiles that ship for a chip.

    A kernel is crowded when it needs a mask beside its accumulator. It has the largest tiles of at most 64 elements a
    thread: others spill registers there.
    """
    table = FLOAT32_TILES if dtype == torch.float32 else HALF_TILES
    tiles = table[_row(table, chip)]
    small = tuple(t for t in tiles if t.block_m * t.block_out < 128 * 32 * t.num_warps)
    return small[:1] if crowded else tiles


@functools.lru_cache
def model_of(chip: int | str) -> Chip:
    """What the model knows of a chip (90 for compute capability 9.0, "gfx942"), or of Nvidia's one before it."""
    return CHIPS[_row(CHIPS, chip)]


def fits_inside(rank: int, dtype: torch.dtype, dropout_p: float) -> bool:
    """Whether h or g can be computed in the kernel of the large product, with the registers that its tile leaves."""
    return dtype != torch.float32 and rank <= (32 if dropout_p > 0 else MAX_INSIDE_R)


def resident(tiles: Tiles, product: LargeProduct, chip: int | str) -> int:
    """Programs at a time on an SM, by the registers of its threads and by shared memory."""
    model, area, edges = model_of(chip), tiles.block_m * tiles.block_out, tiles.block_m + tiles.block_out
    threads = model.warp_size * tiles.num_warps
    registers = min(255, area // threads + REGISTERS)
    ranks = max(16, min(1 << (product.rank - 1).bit_length(), MAX_INSIDE_R))
    shared = edges * product.itemsize * (tiles.num_stages * tiles.block_in + ranks)
    return max(1, min(model.registers // (-(-registers // 8) * 8 * threads), model.shared * 1024 // (shared + 1024)))


def expected(tiles: Tiles, product: LargeProduct, chip: int | str, processors: int) -> Choice:
    """What the model expects of some tiles."""
    model, area, edges = model_of(chip), tiles.block_m * tiles.block_out, tiles.block_m + tiles.block_out
    across = product.groups * math.ceil(product.columns // product.groups / tiles.block_out)
    programs = math.ceil(product.rows / tiles.block_m) * across
    busiest, together = math.ceil(programs / processors), resident(tiles, product, chip)
    rate = model.multiply_adds if product.itemsize == 2 else model.multiply_adds / 16  # float32: without tensor cores
    step = max(area * tiles.block_in / rate, edges * tiles.block_in * product.itemsize / model.cache_bytes)
    loop = math.ceil(product.inner / tiles.block_in) * step
    outside = LATENCY + area * (product.moved / model.memory_bytes + product.masks * MASK_CYCLES)
    cycles = max(busiest * loop + outside, math.ceil(busiest / together) * (loop + outside))
    whole = max(1, busiest * processors * area)
    return Choice(tiles, programs, together, programs / processors, product.rows * product.columns / whole, cycles)


@functools.lru_cache(maxsize=4096)
def choose_tiles(product: LargeProduct, chip: int | str, processors: int) -> Choice:
    """The tiles that the model expects to take least time; the first of equals.

    A function of its arguments alone. Tiles of a plan that was measured come before it (`launch.tiles_for`).
    """
    candidates = tiles_of(chip, product.dtype, crowded=product.crowded)
    return min((expected(t, product, chip, processors) for t in candidates), key=lambda choice: choice.cycles)


def _row(table: dict[Any, Any], chip: int | str) -> int | str:
    if isinstance(chip, str):
        return chip if chip in table else chip[:4]
    return max(oldest for oldest in table if isinstance(oldest, int) and oldest <= chip)
