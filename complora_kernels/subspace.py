"""Which directions of a weight are protected: sources of directions, their number, and bases of what is left.

With `W = U Σ V^T` [out, in], the output side protects the span of the first k columns of U and the input side that of
V. With activations it is the span of the top-k eigenvectors of `Y^T Y` [out, out] and `X^T X` [in, in] (uncentred, as
in gradient projection memory, arXiv 2103.09762), where X [M, in] are inputs of the weight and `Y = X W^T` are its
products with them. Since `Y^T Y = W (X^T X) W^T`, the second moment `X^T X` is all that is needed of the inputs. The
bias is left out: it is added whatever W is, and would only take a direction from what W writes.

The ends of the spectrum are the directions of the largest and of the smallest singular values in turns, σ_1, σ_m, σ_2,
σ_{m-1}, ...: with k of them protected, the update lives in the band in the middle, and in what W does not reach (of
intermediate components as the place of an update see arXiv 2602.03493).

A projection onto the complement, `P = I - U_k U_k^T = U_c U_c^T`, can be held by either basis; the narrower one is
stored.

To add a source of directions, add a name to `SubspaceSource` and a record to `SOURCES`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from complora_kernels.common import disk_cache
from complora_kernels.common.schema import is_int, is_number
from complora_kernels.common.tensor_facts import TensorFacts
from complora_kernels.common.tracing import has_values

if TYPE_CHECKING:
    from complora_kernels.config import CompLoRAConfig

Side = Literal["output", "input"]
BasisKind = Literal["principal", "complement"]
SubspaceSource = Literal["weight", "ends", "random", "activations"]

CACHE_BYTES = 512 * 2**20  # host memory for decompositions of weights seen before
SINGULAR = 1e-10  # (σ_m / σ_1)² above which M M^T in float64 tells all singular vectors of M apart
TOGETHER = ("cuda",)  # devices on which one call for several weights is faster than one call for each
LEAST_KEPT = 128  # bases of weights with min(out, in) from here on are kept on the disk: a decomposition takes 3 ms


class Basis(NamedTuple):
    """An orthonormal basis that defines a projection onto the complement of k protected directions."""

    matrix: Tensor  # [d, k] when principal, [d, d - k] when complement
    kind: BasisKind
    k: int
    energy: float  # share that the protected directions hold: of Σσ², or of the trace of X^T X or Y^T Y


class Directions(NamedTuple):
    """The directions of one side in the order in which they are protected; m = min(out, in), or in for `X^T X`."""

    vectors: Tensor  # [d, m], orthonormal columns
    energies: Tensor  # [m], float64: σ² of a weight, eigenvalues of X^T X or Y^T Y; 0 where it is rounding alone


@dataclass(frozen=True)
class Source:
    """A source of protected directions.

    Attributes:
        needs_data: whether the directions are computed from inputs of the weight on calibration batches.
        recomputable: whether the weight and the configuration give the same directions again, so that files need not
            hold bases.
        directions: a function of the weight [out, in], the side, the second moment `X^T X` [in, in] (None unless
            `needs_data`) and a seed, which differs between weights and sides. The energies of the result decide k where
            `subspace_energy` is given; random directions come with the energies of the weight's own.
        energy: a function of the weight, the side, these directions and k: the share that the first k hold.
    """

    needs_data: bool
    recomputable: bool
    directions: Callable[[Tensor, Side, Tensor | None, int], Directions]
    energy: Callable[[Tensor, Side, Directions, int], float]


# ---- bases


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
    directions, k = _sized_directions(_source_of(second_moment), weight, side, second_moment, k, energy, ratio)
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
    """An orthonormal basis of the complement of `principal_basis`, [out, out - k] or [in, in - k]; else as there."""
    directions, k = _sized_directions(_source_of(second_moment), weight, side, second_moment, k, energy, ratio)
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

    `name` (the weight's path) and `config.subspace_seed` choose random directions, so that an adapter finds the same
    ones when it is loaded again. `second_moment` is given for the sources that need data, and for no other.

    Raises:
        ValueError: as `principal_basis`, or a second moment is missing or has no use.
    """
    source, label = SOURCES[config.subspace_source], name or "weight"
    if source.needs_data != (second_moment is not None):
        with_data = " or ".join(f'"{other}"' for other, record in SOURCES.items() if record.needs_data)
        raise ValueError(
            f"second_moment={'None' if second_moment is None else 'X^T X'} of {label} with "
            f"subspace_source={config.subspace_source!r}, expected X^T X with {with_data} and None otherwise"
        )
    seed = _seed(config, side, name)
    known = _KeptBasis(weight, config, side, seed)
    basis = known.read()
    if basis is not None:
        return basis._replace(matrix=_own(basis.matrix, weight))
    directions, k = _sized_directions(
        source, weight, side, second_moment, **config.subspace_size, seed=seed, name=label, prefix="subspace_"
    )
    narrower: BasisKind = "principal" if 2 * k <= len(directions.vectors) else "complement"
    matrix = directions.vectors[:, :k] if narrower == "principal" else _complement(directions.vectors, k)
    basis = Basis(_own(matrix, weight), narrower, k, source.energy(weight, side, directions, k))
    known.write(basis)
    return basis


