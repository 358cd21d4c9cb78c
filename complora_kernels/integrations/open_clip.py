"""The models of open_clip, and the towers of OpenAI's package: by what their modules have and not by their version.

A residual block has `attn`, `mlp.c_fc` and `mlp.c_proj`; the image tower is what lies below `visual`, the text tower
what lies in `transformer`, `text` or CoCa's `text_decoder`. This covers ViT CLIP models (quickgelu or not),
`CustomTextCLIP`, CoCa, and each tower alone: an image tower is known by its `conv1`.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from complora_kernels.common.wrappers import named_modules, unwrap
from complora_kernels.config import ATTENTION_TARGETS, MLP_TARGETS, CompLoRAConfig
from complora_kernels.integrations import Block, Target
from complora_kernels.integrations.parts import (
    NORMS,
    activation_of,
    is_identity,
    is_of,
    parts_of_multihead,
    wrong_linear,
    wrong_norm,
)
from complora_kernels.integrations.torch import attention_target, linear_target
from complora_kernels.integrations.torch import encoders as encoders  # what it says holds here too
from complora_kernels.integrations.torch import peft_modules as peft_modules_of_torch
from complora_kernels.modules.attention import CompLoRAAttentionLayer, CompLoRAMultiheadAttention, projection_rows
from complora_kernels.modules.block import AttentionParts, BlockParts, CompLoRABlock, Projection
from complora_kernels.modules.extend import Extension, class_name, own_class
from complora_kernels.modules.forward_scope import LastBlock, Reading, Scoped, run_in_scope
from complora_kernels.modules.layer import CompLoRALayer, clone_as
from complora_kernels.modules.masks import known_causal
from complora_kernels.modules.truncation import TextTower, reading_of_texts

PACKAGES = ("torch", "open_clip", "clip")  # classes of these packages are known by their names
PARTS = {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"}
TOWERS = {"visual": "image", "transformer": "text", "text": "text", "text_decoder": "text"}


def recognises(model: nn.Module) -> bool:
    return any(True for _ in residual_blocks(model))


# ---- what is adapted


def residual_blocks(model: nn.Module) -> Iterator[Block]:
    """The blocks, counted through each tower: those of CoCa's decoder come last, its cross attention after the rest."""
    towers = {"transformer": "image"} if _is_image_tower(model) else TOWERS
    layers: Counter[str] = Counter()
    for path, module in named_modules(model):
        tower = towers.get(_root(path))
        mlp = getattr(module, "mlp", None)
        if tower and hasattr(module, "attn") and hasattr(mlp, "c_fc") and hasattr(mlp, "c_proj"):
            yield Block(path, module, tower, layers[tower])
            layers[tower] += 1


def _is_image_tower(model: nn.Module) -> bool:
    return hasattr(unwrap(model), "conv1")


def targets_in(block: Block, names: Collection[str]) -> Iterator[Target]:
    projections = [name for name in ATTENTION_TARGETS if name in names]
    if projections:
        path, attention = f"{block.path}.attn", unwrap(block.module.get_submodule("attn"))
        if not isinstance(attention, nn.MultiheadAttention) and not CompLoRAAttention.recognises(attention):
            raise ValueError(
                f"{path} is a {class_name(attention)}, which cannot be adapted: "
                "expected nn.MultiheadAttention or the attention of open_clip 4"
            )
        cls = CompLoRAMultiheadAttention if isinstance(attention, nn.MultiheadAttention) else CompLoRAAttention
        yield attention_target(path, attention, projections, cls)
    for target, name in zip(MLP_TARGETS, ("mlp.c_fc", "mlp.c_proj"), strict=True):
        if target in names:
            yield linear_target(f"{block.path}.{name}", unwrap(block.module.get_submodule(name)))


