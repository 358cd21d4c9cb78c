"""Several adapters on one model: `add_adapter`, `set_adapter`, `delete_adapter`, with the names that PEFT gives them.

An adapter is added by adapting a plain view of the model, in any of the ways in which a plain model is adapted; the
layers of the view then hand the adapter over. All adapters share the frozen weights, and switching copies none of them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import nn

from complora_kernels.adapters.build import (
    adapted_layers,
    adapted_model,
    all_layers,
    apply_complora,
    check_name,
    check_targets,
    check_wrappers,
)
from complora_kernels.adapters.calibration import Calibrate
from complora_kernels.adapters.install import Replacement, exchange_modules
from complora_kernels.adapters.manage import require_unmerged
from complora_kernels.adapters.plain_view import plain_view
from complora_kernels.adapters.sums import sums_of
from complora_kernels.common.changes import Changes
from complora_kernels.common.sharded import has_shards
from complora_kernels.common.wrappers import named_modules
from complora_kernels.config import CompLoRAConfig
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.several import DEFAULT, INACTIVE


def add_adapter(
    model: nn.Module,
    adapter_name: str,
    config: CompLoRAConfig,
    *,
    calibrate: Calibrate | None = None,
    progress: bool = True,
) -> None:
    """Adds a new adapter to an adapted model, with a configuration of its own; as in PEFT, it is not activated.

    It may adapt other modules than those before it; these become adapted layers, their weights frozen. All adapters
    share the frozen weights. See `apply_complora`, which gave the model its first adapter, called "default".

    Args:
        model: adapted, in wrappers or not, as for `save_adapter`.
        adapter_name: a new name.
        config: as for `apply_complora`, without `modules_to_save`.
        calibrate: as for `apply_complora`: it is called with a plain view of the model and has to run that.
        progress: as for `apply_complora`.

    Raises:
        ValueError: the name is taken, or no name that a file can have; `config` or an adapter before has
            `modules_to_save`, which are trained in place and not kept apart; the model is sharded or in a wrapper that
            has listed its parameters; or as `apply_complora`. The model is then as it was.
        RuntimeError: an adapter is merged.
    """
    if config.modules_to_save:
        refuse_modules_to_save(config)
    add_from(model, adapter_name, lambda view: apply_complora(view, config, calibrate=calibrate, progress=progress))


def add_from(model: nn.Module, adapter_name: str, adapt: Callable[[nn.Module], object]) -> None:
    """Adds the adapter that `adapt` gives to a plain view of the model, as one step; errors as `add_adapter`.

    `adapt` must not write to memory of the view, as an adapter with `modules_to_save` does: it is the model's.
    """
    part = _switchable(model)
    check_name(adapter_name)
    taken = adapter_names(part)
    if adapter_name in taken:
        raise ValueError(f"adapter_name={adapter_name!r}, expected another name than {', '.join(taken)}")
    refuse_modules_to_save(next(iter(all_layers(part).values())).config)
    view = plain_view(part)
    adapt(view)
    built = adapted_layers(view)
    for path, layer in built.items():
        if layer.path != path:
            raise ValueError(
                f"{path} was adapted as {layer.path} in another model, expected an adapter of the whole model that has "
                "adapters"
            )
    changes, replacements = Changes(), []
    modules, active = dict(named_modules(part)), next(iter(all_layers(part).values()))
    for path, layer in built.items():
        own = Changes()  # of a layer that is no part of the model
        inactive = layer.take_out(own)
        own.make()
        holder = modules[path]
        if not isinstance(holder, CompLoRALayer):
            _share_with(layer, holder)
            vars(layer).update(active_adapters=active.active_adapters, combined=active.combined, config=active.config)
            replacements.append(Replacement(path, holder, layer))
            for parameter in holder.parameters():
                changes.set_attribute(parameter, "requires_grad", False)
            holder = layer
        changes.draft(holder._modules)[INACTIVE + adapter_name] = inactive
    if replacements:
        check_targets(model, {path: module for path, module, _ in replacements})
        exchange_modules(part, replacements, changes)
    changes.make()


def set_adapter(model: nn.Module, adapter_name: str | Mapping[str, float]) -> None:
    """Makes an adapter of the model the active one: it computes, and is trained, saved, merged and reported.

    Its factors require a gradient, those of the others do not. No weight and no factor is copied. An optimizer holds
    the factors that it was made with: make it anew, and a `GraphedTrainStep` too.

    With weights for several names the model computes the sum of the updates, `ΔW = Σ w_i ΔW_i`, exact as one LoRA of
    the concatenated factors, `A = [Ã_1; Ã_2]` and `B = [w_1 s_1 B̃_1, w_2 s_2 B̃_2]` (PEFT's `combination_type="cat"`).
    The sum is made of the factors as they are now, without dropout. It can be computed, merged and exported, and is
    neither trained nor saved.

    Args:
        model: adapted, in wrappers or not, as for `save_adapter`.
        adapter_name: one of `adapter_names(model)`, or weights by such names.

    Raises:
        ValueError: a name is unknown, or a weight no finite number; the model is sharded or in a wrapper that has
            listed its parameters. The model is then as it was.
        RuntimeError: an adapter is merged.
    """
    part = _switchable(model)
    layers, known = all_layers(part), adapter_names(part)
    if not isinstance(adapter_name, (str, Mapping)):
        raise ValueError(f"adapter_name={adapter_name!r}, expected a name, or weights by names such as {{'a': 0.5}}")
    weights = {adapter_name: 1.0} if isinstance(adapter_name, str) else dict(adapter_name)
    unknown = [name for name in weights if name not in known]
    if unknown or not weights:
        raise ValueError(f"adapter_name={adapter_name!r}, expected one of {', '.join(known)}, or weights for several")
    for name, weight in weights.items():
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"adapter_name={adapter_name!r}, expected a finite number as the weight of {name!r}")
    changes = Changes()
    if isinstance(adapter_name, str):
        config = next(iter(layers_of(part, adapter_name).values())).config
        for layer in layers.values():
            layer.activate(weights, config, changes)
    else:
        for path, (adapter, _) in sums_of(layers, weights).items():
            layers[path].activate(weights, adapter.state["config"], changes, adapter)
    changes.make()


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Deletes an adapter that is not active; modules that no other one adapts become plain ones again.

    Raises:
        ValueError: the name is unknown, or that of an active adapter; or as `set_adapter`. The model is then as it was.
        RuntimeError: an adapter is merged.
    """
    part = _switchable(model)
    layers, known, active = all_layers(part), adapter_names(part), active_adapters(part)
    if adapter_name not in known:
        raise ValueError(f"adapter_name={adapter_name!r}, expected one of {', '.join(known)}")
    if adapter_name in active:
        raise ValueError(f"adapter_name={adapter_name!r} is active, expected another one: call set_adapter first")
    changes = Changes()
    for layer in layers.values():
        if layer.adapter_names == [adapter_name]:
            layer.unload(changes)
        else:
            changes.draft(layer._modules).pop(INACTIVE + adapter_name, None)
    changes.make()


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters of a model, the active one first.

    Raises:
        ValueError: `model` has no adapter.
    """
    return list(dict.fromkeys(name for layer in _active_first(model) for name in layer.adapter_names))


def active_adapters(model: nn.Module) -> dict[str, float]:
    """The names of the adapters that a model computes, with their weights: one with 1.0, or those of `set_adapter`.

    Raises:
        ValueError: `model` has no adapter.
    """
    return dict(next(iter(all_layers(model).values())).active_adapters)


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, CompLoRALayer]:
    """Layers in which an adapter lies, by their paths: those of the model where it is active, else views of them.

    Raises:
        ValueError: the name is unknown.
    """
    seen = {path: layer.seen_with(adapter_name) for path, layer in all_layers(model).items()}
    layers = {path: layer for path, layer in seen.items() if layer is not None}
    if not layers:
        raise ValueError(f"adapter_name={adapter_name!r}, expected one of {', '.join(adapter_names(model))}")
    return layers


def in_folders(
    model: nn.Module, directory: str | os.PathLike[str], names: Iterable[str] | None
) -> dict[Path, dict[str, CompLoRALayer]]:
    """The layers of adapters whose files are to be written, by their folder, which is that of PEFT.

    "default" is in `directory` itself, each other adapter in the folder of its name within. None stands for what is
    active, in `directory` itself.

    Raises:
        ValueError: a name is unknown, or there is none.
    """
    root = Path(directory)
    if names is None:
        return {root: adapted_layers(model)}
    chosen = [] if isinstance(names, str) else list(names)
    if not chosen:
        raise ValueError(f"adapter_names={names!r}, expected a list of names")
    return {root if name == DEFAULT else root / name: layers_of(model, name) for name in chosen}


def _switchable(model: nn.Module) -> nn.Module:
    """The model that was adapted, in `model`, where its adapters can be exchanged now; errors as `set_adapter`."""
    part = adapted_model(model)
    layers = all_layers(part)
    require_unmerged(layers)
    if has_shards(part):
        raise ValueError("model is sharded, expected a whole one: give it its adapters first, and shard it then")
    check_wrappers(model, layers, "given its adapters")
    return part


def refuse_modules_to_save(config: CompLoRAConfig) -> None:
    """Raises ValueError for an adapter with whole modules, of a model that has several adapters."""
    if config.modules_to_save:
        raise ValueError(
            f"modules_to_save={config.modules_to_save!r}, expected none where a model has several adapters: these "
            "modules are trained in place, and no copy of them is kept for each adapter"
        )


def _share_with(layer: CompLoRALayer, module: nn.Module) -> None:
    """Gives a layer, which was built for a view of `module`, the parameters, submodules and hooks of `module`."""
    for table in ("_parameters", "_buffers", "_modules"):
        vars(layer)[table].update(vars(module)[table])
    for name, value in vars(module).items():
        if "_hooks" in name and name != "_load_state_dict_post_hooks":  # the layer has one of its own
            vars(layer)[name] = value


def _active_first(model: nn.Module) -> list[CompLoRALayer]:
    return sorted(all_layers(model).values(), key=lambda layer: not layer.weights)
