"""Adds a behaviour to a module where it stands: its class becomes a subclass, its identity and parameters stay.

This is how torch's own `fully_shard` does it: whoever holds the module holds the extended one, and `isinstance` keeps
its answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from complora_kernels.common.changes import Changes
from complora_kernels.common.tracing import Unscriptable

Hook = TypeVar("Hook", bound=Callable[..., Any])
LIBRARIES = ("torch", "open_clip", "clip")  # whose classes are known by their names
_OWN_HOOKS: list[Any] = []


class Extension(Unscriptable):
    """The base of what `extend` adds: a mixin whose methods come before those of the module's own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class that was made at run time has no name to be found by: it is made again from the two it came of.
        return _rebuild, type(self).__bases__, self.__dict__


def extend(module: nn.Module, extension: type[Extension], changes: Changes) -> None:
    """Puts the methods of `extension` before those of `module`'s class; nothing where they are there already."""
    if not isinstance(module, extension):
        changes.set_attribute(module, "__class__", extended_class(type(module), extension))


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module` before `extend`, also where others have subclassed it since."""
    extended = [cls.__bases__ for cls in type(module).__mro__]
    own = [bases[1] for bases in extended if len(bases) == 2 and issubclass(bases[0], Extension)]
    return own[-1] if own else type(module)


def is_known(cls: type, names: tuple[str, ...]) -> bool:
    """Whether a class is torch's, open_clip's or OpenAI's of such a name: a namesake may compute something else."""
    return cls.__name__ in names and cls.__module__.partition(".")[0] in LIBRARIES


def own_hook(hook: Hook) -> Hook:
    """Decorates a hook of ours, which looks at nothing but its module and what the module is given."""
    _OWN_HOOKS.append(hook)
    return hook


def is_watched(module: nn.Module) -> bool:
    """Whether somebody else hooked the call of a module, or put another forward method on it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if "forward" in vars(module):
        return True
    return any(hook not in _OWN_HOOKS for kind in hooks if kind for hook in kind.values())


_EXTENDED: dict[tuple[type, type], type[nn.Module]] = {}


def extended_class(cls: type[nn.Module], extension: type[Extension]) -> type[nn.Module]:
    """`cls` with the methods of `extension` before its own: one class, whichever thread makes it first."""
    if (cls, extension) not in _EXTENDED:
        made = type(f"CompLoRA{cls.__name__}", (extension, cls), {"__module__": cls.__module__})
        _EXTENDED.setdefault((cls, extension), made)
    return _EXTENDED[cls, extension]


def _rebuild(extension: type[Extension], cls: type[nn.Module]) -> nn.Module:
    extended = extended_class(cls, extension)
    return extended.__new__(extended)
