"""Compiles every Triton kernel that ships for the chips it ships for, on a machine without a GPU: `make aot`.

The launching functions run as on a GPU, but a driver that knows its chip by name alone stands in for CUDA's, and each
launch ends when its kernel is compiled. The table shows registers a thread, bytes spilled, shared memory and the tensor
core instructions in the machine code. A spill, shared memory over the chip's limit, or a large half-precision product
without tensor cores is a failure.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear

CHIPS = (80, 89, 90, 100)
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB that a block may ask for
TOKENS, WIDTH = 512, 768
TENSOR_CORES = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b")


class Launch(NamedTuple):
    """One call of a launching function, at a shape and dtype of CLIP."""

    label: str
    call: Callable[[], object]


class Compiled(NamedTuple):
    """What the compiler made of one kernel."""

    chip: int
    kernel: str
    label: str
    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes a block
    tensor_cores: str
    failure: str


class ChipDriver:
    """Stands in for the driver of a chip that is not there."""

    def __init__(self, chip: int) -> None:
        self.chip = chip

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.chip, 32)

    def get_current_device(self) -> int:
        return self.chip

    def get_current_stream(self, _device: int) -> int:
        return 0


def launches(chip: int) -> Iterator[Launch]:
    """Every kernel and variant, at the width of ViT-B/16 and a few hundred tokens: the code knows no larger numbers."""
    from complora_kernels.kernels import factors

    for adapters, r, p in ((1, 16, 0.0), (1, 16, 0.25), (1, 16, 0.1), (3, 16, 0.0), (3, 16, 0.25), (3, 64, 0.25)):
        yield from products(chip, torch.bfloat16, adapters, r, p)
    for r, p in ((64, 0.0), (32, 0.25)):  # the highest that are computed inside
        yield from products(chip, torch.bfloat16, 1, r, p)
    yield from products(chip, torch.float16, 3, 16, 0.25)
    for p in (0.0, 0.25):
        yield from products(chip, torch.float32, 3, 16, p)
    for size in (1, 137):
        yield from unfriendly(torch.bfloat16, size)
    yield from norms()
    yield from activations()
    yield from residuals(chip)
    yield from folds()
    A, B, basis = torch.empty(16, WIDTH), torch.empty(WIDTH, 16), torch.empty(WIDTH, WIDTH // 2)
    for dtype in (torch.float32, torch.bfloat16):
        fold = ([A, B], [None, basis], [False, False], [False, True], 1.0, dtype)
        yield Launch(f"to {dtype}", partial(factors.fold_factors, *fold))
        gradients = [A.to(dtype), B.to(dtype)]
        yield Launch(f"from {dtype}", partial(factors.fold_factors, gradients, *fold[1:-1], torch.float32))
        plain = (gradients, [None, None], *fold[2:-1], torch.float32)
        yield Launch(f"from {dtype}, not projected", partial(factors.fold_factors, *plain))
        product = AdaptedLinear(torch.empty(WIDTH, WIDTH), None, [A.to(dtype)], [B.to(dtype)], [(0, WIDTH)])
        yield Launch(f"to {dtype}", partial(factors.merge_weight, product, dtype))


def folds() -> Iterator[Launch]:
    """Folds of many layers, whose programs sum over all of d: both sides, every block, bases that are not aligned."""
    from complora_kernels.kernels import factors

    many = 64
    for r, k in itertools.product((2, 16, 32, 64), (WIDTH // 2, WIDTH // 2 + 1)):
        A, B, basis = torch.empty(r, WIDTH), torch.empty(WIDTH, r), torch.empty(WIDTH, k)
        fold = ([A, B] * many, [basis] * 2 * many, [False] * 2 * many, [False, True] * many, 1.0, torch.bfloat16)
        yield Launch(f"both sides of {many} layers, r={r} k={k}", partial(factors.fold_factors, *fold))


def products(chip: int, dtype: torch.dtype, adapters: int, r: int, p: float) -> Iterator[Launch]:
    """The kernels of one adapted product and its gradients, with every tile that ships for one adapter."""
    from complora_kernels.kernels import linear, reductions

    empty = partial(torch.empty, dtype=dtype)
    x, dY, h = empty(TOKENS, WIDTH), empty(TOKENS, adapters * WIDTH), empty(TOKENS, adapters * r)
    product = adapted(empty(adapters * WIDTH, WIDTH), adapters, r, p, bias=empty(adapters * WIDTH))
    case = f"{dtype} P={adapters} r={r} p={p}"
    yield Launch(case, partial(linear.packed_lora_linear_h, x, product))
    own = product._replace(columns=torch.empty(TOKENS, adapters * r, dtype=torch.bool))
    yield Launch(f"{case}, own columns", partial(linear.packed_lora_linear_h, x, own))
    yield Launch(f"{case}, copies x", partial(linear.packed_lora_linear_h, x, product, beside_x=True))
    yield Launch(case, partial(reductions.packed_lora_linear_da, x, h, product))
    for tiles in linear.tiles_of(chip, dtype)[: None if adapters == 1 and r == 16 and p in (0, 0.25) else 1]:
        cut = f"{case}, {tiles.block_m}x{tiles.block_out}x{tiles.block_in}"
        for which, given in (("given", h), ("inside", None)):
            fwd = partial(linear.packed_lora_linear_fwd, x, product, given, tiles=tiles)
            dx = partial(linear.packed_lora_linear_dx, dY, product, given, tiles=tiles)
            if given is not None or linear.fits_inside(r, dtype, p):
                yield Launch(f"{cut}, h {which}", fwd)
                yield Launch(f"{cut}, g {which}", dx)
    if p == 0:
        for outputs in (("g", "dB"), ("g",), ("dB",)):
            wanted = {f"compute_{name}": name in outputs for name in ("g", "dB")}
            db = partial(reductions.packed_lora_linear_db, dY, h, product, **wanted)
            yield Launch(f"{case}, {' and '.join(outputs)}", db)
        apart, both = dY.chunk(adapters, 1), {"compute_g": True, "compute_dB": True}
        for name in ("partial_g", "pack", "beside"):
            db = partial(reductions.packed_lora_linear_db, apart, h, product, **both, **{name: True})
            yield Launch(f"{case}, {name}", db)
    grads = partial(reductions.packed_lora_linear_grads, reductions.Source(x, h, product), (dY, h, product))
    yield Launch(f"{case}, dA and dB", grads)


def unfriendly(dtype: torch.dtype, size: int) -> Iterator[Launch]:
    """Sizes that no tile divides; one is a constant to Triton."""
    from complora_kernels.kernels import linear, reductions

    x, h = torch.empty(size, size, dtype=dtype), torch.empty(size, 1, dtype=dtype)
    case = f"{dtype} all sizes {size}, r=1"
    for p in (0.0, 0.25):
        product = adapted(x, 1, 1, p, bias=x[0])
        yield Launch(case, partial(linear.packed_lora_linear_h, x, product))
        yield Launch(case, partial(reductions.packed_lora_linear_da, x, h, product))
        for given in (h, None):
            yield Launch(case, partial(linear.packed_lora_linear_fwd, x, product, given))
            yield Launch(case, partial(linear.packed_lora_linear_dx, x, product, given))
    product = adapted(x, 1, 1, 0.0)
    yield Launch(case, partial(reductions.packed_lora_linear_db, x, h, product, compute_g=True, compute_dB=True))


def adapted(weight: Tensor, adapters: int, r: int, p: float, bias: Tensor | None = None) -> AdaptedLinear:
    """A product whose adapters divide the rows of a weight [N, K] among them."""
    N, K = weight.shape
    height = N // adapters
    As = [weight.new_empty(r, K) for _ in range(adapters)]
    Bs = [weight.new_empty(height, r) for _ in range(adapters)]
    rows = [(i * height, (i + 1) * height) for i in range(adapters)]
    return AdaptedLinear(weight, bias, As, Bs, rows, p, [torch.zeros(1, dtype=torch.int64)] if p else [])


def norms() -> Iterator[Launch]:
    """LayerNorms of a block at the widths of CLIP towers, and the gradients of the factors behind them."""
    from complora_kernels.kernels import norm, reductions

    bf16 = torch.bfloat16
    streams = ((bf16, bf16), (torch.float32, bf16), (torch.float32, torch.float32))
    for (stream, dtype), width in itertools.product(streams, (512, WIDTH, 1280, 1664, 137)):
        x, n, statistics = (
            torch.empty(TOKENS, width, dtype=stream),
            torch.empty(TOKENS, width, dtype=dtype),
            torch.empty(TOKENS),
        )
        weight, bias = torch.empty(width), torch.empty(width)
        case = f"{stream} to {dtype}, K={width}"
        for delta, what in ((None, ""), (n, ", delta")):
            yield Launch(f"{case}{what}", partial(norm.norm_fwd, x, delta, weight, bias, 1e-5, dtype, None))
        for d_stream, what in ((None, ""), (x, ", d_stream")):
            bwd = partial(norm.norm_bwd, n, d_stream, x, statistics, statistics, weight)
            yield Launch(f"{case}{what}", bwd)
        for adapters, r, p in ((1, 16, 0.0), (3, 16, 0.0), (3, 16, 0.25), (1, 64, 0.1)):
            reader = adapted(torch.empty(adapters * width, width, dtype=dtype), adapters, r, p)
            g = torch.empty(TOKENS, adapters * r, dtype=dtype)
            product = f"{case}, P={adapters} r={r} p={p}"
            if dtype == bf16:
                for rows in (TOKENS, 64 * TOKENS):  # 16 or 64 rows a program
                    tensors = (torch.empty(rows, width, dtype=stream), torch.empty(rows, width, dtype=dtype))
                    fwd = partial(norm.norm_fwd, *tensors, weight, bias, 1e-5, dtype, reader)
                    yield Launch(f"{product}, M={rows}", fwd)
            saved = (statistics, statistics, weight, bias)
            da = partial(reductions.packed_lora_linear_da, x, g, reader, norm=saved)
            yield Launch(f"{product}, normed", da)


def activations() -> Iterator[Launch]:
    """The activations of an MLP, and the gradients of the factors behind them."""
    from complora_kernels.kernels import activation, reductions

    kinds = itertools.product((torch.bfloat16, torch.float32), activation.KINDS, (4 * WIDTH, 137))
    for dtype, kind, width in kinds:
        z = torch.empty(TOKENS, width, dtype=dtype)
        case = f"{dtype} {kind}, K={width}"
        yield Launch(case, partial(activation.activation_fwd, z, kind, None))
        yield Launch(case, partial(activation.activation_bwd, z, z, kind))
        for r, p in ((16, 0.0), (16, 0.25), (64, 0.1)):
            reader, g = adapted(torch.empty(width, width, dtype=dtype), 1, r, p), torch.empty(TOKENS, r, dtype=dtype)
            yield Launch(f"{case}, r={r} p={p}", partial(activation.activation_fwd, z, kind, reader))
            da = partial(reductions.packed_lora_linear_da, z, g, reader, activation=kind)
            yield Launch(f"{case}, r={r} p={p}", da)


def residuals(chip: int) -> Iterator[Launch]:
    """The product that closes a block, with every tile that ships."""
    from complora_kernels.kernels import linear

    streams = ((torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float32,) * 2)
    for stream, dtype in streams:
        x, weight, bias = (
            torch.empty(*shape, dtype=dtype) for shape in ((TOKENS, 4 * WIDTH), (WIDTH, 4 * WIDTH), (WIDTH,))
        )
        product = adapted(weight, 1, 16, 0.0, bias)
        h, residual = torch.empty(TOKENS, 16, dtype=dtype), torch.empty(TOKENS, WIDTH, dtype=stream)
        for tiles in linear.tiles_of(chip, dtype, crowded=True):
            case = f"{dtype}, residual {stream}, {tiles.block_m}x{tiles.block_out}x{tiles.block_in}"
            fwd = partial(linear.packed_lora_linear_fwd, x, product, h, residual=residual, tiles=tiles)
            yield Launch(case, fwd)


def compile_for(chip: int) -> list[Compiled]:
    """Compiles all launches for one chip."""
    import triton
    from triton.runtime.jit import JITFunction

    from complora_kernels.kernels import launch

    run = JITFunction.run
    compiled: dict[int, tuple[str, Any]] = {}
    failures = []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(id(kernel), (label, kernel))

    triton.runtime.driver.set_active(ChipDriver(chip))  # type: ignore[arg-type]
    with patch.object(JITFunction, "run", compile_only), patch.object(launch, "chip", lambda _device: chip):
        for label, call in launches(chip):
            try:
                call()
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error)[:300]}"
                failures.append(Compiled(chip, "?", label, 0, 0, 0, "", reason))
    return [inspect(chip, label, kernel) for label, kernel in compiled.values()] + failures


def inspect(chip: int, label: str, kernel: Any) -> Compiled:
    """Reads the machine code."""
    import triton

    name = kernel.metadata.name
    cuobjdump = Path(triton.__path__[0], "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-res-usage", "-sass", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", code)}
    spilled = max(resources["STACK"], resources["LOCAL"], len(re.findall(r"\bSTL\b", code)))
    found = sorted(set(TENSOR_CORES.findall(code)))
    limit = SHARED_LIMIT[chip] * 1024
    failure = ""
    if spilled:
        failure = f"{spilled} bytes spilled"
    elif kernel.metadata.shared > limit:
        failure = f"{kernel.metadata.shared} bytes of shared memory, the limit is {limit}"
    elif "float16" in label and "packed_lora_linear" in name and not found:
        failure = "no tensor core instruction"
    return Compiled(chip, name, label, resources["REG"], spilled, kernel.metadata.shared, " ".join(found), failure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--chips", type=int, nargs="+", default=CHIPS, choices=SHARED_LIMIT, help="compute capabilities, as 90"
    )
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    failed = []
    with ProcessPoolExecutor() as pool:
        for rows in pool.map(compile_for, arguments.chips):
            for row in sorted(rows, key=lambda row: (row.kernel, row.label)):
                line = (
                    f"sm_{row.chip:<4} {row.kernel:<34} {row.label:<44} {row.registers:>4} registers "
                    f"{row.shared / 1024:6.1f} KiB  {row.tensor_cores:<12} {row.failure}"
                )
                print(line)
                failed += [line] if row.failure else []
    if failed:
        sys.exit("\n".join([f"{len(failed)} kernels failed:", *failed]))


if __name__ == "__main__":
    main()
