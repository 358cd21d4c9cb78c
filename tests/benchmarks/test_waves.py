"""The table of waves: what falls below the lowest utilisation has its reason, and the reasons are true."""

from __future__ import annotations

import math

import pytest

from benchmarks import waves
from complora_kernels.kernels.tiles import choose_tiles, expected, tiles_of

TABLE = waves.table()


def test_every_product_is_in_the_table():
    assert {row.product for row in TABLE} == {f"{layer}{end}" for layer in waves.LAYERS for end in ("", " dX")}
    assert {(row.tower, row.batch) for row in TABLE} >= {(t, b) for t in waves.TOWERS for b in (32, 256)}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.tower} {row.batch} {row.product}")
def test_a_low_utilisation_has_its_reason(row):
    low = row.choice.utilisation < waves.LOWEST
    assert bool(row.reason) == low
    if low:
        assert (row.choice.waves < 1) == (row.reason == waves.FEW)


def test_reasons_belong_to_rows():
    assert set(waves.REASONS) <= {row[:3] for row in TABLE}


def test_no_tiles_that_ship_are_modelled_faster():
    """Where programs are counted one by one, as the kernels cut the product."""
    for tower, (width, tokens) in waves.TOWERS.items():
        for batch in waves.BATCHES.get(tower, (32, 256)):
            for _, product in waves.products(width, batch * tokens):
                choice = choose_tiles(product, waves.CHIP, waves.PROCESSORS)
                for tiles in tiles_of(waves.CHIP, product.dtype):
                    assert expected(tiles, product, waves.CHIP, waves.PROCESSORS).cycles >= choice.cycles
                height, width_of_tile, group = *choice.tiles[:2], product.columns // product.groups
                programs = sum(
                    len(range(0, group, width_of_tile))
                    for _ in range(0, product.rows, height)
                    for _ in range(0, product.columns, group)
                )
                assert choice.programs == programs
                share = programs / (math.ceil(programs / waves.PROCESSORS) * waves.PROCESSORS)
                inside = product.rows * product.columns / (programs * height * width_of_tile)
                assert choice.utilisation == pytest.approx(share * inside)


def test_the_table_is_printed(capsys):
    waves.main()
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("modelled")
    assert len(lines) == len(TABLE)
