"""The bytes that each operation's kernels move, against the least that its operands ask for.

Each operand is read once and each result written once, in float32, of which the interpreter keeps the size; partial
sums, where a kernel's docstring states them, are written and read. `again` says which operands programs read again by
design, from the L2 cache, and how often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import memory_traffic
import pytest
import torch
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import activation, factors, linear, norm, reductions

M, K, R, P = 197, 96, 16, 3  # one image; an eighth of ViT-B/16's width; q, k and v
N, HIDDEN = P * K, 4 * K
T = 2 * M  # rows of the sums that are split
TILE = 32  # rows or columns of a program, in the interpreter
MARGIN = 1.1


class Case(NamedTuple):
    """A call of a launching function, with the elements of its operands and results."""

    call: Callable[[], object]
    minimum: dict[str, int]  # an operand or result -> its elements
    again: Mapping[str, float] = MappingProxyType({})  # an operand -> how often all of it is read


def empty(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def adapted(rows: int, columns: int, adapters: int, r: int = R) -> AdaptedLinear:
    """A product whose adapters divide the rows of its weight."""
    height = rows // adapters
    As, Bs = [empty(r, columns)] * adapters, [empty(height, r)] * adapters
    cut = [(i * height, (i + 1) * height) for i in range(adapters)]
    return AdaptedLinear(empty(rows, columns), empty(rows), As, Bs, cut)


def tiles(size: int, tile: int = TILE) -> int:
    return math.ceil(size / tile)


def split_sums(splits: int, elements: int) -> int:
    """Partial sums of so many splits of the rows, written and read."""
    return 2 * splits * elements


qkv, fc1, fc2 = adapted(N, K, P), adapted(HIDDEN, K, 1), adapted(K, HIDDEN, 1)
rows, wide = empty(M, K), empty(M, HIDDEN)
statistics = (empty(M), empty(M))
affine = (empty(K), empty(K))
LAYERS = 4  # of a fold
AS, BS, BASES = [[empty(*shape) for _ in range(LAYERS)] for shape in ((R, K), (K, R), (K, K // 2))]
PROJECTED_BY, OUTPUT_SIDE = [*[None] * LAYERS, *BASES], [*[False] * LAYERS, *[True] * LAYERS]
db_splits, _ = reductions._splits(T, tiles(K) * P, TILE)
da_splits, _ = reductions._splits(T, tiles(K, 128), 64)

CASES = {
    "norm_fwd": Case(
        partial(norm.norm_fwd, rows, rows.clone(), *affine, 1e-5, torch.float32, qkv),
        {"x, delta, s, n": 4 * M * K, "n for h": M * K, "w, b": 2 * K, "A": P * R * K, "mean, rstd": 2 * M}
        | {"h": M * P * R},
        {"w, b": tiles(M), "A": tiles(M), "n for h": 3},
    ),
    "norm_bwd": Case(
        partial(norm.norm_bwd, rows, rows.clone(), rows.clone(), *statistics, affine[0]),
        {"dn, d_s, s, ds": 4 * M * K, "mean, rstd": 2 * M, "w": K},
        {"w": tiles(M, norm.ELEMENTS // 128)},
    ),
    "activation_fwd": Case(
        partial(activation.activation_fwd, wide, "quick_gelu", fc2),
        {"z, a": 2 * M * HIDDEN, "A": R * HIDDEN, "h": M * R},
        {"A": tiles(M)},
    ),
    "activation_bwd": Case(
        partial(activation.activation_bwd, wide, wide.clone(), "gelu"), {"da, z, dz": 3 * M * HIDDEN}
    ),
    "packed_lora_linear_h": Case(
        partial(linear.packed_lora_linear_h, rows, qkv),
        {"x": M * K, "A": P * R * K, "h": M * P * R},
        {"x": tiles(P * R, 16), "A": tiles(M)},
    ),
    "packed_lora_linear_fwd": Case(
        partial(linear.packed_lora_linear_fwd, rows, qkv, empty(M, P * R)),
        {"x": M * K, "W": N * K, "b": N, "h": M * P * R, "B": N * R, "y": M * N},
        {"x": tiles(N), "W": tiles(M), "b": tiles(M), "h": tiles(K), "B": tiles(M)},
    ),
    "packed_lora_linear_dx": Case(
        partial(linear.packed_lora_linear_dx, empty(M, N), qkv, empty(M, P * R)),
        {"dY": M * N, "W": N * K, "g": M * P * R, "A": P * R * K, "dX": M * K},
        {"dY": tiles(K), "W": tiles(M), "g": tiles(K), "A": tiles(M)},
    ),
    "packed_lora_linear_db": Case(
        partial(
            reductions.packed_lora_linear_db,
            empty(T, N),
            empty(T, P * R),
            qkv,
            compute_g=True,
            compute_dB=True,
        ),
        {"dY": T * N, "h": T * P * R, "B": N * R, "g": T * P * R, "dB": N * R}
        | {"sums of dB": split_sums(db_splits, N * R), "sums of g": split_sums(tiles(K), T * P * R)},
        {"h": tiles(K), "B": db_splits},
    ),
    "packed_lora_linear_da": Case(
        partial(
            reductions.packed_lora_linear_da,
            empty(T, K),
            empty(T, P * R),
            qkv,
            norm=(empty(T), empty(T), *affine),
        ),
        {"x": T * K, "g": T * P * R, "mean, rstd": 2 * T, "w, b": 2 * K, "dA": P * R * K}
        | {"sums of dA": split_sums(da_splits, P * R * K)},
        {"x": tiles(P * R, 16), "g": tiles(K), "mean, rstd": tiles(K) * tiles(P * R, 16), "w, b": da_splits * 3},
    ),
    "fold_factors": Case(
        partial(factors.fold_factors, AS + BS, PROJECTED_BY, [False] * 2 * LAYERS, OUTPUT_SIDE, 1.0, torch.float32),
        {"A, B": 2 * LAYERS * R * K, "bases": LAYERS * K * K // 2, "Ã, B̃": 2 * LAYERS * R * K},
        {"A, B": 2 + tiles(K) * tiles(K // 2) / 2, "bases": 1 + tiles(K)},
    ),
    "merge_weight": Case(
        lambda: factors.merge_weight(qkv, torch.float32),
        {"W, W + ΔW": 2 * N * K, "A": P * R * K, "B": N * R},
        {"A": tiles(K), "B": tiles(K)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_of(name):
    case = CASES[name]
    with memory_traffic.watched() as launches:
        case.call()
    least = 4 * sum(case.minimum.values())
    stated = 4 * sum(elements * case.again.get(operand, 1) for operand, elements in case.minimum.items())
    distinct, moved = (sum(launch.distinct() for launch in launches), sum(launch.bytes() for launch in launches))
    table = "\n".join(f"{each.kernel}: {each.by_argument()}" for each in launches)
    assert least <= MARGIN * distinct, f"{distinct} bytes, fewer than the least, {least}\n{table}"
    assert distinct <= MARGIN * least, f"{distinct} bytes, expected at most {MARGIN} of {least}\n{table}"
    assert moved <= MARGIN * stated, f"{moved} bytes with what is read again, expected {MARGIN} of {stated}\n{table}"
