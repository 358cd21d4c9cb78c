"""Which directions of a weight are protected: principal and complement bases from its singular value decomposition.

With `W = U Σ V^T` [out, in], the output side protects the span of the first k columns of U and the input side that of
V. A projection onto the complement, `P = I - U_k U_k^T = U_c U_c^T`, can be held by either basis; the narrower one is
stored.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import OrderedDict
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from complora_kernels.config import CompLoRAConfig, check_subspace_size
from complora_kernels.tensor_facts import TensorFacts

Side = Literal["output", "input"]
BasisKind = Literal["principal", "complement"]

CACHE_BYTES = 512 * 2**20


class Basis(NamedTuple):
    """An orthonormal basis that defines a projection onto the complement of k protected directions."""

    matrix: Tensor  # [d, k] when principal, [d, d - k] when complement
    kind: BasisKind
    k: int
    energy: float  # share of Σσ² that the protected directions hold


class Spectrum(NamedTuple):
    """A reduced singular value decomposition `W = U diag(S) V^T`, with m = min(out, in)."""

    U: Tensor  # [out, m]
    S: Tensor  # [m]
    V: Tensor  # [in, m]


def principal_basis(
    weight: Tensor,  # [out, in]
    *,
    k: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    side: Side = "output",
) -> Tensor:
    """The top-k singular vectors of `weight`: left ones for the output side [out, k], right ones for the input [in, k].

    Exactly one size is given: `k` in [0, min(out, in)], `energy` in (0, 1] (the smallest k that holds this share of
    Σσ²), or `ratio` in [0, 1] (k = round(ratio · min(out, in))). Half-precision weights are decomposed in float32,
    float64 weights in float64; the result has that dtype and the weight's device. Where σ_k = σ_{k+1}, the choice among
    equal directions is arbitrary.

    Raises:
        ValueError: a size out of range, not exactly one size, or a weight that is not a finite floating-point matrix.
    """
    spectrum, k = _decompose(weight, k, energy, ratio)
    return _own(_side_vectors(spectrum, side)[:, :k], weight.device)


def complement_basis(
    weight: Tensor,  # [out, in]
    *,
    k: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    side: Side = "output",
) -> Tensor:
    """An orthonormal basis of what `principal_basis` leaves, [out, out - k] or [in, in - k]; all else as there."""
    spectrum, k = _decompose(weight, k, energy, ratio)
    return _own(_complement(_side_vectors(spectrum, side), k), weight.device)


def projection_basis(weight: Tensor, config: CompLoRAConfig, side: Side, name: str = "") -> Basis:
    """The narrower of the two bases that project `weight`'s `side` as `config` asks.

    `name` (the weight's path) and `config.subspace_seed` choose the directions of `subspace_source="random"`, so that
    an adapter finds the same ones when it is loaded again.
    """
    spectrum, k = _decompose(weight, **config.subspace_size, name=name or "weight", prefix="subspace_")
    vectors = _side_vectors(spectrum, side)  # [d, min(out, in)]
    if config.subspace_source == "random":
        vectors = _random_vectors(vectors, seed=zlib.crc32(f"{config.subspace_seed}/{name}/{side}".encode()))
    d = vectors.shape[0]
    narrow: BasisKind = "principal" if 2 * k <= d else "complement"
    matrix = vectors[:, :k] if narrow == "principal" else _complement(vectors, k)
    return Basis(_own(matrix, weight.device), narrow, k, _energy_within(weight, spectrum, vectors[:, :k], side))


def align_basis(
    basis: Tensor,  # [d, m]
    factor: Tensor,  # [r, d]
    *,
    kind: BasisKind,
    tolerance: float = 5e-6,  # of |factor|: float32 leaves 1.5e-6 at d = 768, the package promises 1e-5
) -> Tensor:
    """`basis`, turned as little as possible so that the projection it defines leaves `factor` as it is.

    A saved adapter is already projected, but a basis computed anew from a half-precision copy of the weights, or on
    another machine, differs by rounding. Turning the basis keeps the saved update exact and protected.
    """
    factor = factor.to(basis)
    coordinates = factor @ basis  # [r, m]
    lost = coordinates if kind == "principal" else factor - coordinates @ basis.T
    if basis.numel() == 0 or lost.norm() <= tolerance * factor.norm():
        return basis
    _, sigma, Vh = torch.linalg.svd(factor, full_matrices=False)
    span = Vh[sigma > tolerance * sigma[0]].T  # [d, rank], orthonormal columns
    if kind == "complement":
        span = span[:, : basis.shape[1]]  # no more than there is room for: beyond that the factor holds rounding
    rest = basis - span @ (span.T @ basis)  # [d, m], orthogonal to the factor
    vectors = torch.linalg.svd(rest, full_matrices=False).U  # [d, m], the span's share of it last
    if kind == "principal":
        return vectors.contiguous()
    return torch.cat([span, vectors[:, : basis.shape[1] - span.shape[1]]], dim=1).contiguous()


_ORTHONORMAL: TensorFacts[bool] = TensorFacts()


def check_orthonormal(basis: Tensor, name: str) -> None:
    """Raises ValueError unless the columns of `basis` [d, k] are orthonormal to 1e-4; each tensor is looked at once."""
    if torch.compiler.is_compiling() or _ORTHONORMAL.get_or_compute(basis, _is_orthonormal):
        return
    raise ValueError(
        f"{name} of shape {tuple(basis.shape)} does not have orthonormal columns: expected {name}^T {name} = I to 1e-4"
    )


def fingerprint(weight: Tensor) -> str:
    """A hash of the shape, the dtype and every bit of `weight`."""
    data = weight.detach().cpu().contiguous()  # [out, in]
    digest = hashlib.blake2b(f"{tuple(data.shape)}/{data.dtype}".encode(), digest_size=16)
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


_SPECTRA: OrderedDict[str, Spectrum] = OrderedDict()


def clear_cache() -> None:
    """Forgets the decompositions that are kept, up to `CACHE_BYTES` of host memory, for weights seen before."""
    _SPECTRA.clear()


def is_cached(weight: Tensor) -> bool:
    """Whether the decomposition of `weight` is already known."""
    return fingerprint(weight) in _SPECTRA


def _spectrum(weight: Tensor) -> Spectrum:
    key = fingerprint(weight)
    if key in _SPECTRA:
        _SPECTRA.move_to_end(key)
        return _SPECTRA[key]
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    _SPECTRA[key] = spectrum = Spectrum(U.cpu(), S.cpu(), Vh.mT.contiguous().cpu())
    while len(_SPECTRA) > 1 and sum(part.nbytes for kept in _SPECTRA.values() for part in kept) > CACHE_BYTES:
        _SPECTRA.popitem(last=False)
    return spectrum


def _decompose(
    weight: Tensor, k: int | None, energy: float | None, ratio: float | None, name: str = "weight", prefix: str = ""
) -> tuple[Spectrum, int]:
    check_weight(weight, name)
    sizes: dict[str, Any] = {"k": k, "energy": energy, "ratio": ratio}
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"k, energy, ratio={given or None}, expected exactly one of the three")
    check_subspace_size(**sizes)
    smaller = min(weight.shape)
    if k is not None and k > smaller:
        raise ValueError(
            f"{prefix}k={k}, expected at most min(out, in)={smaller} for {name} of shape {tuple(weight.shape)}"
        )
    spectrum = _spectrum(weight)
    if ratio is not None:
        k = round(ratio * smaller)
    elif energy is not None:
        sigma = spectrum.S  # [m]
        rounding = sigma[:1] * max(weight.shape) * torch.finfo(sigma.dtype).eps  # as in torch.linalg.matrix_rank
        sigma = sigma.where(sigma > rounding, 0)  # a rank-deficient weight holds nothing beyond its rank
        held = sigma.double().square().cumsum(0)  # [m], Σσ² of the first 1, 2, ... directions
        k = int(torch.searchsorted(held, energy * held[-1])) + 1 if smaller and held[-1] > 0 else 0
    assert k is not None
    return spectrum, k


def check_weight(weight: Tensor, name: str) -> None:
    """Raises ValueError unless `weight` is a finite floating-point matrix with values (not on the meta device)."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}, dtype {weight.dtype} and device {weight.device}, "
            "expected a floating-point matrix [out, in] that holds values"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} of shape {tuple(weight.shape)} holds NaN or infinite values, expected finite ones")


