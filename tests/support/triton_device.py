"""Where the Triton tests run, compiled on a CUDA GPU or interpreted on the CPU, and the masks that are drawn there.

The interpreter misreads bfloat16 below the smallest normal number (1e-39 becomes 4.4e-39): no test has such inputs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from complora_kernels import reference
from complora_kernels.backends import hardware

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are first imported
DEVICE = torch.device("cpu" if hardware.interpreted() else "cuda")
HOW = "interpreted on the CPU" if DEVICE.type == "cpu" else f"compiled, on {torch.cuda.get_device_name()}"


def drawn_p(p: float) -> float:
    """The probability that the kernels' lanes can draw: a multiple of 1/256, else of 2^-16, below 1."""
    lanes = 256 if (256 * p).is_integer() else 65536
    return min(round(p * lanes), lanes - 1) / lanes


def masks_of(seed: Tensor, adapters: int, shape: Sequence[int], p: float) -> list[Tensor] | None:
    """`m = mask / (1 - p)` [..., K] in float64, one for each adapter."""
    if p == 0:
        return None
    *batch, K = shape
    M = torch.Size(batch).numel()
    keep = [reference.keep_mask(int(seed), adapter, (M, K), p).to(DEVICE) for adapter in range(adapters)]
    return [mask.view(shape).double() / (1 - drawn_p(p)) for mask in keep]


def next_seed() -> Tensor:
    """The seed that the next call draws."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        return torch.ops.complora.philox_seed(torch.empty(0, device=DEVICE))
