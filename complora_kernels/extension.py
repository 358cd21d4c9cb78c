"""The extension backend: the operations of `csrc/`, on the CPU and on CUDA GPUs.

It folds and projects factors and computes their gradients; the large products are torch's, by the plans of the torch
backend. Dropout masks are those of the Triton kernels (`reference.keep_mask`): one seed a call, never a stored mask.
`backends.build` has loaded the library before anything here is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from complora_kernels import eager
from complora_kernels.eager import Rows, flatten, unflatten


def project_complement(
    factor: Tensor,  # [..., d]
    basis: Tensor,  # [d, k]
    basis_kind: str,
) -> Tensor:
    """`factor (I - U U^T)` or `factor U U^T`, in float32, or float64 when `factor` is."""
    basis = basis.to(torch.promote_types(factor.dtype, torch.float32))
    return torch.ops.complora.project_complement(factor, basis, basis_kind == "complement")


def project_complement_(
    factor: Tensor,  # [..., d]
    basis: Tensor,  # [d, k]
    basis_kind: str,
) -> Tensor:
    """The same, written back to `factor`."""
    basis = basis.to(torch.promote_types(factor.dtype, torch.float32))
    torch.ops.complora.project_complement_(factor, basis, basis_kind == "complement")
    if not (torch.compiler.is_compiling() or factor.is_inference()):
        torch.autograd.graph.increment_version(factor)  # autograd must see a write; the operation does not tell it
    return factor


def fold_factors(
    factors: Sequence[Tensor],  # each [r, d], those of the output side [d, r]; all of one dtype
    bases: Sequence[Tensor | None],  # each [d, k]
    kinds: Sequence[str],
    output_side: Sequence[bool],
    scaling: float,
    dtypes: Sequence[torch.dtype],  # all the same
) -> list[Tensor]:  # in the shapes of the factors, parts of one tensor
    """`A P_in` and, of the output side, `scaling · P_out B`: all factors of all layers in one call."""
    wide = torch.promote_types(torch.promote_types(factors[0].dtype, dtypes[0]), torch.float32)
    bases = [None if basis is None else basis.to(wide) for basis in bases]
    complement = [kind == "complement" for kind in kinds]
    flat = torch.ops.complora.fold_factors(factors, bases, complement, output_side, scaling, dtypes[0])
    parts = flat.split_with_sizes([factor.numel() for factor in factors])
    return [part.view(factor.shape) for part, factor in zip(parts, factors, strict=True)]


fold_factors_bwd = fold_factors  # P is symmetric


def packed_lora_linear_fwd(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], as it is kept: under autocast in a wider dtype than x
    bias: Tensor | None,  # [N]
    As: Sequence[Tensor],  # each [r, K], in the dtype of x
    Bs: Sequence[Tensor],  # each [D, r]
    rows: Rows,
    dropout_p: float,
    seeds: Sequence[Tensor],  # one [1], or none without dropout
    *,
    save_h: bool,
    precision: str,
    h: Tensor | None = None,  # [M, P r], where it is known
) -> tuple[Tensor, Tensor]:  # y [..., N], h [M, P r], or [0, P r] unless it is saved
    """`y = x W^T + b + h_p B̃_p^T` in the rows of adapter p, and `h_p = drop_p(x) Ã_p^T`."""
    return eager.packed_lora_linear_fwd(
        x, weight, bias, As, Bs, rows, dropout_p, seeds, save_h=save_h, precision=precision, h=h, drop_each=_drop_each
    )


def packed_lora_linear_bwd(
    dY: Tensor,  # [..., N]
    x: Tensor,  # [..., K]
    h: Tensor,  # [M, P r]
    weight: Tensor,  # [N, K]
    As: Sequence[Tensor],  # each [r, K]
    Bs: Sequence[Tensor],  # each [D, r]
    rows: Rows,
    dropout_p: float,
    seeds: Sequence[Tensor],
    needs: tuple[bool, bool, bool],
    *,
    precision: str,
) -> tuple[Tensor | None, Sequence[Tensor | None], Sequence[Tensor | None]]:
    """`g_p = dY_p B̃_p`, `dX = dY W + Σ_p m_p ∘ (g_p Ã_p)`, `dÃ_p = g_p^T drop_p(x)`, `dB̃_p = dY_p^T h_p`.

    `needs` says which of dX, dÃ, dB̃ are computed.
    """
    needs_x, needs_A, needs_B = needs
    dY, flat = flatten(dY), flatten(x)  # [M, N], [M, K]
    plan = eager.choose(flat, weight, As, seeds, precision)
    g = _g(dY, Bs, rows) if needs_A or (needs_x and plan != "merge") else dY.new_empty(0, h.shape[1])
    dX = _input_grad(dY, g, weight, As, Bs, rows, dropout_p, seeds, plan, x.dtype) if needs_x else None
    dAs: Sequence[Tensor | None] = [None] * len(As)
    dBs: Sequence[Tensor | None] = [None] * len(Bs)
    if needs_A or needs_B:
        starts, height, seed = [start for start, _ in rows], len(Bs[0]), seeds[0] if seeds else None
        dA, dB = torch.ops.complora.complora_factor_grads(
            dY, flat, h, g, starts, height, [], [], [], [], 1.0, dropout_p, seed, [needs_A, needs_B], x.dtype
        )
        dAs, dBs = dA.unbind() if needs_A else dAs, dB.unbind() if needs_B else dBs
    return None if dX is None else unflatten(dX, x.shape), dAs, dBs


def complora_linear_bwd(
    dY: Tensor,  # [..., N]
    x: Tensor,  # [..., K]
    h: Tensor,  # [M, r]
    weight: Tensor,  # [N, K]
    folded_A: Tensor,  # [r, K]
    scaled_B: Tensor,  # [N, r]
    output_basis: Tensor | None,  # [N, k]
    input_basis: Tensor | None,  # [K, k]
    output_basis_kind: str,
    input_basis_kind: str,
    scaling: float,
    dropout_p: float,
    seeds: Sequence[Tensor],
    needs: tuple[bool, bool, bool],
    factors: tuple[Tensor, Tensor],  # A [r, K], B [N, r], of which only the dtype is looked at
    *,
    precision: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # dX, dA [r, K], dB [N, r]
    """`dA = (g^T drop(x)) P_in` and `dB = P_out (s · dY^T h)`: summed and projected in one call, rounded once."""
    needs_x, needs_A, needs_B = needs
    dY, flat = flatten(dY), flatten(x)  # [M, N], [M, K]
    rows = [(0, weight.shape[0])]
    plan = eager.choose(flat, weight, [folded_A], seeds, precision)
    g = _g(dY, [scaled_B], rows) if needs_A or (needs_x and plan != "merge") else dY.new_empty(0, h.shape[1])
    dX = dA = dB = None
    if needs_x:
        dX = _input_grad(dY, g, weight, [folded_A], [scaled_B], rows, dropout_p, seeds, plan, x.dtype)
    if needs_A or needs_B:
        dtype = factors[0].dtype
        wide = torch.promote_types(torch.promote_types(x.dtype, dtype), torch.float32)
        dA, dB = torch.ops.complora.complora_factor_grads(
            dY,
            flat,
            h,
            g,
            [0],
            weight.shape[0],
            [None if output_basis is None else output_basis.to(wide)],
            [None if input_basis is None else input_basis.to(wide)],
            [output_basis_kind == "complement"],
            [input_basis_kind == "complement"],
            scaling,
            dropout_p,
            seeds[0] if seeds else None,
            [needs_A, needs_B],
            dtype,
        )
        dA, dB = dA[0] if needs_A else None, dB[0] if needs_B else None
    return None if dX is None else unflatten(dX, x.shape), dA, dB


def _g(
    dY: Tensor,  # [M, N]
    Bs: Sequence[Tensor],  # each [D, r]
    rows: Rows,
) -> Tensor:  # [M, P r]
    gs = [dY[:, start:stop] @ B for B, (start, stop) in zip(Bs, rows, strict=True)]  # g_p = dY_p B̃_p
    return torch.cat(gs, 1) if len(gs) > 1 else gs[0]


def _input_grad(
    dY: Tensor,  # [M, N]
    g: Tensor,  # [M, P r]
    weight: Tensor,  # [N, K]
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    rows: Rows,
    dropout_p: float,
    seeds: Sequence[Tensor],
    plan: str,
    dtype: torch.dtype,
) -> Tensor:  # dX [M, K]
    if not seeds:
        return eager.input_grad(dY, g, weight, As, Bs, rows, plan, dtype)
    wide = eager.sum_dtype(plan, dtype)
    dX = dY.to(wide) @ weight.to(dtype).to(wide)
    for p, (A, g_p) in enumerate(zip(As, g.split(len(As[0]), 1), strict=True)):
        dX += torch.ops.complora.drop(g_p.to(wide) @ A.to(wide), seeds[0], p, dropout_p)  # dY W + m ∘ (g Ã)
    return dX.to(dtype)


def _drop_each(x: Tensor, seeds: Sequence[Tensor], adapters: int, dropout_p: float) -> Iterator[Tensor]:
    return (torch.ops.complora.drop(x, seeds[0], p, dropout_p) for p in range(adapters))