def singular_values(weight: Tensor) -> Tensor:  # [out, in] to [min(out, in)]
    """The singular values of `weight` in float64 on the CPU, the largest first; 0 where they are rounding alone.

    They are computed, without vectors, unless the decomposition of the weight is kept in memory.
    """
    known = _DECOMPOSITIONS.get(fingerprint(weight))
    if known is not None:
        return known[0].energies.sqrt()
    sigma = torch.linalg.svdvals(_shorter_first(weight))  # [m]
    return sigma.where(sigma > _rounding(weight) * sigma[:1], 0).cpu()


def is_kept(weight: Tensor, config: CompLoRAConfig, side: Side, name: str = "") -> bool:
    """Whether the cache on the disk has a file for `projection_basis(weight, config, side, name)`."""
    return _KeptBasis(weight, config, side, _seed(config, side, name)).is_there()


def _seed(config: CompLoRAConfig, side: Side, name: str) -> int:
    return zlib.crc32(f"{config.subspace_seed}/{name}/{side}".encode())


def align_basis(
    basis: Tensor,  # [d, m]
    factor: Tensor,  # [r, d]
    *,
    kind: BasisKind,
    tolerance: float = 5e-6,  # relative to |factor|: float32 leaves 1.5e-6 at d = 768, the package promises 1e-5
) -> Tensor:  # [d, m]
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
        span = span[:, : basis.shape[1]]  # beyond the width of the basis the factor holds rounding
    rest = basis - span @ (span.T @ basis)  # [d, m], orthogonal to the factor
    vectors = torch.linalg.svd(rest, full_matrices=False).U  # [d, m], the span's share of it last
    if kind == "principal":
        return vectors.contiguous()
    return torch.cat([span, vectors[:, : basis.shape[1] - span.shape[1]]], dim=1).contiguous()


_ORTHONORMAL: TensorFacts[bool] = TensorFacts()


def check_orthonormal(basis: Tensor, name: str) -> None:
    """Raises ValueError unless the columns of `basis` [d, k] are orthonormal to 1e-4; each tensor is read once."""
    if torch.compiler.is_compiling() or _ORTHONORMAL.get(basis) or not has_values(basis):
        return
    with _disable_current_modes():  # modes fake values, count or record operations
        orthonormal = _ORTHONORMAL.set(basis, _is_orthonormal(basis))
    if orthonormal:
        return
    raise ValueError(
        f"{name} of shape {tuple(basis.shape)} does not have orthonormal columns: expected {name}^T {name} = I to 1e-4"
    )


def _is_orthonormal(basis: Tensor) -> bool:  # [d, k]
    wide = basis.detach().cpu().double()  # not every device has float64, which autocast and TF32 leave alone
    identity = torch.eye(basis.shape[1], dtype=torch.float64)
    return bool((wide.mT @ wide - identity).abs().max() <= 1e-4) if basis.shape[1] else True


def _complement(vectors: Tensor, k: int) -> Tensor:
    """An orthonormal basis [d, d - k] of the complement of the first k columns of `vectors` [d, m]."""
    if vectors.shape[0] == vectors.shape[1]:
        return vectors[:, k:]
    return torch.linalg.qr(vectors[:, :k], mode="complete").Q[:, k:]