def missing(model: nn.Module, tower: str) -> str | None:
    model = unwrap(model)
    if _is_image_tower(model):
        return None
    if tower == "text":
        known = any(hasattr(model, name) for name in ("transformer", "text"))
        return "its text tower has no residual blocks (attn, mlp.c_fc, mlp.c_proj)" if known else None
    visual = getattr(model, "visual", None)
    if visual is None:
        return None
    if hasattr(visual, "attnpool"):
        return (
            f"visual is a {type(visual).__name__} and its attention pool visual.attnpool "
            f"({type(visual.attnpool).__name__}) uses q_proj, k_proj and v_proj without calling them, so an "
            "adapter there would have no effect"
        )
    return f"visual is a {type(visual).__name__} without residual blocks (attn, mlp.c_fc, mlp.c_proj)"


def uncalled(parent: nn.Module) -> Collection[str]:
    return parent._modules if type(parent).__name__ == "AttentionPool2d" else ()


def callers(model: nn.Module, layers: Collection[nn.Module]) -> list[tuple[nn.Module, type[Extension]]]:
    return []


def _root(path: str) -> str:
    return path.partition(".")[0]


def activations(model: nn.Module) -> dict[str, str]:
    return {
        block.tower: type(activation).__name__
        for block in residual_blocks(model)
        if (activation := getattr(block.module.get_submodule("mlp"), "gelu", None)) is not None
    }


def peft_modules(path: str, layer: CompLoRALayer) -> dict[str, str] | str:
    if not isinstance(layer, CompLoRAAttention):
        return peft_modules_of_torch(path, layer)
    inputs = [name for name in ("q", "k", "v") if name in layer.weights]
    if inputs:
        return (
            f"{', '.join(inputs)} are adapted, expected an nn.MultiheadAttention: this attention keeps q, k and v "
            "in one parameter, for which PEFT has no module"
        )
    return {"o": f"{path}.out_proj"}


# ---- towers


class ImageTower(Scoped):
    """An image tower. Where it reads its feature at the class token, its last block computes no other position.

    Features and gradients are the same up to rounding; with dropout the masks are drawn for other shapes, so that they
    are equal in distribution only. All positions are computed under torch.compile, where the transformer's own
    activation checkpointing is on, and where somebody hooked the last block, the transformer or the norm behind it.
    """

    def _reading_of_scope(self) -> Reading | None:
        last = None if torch.compiler.is_compiling() else last_image_block(self)
        return None if last is None else Reading(last.alone)


class TextModel(Extension):
    """`encode_text` without the positions after the longest text of the batch, in steps of 8.

    The last block computes the position alone that the feature of a text is read at.

    Features and gradients are those of the whole context, up to rounding; with dropout the masks are drawn for other
    shapes, so that they are equal in distribution only. Hooks inside the tower see the shorter tensors. The whole
    context is computed under torch.compile and wherever truncation is not known to be exact.
    """

    def encode_text(self, text: Tensor, *args: Any, **kwargs: Any) -> Any:  # [N, L] to [N, D]
        plain: Any = super()
        if torch.compiler.is_compiling():
            return plain.encode_text(text, *args, **kwargs)
        return run_in_scope({}, reading_of_texts(text_tower(self), text), plain.encode_text, text, *args, **kwargs)


class TextModel4(TextModel):
    """For the models of open_clip 4, whose `forward` calls `_encode_text`."""

    def _encode_text(self, text: Tensor, *args: Any, **kwargs: Any) -> Any:  # [N, L] to [N, D]
        plain: Any = super()
        if torch.compiler.is_compiling():
            return plain._encode_text(text, *args, **kwargs)
        return run_in_scope({}, reading_of_texts(text_tower(self), text), plain._encode_text, text, *args, **kwargs)


class TextTransformer(Extension):
    """`TextModel` for a text tower alone, which is called with the texts."""

    def forward(self, text: Tensor, *args: Any, **kwargs: Any) -> Any:  # [N, L] to [N, D]
        plain: Any = super()
        if torch.compiler.is_compiling():
            return plain.forward(text, *args, **kwargs)
        return run_in_scope({}, reading_of_texts(text_tower(self), text), plain.forward, text, *args, **kwargs)


