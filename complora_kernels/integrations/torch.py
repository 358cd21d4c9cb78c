"""Any torch module: a regular expression over the names of its modules selects `nn.Linear` layers."""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import nn

from complora_kernels.common.wrappers import named_modules
from complora_kernels.config import CompLoRAConfig
from complora_kernels.integrations import Block, Target, find
from complora_kernels.modules.block import BlockParts, CompLoRABlock
from complora_kernels.modules.extend import Extension
from complora_kernels.modules.forward_scope import Scoped
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.linear import CompLoRALinear
from complora_kernels.modules.protected import WeightRows

FusedBlock = CompLoRABlock


def recognises(model: nn.Module) -> bool:
    return True


def targets(model: nn.Module, config: CompLoRAConfig, paths: Collection[str] | None = None) -> list[Target]:
    if isinstance(config.target_modules, str):
        return matching_linears(model, config.target_modules, paths)
    tower = config.towers[0]
    part = next((path for path, module in named_modules(model) if path and find(module).towers(module)), None)
    reason = f"the model has no {tower} tower that is known, it is a {type(model).__name__}"
    if part is not None:
        reason = f"the model has none, its part {part} has towers: pass that"
    raise ValueError(nothing_selected(config, tower, reason))


def nothing_selected(config: CompLoRAConfig, tower: str, reason: str) -> str:
    """The message where a tower has nothing to adapt."""
    return (
        f"towers={config.towers!r} matched nothing in the {tower} tower: {reason}. "
        'Choose other towers, or name nn.Linear modules by a regular expression, target_modules=r"..."'
    )


def linear_target(path: str, module: nn.Module) -> Target:
    """A target that becomes a `CompLoRALinear`."""
    rows = module.out_features if isinstance(module, nn.Linear) else 0  # another class is refused when it is adapted
    return Target(path, module, {"": WeightRows("weight", 0, rows)}, CompLoRALinear.from_linear)


def matching_linears(
    model: nn.Module, pattern: str, paths: Collection[str] | None, readers: Collection[str] = ()
) -> list[Target]:
    """The `nn.Linear` modules whose whole names a regular expression matches.

    Args:
        model: any model, in wrappers or not.
        pattern: the regular expression.
        paths: those that it matched before; it is then not matched again. One that comes from a file may take longer
            than anybody waits.
        readers: classes, by name, that use the weights of their children without calling them, beside torch's own.

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
    for path in chosen:
        parent = modules[path.rpartition(".")[0]]
        # These read `.weight` of their children instead of calling them; the encoder layer does so in evaluation.
        reads = isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
        if reads or type(parent).__name__ in readers:
            raise ValueError(
                f"target_modules={pattern!r} matched {path}, which its parent, a {type(parent).__name__}, uses without "
                "calling it: an adapter there would have no effect. Expected a module that is called "
                '(in residual blocks, target_modules=("o",) adapts the output projection)'
            )
    return [linear_target(path, modules[path]) for path in chosen]


def residual_blocks(model: nn.Module) -> list[Block]:
    return []


def parts_of_block(block: nn.Module) -> BlockParts | str:
    return f"it is a {type(block).__name__}, of no known library"


def towers(model: nn.Module) -> list[tuple[nn.Module, type[Scoped]]]:
    return []


def truncation(model: nn.Module) -> list[tuple[nn.Module, type[Extension]]]:
    return []


def activations(model: nn.Module) -> dict[str, str]:
    return {}


def peft_modules(path: str, layer: CompLoRALayer) -> dict[str, str] | str:
    if isinstance(layer, CompLoRALinear):
        return {"": path}
    return f"a {type(layer).__name__} has no modules of its own for its adapters"
