"""The seam for model libraries: each file here knows one, and nothing else in the package names any.

An integration is a module with the functions of `Integration`. To add a library, write such a file and list it in
`libraries`. `selection` turns a configuration into targets, the same way for every library.
"""

# The methods of a Protocol have no bodies.
# pyright: reportReturnType=false

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from complora_kernels.common.wrappers import named_modules
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


class Encoders(NamedTuple):
    """How a CLIP makes the features that it compares."""

    image: Callable[[Any], Tensor]  # a batch of images to [B, D]
    text: Callable[[Tensor], Tensor]  # tokens, int64 [N, L], to [N, D]
    logit_scale: Tensor | None  # []: the logarithm of what cosines are multiplied by


class Integration(Protocol):
    """The functions by which the package knows a library's models, or the library's part of a model."""

    @property
    def FusedBlock(self) -> type[CompLoRABlock]:
        """The extension of residual blocks whose parts are known."""

    def recognises(self, model: nn.Module) -> bool:
        """Whether `model`, in wrappers or not, is one of the library's or holds a tower of the library's."""

    def residual_blocks(self, model: nn.Module) -> Iterable[Block]:
        """The residual blocks of the towers that are the library's."""

    def targets_in(self, block: Block, names: Collection[str]) -> Iterable[Target]:
        """The modules of a residual block that hold the weights of some of q, k, v, o, fc1 and fc2.

        Raises:
            ValueError: one of these modules cannot be adapted.
        """

    def missing(self, model: nn.Module, tower: str) -> str | None:
        """Why a tower that `model` has gives no residual blocks, in words; None where it has no such tower."""

    def uncalled(self, parent: nn.Module) -> Collection[str]:
        """The names of the children whose weights `parent`, if it is plain, uses without calling them."""

    def callers(self, model: nn.Module, layers: Collection[nn.Module]) -> Iterable[tuple[nn.Module, type[Extension]]]:
        """The modules that use weights of `layers` without calling these, each with an extension that calls them."""

    def parts_of_block(self, block: nn.Module) -> BlockParts | str:
        """The parts of a residual block, or the reason why it cannot be fused."""

    def towers(self, model: nn.Module) -> Iterable[tuple[nn.Module, type[Scoped]]]:
        """The modules that run a tower when they are called, each with its scope, which knows its last block."""

    def truncation(self, model: nn.Module) -> Iterable[tuple[nn.Module, type[Extension]]]:
        """The modules to extend so that texts are truncated to the longest of their batch, each with its extension."""

    def encoders(self, model: nn.Module) -> Encoders | None:
        """The methods of a whole CLIP that make features; None where the library has none for `model`."""

    def activations(self, model: nn.Module) -> dict[str, str]:
        """The class of each tower's MLP activation: weights trained with QuickGELU mean something else with GELU."""

    def peft_modules(self, path: str, layer: CompLoRALayer) -> dict[str, str] | str:
        """The module, by its name, that PEFT adapts for each adapter of a layer, or why it cannot adapt them."""


def libraries() -> dict[str, Integration]:
    """All integrations by the names of their libraries; that of any torch module comes last."""
    # Here, because they import what is above.
    from complora_kernels.integrations import open_clip, timm, torch, torchvision, transformers

    return {
        "open_clip": open_clip,
        "timm": timm,
        "torchvision": torchvision,
        "transformers": transformers,
        "torch": torch,
    }


def find(model: nn.Module) -> list[Integration]:
    """The integrations that know `model` or a part of it, at least that of any torch module, which comes last."""
    return [library for library in libraries().values() if library.recognises(model)]


def describe(model: nn.Module) -> str:
    """The class of a model, the library that has residual blocks in it, and one of these, in words."""
    for name, library in libraries().items():
        for block in library.residual_blocks(model):
            return f"a {type(model).__name__} of {name} with residual blocks such as {block.path or 'itself'}"
    return f"a {type(model).__name__} without residual blocks that are known, of {', '.join(libraries())}"


def encoders(model: nn.Module) -> Encoders | None:
    """How `model`, in wrappers or not, makes the features that it compares; None where no library knows."""
    return next(filter(None, (library.encoders(model) for library in find(model))), None)


def activations(model: nn.Module) -> dict[str, str]:
    """The class of each tower's MLP activation, whichever library the tower is of."""
    return {tower: name for library in find(model) for tower, name in library.activations(model).items()}


def peft_modules(model: nn.Module, path: str, layer: CompLoRALayer) -> dict[str, str] | str:
    """The modules that PEFT adapts for a layer of `model`, or why it cannot, by the library that knows the most."""
    libraries = find(model)
    parent, _, name = path.rpartition(".")
    module = dict(named_modules(model))[parent]
    if any(name in library.uncalled(module) for library in libraries):
        return f"a plain {type(module).__name__} uses its weights without calling it, so PEFT's adapter has no effect"
    answers = [library.peft_modules(path, layer) for library in libraries]
    return next((answer for answer in answers if isinstance(answer, dict)), answers[0])
