"""Which directions of a weight are protected: principal and complement bases of the weight or of its activations.

With `W = U Σ V^T` [out, in], the output side protects the span of the first k columns of U and the input side that of
V. With activations it is the span of the top-k eigenvectors of `Y^T Y` [out, out] and `X^T X` [in, in] (uncentred, as
in gradient projection memory, arXiv 2103.09762), where X [M, in] are inputs of the weight and `Y = X W^T` is what it
makes of them. Since `Y^T Y = W (X^T X) W^T`, the second moment `X^T X` is all that is needed of them. The bias is left
out: it is added whatever W is, and would only take a direction from what W writes.

A projection onto the complement, `P = I - U_k U_k^T = U_c U_c^T`, can be held by either basis; the narrower one is
stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from complora_kernels.common.tensor_facts import TensorFacts
from complora_kernels.common.tracing import has_values
from complora_kernels.config import CompLoRAConfig, check_subspace_size

Side = Literal["output", "input"]
BasisKind = Literal["principal", "complement"]

CACHE_BYTES = 512 * 2**20


class Basis(NamedTuple):
    """An orthonormal basis that defines a projection onto the complement of k protected directions."""

    matrix: Tensor  # [d, k] when principal, [d, d - k] when complement
    kind: BasisKind
    k: int
    energy: float  # share that the protected directions hold: of Σσ², or of the trace of X^T X or Y^T Y


class Spectrum(NamedTuple):
    """A reduced singular value decomposition `W = U diag(S) V^T`, with m = min(out, in)."""

    U: Tensor  # [out, m]
    S: Tensor  # [m]
    V: Tensor  # [in, m]


class Directions(NamedTuple):
    """The principal directions of one side, the strongest first; m = min(out, in), or in for an input's moment."""

    vectors: Tensor  # [d, m], orthonormal columns
    energies: Tensor  # [m], float64: σ² of a weight, eigenvalues of X^T X or Y^T Y; 0 where it is rounding alone


def principal_basis(
    weight: Tensor,  # [out, in]
    *,
    k: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    side: Side = "output",
    second_moment: Tensor | None = None,  # X^T X [in, in]
) -> Tensor:
    """The top-k singular vectors of `weight`: left ones for the output side [out, k], right ones for the input [in, k].

    With `second_moment`, the top-k eigenvectors of `W (X^T X) W^T` [out, out] or of `X^T X` [in, in]: the principal
    directions of activations. They are computed in float64, and the largest entry of each is positive.

    Exactly one size is given: `k` in [0, min(out, in)], `energy` in (0, 1] (the smallest k that holds this share of
    Σσ², or of the trace of that matrix), or `ratio` in [0, 1] (k = round(ratio · min(out, in))). Half-precision weights
    are decomposed in float32, float64 weights in float64; the result has that dtype and the weight's device. Where
    σ_k = σ_{k+1}, the choice among equal directions is arbitrary.

    Raises:
        ValueError: a size out of range, not exactly one size, a weight that is not a finite floating-point matrix, a
            second moment that is not one of its inputs, or an energy that takes more than min(out, in) directions.
    """
    directions, k = _decompose(weight, side, second_moment, k, energy, ratio)
    return _own(directions.vectors[:, :k], weight)


def complement_basis(
    weight: Tensor,  # [out, in]
    *,
    k: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    side: Side = "output",
    second_moment: Tensor | None = None,  # X^T X [in, in]
) -> Tensor:
    """An orthonormal basis of what `principal_basis` leaves, [out, out - k] or [in, in - k]; all else as there."""
    directions, k = _decompose(weight, side, second_moment, k, energy, ratio)
    return _own(_complement(directions.vectors, k), weight)


