"""Wrappers of models: torch.compile, data parallelism, averages and checkpointed blocks, around a model or within.

A wrapper puts a name of its own into the names of everything below it (`module.`, `_orig_mod.`). The functions here
give modules the names of the plain model, so that files written under these names load into a model in any wrapper.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

COMPILED = "_orig_mod"  # torch.compile's OptimizedModule, whose import would load the compiler
SHARDED = "_fsdp_wrapped_module"  # FullyShardedDataParallel
CHECKPOINTED = "_checkpoint_wrapped_module"  # torch.distributed's checkpoint_wrapper


def inside(module: nn.Module) -> nn.Module | None:
    """The module that `module` wraps; None where it is no known wrapper."""
    if isinstance(module, (DataParallel, DistributedDataParallel, AveragedModel)):
        return module.module
    for name in (COMPILED, SHARDED, CHECKPOINTED):
        if name in module._modules:
            return module._modules[name]
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside all wrappers around `module`, or `module` itself."""
    while (wrapped := inside(module)) is not None:
        module = wrapped
    return module


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` with the names of the plain model, and without the wrappers themselves."""
    seen: set[int] = set()

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrap(module)
        if id(module) not in seen:
            seen.add(id(module))
            yield path, module
            for name, child in module._modules.items():
                if child is not None:
                    yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def wrappers(model: nn.Module) -> list[nn.Module]:
    """The wrappers around `model` and within it."""
    return [module for module in model.modules() if inside(module) is not None]


def is_compiled(module: nn.Module) -> bool:
    """Whether `module` is torch.compile's wrapper around another."""
    return COMPILED in module._modules


def registers_parameters(module: nn.Module) -> bool:
    """Whether `module` is a wrapper that has listed or flattened the parameters of what it wraps."""
    return isinstance(module, DistributedDataParallel) or SHARDED in module._modules