def _side_vectors(spectrum: Spectrum, side: Side) -> Tensor:
    if side not in ("output", "input"):
        raise ValueError(f"side={side!r}, expected 'output' or 'input'")
    return spectrum.U if side == "output" else spectrum.V


def _complement(vectors: Tensor, k: int) -> Tensor:
    """An orthonormal basis [d, d - k] of the complement of the first k columns of `vectors` [d, m]."""
    if vectors.shape[0] == vectors.shape[1]:
        return vectors[:, k:]
    return torch.linalg.qr(vectors[:, :k], mode="complete").Q[:, k:]


def _own(vectors: Tensor, device: torch.device) -> Tensor:
    """A copy that the caller may write to: slices of all columns would share the memory of the cache."""
    return vectors.to(device, memory_format=torch.contiguous_format, copy=True)


def _random_vectors(vectors: Tensor, seed: int) -> Tensor:
    """Uniformly random orthonormal columns of the same shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype)).Q


def _energy_within(weight: Tensor, spectrum: Spectrum, protected: Tensor, side: Side) -> float:
    """Share of |W|² inside the protected directions: |U_k^T W|² / |W|² or |W V_k|² / |W|²."""
    total = spectrum.S.double().square().sum()
    if total == 0:
        return 0.0
    matrix, protected = weight.detach().cpu().double(), protected.double()
    inside = protected.T @ matrix if side == "output" else matrix @ protected
    return float(inside.square().sum() / total)


def _is_orthonormal(basis: Tensor) -> bool:
    wide = basis.detach().cpu().double()  # not every device has float64, which autocast and TF32 leave alone
    identity = torch.eye(basis.shape[1], dtype=torch.float64)
    return bool((wide.mT @ wide - identity).abs().max() <= 1e-4) if basis.shape[1] else True
