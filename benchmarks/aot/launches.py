"""The launches that are compiled: every kernel and variant that ships."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear

if TYPE_CHECKING:
    from complora_kernels.kernels.beside import Beside

TOKENS, WIDTH = 512, 768
# What matters most: the blocks of ViT-B/16 at rank 16, without dropout and as the default recipe has it.
_HELD = re.compile(
    r"bfloat16 P=(1 r=16 p=0\.0|3 r=16 p=0\.25|3 r=16 p=0\.0, (pack|beside))(?!.*(own columns|copies))"
    r"|bfloat16 P=1 r=16 p=0\.25, .*, dX, dA and dB$"
    r"|bfloat16, residual (bfloat16|float32), "
    r"|bfloat16 to bfloat16, K=768(, delta|, d_stream|, P=3 r=16 p=0\.(0|25).*)?$"
    r"|bfloat16 to bfloat16, K=768, P=1 r=16 p=0\.0, (s twice, n and h|.* and dA)$"
    r"|bfloat16 (quick_)?gelu, K=3072(, r=16 p=0\.(0|25).*)?$"
    r"|(to|from) (float32|bfloat16)(, not projected)?$"
)


class Launch(NamedTuple):
    """One call of a launching function, at a shape and dtype of CLIP."""

    label: str
    call: Callable[[], object]


def is_held(label: str) -> bool:
    """Whether the figures of a launch are held by the budgets; of AMD's chips no others are compiled."""
    return _HELD.match(label.replace("torch.", "")) is not None


def launches(chip: int | str) -> Iterator[Launch]:
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


def products(chip: int | str, dtype: torch.dtype, adapters: int, r: int, p: float) -> Iterator[Launch]:
    """The kernels of one adapted product and its gradients, with every tile that ships for one adapter."""
    from complora_kernels.kernels import linear, linear_bwd, reductions

    empty = partial(torch.empty, dtype=dtype)
    x, dY, h = empty(TOKENS, WIDTH), empty(TOKENS, adapters * WIDTH), empty(TOKENS, adapters * r)
    product = adapted(empty(adapters * WIDTH, WIDTH), adapters, r, p, bias=empty(adapters * WIDTH))
    case = f"{dtype} P={adapters} r={r} p={p}"
    yield Launch(case, partial(linear.packed_lora_linear_h, x, product))
    own = product._replace(columns=torch.empty(TOKENS, adapters * r, dtype=torch.bool))
    yield Launch(f"{case}, own columns", partial(linear.packed_lora_linear_h, x, own))
    copied = partial(linear.packed_lora_linear_h, x, product, beside=beside(product, dtype))
    yield Launch(f"{case}, copies x", copied)
    yield Launch(case, partial(reductions.packed_lora_linear_da, x, h, product))
    for tiles in linear.tiles_of(chip, dtype)[: None if adapters == 1 and r == 16 and p in (0, 0.25) else 1]:
        cut = f"{case}, {label_of(tiles)}"
        for which, given in (("given", h), ("inside", None)):
            fwd = partial(linear.packed_lora_linear_fwd, x, product, given, tiles=tiles)
            dx = partial(linear.packed_lora_linear_dx, dY, product, given, tiles=tiles)
            if given is not None or linear.fits_inside(r, dtype, p):
                yield Launch(f"{cut}, h {which}", fwd)
                yield Launch(f"{cut}, g {which}", dx)
        if adapters == 1 and linear.fits_inside(r, dtype, p):
            bwd = partial(linear_bwd.packed_lora_linear_bwd, dY, x, h, product, tiles=tiles)
            yield Launch(f"{cut}, dX, dA and dB", partial(bwd, compute_dA=True, compute_dB=True))
    if p == 0:
        for outputs in (("g", "dB"), ("g",), ("dB",)):
            wanted = {f"compute_{name}": name in outputs for name in ("g", "dB")}
            db = partial(reductions.packed_lora_linear_db, dY, h, product, **wanted)
            yield Launch(f"{case}, {' and '.join(outputs)}", db)
        apart, both = dY.chunk(adapters, 1), {"compute_g": True, "compute_dB": True}
        for name in ("partial_g", "pack", "beside"):
            db = partial(reductions.packed_lora_linear_db, apart, h, product, **both, **{name: True})
            yield Launch(f"{case}, {name}", db)
    if adapters > 1:
        grads = partial(reductions.packed_lora_linear_grads, reductions.Source(x, h, product), (dY, h, product))
        yield Launch(f"{case}, dA and dB", grads)


