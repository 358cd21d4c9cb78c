"""Compiles all launches for one chip, and gathers what `make aot` reports of each kernel."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.aot import machine_code
from benchmarks.aot.chips import BY_NAME, Chip, ChipDriver
from benchmarks.aot.launches import is_held, launches
from benchmarks.aot.machine_code import Instruction, MainLoop


class PerElement(NamedTuple):
    """What an elementwise kernel issues for one element of its tile."""

    instructions: float
    special: float  # exponentials, roots and reciprocals


class Kernel(NamedTuple):
    """What the compiler made of one kernel."""

    chip: str
    name: str
    label: str
    registers: int = 0  # a thread
    spilled: int = 0  # bytes of local memory a thread
    shared: int = 0  # bytes a block
    warps: int = 4  # of a block
    blocks: int = 0  # that one multiprocessor holds
    tensor_cores: str = ""  # the instructions for them
    loop: MainLoop | None = None
    per_element: PerElement | None = None
    error: str = ""  # why it was not compiled

    @property
    def key(self) -> str:
        """Its name and label, shortened: a line of the budgets."""
        name = self.name.removeprefix("packed_lora_linear_").removesuffix("_kernel")
        return f"{name} {self.label}".replace("torch.", "")


def compile_for(chip: str, held_alone: bool = False, only: str = "*") -> list[Kernel]:
    """Compiles the launches for one chip, of AMD's always the held ones alone. What does not compile has its error.

    `only`: a pattern of `Kernel.key`. Triton hands out the same kernel for launches that differ in nothing it knows: it
    has the label of the first one, or of the first that the budgets hold.
    """
    import triton
    from triton.runtime.jit import JITFunction

    from complora_kernels.kernels import launch

    os.environ.pop("TRITON_INTERPRET", None)
    target = BY_NAME[chip]
    run = JITFunction.run
    compiled: dict[int, tuple[Any, int]] = {}  # each kernel and its row, by its identity
    rows: list[Kernel] = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if not fnmatchcase(Kernel(target.name, self.__name__, label).key, only):
            return
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        _, row = compiled.setdefault(id(kernel), (kernel, len(rows)))
        if row == len(rows):
            rows.append(inspect(target, label, kernel, options))
        elif is_held(label) and not is_held(rows[row].label):
            rows[row] = rows[row]._replace(label=label)

    triton.runtime.driver.set_active(ChipDriver(target.arch))  # type: ignore[arg-type]
    hip = "7.0" if target.is_amd else None  # what torch says of itself decides what kernels may hold
    with (
        patch.object(JITFunction, "run", compile_only),
        patch.object(launch, "chip", lambda _device: target.arch),
        patch.object(torch.version, "hip", hip),
    ):
        for label, call in launches(target.arch):
            if (held_alone or target.is_amd) and not is_held(label):
                continue
            try:
                call()
            except Exception as error:
                rows.append(Kernel(target.name, "?", label, error=f"{type(error).__name__}: {str(error)[-300:]}"))
    return rows


def inspect(chip: Chip, label: str, kernel: Any, options: Mapping[str, Any]) -> Kernel:
    """Reads a compiled kernel; `options` are its constexprs."""
    registers, spilled, code = (_read_amdgcn if chip.is_amd else _read_cubin)(kernel)
    metadata = kernel.metadata
    return Kernel(
        chip=chip.name,
        name=metadata.name,
        label=label,
        registers=registers,
        spilled=spilled,
        shared=metadata.shared,
        warps=metadata.num_warps,
        blocks=chip.blocks_of(registers, metadata.shared, metadata.num_warps),
        tensor_cores=" ".join(sorted({i.opcode.split(".")[0] for i in code if i.on_tensor_cores})),
        loop=machine_code.describe(code),
        per_element=per_element(metadata.name, code, options, metadata.num_warps * chip.warp_size),
    )


def per_element(name: str, code: list[Instruction], options: Mapping[str, Any], threads: int) -> PerElement | None:
    """What the loop that stores, or a kernel without a loop, issues for an element; None where products dominate."""
    if not name.startswith(("activation_", "norm_")):
        return None
    elements = options.get("ROWS", options.get("BLOCK_M", 1)) * options["BLOCK_K"] / threads  # of one thread
    loop = machine_code.storing_loop(code)
    instructions = machine_code.count(code, loop, lambda i: not i.opcode.startswith("NOP"))
    special = machine_code.count(code, loop, lambda i: i.is_special)
    return PerElement(round(instructions / elements, 1), round(special / elements, 2))


def _read_cubin(kernel: Any) -> tuple[int, int, list[Instruction]]:
    """Registers a thread, bytes spilled and the instructions."""
    import triton

    cuobjdump = Path(triton.__path__[0], "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    code = machine_code.parse_sass(text)
    stored = sum(i.opcode.split(".")[0] == "STL" for i in code)
    return resources["REG"], max(resources["STACK"], resources["LOCAL"], stored), code


def _read_amdgcn(kernel: Any) -> tuple[int, int, list[Instruction]]:
    """Vector registers a thread, those spilled and bytes of scratch memory, and the instructions."""
    text = kernel.asm["amdgcn"]
    resources = {key: int(value) for key, value in re.findall(r"\.(\w+_count|\w+_fixed_size): +(\d+)", text)}
    spilled = max(resources["vgpr_spill_count"], resources["private_segment_fixed_size"])
    return resources["vgpr_count"], spilled, machine_code.parse_amdgcn(text)
