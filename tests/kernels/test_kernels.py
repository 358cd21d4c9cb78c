"""The Triton kernels by their launching functions: numbers, masks, edges, splits, addresses, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from layers import LAYOUTS, laid_out
from numerics import assert_as_accurate_as_reference, random_basis
from torch import Tensor
from torch.nn import functional as F
from triton_device import DEVICE, drawn_p, masks_of

from complora_kernels import reference
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import (
    activation,
    beside,
    da,
    db,
    factors,
    launch,
    linear,
    linear_dx,
    linear_fwd,
    reductions,
)
from complora_kernels.kernels.dropout import dropout_lanes
from complora_kernels.kernels.rows import MAX_GROUPS, NO_ADAPTER, RowGroups, row_groups
from complora_kernels.kernels.tiles import HALF_TILES, Tiles

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
SEED = torch.tensor([2**62 + 12345])  # above 32 bits
NONE = NO_ADAPTER


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@dataclass(frozen=True)
class Product:
    """The arguments of one adapted product, and the gradient that its output receives."""

    x: Tensor  # [M, K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    A: Tensor  # [P, r, K]
    B: Tensor  # [P, D, r]
    dY: Tensor  # [M, N]
    groups: RowGroups
    p: float
    seed: Tensor | None  # [1]

    @property
    def linear(self) -> AdaptedLinear:
        seeds = [] if self.seed is None else [self.seed]
        return AdaptedLinear(self.weight, self.bias, list(self.A), list(self.B), self.rows, self.p, seeds)

    @property
    def rows(self) -> list[tuple[int, int]]:
        D, slots = self.groups
        return [(slots.index(slot) * D, slots.index(slot) * D + D) for slot in range(len(self.A))]


def make_product(
    M: int, K: int, D: int, r: int, slots: tuple[int, ...] = (0,), p: float = 0.0, dtype: torch.dtype = torch.float32
) -> Product:
    P, N = sum(slot != NONE for slot in slots), D * len(slots)
    return Product(
        x=randn(M, K, dtype=dtype),
        weight=(randn(N, K) / K**0.5).to(dtype),
        bias=randn(N, dtype=dtype),
        A=(randn(P, r, K) / K**0.5).to(dtype),
        B=randn(P, D, r, dtype=dtype),
        dY=randn(M, N, dtype=dtype),
        groups=RowGroups(D, slots),
        p=p,
        seed=SEED.to(DEVICE) if p else None,
    )


def by_kernels(of: Product) -> dict[str, Tensor]:
    """Everything that the kernels compute, the large products with h and g given and, where they may be, inside."""
    h = linear.packed_lora_linear_h(of.x, of.linear)
    assert_beside(of, of.linear, h)
    y, _ = linear.packed_lora_linear_fwd(of.x, of.linear, h)
    g, dB = reductions.packed_lora_linear_db(of.dY, h, of.linear, compute_g=True, compute_dB=True)
    dX, _ = linear.packed_lora_linear_dx(of.dY, of.linear, g)
    dA = reductions.packed_lora_linear_da(of.x, g, of.linear)
    result = {"h": h, "y": y, "g": g, "dB": dB, "dX": dX, "dA": dA}
    if linear.fits_inside(of.A.shape[1], of.x.dtype, of.p):
        y, h = linear.packed_lora_linear_fwd(of.x, of.linear, None)
        dX, g = linear.packed_lora_linear_dx(of.dY, of.linear, None)
        result |= {"y, h inside": y, "h inside": h, "dX, g inside": dX, "g inside": g}
    return result


def assert_beside(of: Product, record: AdaptedLinear, h: Tensor) -> None:
    """x and h in the rows of one matrix, W and B̃ in those of another one, zeros behind both."""
    (N, K), R = of.weight.shape, h.shape[1]
    C = -(-(K + R) // 8) * 8
    matrices = beside.beside(record, of.x.dtype)
    xh, same = linear.packed_lora_linear_h(of.x, record, beside=matrices)
    assert torch.equal(same, h)
    assert torch.equal(xh, F.pad(torch.cat([of.x, h], 1), (0, C - K - R)))
    expected = torch.zeros(N, C, dtype=of.x.dtype, device=DEVICE)
    expected[:, :K] = of.weight
    for p, (B, (start, stop)) in enumerate(zip(record.Bs, record.rows, strict=True)):
        expected[start:stop, K + p * B.shape[1] : K + (p + 1) * B.shape[1]] = B
    assert len(of.x) == 0 or torch.equal(matrices.whole(of.x.dtype), expected)  # without rows nothing is launched


def by_formulas(of: Product, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in plain PyTorch, on memory of its own: torch reads past edges in bfloat16 on CPUs with AMX."""
    own = {"copy": True, "memory_format": torch.contiguous_format}
    x, weight, A, B, dY = (tensor.to(dtype, **own) for tensor in (of.x, of.weight, of.A, of.B, of.dY))
    bias = None if of.bias is None else of.bias.to(dtype)
    masks = masks_of(SEED, len(A), x.shape, of.p)
    masks = None if masks is None else [m.to(dtype) for m in masks]
    x, A, B = (tensor.detach().requires_grad_() for tensor in (x, A, B))
    y = reference.packed_lora_linear(x, AdaptedLinear(weight, bias, list(A), list(B), of.rows), dropout_masks=masks)
    dX, dA, dB = torch.autograd.grad(y, (x, A, B), dY)
    with torch.no_grad():
        dropped = [x] * len(A) if masks is None else [x * m for m in masks]
        h = torch.cat([x_p @ A_p.mT for x_p, A_p in zip(dropped, A, strict=True)], 1)
        g = torch.cat([dY[:, start:stop] @ B_p for (start, stop), B_p in zip(of.rows, B, strict=True)], 1)
    result = {"h": h, "y": y.detach(), "g": g, "dB": dB, "dX": dX, "dA": dA}
    if linear.fits_inside(A.shape[1], of.x.dtype, of.p):
        result |= {"y, h inside": result["y"], "h inside": h, "dX, g inside": dX, "g inside": g}
    return result


