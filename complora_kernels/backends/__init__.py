"""The backends, which of them can run here, and why not the others: `python -m complora_kernels.backends`."""

# The methods of a Protocol have no bodies.
# pyright: reportReturnType=false

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor, dtype

from complora_kernels.adapted_linear import AdaptedLinear, Deferred, Needs, ProductGrads
from complora_kernels.backends.extension import ExtensionBackend
from complora_kernels.backends.torch import Norm, Normed, ProductInput, Source, TorchBackend
from complora_kernels.backends.triton import TritonBackend

ENVIRONMENT_VARIABLE = "COMPLORA_BACKEND"

logger = logging.getLogger("complora_kernels")


class Backend(Protocol):
    """One way to compute the operations: each has the same methods, with the same arguments and results.

    Notation as in `functional`; M rows of x, P adapters of ranks that add up to R.
    """

    @property
    def name(self) -> str: ...

    @property
    def purpose(self) -> str:
        """Its purpose in a few words."""

    @property
    def philox(self) -> bool:
        """Whether its dropout masks are those that kernels draw, of one key on the device, see `dropout`."""

    @property
    def reads_parts(self) -> bool:
        """Whether a product's gradient may come as those of its columns, one tensor [M, D] for each equal part."""

    @property
    def own_operations(self) -> bool:
        """Whether it computes by operations of this package, which torch.func and the like cannot follow."""

    @property
    def automatic(self) -> bool:
        """Whether it may be chosen without being asked for by name."""

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""

    def unsupported_tensors(
        self, label: str, tensors: Sequence[Tensor], bases: Sequence[Tensor | None] = (), dtype: dtype | None = None
    ) -> str | None:
        """Why it does not support these tensors and bases, and results of this dtype, or None."""

    def unsupported_linear(self, x: Tensor, linear: AdaptedLinear) -> str | None:
        """Why it does not support a product of x and these adapters, or None."""

    def unsupported_norm(self, x: Tensor, *others: Tensor | None) -> str | None:
        """Why it does not support a LayerNorm of x [..., K] beside these tensors, or None."""

    def project_complement(self, factor: Tensor, basis: Tensor, basis_kind: str) -> Tensor:
        """`factor (I - U U^T)` of a principal basis or `factor U U^T` of a complement basis, as factor [..., d]."""

    def fold_factors(
        self,
        factors: Sequence[Tensor],  # each [r, d], those of the output side [d, r]
        bases: Sequence[Tensor | None],  # each [d, k]
        kinds: Sequence[str],
        output_side: Sequence[bool],
        scaling: float,
        dtypes: Sequence[dtype],
    ) -> list[Tensor]:
        """`A P_in` and, of the output side, `scaling · P_out B`, in the shapes of the factors."""

    def fold_factors_bwd(
        self,
        factors: Sequence[Tensor],  # the gradients of the results
        bases: Sequence[Tensor | None],
        kinds: Sequence[str],
        output_side: Sequence[bool],
        scaling: float,
        dtypes: Sequence[dtype],
    ) -> list[Tensor]:
        """The same projections of the gradients."""

    def packed_lora_linear_fwd(
        self, given: ProductInput, linear: AdaptedLinear, *, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`y = x W^T + b + h_i B̃_i^T` in the rows of adapter i, and `h_i = drop_i(x) Ã_i^T`.

        x is [M, K]; h [M, R] is computed unless it is given, and [0, R] is returned unless `linear.save_h`. A residual
        [M, N] is added to y [M, N], which then has its dtype; where it is `given.beside.onto`, the product is added to
        it in place, and it is the result.
        """

    def packed_lora_linear_bwd(
        self, dY: Any, source: Source, h: Tensor, linear: AdaptedLinear, needs: Needs, *, defer: bool = False
    ) -> ProductGrads:
        """`g_i = dY_i B̃_i`, `dX = dY W + Σ_i m_i ∘ (g_i Ã_i)`, `dÃ_i = g_i^T drop_i(x)`, `dB̃_i = dY_i^T h_i`.

        dY is [M, N], or where the backend `reads_parts` a sequence; x [M, K] is taken from its source. With `defer` dX
        may be a `Deferred`, for `norm_bwd` or `activation_bwd` of the same backend.
        """

    def norm_fwd(
        self,
        x: Tensor,
        delta: Tensor | None,
        norm: Norm,
        dtype: dtype,
        reader: AdaptedLinear,
        *,
        closing: AdaptedLinear | None = None,
    ) -> tuple[Tensor, Normed, ProductInput]:
        """`s = x + delta` [M, K], what is saved of it, `LN(s)` in the dtype of the product that reads it.

        Where it comes for free, h = drop(LN(s)) Ã^T [M, R] of that product is part of its input. `closing` is the
        product of an activation that is added to s. Where that can be done in place, the first result is s in memory
        of its own, not that of what is saved, for `activation_fwd`.
        """

    def norm_bwd(
        self, d_normed: Tensor | Deferred, d_stream: Tensor | None, normed: Normed
    ) -> tuple[Tensor, Sequence[Tensor] | None]:
        """`ds = d_stream + rstd · (w ∘ dn - mean(w ∘ dn) - ŝ · mean(w ∘ dn ∘ ŝ))`, `ŝ = (s - mean) · rstd`, [M, K].

        Beside it each dÃ [r, K] of the product that read the norm, where dn left them to it.
        """

    def activation_fwd(
        self, z: Tensor, activation: str, reader: AdaptedLinear, *, onto: Tensor | None = None
    ) -> ProductInput:
        """`act(z)` [M, K], and h = drop(act(z)) Ã^T [M, R] of the product that reads it, where it comes for free.

        `onto` is the s in memory of its own that `norm_fwd` gave for this product, which then is added to it in place.
        """

    def activation_bwd(
        self, da: Tensor | Deferred, z: Tensor, activation: str
    ) -> tuple[Tensor, Sequence[Tensor] | None]:
        """`dz = da ∘ act'(z)`, [M, K], and each dÃ [r, K] of the product that read act(z), where da left them to it."""


REGISTRY: dict[str, Backend] = {
    backend.name: backend for backend in (TritonBackend(), ExtensionBackend(), TorchBackend())
}
REFERENCE = "reference"  # a name that is no backend: the operations are then those of `reference`
AUTO_ORDER = tuple(REGISTRY)  # "auto" takes the first that can run
FACTOR_OPERATIONS = ("project_complement", "fold_factors")
OPERATIONS = (*FACTOR_OPERATIONS, "packed_lora_linear", "complora_linear", "norm_lora_linear", "norm_lora_mlp")


def skipped(operation: str, device: str, dropping: bool = False) -> tuple[str, ...]:
    """The backends that "auto" skips for an operation, because another one was measured to be faster.

    On the CPU, at the sizes of `benchmarks/bench_factors.py` and `bench_layer.py`, the extension is faster than the
    torch backend where factors are projected and where dropout masks are drawn; else the large products decide, which
    are torch's in any case.
    """
    faster = device != "cpu" or dropping or operation in FACTOR_OPERATIONS
    return () if faster else ("extension",)


def resolve(
    backend: str | None = None,
    operation: str = "",
    unsupported: Callable[[Backend], str | None] = lambda backend: None,
    skip: tuple[str, ...] = (),
) -> str:
    """The name of the backend to use: the argument, else `COMPLORA_BACKEND`, else the first that can run here.

    Args:
        backend: a name, "auto" or None.
        operation: the operation that is to be computed, for messages.
        unsupported: why a backend does not support the operation's arguments, or None. The choice skips such a backend
            and says so once for each reason.
        skip: backends that only a choice by name takes for this operation, silently: others are faster.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that was asked for by name cannot run here, or does not support the arguments; the
            message gives the reason.
    """
    source = "backend" if backend is not None else ENVIRONMENT_VARIABLE
    name = backend if backend is not None else os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if name == "auto":
        for candidate in _usable():
            if candidate in skip:
                continue
            reason = unsupported(REGISTRY[candidate])
            if reason is None:
                return candidate
            _say_once(f"{operation} does not run on the {candidate} backend: {reason}")
    if name == REFERENCE:
        return name
    if name not in REGISTRY:
        raise ValueError(f"{source}={name!r}, expected one of auto, {', '.join((*REGISTRY, REFERENCE))}")
    reason = _unavailable(name)
    if reason is not None:
        raise RuntimeError(f"{source}={name!r} cannot run here: {reason}")
    reason = unsupported(REGISTRY[name])
    if reason is not None:
        raise RuntimeError(f"{source}={name!r} does not support {operation}: {reason}")
    return name


def _usable() -> list[str]:
    """The names that "auto" chooses from, in order."""
    return [name for name in AUTO_ORDER if REGISTRY[name].unavailable() is None and REGISTRY[name].automatic]


def _unavailable(name: str) -> str | None:
    return REGISTRY[name].unavailable()


messages_said: dict[str, object] = {}  # the call that gave each message


def _say_once(message: str) -> None:
    call = object()
    if messages_said.setdefault(message, call) is call:  # one step: of several threads one says it
        logger.warning(message)


# torch.compile calls these while it traces and takes the results for constants.
_CONSTANT: tuple[Any, ...] = (_usable, _unavailable, _say_once)
for _function in _CONSTANT:
    _function._dynamo_marked_constant = True
