"""A short description by which a base weight is known again: half-precision copies pass, other weights do not."""

from __future__ import annotations

import hashlib
import math
from typing import TypedDict

import torch
from torch import Tensor

SKETCHES = 8
# Rounding to bfloat16 moves a sketch by 0.0015 |W| (root mean square; at worst 0.004), to float16 by an eighth of that,
# and the weights of another model by about |W|. Above one hundredth they are other weights.
TOLERANCE = 0.01


class Description(TypedDict):
    """The description of a weight, in types of JSON."""

    shape: list[int]
    norm: float  # Frobenius
    sketch: list[float]


def describe(weight: Tensor) -> Description:  # [out, in]
    """The shape of `W`, |W| and the sketch `u_i^T W v_i` for eight fixed pairs of sign vectors, in float64.

    A change of the weight moves each number by about the norm of the change: over random signs, `u^T ΔW v` has mean 0
    and variance |ΔW|².
    """
    W = weight.detach().cpu().double()
    u, v = _signs("output", W.shape[0]), _signs("input", W.shape[1])  # [8, out], [8, in]
    sketch = ((u @ W) * v).sum(1)  # [8]
    return {"shape": list(W.shape), "norm": float(W.norm()), "sketch": sketch.tolist()}


def relative_distance(weight: Description, known: Description) -> float:
    """An estimate of |W - W'| / |W'|, infinite for other shapes.

    The estimate is the larger of two: the distance of the sketches, and the difference of the norms, which is never
    larger than that of the weights.
    """
    if weight["shape"] != known["shape"] or len(weight["sketch"]) != len(known["sketch"]):
        return math.inf
    apart = math.dist(weight["sketch"], known["sketch"]) / math.sqrt(SKETCHES)
    apart = max(apart, abs(weight["norm"] - known["norm"]))
    return apart / known["norm"] if known["norm"] > 0 else apart


def describe_projection(basis: Tensor) -> Tensor:  # [d, k] to [8]
    """The sketch `u_i^T U U^T v_i` of the projection onto the columns of `U`, in float64 and host memory.

    It depends on the subspace alone, not on the basis; a change of the projection moves it as `describe` says.
    """
    U = basis.detach().cpu().double()
    return ((_signs("output", len(U)) @ U) * (_signs("input", len(U)) @ U)).sum(1)


def _signs(side: str, d: int) -> Tensor:  # [8, d]
    """Eight vectors of signs, the same on every machine: the bits of a standard hash, one byte for each position."""
    hashed = torch.frombuffer(bytearray(hashlib.shake_256(side.encode()).digest(d)), dtype=torch.uint8)
    bits = (hashed >> torch.arange(SKETCHES, dtype=torch.uint8)[:, None]) & 1
    return bits.double() * 2 - 1
