"""Adds methods to a module where it stands: its class becomes a subclass, its identity and parameters stay.

This is how torch's own `fully_shard` does it: whoever holds the module holds the extended one, `isinstance` keeps its
answers, and the class keeps its name, by which some libraries save models. `type(module) is` no longer holds.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Iterable
from types import FunctionType
from typing import Any

from torch import nn

from complora_kernels.common.changes import Changes
from complora_kernels.common.tracing import Unscriptable


class Extension(Unscriptable):
    """The base of what `extend` adds: a mixin whose methods come before those of the module's own class."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Runs no `__init_subclass__` of the module's own class, which would register or refuse the extended one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, arguments, *state = super().__reduce_ex__(max(protocol, 2))
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return make, arguments, *state  # the plain class has a way of its own, and the copy is of that class
        # A class that was made at run time cannot be found by its name: it is made again from the two it came from.
        return _rebuild, type(self).__bases__, *state


def extend(module: nn.Module, extensions: Iterable[type[Extension]], changes: Changes) -> None:
    """Puts the methods of `extensions` before those of `module`'s class, where they are not there already."""
    cls = type(module)
    for extension in extensions:
        cls = cls if issubclass(cls, extension) else extended_class(cls, extension)
    changes.set_attribute(module, "__class__", cls)


def restore(module: nn.Module, changes: Changes) -> None:
    """Gives `module` the class back that it had before `extend`.

    Raises:
        ValueError: others have subclassed the extended class since, as `fully_shard` does.
    """
    cls = type(module)
    while len(cls.__bases__) == 2 and issubclass(cls.__bases__[0], Extension):
        cls = cls.__bases__[1]
    if issubclass(cls, Extension):
        raise ValueError(f"a {own_class(module).__name__} has become a {cls.__name__}, expected one that is unchanged")
    if cls is not type(module):
        changes.set_attribute(module, "__class__", cls)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of `module` before `extend`, also where others have subclassed it since."""
    return getattr(type(module), "_class_before_extension", type(module))


def class_name(module: nn.Module) -> str:
    """The name of `own_class` with that of its Python module: classes of one name may compute different things."""
    cls = own_class(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def has_user_hooks(module: nn.Module, recorders: str = "") -> bool:
    """Whether somebody hooked the call of a module, or put another forward method on it.

    Forward hooks of the Python module `recorders` do not count.
    """
    if (
        module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    ):
        return True
    hooks = module._forward_hooks
    return bool(hooks) and any(getattr(hook, "__module__", "?") != recorders for hook in hooks.values())


_EXTENDED: dict[tuple[type, type], type[nn.Module]] = {}


def extended_class(cls: type[nn.Module], extension: type[Extension]) -> type[nn.Module]:
    """`cls` with the methods of `extension` before its own: one class, whichever thread makes it first."""
    if (cls, extension) not in _EXTENDED:
        methods = {
            name: _signed_as(getattr(cls, name), method, f"{cls.__name__}.{name}")
            for base in reversed(extension.__mro__[: extension.__mro__.index(Extension)])
            for name, method in vars(base).items()
            if isinstance(method, FunctionType) and hasattr(cls, name)
        }
        names = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "_class_before_extension": getattr(cls, "_class_before_extension", cls),
        }
        _EXTENDED.setdefault((cls, extension), type(cls.__name__, (extension, cls), names | methods))
    return _EXTENDED[cls, extension]


def _signed_as(plain: Any, method: FunctionType, label: str) -> FunctionType:
    """A copy of `method` with the signature of the method that it extends.

    It has a code object and a name of its own, because torch.compile keeps and counts compiled code by them.
    """
    code = method.__code__.replace(co_name=label)
    copy = FunctionType(code, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
    copy.__kwdefaults__ = method.__kwdefaults__
    functools.update_wrapper(copy, plain, updated=())  # without torch.compile's marks on the plain method
    return copy


def _rebuild(extension: type[Extension], cls: type[nn.Module]) -> nn.Module:
    extended = extended_class(cls, extension)
    return extended.__new__(extended)
