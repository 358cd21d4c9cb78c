"""Whether a part of a residual block computes what the fused operations compute, asked by several integrations."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from complora_kernels import blocks
from complora_kernels.modules.attention import CompLoRAMultiheadAttention
from complora_kernels.modules.block import AttentionParts, Projection
from complora_kernels.modules.linear import CompLoRALinear
from complora_kernels.modules.peft_linear import AcceleratedLinear, single_adapter

ACTIVATIONS = {
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "QuickGELU": "quick_gelu",
}  # classes, and operations of `blocks`
LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear, CompLoRALinear)
NORMS = ("LayerNorm", "LayerNormFp32")  # torch's own, and those that compute in float32 and round


def is_of(cls: type, packages: Collection[str], names: Collection[str]) -> bool:
    """Whether a class is of one of these packages and names: a namesake may compute something else."""
    return cls.__name__ in names and cls.__module__.partition(".")[0] in packages


def is_identity(part: Any) -> bool:
    """Whether a part hands its input on as it is, in training too: also where it is absent."""
    if part is None or isinstance(part, nn.Identity):
        return True
    return type(part) is nn.Dropout and part.p == 0


def wrong_norm(name: str, norm: Any, packages: Collection[str]) -> str | None:
    """Why a norm is not the LayerNorm of the fused operations; None where it is."""
    if isinstance(norm, nn.LayerNorm) and is_of(type(norm), packages, NORMS) and norm.weight is not None:
        return None
    return f"{name} is a {type(norm).__name__}, expected a LayerNorm with weights"


def wrong_linear(name: str, linear: Any, *, called: bool = True) -> str | None:
    """Why a part is not a linear layer, plain or adapted; None where it is.

    A layer of PEFT, which `accelerate_peft` has changed, is one where the library calls it: elsewhere PEFT's adapter
    has no effect.
    """
    if type(linear) in LINEARS:
        return None
    if not called or not isinstance(linear, AcceleratedLinear):
        return f"{name} is a {type(linear).__name__}, expected a linear layer"
    return None if single_adapter(linear) else f"{name} computes as PEFT does, expected one active LoRA, unmerged"


def activation_of(activation: Any, packages: Collection[str]) -> str | None:
    """The name of an activation in the fused operations; None where it is none of theirs."""
    name = ACTIVATIONS[type(activation).__name__] if is_of(type(activation), packages, ACTIVATIONS) else ""
    name += "_tanh" if getattr(activation, "approximate", "none") == "tanh" else ""
    return name if name in blocks.ACTIVATIONS else None


def parts_of_multihead(name: str, attention: Any) -> AttentionParts | str:
    """The parts of an `nn.MultiheadAttention`, plain or adapted, or why it is no plain self-attention."""
    if type(attention) not in (nn.MultiheadAttention, CompLoRAMultiheadAttention):
        return f"{name} is a {type(attention).__name__}, expected nn.MultiheadAttention"
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        return f"{name} projects keys or values of other sizes, or adds some, expected plain self-attention"
    wrong = wrong_linear(f"{name}.out_proj", attention.out_proj, called=False)
    if wrong is not None:
        return wrong
    packed = Projection("qkv", attention, attention.in_proj_weight, attention.in_proj_bias)
    project_out = getattr(attention, "project_out", attention.out_proj)
    dropout_p, first = attention.dropout if attention.training else 0.0, not attention.batch_first
    return AttentionParts((packed,), attention.out_proj, project_out, attention.num_heads, first, None, dropout_p)