def _own(vectors: Tensor, weight: Tensor) -> Tensor:
    """A copy that the caller may write to: slices of all columns would share the memory of the cache."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return vectors.to(weight.device, dtype, memory_format=torch.contiguous_format, copy=True)


# ---- sizes


def check_subspace_size(*, k: int | None, energy: float | None, ratio: float | None, prefix: str = "") -> None:
    """Raises ValueError unless the one size that is given lies in its range (k's upper end needs the weight)."""
    if k is not None and not (is_int(k) and k >= 0):
        raise ValueError(f"{prefix}k={k!r}, expected an integer of at least 0")
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        raise ValueError(f"{prefix}energy={energy!r}, expected a share in (0, 1]")
    if ratio is not None and not (is_number(ratio) and 0 <= ratio <= 1):
        raise ValueError(f"{prefix}ratio={ratio!r}, expected a share in [0, 1]")


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


def check_weight(weight: Tensor, name: str) -> None:
    """Raises ValueError unless `weight` is a finite floating-point matrix with values (not on the meta device)."""
    if weight.dim() != 2 or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"{name} has shape {tuple(weight.shape)}, dtype {weight.dtype} and device {weight.device}, "
            "expected a floating-point matrix [out, in] that holds values"
        )
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} of shape {tuple(weight.shape)} holds NaN or infinite values, expected finite ones")


def _sized_directions(
    source: Source,
    weight: Tensor,  # [out, in]
    side: Side,
    second_moment: Tensor | None,  # X^T X [in, in]
    k: int | None,
    energy: float | None,
    ratio: float | None,
    seed: int = 0,
    name: str = "weight",
    prefix: str = "",
) -> tuple[Directions, int]:
    """The directions of a source, and how many of them the one size that is given protects."""
    check_weight(weight, name)
    sizes: dict[str, Any] = {"k": k, "energy": energy, "ratio": ratio}
    given = {name: value for name, value in sizes.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"k, energy, ratio={given or None}, expected exactly one of the three")
    check_subspace_size(**sizes)
    check_k(weight, k, name, prefix)
    if side not in ("output", "input"):
        raise ValueError(f"side={side!r}, expected 'output' or 'input'")
    if second_moment is not None:
        _check_second_moment(second_moment, weight, name)
    directions = source.directions(weight, side, second_moment, seed)
    smaller = min(weight.shape)
    if energy is None:
        k = known_k(weight.shape, k, ratio)
    else:
        held = directions.energies.cumsum(0)  # [m], the energy of the first 1, 2, ... directions
        k = int(torch.searchsorted(held, energy * held[-1])) + 1 if smaller and held[-1] > 0 else 0
        if k > smaller:  # inputs of a weight with in > out may need more directions than the weight has
            share = float(held[smaller - 1] / held[-1])
            raise ValueError(
                f"{prefix}energy={energy}, expected at most {share:.4f} for {name} of shape {tuple(weight.shape)}: "
                f"min(out, in)={smaller} directions hold no more of its activations on the {side} side"
            )
    assert k is not None
    return directions, k


def _check_second_moment(second_moment: Tensor, weight: Tensor, name: str) -> None:
    shape, expected = tuple(second_moment.shape), (weight.shape[1],) * 2
    if shape != expected or not second_moment.is_floating_point():
        raise ValueError(
            f"second_moment of {name} has shape {shape} and dtype {second_moment.dtype}, "
            f"expected X^T X [in, in] of shape {expected}, floating-point"
        )
    if not torch.isfinite(second_moment).all():
        raise ValueError(f"second_moment of {name} holds NaN or infinite values, expected finite ones")


# ---- sources


def _weight_directions(weight: Tensor, side: Side, *_: object) -> Directions:
    """The singular vectors of one side."""
    return _cached(fingerprint(weight), lambda: _singular_vectors(weight))[side == "input"]


def _singular_vectors(weight: Tensor) -> tuple[Directions, Directions]:
    """The directions of the output side and of the input side, m = min(out, in) each.

    Those of the shorter side are the eigenvectors of `M M^T` in float64, where products of float32 numbers are exact,
    for M = W or W^T [m, n]; the others are the columns of `M^T U`, normed. The projection onto the first k is then
    within 2e-6 (Frobenius) of that of a float64 decomposition of W where `σ_k² - σ_{k+1}²` is above 1e-7 σ_1²; a
    float32 decomposition is about a hundred times as far. Weights in float64, and those with singular values too small
    for their squares, are decomposed themselves.
    """
    M = _shorter_first(weight)
    exact = weight.dtype == torch.float64  # then its squares are not
    energies, U, V = (M.new_zeros(1), M, M) if exact else _by_eigenvectors(M)
    if exact or not _told_apart(energies):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)  # [m, m], [m], [m, n]
        energies, V = S.square(), Vh.mT
    return _of_both_sides(weight, energies, U, V)


