"""`ProtectedLayer`: the frozen weights of an adapted layer, and bases of the directions that its update leaves alone.

A layer adapts one or more weights. Each has a name ("" in a linear layer; q, k, v, o in attention) and consists of
neighbouring rows of one of the layer's parameters. Bases follow their weights: when a state dict brings others they are
computed again, and where they cannot be computed from a weight alone such a state dict is refused.

A basis takes a decomposition of its weight, so it is computed when something first asks for it: training, a report, a
raw state, torch.compile. Folded factors that were loaded lie in the complement already; as long as nothing writes to
them, a forward pass without gradients, a merge and a save take them as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from complora_kernels import subspace
from complora_kernels.common import base_weights
from complora_kernels.common.changes import Changes, joined
from complora_kernels.common.sharded import whole
from complora_kernels.common.tensor_facts import TensorFacts
from complora_kernels.common.tracing import (
    computed_at_once,
    is_exported,
    is_fake,
    is_traced,
    runs_while_compiled,
    unwrapped,
)
from complora_kernels.config import CompLoRAConfig
from complora_kernels.modules.float32_state import Float32State
from complora_kernels.modules.update_limit import limit_name, update_limit

PROJECTED_SIDES: dict[str, tuple[subspace.Side, ...]] = {
    "output": ("output",),
    "input": ("input",),
    "both": ("output", "input"),
    "none": (),
}


MAX_LOST = 1e-4  # share of its norm that a loaded factor may lose: rounding loses a few 1e-6, other bases a few percent
_FOLDED: TensorFacts[bool] = TensorFacts()  # of the loaded factors, until they are written to
UPDATE = "update"  # stands where a side does, for the norm of a loaded update
MERGED = "lora_merged"  # a buffer in the state dict of a merged layer, whose weights hold the update


class WeightRows(NamedTuple):
    """Where an adapted weight [out, in] lives: rows `start <= n < stop` of a parameter of the layer."""

    parameter: str
    start: int
    stop: int


class ProtectedLayer(Float32State):
    """The bases of `CompLoRALayer`; use that."""

    config: CompLoRAConfig
    weights: dict[str, WeightRows]
    merged: bool
    _own_prefix: str = ""  # what the names of the adapter's own tensors begin with, within the names of the layer

    def original_weight(self, name: str) -> Tensor:  # [out, in]
        """The frozen weight of one adapter as it was before merging."""
        raise NotImplementedError

    def _init_bases(self, path: str) -> None:
        """Checks what bases are computed from, once the frozen parameters, `config` and `weights` are in place."""
        self._path = path
        self._about_bases: dict[tuple[str, str], tuple[subspace.BasisKind, int, float]] = {}
        self._basis_of: dict[str, str] = {}
        self._calibrated_on: dict[str, base_weights.Description] = {}
        self._loaded: dict[tuple[str, str], Tensor] = {}
        for name in self.weights:
            weight = self.base_weight(name)
            subspace.check_weight(weight, self._label(name))
            subspace.check_k(weight, self.config.subspace_k, self._label(name), "subspace_")
            if not self.config.source.recomputable:
                self._calibrated_on[name] = base_weights.describe(weight)
        self.register_load_state_dict_post_hook(update_bases_after_load)

    @property
    def path(self) -> str:
        """The path that the layer has in the model that was adapted; "" where it was made alone."""
        return self._path

    def frozen_parameter(self, name: str) -> Tensor:  # [>= out, in]
        """The parameter that holds the frozen weight of one adapter, or what `functional_call` has put in its place."""
        return functools.reduce(getattr, self.weights[name].parameter.split("."), self)

    def base_weight(self, name: str) -> Tensor:  # [out, in]
        """The frozen weight of one adapter, a view."""
        _, start, stop = self.weights[name]
        return whole(self.frozen_parameter(name))[start:stop]

    def basis(self, name: str, side: subspace.Side) -> subspace.Basis | None:
        """The basis that projects one side of one adapted weight; None where the side is not projected.

        Raises:
            RuntimeError: the side is projected, but `protect_activations` has not been called yet.
        """
        if side not in PROJECTED_SIDES[self.config.sides]:
            return None
        if (name, side) not in self._about_bases:
            self.compute_bases()
        about = self._about_bases.get((name, side))
        if about is None:
            raise RuntimeError(
                f'{self._label(name)} has no {side} basis yet, expected one: with subspace_source="activations" '
                "apply_complora(model, config, calibrate=...) computes it, protect_activations that of a single layer"
            )
        matrix: Any = self._buffers[basis_name(name, side)]  # `get_buffer` would search by the parts of the name
        return subspace.Basis(matrix, *about)

    def projection(
        self,
        name: str,
        side: subspace.Side,
        factor: Tensor,  # the raw A or B
    ) -> subspace.Basis | None:
        """The basis that is to project a factor; None where its side is not projected, or it lies in the complement."""
        if side not in PROJECTED_SIDES[self.config.sides]:
            return None
        if torch.compiler.is_compiling() and not is_exported():
            self.compute_bases()
        elif (name, side) not in self._about_bases and self._is_folded(name, side, factor):
            return None
        return self.basis(name, side)

    def limit(self, name: str, *factors: Tensor) -> Tensor | None:
        """The limit of |ΔW| of one adapted weight, a scalar; None without `update_bound`.

        It is None too for raw factors that are loaded ones which were not written to and are not to be trained now:
        their update is within it.
        """
        if self.config.update_bound is None:
            return None
        known = limit_name(name) in self._buffers
        compiled = torch.compiler.is_compiling() and not is_exported()
        if not known and not compiled and all(self._is_folded(name, UPDATE, factor) for factor in factors):
            return None
        if not known:
            self.compute_bases()
        return self._buffers[limit_name(name)]

    def _is_folded(self, name: str, side: str, factor: Tensor) -> bool:
        """Whether a factor is a loaded one that is not to be trained now and was not written to."""
        loaded = (name, side) in self._loaded
        if is_exported():
            if self.training or not loaded:
                missing = "limit of its update" if side == UPDATE else f"{side} basis"
                raise RuntimeError(
                    f"{self._label(name)} has no {missing} yet, expected one before the model is exported to be "
                    "trained: subspace_report(model) computes it"
                )
            return True  # the program keeps the factor
        if is_fake(self.frozen_parameter(name)):
            return True  # it has no values, and neither has what is computed
        keeps_factor = is_traced() and not self.training
        due = torch.is_grad_enabled() and factor.requires_grad and not keeps_factor
        return loaded and not due and _FOLDED.get(factor) is True

    @runs_while_compiled
    def compute_bases(self) -> bool:
        """Computes all bases and limits that can be computed from the weights and are not there yet; returns True.

        Raises:
            ValueError: a loaded factor does not lie in the complement, or a limit is 0.
        """
        missing, unlimited = self._without_bases(), self._without_limit()
        if missing or unlimited:
            changes = Changes()
            with computed_at_once(self.frozen_parameter([*missing, *unlimited][0]).device):
                if missing:
                    self._decompose_together(missing)
                for name in missing:
                    self._set_bases(name, changes)
                for name in unlimited:
                    self._set_limit(name, changes)
            changes.make()
        return True

    def _without_bases(self) -> list[str]:
        """The adapted weights whose bases can be computed from them and are not there yet."""
        sides = PROJECTED_SIDES[self.config.sides] if self.config.source.recomputable else ()
        return [name for name in self.weights if any((name, side) not in self._about_bases for side in sides)]

    def _without_limit(self) -> list[str]:
        """The adapted weights whose update is bounded, whose bases are there, and whose limit is not there yet."""
        if self.config.update_bound is None:
            return []
        sides = PROJECTED_SIDES[self.config.sides]
        unlimited = [name for name in self.weights if limit_name(name) not in self._buffers]
        return [name for name in unlimited if all((name, side) in self._about_bases for side in sides)]

    def _set_limit(self, name: str, changes: Changes) -> None:
        """Sets the limit of an update whose bases are there, or are among `changes`."""
        if self.config.update_bound is None:
            return
        weight, about = unwrapped(self.original_weight(name)), changes.draft(self._about_bases)
        k = max((about[name, side][1] for side in PROJECTED_SIDES[self.config.sides]), default=0)
        limit = update_limit(weight, self.config, k, self._label(name))
        loaded = changes.draft(self._loaded).get((name, UPDATE))
        limit = limit if loaded is None else max(limit, float(loaded))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        changes.set_buffer(self, limit_name(name), torch.tensor(limit, dtype=dtype, device=weight.device))
        if self.config.source.recomputable:
            changes.draft(self._basis_of)[name] = subspace.fingerprint(weight)

    def follow_update(self, name: str, size: float, changes: Changes) -> None:
        """Lets the limit of an update, when it is computed, leave a loaded one of norm `size` as it is."""
        if self.config.update_bound is not None:
            changes.draft(self._loaded)[name, UPDATE] = torch.tensor(size, dtype=torch.float64)
            if limit_name(name) in self._buffers:
                changes.remove_buffer(self, limit_name(name))

    def set_basis(self, name: str, side: subspace.Side, basis: subspace.Basis, changes: Changes | None = None) -> None:
        """Replaces the basis of one side of one adapted weight: at once, or as one of `changes`."""
        with joined(changes) as pending:
            pending.set_buffer(self, basis_name(name, side), basis.matrix)
            pending.draft(self._about_bases)[name, side] = (basis.kind, basis.k, basis.energy)
            self._describe_basis(name, side, basis.matrix, pending)

    def follow(
        self, name: str, side: subspace.Side, factor: Tensor, changes: Changes, basis: subspace.Basis | None = None
    ) -> None:
        """Lets a basis leave a loaded factor [r, d] as it is, as one of `changes`.

        `basis`, or the one that is there, is turned at once; one that is not there yet, when it is computed.

        Raises:
            ValueError: no basis of its size does.
        """
        if basis is None and (name, side) in self._about_bases:
            basis = self.basis(name, side)
        if basis is None:
            weight = self.original_weight(name)
            size = self.config.subspace_size
            k = subspace.known_k(weight.shape, size["k"], size["ratio"])
            if k is not None and factor.shape[1] - k < len(factor):
                self._check_room(name, side, factor, k)
            changes.draft(self._loaded)[name, side] = factor.detach().clone()
        else:
            self.set_basis(name, side, self._aligned(name, side, basis, factor), changes)

    def _check_room(self, name: str, side: str, factor: Tensor, k: int) -> None:
        rank = int(torch.linalg.matrix_rank(factor.double().cpu(), rtol=MAX_LOST))
        if rank > factor.shape[1] - k:
            raise ValueError(
                f"{self._label(name)}: the saved factor of the {side} side has rank {rank}, expected at most "
                f"{factor.shape[1] - k} beside k={k} protected directions"
            )

    def _aligned(self, name: str, side: str, basis: subspace.Basis, factor: Tensor) -> subspace.Basis:
        """The basis, turned so that folding leaves a factor [r, d] as it is.

        Raises:
            ValueError: no basis of its size does.
        """
        aligned = basis._replace(matrix=subspace.align_basis(basis.matrix, factor, kind=basis.kind))
        wide, matrix = factor.cpu().double(), aligned.matrix.cpu().double()  # autocast and TF32 leave float64 alone
        lost = wide @ matrix  # [r, m]
        lost = lost if basis.kind == "principal" else wide - lost @ matrix.T
        if not lost.norm() <= MAX_LOST * wide.norm():
            raise ValueError(
                f"{self._label(name)}: projecting the {side} side with k={basis.k} changes the saved factor by "
                f"{float(lost.norm() / wide.norm()):.2g} of its norm, expected at most {MAX_LOST}: the adapter was "
                "saved with other subspaces"
            )
        return aligned

    def describe_bases(self, matrices: Mapping[str, Tensor], changes: Changes) -> None:
        """Sets the fingerprints to those of these bases, by the names of their buffers, as one of `changes`."""
        for name, side in self._about_bases:
            self._describe_basis(name, side, matrices[basis_name(name, side)], changes)

    def _describe_basis(self, name: str, side: str, matrix: Tensor, changes: Changes) -> None:
        """Describes a basis of activations by a buffer in the state dict, which does not hold the basis."""
        if not self.config.source.recomputable:
            sketch = base_weights.describe_projection(matrix).float()  # [8]; not every device has float64
            device = self.frozen_parameter(name).device
            changes.set_buffer(self, fingerprint_name(name, side), sketch.to(device), persistent=True)

    def _remove_bases(self, changes: Changes) -> None:
        """Removes the bases and what follows a state dict into the layer, as one of `changes`."""
        for name in self.own_buffers():
            changes.remove_buffer(self, name)
        hooks = changes.draft(self._load_state_dict_post_hooks)
        for handle in [handle for handle, hook in hooks.items() if hook is update_bases_after_load]:
            del hooks[handle]

    def own_buffers(self) -> list[str]:
        """The names of the buffers that belong to the adapter: bases, their fingerprints, limits."""
        names = [make(*key) for key in self._about_bases for make in (basis_name, fingerprint_name)]
        return [name for name in (*names, *map(limit_name, self.weights)) if name in self._buffers]

    def protect_activations(
        self,
        name: str,
        second_moment: Tensor,  # [in, in]
    ) -> None:
        """Computes the bases of one adapted weight from `X^T X` of its inputs X [M, in], see `subspace`.

        What `apply_complora` does with `subspace_source="activations"`; a layer that was made alone computes nothing
        before.

        Raises:
            ValueError: another source, a second moment of another shape or with NaN, or an energy that takes more
                directions than min(out, in).
        """
        changes = Changes()
        self._set_bases(name, changes, second_moment)
        changes.make()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        refusal = self.refusal(state_dict, prefix)
        if refusal is not None:
            error_msgs.append(refusal)
            state_dict.update(self.state_dict(prefix=prefix))  # a copy of torch's: the modules below stay too
            return
        self.remember_weights()
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        own_factors = {f"{prefix}{name}" for name in self._parameters if name.startswith("lora_")}
        fingerprints = {f"{prefix}{fingerprint_name(*key)}" for key in self._about_bases}
        for own in (own_factors, fingerprints):  # a plain model's checkpoint has neither, an older one only the first
            if own.isdisjoint(state_dict):
                missing_keys[:] = [key for key in missing_keys if key not in own]

    def remember_weights(self) -> None:
        """Takes down which weights loaded factors belong to, before a state dict may bring others."""
        for name in {name for name, _ in self._loaded}:
            self._basis_of.setdefault(name, subspace.fingerprint(self.base_weight(name)))

    def refusal(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why a state dict, in which the layer's names begin with `prefix`, cannot be loaded; None where it can."""
        if self.merged:
            return f"{prefix.rstrip('.')} is merged, expected an unmerged adapter: call unmerge_adapter first"
        if f"{prefix}{MERGED}" in state_dict:
            return (
                f"{prefix}{MERGED}: the state dict is of a merged model, whose weights hold the update: expected "
                "one of an unmerged model (unmerge_adapter gives it), or a plain model to load it into (strict=False)"
            )
        if self.config.source.recomputable:
            return None
        others = [name for name in self._calibrated_on if not self._is_calibrated_on(name, prefix, state_dict)]
        if others:
            return (
                f"{', '.join(map(self._label, others))}: the state dict has other base weights, expected those that "
                "the model was calibrated on, because the bases are those of their activations: load other weights "
                "into a plain model and apply_complora to that"
            )
        projected = [key for key in self._about_bases if not self._has_basis(*key, prefix, state_dict)]
        if projected:
            return (
                f"{', '.join(f'{self._label(name)} ({side})' for name, side in projected)}: the state dict is of a "
                "model that was calibrated on other batches, and does not hold its bases. Expected a model calibrated "
                "on the same ones, or files of save_adapter, which hold the bases, and load_adapter"
            )
        return None

    def update_bases(self) -> None:
        """Computes the bases of every weight whose values changed since they were last computed.

        Those of activations stay: they cannot be computed from a weight, and only half-precision copies of the weights
        that the model was calibrated on are loaded into it.
        """
        changes = Changes()
        for name in self.weights:
            weight = self.base_weight(name)
            subspace.check_weight(weight, self._label(name))
            if name in self._basis_of and self._basis_of[name] != subspace.fingerprint(weight):
                for side in (*PROJECTED_SIDES[self.config.sides], UPDATE):
                    changes.draft(self._loaded).pop((name, side), None)
                if any(name == other for other, _ in self._about_bases) or limit_name(name) in self._buffers:
                    self._set_bases(name, changes)
        changes.make()

    def _set_bases(self, name: str, changes: Changes, second_moment: Tensor | None = None) -> None:
        weight, path = unwrapped(self.original_weight(name)), self._weight_path(name)
        loaded = changes.draft(self._loaded)
        for side in PROJECTED_SIDES[self.config.sides]:
            basis = subspace.projection_basis(weight, self.config, side, path, second_moment=second_moment)
            factor = loaded.get((name, side))
            basis = basis if factor is None else self._aligned(name, side, basis, factor)
            self.set_basis(name, side, basis, changes)
        self._set_limit(name, changes)
        if self.config.source.recomputable:
            changes.draft(self._basis_of)[name] = subspace.fingerprint(weight)

    def _decompose_together(self, names: Sequence[str]) -> None:
        """Decomposes those of the weights in one call whose bases are not kept on the disk, where that is faster."""
        if self.frozen_parameter(names[0]).device.type not in subspace.TOGETHER:
            return
        weights = [(name, unwrapped(self.original_weight(name))) for name in names]
        sides = PROJECTED_SIDES[self.config.sides]
        subspace.decompose_together(
            weight
            for name, weight in weights
            if not all(subspace.is_kept(weight, self.config, side, self._weight_path(name)) for side in sides)
        )

    def _weight_path(self, name: str) -> str:
        return ".".join(part for part in (self._path, name) if part)

    def _label(self, name: str) -> str:
        return self._weight_path(name) or "weight"

    def _is_calibrated_on(self, name: str, prefix: str, state_dict: dict[str, Any]) -> bool:
        """Whether a state dict leaves one adapted weight what it was when the model was calibrated, up to rounding."""
        parameter, start, stop = self.weights[name]
        loaded = state_dict.get(f"{prefix}{parameter}")
        if not isinstance(loaded, Tensor) or loaded.shape != self.get_parameter(parameter).shape:
            return True  # it stays, and torch says why
        described = base_weights.describe(loaded[start:stop])
        return base_weights.relative_distance(described, self._calibrated_on[name]) <= base_weights.TOLERANCE

    def _has_basis(self, name: str, side: str, prefix: str, state_dict: dict[str, Any]) -> bool:
        """Whether a state dict has the fingerprint of our basis, up to rounding, or none."""
        own = self.get_buffer(fingerprint_name(name, side))
        loaded = state_dict.get(f"{prefix}{self._own_prefix}{fingerprint_name(name, side)}")
        if not isinstance(loaded, Tensor) or loaded.shape != own.shape:
            return True  # torch says what is wrong with it
        apart = float((loaded.cpu().double() - own.cpu().double()).norm()) / math.sqrt(base_weights.SKETCHES)
        columns = self.get_buffer(basis_name(name, side)).shape[1]  # |U U^T|²
        return apart <= base_weights.TOLERANCE * math.sqrt(columns)


def mark_folded(factor: Tensor) -> None:
    """Takes down that a raw factor, as it is now, is the one that `follow` was given."""
    _FOLDED.set(factor, True)


def check_before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of the whole model: raises RuntimeError, as torch does after the fact, before any layer is loaded."""
    layers = module.named_modules(prefix=prefix.rstrip("."))
    refusals = [layer.refusal(state_dict, f"{path}.") for path, layer in layers if isinstance(layer, ProtectedLayer)]
    if any(refusals):
        reasons = "\n\t".join(filter(None, refusals))
        raise RuntimeError(f"Error(s) in loading state_dict for {type(module).__name__}:\n\t{reasons}")


def update_bases_after_load(module: ProtectedLayer, _: Any) -> None:
    """A hook of each layer: its bases follow the weights that a state dict has brought."""
    module.update_bases()


def basis_name(name: str, side: str) -> str:
    """The name of the buffer with the basis of one side of one adapted weight."""
    return f"{side}_basis_{name}" if name else f"{side}_basis"


def fingerprint_name(name: str, side: str) -> str:
    """The name of the buffer that describes a basis of activations."""
    return f"{side}_fingerprint_{name}" if name else f"{side}_fingerprint"