def beside(product: AdaptedLinear, dtype: torch.dtype, *, with_bias: bool = False) -> Beside:
    """The matrices of a product whose input is written with h in the same rows."""
    from complora_kernels.kernels.beside import beside

    return beside(product, dtype, with_bias=with_bias)


def label_of(tiles: Sequence[int]) -> str:
    """Tiles in a label."""
    return "{}x{}x{} {} warps".format(*tiles)


def unfriendly(dtype: torch.dtype, size: int) -> Iterator[Launch]:
    """Sizes that no tile divides; one is a constant to Triton."""
    from complora_kernels.kernels import linear, linear_bwd, reductions

    x, h = torch.empty(size, size, dtype=dtype), torch.empty(size, 1, dtype=dtype)
    case = f"{dtype} all sizes {size}, r=1"
    for p in (0.0, 0.25):
        product = adapted(x, 1, 1, p, bias=x[0])
        yield Launch(case, partial(linear.packed_lora_linear_h, x, product))
        yield Launch(case, partial(reductions.packed_lora_linear_da, x, h, product))
        for given in (h, None):
            yield Launch(case, partial(linear.packed_lora_linear_fwd, x, product, given))
            yield Launch(case, partial(linear.packed_lora_linear_dx, x, product, given))
        bwd = partial(linear_bwd.packed_lora_linear_bwd, x, x, h, product, compute_dA=True, compute_dB=True)
        yield Launch(case, bwd)
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
    from complora_kernels.kernels import linear, linear_bwd, norm, norm_bwd, norm_bwd_da, reductions

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
            bwd = partial(norm_bwd.norm_bwd, n, d_stream, x, statistics, statistics, weight)
            yield Launch(f"{case}{what}", bwd)
        for adapters, r, p in ((1, 16, 0.0), (3, 16, 0.0), (3, 16, 0.25), (1, 64, 0.1)):
            reader = adapted(torch.empty(adapters * width, width, dtype=dtype), adapters, r, p)
            g = torch.empty(TOKENS, adapters * r, dtype=dtype)
            product = f"{case}, P={adapters} r={r} p={p}"
            if dtype == bf16:
                fwd = partial(norm.norm_fwd, x, n, weight, bias, 1e-5, dtype, reader)
                yield Launch(f"{product}, h", fwd)
                if width % 8 == 0:
                    fwd = partial(fwd, beside=beside(reader, dtype))
                    yield Launch(f"{product}, n and h", fwd)
                    if adapters == 1 and stream == dtype:  # before fc1, whose MLP is added to s in place
                        yield Launch(f"{product}, s twice, n and h", partial(fwd, twice=True))
            bwd = partial(norm_bwd.norm_bwd, n, x, x, statistics, statistics, weight, g=g, reader=reader)
            yield Launch(f"{product}, second term", bwd)
            saved = (statistics, statistics, weight, bias)
            if norm_bwd_da.fits_together(width, dtype):
                both = partial(norm_bwd_da.norm_bwd_da, n, x, x, *saved, g, reader)
                yield Launch(f"{product}, second term and dA", both)
            da = partial(reductions.packed_lora_linear_da, x, g, reader, norm=saved)
            yield Launch(f"{product}, normed", da)
            if adapters > 1 and dtype == bf16:
                own, dY = reductions.Source(x, g, reader, saved), torch.empty(TOKENS, adapters * width, dtype=dtype)
                yield Launch(
                    f"{product}, normed, dA and dB", partial(reductions.packed_lora_linear_grads, own, (dY, g, reader))
                )
            if adapters == 1 and linear.fits_inside(r, dtype, p):
                wanted = {"compute_dA": True, "compute_dB": True, "norm": saved}
                bwd = partial(linear_bwd.packed_lora_linear_bwd, torch.empty_like(n), x, g, reader, **wanted)
                yield Launch(f"{product}, dX, dA and dB, normed", bwd)