def projection_basis(
    weight: Tensor,  # [out, in]
    config: CompLoRAConfig,
    side: Side,
    name: str = "",
    *,
    second_moment: Tensor | None = None,  # X^T X [in, in]
) -> Basis:
    """The narrower of the two bases that project `weight`'s `side` as `config` asks.

    `name` (the weight's path) and `config.subspace_seed` choose the directions of `subspace_source="random"`, so that
    an adapter finds the same ones when it is loaded again. `subspace_source="activations"` takes them from
    `second_moment`, as `principal_basis`.
    """
    if (config.subspace_source == "activations") != (second_moment is not None):
        raise ValueError(
            f"second_moment={'None' if second_moment is None else 'X^T X'} of {name or 'weight'} with "
            f'subspace_source={config.subspace_source!r}, expected X^T X with "activations" and None otherwise'
        )
    label, sizes = name or "weight", config.subspace_size
    (vectors, energies), k = _decompose(weight, side, second_moment, **sizes, name=label, prefix="subspace_")
    if config.subspace_source == "random":
        vectors = _random_vectors(vectors, seed=zlib.crc32(f"{config.subspace_seed}/{name}/{side}".encode()))
    protected = vectors[:, :k]
    narrow: BasisKind = "principal" if 2 * k <= len(vectors) else "complement"
    matrix = protected if narrow == "principal" else _complement(vectors, k)
    if second_moment is None:
        held = _energy_within(weight, energies.sum(), protected, side)
    else:
        held = float(energies[:k].sum() / energies.sum()) if energies.any() else 0.0
    return Basis(_own(matrix, weight), narrow, k, held)


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
    if torch.compiler.is_compiling() or _ORTHONORMAL.get(basis) or not has_values(basis):
        return
    with _disable_current_modes():  # modes fake values, count or record operations
        orthonormal = _ORTHONORMAL.set(basis, _is_orthonormal(basis))
    if orthonormal:
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


_SPECTRA: OrderedDict[str, Spectrum | Directions] = OrderedDict()


def clear_cache() -> None:
    """Forgets the decompositions that are kept, up to `CACHE_BYTES` of host memory, for weights seen before."""
    _SPECTRA.clear()


Decomposition = TypeVar("Decomposition", Spectrum, Directions)


def _cached(key: str, decompose: Callable[[], Decomposition]) -> Decomposition:
    # Other threads read and write meanwhile. Each use of the dictionary is one step, and none expects that what an
    # earlier one found is still there: no lock that an interrupt could leave held.
    decomposed = cast("Decomposition", _SPECTRA.get(key) or decompose())
    _SPECTRA[key] = decomposed
    with contextlib.suppress(KeyError):
        _SPECTRA.move_to_end(key)
        while len(_SPECTRA) > 1 and _bytes_kept() > CACHE_BYTES:
            _SPECTRA.popitem(last=False)
    return decomposed


def _bytes_kept() -> int:
    return sum(part.nbytes for kept in list(_SPECTRA.values()) for part in kept)


def _decompose(
    weight: Tensor,
    side: Side,
    second_moment: Tensor | None,
    k: int | None,
    energy: float | None,
    ratio: float | None,
    name: str = "weight",
    prefix: str = "",
) -> tuple[Directions, int]:
    check_weight(weight, name)
    sizes: dict[str, Any] = {"k": k, "energy": energy, "ratio": ratio}
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"k, energy, ratio={given or None}, expected exactly one of the three")
    check_subspace_size(**sizes)
    check_k(weight, k, name, prefix)
    if side not in ("output", "input"):
        raise ValueError(f"side={side!r}, expected 'output' or 'input'")
    if second_moment is None:
        directions = _weight_directions(weight, side)
    else:
        _check_second_moment(second_moment, weight, name)
        directions = _activation_directions(weight, second_moment, side)
    smaller = min(weight.shape)
    if energy is None:
        k = known_k(weight.shape, k, ratio)
    else:
        held = directions.energies.cumsum(0)  # [m], what the first 1, 2, ... directions hold
        k = int(torch.searchsorted(held, energy * held[-1])) + 1 if smaller and held[-1] > 0 else 0
        if k > smaller:  # of the inputs of a weight with in > out
            share = float(held[smaller - 1] / held[-1])
            raise ValueError(
                f"{prefix}energy={energy}, expected at most {share:.4f} for {name} of shape {tuple(weight.shape)}: "
                f"min(out, in)={smaller} directions hold no more of its activations on the {side} side"
            )
    assert k is not None
    return directions, k


def _weight_directions(weight: Tensor, side: Side) -> Directions:
    U, S, V = _cached(fingerprint(weight), lambda: _spectrum(weight))
    rounding = S[:1] * max(weight.shape) * torch.finfo(S.dtype).eps  # as in torch.linalg.matrix_rank
    sigma = S.where(rounding < S, 0)  # a rank-deficient weight holds nothing beyond its rank
    return Directions(U if side == "output" else V, sigma.double().square())


def _spectrum(weight: Tensor) -> Spectrum:
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Spectrum(U.cpu(), S.cpu(), Vh.mT.contiguous().cpu())


