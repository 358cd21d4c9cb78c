"""Reads machine code: its instructions, its loops, and what the main loop does. NVIDIA's SASS and AMD's assembly."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_SASS = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_ASSEMBLY = re.compile(r"^\s+([a-z]\w*)(?:\s+([^;]*?))?\s*(?:;.*)?$")
_LABEL = re.compile(r"^(\.L\w+):")
_BRANCH_TARGET = re.compile(r"(?:0x([0-9a-f]+)|(\.L\w+))\s*$")
_AMD_BYTES = {"dwordx4": 16, "b128": 16, "dwordx3": 12, "b96": 12, "dwordx2": 8, "b64": 8, "dword": 4, "b32": 4}
_SASS_BYTES = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
BULK = 128  # bytes: what is more than a thread's share, a tile that the tensor memory accelerator fetches


class Instruction(NamedTuple):
    """One instruction, with the index of the instruction that it branches to."""

    opcode: str
    operands: str
    target: int | None = None

    @property
    def on_tensor_cores(self) -> bool:
        base = self.opcode.split(".")[0]
        return base in ("HMMA", "HGMMA") or re.match(r"UTC\w*MMA|v_(mfma|smfmac|wmma)_", base) is not None

    @property
    def loads(self) -> int:
        """The bytes of global memory that one thread loads; `BULK` for a tile; 0: no such load."""
        base, *parts = self.opcode.split(".")
        if base in ("LDG", "LDGSTS"):
            return next((_SASS_BYTES[part] for part in parts if part in _SASS_BYTES), 4)
        if base in ("UTMALDG", "UBLKCP"):
            return BULK
        if re.match(r"(global|buffer|flat)_load_", base):
            return _AMD_BYTES.get(base.rsplit("_", 1)[1], 2)
        return 0

    @property
    def is_asynchronous(self) -> bool:
        return self.opcode.split(".")[0] in ("LDGSTS", "UTMALDG", "UBLKCP") or "_load_lds_" in self.opcode

    @property
    def stores(self) -> bool:
        return re.match(r"STG\b|UTMASTG|(global|buffer|flat)_store_", self.opcode) is not None

    @property
    def waits_for_product(self) -> bool:
        return self.opcode.startswith("WARPGROUP.DEPBAR")

    @property
    def is_special(self) -> bool:
        """Whether the unit for exponentials, roots and reciprocals computes it, a quarter as fast as the others."""
        return re.match(r"MUFU\b|v_(exp|log|rcp|rsq|sqrt|sin|cos)_(f|bf)", self.opcode) is not None


class Loop(NamedTuple):
    """The instructions from `first` to the branch back at `last`."""

    first: int
    last: int

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def parse_sass(text: str) -> list[Instruction]:
    """The instructions of one kernel as `cuobjdump -sass` prints it."""
    found = [(int(address, 16), opcode, operands.strip()) for address, opcode, operands in _SASS.findall(text)]
    index_of = {address: index for index, (address, _, _) in enumerate(found)}

    def target(opcode: str, operands: str) -> int | None:
        address = _BRANCH_TARGET.search(operands) if opcode.split(".")[0] == "BRA" else None
        return None if address is None else index_of.get(int(address[1] or "0", 16))

    return [Instruction(opcode, operands, target(opcode, operands)) for _, opcode, operands in found]


def parse_amdgcn(text: str) -> list[Instruction]:
    """The instructions of one kernel in the assembly that LLVM writes."""
    found: list[tuple[str, str]] = []
    index_of: dict[str, int] = {}
    for line in text.split(".Lfunc_end", 1)[0].splitlines():
        if label := _LABEL.match(line):
            index_of[label[1]] = len(found)
        elif (instruction := _ASSEMBLY.match(line)) and "_" in instruction[1]:
            found.append((instruction[1], (instruction[2] or "").strip()))

    def target(opcode: str, operands: str) -> int | None:
        return index_of.get(operands) if "branch" in opcode else None

    return [Instruction(opcode, operands, target(opcode, operands)) for opcode, operands in found]


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """All branches back, but for the endless one behind the end of a kernel."""
    return [Loop(i.target, index) for index, i in enumerate(code) if i.target is not None and i.target < index]


def innermost(found: Sequence[Loop]) -> list[Loop]:
    """The loops that hold no other one of them."""
    return [loop for loop in found if not any(loop.holds(other) for other in found)]


def main_loop(code: Sequence[Instruction]) -> Loop | None:
    """The innermost loop with the most tensor core instructions; without any of them the longest innermost one.

    Of loops with such instructions those that load in advance come first: the sum over the adapters' masks does not.
    """
    found = loops(code)
    busy = innermost([loop for loop in found if count(code, loop, lambda i: i.on_tensor_cores)])
    busy = [loop for loop in busy if count(code, loop, lambda i: i.is_asynchronous)] or busy

    def key(loop: Loop) -> tuple[int, int]:
        return count(code, loop, lambda i: i.on_tensor_cores), loop.last - loop.first

    return max(busy or innermost(found), key=key, default=None)


def storing_loop(code: Sequence[Instruction]) -> Loop | None:
    """The longest innermost loop that stores to global memory."""
    storing = innermost([loop for loop in loops(code) if count(code, loop, lambda i: i.stores)])
    return max(storing, key=lambda loop: loop.last - loop.first, default=None)


def count(code: Sequence[Instruction], loop: Loop | None, is_counted: Callable[[Instruction], bool]) -> int:
    """How many instructions of a loop (None: of the whole kernel) are of one kind."""
    part = code if loop is None else code[loop.first : loop.last + 1]
    return sum(map(is_counted, part))


class MainLoop(NamedTuple):
    """What the main loop does, counted by its instructions, and what stands before and behind it."""

    instructions: int
    products: int  # tensor core instructions
    wide: int  # global loads of 16 bytes a thread, or of whole tiles
    narrow: int  # asynchronous ones of 4 bytes a thread or less, and others where no load is wider
    early: tuple[str, ...]  # tensor core instructions, and waits for them, before the first load
    late: int  # global loads behind the loop, but of partial sums that other programs stored


def describe(code: Sequence[Instruction]) -> MainLoop | None:
    """The main loop of a kernel; None without a loop."""
    loop = main_loop(code)
    if loop is None:
        return None
    body = code[loop.first : loop.last + 1]
    asynchronous = [i.is_asynchronous for i in code]
    first = asynchronous.index(True) if any(asynchronous) else next((i for i, c in enumerate(code) if c.loads), 0)
    widths = [i.loads for i in body if i.loads]
    narrow = [i.loads for i in body if 0 < i.loads <= 4 and (i.is_asynchronous or max(widths) <= 4)]
    return MainLoop(
        instructions=len(body),
        products=sum(i.on_tensor_cores for i in body),
        wide=sum(width >= 16 for width in widths),
        narrow=len(narrow),
        early=tuple(i.opcode for i in code[:first] if i.on_tensor_cores or i.waits_for_product),
        late=sum(i.loads > 0 and ".STRONG" not in i.opcode for i in code[loop.last + 1 :]),
    )
