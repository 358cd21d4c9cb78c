"""The bytes that each kernel moves, against the least that its operands ask for, as its docstring states them.

Each operand is read once and each result written once, in float32, of which the interpreter keeps the size; partial
sums and what a program reads of its own stores are in the minimum too. `again` says which operands programs read again
by design, from the L2 cache, and how often.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import memory_traffic
import pytest
import torch
from kernel_sources import launched_kernels
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import (
    activation,
    da,
    db,
    factors,
    linear,
    linear_bwd,
    norm,
    norm_bwd,
    norm_bwd_da,
    partials,
    reductions,
)
from complora_kernels.kernels.beside import beside

M, K, R, P = 69, 96, 12, 3  # an eighth of ViT-B/16's width; q, k and v
N, HIDDEN = P * K, 2 * K
T = 262  # rows of the sums that are split
TILE = 32  # rows or columns of a program, in the interpreter
MARGIN = 1.1


class Case(NamedTuple):
    """A call of a launching function, with the elements of its operands and results."""

    call: Callable[[], object]
    minimum: dict[str, int]  # an operand or result -> its elements
    again: Mapping[str, float] = MappingProxyType({})  # an operand -> how often all of it is read


def empty(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def adapted(rows: int, columns: int, adapters: int, *, save_h: bool = True) -> AdaptedLinear:
    """A product whose adapters divide the rows of its weight."""
    height = rows // adapters
    As, Bs = [empty(R, columns)] * adapters, [empty(height, R)] * adapters
    cut = [(i * height, (i + 1) * height) for i in range(adapters)]
    return AdaptedLinear(empty(rows, columns), empty(rows), As, Bs, cut, save_h=save_h)


def wide_weight(reader: AdaptedLinear) -> dict[str, int]:
    """What is read and written of `[W | B̃ | 0]`."""
    weight, C = reader.weight, reader.weight.shape[1] + reader.rank + padding(reader)
    return {"W": weight.numel(), "B": sum(B.numel() for B in reader.Bs), "W and B": len(weight) * C}


def padding(reader: AdaptedLinear) -> int:
    return -(reader.weight.shape[1] + reader.rank) % 8


def tiles(size: int, tile: int = TILE) -> int:
    return math.ceil(size / tile)


def split_sums(splits: int, elements: int) -> int:
    """Partial sums of so many splits of the rows, written and read."""
    return 2 * splits * elements


def of_update(M: int) -> dict[str, int]:
    """What the gradient of a norm of M rows reads and writes with its rank-r term."""
    of_rows = {"dn": M * K, "s": M * K, "d_s, ds": 2 * M * K, "mean, rstd": 2 * M, "g": M * P * R}
    return of_rows | {"w": K, "A": P * R * K}


def update_again(M: int) -> dict[str, float]:
    return {"dn": 2, "s": 2, "w": 2 * tiles(M), "g": 2 * tiles(K), "A": 2 * tiles(M)}


qkv, fc1, fc2 = adapted(N, K, P), adapted(HIDDEN, K, 1), adapted(K, HIDDEN, 1)
qkv_beside, fc2_beside = adapted(N, K, P, save_h=False), adapted(K, HIDDEN, 1, save_h=False)
rows, wide, long = empty(M, K), empty(M, HIDDEN), empty(T, HIDDEN)
statistics, affine = (empty(M), empty(M)), (empty(K), empty(K))
of_x = da.Source(empty(T, K), empty(T, P * R), qkv, norm=(empty(T), empty(T), *affine))
D, LAYERS = 600, 2  # of a fold
AS, BS, BASES = [[empty(*shape) for _ in range(LAYERS)] for shape in ((R, D), (D, R), (D, K // 2))]
fold = partial(
    factors.fold_factors,
    AS + BS,
    [*[None] * LAYERS, *BASES],
    [False] * 2 * LAYERS,
    [*[False] * LAYERS, *[True] * LAYERS],
    1.0,
    torch.float32,
)
FOLD_SPLITS, FOLD_D = tiles(D, 256), 256  # a split of the coordinates; elements of a projecting program
CHUNKS = tiles(P * R, 16)  # float32 kernels take so many ranks at a time
DB_SPLITS, DA_SPLITS, DZ_SPLITS = (
    partials.split_rows(T, tiles(T, kernel.ROWS_PER_SPLIT), TILE).number for kernel in (db, da, activation)
)
DX_SPLITS = partials.split_rows(T, tiles(T), TILE).parts  # and groups of them
SHARED = tiles(K, 2 * TILE)  # programs that share the columns of an adapter

NORM = {"x, delta, s, n": 4 * M * K, "w, b": 2 * K, "A": P * R * K, "mean, rstd": 2 * M, "h": M * P * R}
H_OF_NORM = {"n for h": M * K}
NORM_AGAIN = {"w, b": tiles(M, norm.ROWS_WITH_H), "A": tiles(M, norm.ROWS_WITH_H), "n for h": CHUNKS}
DB = {"dY": T * N, "h": T * P * R, "dB": N * R, "sums of dB": split_sums(DB_SPLITS, N * R)}
G = {"B": N * R, "g": T * P * R, "sums of g": split_sums(SHARED, T * P * R)}
DB_AGAIN = {"h": SHARED, "B": DB_SPLITS}
DA = {"x": T * K, "g for A": T * P * R, "mean, rstd": 2 * T, "w, b": 2 * K, "dA": P * R * K}
DA |= {"sums of dA": split_sums(DA_SPLITS, P * R * K)}
DA_AGAIN = {"x": CHUNKS, "g for A": tiles(K), "mean, rstd": tiles(K) * CHUNKS, "w, b": DA_SPLITS * CHUNKS}
Y = {"x": M * K, "W": N * K, "b": N, "h": M * P * R, "B": N * R, "y": M * N}
Y_AGAIN = {"x": tiles(N), "W": tiles(M), "b": tiles(M), "B": tiles(M)}
DX = {"dY": M * N, "W": N * K, "g": M * P * R, "A": P * R * K, "dX": M * K}
DX_AGAIN = {"dY": tiles(K), "W": tiles(M), "A": tiles(M)}

# A kernel, with what it does besides -> a case. What another kernel of the same call moves is not counted.
CASES = {
    "norm_fwd": Case(
        partial(norm.norm_fwd, rows, rows.clone(), *affine, 1e-5, torch.float32, qkv), NORM | H_OF_NORM, NORM_AGAIN
    ),
    "norm_fwd, h, W and B beside": Case(
        partial(
            norm.norm_fwd,
            rows,
            rows.clone(),
            *affine,
            1e-5,
            torch.float32,
            qkv_beside,
            beside=beside(qkv_beside, torch.float32),
        ),
        NORM | H_OF_NORM | {"padding": M * padding(qkv)} | wide_weight(qkv),
        NORM_AGAIN,
    ),
    "norm_fwd, s twice": Case(
        partial(norm.norm_fwd, rows, rows.clone(), *affine, 1e-5, torch.float32, None, twice=True),
        {"x, delta, s, n": 4 * M * K, "s again": M * K, "w, b": 2 * K, "mean, rstd": 2 * M},
        {"w, b": tiles(M, norm.ELEMENTS // 128)},
    ),
    "norm_bwd": Case(
        partial(norm_bwd.norm_bwd, rows, rows.clone(), rows.clone(), *statistics, affine[0]),
        {"dn, d_s, s, ds": 4 * M * K, "mean, rstd": 2 * M, "w": K},
        {"w": tiles(M, norm.ELEMENTS // 128)},
    ),
    "norm_bwd_update": Case(
        partial(
            norm_bwd.norm_bwd, rows, rows.clone(), rows.clone(), *statistics, affine[0], g=empty(M, P * R), reader=qkv
        ),
        of_update(M),
        update_again(M),
    ),
    "norm_bwd_da": Case(
        partial(
            norm_bwd_da.norm_bwd_da,
            empty(T, K),
            empty(T, K),
            empty(T, K),
            empty(T),
            empty(T),
            *affine,
            empty(T, P * R),
            qkv,
        ),
        of_update(T) | {"b": K, "dA": P * R * K, "sums of dA": split_sums(DA_SPLITS, P * R * K)},
        update_again(T)
        | {"s": 2 + CHUNKS, "g": 3 * tiles(K), "mean, rstd": 1 + tiles(K) * CHUNKS}
        | {"w": 2 * tiles(T) + DA_SPLITS * CHUNKS, "b": DA_SPLITS * CHUNKS},
    ),
    "activation_fwd": Case(
        partial(activation.activation_fwd, wide, "quick_gelu", fc2),
        {"z, a": 2 * M * HIDDEN, "A": R * HIDDEN, "h": M * R},
        {"A": tiles(M)},
    ),
    "activation_fwd, h, W and B beside": Case(
        partial(activation.activation_fwd, wide, "quick_gelu", fc2_beside, beside=beside(fc2_beside, torch.float32)),
        {"z, a": 2 * M * HIDDEN, "A": R * HIDDEN, "h": M * R, "padding": M * padding(fc2)} | wide_weight(fc2),
        {"A": tiles(M)},
    ),
    "activation_fwd, h, W, B and b beside": Case(
        partial(
            activation.activation_fwd,
            wide,
            "quick_gelu",
            fc2_beside,
            beside=beside(fc2_beside, torch.float32, with_bias=True),
        ),
        {"z, a": 2 * M * HIDDEN, "A": R * HIDDEN, "h": M * R, "padding": M * padding(fc2), "b": K} | wide_weight(fc2),
        {"A": tiles(M)},
    ),
    "activation_bwd": Case(
        partial(activation.activation_bwd, wide, wide.clone(), "gelu"), {"da, z, dz": 3 * M * HIDDEN}
    ),
    "activation_bwd, rank-r term and dA": Case(
        partial(activation.activation_bwd, long, long.clone(), "gelu", g=empty(T, R), reader=fc2, compute_dA=True),
        {"da, z, dz": 3 * T * HIDDEN, "g": T * R, "A": R * HIDDEN, "dA": R * HIDDEN}
        | {"sums of dA": split_sums(DZ_SPLITS, R * HIDDEN)},
        {"g": tiles(HIDDEN), "A": tiles(T)},
    ),
    "packed_lora_linear_h": Case(
        partial(linear.packed_lora_linear_h, rows, qkv),
        {"x": M * K, "A": P * R * K, "h": M * P * R},
        {"x": CHUNKS, "A": tiles(M)},
    ),
    "packed_lora_linear_h, x, W and B beside": Case(
        partial(linear.packed_lora_linear_h, rows, qkv, beside=beside(qkv, torch.float32)),
        {"x": M * K, "copy": M * K, "A": P * R * K, "h": 2 * M * P * R, "padding": M * padding(qkv)} | wide_weight(qkv),
        {"x": CHUNKS, "A": tiles(M)},
    ),
    "packed_lora_linear_fwd": Case(
        partial(linear.packed_lora_linear_fwd, rows, qkv, empty(M, P * R)), Y, Y_AGAIN | {"h": tiles(K)}
    ),
    "packed_lora_linear_fwd, residual and h inside": Case(
        partial(linear.packed_lora_linear_fwd, rows, qkv, None, residual=empty(M, N)),
        Y | {"A": P * R * K, "residual": M * N},
        Y_AGAIN | {"A": tiles(M) * tiles(K)},
    ),
    "packed_lora_linear_dx": Case(
        partial(linear.packed_lora_linear_dx, empty(M, N), qkv, empty(M, P * R)), DX, DX_AGAIN | {"g": tiles(K)}
    ),
    "packed_lora_linear_dx, g inside": Case(
        partial(linear.packed_lora_linear_dx, empty(M, N), qkv, None),
        DX | {"B": N * R},
        DX_AGAIN | {"B": tiles(M) * tiles(K)},
    ),
    "packed_lora_linear_bwd": Case(
        partial(
            linear_bwd.packed_lora_linear_bwd,
            *(empty(T, K), empty(T, HIDDEN), empty(T, R), fc2),
            compute_dA=True,
            compute_dB=True,
            norm=(empty(T), empty(T), empty(HIDDEN), empty(HIDDEN)),
        ),
        {"dY": T * K, "W": K * HIDDEN, "A": R * HIDDEN, "B": K * R, "dX": T * HIDDEN}
        | {"x": T * HIDDEN, "mean, rstd": 2 * T, "w, b": 2 * HIDDEN, "dA": R * HIDDEN, "h": T * R, "dB": K * R}
        | {"sums of dA": split_sums(DX_SPLITS, R * HIDDEN), "sums of dB": split_sums(DB_SPLITS, K * R)},
        {"dY": tiles(HIDDEN) + 1, "W": tiles(T), "A": tiles(T), "B": tiles(T) * tiles(HIDDEN)}
        | {"mean, rstd": tiles(HIDDEN), "w, b": tiles(T), "h": SHARED},
    ),
    "packed_lora_linear_db": Case(
        partial(reductions.packed_lora_linear_db, empty(T, N), empty(T, P * R), qkv, compute_g=True, compute_dB=True),
        DB | G,
        DB_AGAIN,
    ),
    "packed_lora_linear_db, g and dY in one tensor": Case(
        partial(
            reductions.packed_lora_linear_db,
            [empty(T, K) for _ in range(P)],
            empty(T, P * R),
            qkv,
            compute_g=True,
            compute_dB=True,
            beside=True,
        ),
        DB | G | {"copy": T * N, "padding": T * (-(N + P * R) % 8)},
        DB_AGAIN,
    ),
    "packed_lora_linear_db, partial g": Case(
        partial(
            reductions.packed_lora_linear_db,
            empty(T, N),
            empty(T, P * R),
            qkv,
            compute_g=True,
            compute_dB=False,
            partial_g=True,
        ),
        {"dY": T * N, "B": N * R, "sums of g": SHARED * T * P * R},
        {"B": DB_SPLITS},
    ),
    "packed_lora_linear_da": Case(partial(reductions.packed_lora_linear_da, *of_x[:3], norm=of_x.norm), DA, DA_AGAIN),
    "packed_lora_linear_grads": Case(
        partial(reductions.packed_lora_linear_grads, of_x, (empty(T, N), empty(T, P * R), qkv)),
        DA | DB,
        DA_AGAIN | {"h": SHARED},
    ),
    "fold_coordinates": Case(
        fold,
        {"bases": LAYERS * D * (K // 2), "B": LAYERS * R * D, "coordinates": LAYERS * FOLD_SPLITS * R * (K // 2)},
    ),
    "fold_factors": Case(
        fold,
        {"bases": LAYERS * D * (K // 2), "coordinates": LAYERS * FOLD_SPLITS * R * (K // 2)}
        | {"A, B": 2 * LAYERS * R * D, "Ã, B̃": 2 * LAYERS * R * D},
        {"coordinates": tiles(D, FOLD_D)},
    ),
    "merge_weight": Case(
        lambda: factors.merge_weight(qkv, torch.float32),
        {"W, W + ΔW": 2 * N * K, "A": P * R * K, "B": N * R},
        {"A": tiles(K), "B": tiles(K)},
    ),
}


@functools.cache
def launches_of(call: Callable[[], object]) -> list[memory_traffic.Traffic]:
    with memory_traffic.watched() as launches:
        call()
    return launches


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_of(name):
    case, kernel = CASES[name], f"{name.partition(',')[0]}_kernel"
    launches = [launch for launch in launches_of(case.call) if launch.kernel == kernel]
    least = 4 * sum(case.minimum.values())
    stated = 4 * sum(elements * case.again.get(operand, 1) for operand, elements in case.minimum.items())
    distinct, moved = (sum(launch.distinct() for launch in launches), sum(launch.bytes() for launch in launches))
    table = "\n".join(f"{each.kernel}: {each.by_argument()}" for each in launches)
    assert len(launches) == 1
    assert case.again.keys() <= case.minimum.keys()
    assert least <= MARGIN * distinct, f"{distinct} bytes, fewer than the least, {least}\n{table}"
    assert distinct <= MARGIN * least, f"{distinct} bytes, expected at most {MARGIN} of {least}\n{table}"
    assert moved <= MARGIN * stated, f"{moved} bytes with what is read again, expected {MARGIN} of {stated}\n{table}"


def test_every_kernel_states_its_bytes_and_is_counted():
    found = launched_kernels()
    assert found.keys() == {f"{name.partition(',')[0]}_kernel" for name in CASES}
    assert [name for name, said in found.items() if "Minimum bytes: " not in said] == []
