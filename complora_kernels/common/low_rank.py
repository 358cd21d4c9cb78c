"""The norm of a product `ΔW = B A` of factors, and its derivative, from r x r work: ΔW [out, in] is never computed."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Norm = Literal["frobenius", "spectral"]


class NormOfProduct(NamedTuple):
    """|ΔW|, and factors of its derivative: `d|ΔW| = <d(ΔW), P Q>`, so `d|ΔW|/dB = P Q A^T` and `d|ΔW|/dA = B^T P Q`."""

    norm: Tensor  # [...]
    P: Tensor  # [..., out, q]
    Q: Tensor  # [..., q, in]


def widened(tensor: Tensor) -> Tensor:
    """`tensor` in float64, which autocast and TF32 leave alone; in float32 or wider where a device has no float64."""
    exact = tensor.device.type in ("cpu", "cuda")
    return tensor.to(torch.float64 if exact else torch.promote_types(tensor.dtype, torch.float32))


def norm_of_product(
    A: Tensor,  # [..., r, in]
    B: Tensor,  # [..., out, r]
    norm: Norm,
) -> NormOfProduct:
    """|B A| in the Frobenius norm, or the spectral one, which is the largest singular value.

    `|ΔW|² = tr((B^T B)(A A^T))` in the Frobenius norm, whose derivative is ΔW / |ΔW|, and 0 at ΔW = 0. With
    `B = Q_B R_B` and `A^T = Q_A R_A`, the singular values of ΔW are those of `R_B R_A^T`; the derivative of the largest
    is `u v^T`, the product of its singular vectors, one choice of several where it occurs twice. NaN gives NaN.
    """
    if norm == "frobenius":
        squares = (B.mT @ B) * (A @ A.mT)  # [..., r, r]
        size = squares.sum((-2, -1)).clamp(min=0).sqrt()  # rounding may leave less than 0
        return NormOfProduct(size, B / torch.where(size == 0, 1, size)[..., None, None], A)
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    core = R_B @ R_A.mT  # [..., min(out, r), min(in, r)]
    finite = torch.nan_to_num(core, nan=0.0, posinf=0.0, neginf=0.0)  # of others torch makes an error
    U, _, Vh = torch.linalg.svd(finite, full_matrices=False)
    u, v = U[..., :, :1], Vh[..., :1, :].mT
    return NormOfProduct((u.mT @ core @ v)[..., 0, 0], Q_B @ u, v.mT @ Q_A.mT)