def check(products: list[Product]) -> list[dict[str, Tensor]]:
    """The accuracy rule for everything, over products of one shape; what the kernels gave."""
    ours = [by_kernels(of) for of in products]
    same_dtype = [by_formulas(of, of.x.dtype) for of in products]
    exact = [by_formulas(of, torch.float64) for of in products]
    for name in ours[0]:
        a, b, c = (torch.stack([result[name] for result in part]) for part in (ours, same_dtype, exact))
        assert_as_accurate_as_reference(a, b, c, name)
    return ours


def among_nan(tensor: Tensor) -> Tensor:  # [rows, columns]
    """The same inside a larger matrix of NaN: whoever reads past the edges shows it."""
    rows, columns = tensor.shape
    return F.pad(tensor, (3, 70, 2, 70), value=torch.nan)[2 : 2 + rows, 3 : 3 + columns]


def matrix(tensor: Tensor, layout: str) -> Tensor:
    return among_nan(tensor) if layout == "among NaN" else laid_out(tensor, layout)


# A failure is reported as it was drawn: to look for a smaller one, kernels would be interpreted for many minutes.
FEW = settings(deadline=None, derandomize=True, max_examples=10, phases=[Phase.generate])
PATTERNS = ((0,), (0, 1, 2), (0, NONE, 1), (1, NONE, 0), (NONE, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@FEW
@given(data=st.data())
def test_products(dtype, data):
    def draw(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    slots, p = draw(*PATTERNS), draw(0.0, 0.0, 0.25, 0.1, 0.5)
    M, K, D = draw(0, 1, 31, 33, 63), draw(1, 8, 33, 40, 64), draw(1, 31, 33, 64)
    r, bias = draw(1, 2, 5, 16, 17, 33, 64, 70), draw(True, False)
    layouts = [draw(*LAYOUTS, "among NaN") for _ in ("x", "weight", "dY")]
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    products = []
    for _ in range(6 if M * K * D < 300 else 1):  # one element may round well or badly by chance
        of = make_product(M, K, D, r, slots, p, dtype)
        x, weight, dY = (matrix(t, layout) for t, layout in zip((of.x, of.weight, of.dY), layouts, strict=True))
        products.append(replace(of, x=x, weight=weight, dY=dY, bias=of.bias if bias else None))
    check(products)


def test_products_of_parts_are_those_of_the_whole():
    """g alone, dB alone and y without h stored are, bit for bit, what they are together."""
    of = make_product(70, 33, 40, 5, (1, NONE, 0), 0.25, torch.bfloat16)
    h = linear.packed_lora_linear_h(of.x, of.linear)
    db: Any = (of.dY, h, of.linear)
    g, dB = reductions.packed_lora_linear_db(*db, compute_g=True, compute_dB=True)
    only_g, _ = reductions.packed_lora_linear_db(*db, compute_g=True, compute_dB=False)
    _, only_dB = reductions.packed_lora_linear_db(*db, compute_g=False, compute_dB=True)
    assert torch.equal(only_g, g)
    assert torch.equal(only_dB, dB)
    y, _ = linear.packed_lora_linear_fwd(of.x, of.linear, None)
    only_y, no_h = linear.packed_lora_linear_fwd(of.x, of.linear._replace(save_h=False), None)
    assert torch.equal(only_y, y)
    assert no_h.shape == (0, 10)


@pytest.mark.parametrize("tiles", [(64, 32, 32, 4, 1), (32, 64, 32, 4, 1), (32, 32, 64, 4, 1)], ids=str)
def test_products_with_other_tiles(tiles, monkeypatch):
    """Masks among others: their counters start at the tile's column, whatever its width."""
    monkeypatch.setitem(HALF_TILES, 0, (Tiles(*tiles),))
    check([make_product(70, 70, 33, 5, (1, 0), 0.25, torch.float16)])


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("r", "p"), [(5, 0.0), (33, 0.0), (17, 0.25)])
def test_products_that_start_from_a_residual(r, p, stream):
    """In the rows of several adapters and of none, with h given and inside, at sizes that no tile divides."""
    of = make_product(37, 35, 33, r, (1, NONE, 0), p, torch.bfloat16)
    bias, residual = randn(99, dtype=torch.bfloat16), randn(37, 99, dtype=stream)
    of = replace(of, bias=bias)
    exact = by_formulas(of, torch.float64)["y"] + residual.double()
    same_dtype = by_formulas(of, torch.bfloat16)["y"].to(stream) + residual
    for h in (linear.packed_lora_linear_h(of.x, of.linear), None):
        y, _ = linear.packed_lora_linear_fwd(of.x, of.linear, h, residual=residual)
        assert y.dtype == stream
        assert_as_accurate_as_reference(y, same_dtype, exact, "y", torch.bfloat16)


def test_memory_that_kernels_write_starts_as_nan():
    """Or the tests of this file would not see what a kernel leaves unwritten."""
    for dtype in DTYPES:
        assert launch.empty((3, 5), dtype, DEVICE).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_nothing_is_written_beside_the_results(dtype, p, monkeypatch):
    """Every result lies between two stretches of memory that must stay as they are."""
    around: list[Tensor] = []
    empty = torch.empty
    beside = 5000

    def fenced(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel()
        memory = torch.full((size + 2 * beside,), 7.0, dtype=dtype, device=device)
        around.extend((memory[:beside], memory[-beside:]))
        return memory[beside : beside + size].view(shape)

    def only_partial_sums(shape: Any, *arguments: Any, dtype: torch.dtype, device: Any = None) -> Tensor:
        return fenced(shape, dtype, device) if dtype == torch.float32 else empty(shape, dtype=dtype, device=device)

    of = make_product(33, 35, 37, 3, (1, NONE, 0), p, dtype)
    kept = torch.float32 if launch.upcast(dtype) else dtype
    monkeypatch.setattr(launch, "empty", lambda shape, _dtype, device: fenced(shape, kept, device))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", only_partial_sums)
        by_kernels(of)
    factors.merge_weight(of.linear, dtype)
    bases = [None, random_basis(37, 5).to(DEVICE)]
    factors.fold_factors([of.A[0], of.B[0]], bases, [False] * 2, [False, True], 1.0, dtype)
    assert len(around) >= 2 * 11
    assert all((fence == 7).all() for fence in around)


@pytest.mark.parametrize(("p", "adapters"), [(0.25, 3), (0.1, 2), (0.5, 1), (2**-16, 1), (1e-9, 1), (1 - 2**-20, 1)])
def test_masks_are_those_of_the_reference(p, adapters, monkeypatch):
    """Element for element in h, y, dX and dA, which show them where W = 0, A = B = I and x = 1."""
    monkeypatch.setattr(da, "ROWS_PER_SPLIT", 20)  # masks of dA start in the middle, too
    K = M = D = 50
    masks = masks_of(SEED, adapters, (M, K), p)
    assert masks is not None
    expected = torch.cat([m.float() for m in masks], 1)  # [M, P K]
    seed, slots = SEED.to(DEVICE), tuple(range(adapters))
    ones, identity = torch.ones(M, K, device=DEVICE), torch.eye(K, device=DEVICE)
    A = B = identity.expand(adapters, K, K).contiguous()
    weight = torch.zeros(adapters * D, K, device=DEVICE)
    product = AdaptedLinear(weight, None, list(A), list(B), [(i * D, (i + 1) * D) for i in slots], p, [seed])
    h = linear.packed_lora_linear_h(ones, product)
    assert torch.equal(h, expected)
    y, _ = linear.packed_lora_linear_fwd(ones, product, h)
    assert torch.equal(y, expected)
    g = identity.repeat(1, adapters)  # g_p = I: dA_p = m_p
    assert torch.equal(reductions.packed_lora_linear_da(ones, g, product), torch.stack(masks).float())
    powers = torch.cat([2.0**i * ones for i in slots], 1)  # dX = Σ 2^i m_i, from which the masks can be told
    scale = 1 / (1 - drawn_p(p))
    bits = torch.stack([2.0**i * (m > 0).double() for i, m in enumerate(masks)]).sum(0)
    dX, _ = linear.packed_lora_linear_dx(powers, product, powers)
    assert torch.equal((dX.double() / scale).round(), bits)
    assert torch.allclose(dX.double(), bits * scale, rtol=1e-6, atol=0)  # float32 sums of three terms

    r = 32  # inside, of the last 32 columns, in bfloat16
    first, wide = K - r, expected.unflatten(1, (adapters, K)).bfloat16()
    A, B = (matrix.bfloat16().expand(adapters, r, -1).contiguous() for matrix in (identity[first:], identity[:r, :r]))
    assert linear.fits_inside(r, torch.bfloat16, p)
    weight, ones, powers = weight[: adapters * r].bfloat16(), ones.bfloat16(), powers.unflatten(1, (adapters, D))
    inside = AdaptedLinear(weight, None, list(A), list(B), [(i * r, (i + 1) * r) for i in slots], p, [seed])
    y, h = linear.packed_lora_linear_fwd(ones, inside, None)
    assert torch.equal(h, wide[:, :, first:].flatten(1))
    assert torch.equal(y, h)
    dX, _ = linear.packed_lora_linear_dx(powers[:, :, :r].flatten(1).bfloat16(), inside, None)
    assert torch.equal((dX[:, first:].double() / scale).round(), bits[:, first:])


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_that_a_row_does_not_have_are_zero(p, dtype):
    """Of whole tiles and their edges; the others keep every bit, and NaN in a factor stays in its own columns."""
    of = make_product(70, 35, 37, 19, (1, NONE, 0), p, dtype)
    h = linear.packed_lora_linear_h(of.x, of.linear)
    columns = torch.rand(h.shape, device=DEVICE) < 0.5
    masked = of.linear._replace(columns=columns)
    assert torch.equal(linear.packed_lora_linear_h(of.x, masked), torch.where(columns, h, 0))
    assert_beside(of, masked, torch.where(columns, h, 0))
    of.A[0, 0] = torch.nan
    columns[:, 0] = False
    assert linear.packed_lora_linear_h(of.x, masked).isfinite().all()
    with pytest.raises(ValueError, match="h=None with columns"):
        linear.packed_lora_linear_fwd(of.x, masked, None)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 2])
def test_masks_of_any_seed(seed):
    x, identity = torch.ones(33, 40, device=DEVICE), torch.eye(40, device=DEVICE)
    seeds = [torch.tensor([seed], device=DEVICE)]
    h = linear.packed_lora_linear_h(x, AdaptedLinear(identity, None, [identity], [identity], [(0, 40)], 0.5, seeds))
    assert torch.equal(h, 2 * reference.keep_mask(seed, 0, (33, 40), 0.5).to(DEVICE).float())


@pytest.mark.parametrize("p", [1 / 256, 0.1, 0.25, 1 / 3, 0.5, 1 - 2**-8, 1 - 2**-16])
def test_dropout_lanes(p):
    """They drop with probability p to 2^-17, exactly for multiples of 2^-16; `m = mask / (1 - p)` has mean one."""
    lanes = dropout_lanes(p)
    drawn = lanes.threshold / 2**lanes.bits
    assert abs(drawn - p) <= 2**-17
    assert lanes.bits == (8 if (p * 256).is_integer() else 16)
    assert drawn == p or not (p * 2**16).is_integer()
    assert (1 - drawn) * lanes.scale == pytest.approx(1, rel=1e-15)


def test_dropout_lanes_close_to_zero_and_one():
    assert dropout_lanes(0.0).bits == 0
    assert dropout_lanes(1e-9)[1:] == (0, 1.0)
    assert dropout_lanes(1 - 2**-53)[1:] == (2**16 - 1, 2**16)  # something is left


class Recorded:
    """A kernel whose grids and arguments are recorded."""

    def __init__(self, kernel: Any, *, runs: bool = True) -> None:
        self.kernel, self.runs = kernel, runs
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.grids.append(grid)
        return self.kernel[grid] if self.runs else lambda *_, **__: None


@pytest.mark.parametrize(("r", "layout"), [(1, "contiguous"), (17, "transposed"), (70, "strided"), (5, "among NaN")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_weight_rounds_once(dtype, r, layout):
    """What is left of the exact sum is one rounding, from a float32 weight as from one in the dtype of the product."""
    of = make_product(1, 40, 33, r, (1, NONE, 0), dtype=dtype)
    for weight in (of.weight, randn(99, 40)):
        weight = matrix(weight, layout)
        merged = factors.merge_weight(replace(of, weight=weight).linear, dtype)
        exact = weight.double()
        for slot in (0, 1):
            rows = slice(33 * of.groups.adapters.index(slot), 33 * of.groups.adapters.index(slot) + 33)
            exact[rows] += of.B[slot].double() @ of.A[slot].double()
        rounding = (exact.to(dtype).double() - exact).norm()
        assert merged.dtype == dtype
        # Sums of up to 71 terms in float32 move few elements, if any, to the other neighbour, hardly farther away.
        allowed = 1.001 * rounding if dtype in HALF else 1e-6 * exact.norm()
        assert (merged.double() - exact).norm() <= allowed


def test_stacked_copies_only_what_does_not_lie_side_by_side():
    flat = randn(30)
    parts = [flat[i * 6 : i * 6 + 6].view(2, 3) for i in range(4)]
    stacked = launch.stacked(parts[1:])
    assert torch.equal(stacked, torch.stack(parts[1:]))
    assert stacked.data_ptr() == parts[1].data_ptr()
    alone = launch.stacked([parts[2]])
    assert alone is parts[2]
    for others in (parts[::-1], parts[::2], [parts[0], parts[0]], [randn(2, 3), randn(2, 3)], [p.T for p in parts]):
        stacked = launch.stacked(others)
        assert torch.equal(stacked, torch.stack(others))
        assert stacked.is_contiguous()
        assert stacked.data_ptr() != others[0].data_ptr()
    transposed = launch.stacked([parts[0].T])
    assert transposed.is_contiguous()
    assert torch.equal(transposed, parts[0].T)


def test_tf32_only_where_torch_allows_it():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        assert launch.input_precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert launch.input_precision(torch.float32) == "tf32"
        assert launch.input_precision(torch.bfloat16) == "ieee"
        torch.set_float32_matmul_precision("highest")
        assert launch.input_precision(torch.float32) == "ieee"
        matmul.fp32_precision = "tf32"  # the newer switch, after which torch refuses to read the older one
        assert launch.input_precision(torch.float32) == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("rows", "N", "expected"),
    [
        ([(0, 8)], 8, (0,)),
        ([(0, 8), (8, 16), (16, 24)], 24, (0, 1, 2)),
        ([(16, 24), (0, 8)], 24, (1, NONE, 0)),
        ([(8, 16)], 56, (NONE, 0, *[NONE] * 5)),
        ([(8, 16)], 64, None),  # more than seven groups
        ([(0, 8), (0, 8)], 24, None),  # twice the same
        ([(0, 8), (8, 24)], 24, None),  # unequal
        ([(4, 12)], 24, None),  # between two groups
        ([(0, 8)], 20, None),  # what is left is no block
        ([(0, 0)], 24, None),
        ([(-8, 0)], 24, None),  # before the first
        ([(24, 32)], 24, None),  # behind the last
    ],
    ids=str,
)
def test_row_blocks(rows, N, expected):
    groups = row_groups(rows, N)
    assert groups == (None if expected is None else (N // len(expected), expected))
    if groups is not None:
        assert len(groups.adapters) <= MAX_GROUPS
        assert tuple(groups.adapter_of_group >> 4 * i & 15 for i in range(len(groups.adapters))) == expected
        assert [groups.size * (groups.group_of_adapter >> 4 * i & 15) for i in range(len(rows))] == [s for s, _ in rows]
        assert max(groups.adapter_of_group, groups.group_of_adapter) < 2**31


def test_seven_blocks_in_any_order():
    check([make_product(5, 9, 3, 2, (6, 2, 4, 0, 5, 1, 3))])


ROWS_APART, COLUMNS_APART = 2**30, 70_000_000  # two rows, and 31 columns, are more than 2^31 elements


@pytest.fixture
def far_apart(tmp_path: Path) -> Callable[..., Tensor]:
    """Matrices whose elements lie up to 66 columns apart, in the middle of memory that is mostly not there.

    In the middle: an address that wraps around at 32 bits reads zeros, rather than ending the process.
    """
    first, size = 2**31, 2**31 + 66 * COLUMNS_APART
    if DEVICE.type == "cpu":
        memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=size, dtype=torch.bfloat16)
    else:
        memory = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)

    def place(matrix: Tensor, stride: tuple[int, int], offset: int = 0) -> Tensor:
        return memory.as_strided(matrix.shape, stride, first + offset).copy_(matrix)

    return place


@pytest.mark.parametrize("apart", ["rows", "columns"])
def test_addresses_beyond_32_bits(apart, far_apart):
    of = make_product(3, 40, 33, 2, (0, NONE), dtype=torch.bfloat16)
    near = by_kernels(of)
    for name, rows_apart in (("x", ROWS_APART), ("dY", ROWS_APART), ("weight", COLUMNS_APART)):
        stride = (rows_apart, 1) if apart == "rows" else (1, COLUMNS_APART)
        far = by_kernels(replace(of, **{name: far_apart(getattr(of, name), stride)}))
        assert all(torch.equal(far[key], near[key]) for key in near), name


def test_factors_and_bases_beyond_32_bits(far_apart):
    A, B = randn(2, 40, dtype=torch.bfloat16), randn(3, 40, dtype=torch.bfloat16)
    near = factors.fold_factors([A, B], [None] * 2, [False] * 2, [False] * 2, 1.0, torch.bfloat16)
    there = [far_apart(A, (40, 1)), far_apart(B, (40, 1), 2**31 + 80)]
    assert torch.equal(factors.fold_factors(there, [None] * 2, [False] * 2, [False] * 2, 1.0, torch.bfloat16), near)


@pytest.mark.parametrize("kernel", ["h", "fwd", "dx", "db", "da", "activation_bwd"])
def test_grids_fit_the_device_for_any_number_of_rows(kernel, monkeypatch):
    """CUDA takes 2^31 - 1 programs in the first dimension, 65535 in the others."""
    files = {"h": linear, "fwd": linear_fwd, "dx": linear_dx, "db": db, "da": da, "activation_bwd": activation}
    recorded, name = Recorded(None, runs=False), "" if kernel == "activation_bwd" else "packed_lora_linear_"
    monkeypatch.setattr(files[kernel], f"{name}{kernel}_kernel", recorded)
    of = make_product(1, 1, 1, 1, p=0.25)
    M = 2**23
    x, dY, hg = (torch.ones(1, 1, device=DEVICE).expand(M, 1) for _ in range(3))
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        {
            "h": lambda: linear.packed_lora_linear_h(x, of.linear),
            "fwd": lambda: linear.packed_lora_linear_fwd(x, of.linear, hg),
            "dx": lambda: linear.packed_lora_linear_dx(dY, of.linear, hg),
            "db": lambda: reductions.packed_lora_linear_db(dY, hg, of.linear, compute_g=True, compute_dB=True),
            "da": lambda: reductions.packed_lora_linear_da(x, hg, of.linear),
            "activation_bwd": lambda: activation.activation_bwd(dY, x, "gelu"),
        }[kernel]()
    (grid,) = recorded.grids
    assert grid[0] < 2**31
    assert all(size <= 65535 for size in grid[1:])


def tf32(tensor: Tensor) -> Tensor:  # float32
    """The 10 bits of mantissa that a tensor core takes of a float32."""
    return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)


def test_three_tf32_products_are_as_accurate_as_one_in_float32():
    """Which is why the factors may be folded by them on a GPU ("tf32x3"), and not by single ones."""
    factor, basis = torch.randn(16, 768), random_basis(768, 384)

    def three(a: Tensor, b: Tensor) -> Tensor:
        a_high, b_high = tf32(a), tf32(b)
        a_low, b_low = tf32(a - a_high).double(), tf32(b - b_high).double()
        return (a_high.double() @ b_high.double() + a_high.double() @ b_low + a_low @ b_high.double()).float()

    def one(a: Tensor, b: Tensor) -> Tensor:
        return (tf32(a).double() @ tf32(b).double()).float()

    def projected(product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return factor - product(product(factor, basis), basis.T)

    exact = reference.project_complement(factor.double(), basis.double())
    same_dtype = reference.project_complement(factor, basis)
    assert_as_accurate_as_reference(projected(three), same_dtype, exact, "three products")
    assert (projected(three).double() @ basis.double()).norm() <= 1e-5 * factor.norm()
    with pytest.raises(AssertionError, match="one product"):
        assert_as_accurate_as_reference(projected(one), same_dtype, exact, "one product")
    assert (projected(one).double() @ basis.double()).norm() > 1e-5 * factor.norm()
