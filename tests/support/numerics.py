"""The one accuracy rule of the tests, the random matrices it is applied to, and accuracies of another kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

EPS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}  # of |exact|


def assert_as_accurate_as_reference(
    ours: Tensor,
    reference: Tensor,  # by `reference.py`, in the same dtype
    exact: Tensor,  # by `reference.py` in float64, from the same rounded inputs
    name: str,
    dtype: torch.dtype | None = None,
) -> None:
    """`|ours - exact| <= 2 |reference - exact| + eps |exact|` in Frobenius norms.

    eps is that of `dtype`, in which the result was computed; None: that of the result.
    """
    assert (ours.shape, ours.dtype) == (reference.shape, reference.dtype), (
        f"{name} is {ours.dtype} {tuple(ours.shape)}, expected {reference.dtype} {tuple(reference.shape)}"
    )
    assert exact.dtype == torch.float64
    error = torch.linalg.vector_norm(ours.double() - exact)
    reference_error = torch.linalg.vector_norm(reference.double() - exact)
    size = torch.linalg.vector_norm(exact)
    allowed = 2 * reference_error + EPS[dtype or ours.dtype] * size
    assert error <= allowed, (
        f"{name} ({ours.dtype} {tuple(ours.shape)}): error {error:.3e} is {error / allowed:.2f} of the allowed "
        f"{allowed:.3e} (the reference's error is {reference_error:.3e}, the norm {size:.3e})"
    )


def random_basis(d: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:  # [d, k], orthonormal columns
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q[:, :k].to(dtype)


def share_named_right(cosines: Tensor, labels: Tensor) -> Any:
    """The share of images whose nearest class is their own.

    It equals a share that differs from it by images alone of which two classes are too near to call.

    Args:
        cosines: [N, C] of images and classes; float32 rounds one by 1e-6, otherwise in batches of other sizes.
        labels: [N].
    """
    first, second = cosines.topk(2).values.T
    is_near = (first - second < 1e-4).double().mean().item()
    assert is_near < 0.15, "the images do not tell two ways of computing apart"
    return pytest.approx((cosines.argmax(1) == labels).double().mean().item(), abs=is_near + 1e-6)  # of float32
