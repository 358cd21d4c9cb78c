"""One `fold_factors` call for all adapted layers of a tower, each time that the tower's forward pass runs.

The results live as long as that forward pass, on the thread that runs it and outside the modules: nothing is left to be
copied or saved with them. A layer takes its factors from there where they are what it would fold itself.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from complora_kernels import functional
from complora_kernels.common.changes import Changes, joined
from complora_kernels.modules.extend import own_hook
from complora_kernels.modules.layer import CompLoRALayer, fold


class FoldedWeight(NamedTuple):
    """The raw factors of one adapted weight with their versions, and what was made of them."""

    factors: tuple[Tensor, Tensor]
    versions: tuple[int, int]
    folded_A: Tensor  # [r, in]
    scaled_B: Tensor  # [out, r]


class FoldedLayer(NamedTuple):
    """The adapted weights of a layer by their names, and the bases that projected them."""

    bases: tuple[Tensor | None, ...]
    weights: dict[str, FoldedWeight]


class RunningTower(NamedTuple):
    """A forward pass: the module, the modes in which it began, and the layers that were folded for it."""

    module: nn.Module
    grad_enabled: bool
    dispatch: object
    layers: dict[CompLoRALayer, FoldedLayer]


class _Running(threading.local):
    def __init__(self) -> None:
        self.towers: tuple[RunningTower, ...] = ()  # the innermost comes last


_RUNNING = _Running()


def fold_once(module: nn.Module, changes: Changes | None = None) -> None:
    """Lets each forward pass of `module` fold the factors of the active adapted layers below it in one call.

    Which these are is looked up when the pass begins. Those below another such module are left to that one. With
    `changes` it is one of these, and what they do to the modules counts as done.
    """
    with joined(changes) as pending:
        if adapted_below(module, pending) and not _folds_once(module, pending):
            pending.add_hook(module, lambda module: module.register_forward_pre_hook(_fold_all))
            pending.add_hook(module, lambda module: module.register_forward_hook(_forget, always_call=True))


def adapted_below(module: nn.Module, changes: Changes | None = None) -> list[CompLoRALayer]:
    """The adapted layers that a forward pass of `module` folds, each once; with `changes`, after these."""
    layers: dict[CompLoRALayer, None] = {}
    modules = [module]
    for parent in modules:
        children = parent._modules if changes is None else changes.pending(parent._modules)
        for child in children.values():
            if isinstance(child, CompLoRALayer):
                layers[child] = None
            elif child is not None and not _folds_once(child, changes):
                modules.append(child)
    return list(layers)


def folded_factors(
    layer: CompLoRALayer, names: tuple[str, ...], dtype: torch.dtype
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """As `layer.folded_factors`, from the running tower where it has them."""
    for tower in reversed(_RUNNING.towers):
        folded = tower.layers.get(layer)
        if folded is not None and _is_valid(tower, folded, layer, names, dtype):
            weights = [folded.weights[name] for name in names]
            return [weight.folded_A for weight in weights], [weight.scaled_B for weight in weights]
    return layer.folded_factors(names, dtype)


def _is_valid(
    tower: RunningTower, folded: FoldedLayer, layer: CompLoRALayer, names: tuple[str, ...], dtype: torch.dtype
) -> bool:
    """Whether the layer would now fold the same tensors to the same result, with a gradient where one is due.

    An interrupt (any BaseException) leaves a tower running for ever, so the tensors' versions count too.
    """
    if tower.dispatch is not _dispatch() or (torch.is_grad_enabled() and not tower.grad_enabled):
        return False
    if len(folded.bases) != len(layer._buffers) or not all(map(operator.is_, folded.bases, layer._buffers.values())):
        return False
    for name in names:
        weight, factors = folded.weights[name], layer.factors(name)
        if not all(map(operator.is_, weight.factors, factors)) or weight.versions != _versions(factors):
            return False
        if weight.folded_A.dtype != dtype:
            return False
    return True


@own_hook
def _fold_all(module: nn.Module, _args: Any) -> None:
    _forget(module)
    groups: dict[Any, list[CompLoRALayer]] = {}  # one, unless scalings, dtypes or devices are mixed
    for layer in adapted_below(module):
        if layer.active:
            name = next(iter(layer.weights))
            A, _ = layer.factors(name)
            dtype = functional.compute_dtype(layer.frozen_parameter(name))
            groups.setdefault((layer.config.scaling, dtype, A.dtype, A.device), []).append(layer)
    layers: dict[CompLoRALayer, FoldedLayer] = {}
    for (scaling, dtype, *_), group in groups.items():
        inputs = [layer.fold_inputs(name) for layer in group for name in layer.weights]
        folded = iter(zip(inputs, *fold(inputs, scaling, dtype), strict=True))
        for layer in group:
            weights = {}
            for name, ((A, B, *_), folded_A, scaled_B) in zip(layer.weights, folded, strict=False):
                weights[name] = FoldedWeight((A, B), _versions((A, B)), folded_A, scaled_B)
            layers[layer] = FoldedLayer(tuple(layer._buffers.values()), weights)
    if layers:
        _RUNNING.towers += (RunningTower(module, torch.is_grad_enabled(), _dispatch(), layers),)


@own_hook
def _forget(module: nn.Module, *_: Any) -> None:
    _RUNNING.towers = tuple(tower for tower in _RUNNING.towers if tower.module is not module)


def _folds_once(module: nn.Module, changes: Changes | None = None) -> bool:
    hooks = module._forward_pre_hooks if changes is None else changes.pending(module._forward_pre_hooks)
    return bool(hooks) and _fold_all in hooks.values()


def _dispatch() -> object:
    """Who else sees the operations: selective checkpointing counts them, also those of a fold, and replays them."""
    return "compiler" if torch.compiler.is_compiling() else _get_current_dispatch_mode()


def _versions(factors: tuple[Tensor, Tensor]) -> tuple[int, int]:
    if torch.compiler.is_compiling():
        return 0, 0
    A, B = (-1 if factor.is_inference() else factor._version for factor in factors)
    return A, B
