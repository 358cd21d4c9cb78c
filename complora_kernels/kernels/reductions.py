"""The skinny products of the backward pass, each in one pass over the activation that it reads.

    g_p = dY_p B̃_p [M, r]      dB̃_p = dY_p^T h_p [D, r]      dÃ_p = g_p^T drop_p(x) [r, K]

`db` computes the first two, `da` the third; here both gradients are computed in one launch where g is there already.
Sums over M are split, see `partials`.
"""

# A launch takes more than its kernel's arguments.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.kernels import launch, partials
from complora_kernels.kernels.da import Source, da_job, packed_lora_linear_da, packed_lora_linear_da_kernel
from complora_kernels.kernels.db import db_job, packed_lora_linear_db, packed_lora_linear_db_kernel

__all__ = ["Source", "packed_lora_linear_da", "packed_lora_linear_db", "packed_lora_linear_grads"]


@triton.jit
def packed_lora_linear_grads_kernel(
    da_programs,  # the first ones; the others are those of dB̃
    x_ptr,  # [M, K]
    g_ptr,  # [M, P * R]
    dA_ptr,  # [P, R, K]
    da_partials_ptr,
    da_counters_ptr,
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    weight_ptr,  # [K]
    bias_ptr,  # [K]
    seed_ptr,  # [1]
    dY_ptr,  # [M, N]
    h_ptr,  # [M, P * R]
    dB_ptr,  # [P, D, R]
    db_partials_ptr,
    db_counters_ptr,
    M,
    K,
    D,
    stride_xm,
    stride_xk,
    stride_gm,
    stride_dm,
    stride_dn,
    stride_hm,
    da_rows_of_split,
    da_splits,
    da_group_of_splits,
    db_rows_of_split,
    db_splits,
    db_group_of_splits,
    threshold,
    keep_scale,
    DA_RANK: tl.constexpr,
    DA_ADAPTERS: tl.constexpr,
    DA_SPLIT: tl.constexpr,
    BITS: tl.constexpr,
    NORMED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DB_RANK: tl.constexpr,
    DB_ADAPTERS: tl.constexpr,
    DB_SPLIT: tl.constexpr,
    GROUPS: tl.constexpr,
    ADAPTER_OF_GROUP: tl.constexpr,
    GROUP_OF_ADAPTER: tl.constexpr,
    TILES: tl.constexpr,
    COUNT: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    DA_BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DA_BLOCK_R: tl.constexpr,
    DB_BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DB_BLOCK_R: tl.constexpr,
):
    """One program is one of `packed_lora_linear_da_kernel`, or of `packed_lora_linear_db_kernel` without g.

    Minimum bytes: those of both.
    """
    if tl.program_id(0) < da_programs:
        packed_lora_linear_da_kernel(
            0,
            x_ptr,
            g_ptr,
            dA_ptr,
            da_partials_ptr,
            da_counters_ptr,
            mean_ptr,
            rstd_ptr,
            weight_ptr,
            bias_ptr,
            seed_ptr,
            M,
            K,
            stride_xm,
            stride_xk,
            stride_gm,
            da_rows_of_split,
            da_splits,
            da_group_of_splits,
            threshold,
            keep_scale,
            DA_RANK,
            DA_ADAPTERS,
            DA_SPLIT,
            BITS,
            NORMED,
            HAS_BIAS,
            ACTIVATION,
            UPCAST,
            PRECISION,
            PTX,
            DA_BLOCK_M,
            BLOCK_K,
            DA_BLOCK_R,
        )
    else:
        packed_lora_linear_db_kernel(
            da_programs,
            dY_ptr,
            dY_ptr,
            dY_ptr,
            h_ptr,
            dY_ptr,
            dY_ptr,
            dY_ptr,
            dY_ptr,
            dB_ptr,
            db_partials_ptr,
            db_counters_ptr,
            M,
            D,
            stride_dm,
            stride_dm,
            stride_dm,
            stride_dn,
            stride_hm,
            stride_hm,
            stride_dm,
            db_rows_of_split,
            db_splits,
            db_group_of_splits,
            DB_RANK,
            DB_ADAPTERS,
            GROUPS,
            ADAPTER_OF_GROUP,
            GROUP_OF_ADAPTER,
            1,
            False,
            False,
            True,
            False,
            0,
            DB_SPLIT,
            UPCAST,
            PRECISION,
            TILES,
            COUNT,
            DB_BLOCK_M,
            BLOCK_N,
            DB_BLOCK_R,
        )


def packed_lora_linear_grads(
    da_of: Source,
    db_of: tuple[
        Tensor, Tensor, AdaptedLinear
    ],  # dY [M, N], h [M, P r], whose rows are at any distance, and B̃'s product
) -> tuple[Tensor, Tensor]:  # dÃ [P, r, K], dB̃ [P, D, r]
    """`dÃ_p = g_p^T drop_p(x)` of one product and `dB̃_p = dY_p^T h_p` of the same or another one, in one launch.

    Raises:
        ValueError: x and dY have another number of rows, or g and dY another dtype.
    """
    dY, h, linear = db_of
    if len(da_of.x) != len(dY) or da_of.g.dtype != dY.dtype:
        raise ValueError(
            f"x [{len(da_of.x)}, ...], g {da_of.g.dtype} and dY [{len(dY)}, ...] {dY.dtype}, "
            "expected equal numbers of rows and equal dtypes"
        )
    # Beside a mask of more than 32 ranks four warps have registers for half as many columns.
    crowded = da_of.linear.dropout_p > 0 and da_of.g.shape[1] > 32 * len(da_of.linear.rows)
    da, db = da_job(da_of, narrow=crowded), db_job(dY, h, linear, compute_g=False, compute_dB=True, narrow=True)
    counters = partials.counters(da.work.counters + db.work.counters, dY.device)
    tensors = (*da.tensors(counters), dY, db.h, db.dB, db.partials, counters[da.work.counters :])
    launch.run(packed_lora_linear_grads_kernel, _launch(da.work, db.work), tensors)
    return da.result(), db.results()[1]


@launch.cached
def _launch(da: launch.Work, db: launch.Work) -> launch.Launch:
    kernel = packed_lora_linear_grads_kernel
    numbers = merged(kernel, db=db.numbers, da=da.numbers)
    constexprs, programs = merged(kernel, db=db.constexprs, da=da.constexprs), da.programs + db.programs
    options = {"num_warps": 4, "num_stages": 3}
    return launch.Launch((programs,), tuple(numbers.values()), constexprs, before=(da.programs,), **options)


def merged(kernel: Any, **jobs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of several jobs by their names in the common launch of this kernel, in its order.

    A name that the kernel does not have for one job alone is that of the last job with it.
    """
    names = kernel.arg_names
    given = {_name(names, job, name): value for job, own in jobs.items() for name, value in own.items()}
    return {name: given[name] for name in names if name in given}


def _name(names: Sequence[str], job: str, name: str) -> str:
    """The name of a job's argument in the common launch, whose jobs have some names in common."""
    own = f"{job.upper() if name.isupper() else job}_{name}"
    return own if own in names else name
