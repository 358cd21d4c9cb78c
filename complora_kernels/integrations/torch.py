"""Any torch module: its `nn.Linear` and `nn.MultiheadAttention` can be adapted, by words in torch's transformer layers.

In evaluation `nn.TransformerEncoderLayer` and `nn.TransformerEncoder` have a fast path that reads the weights of their
children; it is switched off where one of these is adapted.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from complora_kernels.common.wrappers import named_modules, unwrap
from complora_kernels.config import ATTENTION_TARGETS
from complora_kernels.integrations import Block, Encoders, Target
from complora_kernels.integrations.parts import (
    activation_of,
    is_identity,
    parts_of_multihead,
    wrong_linear,
    wrong_norm,
)
from complora_kernels.modules.attention import (
    CompLoRAMultiheadAttention,
    projection_rows,
)
from complora_kernels.modules.block import BlockParts, CompLoRABlock
from complora_kernels.modules.extend import Extension, own_class
from complora_kernels.modules.forward_scope import Scoped
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.linear import CompLoRALinear
from complora_kernels.modules.packed import CompLoRAPackedLinear, packed_rows
from complora_kernels.modules.protected import WeightRows

BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


def recognises(model: nn.Module) -> bool:
    return True


# ---- what is adapted


def residual_blocks(model: nn.Module) -> Iterator[Block]:
    """Torch's transformer layers, which the package takes for a text tower: torch does not say what they read."""
    blocks = ((path, module) for path, module in named_modules(model) if isinstance(module, BLOCKS))
    for layer, (path, module) in enumerate(blocks):
        yield Block(path, module, "text", layer)


def targets_in(block: Block, names: Collection[str]) -> Iterator[Target]:
    prefix = f"{block.path}." if block.path else ""
    projections = [name for name in ATTENTION_TARGETS if name in names]
    for name in ("self_attn", "multihead_attn") if projections else ():
        if name in block.module._modules:
            yield attention_target(f"{prefix}{name}", unwrap(block.module.get_submodule(name)), projections)
    for target, name in (("fc1", "linear1"), ("fc2", "linear2")):
        if target in names:
            yield linear_target(f"{prefix}{name}", unwrap(block.module.get_submodule(name)))


def linear_target(path: str, module: nn.Module) -> Target:
    """A target that becomes a `CompLoRALinear`."""
    rows = module.out_features if isinstance(module, nn.Linear) else 0  # another class is refused when it is adapted
    return Target(path, module, {"": WeightRows("weight", 0, rows)}, CompLoRALinear.from_linear)


def packed_target(path: str, module: nn.Module, names: Collection[str]) -> Target:
    """A target whose output is q, k and v side by side, and which becomes a `CompLoRAPackedLinear`."""
    rows = packed_rows("weight", module.out_features // 3) if isinstance(module, nn.Linear) else {}
    adapt = functools.partial(CompLoRAPackedLinear.from_linear, names=names)
    return Target(path, module, {name: where for name, where in rows.items() if name in names}, adapt)


def attention_target(
    path: str, module: nn.Module, names: Collection[str], cls: type[Any] = CompLoRAMultiheadAttention
) -> Target:
    """A target with `in_proj_weight` and `out_proj`, which becomes the adapted attention `cls`."""
    rows = {name: where for name, where in projection_rows(module).items() if name in names}
    return Target(path, module, rows, functools.partial(cls.from_attention, names=names))


def attention_targets(model: nn.Module) -> Iterator[Target]:
    """Every plain `nn.MultiheadAttention` of a model whose q, k and v are packed, with all adapters."""
    for path, module in named_modules(model):
        if type(module) is nn.MultiheadAttention and not isinstance(parts_of_multihead(path, module), str):
            yield attention_target(path, module, ATTENTION_TARGETS)


def missing(model: nn.Module, tower: str) -> str | None:
    return None


def encoders(model: nn.Module) -> Encoders | None:
    """The methods that CLIP was published with, whatever library a model with them is of."""
    clip: Any = unwrap(model)
    if not all(callable(getattr(clip, name, None)) for name in ("encode_image", "encode_text")):
        return None
    scale = getattr(clip, "logit_scale", None)
    # Looked up by each call: an adapter that is added later may extend the model's class.
    return Encoders(lambda images: clip.encode_image(images), lambda tokens: clip.encode_text(tokens), scale)


def uncalled(parent: nn.Module) -> Collection[str]:
    """Those of torch's attention, and of its encoder layer, which reads them in evaluation."""
    return parent._modules if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)) else ()


