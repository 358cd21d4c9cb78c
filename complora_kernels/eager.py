"""The torch backend: folded factors on torch's own products.

The base product carries any number of adapters side by side ("packed": q, k and v share one); a plain layer has one.
`plans` says how the rank-r term joins it: added to the base product (`addmm`, in float32), as one product
`[x | h] [W | B̃]^T` (`concat`, where a second rounding would lose most of a small adapter), or in the weight (`merge`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from complora_kernels.backends import plans
from complora_kernels.common.tracing import is_checkpointed_selectively
from complora_kernels.dropout import drop, dropout_mask

Rows = Sequence[tuple[int, int]]


def project_complement(
    factor: Tensor,  # [..., d]
    basis: Tensor,  # [d, k]
    basis_kind: str,
) -> Tensor:
    """`factor (I - U U^T)` or `factor U U^T`, in float32 or wider: in half precision it would leave the complement."""
    return _cast(_projected(factor, basis, basis_kind), factor.dtype)


def fold_factors(
    factors: Sequence[Tensor],  # each [r, d], those of the output side [d, r]
    bases: Sequence[Tensor | None],  # each [d, k]
    kinds: Sequence[str],
    output_side: Sequence[bool],
    scaling: float,
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:  # in the shapes of the factors
    """`A P_in` and, of the output side, `scaling · P_out B`."""
    folded = []
    for factor, basis, kind, output, dtype in zip(factors, bases, kinds, output_side, dtypes, strict=True):
        factor = factor.to(torch.promote_types(factor.dtype, dtype))
        if output:
            folded.append(_cast(_projected(factor.mT, basis, kind).mT.mul(scaling), dtype))  # s · P_out B, [out, r]
        else:
            folded.append(_cast(_projected(factor, basis, kind), dtype))  # Ã = A P_in, [r, in]
    return folded


fold_factors_bwd = fold_factors  # P is symmetric


def _drop_each(
    x: Tensor,  # [M, K]
    seeds: Sequence[Tensor],  # each [1]
    adapters: int,
    dropout_p: float,
) -> Iterator[Tensor]:
    # A generator: each mask [M, K] is gone before the next is drawn.
    return (drop(x, dropout_mask(x, x.shape, seed, dropout_p), dropout_p) for seed in seeds)


def packed_lora_linear_fwd(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], as it is kept: under autocast in a wider dtype than x
    bias: Tensor | None,  # [N]
    As: Sequence[Tensor],  # each [r, K], in the dtype of x
    Bs: Sequence[Tensor],  # each [rows, r]
    rows: Rows,
    dropout_p: float,
    seeds: Sequence[Tensor],  # each [1]; none without dropout
    *,
    save_h: bool,
    precision: str,
    h: Tensor | None = None,  # [M, R], where it is known
    drop_each: Callable[[Tensor, Sequence[Tensor], int, float], Iterable[Tensor]] = _drop_each,
) -> tuple[Tensor, Tensor]:  # y [..., N], h [M, R] with R = Σ r, or [0, R] unless it is saved
    """`y = x W^T + b + h B̃^T` in the rows of each adapter, and `h = drop(x) Ã^T`, all adapters side by side.

    `drop_each(x, seeds, adapters, p)` gives each adapter's `drop(x)`, where masks are not those of `dropout_mask`.
    """
    flat = flatten(x)  # [M, K]
    plan = choose(flat, weight, As, seeds, precision)
    bias = None if bias is None else bias.to(x.dtype)
    if h is None and seeds:
        dropped = drop_each(flat, seeds, len(As), dropout_p)
        h = torch.cat([dropped_x @ A.mT for A, dropped_x in zip(As, dropped, strict=True)], 1)  # [M, R]
    elif h is None and (save_h or plan != "merge"):
        h = flat @ _stack(As).mT  # [M, R]
    elif h is None:
        h = flat.new_empty(0, sum(len(A) for A in As))
    if plan == "merge":
        y = torch.nn.functional.linear(flat, _merged(weight, As, Bs, rows, x.dtype), bias)  # x (W + ΔW)^T + b
    elif plan == "concat":
        wide = torch.cat([weight.to(x.dtype), block_diagonal(Bs, [start for start, _ in rows], len(weight))], 1)
        y = torch.nn.functional.linear(torch.cat([flat, h], 1), wide, bias)  # [x | h] [W | B̃]^T + b
    else:
        y = torch.nn.functional.linear(flat, weight.to(x.dtype), bias)  # [M, N]
        y = y.clone() if is_checkpointed_selectively() else y  # which may keep the product
        for h_i, B, (start, stop) in zip(_split(h, As), Bs, rows, strict=True):
            y[:, start:stop].addmm_(h_i, B.mT)
    return unflatten(y, [*x.shape[:-1], weight.shape[0]]), h if save_h else h.new_empty(0, h.shape[1])


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
    *,
    precision: str,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """`g = dY B̃`, `dX = dY W + m ∘ (g Ã)`, `dÃ = g^T drop(x)`, `dB̃ = dY^T h`; `needs` says which of dX, dÃ, dB̃."""
    needs_x, needs_A, needs_B = needs
    dY = flatten(dY)  # [M, N]
    flat = flatten(x)  # [M, K]
    dAs: list[Tensor | None] = [None] * len(As)
    dBs: list[Tensor | None] = [None] * len(Bs)
    dX = None
    if needs_B:
        # each [rows, r], as (h^T dY)^T rather than dY^T h: the long dimension of dY stays the contiguous one
        dBs = [(h_i.mT @ dY[:, start:stop]).mT for h_i, (start, stop) in zip(_split(h, As), rows, strict=True)]
    plan = choose(flat, weight, As, seeds, precision)
    if not (needs_A or needs_x):
        return None, dAs, dBs
    if plan == "merge" and not needs_A:
        dX = input_grad(dY, flat.new_empty(0), weight, As, Bs, rows, plan, x.dtype)
        return dX.view(x.shape), dAs, dBs
    gs = [dY[:, start:stop] @ B for B, (start, stop) in zip(Bs, rows, strict=True)]  # each [M, r]
    if seeds:
        wide = sum_dtype(plan, x.dtype)
        dX = dY.to(wide) @ weight.to(x.dtype).to(wide) if needs_x else None
        for i, (A, g, seed) in enumerate(zip(As, gs, seeds, strict=True)):
            mask = dropout_mask(dY, flat.shape, seed, dropout_p)  # [M, K], drawn once for both gradients
            if needs_A:
                dAs[i] = g.mT @ drop(flat, mask, dropout_p)
            if dX is not None:
                dX += drop(g.to(wide) @ A.to(wide), mask, dropout_p)
        dX = None if dX is None else dX.to(x.dtype)
    else:
        g = torch.cat(gs, 1) if len(gs) > 1 else gs[0]  # [M, R]
        if needs_A:
            dAs = list((g.mT @ flat).split_with_sizes([A.shape[0] for A in As]))
        if needs_x:
            dX = input_grad(dY, g, weight, As, Bs, rows, plan, x.dtype)
    return None if dX is None else dX.view(x.shape), dAs, dBs


def input_grad(
    dY: Tensor,  # [M, N]
    g: Tensor,  # [M, R]; not read by the plan `merge`
    weight: Tensor,  # [N, K]
    As: Sequence[Tensor],  # each [r, K]
    Bs: Sequence[Tensor],  # each [rows, r]
    rows: Rows,
    plan: str,
    dtype: torch.dtype,
) -> Tensor:  # [M, K]
    """`dX = dY W + g Ã` without dropout, by a plan."""
    if plan == "merge":
        return dY @ _merged(weight, As, Bs, rows, dtype)  # dY (W + ΔW)
    if plan == "concat":
        return torch.cat([dY, g], 1) @ torch.cat([weight.to(dtype), _stack(As)])  # [dY | g] [W ; Ã]
    return (dY @ weight.to(dtype)).addmm_(g, _stack(As))


def sum_dtype(plan: str, dtype: torch.dtype) -> torch.dtype:
    """What the two terms of dX are added in when a mask stands between them: wide where the plan rounds once."""
    return torch.promote_types(dtype, torch.float32) if plan == "concat" else dtype


def block_diagonal(
    Bs: Sequence[Tensor],  # each [rows, r]
    starts: Sequence[int],
    N: int,
) -> Tensor:  # [N, R]
    """Each adapter's B̃ in its own rows and columns."""
    if len(Bs) == 1 and len(Bs[0]) == N:
        return Bs[0]
    blocks = Bs[0].new_zeros(N, sum(B.shape[1] for B in Bs))
    column = 0
    for B, start in zip(Bs, starts, strict=True):
        blocks[start : start + len(B), column : column + B.shape[1]] = B
        column += B.shape[1]
    return blocks


