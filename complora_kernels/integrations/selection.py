"""Which modules of a model a configuration selects, the same way for the models of every library."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from complora_kernels.common.wrappers import named_modules
from complora_kernels.config import CompLoRAConfig
from complora_kernels.integrations import Block, Integration, Target, find
from complora_kernels.integrations.torch import linear_target

OWN_BLOCK = '(in residual blocks, target_modules=("o",) adapts the output projection)'


def select(model: nn.Module, config: CompLoRAConfig, paths: Collection[str] | None = None) -> list[Target]:
    """The modules that `config` selects in `model`, perhaps one of them twice.

    Args:
        model: any model, in wrappers or not.
        config: its target modules, towers and layers count.
        paths: those that a regular expression matched before; it is then not matched again. One that comes from a file
            may take longer than anybody waits.

    Raises:
        ValueError: nothing is selected, or a module cannot be adapted.
    """
    if isinstance(config.target_modules, str):
        return _matching_linears(model, config.target_modules, paths)
    return _targets_of_blocks(model, config, config.target_modules)


def _targets_of_blocks(model: nn.Module, config: CompLoRAConfig, names: Collection[str]) -> list[Target]:
    """The modules of the chosen layers and towers that some of q, k, v, o, fc1 and fc2 name."""
    libraries = find(model)
    blocks = [(library, block) for library in libraries for block in library.residual_blocks(model)]
    missing = [tower for tower in config.towers if all(block.tower != tower for _, block in blocks)]
    for tower in missing:
        reason = next((reason for library in libraries if (reason := library.missing(model, tower))), None)
        if reason is not None or len(missing) == len(config.towers):
            raise ValueError(_nothing_selected(model, config, tower, reason))
    found = []
    for tower in config.towers:
        chosen = _chosen_layers(config, tower, [block for _, block in blocks if block.tower == tower])
        for library, block in blocks:
            if block.tower == tower and block.layer in chosen:
                found += library.targets_in(block, names)
    return found


def _chosen_layers(config: CompLoRAConfig, tower: str, blocks: list[Block]) -> Collection[int]:
    """The indices of the blocks of a tower that are adapted.

    Raises:
        ValueError: the tower has no block of an index.
    """
    layers = {block.layer for block in blocks}
    absent = sorted(set(config.layers or ()) - layers) if layers else []
    if absent:
        raise ValueError(
            f"layers={config.layers!r}, expected indices of the {tower} tower's blocks, 0 to {max(layers)}: "
            f"there is no {absent}"
        )
    return layers if config.layers is None else config.layers


def _nothing_selected(model: nn.Module, config: CompLoRAConfig, tower: str, reason: str | None) -> str:
    """The message where a tower has nothing to adapt."""
    if reason is None:
        parts = (path for path, module in named_modules(model) if path and _has_blocks(module))
        part = next(parts, None)
        reason = f"the model has no {tower} tower that is known, it is a {type(model).__name__}"
        if part is not None:
            reason = f"the model has none, its part {part} has towers: pass that"
    return (
        f"towers={config.towers!r} matched nothing in the {tower} tower: {reason}. "
        f"Choose other towers, or name nn.Linear modules by a regular expression, {_pattern_of_linears(model)}"
    )


def _has_blocks(module: nn.Module) -> bool:
    return any(True for library in find(module) for _ in library.residual_blocks(module))


def _pattern_of_linears(model: nn.Module) -> str:
    """The setting that selects every `nn.Linear` of `model`, to be pasted."""
    linears = (path for path, module in named_modules(model) if path and isinstance(module, nn.Linear))
    names = "|".join(sorted({path.rpartition(".")[2] for path in linears}))
    return f'target_modules=r"(.*\\.)?({names})"' if names else 'target_modules=r"..."'


def _matching_linears(model: nn.Module, pattern: str, paths: Collection[str] | None) -> list[Target]:
    """The `nn.Linear` modules whose whole names a regular expression matches, or that have these `paths`.

    Raises:
        ValueError: there is none, or an adapter would have no effect.
    """
    modules = dict(named_modules(model))
    linears = [path for path, module in modules.items() if path and isinstance(module, nn.Linear)]
    chosen = [path for path in linears if (re.fullmatch(pattern, path) if paths is None else path in paths)]
    if not chosen:
        known = ", ".join(linears[:8]) + (", ..." if len(linears) > 8 else "")
        raise ValueError(
            f"target_modules={pattern!r} matched no nn.Linear by its whole name, "
            f"expected a match among: {known or 'none'}"
        )
    libraries = find(model)
    for path in chosen:
        _check_called(modules[path.rpartition(".")[0]], path, pattern, libraries)
    return [linear_target(path, modules[path]) for path in chosen]


def _check_called(parent: nn.Module, path: str, pattern: str, libraries: list[Integration]) -> None:
    """Raises ValueError where an adapter would have no effect, because its module is not called."""
    name = path.rpartition(".")[2]
    if any(name in library.uncalled(parent) for library in libraries):
        raise ValueError(
            f"target_modules={pattern!r} matched {path}, which its parent, a {type(parent).__name__}, uses without "
            f"calling it: an adapter there would have no effect. Expected a module that is called {OWN_BLOCK}"
        )
