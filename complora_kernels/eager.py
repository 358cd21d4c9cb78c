"""The torch backend: folded factors on torch's own products.

The base product carries any number of adapters side by side ("packed": q, k and v share one); a plain layer has one.
In float32 the rank-r term is added to the base product (`addmm`). In half precision a second rounding would lose most
of a small adapter, so base and rank-r term are one product, `[x | h] [W | B̃]^T` (`concat`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from complora_kernels.dropout import drop, dropout_mask

Rows = Sequence[tuple[int, int]]


def project_complement(
    factor: Tensor,  # [..., d]
    basis: Tensor,  # [d, k]
    basis_kind: str,
) -> Tensor:
    """`factor (I - U U^T)` or `factor U U^T`, with 4·r·d·k operations and no [d, d] product."""
    rows = factor.reshape(-1, factor.shape[-1])  # [R, d]
    basis = basis.to(factor.dtype)
    coordinates = rows @ basis  # [R, k]
    if basis_kind == "principal":
        projected = torch.addmm(rows, coordinates, basis.mT, alpha=-1)  # [R, d]
    else:
        projected = coordinates @ basis.mT  # [R, d]
    return _unflatten(projected, factor.shape)


def packed_lora_linear_fwd(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    As: Sequence[Tensor],  # each [r, K]
    Bs: Sequence[Tensor],  # each [rows, r]
    rows: Rows,
    dropout_p: float,
    seeds: Sequence[Tensor],  # each [1]; none without dropout
) -> tuple[Tensor, Tensor]:  # y [..., N], h [M, R] with R = Σ r
    """`y = x W^T + b + h B̃^T` in the rows of each adapter, and `h = drop(x) Ã^T`, all adapters side by side."""
    flat = x.reshape(-1, x.shape[-1])  # [M, K]
    if seeds:
        # A generator: each mask [M, K] is gone before the next is drawn.
        masks = (dropout_mask(flat, flat.shape, seed, dropout_p) for seed in seeds)
        h = torch.cat([drop(flat, mask, dropout_p) @ A.mT for A, mask in zip(As, masks, strict=True)], 1)  # [M, R]
    else:
        h = flat @ _stack(As).mT  # [M, R]
    if _rounds_twice(x):
        wide = torch.cat([weight, _block_diagonal(Bs, rows, weight)], 1)  # [N, K + R]
        y = torch.nn.functional.linear(torch.cat([flat, h], 1), wide, bias)  # [x | h] [W | B̃]^T + b
    else:
        y = torch.nn.functional.linear(flat, weight, bias)  # [M, N]
        for h_i, B, (start, stop) in zip(_split(h, As), Bs, rows, strict=True):
            y[:, start:stop].addmm_(h_i, B.mT)
    return _unflatten(y, [*x.shape[:-1], weight.shape[0]]), h


def packed_lora_linear_bwd(
    dY: Tensor,  # [..., N]
    x: Tensor,  # [..., K]
    h: Tensor,  # [M, R]
    weight: Tensor,  # [N, K]
    As: Sequence[Tensor],  # each [r, K]
    Bs: Sequence[Tensor],  # each [rows, r]
    rows: Rows,
    dropout_p: float,
    seeds: Sequence[Tensor],  # each [1]
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """`g = dY B̃`, `dX = dY W + m ∘ (g Ã)`, `dÃ = g^T drop(x)`, `dB̃ = dY^T h`; `needs` says which of dX, dÃ, dB̃."""
    needs_x, needs_A, needs_B = needs
    dY = dY.reshape(-1, weight.shape[0])  # [M, N]
    flat = x.reshape(-1, x.shape[-1])  # [M, K]
    dAs: list[Tensor | None] = [None] * len(As)
    dBs: list[Tensor | None] = [None] * len(Bs)
    dX = None
    if needs_B:
        dBs = [dY[:, start:stop].mT @ h_i for h_i, (start, stop) in zip(_split(h, As), rows, strict=True)]  # [rows, r]
    if not (needs_x or needs_A):
        return dX, dAs, dBs
    gs = [dY[:, start:stop] @ B for B, (start, stop) in zip(Bs, rows, strict=True)]  # each [M, r]
    if seeds:
        dX = dY @ weight if needs_x else None
        for i, (A, g, seed) in enumerate(zip(As, gs, seeds, strict=True)):
            mask = dropout_mask(dY, flat.shape, seed, dropout_p)  # [M, K], drawn once for both gradients
            if needs_A:
                dAs[i] = g.mT @ drop(flat, mask, dropout_p)
            if dX is not None:
                dX += drop(g @ A, mask, dropout_p)
    else:
        g, A = torch.cat(gs, 1) if len(gs) > 1 else gs[0], _stack(As)  # [M, R], [R, K]
        if needs_A:
            dAs = list(torch.split(g.mT @ flat, [A_i.shape[0] for A_i in As]))
        if needs_x and _rounds_twice(x):
            dX = torch.cat([dY, g], 1) @ torch.cat([weight, A])  # [dY | g] [W ; Ã]
        elif needs_x:
            dX = torch.addmm(dY @ weight, g, A)
    return None if dX is None else dX.view(x.shape), dAs, dBs


def _rounds_twice(x: Tensor) -> bool:
    """Whether adding to a finished product would lose a small adapter below half a unit in the last place."""
    return x.dtype in (torch.bfloat16, torch.float16)


def _unflatten(result: Tensor, shape: Sequence[int]) -> Tensor:
    """`result.view(shape)`, but no view to autograd, which forbids writing to one that a custom Function returns."""
    return torch.ops.aten._unsafe_view(result, list(shape))


def _stack(As: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(As)) if len(As) > 1 else As[0]  # [R, K]


def _split(h: Tensor, As: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.split(h, [A.shape[0] for A in As], 1)  # each [M, r]


def _block_diagonal(Bs: Sequence[Tensor], rows: Rows, weight: Tensor) -> Tensor:
    """Each adapter's B̃ in its own rows and columns of [N, R]."""
    if len(Bs) == 1 and Bs[0].shape[0] == weight.shape[0]:
        return Bs[0]
    blocks = weight.new_zeros(weight.shape[0], sum(B.shape[1] for B in Bs))
    column = 0
    for B, (start, stop) in zip(Bs, rows, strict=True):
        blocks[start:stop, column : column + B.shape[1]] = B
        column += B.shape[1]
    return blocks