def choose(x: Tensor, weight: Tensor, As: Sequence[Tensor], seeds: Sequence[Tensor], precision: str) -> str:
    """The name of the plan for a product [M, K] x [N, K]^T with its adapters."""
    rank = max(len(A) for A in As)
    problem = plans.problem(
        x, weight, backend="torch", rank=rank, adapters=len(As), dtype=x.dtype, dropout=len(seeds) > 0
    )
    return plans.choose(problem, precision).name


def _merged(
    weight: Tensor, As: Sequence[Tensor], Bs: Sequence[Tensor], rows: Rows, dtype: torch.dtype
) -> Tensor:  # [N, K]
    """`W + B̃ Ã` in the rows of each adapter, added in float32 or wider and rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(wide, copy=True)
    for A, B, (start, stop) in zip(As, Bs, rows, strict=True):
        merged[start:stop].addmm_(B.to(wide), A.to(wide))
    return merged.to(dtype)


def _projected(factor: Tensor, basis: Tensor | None, kind: str) -> Tensor:
    """`factor P` in float32, or float64 when the factor is, with 4·r·d·k operations and no [d, d] product.

    Where torch is allowed TF32, these products use it.
    """
    factor = factor.to(torch.promote_types(factor.dtype, torch.float32))
    if basis is None:
        return factor
    rows = flatten(factor)  # [R, d]
    basis = basis.to(factor.dtype)
    coordinates = rows @ basis  # [R, k]
    if kind == "complement":
        return unflatten(coordinates @ basis.mT, factor.shape)
    return unflatten(torch.addmm(rows, coordinates, basis.mT, alpha=-1), factor.shape)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, but not to its own: torch.compile of torch 2.11 loses the gradient of such an output."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def check_device(first: Tensor, *others: Tensor | None) -> None:
    """Raises ValueError unless all are on one device: beside a tensor without values others have no result."""
    device = first.device
    for tensor in others:
        if tensor is not None and tensor.device != device:
            raise ValueError(f"a tensor is on {tensor.device}, expected {device}")


def flatten(
    x: Tensor,  # [..., d]
) -> Tensor:  # [M, d]
    """`x.reshape(-1, d)`, also where d is 0, which torch calls ambiguous."""
    d = x.shape[-1]
    return x.reshape(-1 if d else math.prod(x.shape[:-1]), d)


def unflatten(result: Tensor, shape: Sequence[int]) -> Tensor:
    """`result.view(shape)`, but no view to autograd, which forbids writing to one that a custom Function returns."""
    return torch.ops.aten._unsafe_view(result, list(shape))


def _stack(As: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(As)) if len(As) > 1 else As[0]  # [R, K]


def _split(h: Tensor, As: Sequence[Tensor]) -> Sequence[Tensor]:
    return h.split_with_sizes([A.shape[0] for A in As], 1) if len(As) > 1 else [h]  # each [M, r]