class SlowLayer(Extension):
    """An `nn.TransformerEncoderLayer` that calls its parts in evaluation too."""

    @property
    def activation_relu_or_gelu(self) -> int:
        return 0  # an activation for which there is no fast path


class SlowEncoder(Extension):
    """An `nn.TransformerEncoder` that gives its layers padded tensors and no nested ones."""

    @property
    def use_nested_tensor(self) -> bool:
        return False


def callers(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[tuple[nn.Module, type[Extension]]]:
    slow = {nn.TransformerEncoderLayer: SlowLayer, nn.TransformerEncoder: SlowEncoder}
    for module in model.modules():
        for cls, extension in slow.items():
            if isinstance(module, cls) and any(part in layers for part in module.modules()):
                yield module, extension


def activations(model: nn.Module) -> dict[str, str]:
    blocks: list[Any] = [block.module for block in residual_blocks(model)]
    return {"text": _activation_name(blocks[-1].activation)} if blocks else {}


def _activation_name(activation: Any) -> str:
    return getattr(activation, "__name__", type(activation).__name__)


def peft_modules(path: str, layer: CompLoRALayer) -> dict[str, str] | str:
    if isinstance(layer, (CompLoRALinear, CompLoRAPackedLinear)):
        return dict.fromkeys(layer.weights, path)
    if isinstance(layer, CompLoRAMultiheadAttention) and "o" not in layer.weights:
        return dict.fromkeys(layer.weights, path)  # one adapter for the whole module
    if isinstance(layer, CompLoRAMultiheadAttention):
        return (
            "o is adapted, expected q, k, v alone: PEFT adds the update of an nn.MultiheadAttention's output "
            "projection twice (https://github.com/huggingface/peft/pull/3774)"
        )
    return f"a {type(layer).__name__} has no modules of its own for its adapters"


# ---- towers


def towers(model: nn.Module) -> list[tuple[nn.Module, type[Scoped]]]:
    stacks = (nn.TransformerEncoder, nn.TransformerDecoder)
    return [(module, Scoped) for module in model.modules() if isinstance(module, stacks)]


def truncation(model: nn.Module) -> list[tuple[nn.Module, type[Extension]]]:
    return []


# ---- residual blocks


class FusedBlock(CompLoRABlock):
    """An `nn.TransformerEncoderLayer` with its norms first; with a padding mask it runs its own forward pass."""

    def parts(self) -> BlockParts | str:
        return parts_of_block(self)

    def forward(
        self,
        src: Tensor,  # [N, L, d], or [L, N, d] as the attention takes it
        src_mask: Tensor | None = None,  # [L, L] or [N · heads, L, L]; True, or -inf, leaves a pair out
        src_key_padding_mask: Tensor | None = None,  # [N, L]
        is_causal: bool = False,
    ) -> Tensor:  # shaped as src
        y = None if src_key_padding_mask is not None or src.is_nested else self.run_fused(src, src_mask)
        return super().forward(src, src_mask, src_key_padding_mask, is_causal) if y is None else y


def parts_of_block(block: nn.Module) -> BlockParts | str:
    cls, layer = own_class(block), block
    if not isinstance(layer, nn.TransformerEncoderLayer) or cls is not nn.TransformerEncoderLayer:
        return f"it is a {cls.__module__}.{cls.__name__}, expected an nn.TransformerEncoderLayer"
    if not layer.norm_first:
        return "norm_first=False, expected norms that come first"
    if {"_sa_block", "_ff_block"} & vars(layer).keys():
        return "it has methods of its own, expected those of its class"
    for name in ("dropout", "dropout1", "dropout2"):
        if not is_identity(layer._modules.get(name)):
            return f"{name} is {layer._modules[name]}, expected p=0"
    activation = "gelu" if layer.activation is F.gelu else activation_of(layer.activation, ("torch",))
    wrong = (
        wrong_norm("norm1", layer.norm1, ("torch",))
        or wrong_norm("norm2", layer.norm2, ("torch",))
        or wrong_linear("linear1", layer.linear1, called=False)
        or wrong_linear("linear2", layer.linear2, called=False)
        or (None if activation else f"activation is {layer.activation}, expected GELU")
    )
    attention = wrong or parts_of_multihead("self_attn", layer.self_attn)
    if isinstance(attention, str):
        return attention
    assert activation is not None
    return BlockParts(layer.norm1, attention, layer.norm2, layer.linear1, activation, layer.linear2)
