"""Calls that fail at a chosen place, and checks that files and models are as they were."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


def failing(patch: pytest.MonkeyPatch, owner: Any, name: str, failures: Collection[int], error: BaseException) -> None:
    """Lets the calls of `owner.name` whose numbers, from 0, are in `failures` raise `error`."""
    original, numbers = getattr(owner, name), iter(range(10**6))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(numbers) in failures:
            raise error
        return original(*arguments, **options)

    patch.setattr(owner, name, call)


def contents(directory: Path) -> dict[str, bytes | None]:
    """Every file below a folder, and None for every folder."""
    paths = sorted(directory.rglob("*"))
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in paths}


class Unchanged:
    """Asserts that a model is, after a call that failed, bit for bit and module for module what it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def _parts(self) -> tuple[list[Any], list[Any], list[Any]]:
        modules = [(name, type(module), id(module)) for name, module in self.model.named_modules()]
        hooks = [(*module._forward_pre_hooks, *module._forward_hooks) for module in self.model.modules()]
        parameters = [(name, id(value), value.requires_grad) for name, value in self.model.named_parameters()]
        return modules, hooks, parameters

    def __enter__(self) -> None:
        self.parts = self._parts()
        self.state = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.bases = {name: id(buffer) for name, buffer in self.model.named_buffers()}

    def __exit__(self, *_: object) -> None:
        assert self._parts() == self.parts
        assert {name: id(buffer) for name, buffer in self.model.named_buffers()} == self.bases
        state = self.model.state_dict()
        assert state.keys() == self.state.keys()
        assert all(torch.equal(state[name], value) for name, value in self.state.items())


def refusal(model: nn.Module, load: Callable[[], object]) -> str | None:
    """The message of the ValueError with which `load` left the model as it was; None where it loaded."""
    unchanged = Unchanged(model)
    unchanged.__enter__()
    try:
        load()
    except ValueError as error:
        unchanged.__exit__()
        return str(error)
    return None
