"""What the two launches of a fold compute, cut into programs: tables on the device, made once for a set of factors.

Factors, bases and results lie anywhere in memory; a row of a table says where. Offsets count elements from the first
factor, the first basis, the first result. Addresses of parameters and bases stay, so that a table is copied to the
device once. Imports no Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ALONG_D, ALONG_R, MIXED = 1, 2, 3  # the dimension along which every factor and result is contiguous, or some along each
SPLIT = (
    2048  # elements of a factor that one program sums over, at most where a factor has no more than four times these
)
MIN_SPLIT = 256  # and at least: more partial sums are read again more often
MIN_PROGRAMS = 132  # as many as multiprocessors of an H100 or H200


class Job(NamedTuple):
    """One factor of one layer: `r` vectors of length `d`, and where it and its basis lie and its result goes."""

    factor: int
    factor_stride_r: int
    factor_stride_d: int
    basis: int
    basis_stride_d: int
    out: int
    out_stride_r: int
    out_stride_d: int
    r: int
    d: int
    k: int  # 0: not projected
    complement: int  # 1: the basis spans the complement
    scaled: int  # 1: the result is multiplied by the scaling

    @property
    def along_r(self) -> bool:
        """Whether programs go through its elements r first: those of the output side are stored so."""
        return self.out_stride_d != 1


class Blocks(NamedTuple):
    """The sizes of the blocks, the same for all programs of a launch."""

    r: int  # vectors
    coordinates_k: int  # coordinates that a program of the first launch computes
    coordinates_d: int  # elements that it multiplies at a time
    projection_d: int  # elements of the result that a program of the second launch computes
    projection_k: int  # coordinates that it multiplies at a time
    stages: int  # steps of a loop whose operands are on their way or in use


class CoordinatesProgram(NamedTuple):
    """A row of the first table: BLOCK_R vectors, BLOCK_K directions, the elements from first_d to last_d."""

    factor: int
    factor_stride_r: int
    factor_stride_d: int
    basis: int
    basis_stride_d: int
    coordinates: int
    coordinates_stride_r: int
    r: int
    k: int
    along_r: int
    first_r: int
    first_k: int
    first_d: int  # a multiple of the block
    last_d: int


class ProjectionProgram(NamedTuple):
    """A row of the second table: BLOCK_R vectors, BLOCK_D of their elements."""

    factor: int
    factor_stride_r: int
    factor_stride_d: int
    basis: int
    basis_stride_d: int
    coordinates: int
    coordinates_stride_r: int
    splits: int
    out: int
    out_stride_r: int
    out_stride_d: int
    r: int
    d: int
    k: int
    complement: int
    scaled: int
    along_r: int
    first_r: int
    first_d: int


class Programs(NamedTuple):
    """The programs of both launches."""

    coordinates: Tensor  # [programs, fields of CoordinatesProgram], int64; no programs where nothing is projected
    projections: Tensor  # [programs, fields of ProjectionProgram], int64
    workspace: int  # elements of the coordinates of all splits
    splits: int  # partial sums of one coordinate, at most; 0 where nothing is projected
    coordinates_layout: int  # ALONG_D, ALONG_R or MIXED: of the factors that are projected
    projections_layout: int  # of all factors


def fold_programs(jobs: tuple[Job, ...], blocks: Blocks, device: torch.device) -> Programs:
    """Both tables, on the device.

    Raises:
        RuntimeError: a CUDA graph is being captured and the tables would have to be copied to the device.
    """
    if is_capturing(device):
        raise RuntimeError(
            f"the fold of {len(jobs)} factors has no table on {device} and a CUDA graph is being captured, which "
            "cannot hold the copy: run the step once, with the same parameters, before capturing it"
        )
    projected = [job for job in jobs if job.k > 0]
    split = split_length(projected, blocks)
    coordinates: list[CoordinatesProgram] = []
    projections: list[ProjectionProgram] = []
    workspace = 0
    for job in jobs:
        projections += _projections(job, workspace, split, blocks)
        if job.k > 0:
            coordinates += _coordinates(job, workspace, split, blocks)
            workspace += _splits(job, split) * job.r * _padded(job.k)
    # The longest sums first: no program begins one when the others are nearly done. Last to first in the second launch:
    # the bases that were read last may still be in the cache; what is not projected has none and fills up the end.
    coordinates.sort(key=lambda program: program.first_d - program.last_d)
    projections.reverse()
    projections.sort(key=lambda program: program.k == 0)
    on_host = [torch.tensor(rows, dtype=torch.int64) for rows in (coordinates, projections)]
    flat = torch.cat([table.flatten() for table in on_host]).to(device)
    parts = flat.split_with_sizes([table.numel() for table in on_host])
    return Programs(
        coordinates=parts[0].view(-1, len(CoordinatesProgram._fields)),
        projections=parts[1].view(-1, len(ProjectionProgram._fields)),
        workspace=workspace,
        splits=max((_splits(job, split) for job in projected), default=0),
        coordinates_layout=_layout(projected),
        projections_layout=_layout(jobs),
    )


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def split_length(projected: list[Job] | tuple[Job, ...], blocks: Blocks) -> int:
    """The elements of a factor that one program sums over: all of them where there are programs enough without splits.

    It depends on the shapes alone, and gives no factor more than four splits.
    """
    longest = max((job.d for job in projected), default=0)
    fewest = -(-longest // 4)  # of four splits
    length = SPLIT
    while length < fewest:
        length *= 2

    def programs() -> int:
        return sum(
            -(-job.r // blocks.r) * -(-job.k // blocks.coordinates_k) * _splits(job, length) for job in projected
        )

    while length // 2 >= max(fewest, MIN_SPLIT) and programs() < MIN_PROGRAMS:
        length //= 2
    return length


def _coordinates(job: Job, workspace: int, split: int, blocks: Blocks) -> Iterator[CoordinatesProgram]:
    for i in range(_splits(job, split)):
        for first_k in range(0, job.k, blocks.coordinates_k):
            for first_r in range(0, job.r, blocks.r):
                yield CoordinatesProgram(
                    *job[:5],
                    coordinates=workspace + i * job.r * _padded(job.k),
                    coordinates_stride_r=_padded(job.k),
                    r=job.r,
                    k=job.k,
                    along_r=int(job.along_r),
                    first_r=first_r,
                    first_k=first_k,
                    first_d=i * split,
                    last_d=min((i + 1) * split, job.d),
                )


def _projections(job: Job, workspace: int, split: int, blocks: Blocks) -> Iterator[ProjectionProgram]:
    for first_d in range(0, job.d, blocks.projection_d):
        for first_r in range(0, job.r, blocks.r):
            yield ProjectionProgram(
                *job[:5],
                coordinates=workspace,
                coordinates_stride_r=_padded(job.k),
                splits=_splits(job, split),
                out=job.out,
                out_stride_r=job.out_stride_r,
                out_stride_d=job.out_stride_d,
                r=job.r,
                d=job.d,
                k=job.k,
                complement=job.complement,
                scaled=job.scaled,
                along_r=int(job.along_r),
                first_r=first_r,
                first_d=first_d,
            )


def _splits(job: Job, split: int) -> int:
    return -(-job.d // split)


def _padded(k: int) -> int:
    """The distance of two vectors' coordinates: they start on 16 bytes."""
    return -(-k // 4) * 4


def _layout(jobs: list[Job] | tuple[Job, ...]) -> int:
    return functools.reduce(int.__or__, ((ALONG_R if job.along_r else ALONG_D) for job in jobs), 0)
