"""The chips that the kernels are compiled for: what one of their multiprocessors holds, and a driver for each."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """A GPU, and what a multiprocessor of it holds: NVIDIA's SM, CDNA's compute unit, RDNA's pair of them (WGP)."""

    name: str  # as in the budgets: "sm_90", "gfx942"
    backend: str  # Triton's
    arch: int | str  # Triton's, and `launch.chip`'s
    warp_size: int
    shared_limit: int  # KiB of shared memory that a block may ask for
    shared: int  # KiB of shared memory that all blocks have
    warps: int  # NVIDIA: that may be resident; AMD: on each SIMD
    blocks: int

    @property
    def is_amd(self) -> bool:
        return self.backend == "hip"

    def blocks_of(self, registers: int, shared: int, warps: int) -> int:
        """The blocks that one multiprocessor holds, by registers a thread, bytes of shared memory and warps a block.

        Registers are allocated in eights. An SM has 65,536, a SIMD of CDNA 512 for each lane and one of RDNA 1,536.
        CUDA keeps 1 KiB of shared memory for each block.
        """
        registers = max(8, math.ceil(registers / 8) * 8)
        if self.is_amd:
            of_simd = min(self.warps, (512 if self.warp_size == 64 else 1536) // registers)
            return min(4 * of_simd // warps, self.blocks, self.shared * 1024 // max(shared, 1))
        by_registers = 65536 // (registers * 32 * warps)
        return min(by_registers, self.warps // warps, self.blocks, self.shared * 1024 // (shared + 1024))


def _nvidia(arch: int, shared_limit: int, shared: int, warps: int, blocks: int) -> Chip:
    return Chip(f"sm_{arch}", "cuda", arch, 32, shared_limit, shared, warps, blocks)


def _amd(arch: str, warp_size: int, shared_limit: int, shared: int, warps: int) -> Chip:
    return Chip(arch, "hip", arch, warp_size, shared_limit, shared, warps, 32)


_ALL = (
    _nvidia(80, 163, 164, 64, 32),
    _nvidia(86, 99, 100, 48, 16),
    _nvidia(89, 99, 100, 48, 24),
    _nvidia(90, 227, 228, 64, 32),
    _nvidia(100, 227, 228, 64, 32),
    _nvidia(120, 99, 100, 48, 24),
    _amd("gfx942", 64, 64, 64, 8),  # CDNA 3: MI300
    _amd("gfx950", 64, 160, 160, 8),  # CDNA 4: MI350
    _amd("gfx1100", 32, 64, 128, 16),  # RDNA 3: Radeon RX 7900
    _amd("gfx1201", 32, 64, 128, 16),  # RDNA 4: Radeon RX 9070
)
BY_NAME = {str(chip.arch): chip for chip in _ALL}


class ChipDriver:
    """Stands in for the driver of a chip that is not there."""

    def __init__(self, chip: int | str) -> None:
        self.chip = BY_NAME[str(chip)]
        self.index = list(BY_NAME).index(str(self.chip.arch))

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.chip.backend, self.chip.arch, self.chip.warp_size)

    def get_current_device(self) -> int:
        return self.index  # Triton keeps what it compiled by device

    def get_current_stream(self, _device: int) -> int:
        return 0