def decompose_together(weights: Iterable[Tensor]) -> None:  # each [out, in]
    """Decomposes weights of equal shape in one call, and keeps the results for `projection_basis`.

    It is faster on the devices of `TOGETHER`. Weights in float64 are left to that function, one by one.
    """
    groups: dict[Any, dict[str, Tensor]] = {}
    for weight in weights:
        if weight.dtype != torch.float64:
            key = (weight.shape, weight.dtype, weight.device)
            groups.setdefault(key, {})[fingerprint(weight)] = weight
    for group in groups.values():
        unknown = {seen: weight for seen, weight in group.items() if seen not in _DECOMPOSITIONS}
        if len(unknown) > 1:
            M = torch.stack([_shorter_first(weight) for weight in unknown.values()])  # [b, m, n]
            for (seen, weight), *parts in zip(unknown.items(), *_by_eigenvectors(M), strict=True):
                if _told_apart(parts[0]):
                    _cached(seen, functools.partial(_of_both_sides, weight, *parts))


def _shorter_first(weight: Tensor) -> Tensor:  # [out, in] to [m, n], m <= n
    device = weight.device if weight.device.type in ("cpu", "cuda") else "cpu"  # not every device has float64
    M = weight.mT if weight.shape[0] > weight.shape[1] else weight
    return M.detach().to(device, torch.float64)


def _by_eigenvectors(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [..., m, n] to [..., m], [..., m, m], [..., n, m]
    """σ², U and V of M in float64."""
    energies, U = torch.linalg.eigh(M @ M.mT)  # ascending
    energies, U = energies.flip(-1), U.flip(-1)
    V = M.mT @ U
    return energies, U, V / V.norm(dim=-2, keepdim=True)


def _told_apart(energies: Tensor) -> bool:  # [m]
    """Whether no σ² is too small for M M^T to tell its vector from others."""
    return bool((energies > SINGULAR * energies[:1]).all())


def _of_both_sides(
    weight: Tensor,  # [out, in]
    energies: Tensor,  # [m]
    U: Tensor,  # [m, m]
    V: Tensor,  # [n, m]
) -> tuple[Directions, Directions]:
    wide = torch.promote_types(weight.dtype, torch.float32)
    rounding = energies[:1] * _rounding(weight) ** 2
    energies = energies.where(rounding < energies, 0).cpu()  # a rank-deficient weight holds nothing beyond its rank
    of_U, of_V = (Directions(side.to(wide).contiguous().cpu(), energies) for side in (U, V))
    return (of_V, of_U) if weight.shape[0] > weight.shape[1] else (of_U, of_V)


def _rounding(weight: Tensor) -> float:
    """The share of σ_1 up to which a singular value is rounding alone, as torch.linalg.matrix_rank has it."""
    return max(weight.shape) * torch.finfo(torch.promote_types(weight.dtype, torch.float32)).eps


def _weight_share(weight: Tensor, side: Side, directions: Directions, k: int) -> float:
    """Share of |W|² inside the protected directions: |U_k^T W|² / |W|² or |W V_k|² / |W|²."""
    total = directions.energies.sum()
    if total == 0:
        return 0.0
    matrix, protected = weight.detach().cpu().double(), directions.vectors[:, :k].double()  # [out, in], [d, k]
    inside = protected.T @ matrix if side == "output" else matrix @ protected
    return float(inside.square().sum() / total)


def _end_directions(weight: Tensor, side: Side, *_: object) -> Directions:
    """The singular vectors of one side from both ends of the spectrum to its middle."""
    vectors, energies = _weight_directions(weight, side)
    m = len(energies)
    order = torch.stack([torch.arange(m), torch.arange(m).flip(0)], 1).flatten()[:m]  # 0, m - 1, 1, m - 2, ...
    return Directions(vectors[:, order], energies[order])


def _random_directions(weight: Tensor, side: Side, _: Tensor | None, seed: int) -> Directions:
    """Uniformly random orthonormal columns; their number follows from the energies of the weight's own directions."""
    vectors, energies = _weight_directions(weight, side)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype)  # [d, m]
    return Directions(torch.linalg.qr(noise).Q, energies)


def _activation_directions(weight: Tensor, side: Side, second_moment: Tensor | None, _: int) -> Directions:
    """The eigenvectors of `X^T X` on the input side, of `Y^T Y` on the output side."""
    assert second_moment is not None
    seen = (second_moment,) if side == "input" else (second_moment, weight)
    key = "/".join(fingerprint(matrix) for matrix in seen)
    return _cached(f"{side} activations/{key}", lambda: (_eigenvectors(weight, second_moment, side),))[0]


