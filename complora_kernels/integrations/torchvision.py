"""The ViTs of torchvision, alone or in a model, and what of its other models must not be adapted."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from complora_kernels.common.wrappers import named_modules, unwrap
from complora_kernels.config import ATTENTION_TARGETS
from complora_kernels.integrations import Block, Target
from complora_kernels.integrations.parts import activation_of, is_identity, parts_of_multihead, wrong_linear, wrong_norm
from complora_kernels.integrations.torch import attention_target, linear_target
from complora_kernels.integrations.torch import encoders as encoders  # what it says holds here too
from complora_kernels.integrations.torch import peft_modules as peft_modules
from complora_kernels.modules.block import BlockParts, CompLoRABlock
from complora_kernels.modules.extend import Extension, has_user_hooks, own_class
from complora_kernels.modules.forward_scope import LastBlock, Reading, Scoped

PACKAGES = ("torch", "torchvision")
MLP = {"fc1": "mlp.0", "fc2": "mlp.3"}


def recognises(model: nn.Module) -> bool:
    return any(own_class(module).__module__.partition(".")[0] == "torchvision" for module in model.modules())


def _is(module: nn.Module, name: str) -> bool:
    cls = own_class(module)
    return f"{cls.__module__}.{cls.__qualname__}" == f"torchvision.models.{name}"


# ---- what is adapted


def residual_blocks(model: nn.Module) -> Iterator[Block]:
    blocks = ((path, each) for path, each in named_modules(model) if _is(each, "vision_transformer.EncoderBlock"))
    for layer, (path, module) in enumerate(blocks):
        yield Block(path, module, "image", layer)


def targets_in(block: Block, names: Collection[str]) -> Iterator[Target]:
    prefix = f"{block.path}." if block.path else ""
    projections = [name for name in ATTENTION_TARGETS if name in names]
    if projections:
        attention = unwrap(block.module.get_submodule("self_attention"))
        yield attention_target(f"{prefix}self_attention", attention, projections)
    for name, path in MLP.items():
        if name in names:
            yield linear_target(f"{prefix}{path}", unwrap(block.module.get_submodule(path)))


def missing(model: nn.Module, tower: str) -> str | None:
    return None


def uncalled(parent: nn.Module) -> Collection[str]:
    """Those of Swin's attention, which hands their weights to a function."""
    names = ("swin_transformer.ShiftedWindowAttention", "swin_transformer.ShiftedWindowAttentionV2")
    return ("qkv", "proj") if any(_is(parent, name) for name in names) else ()


def callers(model: nn.Module, layers: Collection[nn.Module]) -> list[tuple[nn.Module, type[Extension]]]:
    return []


def activations(model: nn.Module) -> dict[str, str]:
    return {block.tower: type(block.module.get_submodule("mlp.1")).__name__ for block in residual_blocks(model)}


# ---- towers


class ImageTower(Scoped):
    """A ViT, which reads its feature at the class token: its last block computes no other position.

    What is said of it in open_clip's image tower holds here too.
    """

    def _reading_of_scope(self) -> Reading | None:
        last = None if torch.compiler.is_compiling() else _last_block(self)
        return None if last is None else Reading(last.alone)


def _last_block(tower: Any) -> LastBlock | None:
    encoder = tower.encoder
    blocks = encoder.layers
    if not _is(encoder, "vision_transformer.Encoder") or has_user_hooks(encoder) or type(blocks) is not nn.Sequential:
        return None
    last = blocks[-1]
    if type(encoder.ln) is not nn.LayerNorm or sum(block is last for block in blocks) != 1:
        return None
    return LastBlock(last, blocks, encoder.ln) if isinstance(last, CompLoRABlock) else None


def towers(model: nn.Module) -> list[tuple[nn.Module, type[Scoped]]]:
    name = "vision_transformer.VisionTransformer"
    return [(module, ImageTower) for _, module in named_modules(model) if _is(module, name)]


def truncation(model: nn.Module) -> list[tuple[nn.Module, type[Extension]]]:
    return []


# ---- residual blocks


class FusedBlock(CompLoRABlock):
    """An `EncoderBlock`."""

    def parts(self) -> BlockParts | str:
        return parts_of_block(self)

    def forward(
        self,
        input: Tensor,  # [N, L, d]
    ) -> Tensor:  # [N, L, d]; [N, 1, d] where the first position alone is read
        y = self.run_fused(input, None)
        return super().forward(input) if y is None else y


def parts_of_block(block: nn.Module) -> BlockParts | str:
    parts: dict[str, Any] = block._modules
    mlp = parts["mlp"]
    if not _is(mlp, "vision_transformer.MLPBlock") or list(mlp._modules) != ["0", "1", "2", "3", "4"]:
        return f"mlp is a {type(mlp).__name__} of {', '.join(mlp._modules)}, expected an MLPBlock of 0 to 4"
    fc1, act, drop1, fc2, drop2 = mlp._modules.values()
    for name, part in (("dropout", parts["dropout"]), ("mlp.2", drop1), ("mlp.4", drop2)):
        if not is_identity(part):
            return f"{name} is {part}, expected p=0"
    wrong = (
        wrong_norm("ln_1", parts["ln_1"], PACKAGES)
        or wrong_norm("ln_2", parts["ln_2"], PACKAGES)
        or wrong_linear("mlp.0", fc1)
        or wrong_linear("mlp.3", fc2)
    )
    attention = wrong or parts_of_multihead("self_attention", parts["self_attention"])
    if isinstance(attention, str):
        return attention
    activation = activation_of(act, PACKAGES)
    if activation is None:
        return f"mlp.1 is {act}, expected GELU or QuickGELU"
    return BlockParts(parts["ln_1"], attention, parts["ln_2"], fc1, activation, fc2)
