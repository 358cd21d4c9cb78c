"""The models of timm whose blocks have `attn` and `mlp`: ViT, DeiT, EVA, BEiT, Swin and others; alone or in a model.

Their q, k and v are packed in one linear layer, or three layers. EVA, BEiT and Swin v2 keep the biases of q and v apart
and then use the weight of `qkv` without calling it; they have a switch, which makes them call it and add the biases to
what it returns. Pre-norm blocks are fused, with scaled residuals, rotations and relative positions; those of Swin are
not.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from complora_kernels.common.wrappers import named_modules, unwrap
from complora_kernels.integrations import Block, Target
from complora_kernels.integrations.parts import (
    NORMS,
    activation_of,
    is_identity,
    is_of,
    wrong_linear,
    wrong_norm,
)
from complora_kernels.integrations.torch import encoders as encoders  # what it says holds here too
from complora_kernels.integrations.torch import linear_target, packed_target
from complora_kernels.integrations.torch import peft_modules as peft_modules
from complora_kernels.modules.block import AttentionParts, BlockParts, CompLoRABlock, Projection, Rotation
from complora_kernels.modules.extend import Extension, class_name, own_class
from complora_kernels.modules.forward_scope import LastBlock, Reading, Scoped
from complora_kernels.modules.linear import CompLoRALinear
from complora_kernels.modules.packed import CompLoRAPackedLinear

PACKAGES = ("torch", "timm")
PACKED = {  # attention whose `qkv` gives q, k and v side by side; tiny_vit's, for one, gives them head by head
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.layers.diff_attention.DiffAttention",
    "timm.models.beit.Attention",
    "timm.models.eva.EvaAttention",
    "timm.models.swin_transformer.WindowAttention",
    "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.vision_transformer_relpos.RelPosAttention",
    "timm.models.vision_transformer_sam.Attention",
}
SELF_ATTENTION = (
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.beit.Attention",
    "timm.models.eva.EvaAttention",
)
BLOCKS = {  # blocks that can be fused, and the arguments that follow x
    "timm.models.vision_transformer.Block": ("attn_mask", "is_causal"),
    "timm.models.eva.EvaBlock": ("rope", "attn_mask", "is_causal"),
    "timm.models.beit.Block": ("shared_rel_pos_bias",),
}
FIRST_LINEARS = ("fc1", "fc1_g", "fc1_x")  # those of an MLP; with a gate it may have two


def recognises(model: nn.Module) -> bool:
    return any(_is_timm(module) for module in model.modules())


def _is_timm(module: nn.Module) -> bool:
    return own_class(module).__module__.partition(".")[0] == "timm"


# ---- what is adapted


def residual_blocks(model: nn.Module) -> Iterator[Block]:
    """The blocks, counted through the stages of a model."""
    layer = 0
    for path, module in named_modules(model):
        if _is_timm(module) and {"attn", "mlp"} <= module._modules.keys():
            yield Block(path, module, "image", layer)
            layer += 1


def targets_in(block: Block, names: Collection[str]) -> Iterator[Target]:
    path, attention = f"{block.path}.attn".lstrip("."), unwrap(block.module.get_submodule("attn"))
    projections = [name for name in ("q", "k", "v") if name in names]
    if projections and getattr(attention, "q_proj", None) is not None:
        for name in projections:
            yield _linear(f"{path}.{name}_proj", attention, f"{name}_proj")
    elif projections:
        if class_name(attention) not in PACKED:
            raise ValueError(
                f"{path} is a {class_name(attention)}, whose rows of q, k and v are not known, expected one of "
                f"{', '.join(sorted(PACKED))}: leave q, k and v out, or name modules by a regular expression"
            )
        if "qkv" in uncalled(attention) and not hasattr(attention, "qkv_bias_separate"):
            raise ValueError(
                f"{path}.qkv is used by its {class_name(attention)} without being called, so an adapter there would "
                "have no effect: expected timm 1.0.17 or newer, where attention has a switch qkv_bias_separate"
            )
        yield packed_target(f"{path}.qkv", unwrap(attention.get_submodule("qkv")), projections)
    if "o" in names:
        yield _linear(f"{path}.proj", attention, "proj")
    mlp = unwrap(block.module.get_submodule("mlp"))
    firsts = [name for name in FIRST_LINEARS if name in mlp._modules] or ["fc1"]
    for name in (*(firsts if "fc1" in names else ()), *(("fc2",) if "fc2" in names else ())):
        yield _linear(f"{block.path}.mlp.{name}".lstrip("."), mlp, name)


def _linear(path: str, parent: nn.Module, name: str) -> Target:
    if name not in parent._modules:
        raise ValueError(f"{path} does not exist in {class_name(parent)}, expected a linear layer")
    return linear_target(path, unwrap(parent.get_submodule(name)))


def missing(model: nn.Module, tower: str) -> str | None:
    name = next(class_name(module) for _, module in named_modules(model) if _is_timm(module))
    return f"its {name} has no blocks with attn and mlp" if tower == "image" else None


def uncalled(parent: nn.Module) -> Collection[str]:
    """`qkv` of EVA, BEiT and Swin v2, unless they were made with `qkv_bias_separate=True`."""
    apart = _is_timm(parent) and "qkv" in parent._modules and getattr(parent, "q_bias", None) is not None
    return ("qkv",) if apart and not vars(parent).get("qkv_bias_separate", False) else ()


class BiasesApart(Extension):
    """Attention that calls `qkv` and adds the biases to what it returns."""

    @property
    def qkv_bias_separate(self) -> bool:
        return True


def callers(model: nn.Module, layers: Collection[nn.Module]) -> Iterator[tuple[nn.Module, type[Extension]]]:
    for _, module in named_modules(model):
        if "qkv" in uncalled(module) and unwrap(module.get_submodule("qkv")) in layers:
            yield module, BiasesApart


def activations(model: nn.Module) -> dict[str, str]:
    return {
        block.tower: type(activation).__name__
        for block in residual_blocks(model)
        if (activation := getattr(block.module.get_submodule("mlp"), "act", None)) is not None
    }


# ---- towers


class ImageTower(Scoped):
    """A model of timm. Where it reads its feature at the class token, its last block computes no other position.

    What is said of it in open_clip's image tower holds here too.
    """

    def _reading_of_scope(self) -> Reading | None:
        last = None if torch.compiler.is_compiling() else last_block(self)
        return None if last is None else Reading(last.alone)


def towers(model: nn.Module) -> Iterator[tuple[nn.Module, type[Scoped]]]:
    """The outermost modules of timm that hold blocks."""
    blocks = [block.path for block in residual_blocks(model)]
    found: list[str] = []
    for path, module in named_modules(model):
        start = f"{path}." if path else ""
        inside = any(path.startswith(other) for other in found)
        if _is_timm(module) and not inside and any(block.startswith(start) for block in blocks):
            found.append(start)
            yield module, ImageTower


def truncation(model: nn.Module) -> list[tuple[nn.Module, type[Extension]]]:
    return []


def last_block(tower: Any) -> LastBlock | None:
    """The last block of a ViT that reads its feature at the class token alone, where it is fused.

    None where it reads other tokens too, or hands them on (`global_pool`, `attn_pool`), and for a class or methods that
    are not timm's own, where either may be.
    """
    methods = {"forward_features", "forward_head", "pool"} & vars(tower).keys()
    if methods or class_name(tower) != "timm.models.vision_transformer.VisionTransformer":
        return None
    if tower.global_pool != "token" or tower.attn_pool is not None or tower.grad_checkpointing:
        return None
    if type(tower.blocks) is not nn.Sequential or not len(tower.blocks):
        return None
    if not is_of(type(tower.norm), PACKAGES, (*NORMS, "Identity")):
        return None
    last = tower.blocks[-1]
    if sum(block is last for block in tower.blocks) != 1 or not isinstance(last, CompLoRABlock):
        return None
    return LastBlock(last, tower.blocks, tower.norm)


# ---- residual blocks


class FusedBlock(CompLoRABlock):
    """A block of ViT, EVA or BEiT; with a mask it runs its own forward pass."""

    attn: Any

    def parts(self) -> BlockParts | str:
        return parts_of_block(self)

    def forward(
        self,
        x: Tensor,  # [N, L, d]
        *args: Any,  # those that BLOCKS names
        **kwargs: Any,
    ) -> Tensor:  # [N, L, d]; [N, 1, d] where the first position alone is read
        given = dict(zip(BLOCKS[class_name(self)], args, strict=False)) | kwargs
        rope, bias = given.pop("rope", None), given.pop("shared_rel_pos_bias", None)
        y = None
        if all(value is None or value is False for value in given.values()):
            if getattr(self.attn, "relative_position_bias_table", None) is not None:
                own = self.attn._get_rel_pos_bias()  # [1, heads, L, L]
                bias = own if bias is None else own + bias
            bias = bias[None] if bias is not None and bias.dim() == 3 else bias  # older versions share [heads, L, L]
            y = self.run_fused(x, bias, rotate=None if rope is None else _rotation(self.attn, rope))
        return super().forward(x, *args, **kwargs) if y is None else y


def _rotation(attention: Any, rope: Tensor) -> Rotation:
    """How the library rotates queries and keys at the positions that are not a class token or the like."""
    rotate = sys.modules[own_class(attention).__module__].apply_rot_embed_cat
    options = {"half": True} if getattr(attention, "rotate_half", False) else {}
    first = attention.num_prefix_tokens

    def rotated(x: Tensor) -> Tensor:  # [N, heads, L, d / heads]
        return torch.cat([x[:, :, :first], rotate(x[:, :, first:], rope, **options)], 2).to(x.dtype)

    return lambda q, k: (rotated(q), rotated(k))


def parts_of_block(block: nn.Module) -> BlockParts | str:
    if class_name(block) not in BLOCKS:
        return f"it is a {class_name(block)}, expected one of {', '.join(BLOCKS)}"
    parts: Any = block
    mlp, scales = parts.mlp, [_scale(block, number) for number in "12"]
    if class_name(mlp) != "timm.layers.mlp.Mlp":
        return f"mlp is a {class_name(mlp)}, expected timm's Mlp"
    wrong = (
        _wrong_identity("", block, ("drop_path1", "drop_path2"))
        or next((scale for scale in scales if isinstance(scale, str)), None)
        or _wrong_identity("mlp.", mlp, ("drop1", "norm", "drop2"))
        or _wrong_norm("norm1", parts.norm1)
        or _wrong_norm("norm2", parts.norm2)
        or wrong_linear("mlp.fc1", mlp.fc1)
        or wrong_linear("mlp.fc2", mlp.fc2)
    )
    attention = wrong or _parts_of_attention(parts.attn, scales[0])
    if isinstance(attention, str):
        return attention
    activation = activation_of(mlp.act, PACKAGES)
    if activation is None:
        return f"mlp.act is {mlp.act}, expected GELU or QuickGELU"
    return BlockParts(parts.norm1, attention, parts.norm2, mlp.fc1, activation, mlp.fc2, scales[1])


def _scale(block: nn.Module, number: str) -> Any:  # [d]
    """What the features of a branch are multiplied by, or why it is not known; None where they are not."""
    scale = getattr(block, f"ls{number}", None)
    if is_of(type(scale), ("timm",), ("LayerScale",)):
        return scale.gamma  # pyright: ignore[reportOptionalMemberAccess]
    if not is_identity(scale):
        return f"ls{number} is {scale}, expected LayerScale or nn.Identity"
    return getattr(block, f"gamma_{number}", None)


def _parts_of_attention(attention: Any, scale_out: Tensor | None) -> AttentionParts | str:
    if class_name(attention) not in SELF_ATTENTION:
        return f"attn is a {class_name(attention)}, expected one of {', '.join(SELF_ATTENTION)}"
    if getattr(attention, "gate", None) is not None or getattr(attention, "num_kv_groups", 1) > 1:
        return "attn has a gate, or fewer keys than queries, expected neither"
    packed = getattr(attention, "q_proj", None) is None
    names = ("qkv",) if packed else ("q_proj", "k_proj", "v_proj")
    called = getattr(attention, "q_bias", None) is None  # else the weight of qkv is used without calling it
    for name in names:
        linear = attention._modules[name]
        if packed and isinstance(linear, CompLoRAPackedLinear):
            continue
        if (packed and isinstance(linear, CompLoRALinear)) or wrong_linear(name, linear, called=called):
            return f"attn.{name} is a {type(linear).__name__}, expected it plain or adapted by words"
    wrong = _wrong_identity("attn.", attention, ("q_norm", "k_norm", "norm", "proj_drop"))
    wrong = wrong or wrong_linear("attn.proj", attention.proj)
    if wrong is not None:
        return wrong
    linears: list[nn.Linear] = [attention._modules[name] for name in names]
    kept = zip(("qkv",) if packed else "qkv", linears, strict=True)
    projections = [Projection(name, linear, linear.weight, linear.bias) for name, linear in kept]
    if packed and getattr(attention, "q_bias", None) is not None:
        bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])  # [3d]
        projections = [projections[0]._replace(bias=bias)]
    dropout_p = attention.attn_drop.p if attention.training else 0.0
    scale = None if attention.fused_attn else attention.scale  # torch's own function is called without it
    out: nn.Linear = attention.proj
    project_out = out if scale_out is None else lambda mixed: scale_out * out(mixed)
    return AttentionParts(tuple(projections), out, project_out, attention.num_heads, False, scale, dropout_p)


def _wrong_identity(prefix: str, module: nn.Module, names: tuple[str, ...]) -> str | None:
    wrong = next((name for name in names if not is_identity(module._modules.get(name))), None)
    return wrong and f"{prefix}{wrong} is {module._modules[wrong]}, expected nn.Identity"


def _wrong_norm(name: str, norm: Any) -> str | None:
    if getattr(norm, "_fast_norm", False):
        return f"{name} computes in the dtype of autocast (timm.layers.set_fast_norm), expected one that does not"
    return wrong_norm(name, norm, PACKAGES)
