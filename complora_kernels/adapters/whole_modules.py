"""The modules of `modules_to_save`: they are trained as a whole and belong to the adapter, as a new head does."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from complora_kernels.common.wrappers import named_modules


def whole_modules(model: nn.Module, ends: Sequence[str], adapted: Collection[nn.Module]) -> dict[str, nn.Module]:
    """The modules whose names end in one of `ends`, by these names; PEFT selects them in the same way.

    A module within another one that is selected is a part of that.

    Args:
        model: plain or adapted, in wrappers or not.
        ends: `CompLoRAConfig.modules_to_save`.
        adapted: the modules that get adapters, or the adapted layers.

    Raises:
        ValueError: an end selects nothing, or a module that is adapted, or that holds one that is, or that shares a
            parameter with another module.
    """
    modules = dict(named_modules(model))
    for end in ends:
        if not any(path.endswith(end) for path in modules if path):
            raise ValueError(f"modules_to_save={end!r}, expected the end of the name of a module: none ends so")
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if path and path.endswith(tuple(ends)) and not path.startswith(tuple(f"{outer}." for outer in found)):
            found[path] = module
    within = {id(part) for module in adapted for part in module.modules()}
    for path, module in found.items():
        if any(id(child) in within for child in module.modules()):
            raise ValueError(f"modules_to_save selects {path}, which is or holds an adapted module, expected another")
    inside = {id(child) for module in found.values() for child in module.modules()}
    outside = {id(p) for m in model.modules() if id(m) not in inside for p in m.parameters(recurse=False)}
    for path, module in found.items():
        if any(id(parameter) in outside for parameter in module.parameters()):
            raise ValueError(
                f"modules_to_save selects {path}, which shares a parameter with another module, expected one that does "
                "not: training it would change the other, too"
            )
    return found


def whole_tensors(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The parameters and the persistent buffers of these modules, by their names in the model."""
    return {
        ".".join(filter(None, (path, inner, name))): tensor
        for path, module in modules.items()
        for inner, child in named_modules(module)
        for name, tensor in (*child._parameters.items(), *child._buffers.items())
        if tensor is not None and name not in child._non_persistent_buffers_set
    }


def check_whole_tensors(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raises ValueError unless tensors from a file, of the same names, fit those of the model and are finite."""
    for name, tensor in tensors.items():
        expected = own[name]
        if tensor.shape != expected.shape or tensor.is_floating_point() != expected.is_floating_point():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}, expected those of the model, "
                f"{tuple(expected.shape)} and {expected.dtype}"
            )
    check_finite(tensors)


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError that names the first tensor with NaN or infinite values."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinite values, expected finite ones")
