"""The skinny products of the backward pass and their sums over splits of the rows, against float64."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate_as_reference
from torch import Tensor
from triton_device import DEVICE, masks_of

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.backends.torch import Norm, activate, normalize
from complora_kernels.kernels import da, db, partials, reductions
from complora_kernels.kernels.kept import KEPT
from complora_kernels.kernels.reductions import Source

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
SEED = torch.tensor([2**62 + 12345], device=DEVICE)
NONE = 15


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


@pytest.fixture(autouse=True)
def arrivals(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """Short splits, many of them; and whatever was counted is zero again."""
    monkeypatch.setattr(da, "ROWS_PER_SPLIT", 1)
    monkeypatch.setattr(db, "ROWS_PER_SPLIT", 1)
    handed: list[Tensor] = []
    counters = partials.counters

    def recorded(n: int, device: torch.device) -> Tensor:
        handed.append(counters(n, device))
        assert len(handed[-1]) >= n
        return handed[-1]

    monkeypatch.setattr(partials, "counters", recorded)
    yield handed
    assert all(not counts.any() for counts in handed)


def output_side(D: int, r: int, slots: tuple[int, ...], dtype: torch.dtype) -> AdaptedLinear:
    """A product of which B̃s and rows are read; the groups of its rows have the adapters `slots`."""
    P = sum(slot != NONE for slot in slots)
    rows = [(slots.index(p) * D, slots.index(p) * D + D) for p in range(P)]
    weight = torch.empty(len(slots) * D, 1, dtype=dtype, device=DEVICE)
    return AdaptedLinear(weight, None, [], [randn(D, r, dtype=dtype) for _ in range(P)], rows)


def input_side(K: int, adapters: int, p: float) -> AdaptedLinear:
    """A product of which the number of adapters and the dropout are read."""
    weight = torch.empty(0, K, device=DEVICE)
    return AdaptedLinear(weight, None, [], [], [(0, 0)] * adapters, p, [SEED] if p else [])


def g_and_dB(dY: Tensor, h: Tensor, linear: AdaptedLinear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    parts = [dY[:, start:stop].to(dtype) for start, stop in linear.rows]
    hs = h.to(dtype).chunk(len(parts), 1)
    g = torch.cat([part @ B.to(dtype) for part, B in zip(parts, linear.Bs, strict=True)], 1)
    return g, torch.stack([part.mT @ h_p for part, h_p in zip(parts, hs, strict=True)])


def dA_of(value: Tensor, g: Tensor, adapters: int, p: float, dtype: torch.dtype) -> Tensor:
    masks = masks_of(SEED, adapters, value.shape, p) or [torch.ones_like(value)] * adapters
    pairs = zip(g.to(dtype).chunk(adapters, 1), masks, strict=True)
    return torch.stack([g_p.mT @ (value.to(dtype) * mask.to(dtype)) for g_p, mask in pairs])


CASES = [  # M, D, r, adapters of the groups
    (1, 33, 1, (0,)),
    (31, 64, 2, (0, 1, 2)),
    (300, 33, 8, (0,)),  # ten splits, in groups of four
    (70, 97, 12, (1, NONE, 0)),  # columns shared by two programs
    (64, 137, 16, (0,)),
    (40, 70, 48, (2, 0, 1)),
    (33, 33, 64, (0,)),
    (0, 33, 3, (0, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("M", "D", "r", "slots"), CASES, ids=str)
def test_packed_lora_linear_db(M, D, r, slots, dtype):
    linear = output_side(D, r, slots, dtype)
    dY, h = randn(M, D * len(slots), dtype=dtype), randn(M, r * len(linear.rows), dtype=dtype)
    g, dB = reductions.packed_lora_linear_db(dY, h, linear, compute_g=True, compute_dB=True)
    same, exact = g_and_dB(dY, h, linear, dtype), g_and_dB(dY, h, linear, torch.float64)
    assert_as_accurate_as_reference(g, same[0], exact[0], "g")
    assert_as_accurate_as_reference(dB, same[1], exact[1], "dB")
    (partial, _) = reductions.packed_lora_linear_db(dY, h, linear, compute_g=True, compute_dB=False, partial_g=True)
    if partial.dim() == 3:
        assert D > 64
        assert partial.dtype == torch.float32
        partial = partial.sum(0).to(dtype)
    assert_as_accurate_as_reference(partial, same[0], exact[0], "partial g")

    parts = [part.clone() for part in dY.chunk(len(slots), 1)]
    N, R, both = dY.shape[1], g.shape[1], {"compute_g": True, "compute_dB": True}
    again_g, again_dB, packed = reductions.packed_lora_linear_db(parts, h, linear, pack=True, **both)
    assert all(torch.equal(a, b) for a, b in ((again_g, g), (again_dB, dB), (packed, dY)))
    again_g, again_dB, wide = reductions.packed_lora_linear_db(dY, h, linear, beside=True, **both)
    assert all(torch.equal(a, b) for a, b in ((again_g, g), (again_dB, dB), (wide[:, :N], dY)))
    assert wide.shape[1] == -(-(N + R) // 8) * 8
    assert torch.equal(wide[:, N : N + R], g)
    assert not wide[:, N + R :].any()


def test_parts_of_dY_have_their_own_strides():
    linear = output_side(40, 3, (0, NONE, 1), torch.float32)
    dY, h = randn(50, 120), randn(50, 12)[:, 3:9]  # rows of h lie apart
    parts = [dY[:, :40], dY[:, 40:80].T.contiguous().T, randn(50, 80)[:, 7:47].copy_(dY[:, 80:])]
    ours = reductions.packed_lora_linear_db(parts, h, linear, compute_g=True, compute_dB=True, pack=True)
    whole = reductions.packed_lora_linear_db(dY, h.contiguous(), linear, compute_g=True, compute_dB=True, pack=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, whole, strict=True))
    many = output_side(10, 2, (0, 1, 2, 3), torch.float32)  # more tensors than there are pointers
    dY, h = randn(20, 40), randn(20, 8)
    ours = reductions.packed_lora_linear_db(dY.chunk(4, 1), h, many, compute_g=True, compute_dB=True)
    whole = reductions.packed_lora_linear_db(dY, h, many, compute_g=True, compute_dB=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, whole, strict=True))
    with pytest.raises(ValueError, match="dY is 2 tensors, expected one for each of 4 groups"):
        reductions.packed_lora_linear_db(dY.chunk(2, 1), h, many, compute_g=True, compute_dB=True)
    with pytest.raises(ValueError, match="expected tensors of one shape and dtype"):
        reductions.packed_lora_linear_db([*dY.chunk(4, 1)[:3], dY[:10, :10]], h, many, compute_g=True, compute_dB=True)


def test_what_is_not_needed_is_not_computed():
    linear = output_side(70, 3, (0,), torch.float32)
    dY, h = randn(40, 70), randn(40, 3)
    g, dB = reductions.packed_lora_linear_db(dY, h, linear, compute_g=True, compute_dB=True)
    only_g, nothing = reductions.packed_lora_linear_db(dY, h[:0], linear, compute_g=True, compute_dB=False)
    assert torch.equal(only_g, g)
    assert nothing.numel() == 0
    nothing, only_dB = reductions.packed_lora_linear_db(dY, h, linear, compute_g=False, compute_dB=True)
    assert torch.equal(only_dB, dB)
    assert nothing.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "norm", "gelu", "quick_gelu"])
@pytest.mark.parametrize("p", [0.0, 0.25, 0.1])
def test_packed_lora_linear_da(p, kind, dtype):
    shapes = [(1, 33, 1, 3), (70, 70, 12, 3)]
    if kind == "plain" and dtype != torch.float16:
        shapes += [(0, 33, 2, 1), (300, 33, 8, 1), (40, 33, 64, 1)]
    for M, K, r, adapters in shapes:
        x, g = randn(M, K, dtype=dtype), randn(M, r * adapters + 5, dtype=dtype)[:, 2 : 2 + r * adapters]
        source = Source(x, g, input_side(K, adapters, p))
        value, exact_value = x, x.double()
        if kind == "norm":
            weight, bias = 1 + 0.3 * randn(K, dtype=dtype), randn(K, dtype=dtype)
            value, mean, rstd = normalize(x, Norm(weight, bias, 1e-5), dtype)
            exact_value = normalize(x.double(), Norm(weight.double(), bias.double(), 1e-5), torch.float64)[0]
            source = source._replace(norm=(mean.contiguous(), rstd.contiguous(), weight, bias))
        elif kind != "plain":
            value, exact_value = activate(x, kind), activate(x.double(), kind)
            source = source._replace(activation=kind)
        same = dA_of(value, g, adapters, p, dtype)
        exact = dA_of(exact_value, g, adapters, p, torch.float64)
        x, g, reader, norm, activation = source
        dA = reductions.packed_lora_linear_da(x, g, reader, norm=norm, activation=activation)
        assert_as_accurate_as_reference(dA, same, exact, f"dA, M={M}")

        linear = output_side(35, 3, (0, 1), dtype)
        dY, h = randn(M, 70, dtype=dtype), randn(M, 6, dtype=dtype)
        both = reductions.packed_lora_linear_grads(source, (dY, h, linear))
        assert torch.equal(both[0], dA)  # computed twice
        same, exact = g_and_dB(dY, h, linear, dtype), g_and_dB(dY, h, linear, torch.float64)
        assert_as_accurate_as_reference(both[1], same[1], exact[1], f"dB, M={M}")


def test_gradients_of_products_that_do_not_fit_each_other():
    linear = output_side(35, 3, (0,), torch.float32)
    source = Source(randn(4, 8), randn(4, 2), input_side(8, 1, 0.0))
    with pytest.raises(ValueError, match="expected equal numbers of rows"):
        reductions.packed_lora_linear_grads(source, (randn(5, 35), randn(5, 3), linear))


@settings(deadline=None, derandomize=True)
@given(M=st.integers(0, 10**6), wanted=st.integers(0, 3000), block_m=st.sampled_from((32, 64)))
def test_splits_cover_every_row_once(M, wanted, block_m):
    count, rows, group = splits = partials.split_rows(M, wanted, block_m)
    assert count == 1 or (count - 1) * rows < M
    assert count * rows >= M
    assert rows % block_m == 0
    assert 1 <= count <= max(wanted, 1)
    assert (splits.groups - 1) * group < count <= splits.groups * group
    assert splits.groups <= group
    assert group <= partials.UNGROUPED or (group - 1) ** 2 < count


def test_many_splits_are_added_in_groups_and_in_order(arrivals):
    """The bits are those of float32 sums of each group in order, and of the groups in order."""
    M, K = 500, 32
    x, g = randn(M, K), randn(M, 1)
    dA = reductions.packed_lora_linear_da(x, g, input_side(K, 1, 0.0))
    splits = partials.split_rows(M, M, 32)
    assert (splits.number, splits.groups) == (16, 4)
    parts = [
        reductions.packed_lora_linear_da(x[m : m + splits.rows], g[m : m + splits.rows], input_side(K, 1, 0.0))
        for m in range(0, M, splits.rows)
    ]
    total = torch.zeros_like(dA)
    for first in range(0, splits.number, splits.group):
        of_group = torch.zeros_like(dA)
        for part in parts[first : first + splits.group]:
            of_group = of_group + part
        total = total + of_group
    assert torch.equal(dA, total)


def test_counters_of_streams_threads_and_captures(monkeypatch):
    """Each has its own; those of a capture are kept by it and handed to nobody else."""
    here: dict[str, Any] = {"stream": 1, "capturing": False}
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: here["capturing"])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _index: here["stream"], raising=False)
    monkeypatch.setattr(torch, "zeros", lambda n, dtype, device: zeros(n, dtype=dtype))
    monkeypatch.setattr(partials, "_HERE", partials._Here())
    device = torch.device("cuda", 0)
    counters = partials.counters
    eager = counters(3, device)
    assert counters(5, device) is eager
    grown = counters(len(eager) + 1, device)
    assert len(grown) > len(eager)
    assert counters(3, device) is grown
    here["stream"] = 2
    assert counters(3, device) is not grown
    others: list[Tensor] = []
    thread = threading.Thread(target=lambda: others.append(counters(3, device)))
    thread.start()
    thread.join()
    assert all(others[0] is not mine for mine in (grown, counters(3, device)))

    here["capturing"] = True
    captured = []
    for _ in range(2):
        kept: list[Tensor] = []
        with KEPT.holding(kept):
            first = counters(3, device)
            assert counters(4, device) is first
            assert any(tensor is first for tensor in kept)
            here["stream"] = 3
            assert counters(4, device) is not first
            here["stream"] = 2
        captured.append((first, kept))
    assert captured[0][0] is not captured[1][0]
    assert counters(3, device) is not counters(3, device)  # of a capture that keeps nothing
    here["capturing"] = False
    assert all(counters(3, device) is not first for first, _ in captured)
