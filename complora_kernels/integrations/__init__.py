"""The seam for model libraries: each file here knows one, and nothing else in the package names any.

An integration is a module with the functions of `Integration`. To add a library, write such a file and list it in
`find`.
"""

# The methods of a Protocol have no bodies.
# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, Protocol

from torch import nn

from complora_kernels.config import CompLoRAConfig
from complora_kernels.modules.block import BlockParts, CompLoRABlock
from complora_kernels.modules.extend import Extension
from complora_kernels.modules.forward_scope import Scoped
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.protected import WeightRows


class Block(NamedTuple):
    """A residual block of a tower."""

    path: str
    module: nn.Module
    tower: str  # "image" or "text"
    layer: int


class Target(NamedTuple):
    """A plain module to adapt."""

    path: str
    module: nn.Module
    weights: dict[str, WeightRows]  # the place of each adapter's frozen weight, by the adapter's name
    adapt: Callable[..., CompLoRALayer]  # called (module, config, path=path): makes the layer, changes nothing


class Integration(Protocol):
    """The functions by which the package knows a library's models."""

    @property
    def FusedBlock(self) -> type[CompLoRABlock]:
        """The extension of residual blocks whose parts are known."""

    def recognises(self, model: nn.Module) -> bool:
        """Whether `model`, in wrappers or not, is one of the library's."""

    def targets(self, model: nn.Module, config: CompLoRAConfig, paths: Collection[str] | None = None) -> list[Target]:
        """The modules that `config` selects, perhaps twice; given `paths`, a regular expression's matches among them.

        Raises:
            ValueError: nothing is selected, or a module cannot be adapted.
        """

    def residual_blocks(self, model: nn.Module) -> Iterable[Block]:
        """The residual blocks of the image and the text tower."""

    def parts_of_block(self, block: nn.Module) -> BlockParts | str:
        """The parts of a residual block, or the reason why it cannot be fused."""

    def towers(self, model: nn.Module) -> Iterable[tuple[nn.Module, type[Scoped]]]:
        """The modules that run a tower when they are called, each with its scope, which knows its last block."""

    def truncation(self, model: nn.Module) -> Iterable[tuple[nn.Module, type[Extension]]]:
        """The modules to extend so that texts are truncated to the longest of their batch, each with its extension."""

    def activations(self, model: nn.Module) -> dict[str, str]:
        """The class of each tower's MLP activation: weights trained with QuickGELU mean something else with GELU."""

    def peft_modules(self, path: str, layer: CompLoRALayer) -> dict[str, str] | str:
        """The module, by its name, that PEFT adapts for each adapter of a layer, or why it cannot adapt them."""


def find(model: nn.Module) -> Integration:
    """The integration that knows `model`; for a model of no known library that of any torch module."""
    from complora_kernels.integrations import open_clip, torch  # here, because they import what is above

    libraries: tuple[Integration, ...] = (open_clip,)
    return next((library for library in libraries if library.recognises(model)), torch)
