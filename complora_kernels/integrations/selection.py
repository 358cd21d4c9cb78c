"""Which modules of a model a configuration selects, the same way for the models of every library."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from torch import nn

from complora_kernels.common.wrappers import named_modules
from complora_kernels.config import (
    ALL_LINEAR,
    ATTENTION_TARGETS,
    MLP_TARGETS,
    PROJECTIONS,
    CompLoRAConfig,
    module_name_fits,
)
from complora_kernels.integrations import Block, Integration, Target, describe, find
from complora_kernels.integrations.torch import attention_targets, linear_target
from complora_kernels.modules.extend import class_name

WORDS = {projection: word for word, projection in PROJECTIONS.items()}


def select(model: nn.Module, config: CompLoRAConfig, paths: Collection[str] | None = None) -> list[Target]:
    """The modules that `config` selects in `model`, each once.

    Args:
        model: any model, in wrappers or not.
        config: what it selects and excludes counts.
        paths: the names of the weights that were selected before. Regular expressions are then not matched again: one
            that comes from a file may take longer than anybody waits.

    Raises:
        ValueError: nothing is selected, or a module cannot be adapted.
    """
    libraries = find(model)
    if paths is not None and not config.selects_in_blocks:
        targets = _Named(model, libraries).with_weights(paths)
    elif config.selects_in_blocks:
        targets = _targets_of_blocks(model, libraries, config)
    else:
        targets = _Named(model, libraries).chosen_by(config.target_modules)
    if config.exclude_modules is not None:
        targets = _without_excluded(targets, config.exclude_modules, paths)
    return list({id(target.module): target for target in targets}.values())


def _without_excluded(
    targets: list[Target], exclude_modules: str | tuple[str, ...], paths: Collection[str] | None
) -> list[Target]:
    if paths is not None and isinstance(exclude_modules, str):
        return [target for target in targets if any(target.path in (path, _attention(path)) for path in paths)]
    excludes = _matcher(exclude_modules)
    remaining = [target for target in targets if not excludes(target.path)]
    if targets and not remaining:
        names = ", ".join(target.path for target in targets[:4])
        raise ValueError(f"exclude_modules={exclude_modules!r} leaves nothing to adapt of {names}, ...")
    return remaining


# ---- q k v o fc1 fc2 in residual blocks


def _targets_of_blocks(model: nn.Module, libraries: Iterable[Integration], config: CompLoRAConfig) -> list[Target]:
    """The modules of the chosen layers and towers that hold some of q, k, v, o, fc1 and fc2."""
    blocks = [(library, block) for library in libraries for block in library.residual_blocks(model)]
    missing = [tower for tower in config.towers if all(block.tower != tower for _, block in blocks)]
    for tower in missing:
        reason = next((reason for library in libraries if (reason := library.missing(model, tower))), None)
        if reason is not None or len(missing) == len(config.towers):
            raise ValueError(_nothing_selected(model, config, tower, reason))
    found: list[Target] = []
    for tower in config.towers:
        layers = _chosen_layers(config, tower, [block for _, block in blocks if block.tower == tower])
        for library, block in blocks:
            if block.tower == tower and block.layer in layers:
                found += library.targets_in(block, config.target_modules)
    return found


def _chosen_layers(config: CompLoRAConfig, tower: str, blocks: list[Block]) -> Collection[int]:
    """The indices of the blocks of a tower that are adapted.

    Raises:
        ValueError: the tower has no block of an index.
    """
    layers, chosen = {block.layer for block in blocks}, config.layers_of(tower)
    absent = sorted(set(chosen or ()) - layers) if layers else []
    if absent:
        raise ValueError(
            f"layers={config.layers!r}, expected indices of the {tower} tower's blocks, 0 to {max(layers)}: "
            f"there is no {absent}"
        )
    return layers if chosen is None else chosen


def _nothing_selected(model: nn.Module, config: CompLoRAConfig, tower: str, reason: str | None) -> str:
    """The message where a tower has nothing to adapt."""
    if reason is None:
        part = next((path for path, module in named_modules(model) if path and _has_blocks(module)), None)
        reason = (
            f"the model has no {tower} tower that is known, it is {describe(model)}"
            if part is None
            else f"the model has none, its part {part} has towers: pass that"
        )
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


# ---- modules by their names


def packed_linears(model: nn.Module) -> dict[str, Target]:
    """The linear layers of residual blocks that hold q, k and v in one weight, by their paths."""
    parts = _parts_of_blocks(model, find(model))
    return {part.path: part for part in parts if isinstance(part.module, nn.Linear) and "" not in part.weights}


class _Linear(NamedTuple):
    module: nn.Module
    uncalled_by: nn.Module | None  # the parent that uses its weight without calling it


class _Named:
    """What can be adapted in a model, by name: what residual blocks consist of, and every other `nn.Linear`.

    A module of a residual block that holds q, k and v in one weight gets an adapter for each.
    """

    def __init__(self, model: nn.Module, libraries: Iterable[Integration]) -> None:
        self.modules = modules = dict(named_modules(model))
        self.parts = {target.path: target for target in _parts_of_blocks(model, libraries)}
        self.linears: dict[str, _Linear] = {}
        for path, module in modules.items():
            if path and isinstance(module, nn.Linear) and path not in self.parts:
                parent, name = modules[path.rpartition(".")[0]], path.rpartition(".")[2]
                uncalled = any(name in library.uncalled(parent) for library in libraries)
                self.linears[path] = _Linear(module, parent if uncalled else None)
        self.paths = [path for path in modules if path in self.parts or path in self.linears]

    def chosen_by(self, target_modules: str | tuple[str, ...]) -> list[Target]:
        """The modules that "all-linear", a regular expression or names select.

        Raises:
            ValueError: one of the names, or the expression, selects nothing, or an adapter would have no effect.
        """
        if target_modules == ALL_LINEAR:
            uncalled = {path for path, linear in self.linears.items() if linear.uncalled_by is not None}
            return self._targets([path for path in self.paths if path not in uncalled], target_modules)
        fits, known = _matcher(target_modules), self.paths
        for name in (target_modules,) if isinstance(target_modules, str) else target_modules:
            fits_name = _matcher(name if isinstance(target_modules, str) else (name,))
            if not any(map(fits_name, known)):
                listed = ", ".join(list(self.linears)[:8] or list(self.parts)[:8])
                others = [path for path in self.modules if path and fits_name(path)]
                is_other = f"; {others[0]} is a {class_name(self.modules[others[0]])}" if others else ""
                raise ValueError(
                    f"target_modules={target_modules!r} matched no nn.Linear by its whole name"
                    f"{'' if isinstance(target_modules, str) else f' or its ending {name!r}'}{is_other}, "
                    f"expected a match among: {listed or 'none'}{', ...' if len(known) > 8 else ''}{_hint(name)}"
                )
        return self._targets([path for path in known if fits(path)], target_modules)

    def with_weights(self, names: Collection[str]) -> list[Target]:
        """The modules that hold the weights of these names.

        Raises:
            ValueError: there is none, or an adapter would have no effect.
        """
        chosen = {path for path, part in self.parts.items() if _weights(part) <= set(names)}
        chosen |= self.linears.keys() & set(names)
        found = {name for path in chosen for name in (_weights(self.parts[path]) if path in self.parts else {path})}
        if lost := sorted(set(names) - found):
            raise ValueError(f"the model has no module for {', '.join(lost[:4])}")
        return self._targets([path for path in self.paths if path in chosen], tuple(names))

    def _targets(self, paths: list[str], target_modules: str | tuple[str, ...]) -> list[Target]:
        targets = []
        for path in paths:
            if path in self.parts:
                targets.append(self.parts[path])
                continue
            if path.rpartition(".")[0] in self.parts and path.rpartition(".")[0] in paths:
                continue  # the attention that it belongs to has an adapter for it
            module, parent = self.linears[path]
            if parent is not None:
                raise ValueError(
                    f"target_modules={target_modules!r} matched {path}, which its parent, a {type(parent).__name__}, "
                    "uses without calling it: an adapter there would have no effect. Expected a module that is called"
                    + _hint(path.rpartition(".")[2])
                )
            targets.append(linear_target(path, module))
        return targets


def _parts_of_blocks(model: nn.Module, libraries: Iterable[Integration]) -> Iterable[Target]:
    """All residual blocks' targets and torch's attention anywhere, where they can be adapted, with all adapters."""
    yield from attention_targets(model)
    for library in libraries:
        for block in library.residual_blocks(model):
            for names in (ATTENTION_TARGETS, MLP_TARGETS):
                try:
                    yield from list(library.targets_in(block, names))
                except ValueError:  # the selection may name other modules
                    continue


def _matcher(names: str | tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a path is matched: as a whole by a regular expression, or by names or their endings."""
    if isinstance(names, str):
        pattern = re.compile(names)
        return lambda path: pattern.fullmatch(path) is not None
    return lambda path: any(module_name_fits(name, path) for name in names)


def _hint(name: str) -> str:
    """How a projection of an attention is named otherwise, for messages."""
    return f' (in residual blocks, target_modules=("{WORDS[name]}",) adapts it)' if name in WORDS else ""


def _weights(target: Target) -> set[str]:
    """The names of the weights that a target adapts."""
    return {f"{target.path}.{PROJECTIONS[name]}" if name else target.path for name in target.weights}


def _attention(weight: str) -> str:
    """The path of the attention that a weight's name may belong to."""
    parent, _, name = weight.rpartition(".")
    return parent if name in PROJECTIONS.values() else ""
