"""Several adapters in one layer: the active one lives in the layer itself, the others wait in submodules of it.

All that a layer computes, it computes of the adapter that lies in it. `seen_with` gives, for an adapter that waits, a
layer on the same frozen weights in which it lies: for a save, a sum of adapters or a state dict with other weights.
Whatever bases that layer computes, the waiting adapter keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from complora_kernels.common.changes import Changes
from complora_kernels.config import CompLoRAConfig
from complora_kernels.modules.float32_state import Float32State
from complora_kernels.modules.mixed import Samples
from complora_kernels.modules.protected import ProtectedLayer, WeightRows

Layer = TypeVar("Layer", bound="SeveralAdapters")

DEFAULT = "default"  # the name of the first adapter, as in PEFT
INACTIVE = "inactive_"  # what the names of the submodules with the other adapters begin with
FACTORS = ("lora_A", "lora_B")
STATE = ("config", "weights", "_scalings", "_about_bases", "_basis_of", "_calibrated_on", "_loaded")


class InactiveAdapter(Float32State):
    """An adapter of a layer while it is not active: factors, bases, and the attributes that the layer has of it.

    Attributes:
        state: the values of the attributes in `STATE`.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        super().__init__()
        self.state = state

    @classmethod
    def without_bases(cls, config: CompLoRAConfig, weights: dict[str, WeightRows] | None = None) -> InactiveAdapter:
        """One of plain LoRA on these weights, whose factors are to be added, with a scaling of 1; perhaps on none."""
        empty: dict[str, Any] = {name: {} for name in STATE}
        weights = weights or {}
        return cls(empty | {"config": config, "weights": weights, "_scalings": dict.fromkeys(weights, 1.0)})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):  # others have no such adapter: ours stays
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class SeveralAdapters(ProtectedLayer):
    """The adapters of a `CompLoRALayer`; use that.

    Attributes:
        active_adapters: the names of the adapters that the layer computes, with their weights in the sum.
        combined: whether they are a weighted sum, which cannot be trained or saved, rather than one adapter.
    """

    active_adapters: dict[str, float]
    combined: bool
    samples: Samples | None = None  # of a batch with several adapters, in a layer that stands in for one of the model

    @property
    def seen_of(self: Layer) -> Layer:
        """The layer of the model whose frozen weights these are: itself, or what `seen_with` was asked of."""
        return vars(self).get("_seen_of", self)

    @property
    def inactive(self) -> list[str]:
        """The names of the adapters that wait."""
        return [name.removeprefix(INACTIVE) for name in self._modules if name.startswith(INACTIVE)]

    @property
    def adapter_names(self) -> list[str]:
        """The names of all adapters that the layer has."""
        active = list(self.active_adapters) if self.weights and not self.combined else []
        return active + self.inactive

    def seen_with(self: Layer, adapter_name: str) -> Layer | None:
        """A layer on the same frozen weights in which an adapter lies; itself where it does, None where it has none.

        It is no part of the model. Bases that it computes are those of the adapter.
        """
        if self.weights and not self.combined and adapter_name in self.active_adapters:
            return self
        waiting: Any = self._modules.get(INACTIVE + adapter_name)
        return None if waiting is None else self._with(waiting, {adapter_name: 1.0})

    def with_sum(self: Layer, adapter: InactiveAdapter, weights: dict[str, float], samples: Samples) -> Layer:
        """A layer on the same frozen weights that computes a sum of adapters, one of which each sample has."""
        layer = self._with(adapter, weights)
        vars(layer).update(combined=True, samples=samples)
        return layer

    def _with(self: Layer, adapter: InactiveAdapter, active_adapters: dict[str, float]) -> Layer:
        layer = object.__new__(type(self))
        vars(layer).update(vars(self) | adapter.state, active_adapters=active_adapters, combined=False, _seen_of=self)
        for table in ("_parameters", "_modules"):
            own = {name: each for name, each in vars(self)[table].items() if not _is_of_adapter(name)}
            vars(layer)[table] = own | vars(adapter)[table]
        for table in ("_buffers", "_non_persistent_buffers_set"):
            vars(layer)[table] = vars(adapter)[table]  # the same: what is added to the layer, the adapter keeps
        return layer

    def take_out(self, changes: Changes) -> InactiveAdapter:
        """The adapter that lies in the layer, which then has none, as one of `changes`; its factors are frozen."""
        adapter = InactiveAdapter({name: vars(self)[name] for name in STATE}).train(self.training)
        for table in ("_parameters", "_modules"):
            draft = changes.draft(vars(self)[table])
            vars(adapter)[table].update({name: draft.pop(name) for name in FACTORS if name in draft})
        buffers, lasting = changes.draft(self._buffers), changes.draft(self._non_persistent_buffers_set)
        for name in self.own_buffers():
            adapter.register_buffer(name, buffers.pop(name), persistent=name not in lasting)
            lasting.discard(name)
        for factor in adapter.parameters():
            changes.set_attribute(factor, "requires_grad", False)
        changes.draft(vars(self)).update(InactiveAdapter.without_bases(self.config).state)
        return adapter

    def put_in(self, adapter: InactiveAdapter, changes: Changes, *, trained: bool) -> None:
        """Lets an adapter lie in the layer, which has none, as one of `changes`."""
        changes.draft(vars(self)).update(adapter.state)
        for table in ("_parameters", "_modules", "_buffers", "_non_persistent_buffers_set"):
            changes.draft(vars(self)[table]).update(vars(adapter)[table])
        for factor in adapter.parameters():
            changes.set_attribute(factor, "requires_grad", trained)

    def activate(
        self,
        active_adapters: dict[str, float],
        config: CompLoRAConfig,
        changes: Changes,
        sum_of_them: InactiveAdapter | None = None,
    ) -> None:
        """Makes an adapter of the layer the active one, or a sum of several; the one before waits.

        `config` is that of the adapter in other layers, for a layer that has no adapter of this name.
        """
        combined = sum_of_them is not None
        modules: dict[str, Any] = changes.draft(self._modules)
        previous, had_one, was_combined = list(self.active_adapters), bool(self.weights), self.combined
        taken = self.take_out(changes)
        if had_one and not was_combined:
            modules[INACTIVE + previous[0]] = taken
        chosen = sum_of_them
        if not combined:
            (name,) = active_adapters
            chosen = modules.pop(INACTIVE + name, None)
        changes.draft(vars(self)).update(active_adapters=active_adapters, combined=combined, config=config)
        if chosen is not None:
            self.put_in(chosen, changes, trained=not combined)

    # ---- state dicts

    def refusal(self, state_dict: dict[str, Any], prefix: str) -> str | None:
        reason = super().refusal(state_dict, prefix)
        if reason is not None:
            return reason
        starts = f"{prefix}{INACTIVE}"
        waiting = {key.removeprefix(starts).partition(".")[0] for key in state_dict if key.startswith(starts)}
        if self._own_factors_in(state_dict, prefix) and waiting != set(self.inactive):
            have, had = ", ".join(sorted(self.inactive)) or "none", ", ".join(sorted(waiting)) or "none"
            return (
                f"{prefix.rstrip('.')}: beside {', '.join(self.active_adapters)}, which is active, the adapters {have} "
                f"wait, in the state dict {had}: expected the same adapters, and the same one active (set_adapter)"
            )
        for layer in self._inactive_layers():
            reason = reason or ProtectedLayer.refusal(layer, state_dict, prefix)
        return reason

    def _own_factors_in(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether a state dict has factors of an adapter that lies in the layer."""
        return any(key.startswith(f"{prefix}{name}") for key in state_dict for name in FACTORS)

    def update_bases(self) -> None:
        super().update_bases()
        for layer in self._inactive_layers():
            layer.update_bases()

    def remember_weights(self) -> None:
        super().remember_weights()
        for layer in self._inactive_layers():
            layer.remember_weights()

    def _inactive_layers(self: Layer) -> Iterator[Layer]:
        for name in self.inactive:
            layer = self.seen_with(name)
            assert layer is not None
            vars(layer)["_own_prefix"] = f"{INACTIVE}{name}."
            yield layer


def _is_of_adapter(name: str) -> bool:
    return name in FACTORS or name.startswith(INACTIVE)
