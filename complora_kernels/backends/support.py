"""The parts that the triton and the extension backend share: what kernels of our own do not support."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from complora_kernels.adapted_linear import AdaptedLinear


def unsupported_tensors(
    label: str,
    tensors: Sequence[Tensor],
    dtype: torch.dtype | None,
    devices: Sequence[str],
    dtypes: Sequence[torch.dtype],
    gpu_refusal: Callable[[int | None], str | None],
) -> str | None:
    """Why kernels for these devices and dtypes do not support the tensors, or None.

    Args:
        label: the name of the tensors in messages.
        tensors: at least one; all must share one device and one dtype.
        dtype: the dtype of the results; None: that of the tensors.
        devices: the types of devices that the kernels run on.
        dtypes: the dtypes that the kernels support.
        gpu_refusal: why the kernels do not run on the GPU of an index, or None.
    """
    device, own_dtype = tensors[0].device, tensors[0].dtype
    if device.type not in devices:
        return f"{label}: on {device}, the kernels run on {' and '.join(devices)} devices"
    for tensor in tensors[1:]:
        if tensor.device != device:
            return f"{label}: on {tensor.device} and {device}, one launch runs on one device"
        if tensor.dtype != own_dtype:
            return f"{label}: several dtypes, {own_dtype} and {tensor.dtype}, the kernels support one"
    if device.type == "cuda" and (reason := gpu_refusal(device.index)):
        return reason
    for name, wanted in ((f"{label}: dtype ", own_dtype), ("dtype=", dtype)):
        if wanted is not None and wanted not in dtypes:
            return f"{name}{wanted}, the kernels support {', '.join(map(str, dtypes))}"
    return None


def unsupported_ranks(linear: AdaptedLinear) -> str | None:
    """Why kernels do not support the adapters of one product: they need equal ranks."""
    if len(linear.rows) == 1:
        return None
    ranks = [A.shape[0] for A in linear.As]
    return f"the adapters have ranks {ranks}, the kernels support equal ones" if len(set(ranks)) > 1 else None


def unsupported_heights(linear: AdaptedLinear) -> str | None:
    """Why kernels do not support the rows that the adapters update: they need equal numbers of rows."""
    heights = [stop - start for start, stop in linear.rows]
    if len(set(heights)) > 1:
        return f"rows={list(linear.rows)} are of heights {heights}, the kernels support equal ones"
    return None
