"""State of the forward pass that a tower runs: its folded factors, and the positions that its feature is read at.

A scope lives as long as that forward pass, on the thread that runs it and outside the modules, so that nothing is left
to be copied or saved with them. Within it

- all adapted layers below the module are folded in one `fold_factors` call. A layer takes its factors from the scope
  where they were made of the factors and bases that it has (a factor that is written to while the pass runs counts
  from the next pass on);
- a transformer truncates its input to the longest text of the batch;
- the last block computes the one position that is read. Its keys and values are those of all positions.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from complora_kernels import functional
from complora_kernels.common.sharded import is_sharded
from complora_kernels.modules.extend import Extension, has_user_hooks
from complora_kernels.modules.layer import CompLoRALayer, fold_each
from complora_kernels.modules.masks import known_causal


class FoldedWeight(NamedTuple):
    """The raw factors of one adapted weight, and what was made of them."""

    factors: tuple[Tensor, Tensor]
    folded_A: Tensor  # [r, in]
    scaled_B: Tensor  # [out, r]


class FoldedLayer(NamedTuple):
    """The adapted weights of a layer by their names, and the bases that projected them."""

    bases: tuple[Tensor | None, ...]
    weights: dict[str, FoldedWeight]


FoldedLayers = dict[CompLoRALayer, FoldedLayer]


class LastBlock(NamedTuple):
    """The modules between the last block of a tower and its feature. A user hook on any of them sees all positions."""

    block: nn.Module
    transformer: nn.Module
    norm: nn.Module  # applied to what the transformer returns

    @property
    def alone(self) -> nn.Module | None:
        """The block; None where a user hook sees what it computes."""
        return None if any(map(has_user_hooks, self)) else self.block


class Reading(NamedTuple):
    """Where a running tower reads its feature: at one position of each of N sequences."""

    last_block: nn.Module | None  # computes that position alone; None: no block does
    positions: Tensor | None = None  # [N]; None: the first of each sequence
    lengths: tuple[int, ...] = ()  # the values that L may have where positions are given
    transformer: nn.Module | None = None  # truncates its input [N, L, d]; None: no module does
    shape: tuple[int, ...] = ()  # N, L before truncation
    length: int = 0  # the number of positions that remain


class Scope(NamedTuple):
    """One running forward pass: the modes in which it began, the layers folded for it, and where it is read."""

    grad_enabled: bool
    dispatch: object
    layers: FoldedLayers
    reading: Reading | None


class Running(threading.local):
    """The scopes that run on a thread."""

    def __init__(self) -> None:  # no class attribute, because torch.compile guards on the dict of a thread
        self.scopes: tuple[Scope, ...] = ()  # the innermost comes last


RUNNING = Running()


class Scoped(Extension):
    """A module whose forward pass is a scope. Which layers are folded is looked up each time that it begins.

    An integration overrides what its towers read. The names are unlikely ones, because any model may be extended.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reading = current_reading()
        if reading is not None and reading.transformer is self:
            args, kwargs = self._truncate_for_scope(reading, args, kwargs)
        return run_in_scope(fold_below(self), self._reading_of_scope(), super().forward, *args, **kwargs)

    def _reading_of_scope(self) -> Reading | None:
        """The reading of the forward pass that now begins; by default that of the one around it."""
        return current_reading()

    def _truncate_for_scope(
        self, reading: Reading, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The arguments of a transformer that is called (x, attn_mask=mask), without the positions that nobody reads.

        They are left as they are where it is called otherwise, or under a mask that is not known to be causal.
        """
        if len(args) != 1 or kwargs.keys() != {"attn_mask"}:
            return args, kwargs
        x, mask = args[0], kwargs["attn_mask"]  # [N, L, d], [L, L]
        if x.dim() != 3 or x.shape[:2] != reading.shape or mask is None or not mask.is_floating_point():
            return args, kwargs
        if not known_causal(mask, x.shape[1], x.shape[1]):
            return args, kwargs
        x = x[:, : reading.length].contiguous()  # a view would keep the whole x alive until the backward pass
        return (x,), {"attn_mask": mask[: reading.length, : reading.length]}


def run_in_scope(
    layers: FoldedLayers, reading: Reading | None, run: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """The result of `run(*args, **kwargs)` in a scope on this thread. No generator: an interrupt could strand it."""
    outer = RUNNING.scopes
    try:
        try:
            RUNNING.scopes = (*outer, Scope(torch.is_grad_enabled(), _dispatch(), layers, reading))
            return run(*args, **kwargs)
        finally:
            RUNNING.scopes = outer
    finally:
        RUNNING.scopes = outer  # again: an interrupt may have broken the first off


# ---- folded factors


def adapted_below(module: nn.Module) -> list[CompLoRALayer]:
    """The adapted layers below `module`, each once, without those below another `Scoped` module: it folds them."""
    layers: dict[CompLoRALayer, None] = {}
    modules = [module]
    for parent in modules:
        for child in parent._modules.values():
            if isinstance(child, CompLoRALayer):
                layers[child] = None
            elif child is not None and not isinstance(child, Scoped):
                modules.append(child)
    return list(layers)


def fold_below(module: nn.Module) -> FoldedLayers:
    """Folds the factors of the active layers of `adapted_below` in one call, unless scalings or dtypes are mixed."""
    weights: list[tuple[CompLoRALayer, str, torch.dtype]] = []
    dtypes: dict[Any, torch.dtype] = {}  # of the products, by the dtype and the device of the weight
    for layer in (each.running for each in adapted_below(module)):
        if not layer.active:
            continue
        name = next(iter(layer.weights))
        frozen = layer.frozen_parameter(name)
        # torch.fx's tracer puts stand-ins in the place of parameters; of a sharded one, its own block gathers it first.
        if isinstance(frozen, Tensor) and not is_sharded(layer.factors(name)[0]):
            key = (frozen.dtype, frozen.device)
            if (dtype := dtypes.get(key)) is None:
                if not frozen.is_floating_point():
                    raise ValueError(
                        f"{layer.weight_name(name)} holds {frozen.dtype} weights, expected floating-point ones: "
                        "a quantised base cannot be adapted"
                    )
                dtype = dtypes[key] = functional.compute_dtype(frozen)
            weights += [(layer, name, dtype) for name in layer.weights]
    layers: FoldedLayers = {}
    for (layer, name, _), ((A, B, *_), folded_A, scaled_B) in zip(weights, fold_each(weights), strict=True):
        folded = layers.setdefault(layer, FoldedLayer(tuple(layer._buffers.values()), {}))
        folded.weights[name] = FoldedWeight((A, B), folded_A, scaled_B)
    return layers


def factors_in_scope(
    layer: CompLoRALayer, names: tuple[str, ...], dtype: torch.dtype
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The result of `layer.fold_factors`, from the running scopes where one of them has it."""
    for running in reversed(RUNNING.scopes):
        folded = running.layers.get(layer)
        if folded is not None and _is_valid(running, folded, layer, names, dtype):
            weights = [folded.weights[name] for name in names]
            return [weight.folded_A for weight in weights], [weight.scaled_B for weight in weights]
    return layer.fold_factors(names, dtype)


def _is_valid(
    running: Scope, folded: FoldedLayer, layer: CompLoRALayer, names: tuple[str, ...], dtype: torch.dtype
) -> bool:
    """Whether the layer would now fold the same tensors to the same result, with a gradient where one is due."""
    if running.dispatch is not _dispatch() or (torch.is_grad_enabled() and not running.grad_enabled):
        return False
    if len(folded.bases) != len(layer._buffers) or not all(map(operator.is_, folded.bases, layer._buffers.values())):
        return False
    for name in names:
        weight = folded.weights[name]
        if not all(map(operator.is_, weight.factors, layer.factors(name))) or weight.folded_A.dtype != dtype:
            return False
    return True


def _dispatch() -> object:
    """The mode that sees the operations: selective checkpointing counts and replays them, those of a fold too."""
    return "compiler" if torch.compiler.is_compiling() else _get_current_dispatch_mode()


# ---- positions


def current_reading() -> Reading | None:
    """Where the innermost running tower reads its feature; None under torch.compile, which computes all positions."""
    if torch.compiler.is_compiling() or not RUNNING.scopes:
        return None
    return RUNNING.scopes[-1].reading


def reading_of(
    block: nn.Module,
    x: Tensor,  # [N, L, d], or [L, N, d]
    *,
    sequence_first: bool,
) -> Reading | None:
    """The reading whose position `block` is to compute alone; None: it computes all positions."""
    reading = current_reading()
    if reading is None or reading.last_block is not block:
        return None
    L, N = x.shape[:2] if sequence_first else (x.shape[1], x.shape[0])
    fits = reading.positions is None or (len(reading.positions) == N and L in reading.lengths)
    return reading if fits else None


def take(
    x: Tensor,  # [N, L, d], or [L, N, d]
    positions: Tensor | None,  # [N]; None: the first of each sequence
    *,
    sequence_first: bool,
) -> Tensor:  # [N, 1, d], or [1, N, d]
    """One position of each sequence."""
    if positions is None:
        return x[:1] if sequence_first else x[:, :1]
    sequences = torch.arange(len(positions), device=x.device)
    return x[positions, sequences].unsqueeze(0) if sequence_first else x[sequences, positions].unsqueeze(1)
