"""The waves of every large product of CLIP's towers on a GPU of 132 multiprocessors (SMs): `make waves`.

A product is cut into tiles, a program each. The SM with most programs decides how long all take: utilisation is the
share of the tiles' work, edges included, that the product needs of what all SMs could do meanwhile. All of it is
modelled by `complora_kernels.kernels.tiles`, nothing is measured. Where it is below 85% the reason stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from complora_kernels.kernels.tiles import Choice, LargeProduct, choose_tiles

CHIP, PROCESSORS = 90, 132
LOWEST = 0.85
RANK, BYTES = 16, 2  # in bfloat16, the residual stream too
TOWERS = {  # width, and tokens of one image, or of one prompt of 77 cut to the longest
    "ViT-B/16": (768, 197),
    "ViT-B/32": (768, 50),
    "ViT-L/14": (1024, 257),
    "text": (512, 16),
}
BATCHES = {"text": (32, 100, 256, 1000)}  # prompts: as many as there are classes
LAYERS = {"qkv": (1, 3, 3), "o": (1, 1, 1), "fc1": (1, 4, 1), "fc2": (4, 1, 1)}  # K / width, N / width, adapters
TO_THE_RESIDUAL = ("o", "fc2")

FEW = "fewer tiles than SMs: no tiles that ship use more of them and are modelled faster"
LAST = "the last wave is not full: no tiles that ship fill it and are modelled faster"
NARROW = ("qkv dX", "o", "o dX", "fc1 dX", "fc2")  # the products with as many outputs as the tower is wide
REASONS = {
    (tower, batch, product): reason
    for tower, batch, reason, low in (
        ("ViT-B/16", 32, LAST, NARROW),
        ("ViT-B/32", 32, FEW, NARROW),
        ("ViT-B/32", 32, LAST, ("fc1", "fc2 dX")),
        ("ViT-B/32", 256, LAST, ("qkv dX", "fc1 dX", "fc2")),
        ("text", 32, FEW, ("qkv", *NARROW)),
        ("text", 100, FEW, ("qkv", "fc1", "fc2 dX", *NARROW)),
    )
    for product in low
}


class Row(NamedTuple):
    """One product of one tower at one batch."""

    tower: str
    batch: int
    product: str
    choice: Choice

    @property
    def reason(self) -> str:
        """Why its utilisation is low; empty where none is given."""
        return REASONS.get((self.tower, self.batch, self.product), "")


def products(width: int, rows: int) -> Iterator[tuple[str, LargeProduct]]:
    """The forward products of a block and their dX, at a number of rows."""
    for layer, (inner, outputs, adapters) in LAYERS.items():
        K, N = inner * width, outputs * width
        moved = 2 * BYTES if layer in TO_THE_RESIDUAL else BYTES
        yield layer, LargeProduct(rows, N, K, adapters, RANK, BYTES, moved)
        yield f"{layer} dX", LargeProduct(rows, K, N, 1, adapters * RANK, BYTES, BYTES)


def table() -> list[Row]:
    """All products of all towers."""
    return [
        Row(tower, batch, name, choose_tiles(product, CHIP, PROCESSORS))
        for tower, (width, tokens) in TOWERS.items()
        for batch in BATCHES.get(tower, (32, 256))
        for name, product in products(width, batch * tokens)
    ]


def main() -> None:
    """Prints the table."""
    print(f"modelled for sm_{CHIP} with {PROCESSORS} SMs, bfloat16, r={RANK}, h and g given")
    for row in table():
        tiles, programs, resident, waves, utilisation, _ = row.choice
        line = (
            f"{row.tower:<9} {row.batch:>5}  {row.product:<7} {'{}x{}x{}'.format(*tiles[:3]):<11} {resident} at a time "
            f"{programs:>6} programs {waves:>6.2f} waves {utilisation:>5.0%}  {row.reason}"
        )
        print(line.rstrip())


if __name__ == "__main__":
    main()
