"""The triton backend of a residual block: what `eager_block` computes, under the same names.

Blocks are not fused while torch.compile traces, so that these launch at once instead of by registered operations: half
the host's time. The first call imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from complora_kernels import ops
from complora_kernels.eager import Rows
from complora_kernels.eager_block import Norm, Normed, Source


def norm_fwd(
    x: Tensor,  # [M, K], the residual stream
    delta: Tensor | None,  # [M, K], what is added to it first
    norm: Norm,
    dtype: torch.dtype,  # of the product that reads the result
    As: Sequence[Tensor],  # each [r, K], the factors of that product
    dropout_p: float,
    seeds: Sequence[Tensor],  # one [1], or none without dropout
) -> tuple[Tensor, Normed, Tensor, Tensor | None]:
    """`x + delta` [M, K], its norm to be saved, the norm [M, K], and h = drop(norm) Ã^T [M, P r]."""
    from complora_kernels.kernels import launch, linear
    from complora_kernels.kernels import norm as kernels

    seed, A = seeds[0] if seeds else None, launch.stacked(As) if As else None
    inside = A if dtype.itemsize == 2 else None  # in float32 rows and Ã do not fit beside each other
    stream, normed, mean, rstd, h = kernels.norm_fwd(x, delta, *norm, dtype, inside, dropout_p, seed)
    if A is not None and inside is None:
        h = linear.packed_lora_linear_h(normed, A, dropout_p, seed)
    return stream, Normed(stream, mean, rstd, norm, dtype), normed, h if As else None


def norm_bwd(
    d_normed: Tensor,  # [M, K]
    d_stream: Tensor | None,  # [M, K], the gradient of the residual stream behind the norm
    normed: Normed,
) -> Tensor:  # [M, K], in the dtype of the stream
    """`dx = d_stream + LN'(d_normed)` in one pass."""
    from complora_kernels.kernels import norm as kernels

    return kernels.norm_bwd(d_normed, d_stream, normed.x, normed.mean, normed.rstd, normed.norm.weight)


def activation_fwd(
    z: Tensor,  # [M, K]
    activation: str,
    As: Sequence[Tensor],  # each [r, K]
    dropout_p: float,
    seeds: Sequence[Tensor],  # one [1], or none without dropout
) -> tuple[Tensor, Tensor | None]:
    """`act(z)` [M, K], and h = drop(act(z)) Ã^T [M, P r]."""
    from complora_kernels.kernels import activation as kernels
    from complora_kernels.kernels import launch, linear

    seed, A = seeds[0] if seeds else None, launch.stacked(As) if As else None
    inside = None if A is None or (seeds and len(As) > 1) else A.flatten(0, 1)  # the kernel draws one mask
    a, h = kernels.activation_fwd(z, activation, inside, dropout_p, seed)
    if A is not None and inside is None:
        h = linear.packed_lora_linear_h(a, A, dropout_p, seed)
    return a, h if As else None


def activation_bwd(
    da: Tensor,  # [M, K]
    z: Tensor,  # [M, K]
    activation: str,
) -> Tensor:  # [M, K]
    """`dz = da ∘ act'(z)`."""
    from complora_kernels.kernels import activation as kernels

    return kernels.activation_bwd(da, z, activation)


def linear_fwd(
    x: Tensor,  # [M, K]
    h: Tensor | None,  # [M, P r], where it is known
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    rows: Rows,
    dropout_p: float,
    seeds: Sequence[Tensor],
    *,
    residual: Tensor | None = None,  # [M, N]
    save_h: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:  # y [M, N], in the dtype of the residual where there is one; h [M, P r], or [0, P r]
    """`packed_lora_linear`, plus a residual: in the plan `fused` they are rounded together."""
    starts, seed = [start for start, _ in rows], seeds[0] if seeds else None
    return ops.linear_fwd(x, weight, bias, As, Bs, starts, dropout_p, seed, save_h, precision, h=h, residual=residual)


def linear_bwd(
    dY: Tensor,  # [M, N]
    source: Source,  # of the product's input [M, K]
    h: Tensor,  # [M, P r]
    weight: Tensor,  # [N, K]
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    rows: Rows,
    dropout_p: float,
    seeds: Sequence[Tensor],
    needs: tuple[bool, bool, bool],
    *,
    precision: str,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """As `packed_lora_linear_bwd`: dX [M, K], dÃs, dB̃s, of which `needs` says what is computed."""
    starts, seed = [start for start, _ in rows], seeds[0] if seeds else None
    shape = torch.empty(1, dtype=source.dtype, device=source.device).expand(source.shape)
    dA_of = _factor_grad(source, len(As), dropout_p, seed)
    dX, dA, dB = ops.linear_bwd(dY, shape, h, weight, As, Bs, starts, dropout_p, seed, needs, precision, dA_of)
    needs_x, needs_A, needs_B = needs
    nothing: list[Tensor | None] = [None] * len(As)
    return dX if needs_x else None, dA.unbind() if needs_A else nothing, dB.unbind() if needs_B else nothing


def _factor_grad(
    source: Source, adapters: int, dropout_p: float, seed: Tensor | None
) -> Callable[[Tensor], Tensor]:  # g [M, P r] -> dÃ [P, r, K]
    from complora_kernels.kernels import reductions

    if isinstance(source, Normed):
        norm = (source.mean, source.rstd, *source.norm[:2])
        return lambda g: reductions.packed_lora_linear_da(source.x, g, adapters, dropout_p, seed, norm=norm)
    activation = source.activation
    return lambda g: reductions.packed_lora_linear_da(source.z, g, adapters, dropout_p, seed, activation=activation)
