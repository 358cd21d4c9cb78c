"""The extension on the CPU: its registered operations against float64, and the backend through the public functions."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    DTYPES,
    HALF,
    KINDS,
    LAYOUTS,
    LEAVES,
    SIZES,
    Recorder,
    assert_accurate,
    laid_out,
    make_layer,
    packed_reference,
    results,
)
from numerics import EPS, assert_as_accurate_as_reference, random_basis
from small_clip import adapted, small_clip, small_clip_4
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from triton_device import DEVICE, drawn_p

import complora_kernels as ck
from complora_kernels import reference, subspace
from complora_kernels.backends import build
from complora_kernels.functional import (
    complora_linear,
    fold_factors,
    lora_linear,
    packed_lora_linear,
    project_complement,
)

OPS = torch.ops.complora
REGISTRATION = Path(__file__).parents[2] / "csrc" / "registration.cpp"
NAMES = ("project_complement", "fold_factors", "packed_lora_linear_factor_grads", "drop")
DROPOUTS = (0.0, 0.25, 0.1)  # none; a lane of 8 bits; of 16


@pytest.fixture(autouse=True, scope="module")
def built() -> None:
    reason = build.failure("cpu")
    if reason is not None:
        pytest.fail(f"the extension cannot be tested: {reason}", pytrace=False)


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of the sums."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def masks_of(seed: Tensor, adapters: int, shape: Sequence[int], p: float) -> list[Tensor] | None:
    """`m = mask / (1 - p)` [..., K] in float64, one for each adapter."""
    if p == 0:
        return None
    *batch, K = shape
    keep = [reference.keep_mask(int(seed), i, (torch.Size(batch).numel(), K), p) for i in range(adapters)]
    return [mask.view(torch.Size(shape)).double() / (1 - drawn_p(p)) for mask in keep]


def next_seed() -> Tensor:
    """The seed that the next call draws."""
    with torch.random.fork_rng(devices=[]):
        return OPS.philox_seed(torch.empty(0))


def within(tensor: Tensor) -> Tensor:
    """The same values as a slice of something larger, in every dimension."""
    larger = F.pad(tensor, [1, 2] * tensor.dim(), value=7.0)
    return larger[tuple(slice(1, 1 + size) for size in tensor.shape)]


def placed(tensor: Tensor, layout: str) -> Tensor:
    return within(tensor) if layout == "slice" else laid_out(tensor, layout)


# ---- the operations


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, derandomize=True, max_examples=50)
@given(data=st.data())
def test_project_complement(dtype, data):
    def draw(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    d, complement = draw(*SIZES, 193, 400), draw(False, True)  # above 192 columns work is cut into pieces
    k = draw(0, d // 6, d // 2, *([d] if complement else []))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    basis = placed(random_basis(d, k, wide(dtype)), draw("contiguous", "strided", "transposed", "slice"))
    shape = draw((), (1,), (3,), (63,), (0,), (3, 5), (2, 0), (2, 3, 4))
    factor = placed(torch.randn(*shape, d).to(dtype), draw(*LAYOUTS, "slice"))
    kind = KINDS[complement]
    expected = reference.project_complement(factor, basis, basis_kind=kind)
    exact = reference.project_complement(factor.double(), basis.double(), basis_kind=kind)
    assert_as_accurate_as_reference(OPS.project_complement(factor, basis, complement), expected, exact, "projected")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [3, 1500])
def test_nothing_is_left_where_every_direction_is_protected(dtype, rows):
    basis, factor = random_basis(63, 63, wide(dtype)), torch.randn(rows, 63).to(dtype)
    left = OPS.project_complement(factor, basis, False)
    assert left.norm() <= {torch.float64: 1e-12}.get(dtype, 1e-5) * factor.norm()  # the design's bound for float32
    assert not OPS.project_complement(factor, basis[:, :0], True).any()
    assert torch.equal(OPS.project_complement(factor, basis[:, :0], False), factor)


def plain_fold(
    factors: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    complement: Sequence[bool],
    output_side: Sequence[bool],
    scaling: float,
    dtype: torch.dtype,
    computed_in: torch.dtype,
) -> list[Tensor]:
    folded = []
    for factor, basis, inside, output in zip(factors, bases, complement, output_side, strict=True):
        rows = (factor.mT if output else factor).to(computed_in)
        if basis is not None:
            rows = reference.project_complement(rows, basis.to(computed_in), basis_kind=KINDS[inside])
        folded.append((scaling * rows.mT if output else rows).to(dtype))
    return folded


def check_fold(
    factors: Sequence[Tensor],
    bases: Sequence[Tensor | None],
    complement: Sequence[bool],
    output_side: Sequence[bool],
    dtype: torch.dtype,
    scaling: float = 1.7,
) -> None:
    """Each result by the accuracy rule."""
    arguments = (factors, bases, complement, output_side, scaling)
    flat = OPS.fold_factors(*arguments, dtype)
    assert flat.shape == (sum(factor.numel() for factor in factors),)
    parts = [part.view(f.shape) for part, f in zip(flat.split([f.numel() for f in factors]), factors, strict=True)]
    plain = plain_fold(*arguments, dtype, wide(factors[0].dtype, dtype))
    exact = plain_fold(*arguments, torch.float64, torch.float64)
    for i, results_of_one in enumerate(zip(parts, plain, exact, strict=True)):
        assert_as_accurate_as_reference(*results_of_one, f"factor {i}")


@pytest.mark.parametrize("copies", [1, 6])  # below and above the 16 factors that are shared out as they are
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
def test_fold_factors(factor_dtype, dtype, copies):
    """Mixed shapes, ranks, sides, kinds and layouts, with and without a basis, to any dtype."""
    cases = [  # r, d, k, complement, output side, layout
        (3, 137, 63, False, True, "contiguous"),
        (128, 63, 21, True, True, "transposed"),
        (1, 1, 1, True, False, "strided"),
        (33, 400, 200, False, False, "transposed"),
        (2, 400, 390, True, True, "slice"),
        (7, 8, 0, False, True, "expanded"),
        (5, 193, None, False, True, "strided"),
        (4, 63, None, True, False, "contiguous"),
    ] * copies
    computed_in = wide(factor_dtype, dtype)
    shapes = [(d, r) if output else (r, d) for r, d, _, _, output, _ in cases]
    factors = [placed(torch.randn(s).to(factor_dtype), case[-1]) for s, case in zip(shapes, cases, strict=True)]
    known = {(d, k): random_basis(d, k, computed_in) for _, d, k, *_ in cases if k is not None}
    bases = [known.get((d, k)) for _, d, k, *_ in cases]
    check_fold(factors, bases, [case[3] for case in cases], [case[4] for case in cases], dtype)


def test_fold_factors_of_nothing_left_and_of_nothing():
    """A complement basis of no columns protects everything; a factor may have no elements."""
    B, A, nothing = torch.randn(9, 2), torch.randn(3, 9), torch.randn(0, 9)
    given = ([B, nothing, A], [random_basis(9, 0), random_basis(9, 4), None], [True, False, False])
    flat = OPS.fold_factors(*given, [True, False, False], 3.0, torch.float32)
    assert not flat[:18].any()
    assert torch.equal(flat[18:].view(3, 9), A)
    assert OPS.fold_factors([nothing], [None], [False], [False], 1.0, torch.float64).shape == (0,)


@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("rows", [1024, 1025, 12000])  # one strip, two, and more than one workspace of 4 Mi elements
def test_fold_factors_of_many_rows(rows, output):
    bases = [random_basis(400, 400 if rows > 1025 else 200), None, random_basis(9, 4)]
    factors = [torch.randn(rows, 400), torch.randn(5, 9), torch.randn(2000, 9)]
    factors = [factor.mT.contiguous() if output else factor for factor in factors]
    check_fold(factors, bases, [rows > 1025, False, False], [output] * 3, torch.bfloat16)


class Grads:
    """The arguments of `packed_lora_linear_factor_grads`; r columns of h and g for each adapter."""

    def __init__(
        self,
        M: int,
        dtype: torch.dtype,
        *,
        N: int = 40,
        K: int = 33,
        rank: int = 3,
        starts: Sequence[int] = (0,),
        height: int = 24,
        dropout_p: float = 0.0,
        needs: tuple[bool, bool] = (True, True),
        layout: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        P = len(starts)
        self.dY, self.x, self.h, self.g = (layout(torch.randn(M, n).to(dtype)) for n in (N, K, P * rank, P * rank))
        self.starts, self.height, self.dropout_p, self.needs = list(starts), height, dropout_p, list(needs)
        self.seed = torch.randint(-(2**63), 2**63 - 1, (1,))

    def ours(self, **changed: Any) -> list[Tensor]:
        seed = self.seed if self.dropout_p else None
        arguments = {"dY": self.dY, "x": self.x, "h": self.h, "g": self.g, "starts": self.starts}
        arguments |= {"height": self.height, "dropout_p": self.dropout_p, "seed": seed, "needs": self.needs}
        return list(OPS.packed_lora_linear_factor_grads(**{**arguments, **changed}))

    def plain(self, sums: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
        dY, x, h, g = (tensor.to(sums) for tensor in (self.dY, self.x, self.h, self.g))
        P = len(self.starts)
        masks = masks_of(self.seed, P, x.shape, self.dropout_p)
        dAs, dBs = [], []
        for p, start in enumerate(self.starts):
            dAs.append(g.tensor_split(P, 1)[p].mT @ (x if masks is None else masks[p].to(sums) * x))  # [r, K]
            dBs.append(dY[:, start : start + self.height].mT @ h.tensor_split(P, 1)[p])  # [D, r]
        needed = zip((torch.stack(dAs), torch.stack(dBs)), self.needs, strict=True)
        return [gradient.to(dtype) if need else gradient[:0].to(dtype) for gradient, need in needed]

    def check(self) -> None:
        dtype = self.x.dtype
        plain, exact = self.plain(wide(dtype), dtype), self.plain(torch.float64, torch.float64)
        for name, ours, theirs, truth in zip(("dA", "dB"), self.ours(), plain, exact, strict=True):
            assert_as_accurate_as_reference(ours, theirs, truth, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, derandomize=True, max_examples=60)
@given(data=st.data())
def test_factor_grads(dtype, data):
    def draw(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    layout = draw(*LAYOUTS, "slice")
    Grads(
        draw(0, 1, 63, 511, 513, 1025),  # a partial sum is of at least 512 rows
        dtype,
        N=200,
        K=draw(*SIZES),
        rank=draw(1, 7, 33),
        starts=draw((0,), (137,), (0, 63, 126), (126, 0, 63), (5, 0, 9)),  # in any order; the last overlap
        height=draw(1, 8, 63),
        dropout_p=draw(*DROPOUTS),
        needs=draw((True, True), (True, False), (False, True), (False, False)),
        layout=lambda tensor: placed(tensor, layout),
    ).check()


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("M", [32 * 512, 32 * 512 + 77])  # 32 partial sums are as many as there are
def test_factor_grads_of_many_rows(M, dropout_p):
    Grads(M, torch.float32, starts=(8, 0), dropout_p=dropout_p).check()


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_factor_grads_of_high_rank(dropout_p):
    Grads(300, torch.bfloat16, N=600, K=400, rank=128, starts=(0, 300), height=300, dropout_p=dropout_p).check()


@pytest.mark.parametrize("sizes", [{"height": 0}, {"K": 0, "rank": 2}, {"rank": 0}], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_factor_grads_of_no_elements(sizes, dropout_p):
    Grads(9, torch.float32, **sizes, dropout_p=dropout_p).check()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_factor_grads_are_rounded_once(dtype, dropout_p):
    """Only the total is rounded to half precision, not the partial sums of some rows."""
    grads = Grads(1400, dtype, starts=(8, 0), dropout_p=dropout_p)
    for ours, exact in zip(grads.ours(), grads.plain(torch.float64, torch.float64), strict=True):
        # Half an ulp, and 1400 roundings of float32 which may move a sum past the middle of two halves.
        allowed = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-4
        assert ((ours.double() - exact).abs() <= allowed).all()


def test_each_gradient_is_the_same_alone_and_reads_only_what_it_takes():
    grads = Grads(600, torch.bfloat16, starts=(16, 0), dropout_p=0.25)
    dA, dB = grads.ours()
    nothing = grads.h.new_empty(0, 6)
    assert torch.equal(grads.ours(needs=[True, False], h=nothing)[0], dA)
    assert torch.equal(grads.ours(needs=[False, True], g=nothing)[1], dB)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 1 / 256, 0.25, 0.5, 0.1, 0.999, 1 - 2**-20])
def test_drop(dtype, p):
    """The masks of `reference.keep_mask` to the bit, those of all rows of several dimensions, at any stride."""
    scale = torch.tensor(1 / (1 - drawn_p(p)), dtype=wide(dtype))
    for seed, adapter, shape in (
        (11, 0, (3, 5)),
        (-1, 2, (137,)),
        (2**63 - 1, 1, (2, 3, 63)),
        (0, 0, (7, 1000)),
        (5, 1, (0, 4)),
    ):
        x, key = torch.randn(shape).to(dtype), torch.tensor([seed])
        *batch, K = shape
        keep = torch.ones(shape, dtype=torch.bool)
        if p:
            keep = reference.keep_mask(seed, adapter, (math.prod(batch), K), p).view(shape)
        dropped = OPS.drop(x, key, adapter, p)
        assert torch.equal(dropped, torch.where(keep, scale * x.to(wide(dtype)), 0).to(dtype))
        for layout in ("strided", "transposed", "slice"):
            assert torch.equal(OPS.drop(placed(x, layout), key, adapter, p), dropped)
    x = torch.randn(1, 40).to(dtype).expand(5, 40)
    assert torch.equal(OPS.drop(x, KEY, 0, p), OPS.drop(x.contiguous(), KEY, 0, p))


def test_masks_and_gradients_are_those_of_the_triton_kernels():
    M, K, seed, starts = 9, 35, torch.tensor([2**40 + 3]), [K_1 := 35, 0]
    eye, ones = torch.eye(K, device=DEVICE), torch.ones(M, K, device=DEVICE)
    triton, key = torch.ops.complora_triton, seed.to(DEVICE)
    weight = torch.zeros(2 * K, K, device=DEVICE)
    for p in (0.25, 0.1):
        given = (ones, weight, None, [eye, eye], [eye, eye], starts, p, key, False, "exact")
        y, _ = triton.packed_lora_linear_fwd(*given)  # the masks, side by side
        for adapter, start in enumerate(starts):
            ours = OPS.drop(torch.ones(M, K), seed, adapter, p)
            torch.testing.assert_close(y[:, start : start + K_1].cpu(), ours, rtol=1e-6, atol=0)  # 1 / (1 - p), rounded

    dY, x, h, A, B = (torch.randn(s) for s in ((M, 2 * K), (M, K), (M, 6), (2, 3, K), (2, K, 3)))
    there = [tensor.to(DEVICE) for tensor in (dY, x, h, weight)]
    As, Bs = ([factor.to(DEVICE) for factor in part.unbind()] for part in (A, B))
    _, dA, dB = triton.packed_lora_linear_bwd(*there, As, Bs, starts, 0.25, key, [False, True, True], "exact")
    g = torch.cat([dY[:, start : start + K] @ part for start, part in zip(starts, B.unbind(), strict=True)], 1)
    mine = OPS.packed_lora_linear_factor_grads(dY, x, h, g, starts, K, 0.25, seed, [True, True])
    for ours, theirs in zip(mine, (dA, dB), strict=True):
        assert (ours - theirs.cpu()).norm() <= 10 * EPS[torch.float32] * ours.norm()  # summed in another order


def test_operations_are_registered_as_torch_expects():
    A, B, U = torch.randn(2, 9), torch.randn(12, 2), random_basis(9, 4)
    torch.library.opcheck(OPS.project_complement.default, (torch.randn(2, 3, 9), U, True))
    fold = ([A, B], [U, None], [True, False], [False, True], 0.7, torch.bfloat16)
    torch.library.opcheck(OPS.fold_factors.default, fold)
    torch.library.opcheck(OPS.drop.default, (torch.randn(2, 3, 9), torch.tensor([3]), 1, 0.25))
    sums = (torch.randn(5, 24), torch.randn(5, 9), torch.randn(5, 4), torch.randn(5, 4), [12, 0], 12)
    for p, needs in ((0.0, [True, True]), (0.25, [True, False]), (0.0, [False, True])):
        seed = torch.tensor([3]) if p else None
        torch.library.opcheck(OPS.packed_lora_linear_factor_grads.default, (*sums, p, seed, needs))


def test_every_schema_has_a_fake_of_the_same_arguments_and_a_kernel():
    from complora_kernels.backends import fakes  # loads only where the extension does

    source = re.sub(r'"\s*\n\s*"', "", REGISTRATION.read_text())
    schemas = re.findall(r'm\.def\(\s*"(\w+)\((.*)\) -> (.*)"\)', source)
    assert tuple(name for name, *_ in schemas) == NAMES
    for name, arguments, _ in schemas:
        registered = getattr(OPS, name).default._schema
        names = re.findall(r"(\w+)(?:,|$)", arguments)
        assert [argument.name for argument in registered.arguments] == names
        assert list(inspect.signature(getattr(fakes, name)).parameters) == names
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"complora::{name}", "CPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_addresses_and_strides_beyond_two_to_the_31(dtype, transposed, tmp_path):
    stride, sizes, seed = 2**31 + 7, (2, 40), torch.tensor([5])
    file = str(tmp_path / "sparse")  # takes no memory, and no disk, until it is written to
    far = torch.from_file(file, shared=True, size=stride + 40, dtype=dtype).as_strided(sizes, (stride, 1))
    near = torch.randn(sizes).to(dtype)
    far.copy_(near)
    if transposed:
        far, near = far.mT, near.mT
    U, V = random_basis(far.shape[1], 1), random_basis(far.shape[0], 1)

    def computed(x: Tensor) -> list[Tensor]:
        folded = OPS.fold_factors(
            [x, x, x], [U, None, V], [True, False, False], [False, False, True], 0.5, torch.float32
        )
        gradients = OPS.packed_lora_linear_factor_grads(x, x, x, x, [0], x.shape[1], 0.25, seed, [True, True])
        return [folded, *gradients, OPS.project_complement(x, U, False), OPS.drop(x, seed, 0, 0.25)]

    for there, here in zip(computed(far), computed(near), strict=True):  # products may sum in another order
        torch.testing.assert_close(there, here, rtol=1e-5 if there.dtype == torch.float32 else 2**-7, atol=1e-6)


def test_more_elements_than_two_to_the_31():
    """Rows that are one row in memory: sums of small whole numbers, which float32 holds exactly."""
    K, D = 1024, 3
    M = 2**31 // K + 513
    x, dY, g = (torch.randint(0, 2, (1, n), dtype=torch.float32) for n in (K, K, 2))
    many = [tensor.expand(M, -1) for tensor in (dY, x, g, g)]
    assert many[0].numel() > 2**31
    dA, dB = OPS.packed_lora_linear_factor_grads(*many, [K - D], D, 0.0, None, [True, True])
    assert torch.equal(dA[0], M * g.mT @ x)
    assert torch.equal(dB[0], M * dY[:, K - D :].mT @ g)


# ---- refusals


def on_cpu(name: str, *arguments: Any) -> Any:
    """The kernel for the CPU, whatever devices the arguments are on."""
    return getattr(OPS, name).default.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *arguments)


FACTOR, BASIS, KEY, META = torch.ones(3, 24), random_basis(24, 5), torch.tensor([1]), torch.device("meta")
INTEGERS = torch.ones(3, 24, dtype=torch.int64)
FLOATING = "expected Float, Double, BFloat16 or Half"


@pytest.mark.parametrize(
    ("factor", "basis", "message"),
    [
        (torch.tensor(1.0), BASIS, "factor has no dimensions, expected [..., d]"),
        (INTEGERS, BASIS, f"factor has dtype Long, {FLOATING}"),
        (FACTOR + 0j, BASIS, f"factor has dtype ComplexFloat, {FLOATING}"),
        (FACTOR, BASIS[1:], "basis has shape [23, 5], expected [24, k] with k <= 24"),
        (FACTOR, torch.eye(24, 25), "basis has shape [24, 25], expected [24, k] with k <= 24"),
        (FACTOR, BASIS[:, 0], "basis has shape [24], expected [24, k] with k <= 24"),
        (FACTOR, BASIS.double(), "basis has dtype Double, expected Float"),
        (FACTOR.double(), BASIS, "basis has dtype Float, expected Double"),
        (FACTOR.bfloat16(), BASIS.bfloat16(), "basis has dtype BFloat16, expected Float"),
        (FACTOR, BASIS.to(META), "basis is on another device, expected cpu"),
    ],
)
def test_project_complement_refuses(factor, basis, message):
    with pytest.raises(RuntimeError, match=re.escape(message)):
        on_cpu("project_complement", factor, basis, False)
    assert torch.equal(OPS.project_complement(FACTOR, BASIS[:, :0], False), FACTOR)  # and the next call works


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {0: [], 1: [], 2: [], 3: []},
            "factors, bases, complement, output_side have lengths 0, 0, 0, 0, expected equal",
        ),
        (
            {1: [None]},
            "factors, bases, complement, output_side have lengths 2, 1, 2, 2, expected equal ones of at least 1",
        ),
        ({2: [False]}, "factors, bases, complement, output_side have lengths 2, 2, 1, 2, expected equal"),
        ({3: [False] * 3}, "factors, bases, complement, output_side have lengths 2, 2, 2, 3, expected equal"),
        ({5: torch.int64}, f"dtype has dtype Long, {FLOATING}"),
        ({0: [FACTOR, FACTOR[0]]}, "factors[1] has shape [24], expected two dimensions"),
        ({0: [INTEGERS, INTEGERS]}, f"factors[0] has dtype Long, {FLOATING}"),
        ({0: [FACTOR, FACTOR.double()]}, "factors[1] has dtype Double, expected Float"),
        ({0: [FACTOR, FACTOR.to(META)]}, "factors[1] is on another device, expected cpu"),
        ({1: [None, BASIS]}, "bases[1] has shape [24, 5], expected [3, k] with k <= 3"),
        ({1: [BASIS.half(), None]}, "bases[0] has dtype Half, expected Float"),
        ({1: [BASIS, None], 5: torch.float64}, "bases[0] has dtype Float, expected Double"),
        ({1: [BASIS.to(META), None]}, "bases[0] is on another device, expected cpu"),
    ],
)
def test_fold_factors_refuses(changed, message):
    given = [[FACTOR, FACTOR], [BASIS, None], [False, False], [False, True], 1.0, torch.float32]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        on_cpu("fold_factors", *[changed.get(i, value) for i, value in enumerate(given)])
    assert on_cpu("fold_factors", *given).shape == (144,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dY": torch.ones(7)}, "dY [7], x [7, 9], h [7, 6], g [7, 6], expected [M, N], [M, K], [M, P r], [M, P r]"),
        (
            {"x": torch.ones(6, 9)},
            "dY [7, 40], x [6, 9], h [7, 6], g [7, 6], expected [M, N], [M, K], [M, P r], [M, P r]",
        ),
        ({"h": torch.ones(7)}, "h [7], g [7, 6], expected [M, N], [M, K], [M, P r], [M, P r]"),
        ({"g": torch.ones(1, 7, 6)}, "g [1, 7, 6], expected [M, N], [M, K], [M, P r], [M, P r]"),
        ({"starts": []}, "starts and needs have lengths 0, 2, expected one for each adapter and 2"),
        ({"needs": [True]}, "starts and needs have lengths 2, 1, expected one for each adapter and 2"),
        ({"g": torch.ones(7, 5)}, "h [7, 6], g [7, 5], expected [7, P r] with P = 2"),
        ({"g": torch.ones(6, 6)}, "h [7, 6], g [6, 6], expected [7, P r] with P = 2"),
        ({"h": torch.ones(7, 8)}, "h [7, 8], g [7, 6], expected [7, P r] with P = 2"),
        ({"h": torch.ones(0, 6)}, "h [0, 6], g [7, 6], expected [7, P r] with P = 2"),
        ({"starts": [0, 17]}, "starts has 17 with height 24, expected 0 <= start and start + height <= 40"),
        ({"starts": [-1, 0]}, "starts has -1 with height 24, expected 0 <= start and start + height <= 40"),
        ({"height": -1}, "starts has 16 with height -1, expected 0 <= start and start + height <= 40"),
        ({"x": torch.ones(7, 9, dtype=torch.int32)}, f"x has dtype Int, {FLOATING}"),
        ({"dY": torch.ones(7, 40).half()}, "dY has dtype Half, expected Float"),
        ({"h": torch.ones(7, 6).double()}, "h has dtype Double, expected Float"),
        ({"g": torch.ones(7, 6).bfloat16()}, "g has dtype BFloat16, expected Float"),
        ({"dY": torch.ones(7, 40, device=META)}, "dY is on another device, expected cpu"),
        ({"h": torch.ones(7, 6, device=META)}, "h is on another device, expected cpu"),
        ({"g": torch.ones(7, 6, device=META)}, "g is on another device, expected cpu"),
        ({"dropout_p": 1.0}, "dropout_p=1, expected a probability in [0, 1)"),
        ({"dropout_p": -0.5}, "dropout_p=-0.5, expected a probability in [0, 1)"),
        ({"dropout_p": math.nan}, "dropout_p=nan, expected a probability in [0, 1)"),
        ({"seed": None}, "seed is missing, expected one with dropout_p=0.25"),
        ({"seed": torch.tensor([1, 2])}, "seed has shape [2], expected [1]"),
        ({"seed": torch.tensor([1.0])}, "seed has dtype Float, expected Long"),
        ({"seed": KEY.to(META)}, "seed is on another device, expected cpu"),
    ],
)
def test_factor_grads_refuses(changed, message):
    given = {"dY": torch.ones(7, 40), "x": torch.ones(7, 9), "h": torch.ones(7, 6), "g": torch.ones(7, 6)}
    given |= {"starts": [16, 0], "height": 24, "dropout_p": 0.25, "seed": KEY, "needs": [True, True]}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        on_cpu("packed_lora_linear_factor_grads", *{**given, **changed}.values())
    dA, dB = on_cpu("packed_lora_linear_factor_grads", *given.values())
    assert (dA.shape, dB.shape) == ((2, 3, 9), (2, 24, 3))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({0: torch.tensor(1.0)}, "x has no dimensions, expected [..., d]"),
        ({0: INTEGERS}, f"x has dtype Long, {FLOATING}"),
        ({1: torch.tensor([1, 2])}, "seed has shape [2], expected [1]"),
        ({1: torch.tensor([1], dtype=torch.int32)}, "seed has dtype Int, expected Long"),
        ({1: KEY.to(META)}, "seed is on another device, expected cpu"),
        ({2: -1}, "adapter=-1, expected at least 0"),
        ({3: 1.0}, "dropout_p=1, expected a probability in [0, 1)"),
        ({3: math.nan}, "dropout_p=nan, expected a probability in [0, 1)"),
    ],
)
def test_drop_refuses(changed, message):
    given = [FACTOR, KEY, 0, 0.25]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        on_cpu("drop", *[changed.get(i, value) for i, value in enumerate(given)])
    assert OPS.drop(*given).shape == FACTOR.shape


def test_a_basis_is_checked_once(monkeypatch):
    checked: list[Tensor] = []
    is_orthonormal = subspace._is_orthonormal
    monkeypatch.setattr(subspace, "_is_orthonormal", lambda basis: checked.append(basis) or is_orthonormal(basis))
    basis, factor = random_basis(24, 5), torch.randn(3, 24)
    for _ in range(3):
        project_complement(factor, basis, backend="extension")
        fold_factors([factor], [factor.T], [basis], [basis], backend="extension")
    assert len(checked) == 1


# ---- the backend


def philox(function: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    return lambda *arguments, **others: function(*arguments, **others, **options, backend="extension")


ours = philox(complora_linear)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, derandomize=True, max_examples=30)
@given(data=st.data())
def test_complora_linear(dtype, data):
    def draw(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    def draw_basis(d: int) -> tuple[int | None, str]:
        kind = draw(*KINDS)
        return draw(None, 0, d // 6, d // 2, *([d] if kind == "complement" else [])), kind

    out, in_ = draw(*SIZES), draw(*SIZES)
    (k_out, output_kind), (k_in, input_kind) = draw_basis(out), draw_basis(in_)
    drawn = {"batch": draw((), (1,), (0,), (63,), (3, 5), (2, 3, 4)), "out": out, "in_": in_, "r": draw(1, 7, 33)}
    drawn |= {"k_out": k_out, "k_in": k_in, "output_basis_kind": output_kind, "input_basis_kind": input_kind}
    drawn |= {"bias": draw(True, False), "scaling": draw(1.0, 2**0.5)}
    layout_x, layout_dY, dropout_p = draw(*LAYOUTS), draw(*LAYOUTS), draw(*DROPOUTS)
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    parts: list[list[dict[str, Tensor]]] = [[], [], []]
    for _ in range(1 if dtype == torch.float64 else 8):  # one element may round well or badly by chance
        layer = make_layer(dtype=dtype, **drawn)
        layer = replace(layer, x=laid_out(layer.x, layout_x), dY=laid_out(layer.dY, layout_dY))
        (m,) = masks_of(next_seed(), 1, layer.x.shape, dropout_p) or [None]
        parts[0].append(results(ours, layer, dropout_p=dropout_p))
        cast = None if m is None else m.to(dtype)
        parts[1].append(results(reference.complora_linear, layer, dropout_mask=cast))
        parts[2].append(results(reference.complora_linear, layer.double(), dropout_mask=m))
    assert_accurate(*parts)


@pytest.mark.parametrize(
    "rows", [[(0, 20), (20, 40), (40, 60)], [(40, 60), (0, 20)], [(3, 4)], [(5, 15), (0, 10)]], ids=str
)
@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_lora_linear(dtype, dropout_p, rows):
    layer = make_layer(batch=(9, 70), out=60, in_=33, dtype=dtype)
    As = [torch.randn(3, 33).to(dtype) for _ in rows]
    Bs = [torch.randn(stop - start, 3).to(dtype) for start, stop in rows]
    masks = masks_of(next_seed(), len(rows), layer.x.shape, dropout_p)

    def run(function: Callable[..., Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
        frozen = (layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in (layer.x, *As, *Bs)]
        x, *factors = leaves
        y = function(x, *frozen, factors[: len(rows)], factors[len(rows) :], rows, **options)
        gradients = torch.autograd.grad(y, leaves, layer.dY.to(dtype))
        return {f"{i} of y, dx, dAs, dBs": tensor.detach() for i, tensor in enumerate((y, *gradients))}

    mine = run(philox(packed_lora_linear), dtype, dropout_p=dropout_p)
    same_dtype = run(packed_reference, dtype, dropout_masks=masks and [m.to(dtype) for m in masks])
    assert_accurate([mine], [same_dtype], [run(packed_reference, torch.float64, dropout_masks=masks)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [complora_linear, lora_linear])
def test_agrees_with_the_torch_backend(function, dtype):
    layer = make_layer(batch=(63,), out=137, in_=63, r=7, k_out=None, k_in=None, dtype=dtype)
    layer = replace(layer, lora_A=layer.lora_A.to(dtype), lora_B=layer.lora_B.to(dtype))

    def run(backend: str) -> dict[str, Tensor]:
        def call(x, weight, bias, lora_A, lora_B, *, scaling, **_):
            return function(x, weight, bias, lora_A, lora_B, scaling=scaling, backend=backend)

        return results(call, layer)

    mine, theirs = run("extension"), run("torch")
    for name, tensor in mine.items():  # each is within 2 EPS of the truth; half an ulp of bfloat16 is 2e-3
        allowed = {torch.bfloat16: 4e-3}.get(dtype, 4 * EPS[dtype])
        assert (tensor.double() - theirs[name].double()).norm() <= allowed * theirs[name].double().norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fold_factors_and_its_gradients(dtype):
    shapes = [(24, 16, 3), (16, 40, 1), (33, 70, 40), (8, 8, 2), (40, 8, 5)]  # out, in, r
    As = [torch.randn(in_, r).T for _, in_, r in shapes]
    Bs = [torch.randn(out, 2 * r)[:, ::2] for out, _, r in shapes]
    bases: dict[str, list[Any]] = {
        "output_bases": [random_basis(24, 5), None, random_basis(33, 20), random_basis(8, 0), random_basis(40, 20)],
        "input_bases": [None, random_basis(40, 9), random_basis(70, 35), random_basis(8, 8), None],
        "output_basis_kinds": ["principal", "principal", "complement", "complement", "principal"],
        "input_basis_kinds": ["principal", "complement", "principal", "complement", "principal"],
    }
    wanted = [0, 2, 4, 5, 6, 8]
    grads = [torch.randn(1).expand(factor.shape) for factor in (*As, *Bs)]  # `sum` gives such gradients

    def run(function: Callable[..., Any], wide: torch.dtype, cast: torch.dtype, **options: Any) -> dict[str, Tensor]:
        leaves = [factor.to(wide, copy=True) for factor in (*As, *Bs)]
        for i in wanted:
            leaves[i].requires_grad_()
        folded = function(leaves[:5], leaves[5:], **bases, scaling=1.7, dtype=cast, **options)
        outputs = [*folded[0], *folded[1]]
        assert [output.requires_grad for output in outputs] == [i in wanted for i in range(10)]
        given = [grads[i].to(cast) for i in wanted]
        gradients = torch.autograd.grad([outputs[i] for i in wanted], [leaves[i] for i in wanted], given)
        named = {"folded": outputs, "gradient": gradients}
        return {f"{name} {i}": tensor.detach() for name, part in named.items() for i, tensor in enumerate(part)}

    mine = run(fold_factors, torch.float32, dtype, backend="extension")
    same_dtype = run(reference.fold_factors, torch.float32, dtype)
    assert_accurate([mine], [same_dtype], [run(reference.fold_factors, torch.float64, torch.float64)])


@pytest.mark.parametrize("kind", KINDS)
def test_project_complement_gradcheck(kind):
    basis = random_basis(9, 4, torch.float64)
    factor = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)

    def cubed(factor: Tensor) -> Tensor:  # a projection alone is linear: its second derivative would be zero
        return project_complement(factor, basis, basis_kind=kind, backend="extension") ** 3

    assert torch.autograd.gradcheck(cubed, (factor,))
    assert torch.autograd.gradgradcheck(cubed, (factor,))


def test_fold_factors_gradcheck():
    U, V = random_basis(6, 2, torch.float64), random_basis(5, 3, torch.float64)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (1, 5), (6, 2), (6, 1))]

    def function(A0: Tensor, A1: Tensor, B0: Tensor, B1: Tensor) -> tuple[Tensor, ...]:
        kinds = ["complement", "principal"]
        As, Bs = fold_factors(
            [A0, A1], [B0, B1], [U, None], [V, V], input_basis_kinds=kinds, scaling=0.3, backend="extension"
        )
        return (*As, *Bs)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_complora_linear_gradcheck(kind, dropout_p):
    layer = make_layer(batch=(2, 3), out=6, in_=5, r=2, k_out=2, k_in=1, dtype=torch.float64).arguments()
    layer |= {"output_basis_kind": kind, "input_basis_kind": kind, "dropout_p": dropout_p}
    leaves = [layer.pop(name).requires_grad_() for name in LEAVES]

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        torch.manual_seed(3)
        return ours(x, lora_A=A, lora_B=B, **layer)

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("dropout_p", DROPOUTS)
def test_packed_lora_linear_gradcheck(dropout_p):
    layer = make_layer(batch=(4,), out=6, in_=5, dtype=torch.float64)
    factors = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5), (2, 5), (3, 2), (3, 2))]
    leaves = [tensor.requires_grad_() for tensor in (layer.x, *factors)]

    def function(x: Tensor, A0: Tensor, A1: Tensor, B0: Tensor, B1: Tensor) -> Tensor:
        torch.manual_seed(3)
        rows, frozen = [(3, 6), (0, 3)], (layer.weight, layer.bias)
        return packed_lora_linear(x, *frozen, [A0, A1], [B0, B1], rows, dropout_p=dropout_p, backend="extension")

    assert torch.autograd.gradcheck(function, leaves)


# ---- complora_linear: what is saved and computed


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_subset_of_gradients_is_the_same(dtype, dropout_p):
    layer = make_layer(dtype=dtype)
    torch.manual_seed(1)
    every = results(ours, layer, dropout_p=dropout_p)
    for wanted in (w for n in (1, 2) for w in itertools.combinations(LEAVES, n)):
        torch.manual_seed(1)
        with Called() as called:
            some = results(ours, layer, wanted, dropout_p=dropout_p)
        assert some.keys() == {"y", *(f"d{name}" for name in wanted)}
        assert all(torch.equal(tensor, every[name]) for name, tensor in some.items())
        assert ("packed_lora_linear_factor_grads" in called.names) == (wanted != ("x",))
        assert called.names.count("fold_factors") == (1 if wanted == ("x",) else 2)  # the backward pass projects too


class Called(TorchDispatchMode):
    """The names of the extension's operations, as often as they were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "complora" and func.overloadpacket.__name__ in NAMES:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_x_and_h_of_the_activations_are_saved(dtype, dropout_p):
    M, r, out, in_ = 20, 2, 65, 64
    layer = make_layer(batch=(4, 5), out=out, in_=in_, r=r, k_out=5, k_in=3, dtype=dtype)
    for name in LEAVES:
        getattr(layer, name).requires_grad_()
    saved: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        return tensor

    given = layer.x.nbytes + layer.weight.nbytes
    h, folded, seed = M * r * dtype.itemsize, (in_ + out) * r * dtype.itemsize, 8 if dropout_p else 0
    with Recorder() as recorder, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ours(**layer.arguments(), dropout_p=dropout_p)
    assert sum(saved.values()) == given + h + folded + seed
    # Nor does anything else that the forward pass computed stay alive, saved by autograd or not.
    assert recorder.live_bytes(y) == h + folded + seed
    saved.clear()
    layer.lora_B.requires_grad_(False)  # then dB, which takes h, is not asked for
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(**layer.arguments(), dropout_p=dropout_p)
    assert sum(saved.values()) == given + folded + seed