def towers(model: nn.Module) -> list[tuple[nn.Module, type[Scoped]]]:
    if _is_image_tower(model):
        return [(unwrap(model), ImageTower)]
    modules = dict(named_modules(model))
    roots = dict.fromkeys(_root(block.path) for block in residual_blocks(model))
    return [(modules[root], ImageTower if root == "visual" else Scoped) for root in roots]


def truncation(model: nn.Module) -> list[tuple[nn.Module, type[Extension]]]:
    model = unwrap(model)
    tower = text_tower(model)
    if tower is None:
        return []
    if not hasattr(model, "encode_text"):
        extension: type[Extension] = TextTransformer
    else:
        extension = TextModel4 if hasattr(model, "_encode_text") else TextModel
    return [(model, extension), (unwrap(tower.transformer), Scoped)]


def text_tower(model: nn.Module) -> TextTower | None:
    """The text tower of a model that reads a text's feature where the text ends, under a mask over its context.

    None where it is read elsewhere or every position is handed on (`pool_type`, CoCa's class token, `output_tokens`),
    and for classes that are not open_clip's own, where either may be, OpenAI's among them: their blocks keep the mask.
    """
    is_clip = is_of(own_class(model), PACKAGES, ("CLIP", "CustomTextCLIP"))
    if is_clip and hasattr(model, "text_pool_type"):
        holder, pool_type, eos_id = model, model.text_pool_type, getattr(model, "text_eos_id", None)
    else:
        holder = getattr(model, "text", None) if is_clip else model
        pool_type, eos_id = getattr(holder, "pool_type", None), getattr(holder, "eos_id", None)
        if not isinstance(holder, nn.Module) or not is_of(own_class(holder), PACKAGES, ("TextTransformer",)):
            return None
    transformer, mask = getattr(holder, "transformer", None), getattr(holder, "attn_mask", None)
    if not isinstance(transformer, nn.Module) or not isinstance(mask, Tensor):
        return None
    if getattr(holder, "cls_emb", None) is not None or getattr(holder, "output_tokens", False):
        return None
    last = _last_block(transformer, getattr(holder, "ln_final", None))
    if pool_type == "argmax":
        return TextTower(transformer, mask, None, last)
    return TextTower(transformer, mask, eos_id, last) if pool_type == "eos" and isinstance(eos_id, int) else None


def last_image_block(visual: nn.Module) -> LastBlock | None:
    """The last block of an image tower that reads its feature at the class token.

    None where it reads other tokens too, or hands them on (`pool_type`, an attention pool, `output_tokens`), and for a
    class or methods that are not open_clip's own, where either may be.
    """
    methods = {"_embeds", "_pool", "_global_pool"} & vars(visual).keys()
    if methods or not is_of(own_class(visual), PACKAGES, ("VisionTransformer",)):
        return None
    is_openai = own_class(visual).__module__.partition(".")[0] == "clip"
    pool_type = getattr(visual, "pool_type", "tok" if is_openai else None)
    if pool_type != "tok" or getattr(visual, "attn_pool", None) is not None:
        return None
    if getattr(visual, "output_tokens", False):
        return None
    return _last_block(getattr(visual, "transformer", None), getattr(visual, "ln_post", None))


def _last_block(transformer: Any, norm: Any) -> LastBlock | None:
    """The last block between a known transformer and a known norm, where it is fused and run once."""
    if not isinstance(transformer, nn.Module) or not is_of(own_class(transformer), PACKAGES, ("Transformer",)):
        return None
    if not is_of(type(norm), PACKAGES, (*NORMS, "Identity")):
        return None
    if getattr(transformer, "grad_checkpointing", False):  # the block would run again by itself, without a scope
        return None
    blocks: list[nn.Module] = list(transformer.get_submodule("resblocks"))  # pyright: ignore[reportArgumentType]
    if sum(block is blocks[-1] for block in blocks) != 1 or not isinstance(blocks[-1], CompLoRABlock):
        return None
    return LastBlock(blocks[-1], transformer, norm)


