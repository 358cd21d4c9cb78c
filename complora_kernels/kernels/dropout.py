"""Dropout masks inside the kernels: drawn where they are needed, from one seed, and never stored.

Philox4x32-7 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011), keyed by the seed of the call.
Element [row, column] of the mask of adapter a is lane `column % L` of the four words at counter (column // L, row, a,
0): L = 16 lanes of 8 bits when 256 p is whole (0.25, 0.5), which makes a mask cheap to draw, else L = 8 of 16 bits.
Neither tile sizes nor launch grids enter: forward pass, dA and dX draw the same mask. `reference.keep_mask` is the same
in plain torch.
"""

# Numbers are as good as constexprs in a kernel.
# pyright: reportArgumentType=false, reportOperatorIssue=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Dropout(NamedTuple):
    """A kernel's view of dropout: bits of a lane (0: no dropout), the lanes that drop, and 1 / (1 - p)."""

    bits: int
    threshold: int
    scale: float


def dropout_lanes(p: float) -> Dropout:
    """The lanes for a probability: exact for multiples of 1/256, else p rounded to a multiple of 2^-16, below 1.

    The scale belongs to the rounded p, so that `m = mask / (1 - p)` has mean one whatever p is.
    """
    if p == 0:
        return Dropout(0, 0, 1.0)
    bits = 8 if (256 * p).is_integer() else 16
    lanes = 1 << bits
    threshold = min(round(p * lanes), lanes - 1)
    return Dropout(bits, threshold, lanes / (lanes - threshold))


@triton.jit
def keep_mask(
    seed,
    adapter,
    rows,  # [BLOCK_M]
    column,  # the first one, a multiple of 16
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
):
    """The mask [BLOCK_M, BLOCK_K] of one adapter at the given rows, from the given column on; True is kept."""
    LANES: tl.constexpr = 32 // BITS
    blocks = (column // (4 * LANES) + tl.arange(0, BLOCK_K // (4 * LANES))).to(tl.uint32)
    c0, c1 = tl.broadcast(blocks[None, :], rows.to(tl.uint32)[:, None])  # [BLOCK_M, BLOCK_K / (4 LANES)]
    zero = tl.zeros_like(c0)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero + adapter, zero, 7)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_M, BLOCK_K / (4 LANES), 2, 2], in the order 0, 1, 2, 3
    words = tl.reshape(words, (BLOCK_M, BLOCK_K // LANES, 1))
    shifts = (BITS * tl.arange(0, LANES)).to(tl.uint32)
    lanes = (words >> shifts[None, None, :]) & ((1 << BITS) - 1)  # [BLOCK_M, BLOCK_K / LANES, LANES]
    return tl.reshape(lanes >= threshold, (BLOCK_M, BLOCK_K))
