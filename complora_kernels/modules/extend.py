"""Adds a behaviour to a module where it stands: its class becomes a subclass, its identity and parameters stay.

This is how torch's own `fully_shard` does it: whoever holds the module holds the extended one, and `isinstance` keeps
its answers.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


class Extension(nn.Module):
    """The base of what `extend` adds: a mixin whose methods come before those of the module's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class that was made at run time has no name to be found by: it is made again from the two it came of.
        return _rebuild, type(self).__bases__, self.__dict__


def extend(module: nn.Module, extension: type[Extension]) -> None:
    """Puts the methods of `extension` before those of `module`'s class; nothing where they are there already."""
    if not isinstance(module, extension):
        module.__class__ = _extended(type(module), extension)


def own_class(module: nn.Module, extension: type[Extension]) -> type[nn.Module]:
    """The class of `module` before `extend`, also where others have subclassed it since."""
    extended = (cls.__bases__ for cls in type(module).__mro__)
    return next((bases[1] for bases in extended if len(bases) == 2 and bases[0] is extension), type(module))


@functools.cache
def _extended(cls: type[nn.Module], extension: type[Extension]) -> type[nn.Module]:
    return type(f"CompLoRA{cls.__name__}", (extension, cls), {"__module__": cls.__module__})


def _rebuild(extension: type[Extension], cls: type[nn.Module]) -> nn.Module:
    extended = _extended(cls, extension)
    return extended.__new__(extended)