# ---- residual blocks


class FusedBlock(CompLoRABlock):
    """A `ResidualAttentionBlock`; cross attention runs its own forward pass."""

    def parts(self) -> BlockParts | str:
        return parts_of_block(self)

    def forward(
        self,
        q_x: Tensor,  # [N, L, d], or [L, N, d] as the attention takes it
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,  # [L, L] or [N · heads, L, L]
    ) -> Tensor:  # shaped as q_x; [N, 1, d], or [1, N, d], where the first position alone is read
        if k_x is None and v_x is None:
            mask = getattr(self, "attn_mask", None) if attn_mask is None else attn_mask  # OpenAI's block keeps its own
            if mask is not None and not mask.is_floating_point():
                mask = mask.to(q_x.dtype)  # this block adds truth values too
            y = self.run_fused(q_x, mask)
            if y is not None:
                return y
        others = (k_x, v_x, attn_mask)
        return super().forward(q_x, *others) if any(other is not None for other in others) else super().forward(q_x)


def parts_of_block(block: nn.Module) -> BlockParts | str:
    cls = own_class(block)
    if not is_of(cls, PACKAGES, ("ResidualAttentionBlock",)):
        return f"it is a {cls.__module__}.{cls.__name__}, expected a ResidualAttentionBlock of open_clip"
    if "attention" in vars(block):
        return "it has an attention method of its own, expected that of its class"
    parts: dict[str, Any] = {name: part for name, part in block._modules.items() if part is not None}
    identities = {"ls_1", "ls_2"} - parts.keys()
    if parts.keys() | identities != PARTS:
        return f"it consists of {', '.join(parts)}, expected {', '.join(sorted(PARTS - identities))}"
    for name in ("ls_1", "ls_2"):
        if name in parts and not isinstance(parts[name], nn.Identity):
            return f"{name} is a {type(parts[name]).__name__}, expected nn.Identity"
    mlp = parts["mlp"]
    if not isinstance(mlp, nn.Sequential) or list(mlp._modules) != ["c_fc", "gelu", "c_proj"]:
        return f"mlp consists of {', '.join(mlp._modules)}, expected a Sequential of c_fc, gelu, c_proj"
    fc1, gelu, fc2 = mlp._modules.values()
    wrong = (
        wrong_norm("ln_1", parts["ln_1"], PACKAGES)
        or wrong_norm("ln_2", parts["ln_2"], PACKAGES)
        or wrong_linear("mlp.c_fc", fc1)
        or wrong_linear("mlp.c_proj", fc2)
    )
    attention = wrong or _parts_of_attention(parts["attn"])
    if isinstance(attention, str):
        return attention
    activation = activation_of(gelu, PACKAGES)
    if activation is None:
        return f"mlp.gelu is {gelu}, expected GELU or QuickGELU"
    return BlockParts(parts["ln_1"], attention, parts["ln_2"], fc1, activation, fc2)  # pyright: ignore[reportArgumentType]


def _parts_of_attention(attn: Any) -> AttentionParts | str:
    if isinstance(attn, nn.MultiheadAttention):
        return parts_of_multihead("attn", attn)
    if type(attn) is not CompLoRAAttention and not CompLoRAAttention.recognises(attn):
        return f"attn is a {type(attn).__name__}, expected nn.MultiheadAttention or the attention of open_clip 4"
    if attn.in_proj_weight is None:
        return "attn projects keys or values of other sizes, expected plain self-attention"
    wrong = wrong_linear("attn.out_proj", attn.out_proj)
    if wrong is not None:
        return wrong
    for name in ("ln_q", "ln_k", "ln_inner", "out_drop"):
        if not is_identity(getattr(attn, name)):
            return f"attn.{name} is {getattr(attn, name)}, expected nn.Identity"
    if attn.head_scale is not None or getattr(attn, "logit_scale", None) is not None:
        return "attn scales its heads or its cosines, expected scaled dot-product attention"
    packed = Projection("qkv", attn, attn.in_proj_weight, attn.in_proj_bias)
    project_out = getattr(attn, "project_out", attn.out_proj)
    dropout_p = attn.attn_drop.p if attn.training else 0.0
    return AttentionParts((packed,), attn.out_proj, project_out, attn.num_heads, False, attn.scale, dropout_p)


