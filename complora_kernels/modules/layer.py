"""`CompLoRALayer`, the base of all adapted layers: its factors, and how they are folded, switched off and merged."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from complora_kernels import functional
from complora_kernels.common.changes import Changes, joined
from complora_kernels.common.low_rank import Norm
from complora_kernels.common.sharded import is_sharded, whole
from complora_kernels.common.thread_stack import ThreadStack
from complora_kernels.common.tracing import check_followed, is_plain
from complora_kernels.config import PROJECTIONS, CompLoRAConfig
from complora_kernels.modules.mixed import stand_in
from complora_kernels.modules.protected import MERGED, WeightRows
from complora_kernels.modules.several import DEFAULT, FACTORS, INACTIVE, SeveralAdapters

Layer = TypeVar("Layer", bound="CompLoRALayer")

FactorPairs = dict[str, tuple[nn.Parameter, nn.Parameter]]  # A [r, in] and B [out, r]

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FoldInputs(NamedTuple):
    """The raw factors of one adapted weight and the bases that project them, in the order of `fold_factors`.

    Then the limit of the update that they make, see `bound_updates`.
    """

    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    output_basis: Tensor | None  # [out, k]
    input_basis: Tensor | None  # [in, k]
    output_kind: str
    input_kind: str
    limit: Tensor | None  # a scalar


class CompLoRALayer(SeveralAdapters):
    """The adapter part of `CompLoRALinear` and the attention modules; use those.

    Attributes:
        config: the `CompLoRAConfig` of the active adapter.
        weights: where each weight that it adapts lives; none where it adapts others.
        disabled: True: the layer computes its frozen part alone, on every thread; `switched_off` does so on one.
        merged: True between `merge` and `unmerge`.
    """

    disabled: bool
    _scalings: dict[str, float]
    _made_from: tuple[type[nn.Module], type[nn.Module]]  # the class that was adapted, and that of the layer
    _added: tuple[str, ...]  # names in `vars(self)` that the plain module does not have

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The raw factors `A` [r, in] and `B` [out, r] of one adapted weight."""
        raise NotImplementedError

    @staticmethod
    def hold_factors(holder: nn.Module, factors: FactorPairs) -> None:
        """Gives a module factors, by the names of the weights, as the layer holds them."""
        raise NotImplementedError

    def original_weight(self, name: str) -> Tensor:  # [out, in]
        """The frozen weight of one adapter as it was before merging."""
        parameter, start, stop = self.weights[name]
        kept = self.seen_of._buffers.get(_original_name(parameter))  # None: the merged adapter does not adapt this one
        return self.base_weight(name) if kept is None else whole(kept)[start:stop]

    def fold_factors(
        self, names: tuple[str, ...], dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`Ã` [r, in] and `scaling · B̃` [out, r] of the named weights, bounded by `update_bound`, cast to `dtype`.

        Differentiable in the factors.
        """
        scalings = {self.scaling_of(name) for name in names}
        if len(scalings) > 1:
            folded = [self.fold_factors((name,), dtype) for name in names]
            return [As[0] for As, _ in folded], [Bs[0] for _, Bs in folded]
        return fold([self.fold_inputs(name) for name in names], scalings.pop(), self.config.update_bound_norm, dtype)

    def scaling_of(self, name: str) -> float:
        """The scaling of one adapted weight."""
        return self._scalings[name]

    def weight_name(self, name: str) -> str:
        """The name of one adapted weight in files: the layer's path, in attention with the projection's name."""
        return f"{self.path}.{PROJECTIONS[name]}" if name else self.path

    def fold_inputs(self, name: str) -> FoldInputs:
        """The raw factors of one adapted weight and the bases that project them."""
        A, B = self.factors(name)
        if is_sharded(A):
            A, B = whole(A), whole(B)
        on_output, on_input = self.projection(name, "output", B), self.projection(name, "input", A)
        return FoldInputs(
            A,
            B,
            on_output and on_output.matrix,
            on_input and on_input.matrix,
            on_output.kind if on_output else "principal",
            on_input.kind if on_input else "principal",
            self.limit(name, A, B),
        )

    @torch.no_grad()
    def get_delta_weight(self, name: str = "") -> Tensor:  # [out, in]
        """`ΔW = scaling · B̃ Ã` in the factors' dtype, under autocast too."""
        (A,), (B,) = self.fold_factors((name,))
        with torch.autocast(B.device.type, enabled=False):
            return B @ A

    @torch.no_grad()
    @torch.inference_mode(False)  # a parameter must not become an inference tensor
    def merged_weights(self, *, safe_merge: bool = True) -> dict[str, Tensor]:
        """The parameters that adapters live in, `ΔW` added in float32 or wider and rounded once; nothing is changed.

        Raises:
            ValueError: the update holds NaN or infinite values, and `safe_merge` is True.
        """
        merged: dict[str, Tensor] = {}
        for name, (parameter, start, stop) in self.weights.items():
            target = merged.setdefault(parameter, whole(self.get_parameter(parameter).detach()).clone())
            delta = self.get_delta_weight(name)
            if safe_merge and not torch.isfinite(delta).all():
                raise ValueError(
                    f"the update of {parameter}[{start}:{stop}] holds NaN or infinite values, expected finite ones"
                )
            rows = target[start:stop]
            rows.copy_(rows + delta)  # the sum is in the wider of the two dtypes, and rounded by the copy
        return merged

    def merge(self, changes: Changes | None = None, *, safe_merge: bool = True) -> None:
        """Gives the parameters `merged_weights(...)` for memory and keeps what they had for `unmerge`.

        At once, or as one of `changes`.

        Raises:
            ValueError: as `merged_weights`; nothing is then changed.
            RuntimeError: merged already.
        """
        if self.merged:
            raise RuntimeError("the adapter is merged already; unmerge it first")
        with joined(changes) as pending:
            for name, weight in self.merged_weights(safe_merge=safe_merge).items():
                parameter = self.get_parameter(name)
                kept = parameter.detach().clone() if is_sharded(parameter) else parameter.data
                pending.set_buffer(self, _original_name(name), kept)
                pending.exchange(parameter, weight)
            with torch.inference_mode(False):
                mark = torch.tensor(True, device=self.frozen_parameter(next(iter(self.weights))).device)
            pending.set_buffer(self, MERGED, mark, persistent=True)
            pending.draft(vars(self))["merged"] = True

    def unmerge(self, changes: Changes | None = None) -> None:
        """Gives the parameters the memory back that they had before `merge`: the original weights, bit for bit.

        Raises:
            RuntimeError: not merged.
        """
        if not self.merged:
            raise RuntimeError("the adapter is not merged; merge it first")
        with joined(changes) as pending:
            for name in dict.fromkeys(rows.parameter for rows in self.weights.values()):
                pending.exchange(self.get_parameter(name), self.get_buffer(_original_name(name)))
                pending.remove_buffer(self, _original_name(name))
            pending.remove_buffer(self, MERGED)
            pending.draft(vars(self))["merged"] = False

    def unload(self, changes: Changes | None = None) -> None:
        """Makes the layer, where it stands, a module of the class that was adapted, without factors and bases.

        It keeps its parameters as they are, merged or not, its submodules, hooks and training mode. At once, or as one
        of `changes`.

        Raises:
            ValueError: the class of the layer was changed since it was adapted, as `fully_shard` does.
        """
        plain, adapted = self._made_from
        if type(self) is not adapted:
            raise ValueError(f"a {adapted.__name__} has become a {type(self).__name__}, expected one that is unchanged")
        own_buffers = {MERGED, *(_original_name(rows.parameter) for rows in self.weights.values())}
        with joined(changes) as pending:
            self._remove_bases(pending)
            for name in pending.draft(self._buffers).keys() & own_buffers:
                pending.remove_buffer(self, name)
            for table in (self._parameters, self._modules):
                for name in [name for name in table if name in FACTORS or name.startswith(INACTIVE)]:
                    del pending.draft(table)[name]
            attributes = pending.draft(vars(self))
            for name in self._added:
                del attributes[name]
            pending.set_attribute(self, "__class__", plain)

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
        """Whether the forward pass adds a low-rank term (not while merged or disabled)."""
        return not (self.merged or self.disabled or self._switched_off) and len(self.weights) > 0

    @property
    def running(self: Layer) -> Layer:
        """The layer that computes on this thread: this one, or for a batch of several adapters what stands in for it.

        Raises:
            ValueError: it stands in for one that is in training mode.
            RuntimeError: it stands in for one that was merged since.
        """
        layer = stand_in(self)
        if layer is self or self._switched_off:
            return self
        if self.merged:
            raise RuntimeError(
                f"{self._path or type(self).__name__} was merged within mixed_adapters, expected unmerged weights: "
                "call unmerge_adapter"
            )
        if self.training:
            raise ValueError(
                f"{self._path or type(self).__name__} is in training mode, expected eval(): a batch of several "
                "adapters is for inference"
            )
        return layer

    def columns_of(
        self,
        x: Tensor,  # [..., in]
        weights: int,
    ) -> Tensor | None:  # bool, to be broadcast to [..., weights · R]
        """The columns of h that each row of x has in a batch of several adapters; None: all."""
        return None if self.samples is None else self.samples.columns_of(x, weights)

    @property
    def _switched_off(self) -> bool:
        values = _SWITCHED_OFF.values()
        return len(values) > 0 and any(self in layers for layers in values)

    def _replicate_for_data_parallel(self) -> Any:
        """For another thread of the same forward pass, which could not keep what it computes."""
        if self._without_bases() or self._without_limit():
            raise RuntimeError(
                f"{self._path or type(self).__name__} has no bases yet, expected them before DataParallel copies the "
                "model: subspace_report(model) computes them"
            )
        if self.running is not self:
            raise RuntimeError(
                f"{self._path or type(self).__name__}: DataParallel would part a batch of several adapters without "
                "their names, expected the model in it"
            )
        replica = super()._replicate_for_data_parallel()
        replica.disabled = self.disabled or self._switched_off
        return replica

    def _init_adapter(self, config: CompLoRAConfig, weights: dict[str, WeightRows], path: str) -> None:
        """Common to the `from_...` constructors, once the frozen parameters are in place."""
        before = vars(self).keys() - {"_made_from"}
        self.config = config
        self.weights = weights
        self.active_adapters = {DEFAULT: 1.0}
        self.combined = False
        self.disabled = False
        self.merged = False
        self._init_bases(path)
        self._scalings = {name: config.scaling_of(self.weight_name(name)) for name in weights}
        self._added = (*(vars(self).keys() - before), "_added")

    def _new_factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A Kaiming-uniform as in `nn.Linear`, B zero: the update starts at nothing."""
        weight = self.base_weight(name)  # [out, in]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        r = self.config.rank_of(self.weight_name(name))
        A = torch.empty(r, weight.shape[1], dtype=dtype, device=weight.device)  # [r, in]
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        B = torch.zeros(weight.shape[0], r, dtype=dtype, device=weight.device)  # [out, r]
        return nn.Parameter(A), nn.Parameter(B)


_SWITCHED_OFF: ThreadStack[frozenset[CompLoRALayer]] = ThreadStack("switched off")


def switched_off(layers: Iterable[CompLoRALayer]) -> contextlib.AbstractContextManager[None]:
    """Within it, on this thread, the layers compute their frozen part alone."""
    return _SWITCHED_OFF.holding(frozenset(layers))


def fold(
    inputs: Sequence[FoldInputs], scaling: float, norm: Norm, dtype: torch.dtype | None
) -> tuple[list[Tensor], list[Tensor]]:
    """`functional.fold_factors` of any adapted weights that share a scaling; `bound_updates` of those with limits.

    What is bounded is cast to `dtype` afterwards.
    """
    As, Bs, output_bases, input_bases, output_kinds, input_kinds, limits = zip(*inputs, strict=True)
    kinds: dict[str, Any] = {"output_basis_kinds": output_kinds, "input_basis_kinds": input_kinds}
    if all(limit is None for limit in limits):
        return functional.fold_factors(As, Bs, output_bases, input_bases, **kinds, scaling=scaling, dtype=dtype)
    folded = functional.fold_factors(As, Bs, output_bases, input_bases, **kinds, scaling=scaling)
    return functional.bound_updates(*folded, limits, norm=norm, dtype=dtype)


def fold_each(
    weights: Sequence[tuple[CompLoRALayer, str, torch.dtype | None]],
) -> list[tuple[FoldInputs, Tensor, Tensor]]:
    """What is folded of each weight, Ã and `scaling · B̃`, given layer, name and dtype: one fold for equal scalings.

    An update that has a limit is bounded.
    """
    groups: dict[Any, list[tuple[int, FoldInputs]]] = {}
    for number, (layer, name, dtype) in enumerate(weights):
        inputs = layer.fold_inputs(name)
        key = (layer.scaling_of(name), layer.config.update_bound_norm, dtype, inputs.A.dtype, inputs.A.device)
        groups.setdefault(key, []).append((number, inputs))
    folded: list[Any] = [None] * len(weights)
    for (scaling, norm, dtype, *_), group in groups.items():
        As, Bs = fold([inputs for _, inputs in group], scaling, norm, dtype)
        for (number, inputs), A, B in zip(group, As, Bs, strict=True):
            folded[number] = (inputs, A, B)
    return folded


def clone_as(module: nn.Module, cls: type[Layer]) -> Layer:
    """A module of class `cls` that shares the parameters, submodules, hooks and attributes of `module`."""
    clone = cls.__new__(cls)
    clone.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules", "_load_state_dict_post_hooks"):
        clone.__dict__[name] = module.__dict__[name].copy()  # `module` must not get what the adapter adds
    clone.__dict__.pop("_compiled_call_impl", None)  # left by module.compile(): it calls `module`
    clone._made_from = type(module), cls
    return clone


def require_plain(module: nn.Module, label: str, *weights: Any) -> None:
    """Raises ValueError for a module that is more than its weights, or whose weights cannot be adapted.

    These are a forward method put on the module and a weight that a hook computes, both of which an adapter would drop
    silently, a weight that is quantised or of a subclass of Tensor, one without values and one without inputs.
    """
    if "forward" in vars(module):
        raise ValueError(f"{label} has a forward method of its own, expected that of {type(module).__name__}")
    for weight in weights:
        if not isinstance(weight, nn.Parameter):
            raise ValueError(f"{label} has a weight of type {type(weight).__name__}, expected a parameter (pruned?)")
        if not is_plain(weight):
            raise ValueError(
                f"{label} has a weight of type {type(weight).__name__}, expected one of torch's own: a quantised or "
                "sharded base cannot be adapted"
            )
        if weight.dtype not in FLOATING:
            raise ValueError(
                f"{label} holds {weight.dtype} weights, expected floating-point ones: "
                "a quantised base cannot be adapted"
            )
        if weight.shape[1] == 0:
            raise ValueError(f"{label} has a weight of shape {tuple(weight.shape)}, expected [out, in] with in >= 1")


def _original_name(parameter: str) -> str:
    return f"unmerged_{parameter.replace('.', '_')}"