def test_without_gradients():
    layer = make_layer()
    with Recorder() as recorder:
        y = ours(**layer.arguments(), dropout_p=0.5)
    assert not y.requires_grad
    assert recorder.live_bytes(y) == 0
    layer.x.requires_grad_()
    with torch.no_grad():
        assert ours(**layer.arguments()).grad_fn is None
    with torch.inference_mode():
        assert ours(**layer.arguments()).is_inference()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_autocast(dtype, dropout_p):
    """Exactly what it computes from inputs cast by hand; gradients in the dtype of what they belong to."""
    layer = make_layer(batch=(5, 63))
    by_hand = replace(layer, **{name: getattr(layer, name).to(dtype) for name in ("x", "weight", "bias", "dY")})
    torch.manual_seed(1)
    expected = results(ours, by_hand, dropout_p=dropout_p)
    torch.manual_seed(1)
    leaves = [getattr(layer, name).requires_grad_() for name in LEAVES]
    with torch.autocast("cpu", dtype=dtype):
        y = ours(**layer.arguments(), dropout_p=dropout_p)
        y.backward(by_hand.dY)
    assert y.dtype == dtype
    assert torch.equal(y, expected["y"])
    for name, leaf in zip(LEAVES, leaves, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, expected[f"d{name}"].float())
    basis = random_basis(63, 5)
    with torch.autocast("cpu", dtype=dtype):
        projected = project_complement(layer.dY[..., :1].expand(5, 63, 63), basis, backend="extension")
    assert projected.dtype == torch.float32