def _eigenvectors(weight: Tensor, second_moment: Tensor, side: Side) -> Directions:
    """`Y^T Y = Q (R X^T X R^T) Q^T` where `W = Q R`, so that no matrix of more than in rows is decomposed."""
    device = weight.device if weight.device.type in ("cpu", "cuda") else "cpu"  # not every device has float64
    M = second_moment.detach().to(device, torch.float64)  # [in, in]
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


def _trace_share(weight: Tensor, side: Side, directions: Directions, k: int) -> float:
    """Share of the trace that the first k eigenvalues hold."""
    energies = directions.energies
    return float(energies[:k].sum() / energies.sum()) if energies.any() else 0.0


SOURCES: dict[SubspaceSource, Source] = {
    "weight": Source(needs_data=False, recomputable=True, directions=_weight_directions, energy=_weight_share),
    "ends": Source(needs_data=False, recomputable=True, directions=_end_directions, energy=_weight_share),
    "random": Source(needs_data=False, recomputable=True, directions=_random_directions, energy=_weight_share),
    "activations": Source(needs_data=True, recomputable=False, directions=_activation_directions, energy=_trace_share),
}


def _source_of(second_moment: Tensor | None) -> Source:
    return SOURCES["weight" if second_moment is None else "activations"]


# ---- a cache of decompositions


_DECOMPOSITIONS: dict[str, tuple[Directions, ...]] = {}  # the least recently used one first


def clear_cache() -> None:
    """Forgets the decompositions that are kept, up to `CACHE_BYTES` of host memory, for weights seen before."""
    _DECOMPOSITIONS.clear()


def fingerprint(weight: Tensor) -> str:
    """A hash of the shape, the dtype and every bit of `weight`."""
    data = weight.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{tuple(data.shape)}/{data.dtype}".encode(), digest_size=16)
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _KeptBasis:
    """The place of a basis in the cache on the disk; it has none where computing it is as fast as reading it."""

    def __init__(self, weight: Tensor, config: CompLoRAConfig, side: Side, seed: int) -> None:
        self._key: str | None = None
        source = SOURCES[config.subspace_source]
        if source.recomputable and weight.dim() == 2 and not weight.is_meta and min(weight.shape) >= LEAST_KEPT:
            size = config.subspace_size
            seed = seed if config.subspace_source == "random" else 0
            self._d, self._seen = weight.shape[side == "input"], fingerprint(weight)
            self._known_k = known_k(weight.shape, size["k"], size["ratio"])
            self._key = f"1/{self._seen}/{side}/{config.subspace_source}/{seed}/{sorted(size.items())}"

    def is_there(self) -> bool:
        """Whether there is a file in its place."""
        return self._key is not None and disk_cache.is_there(self._key)

    def read(self) -> Basis | None:
        """The basis, once it is known to be one; None also where the weight's decomposition is in memory."""
        kept = None if self._key is None or self._seen in _DECOMPOSITIONS else disk_cache.read(self._key)
        if kept is None:
            return None
        matrix, record = kept
        with contextlib.suppress(KeyError):
            kind, k, energy = record["kind"], record["k"], record["energy"]
            expected = is_int(k) and self._known_k in (None, k) and is_number(energy) and 0 <= energy <= 1 + 1e-9
            shape = (self._d, k if kind == "principal" else self._d - k) if expected else None
            fits = matrix.shape == shape and matrix.is_floating_point() and _is_orthonormal(matrix)
            if fits and kind in get_args(BasisKind):
                return Basis(matrix, kind, k, energy)
        return None

    def write(self, basis: Basis) -> None:
        if self._key is not None and basis.matrix.numel() > 0:
            disk_cache.write(self._key, basis.matrix, {"kind": basis.kind, "k": basis.k, "energy": basis.energy})


def _cached(key: str, decompose: Callable[[], tuple[Directions, ...]]) -> tuple[Directions, ...]:
    # Other threads read and write meanwhile. Each use of the dictionary is one step, and none expects that an entry
    # found earlier is still there: there is no lock that an interrupt could leave held. An OrderedDict would not do:
    # its list and its dictionary part where two threads write at once, and it then goes round in a circle.
    decomposed = _DECOMPOSITIONS.pop(key, None) or decompose()
    _DECOMPOSITIONS[key] = decomposed  # the last one now
    for oldest in list(_DECOMPOSITIONS)[:-1]:
        if _bytes_kept() <= CACHE_BYTES:
            break
        _DECOMPOSITIONS.pop(oldest, None)
    return decomposed


def _bytes_kept() -> int:
    return sum(part.nbytes for kept in list(_DECOMPOSITIONS.values()) for side in kept for part in side)