def activations() -> Iterator[Launch]:
    """The activations of an MLP, and the gradients of the factors behind them."""
    from complora_kernels.kernels import activation, linear, linear_bwd, reductions

    kinds = itertools.product((torch.bfloat16, torch.float32), activation.KINDS, (4 * WIDTH, 137))
    for dtype, kind, width in kinds:
        z = torch.empty(TOKENS, width, dtype=dtype)
        case = f"{dtype} {kind}, K={width}"
        yield Launch(case, partial(activation.activation_fwd, z, kind, None))
        yield Launch(case, partial(activation.activation_bwd, z, z, kind))
        for r, p in ((16, 0.0), (16, 0.25), (64, 0.1)):
            reader, g = adapted(torch.empty(width, width, dtype=dtype), 1, r, p), torch.empty(TOKENS, r, dtype=dtype)
            fwd = partial(activation.activation_fwd, z, kind, reader)
            yield Launch(f"{case}, r={r} p={p}", fwd)
            if dtype == torch.bfloat16 and width % 8 == 0:
                yield Launch(f"{case}, r={r} p={p}, a and h", partial(fwd, beside=beside(reader, dtype)))
                biased = beside(reader._replace(bias=torch.empty(width, dtype=dtype)), dtype, with_bias=True)
                yield Launch(f"{case}, r={r} p={p}, bias inside, a and h", partial(fwd, beside=biased))
            dA = r <= activation.MAX_DA_RANK
            bwd = partial(activation.activation_bwd, z, z, kind, g=g, reader=reader, compute_dA=dA)
            yield Launch(f"{case}, r={r} p={p}, second term", bwd)
            da = partial(reductions.packed_lora_linear_da, z, g, reader, activation=kind)
            yield Launch(f"{case}, r={r} p={p}", da)
            if linear.fits_inside(r, dtype, p):
                closing = adapted(torch.empty(WIDTH, width, dtype=dtype), 1, r, p)
                dY, wanted = torch.empty(TOKENS, WIDTH, dtype=dtype), {"compute_dA": True, "compute_dB": True}
                bwd = partial(linear_bwd.packed_lora_linear_bwd, dY, z, g, closing, activation=kind, **wanted)
                yield Launch(f"{case}, r={r} p={p}", bwd)


def residuals(chip: int | str) -> Iterator[Launch]:
    """The product that closes a block, with every tile that ships."""
    from complora_kernels.kernels import linear

    streams = ((torch.bfloat16,) * 2, (torch.float32, torch.bfloat16), (torch.float32,) * 2)
    for stream, dtype in streams:
        x, weight, bias = (
            torch.empty(*shape, dtype=dtype) for shape in ((TOKENS, 4 * WIDTH), (WIDTH, 4 * WIDTH), (WIDTH,))
        )
        product = adapted(weight, 1, 16, 0.0, bias)
        h, residual = torch.empty(TOKENS, 16, dtype=dtype), torch.empty(TOKENS, WIDTH, dtype=stream)
        for tiles in linear.tiles_of(chip, dtype, crowded=isinstance(chip, int) and chip >= 100):
            case = f"{dtype}, residual {stream}, {label_of(tiles)}"
            fwd = partial(linear.packed_lora_linear_fwd, x, product, h, residual=residual, tiles=tiles)
            yield Launch(case, fwd)