def test_used_twice_in_one_graph_accumulated_and_written_to():
    layer = make_layer(out=16, in_=16)

    def twice(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, **others: function(function(x, **others).tanh(), **others).relu_()

    exact = results(twice(reference.complora_linear), layer.double())
    assert_accurate([results(twice(ours), layer)], [results(twice(reference.complora_linear), layer)], [exact])
    leaves = [getattr(layer, name).requires_grad_() for name in LEAVES]
    for _ in range(2):
        ours(**layer.arguments()).backward(layer.dY)
    once = results(ours, layer)
    assert all(torch.equal(leaf.grad, 2 * once[f"d{name}"]) for name, leaf in zip(LEAVES, leaves, strict=True))


@contextlib.contextmanager
def compiled(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Traced whole, forward and backward, and once for all calls; `aot_eager` needs no compiler."""
    counter = CompileCounterWithBackend("aot_eager")
    try:
        yield torch.compile(function, fullgraph=True, backend=counter)
        assert counter.frame_count == 1
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_complora_linear(dtype, dropout_p):
    with compiled(ours) as call:
        for _ in range(2):
            layer = make_layer(dtype=dtype)
            torch.manual_seed(1)
            expected = results(ours, layer, dropout_p=dropout_p)
            torch.manual_seed(1)
            mine = results(call, layer, dropout_p=dropout_p)
            assert all(torch.equal(mine[name], expected[name]) for name in expected)


def test_compiled_with_another_number_of_tokens():
    """A dynamic dimension: one graph for both."""
    with compiled(ours) as call:
        for tokens in (5, 8):  # both in one bucket of the plans
            layer = make_layer(batch=(tokens,))
            expected = results(ours, layer)
            x = layer.x.clone()
            torch._dynamo.mark_dynamic(x, 0)
            leaves = [x.requires_grad_(), layer.lora_A.requires_grad_(), layer.lora_B.requires_grad_()]
            y = call(**{**layer.arguments(), "x": x})
            assert torch.equal(y, expected["y"])
            for name, gradient in zip(LEAVES, torch.autograd.grad(y, leaves, layer.dY), strict=True):
                assert torch.equal(gradient, expected[f"d{name}"])


def test_compiled_fold_and_projections():
    U, V = random_basis(9, 4), random_basis(8, 3)

    def fold(A: Tensor, B: Tensor) -> Tensor:
        (folded_A,), (folded_B,) = fold_factors([A], [B], [U], [V], scaling=0.3, backend="extension")
        return (folded_B @ folded_A).sin()

    def project(A: Tensor, B: Tensor) -> Tensor:
        return (project_complement(B.mT, U, backend="extension") @ B).sin() @ A

    for function in (fold, project):
        with compiled(function) as call:
            for _ in range(2):
                leaves = (torch.randn(2, 8, requires_grad=True), torch.randn(9, 2, requires_grad=True))
                runs = [each(*leaves) for each in (function, call)]
                gradients = [torch.autograd.grad(y.sum(), leaves) for y in runs]
                assert torch.equal(*runs)
                assert all(map(torch.equal, *gradients))


# ---- models, threads, dispatch


@pytest.mark.parametrize("make", [small_clip, small_clip_4])
@pytest.mark.parametrize("targets", [("q", "k", "v", "o", "fc1", "fc2"), ("q", "v"), ("k",)], ids="-".join)
def test_a_clip_trains_as_on_the_torch_backend(monkeypatch, make, targets):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(2, 3, 16, 16, generator=generator)
    texts = torch.randint(1, 20, (3, 6), generator=generator)

    def train(backend: str) -> tuple[list[Tensor], list[Tensor], list[list[str]]]:
        monkeypatch.setenv("COMPLORA_BACKEND", backend)
        model = adapted(make(), target_modules=targets).train()
        factors = list(ck.adapter_parameters(model))
        frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
        before = {name: value.clone() for name, value in frozen.items()}
        optimizer = torch.optim.SGD(factors, lr=0.05)
        losses, calls = [], []
        for _ in range(4):
            optimizer.zero_grad()
            with Called() as forward:
                features = torch.cat([model.encode_image(images), model.encode_text(texts)])
                losses.append(features.square().mean())
            with Called() as backward:
                losses[-1].backward()
            optimizer.step()
            calls += [forward.names, backward.names]
        assert all(torch.equal(frozen[name], value) for name, value in before.items())
        return [loss.detach() for loss in losses], [factor.detach() for factor in factors], calls

    losses, factors, calls = train("extension")
    expected_losses, expected_factors, by_torch = train("torch")
    # One projection of all factors of a tower in the forward pass, and one of their gradients in the backward pass.
    assert all(names == ["fold_factors"] * 2 for names in calls[::2])
    assert all(set(names) == {"packed_lora_linear_factor_grads", "fold_factors"} for names in calls[1::2])
    assert all(names.count("fold_factors") == 2 for names in calls[1::2])
    assert not any(by_torch)
    assert losses[-1] < losses[0]
    # float32 rounding of sums in another order, through two towers and four steps
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=0)
    apart = torch.cat([(a - b).flatten() for a, b in zip(factors, expected_factors, strict=True)]).norm()
    assert apart <= 1e-5 * torch.cat([factor.flatten() for factor in expected_factors]).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_bits_on_two_runs_and_two_threads(dtype):
    """For work of one piece and of many, shared out in pieces and in strips."""
    calls: list[Callable[[], list[Tensor]]] = []
    for r, d, k in ((16, 100, 50), (16, 768, 384)):
        factor, basis = torch.randn(r, d).to(dtype), random_basis(d, k, wide(dtype))
        fold = ([factor.mT, factor] * 8, [basis] * 16, [False] * 16, [True, False] * 8, 1.0, torch.float32)
        calls.append(lambda given=(factor, basis, False): [OPS.project_complement(*given)])
        calls.append(lambda given=fold: [OPS.fold_factors(*given)])
    for M, p in ((300, 0.0), (1400, 0.0), (1400, 0.25)):
        grads = Grads(M, dtype, N=600, K=200, rank=16, starts=[300, 9], height=300, dropout_p=p)
        calls += [grads.ours, Grads(M, dtype, K=200, rank=16, needs=(True, False), dropout_p=p).ours]
    x = torch.randn(300, 500).to(dtype)
    calls.append(lambda: [OPS.drop(x, KEY, 0, 0.25)])

    threads, expected = torch.get_num_threads(), [call() for call in calls]
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for call, first in zip(calls, expected, strict=True):
                assert all(map(torch.equal, call(), first))
    finally:
        torch.set_num_threads(threads)


def packed(
    rows: Sequence[tuple[int, int]] = ((0, 12), (12, 24)), ranks: Sequence[int] = (2, 2), **options: Any
) -> Tensor:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 16), torch.randn(24, 16)
    As = [torch.randn(r, 16) for r in ranks]
    Bs = [torch.randn(stop - start, r) for r, (start, stop) in zip(ranks, rows, strict=True)]
    return packed_lora_linear(x, weight, None, As, Bs, list(rows), **options)


@pytest.mark.parametrize("dropping", [False, True])
def test_auto_takes_it_where_it_is_faster(monkeypatch, caplog, dropping):
    """On the CPU for the factors, and for products that draw masks; torch for the other products, without a word."""
    monkeypatch.delenv("COMPLORA_BACKEND", raising=False)
    A, B, U = torch.randn(2, 9), torch.randn(9, 2), random_basis(9, 4)
    p = 0.25 if dropping else 0.0
    with Called() as called:
        project_complement(A, U)
        fold_factors([A], [B], [U], [None])
    assert called.names == ["project_complement", "fold_factors"]
    with Called() as called:
        packed(dropout_p=p)
        packed(dropout_p=p, training=False)
    assert called.names == (["drop", "drop"] if dropping else [])
    layer = make_layer()
    layer.lora_A.requires_grad_()
    with Called() as called:
        complora_linear(**layer.arguments(), dropout_p=p).sum().backward()
    every = ["fold_factors", "drop", "packed_lora_linear_factor_grads", "fold_factors"]
    assert called.names == (every if dropping else [])
    assert not [message for message in caplog.messages if "extension" in message]


def test_forced_where_it_was_not_built_is_an_error_with_the_reason(monkeypatch):
    monkeypatch.setattr(build, "failure", lambda half: "it was not built: no C++ compiler was found (c++)")
    A, B = torch.randn(2, 9), torch.randn(9, 2)
    reason = r"cannot run here: it was not built: no C\+\+ compiler was found \(c\+\+\)$"
    for call in (packed, lambda **options: fold_factors([A], [B], [None], [None], **options)):
        with pytest.raises(RuntimeError, match=rf"^backend='extension' {reason}"):
            call(backend="extension")
        monkeypatch.setenv("COMPLORA_BACKEND", "extension")
        with pytest.raises(RuntimeError, match=rf"^COMPLORA_BACKEND='extension' {reason}"):
            call()
        monkeypatch.delenv("COMPLORA_BACKEND")
        call()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"ranks": (2, 5)}, "the adapters have ranks [2, 5], the kernels support equal ones"),
        ({"rows": [(0, 7), (7, 24)]}, "rows=[(0, 7), (7, 24)] are of heights [7, 17], the kernels support equal ones"),
    ],
)
def test_unequal_adapters_are_refused_by_name_and_skipped(monkeypatch, caplog, changed, reason):
    monkeypatch.delenv("COMPLORA_BACKEND", raising=False)
    refusal = f"^backend='extension' does not support packed_lora_linear: {re.escape(reason)}"
    with pytest.raises(RuntimeError, match=refusal):
        packed(**changed, backend="extension")
    caplog.set_level(logging.WARNING, "complora_kernels")
    expected = packed(**changed, dropout_p=0.25, backend="torch")
    for _ in range(2):
        assert torch.equal(packed(**changed, dropout_p=0.25), expected)
    assert caplog.messages == [f"packed_lora_linear does not run on the extension backend: {reason}"]  # said once


def test_unsupported_arguments_are_refused_by_name():
    A, B = torch.randn(2, 9), torch.randn(9, 2)
    with pytest.raises(RuntimeError, match="does not support fold_factors: lora_As, lora_Bs: several dtypes"):
        fold_factors([A], [B.bfloat16()], [None], [None], backend="extension")
    with pytest.raises(
        RuntimeError, match=r"does not support fold_factors: .*on meta, the kernels run on cpu and cuda"
    ):
        fold_factors([A.to(META)], [B.to(META)], [None], [None], backend="extension")
    with pytest.raises(ValueError, match=r"basis is on meta, expected cpu"):
        project_complement(A, torch.eye(9, 2, device=META), backend="extension")


def test_factors_without_elements_beside_others():
    A, B = torch.randn(4, 64), torch.randn(64, 4)
    basis = random_basis(64, 16)
    (empty_A, folded_A), (empty_B, folded_B) = fold_factors(
        [torch.empty(4, 0), A], [torch.empty(0, 4), B], [None, basis], [None, basis], backend="extension"
    )
    assert (empty_A.shape, empty_B.shape) == ((4, 0), (0, 4))
    torch.testing.assert_close(folded_A, reference.project_complement(A, basis), rtol=0, atol=1e-5)  # 64 products
    torch.testing.assert_close(folded_B, reference.project_complement(B.mT, basis).mT, rtol=0, atol=1e-5)