class CompLoRAAttention(CompLoRAAttentionLayer):
    """The attention of open_clip 4, which is called `attn(x, k_x, v_x, attn_mask)`, with adapters on q, k, v, o.

    It is recognised by what it has: `in_proj_weight` [3d, d], `out_proj`, `num_heads`, optional norms of q and k
    (`ln_q`, `ln_k`) and of the result (`ln_inner`), `head_scale`, `attn_drop`, `out_drop`. It returns a tensor. Make it
    with `from_attention`.
    """

    scale: float
    ln_q: nn.Module
    ln_k: nn.Module
    ln_inner: nn.Module
    attn_drop: nn.Dropout
    out_drop: nn.Module
    head_scale: Tensor | None

    _ATTRIBUTES = ("scale", "ln_q", "ln_k", "ln_inner", "attn_drop", "out_drop", "head_scale", "num_heads", "out_proj")

    @classmethod
    def recognises(cls, module: nn.Module) -> bool:
        """Whether `module` has the parts and the call that this class knows."""
        return all(hasattr(module, name) for name in cls._ATTRIBUTES) and {"k_x", "v_x", "attn_mask"} <= set(
            inspect.signature(module.forward).parameters
        )

    @classmethod
    def from_attention(
        cls, attention: nn.Module, config: CompLoRAConfig, *, names: Collection[str] | None = None, path: str = ""
    ) -> CompLoRAAttention:
        """Adapts `attention`: the result shares its parameters, submodules and hooks; `attention` stays as it was.

        Raises:
            ValueError: as `CompLoRAMultiheadAttention.from_attention`, and for scaled cosine attention.
            TypeError: not such a module.
        """
        label = path or "attention"
        if not cls.recognises(attention):
            raise TypeError(f"{label} is a {type(attention).__name__}, expected the attention of open_clip 4")
        if getattr(attention, "in_proj_weight", None) is None:
            raise ValueError(f"{label} projects inputs of other sizes (kdim or vdim), expected kdim == vdim == dim")
        if getattr(attention, "logit_scale", None) is not None:
            raise ValueError(f"{label} uses scaled cosine attention, expected scaled dot-product attention")
        layer = clone_as(attention, cls)
        layer._adapt(config, names, projection_rows(attention), path)
        return layer

    def forward(
        self,
        x: Tensor,  # [N, L, d]
        k_x: Tensor | None = None,  # [N, S, d]
        v_x: Tensor | None = None,  # [N, S, d]
        attn_mask: Tensor | None = None,  # [L, S] or [N · heads, L, S]; False, or -inf, leaves a pair out
    ) -> Tensor:  # [N, L, d]
        key = x if k_x is None else k_x
        value = x if v_x is None else v_x
        projected = self._project_qkv(x, key, value)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in projected)
        q, k = self.ln_q(q), self.ln_k(k)  # [N, heads, L or S, d / heads]
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(q.shape[0], self.num_heads, q.shape[-2], k.shape[-2])
        causal = False
        if attn_mask is not None and attn_mask.is_floating_point():
            causal = known_causal(attn_mask, q.shape[-2], k.shape[-2])
            attn_mask = attn_mask.to(q.dtype)
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if causal else attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=causal,
            scale=self.scale,
        )
        if self.head_scale is not None:
            mixed = mixed * self.head_scale
        return self.out_drop(self.project_out(self.ln_inner(mixed.transpose(1, 2).flatten(2))))
