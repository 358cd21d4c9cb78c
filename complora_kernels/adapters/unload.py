"""`unload` and `merge_and_unload`: an adapted model becomes a plain one again, with or without the update."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from complora_kernels.adapters.build import adapted_layers, adapted_model, all_layers, check_wrappers
from complora_kernels.adapters.manage import merge_layers
from complora_kernels.common.changes import Changes
from complora_kernels.common.wrappers import named_modules
from complora_kernels.modules.block import CompLoRABlock
from complora_kernels.modules.extend import restore
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.protected import check_before_load

Model = TypeVar("Model", bound=nn.Module)


def unload(model: Model) -> Model:
    """Makes an adapted model a plain one again, without any update; a merged one gets its original weights back.

    Every module has its own class, keys and hooks again and computes what it did before `apply_complora`; modules,
    parameters and training modes are those that the model has now. Factors and bases are dropped: save them first.
    Parameters that `apply_complora` froze stay frozen, as with PEFT: `model.requires_grad_(True)` trains them again.
    The model is plain or, when the call fails or is interrupted, as it was.

    Args:
        model: adapted; or a wrapper around it or a container that holds it, which stays, see `save_adapter`.

    Returns:
        The same model.

    Raises:
        ValueError: `model` has no adapter, is a part of an adapted model or holds several; a wrapper
            (DistributedDataParallel, FullyShardedDataParallel) has listed its parameters; or the class of a module was
            changed since, as `fully_shard` does.
    """
    changes = Changes()
    for layer in adapted_layers(model).values():
        if layer.merged:
            layer.unmerge(changes)
    _unload(model, changes)
    return model


def merge_and_unload(model: Model, *, safe_merge: bool = True) -> Model:
    """Adds every update of the active adapter to its weight, `W + ΔW` rounded once, and makes the model a plain one.

    The originals are dropped. A model that is merged already keeps the weights that it has. Everything else is as with
    `unload`, and of the weights as with `merge_adapter`.

    Args:
        model: as for `unload`.
        safe_merge: refuse an update that holds NaN or infinite values.

    Returns:
        The same model.

    Raises:
        ValueError: as `unload`; an update is refused; or an adapted weight shares memory with a parameter or a buffer
            of another module.
    """
    layers = adapted_layers(model)
    changes = Changes()
    unmerged = {path: layer for path, layer in layers.items() if not layer.merged}
    merge_layers(model, unmerged, changes, safe_merge=safe_merge)
    _unload(model, changes)
    return model


def _unload(model: nn.Module, changes: Changes) -> None:
    """Makes the changes, and with them every module a plain one."""
    check_wrappers(model, all_layers(model), "unloaded")
    part = adapted_model(model)
    hooks = changes.draft(part._load_state_dict_pre_hooks)
    for handle in [handle for handle, hook in hooks.items() if getattr(hook, "hook", None) is check_before_load]:
        del hooks[handle]
    for path, module in named_modules(part):
        if isinstance(module, CompLoRABlock):
            changes.draft(vars(module)).pop("recompute", None)
        try:
            module.unload(changes) if isinstance(module, CompLoRALayer) else restore(module, changes)
        except ValueError as error:
            raise ValueError(f"{path or 'the model'}: {error}") from None
    changes.make()
