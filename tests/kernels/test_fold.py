"""The two launches of a fold: numbers, blocks and splits, bytes, what is not read or written, captures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cuda_graph_on_cpu import CUDAGraphsOnCPU, cuda_graphs_on_cpu
from layers import laid_out
from numerics import assert_as_accurate_as_reference, random_basis
from torch import Tensor
from triton_device import DEVICE

from complora_kernels import reference
from complora_kernels.kernels import factors
from complora_kernels.kernels.fold_programs import (
    ALONG_R,
    MIN_PROGRAMS,
    MIXED,
    CoordinatesProgram,
    Job,
    Programs,
    ProjectionProgram,
    fold_programs,
    split_length,
)

CPU = torch.device("cpu")
HALF = torch.bfloat16
D, K = 300, 136  # two blocks of either launch, and, in a launch of few programs, two splits


def fold(cases: list[Any], dtype: torch.dtype, scaling: float = 0.7) -> list[Tensor]:
    """Each case is a factor, its basis or None, its kind and whether it is of the output side."""
    given, bases, complement, output = (list(part) for part in zip(*cases, strict=True))
    flat = factors.fold_factors(given, bases, complement, output, scaling, dtype)
    parts = flat.split([factor.numel() for factor in given])
    return [part.view(factor.shape) for part, factor in zip(parts, given, strict=True)]


def by_reference(case: Any, wide: torch.dtype, dtype: torch.dtype, scaling: float = 0.7) -> Tensor:
    factor, basis, complement, output = case
    rows = (factor.mT if output else factor).to(wide)  # [r, d]
    if basis is not None:
        kind = "complement" if complement else "principal"
        rows = reference.project_complement(rows, basis.to(wide), basis_kind=kind)
    return (scaling * rows.mT if output else rows).to(dtype)


def make(output: bool, r: int, d: int, k: int | None, kind: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    factor = torch.randn(d, r) if output else torch.randn(r, d)
    basis = None if k is None else random_basis(d, k).to(DEVICE)
    return factor.to(DEVICE, dtype), basis, kind, output


def unaligned(basis: Tensor) -> Tensor:
    """The same basis from an address that no vector load may start at."""
    memory = torch.empty(basis.numel() + 1, device=basis.device)
    return memory[1:].view(basis.shape).copy_(basis)


def with_layout(part: int, layout: Callable[[Tensor], Tensor], *cases: Any) -> list[Any]:
    """The cases with another memory layout of their factors (part 0) or their bases (part 1)."""
    return [(*case[:part], layout(case[part]), *case[part + 1 :]) for case in cases]


def strided(tensor: Tensor) -> Tensor:
    return laid_out(tensor, "strided")


def transposed(tensor: Tensor) -> Tensor:
    return laid_out(tensor, "transposed")


GROUPS: dict[str, Callable[[], list[Any]]] = {
    "output side": lambda: [make(True, 16, D, K), make(False, 16, 40, None), make(True, 16, 40, 40)],
    "input side": lambda: [make(False, 16, D, K), make(True, 16, 40, None), make(False, 16, 40, 8, True)],
    "both sides": lambda: [make(True, 8, D, K, True), make(False, 8, 40, 16), make(False, 8, 24, 0, True)],
    "two vectors": lambda: [make(True, 2, 40, 36), make(False, 2, 40, None), make(True, 2, 40, 0)],
    "one vector": lambda: [make(True, 1, 40, 5), make(False, 1, 37, 37)],
    "no multiple of a block": lambda: [make(True, 20, 135, 70), make(False, 20, D, 67, True)],
    "many vectors": lambda: [make(True, 70, 140, 68), make(False, 3, 40, 12)],
    "strided factors": lambda: with_layout(0, strided, make(True, 16, 40, 36), make(False, 5, 40, 9)),
    "transposed factors": lambda: with_layout(0, transposed, make(True, 16, 40, 8), make(False, 4, 9, 4)),
    "strided basis": lambda: with_layout(1, strided, make(True, 16, 40, 36)),
    "unaligned basis": lambda: with_layout(1, unaligned, make(True, 16, 40, 36)),
}


@pytest.mark.parametrize("group", GROUPS)
def test_fold_factors(group):
    check(GROUPS[group](), HALF, group)


@pytest.mark.parametrize("group", ["both sides", "no multiple of a block", "transposed factors"])
def test_gradients_in_half_precision(group):
    check([(factor.to(HALF), *rest) for factor, *rest in GROUPS[group]()], torch.float32, group)


def check(cases: list[Any], dtype: torch.dtype, name: str) -> None:
    for i, (ours, case) in enumerate(zip(fold(cases, dtype), cases, strict=True)):
        exact, same = by_reference(case, torch.float64, torch.float64), by_reference(case, torch.float32, dtype)
        if exact.norm() > 1e-3 * case[0].norm():
            assert_as_accurate_as_reference(ours, same, exact, f"{name} {i}", dtype)
        else:  # all directions are protected, or none is the complement
            assert ours.norm() <= 1e-5 * case[0].norm(), f"{name} {i}"


def test_a_folded_factor_keeps_out_of_the_protected_directions():
    """The coordinates are summed in three splits, in one order."""
    case = make(True, 16, 600, 40)
    (folded,) = fold([case], torch.float32, scaling=1.0)
    (again,) = fold([case], torch.float32, scaling=1.0)
    assert torch.equal(folded, again)
    assert (case[1].double().T @ folded.double()).norm() <= 1e-5 * case[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_what_is_not_projected_takes_one_launch(monkeypatch, dtype):
    launched, run = [], factors.launch.run
    monkeypatch.setattr(factors.launch, "run", lambda *call: (launched.append(call), run(*call)))
    cases = [make(True, 16, 40, None, dtype=dtype), make(False, 16, 40, 0, dtype=dtype)]
    B, A = fold(cases, torch.float32, scaling=0.5)
    assert torch.equal(B, 0.5 * cases[0][0].float())
    assert torch.equal(A, cases[1][0].float())
    ((kernel, launch, _),) = launched
    assert kernel is factors.fold_factors_kernel
    assert launch.constexprs["SPLITS"] == 0  # no product, which the compiler refuses of coordinates in half precision


def test_what_is_all_protected_becomes_nothing():
    (nothing,) = fold([make(False, 16, 40, 0, True)], torch.float32)
    assert not nothing.any()


def test_nothing_is_read_or_written_beside_the_operands(monkeypatch):
    """NaN and fences lie around them."""
    around, beside = [], 5000

    def fenced(shape: Any, dtype: torch.dtype, device: Any, value: float = 7.0) -> Tensor:
        size = torch.Size([shape] if isinstance(shape, int) else shape).numel()
        memory = torch.full((size + 2 * beside,), value, dtype=dtype, device=device)
        around.append((value, memory[:beside], memory[-beside:]))
        return memory[beside : beside + size].view(shape)

    def between_nan(tensor: Tensor | None) -> Any:
        return None if tensor is None else fenced(tensor.shape, tensor.dtype, tensor.device, torch.nan).copy_(tensor)

    cases = [make(True, 16, 40, 37), make(False, 5, 301, 44), make(False, 5, 41, None)]
    expected = fold(cases, torch.float32)
    cases = [(between_nan(factor), between_nan(basis), *rest) for factor, basis, *rest in cases]
    with monkeypatch.context() as patch:
        patch.setattr(factors.launch, "empty", fenced)
        patch.setattr(factors.torch, "empty", lambda shape, *, dtype, device: fenced(shape, dtype, device))
        folded = fold(cases, torch.float32)
    assert len(around) == 5 + 2
    assert all(torch.equal(ours, other) for ours, other in zip(folded, expected, strict=True))
    for value, *fences in around:
        assert all(fence.isnan().all() if value != 7 else (fence == 7).all() for fence in fences)


# ---- the programs


def jobs_of(shapes: list[tuple[int, int, int, bool]]) -> tuple[Job, ...]:
    """Contiguous factors of r, d, k and the output side, whose bases lie one after the other, as do their results."""
    jobs, factor, basis = [], 0, 0
    for r, d, k, output in shapes:
        strides = (1, r) if output else (d, 1)
        jobs.append(Job(factor, *strides, basis, k, factor, *strides, r=r, d=d, k=k, complement=0, scaled=int(output)))
        factor, basis = factor + r * d, basis + d * k
    return tuple(jobs)


VIT_B_16 = [(16, d, k, k > 0) for d, k in ((768, 384), (768, 0)) for _ in range(5 * 12)]
VIT_B_16 += [(16, 3072, k, k > 0) for k in (384, 0) for _ in range(12)]


def rows(table: Tensor, kind: Any) -> list[Any]:
    return [kind(*row) for row in table.tolist()]


def bytes_of(programs: Programs, blocks: factors.Blocks) -> tuple[int, int, int]:
    """What the programs of both launches read of bases, and move altogether; float32 factors become bfloat16."""
    of_bases = others = 0
    for row in rows(programs.coordinates, CoordinatesProgram):
        r, k = min(blocks.r, row.r - row.first_r), min(blocks.coordinates_k, row.k - row.first_k)
        of_bases += 4 * (row.last_d - row.first_d) * k
        others += 4 * (row.last_d - row.first_d) * r + 4 * r * k
    first = of_bases + others
    for row in rows(programs.projections, ProjectionProgram):
        r, d = min(blocks.r, row.r - row.first_r), min(blocks.projection_d, row.d - row.first_d)
        of_bases += 4 * d * row.k
        others += 4 * r * d + 2 * r * d + (4 * row.splits * r * row.k if row.k else 0)
    return of_bases, first, of_bases + others - first


def test_bytes_of_a_tower():
    """ViT-B/16, six linears, half of the output directions protected: each basis is read twice, and little else."""
    jobs = jobs_of(VIT_B_16)
    blocks = factors.blocks_of(16, aligned=True)
    programs = fold_programs(jobs, blocks, CPU)
    of_bases, first, second = bytes_of(programs, blocks)
    bases = sum(4 * job.d * job.k for job in jobs)
    assert bases == 127_401_984
    assert of_bases == 2 * bases
    projected = sum(4 * job.r * job.d for job in jobs if job.k)
    coordinates = sum(4 * job.r * job.k for job in jobs)
    copied = sum((4 + 2) * job.r * job.d for job in jobs)
    assert first <= 1.1 * (bases + projected + coordinates)
    assert second <= 1.1 * (bases + coordinates + copied)


@pytest.mark.parametrize(
    "shapes",
    [VIT_B_16, [(70, 600, 137, True), (16, 3000, 300, False), (1, 1, 1, True)], [(2, 9000, 4, True)]],
    ids=["tower", "several", "long"],
)
def test_programs_compute_every_element_once(shapes):
    jobs, blocks = jobs_of(shapes), factors.blocks_of(16, aligned=True)
    programs = fold_programs(jobs, blocks, CPU)
    coordinates, projections = (
        rows(programs.coordinates, CoordinatesProgram),
        rows(programs.projections, ProjectionProgram),
    )
    assert len(set(projections)) == len(projections)
    assert len(set(coordinates)) == len(coordinates)
    written: dict[int, int] = {}  # at the start of one factor's results: how many elements
    for row in projections:
        r, d = min(blocks.r, row.r - row.first_r), min(blocks.projection_d, row.d - row.first_d)
        written[row.out] = written.get(row.out, 0) + r * d
    assert written == {job.out: job.r * job.d for job in jobs}
    parts: dict[int, int] = {}  # at the start of one split's coordinates: how many
    summed: dict[tuple[int, int, int], list[tuple[int, int]]] = {}  # the spans of d that one coordinate's sum has
    for row in coordinates:
        r, k = min(blocks.r, row.r - row.first_r), min(blocks.coordinates_k, row.k - row.first_k)
        parts[row.coordinates] = parts.get(row.coordinates, 0) + r * k
        summed.setdefault((row.basis, row.first_r, row.first_k), []).append((row.first_d, row.last_d))
    assert sum(parts.values()) <= programs.workspace
    first_of = {row.basis: row for row in projections if row.k}
    for row in first_of.values():
        stride = row.r * row.coordinates_stride_r
        for split in range(row.splits):
            assert parts.pop(row.coordinates + split * stride) == row.r * row.k
        (spans,) = {tuple(sorted(spans)) for (basis, *_), spans in summed.items() if basis == row.basis}
        assert len(spans) == row.splits
        assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])]
        assert spans[-1][1] == row.d
        assert all(first % blocks.coordinates_d == 0 for first, _ in spans)
    assert not parts
    assert programs.splits == max(row.splits for row in projections if row.k)


@pytest.mark.parametrize(
    ("shapes", "length"),
    [
        (VIT_B_16, 2048),  # two splits where d = 3072
        ([(16, 768, 384, True)] * 24, 512),
        ([(16, 768, 384, True)], 256),
        ([(16, 4096, 512, True)], 1024),  # four splits, not more
        ([(16, 9000, 512, True)] * 99, 4096),
    ],
)
def test_splits_make_programs_enough(shapes, length):
    jobs, blocks = list(jobs_of(shapes)), factors.blocks_of(16, aligned=True)
    assert split_length(jobs, blocks) == length
    if len(jobs) > 1:
        assert len(fold_programs(tuple(jobs), blocks, CPU).coordinates) >= MIN_PROGRAMS


def test_layouts():
    """Blocks of r or d first, as factors lie; the launch of the coordinates knows of projected factors alone."""
    programs = fold_programs(jobs_of(VIT_B_16), factors.blocks_of(16, aligned=True), CPU)
    assert (programs.coordinates_layout, programs.projections_layout) == (ALONG_R, MIXED)


# ---- captures


@contextlib.contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE.type == "cpu":
        with cuda_graphs_on_cpu(), monkeypatch.context() as patch:
            patch.setattr(CUDAGraphsOnCPU, "capturing", True)
            yield
    else:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            yield


def test_a_capture_does_not_copy_a_table(monkeypatch):
    known, other = [make(True, 4, 40, 8)], [make(True, 4, 44, 8)]
    fold(known, torch.float32)
    with capturing(monkeypatch):
        fold(known, torch.float32)
    message = r"the fold of 1 factors has no table on .* graph is being captured.*: run the step once, .* before"
    with pytest.raises(RuntimeError, match=message), capturing(monkeypatch):
        fold(other, torch.float32)
    fold(other, torch.float32)
    with capturing(monkeypatch):
        fold(other, torch.float32)
