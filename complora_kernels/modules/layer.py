"""What every adapted layer has: factors, bases, and the ways to switch, merge and measure its update.

A layer adapts one or more weights. Each has a name ("" in a linear layer; q, k, v, o in attention) and is a block of
rows of one of the layer's parameters.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from complora_kernels import functional, subspace
from complora_kernels.common import base_weights
from complora_kernels.common.changes import Changes, joined
from complora_kernels.common.thread_stack import ThreadStack
from complora_kernels.common.tracing import Unscriptable, check_followed
from complora_kernels.config import CompLoRAConfig

Layer = TypeVar("Layer", bound="CompLoRALayer")

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PROJECTED_SIDES: dict[str, tuple[subspace.Side, ...]] = {
    "output": ("output",),
    "input": ("input",),
    "both": ("output", "input"),
    "none": (),
}


class WeightRows(NamedTuple):
    """Where an adapted weight [out, in] lives: rows `start <= n < stop` of a parameter of the layer."""

    parameter: str
    start: int
    stop: int


class FoldInputs(NamedTuple):
    """The raw factors of one adapted weight and the bases that project them, in the order of `fold_factors`."""

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    output_basis: Tensor | None  # [out, k]
    input_basis: Tensor | None  # [in, k]
    output_kind: str
    input_kind: str


class Float32State(Unscriptable):
    """A module whose own `lora_*` parameters and bases stay float32 or wider when `.half()` converts the rest."""

    def _own_float32_state(self) -> Iterator[Tensor]:
        for name, tensor in [*self._parameters.items(), *self._buffers.items()]:
            if tensor is not None and (name.startswith("lora_") or "_basis" in name):
                yield tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = list(self._own_float32_state())
        kept_ids = {id(tensor) for tensor in kept} | {id(tensor.grad) for tensor in kept if tensor.grad is not None}

        def convert(tensor: Tensor) -> Tensor:
            converted = fn(tensor)
            if id(tensor) in kept_ids and converted.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(converted.device)
            return converted

        return super()._apply(convert, recurse)


class Factors(Float32State):
    """The factors of one kind of an attention layer: parameters `q`, `k`, `v`, `o`, as many as are adapted."""

    def __init__(self, factors: dict[str, nn.Parameter]) -> None:
        super().__init__()
        for name, factor in factors.items():
            self.register_parameter(name, factor)

    def _own_float32_state(self) -> Iterator[Tensor]:
        return self.parameters(recurse=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):  # a plain model's checkpoint has no factors: keep ours
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class CompLoRALayer(Float32State):
    """The adapter part of `CompLoRALinear` and the attention modules; use those.

    Attributes:
        config: the `CompLoRAConfig` that the layer was made with.
        weights: where each adapted weight lives.
        disabled: True: the layer computes its frozen part alone, on every thread; `switched_off` does so on one.
        merged: True between `merge` and `unmerge`.
    """

    config: CompLoRAConfig
    weights: dict[str, WeightRows]
    disabled: bool
    merged: bool

    @property
    def path(self) -> str:
        """The path that the layer has in the model that was adapted; "" where it was made alone."""
        return self._path

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The raw factors `A` [r, in] and `B` [out, r] of one adapted weight."""
        raise NotImplementedError

    def frozen_parameter(self, name: str) -> Tensor:  # [>= out, in]
        """The parameter that holds the frozen weight of one adapter, or what `functional_call` has put in its place."""
        return functools.reduce(getattr, self.weights[name].parameter.split("."), self)

    def base_weight(self, name: str) -> Tensor:  # [out, in]
        """The frozen weight of one adapter, a view."""
        parameter, start, stop = self.weights[name]
        return self.get_parameter(parameter)[start:stop]

    def original_weight(self, name: str) -> Tensor:  # [out, in]
        """The frozen weight of one adapter as it was before merging."""
        parameter, start, stop = self.weights[name]
        return self.get_buffer(_original_name(parameter))[start:stop] if self.merged else self.base_weight(name)

    def basis(self, name: str, side: subspace.Side) -> subspace.Basis | None:
        """The basis that projects one side of one adapted weight; None where the side is not projected.

        Raises:
            RuntimeError: the side is projected, but `protect_activations` has not been called yet.
        """
        about = self._about_bases.get((name, side))
        if about is not None:
            return subspace.Basis(self.get_buffer(_basis_name(name, side)), *about)
        if side in PROJECTED_SIDES[self.config.sides]:
            raise RuntimeError(
                f'{self._label(name)} has no {side} basis yet, expected one: with subspace_source="activations" '
                "apply_complora(model, config, calibrate=...) computes it, protect_activations that of a single layer"
            )
        return None

    def set_basis(self, name: str, side: subspace.Side, basis: subspace.Basis, changes: Changes | None = None) -> None:
        """Replaces the basis of one side of one adapted weight: at once, or as one of `changes`."""
        with joined(changes) as pending:
            pending.set_buffer(self, _basis_name(name, side), basis.matrix)
            pending.draft(self._about_bases)[name, side] = (basis.kind, basis.k, basis.energy)
            self._describe_basis(name, side, basis.matrix, pending)

    def describe_bases(self, matrices: Mapping[str, Tensor], changes: Changes) -> None:
        """Sets the fingerprints to those of these bases, by the names of their buffers, as one of `changes`."""
        for name, side in self._about_bases:
            self._describe_basis(name, side, matrices[_basis_name(name, side)], changes)

    def _describe_basis(self, name: str, side: str, matrix: Tensor, changes: Changes) -> None:
        """Describes a basis of activations by a buffer in the state dict, which does not hold the basis."""
        if not self.config.source.recomputable:
            sketch = base_weights.describe_projection(matrix).float()  # [8]; not every device has float64
            device = self.frozen_parameter(name).device
            changes.set_buffer(self, _fingerprint_name(name, side), sketch.to(device), persistent=True)

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
        self._set_bases(name, second_moment)

    def fold_factors(
        self, names: tuple[str, ...], dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`Ã` [r, in] and `scaling · B̃` [out, r] of the named weights, differentiable, cast to `dtype` at the end."""
        return fold([self.fold_inputs(name) for name in names], self.config.scaling, dtype)

    def fold_inputs(self, name: str) -> FoldInputs:
        """What the folded factors of one adapted weight are computed from."""
        A, B = self.factors(name)
        on_output, on_input = self.basis(name, "output"), self.basis(name, "input")
        return FoldInputs(
            A,
            B,
            on_output and on_output.matrix,
            on_input and on_input.matrix,
            on_output.kind if on_output else "principal",
            on_input.kind if on_input else "principal",
        )

    @torch.no_grad()
    def get_delta_weight(self, name: str = "") -> Tensor:  # [out, in]
        """`ΔW = scaling · B̃ Ã` in the factors' dtype, under autocast too."""
        (A,), (B,) = self.fold_factors((name,))
        with torch.autocast(B.device.type, enabled=False):
            return B @ A

    @torch.no_grad()
    @torch.inference_mode(False)  # a parameter must not become an inference tensor
    def merged_weights(self) -> dict[str, Tensor]:
        """The parameters that adapters live in, `ΔW` added in float32 or wider and rounded once; nothing is changed.

        Raises:
            ValueError: the update holds NaN or infinite values.
        """
        merged: dict[str, Tensor] = {}
        for name, (parameter, start, stop) in self.weights.items():
            target = merged.setdefault(parameter, self.get_parameter(parameter).detach().clone())
            delta = self.get_delta_weight(name)
            if not torch.isfinite(delta).all():
                raise ValueError(
                    f"the update of {parameter}[{start}:{stop}] holds NaN or infinite values, expected finite ones"
                )
            rows = target[start:stop]
            rows.copy_(rows + delta)  # the sum is in the wider of the two dtypes, and rounded by the copy
        return merged

    def merge(self, changes: Changes | None = None) -> None:
        """Gives the parameters `merged_weights()` for memory and keeps what they had for `unmerge`.

        At once, or as one of `changes`.

        Raises:
            ValueError: as `merged_weights`; nothing is then changed.
            RuntimeError: merged already.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged already; unmerge it first")
        with joined(changes) as pending:
            for name, weight in self.merged_weights().items():
                parameter = self.get_parameter(name)
                pending.set_buffer(self, _original_name(name), parameter.data)
                pending.exchange(parameter, weight)
            pending.draft(vars(self))["merged"] = True

    def unmerge(self, changes: Changes | None = None) -> None:
        """Gives the parameters the memory back that they had before `merge`: the original weights, bit for bit.

        Raises:
            RuntimeError: not merged.
        """
        if not self.merged:
            raise RuntimeError("the adapter is not merged; merge it first")
        with joined(changes) as pending:
            for name in {rows.parameter for rows in self.weights.values()}:
                pending.exchange(self.get_parameter(name), self.get_buffer(_original_name(name)))
                pending.remove_buffer(self, _original_name(name))
            pending.draft(vars(self))["merged"] = False

    def _require_frozen(self, weight: Tensor, bias: Tensor | None) -> None:
        """Raises ValueError where an active layer would leave out a gradient that is asked for."""
        check_followed(weight)
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            kind = "weight" if weight.requires_grad else "bias"
            raise ValueError(
                f"{self._path or type(self).__name__}: {kind}.requires_grad=True, expected a frozen {kind}: only the "
                "factors of an adapted module are trained. Freeze it, or leave the module out of target_modules"
            )

    @property
    def active(self) -> bool:
        """Whether the forward pass adds the low-rank term (not while merged or disabled)."""
        return not (self.merged or self.disabled or self._switched_off)

    @property
    def _switched_off(self) -> bool:
        values = _SWITCHED_OFF.values()
        return len(values) > 0 and any(self in layers for layers in values)

    def _replicate_for_data_parallel(self) -> Any:
        """For another thread of the same forward pass."""
        replica = super()._replicate_for_data_parallel()
        replica.disabled = self.disabled or self._switched_off
        return replica

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
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        own_factors = {f"{prefix}{name}" for name in self._parameters if name.startswith("lora_")}
        fingerprints = {f"{prefix}{_fingerprint_name(*key)}" for key in self._about_bases}
        for own in (own_factors, fingerprints):  # a plain model's checkpoint has neither, an older one only the first
            if own.isdisjoint(state_dict):
                missing_keys[:] = [key for key in missing_keys if key not in own]

    def refusal(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        """Why a state dict, in which the layer's names begin with `prefix`, cannot be loaded; None where it can."""
        if self.merged:
            return f"{prefix.rstrip('.')} is merged, expected an unmerged adapter: call unmerge_adapter first"
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
        for name in self.weights:
            weight = self.base_weight(name)
            subspace.check_weight(weight, self._label(name))
            if not self.config.source.recomputable:
                subspace.check_k(weight, self.config.subspace_k, self._label(name), "subspace_")
                self._calibrated_on.setdefault(name, base_weights.describe(weight))
                continue
            seen = subspace.fingerprint(weight)
            if self._basis_of.get(name) != seen:
                self._set_bases(name)
                self._basis_of[name] = seen

    def _set_bases(self, name: str, second_moment: Tensor | None = None) -> None:
        weight, path = self.base_weight(name), self._weight_path(name)
        bases: dict[subspace.Side, subspace.Basis] = {
            side: subspace.projection_basis(weight, self.config, side, path, second_moment=second_moment)
            for side in PROJECTED_SIDES[self.config.sides]
        }
        changes = Changes()
        for side, basis in bases.items():
            self.set_basis(name, side, basis, changes)
        changes.make()

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
        own = self.get_buffer(_fingerprint_name(name, side))
        loaded = state_dict.get(f"{prefix}{_fingerprint_name(name, side)}")
        if not isinstance(loaded, Tensor) or loaded.shape != own.shape:
            return True  # torch says what is wrong with it
        apart = float((loaded.cpu().double() - own.cpu().double()).norm()) / math.sqrt(base_weights.SKETCHES)
        columns = self.get_buffer(_basis_name(name, side)).shape[1]  # |U U^T|²
        return apart <= base_weights.TOLERANCE * math.sqrt(columns)

    def _init_adapter(self, config: CompLoRAConfig, weights: dict[str, WeightRows], path: str) -> None:
        """Common to the `from_...` constructors, once the frozen parameters are in place."""
        self.config = config
        self.weights = weights
        self.disabled = False
        self.merged = False
        self._path = path
        self._about_bases: dict[tuple[str, str], tuple[subspace.BasisKind, int, float]] = {}
        self._basis_of: dict[str, str] = {}
        self._calibrated_on: dict[str, base_weights.Description] = {}
        self.update_bases()
        self.register_load_state_dict_post_hook(_update_bases_after_load)

    def _new_factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A Kaiming-uniform as in `nn.Linear`, B zero: the update starts at nothing."""
        weight = self.base_weight(name)  # [out, in]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A = torch.empty(self.config.r, weight.shape[1], dtype=dtype, device=weight.device)  # [r, in]
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        B = torch.zeros(weight.shape[0], self.config.r, dtype=dtype, device=weight.device)  # [out, r]
        return nn.Parameter(A), nn.Parameter(B)


_SWITCHED_OFF: ThreadStack[frozenset[CompLoRALayer]] = ThreadStack("switched off")


def switched_off(layers: Iterable[CompLoRALayer]) -> contextlib.AbstractContextManager[None]:
    """Within it, on this thread, the layers compute their frozen part alone."""
    return _SWITCHED_OFF.holding(frozenset(layers))


def fold(inputs: Sequence[FoldInputs], scaling: float, dtype: torch.dtype | None) -> tuple[list[Tensor], list[Tensor]]:
    """`functional.fold_factors` of any adapted weights that share a scaling."""
    As, Bs, output_bases, input_bases, output_kinds, input_kinds = zip(*inputs, strict=True)
    return functional.fold_factors(
        As,
        Bs,
        output_bases,
        input_bases,
        output_basis_kinds=output_kinds,
        input_basis_kinds=input_kinds,
        scaling=scaling,
        dtype=dtype,
    )


def clone_as(module: nn.Module, cls: type[Layer]) -> Layer:
    """A module of class `cls` that shares the parameters, submodules, hooks and attributes of `module`."""
    clone = cls.__new__(cls)
    clone.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "_load_state_dict_post_hooks"):
        clone.__dict__[name] = module.__dict__[name].copy()  # what the adapter adds, `module` must not have
    clone.__dict__.pop("_compiled_call_impl", None)  # left by module.compile(): it calls `module`
    return clone


def require_plain(module: nn.Module, label: str, *weights: Any) -> None:
    """Raises ValueError for a quantised base, a weight that is computed by a hook, or a forward method put on top.

    The adapter would drop the second two without a word. A weight without inputs is refused too.
    """
    if "forward" in vars(module):
        raise ValueError(f"{label} has a forward method of its own, expected that of {type(module).__name__}")
    for weight in weights:
        if not isinstance(weight, nn.Parameter):
            raise ValueError(f"{label} has a weight of type {type(weight).__name__}, expected a parameter (pruned?)")
        if weight.dtype not in FLOATING:
            raise ValueError(
                f"{label} holds {weight.dtype} weights, expected floating-point ones: "
                "a quantised base cannot be adapted"
            )
        if weight.shape[1] == 0:
            raise ValueError(f"{label} has a weight of shape {tuple(weight.shape)}, expected [out, in] with in >= 1")


def check_before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of the whole model: raises RuntimeError, as torch does after the fact, before any layer is loaded."""
    layers = module.named_modules(prefix=prefix.rstrip("."))
    refusals = [layer.refusal(state_dict, f"{path}.") for path, layer in layers if isinstance(layer, CompLoRALayer)]
    if any(refusals):
        reasons = "\n\t".join(filter(None, refusals))
        raise RuntimeError(f"Error(s) in loading state_dict for {type(module).__name__}:\n\t{reasons}")


def _update_bases_after_load(module: CompLoRALayer, _: Any) -> None:
    module.update_bases()


def _basis_name(name: str, side: str) -> str:
    return f"{side}_basis_{name}" if name else f"{side}_basis"


def _fingerprint_name(name: str, side: str) -> str:
    return f"{side}_fingerprint_{name}" if name else f"{side}_fingerprint"


def _original_name(parameter: str) -> str:
    return f"unmerged_{parameter.replace('.', '_')}"
