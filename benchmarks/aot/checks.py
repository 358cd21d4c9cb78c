"""What is wrong with a kernel's machine code, whatever its budget says."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from benchmarks.aot.chips import BY_NAME
from benchmarks.aot.compiled import Kernel

# Blocks of four warps on which a launcher counts when it cuts its work, a multiprocessor: `PROGRAMS` of its file over
# 132. Of eight warps it counts on one: `da.WIDE_PROGRAMS`.
BLOCKS_ASSUMED = {
    "activation_bwd_kernel": 2,
    "norm_bwd_da_kernel": 2,
    "packed_lora_linear_da_kernel": 2,
    "packed_lora_linear_grads_kernel": 2,
}
HOPPER_ON = ("sm_90", "sm_100")  # the chips for which `PROGRAMS` is chosen


class Violation(NamedTuple):
    """A broken rule. `rule` is what an exception names."""

    rule: str
    what: str


class Except(NamedTuple):
    """Kernels that may break a rule, and why."""

    rule: str
    kernels: str  # a pattern of `Kernel.key`
    reason: str
    chips: tuple[str, ...] = ()  # none: all

    def covers(self, kernel: Kernel, violation: Violation) -> bool:
        here = not self.chips or kernel.chip in self.chips
        return here and self.rule == violation.rule and fnmatchcase(kernel.key, self.kernels)


def violations(kernel: Kernel) -> Iterator[Violation]:
    """The rules that a kernel breaks.

    compiles       the compiler took it
    spills         no register is spilled
    shared memory  a block may ask for so much
    tensor cores   a half-precision product uses them
    narrow loads   no thread loads 4 bytes or less of a tile in the main loop
    early product  no product and no wait for one before the first load
    late loads     nothing is loaded behind the main loop but a float32 residual
    blocks         a multiprocessor holds the blocks that the launcher counts on

    Of AMD's machine code the first four are asked: nobody has read more of it.
    """
    chip = next(chip for chip in BY_NAME.values() if chip.name == kernel.chip)
    if kernel.error:
        yield Violation("compiles", kernel.error)
        return
    if kernel.spilled:
        yield Violation("spills", f"{kernel.spilled} bytes spilled")
    if kernel.shared > chip.shared_limit * 1024:
        yield Violation("shared memory", f"{kernel.shared} bytes a block, the limit is {chip.shared_limit * 1024}")
    is_half = "bfloat16" in kernel.key or "float16" in kernel.key
    if is_half and kernel.name.startswith("packed_lora_linear") and not kernel.tensor_cores:
        yield Violation("tensor cores", "no tensor core instruction")
    loop = kernel.loop
    if chip.is_amd or loop is None:
        return
    if loop.narrow:
        yield Violation("narrow loads", f"{loop.narrow} loads of 4 bytes or less a thread in the main loop")
    if loop.products and loop.early:
        yield Violation("early product", f"{loop.early[0]} before the first load")
    if loop.products and loop.late and "residual float32" not in kernel.key:
        yield Violation("late loads", f"{loop.late} global loads behind the main loop")
    assumed = min(BLOCKS_ASSUMED.get(kernel.name, 0), 2 if kernel.warps == 4 else 1)
    if kernel.chip in HOPPER_ON and kernel.blocks < assumed and loop.products:
        yield Violation("blocks", f"{kernel.blocks} on a multiprocessor, the launcher counts on {assumed}")
