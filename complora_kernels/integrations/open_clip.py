"""Finds q, k, v, o, fc1 and fc2 in open_clip's models, by what the modules have and not by their version.

A residual block has `attn`, `mlp.c_fc` and `mlp.c_proj`; the image tower is what lies below `visual`, the text tower
what lies in `transformer` or `text`. This covers ViT CLIP models (quickgelu or not), `CustomTextCLIP`, and the towers
of OpenAI's package.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from complora_kernels.common.wrappers import named_modules, unwrap
from complora_kernels.config import ATTENTION_TARGETS, MLP_TARGETS
from complora_kernels.modules.attention import CompLoRAAttention, CompLoRAMultiheadAttention
from complora_kernels.modules.block import NORMS
from complora_kernels.modules.extend import is_known, own_class
from complora_kernels.modules.pooled import Pool
from complora_kernels.modules.prompts import TextTower


class Block(NamedTuple):
    """A residual block of a tower."""

    path: str
    module: nn.Module
    tower: str  # "image" or "text"
    layer: int


def residual_blocks(model: nn.Module) -> Iterator[Block]:
    """The residual blocks of the image and the text tower."""
    for path, module in named_modules(model):
        tower = _tower(path)
        mlp = getattr(module, "mlp", None)
        if tower and hasattr(module, "attn") and hasattr(mlp, "c_fc") and hasattr(mlp, "c_proj"):
            yield Block(path, module, tower, int(path.rpartition(".")[2]))


def tower_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that run a tower when they are called."""
    modules = dict(named_modules(model))
    return [modules[path] for path in dict.fromkeys(_root(block.path) for block in residual_blocks(model))]


def text_tower(model: nn.Module) -> TextTower | None:
    """The text tower of a model that reads a text's feature where the text ends, under a mask over its context.

    None where it is read elsewhere or every position is handed on (`pool_type`, CoCa's class token, `output_tokens`),
    and for classes that are not open_clip's own, where either may be.
    """
    if not is_known(own_class(model), ("CLIP", "CustomTextCLIP")):
        return None
    if hasattr(model, "text_pool_type"):
        holder, pool_type, eos_id = model, model.text_pool_type, getattr(model, "text_eos_id", None)
    else:
        holder = getattr(model, "text", None)
        pool_type, eos_id = getattr(holder, "pool_type", None), getattr(holder, "eos_id", None)
    if holder is not model and not is_known(type(holder), ("TextTransformer",)):
        return None
    transformer, mask = getattr(holder, "transformer", None), getattr(holder, "attn_mask", None)
    if not isinstance(transformer, nn.Module) or not isinstance(mask, Tensor):
        return None
    if getattr(holder, "cls_emb", None) is not None or getattr(holder, "output_tokens", False):
        return None
    pool = _pool(transformer, getattr(holder, "ln_final", None))
    if pool_type == "argmax":
        return TextTower(transformer, mask, None, pool)
    return TextTower(transformer, mask, eos_id, pool) if pool_type == "eos" and isinstance(eos_id, int) else None


def image_pool(visual: nn.Module) -> Pool | None:
    """What lies between the last block and the feature of an image tower that reads it at the class token.

    None where it reads other tokens too, or hands them on (`pool_type`, an attention pool, `output_tokens`), and for a
    class or methods that are not open_clip's own, where either may be.
    """
    if (
        not is_known(own_class(visual), ("VisionTransformer",))
        or {"_embeds", "_pool", "_global_pool"} & vars(visual).keys()
    ):
        return None
    if getattr(visual, "pool_type", None) != "tok" or getattr(visual, "attn_pool", None) is not None:
        return None
    if getattr(visual, "output_tokens", False):
        return None
    return _pool(getattr(visual, "transformer", None), getattr(visual, "ln_post", None))


def _pool(transformer: Any, norm: Any) -> Pool | None:
    if not is_known(type(transformer), ("Transformer",)) or not is_known(type(norm), (*NORMS, "Identity")):
        return None
    blocks = list(transformer.resblocks)
    if sum(block is blocks[-1] for block in blocks) != 1:  # none, or one that is run several times
        return None
    return Pool(blocks[-1], transformer, norm)


def parts(block: Block, targets: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a block that some of q, k, v, o, fc1, fc2 name, with their paths.

    Raises:
        ValueError: the attention is of a kind that cannot be adapted.
    """
    names = ["attn"] if any(target in ATTENTION_TARGETS for target in targets) else []
    names += [name for target, name in zip(MLP_TARGETS, ("mlp.c_fc", "mlp.c_proj"), strict=True) if target in targets]
    for name in names:
        module = unwrap(block.module.get_submodule(name))
        if name == "attn":
            check_attention(f"{block.path}.{name}", module)
        yield f"{block.path}.{name}", module


def activations(model: nn.Module) -> dict[str, str]:
    """The class of each tower's MLP activation: weights trained with QuickGELU compute something else with GELU."""
    return {
        block.tower: type(activation).__name__
        for block in residual_blocks(model)
        if (activation := getattr(block.module.get_submodule("mlp"), "gelu", None)) is not None
    }


def check_attention(path: str, attention: nn.Module) -> None:
    """Raises ValueError unless the attention of a residual block is of a kind that can be adapted."""
    known = isinstance(attention, (nn.MultiheadAttention, CompLoRAMultiheadAttention, CompLoRAAttention))
    if not known and not CompLoRAAttention.recognises(attention):
        raise ValueError(
            f"{path} is a {type(attention).__module__}.{type(attention).__qualname__}, which cannot be adapted: "
            "expected nn.MultiheadAttention or the attention of open_clip 4"
        )


def describe_tower(model: nn.Module, tower: str) -> str:
    """Why a tower without residual blocks cannot be adapted, in words."""
    visual = getattr(unwrap(model), "visual", None)
    if visual is None:
        inner = next((path for path, module in named_modules(model) if any(residual_blocks(module))), None)
        if inner:
            return f"the model has none, its part {inner} has towers: pass that"
    if tower == "image":
        if visual is None:
            return "the model has no image tower `visual`"
        if hasattr(visual, "attnpool"):
            return (
                f"visual is a {type(visual).__name__} and its attention pool visual.attnpool "
                f"({type(visual.attnpool).__name__}) uses q_proj, k_proj and v_proj without calling them, so an "
                "adapter there would have no effect"
            )
        return f"visual is a {type(visual).__name__} without residual blocks (attn, mlp.c_fc, mlp.c_proj)"
    return "the model has no text tower `transformer` or `text` with residual blocks (attn, mlp.c_fc, mlp.c_proj)"


def _tower(path: str) -> str | None:
    return {"visual": "image", "transformer": "text", "text": "text"}.get(_root(path))


def _root(path: str) -> str:
    return path.partition(".")[0]
