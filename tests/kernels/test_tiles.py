"""The choice of tiles: a function of shapes and of the chip, and what a launcher makes of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from complora_kernels.kernels import launch
from complora_kernels.kernels.tiles import (
    CHIPS,
    FLOAT32_TILES,
    HALF_TILES,
    UNALIGNED_TILES,
    LargeProduct,
    Tiles,
    choose_tiles,
    expected,
    resident,
    tiles_of,
)

WIDE, SQUARE, SMALL = Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 4, 3), Tiles(64, 128, 64, 4, 4)


def product(rows: int = 4096, columns: int = 768, inner: int = 768, **others: object) -> LargeProduct:
    return LargeProduct(rows, columns, inner, groups=1, rank=16, itemsize=2, moved=2)._replace(**others)


@pytest.mark.parametrize(
    ("of", "tiles"),
    [
        (product(50432, 3072), WIDE),  # many waves: the fewest bytes for each output
        (product(6304, 768), SQUARE),  # 150 wide tiles would take two waves of 132, of which one is nearly empty
        (product(512, 512, 512), SMALL),  # at most one program for each SM: the shortest
    ],
)
def test_tiles_follow_the_shape(of, tiles):
    assert choose_tiles(of, 90, 132).tiles == tiles


def test_tiles_follow_the_number_of_processors():
    """128 wide tiles: one wave of 132, two of 114."""
    of = product(128 * 32, 256 * 4, 4096)
    assert choose_tiles(of, 90, 132).tiles == WIDE
    assert choose_tiles(of, 90, 114).tiles != WIDE


@pytest.mark.parametrize("chip", sorted(set(CHIPS) - {0}, key=str))
@pytest.mark.parametrize("itemsize", [2, 4])
def test_what_is_chosen_ships_for_the_chip(chip, itemsize):
    for rows in (0, 1, 63, 6304, 10**7):
        for crowded in (False, True):
            of = product(rows, itemsize=itemsize, crowded=crowded)
            assert choose_tiles(of, chip, CHIPS[chip].processors).tiles in tiles_of(chip, of.dtype, crowded=crowded)


def test_the_interpreter_has_small_tiles():
    assert choose_tiles(product(10**6), 0, 132).tiles == Tiles(32, 32, 32, 4, 1)


def test_the_model_of_one_wave():
    """12 steps of 384 x 64 x 2 bytes at 32 a cycle, then 1,500 cycles and 64 KiB at 19 a cycle."""
    choice = expected(WIDE, product(128 * 32, 256 * 4), 90, 132)
    assert (choice.programs, choice.resident, choice.waves) == (128, 1, 128 / 132)
    assert choice.utilisation == pytest.approx(128 / 132)
    assert choice.cycles == pytest.approx(12 * 1536 + 1500 + 128 * 256 * 2 / 19)


def test_programs_that_share_a_processor_hide_what_is_outside_of_the_loop():
    of = product(128 * 132, 128 * 4)  # four programs for each SM
    choice = expected(SQUARE, of, 90, 132)
    loop, outside = 12 * 1024, 1500 + 128 * 128 * 2 / 19
    assert choice.resident == 2
    assert choice.cycles == pytest.approx(4 * loop + outside)
    alone = expected(SQUARE, of._replace(rank=64), 90, 132)  # 128 KiB of shared memory
    assert alone.resident == 1
    assert alone.cycles == pytest.approx(4 * (loop + outside))


def test_groups_are_not_crossed():
    assert expected(WIDE, product(128, 3 * 300, groups=3), 90, 132).programs == 6
    assert expected(WIDE, product(128, 3 * 300), 90, 132).programs == 4


def test_masks_and_residuals_cost_time():
    cycles = [expected(WIDE, product(**more), 90, 132).cycles for more in ({}, {"moved": 6}, {"masks": 3})]
    assert cycles[0] < min(cycles[1:])


def test_no_more_programs_than_registers_and_shared_memory_allow():
    assert resident(SQUARE, product(), 90) == 2
    assert resident(Tiles(64, 64, 32, 4, 2), product(), 90) == 3  # of 142 registers, rounded up to 144
    assert resident(Tiles(128, 128, 64, 4, 6), product(), 90) == 1  # 192 KiB


def test_a_launcher_takes_the_tiles_of_a_plan_first(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "chip", lambda _: 90)
    x = torch.empty(6304, 768, dtype=torch.bfloat16)
    of, operands = product(6304), (x, torch.empty(768, 768, dtype=torch.bfloat16))
    assert launch.processors(x.device) == 132
    assert launch.tiles_for(operands, of, None) == SQUARE
    assert launch.tiles_for(operands, of, tuple(WIDE)) == WIDE
    assert launch.tiles_for(operands, of, (16, 16, 16, 4, 1)) == SQUARE  # of another version: it does not ship
    assert WIDE not in tiles_of(90, of.dtype, crowded=True)
    assert launch.tiles_for(operands, of._replace(crowded=True), tuple(WIDE)) in tiles_of(90, of.dtype, crowded=True)
    for unaligned in (x[:, 1:], torch.empty(6304, 767, dtype=x.dtype)):
        assert launch.tiles_for((unaligned, operands[1]), of, tuple(WIDE)) == UNALIGNED_TILES


def test_every_chip_with_tiles_has_a_model():
    families = {chip[:4] if isinstance(chip, str) else chip for chip in CHIPS}
    assert families == set(HALF_TILES) == set(HALF_TILES) | set(FLOAT32_TILES)


@pytest.mark.parametrize("chip", [chip for chip in CHIPS if isinstance(chip, str)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("crowded", [False, True])
def test_tiles_of_amd_fit_its_shared_memory(chip, dtype, crowded):
    tiles = tiles_of(chip, dtype, crowded=crowded)
    assert tiles
    assert all((t.block_m + t.block_out) * t.block_in * dtype.itemsize <= 64 * 1024 for t in tiles)


def test_the_chip_of_rocm_is_its_name(monkeypatch):
    launch.capability.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "7.0")
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    assert launch.capability(0) == "gfx942"
    assert not launch.has_tf32()
    assert not launch.has_ptx()
    assert launch.stages(3) == 2
    launch.capability.cache_clear()