def _activation_directions(weight: Tensor, second_moment: Tensor, side: Side) -> Directions:
    seen = (second_moment,) if side == "input" else (second_moment, weight)
    key = "/".join(fingerprint(matrix) for matrix in seen)
    return _cached(f"{side} activations/{key}", lambda: _eigenvectors(weight, second_moment, side))


def _eigenvectors(weight: Tensor, second_moment: Tensor, side: Side) -> Directions:
    """Those of `X^T X`, or of `Y^T Y = Q (R X^T X R^T) Q^T` where `W = Q R`: a product of no more than in rows."""
    device = weight.device if weight.device.type in ("cpu", "cuda") else "cpu"  # not every device has float64
    M = second_moment.detach().to(device, torch.float64)
    if side == "input":
        energies, vectors = torch.linalg.eigh(M)  # ascending
    else:
        Q, R = torch.linalg.qr(weight.detach().to(device, torch.float64))  # [out, m], [m, in]
        energies, vectors = torch.linalg.eigh(R @ M @ R.mT)
        vectors = Q @ vectors  # [out, m]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) if len(vectors) else vectors  # [1, m]
    energies, vectors = energies.flip(0), (vectors * largest.sign()).flip(1)
    rounding = energies[:1] * len(M) * torch.finfo(torch.float64).eps
    return Directions(vectors.contiguous().cpu(), energies.where(energies > rounding, 0).cpu())


def known_k(shape: Sequence[int], k: int | None, ratio: float | None) -> int | None:
    """The number of protected directions of a weight [out, in], or None where their energy decides about it."""
    return k if ratio is None else round(ratio * min(shape))


def check_k(weight: Tensor, k: int | None, name: str, prefix: str = "") -> None:
    """Raises ValueError unless `weight` has k directions, or k is not given."""
    if k is not None and k > min(weight.shape):
        raise ValueError(
            f"{prefix}k={k}, expected at most min(out, in)={min(weight.shape)} for {name} of shape "
            f"{tuple(weight.shape)}"
        )


def _check_second_moment(second_moment: Tensor, weight: Tensor, name: str) -> None:
    shape, expected = tuple(second_moment.shape), (weight.shape[1],) * 2
    if shape != expected or not second_moment.is_floating_point():
        raise ValueError(
            f"second_moment of {name} has shape {shape} and dtype {second_moment.dtype}, "
            f"expected X^T X [in, in] of shape {expected}, floating-point"
        )
    if not torch.isfinite(second_moment).all():
        raise ValueError(f"second_moment of {name} holds NaN or infinite values, expected finite ones")


def check_weight(weight: Tensor, name: str) -> None:
    """Raises ValueError unless `weight` is a finite floating-point matrix with values (not on the meta device)."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}, dtype {weight.dtype} and device {weight.device}, "
            "expected a floating-point matrix [out, in] that holds values"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} of shape {tuple(weight.shape)} holds NaN or infinite values, expected finite ones")


def _complement(vectors: Tensor, k: int) -> Tensor:
    """An orthonormal basis [d, d - k] of the complement of the first k columns of `vectors` [d, m]."""
    if vectors.shape[0] == vectors.shape[1]:
        return vectors[:, k:]
    return torch.linalg.qr(vectors[:, :k], mode="complete").Q[:, k:]


def _own(vectors: Tensor, weight: Tensor) -> Tensor:
    """A copy that the caller may write to: slices of all columns would share the memory of the cache."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return vectors.to(weight.device, dtype, memory_format=torch.contiguous_format, copy=True)


def _random_vectors(vectors: Tensor, seed: int) -> Tensor:
    """Uniformly random orthonormal columns of the same shape."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype)).Q


def _energy_within(weight: Tensor, total: Tensor, protected: Tensor, side: Side) -> float:
    """Share of |W|² inside the protected directions: |U_k^T W|² / |W|² or |W V_k|² / |W|²."""
    if total == 0:
        return 0.0
    matrix, protected = weight.detach().cpu().double(), protected.double()
    inside = protected.T @ matrix if side == "output" else matrix @ protected
    return float(inside.square().sum() / total)


def _is_orthonormal(basis: Tensor) -> bool:
    wide = basis.detach().cpu().double()  # not every device has float64, which autocast and TF32 leave alone
    identity = torch.eye(basis.shape[1], dtype=torch.float64)
    return bool((wide.mT @ wide - identity).abs().max() <= 1e-4) if basis.shape[1] else True
