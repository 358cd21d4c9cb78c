"""Residual blocks with fused norms, activations and residuals: `CompLoRABlock`, made of a block by `extend`.

    s = x + 0                  q, k, v = LN1(s) W_qkv^T + …        norm_lora_linear
    o = attention(q, k, v) W_o^T + …                               torch's fused attention, packed_lora_linear
    y = (s + o) + fc2(act(fc1(LN2(s + o))))                        norm_lora_mlp

A block is understood when its parts are those of a plain pre-norm CLIP block; another one keeps its own forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from complora_kernels import functional
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.blocks import Norm, norm_lora_linear, norm_lora_mlp
from complora_kernels.common.changes import Changes
from complora_kernels.common.tracing import is_checkpointed_selectively, is_followed
from complora_kernels.modules.attention import (
    CompLoRAAttention,
    CompLoRAAttentionLayer,
    CompLoRAMultiheadAttention,
    additive_mask,
    known_causal,
)
from complora_kernels.modules.extend import Extension, is_known, is_watched, own_class
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.linear import CompLoRALinear
from complora_kernels.modules.pooled import Pooled, pooled, take
from complora_kernels.modules.tower import folded_factors

RECOMPUTE = ("none", "mlp")

NORMS = ("LayerNorm", "LayerNormFp32")  # torch's own and open_clip's, which compute in float32 and round
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}
_LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, CompLoRALinear)
_PARTS = {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"}


class CompLoRABlock(Extension):
    """A residual block that computes `x + attention(LN1(x))` and `x + mlp(LN2(x))` by fused operations.

    Its own forward pass runs while torch.compile traces (Inductor fuses the same things), for cross attention, and when
    a part of it was exchanged, hooked or unfrozen. Both give the same result, of one position where `pooled` asks for
    one.

    Attributes:
        recompute: "none", or "mlp" to compute fc1 again in the backward pass instead of saving its result.
    """

    recompute: str = "none"

    ln_1: nn.LayerNorm
    ln_2: nn.LayerNorm
    attn: Any
    mlp: Any

    def forward(
        self,
        q_x: Tensor,  # [N, L, d], or [L, N, d] as the attention takes it
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,  # [L, L] or [N · heads, L, L]
    ) -> Tensor:  # as q_x; of the first position alone [N, 1, d], or [1, N, d]
        if k_x is not None or v_x is not None or not self._fuses(q_x):
            others = (k_x, v_x, attn_mask)
            return super().forward(q_x, *others) if any(other is not None for other in others) else super().forward(q_x)
        attn, c_fc, c_proj = self.attn, self.mlp.c_fc, self.mlp.c_proj
        dtype, first = functional.compute_dtype(q_x), _sequence_first(attn)
        attn_mask = getattr(self, "attn_mask", None) if attn_mask is None else attn_mask
        one = pooled(self, q_x, sequence_first=first) if attn_mask is None or attn_mask.dim() == 2 else None
        if one is None:
            stream, qkv = norm_lora_linear(q_x, None, _norm(self.ln_1), _projections(attn, "qkv", dtype))
            q, k, v = _heads(attn, qkv, 3)
        else:
            stream, kv = norm_lora_linear(q_x, None, _norm(self.ln_1), _projections(attn, "kv", dtype))
            stream = take(stream, one.positions, sequence_first=first)  # [N, 1, d], or [1, N, d]
            stream, q = norm_lora_linear(stream, None, _norm(self.ln_1), _projections(attn, "q", dtype))
            (q,), (k, v) = _heads(attn, q, 1), _heads(attn, kv, 2)
        mixed = _attend(attn, q, k, v, attn_mask, one)
        delta = attn._project_out(mixed) if isinstance(attn, CompLoRAAttentionLayer) else attn.out_proj(mixed)
        fc1, fc2 = _linear(c_fc, dtype), _linear(c_proj, dtype)
        activation, recompute = _ACTIVATIONS[type(self.mlp.gelu).__name__], self.recompute == "mlp"
        y = norm_lora_mlp(stream, delta, _norm(self.ln_2), fc1, fc2, activation, recompute=recompute)
        # The tower looks a position up again that was given: it finds it wherever it looks.
        return y if one is None or one.positions is None else y.expand(q_x.shape)

    def _fuses(self, x: Tensor) -> bool:
        """Whether the fused operations compute what the block's own forward pass would, and what hooks may see."""
        if not _is_plain(x) or _global_hooks():
            return False
        if not_understood(self) is not None:
            return False
        if "attention" in vars(self) or any(is_watched(part) for part in self.modules() if part is not self):
            return False
        mlp, attn = self.mlp, self.attn
        adapted = [part for part in (attn, mlp.c_fc, mlp.c_proj) if isinstance(part, CompLoRALayer)]
        if adapted and not any(layer.active for layer in adapted):
            return False  # merged or switched off: a plain model
        frozen = (self.ln_1, self.ln_2, mlp.c_fc, mlp.c_proj, attn.out_proj)
        parameters = [parameter for part in frozen for parameter in (part.weight, part.bias)]
        parameters += [attn.in_proj_weight, attn.in_proj_bias]
        return not torch.is_grad_enabled() or not any(p is not None and p.requires_grad for p in parameters)


def not_understood(block: nn.Module) -> str | None:
    """Why a residual block cannot be fused, or None: another class, a part that is missing, unknown or one too many."""
    cls = own_class(block)
    if not is_known(cls, ("ResidualAttentionBlock",)):
        return f"it is a {cls.__module__}.{cls.__name__}, expected a ResidualAttentionBlock of open_clip"
    parts = {name: part for name, part in block._modules.items() if part is not None}
    identities = {"ls_1", "ls_2"} - parts.keys()
    if parts.keys() | identities != _PARTS:
        return f"it consists of {', '.join(parts)}, expected {', '.join(sorted(_PARTS - identities))}"
    for name in ("ls_1", "ls_2"):
        if name in parts and not isinstance(parts[name], nn.Identity):
            return f"{name} is a {type(parts[name]).__name__}, expected nn.Identity"
    for name in ("ln_1", "ln_2"):
        norm = parts[name]
        if not isinstance(norm, nn.LayerNorm) or not is_known(type(norm), NORMS) or norm.weight is None:
            return f"{name} is a {type(norm).__name__}, expected a LayerNorm with weights"
    mlp = parts["mlp"]
    if not isinstance(mlp, nn.Sequential) or list(mlp._modules) != ["c_fc", "gelu", "c_proj"]:
        return f"mlp consists of {', '.join(mlp._modules)}, expected a Sequential of c_fc, gelu, c_proj"
    if type(mlp.c_fc) not in _LINEARS or type(mlp.c_proj) not in _LINEARS:
        return f"mlp has a {type(mlp.c_fc).__name__} and a {type(mlp.c_proj).__name__}, expected linear layers"
    gelu = mlp.gelu
    if not is_known(type(gelu), tuple(_ACTIVATIONS)) or getattr(gelu, "approximate", "none") != "none":
        return f"mlp.gelu is {gelu}, expected GELU or QuickGELU"
    return _attention_not_understood(parts["attn"])


def _attention_not_understood(attn: Any) -> str | None:
    known = type(attn) in (nn.MultiheadAttention, CompLoRAMultiheadAttention, CompLoRAAttention)
    if not known and not CompLoRAAttention.recognises(attn):
        return f"attn is a {type(attn).__name__}, expected nn.MultiheadAttention or the attention of open_clip 4"
    if (
        attn.in_proj_weight is None
        or getattr(attn, "bias_k", None) is not None
        or getattr(attn, "add_zero_attn", False)
    ):
        return "attn projects keys or values of other sizes, or adds some, expected plain self-attention"
    if type(attn.out_proj) not in _LINEARS:
        return f"attn.out_proj is a {type(attn.out_proj).__name__}, expected a linear layer"
    if isinstance(attn, nn.MultiheadAttention):
        return None
    for name in ("ln_q", "ln_k", "ln_inner", "out_drop"):
        part = getattr(attn, name)
        if not isinstance(part, nn.Identity) and not (isinstance(part, nn.Dropout) and part.p == 0):
            return f"attn.{name} is {part}, expected nn.Identity"
    if attn.head_scale is not None or getattr(attn, "logit_scale", None) is not None:
        return "attn scales its heads or its cosines, expected scaled dot-product attention"
    return None


def _sequence_first(attn: Any) -> bool:
    return isinstance(attn, nn.MultiheadAttention) and not attn.batch_first


def _heads(
    attn: Any,
    packed: Tensor,  # [N, L, P · d], or [L, N, P · d]
    parts: int,  # P
) -> list[Tensor]:  # each [N, heads, L, d / heads]
    """Views of packed projections, unbound before they are permuted: their gradients are then packed by one copy."""
    order = (1, 2, 0, 3) if _sequence_first(attn) else (0, 2, 1, 3)
    return [part.permute(order) for part in packed.unflatten(-1, (parts, attn.num_heads, -1)).unbind(2)]


def _attend(
    attn: Any,
    q: Tensor,  # [N, heads, L, d / heads]
    k: Tensor,  # [N, heads, S, d / heads]
    v: Tensor,  # [N, heads, S, d / heads]
    attn_mask: Tensor | None,
    one: Pooled | None,  # L is 1: the position's row of the mask is added
) -> Tensor:  # [N, L, d], or [L, N, d]
    """Attention by torch's fused kernels, causal where the mask is known to be."""
    causal, bias = False, None
    if attn_mask is not None:
        attn_mask = attn_mask if attn_mask.is_floating_point() else attn_mask.to(q.dtype)  # added, as blocks do
        if one is not None:
            attn_mask = attn_mask.to(q.device, q.dtype)
            rows = attn_mask[:1] if one.positions is None else attn_mask[one.positions]  # [N, S]
            bias = rows[:, None, None]  # [N, 1, 1, S]
        elif not (causal := known_causal(attn_mask, q.shape[-2], k.shape[-2])):
            bias = additive_mask(attn_mask.to(q.device), None, q, k)
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=_dropout_p(attn), is_causal=causal, scale=getattr(attn, "scale", None)
    )  # [N, heads, L, d / heads]
    return mixed.permute((2, 0, 1, 3) if _sequence_first(attn) else (0, 2, 1, 3)).flatten(2)


def _dropout_p(attn: Any) -> float:
    if not attn.training:
        return 0.0
    return attn.dropout if isinstance(attn, nn.MultiheadAttention) else attn.attn_drop.p


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(norm.weight, norm.bias, norm.eps)


def _projections(attn: Any, names: str, dtype: torch.dtype) -> AdaptedLinear:
    """The packed product of "qkv", "q" or "kv"."""
    weight, bias, start = attn.in_proj_weight, attn.in_proj_bias, 0
    if names != "qkv":
        d = weight.shape[1]
        start = "qkv".index(names) * d
        own = slice(start, start + len(names) * d)
        weight, bias = weight[own], None if bias is None else bias[own]
    adapted = attn.weights if isinstance(attn, CompLoRAAttentionLayer) else {}
    rows = {name: (adapted[name].start - start, adapted[name].stop - start) for name in names if name in adapted}
    return _adapted(attn, weight, bias, rows, dtype)


def _linear(linear: nn.Linear, dtype: torch.dtype) -> AdaptedLinear:
    rows = {"": (0, linear.out_features)} if isinstance(linear, CompLoRALinear) else {}
    return _adapted(linear, linear.weight, linear.bias, rows, dtype)


def _adapted(
    layer: Any, weight: Tensor, bias: Tensor | None, rows: dict[str, tuple[int, int]], dtype: torch.dtype
) -> AdaptedLinear:
    if not rows or not layer.active:
        return AdaptedLinear(weight, bias)
    dropout_p = layer.config.lora_dropout if layer.training else 0.0
    return AdaptedLinear(weight, bias, *folded_factors(layer, tuple(rows), dtype), list(rows.values()), dropout_p)


def _is_plain(x: Tensor) -> bool:
    """A batch with values: subclasses, tracers and transforms see operations one by one, or have no memory."""
    followed = torch.compiler.is_compiling() or is_followed() or is_checkpointed_selectively()
    return type(x) in (Tensor, nn.Parameter) and x.dim() == 3 and not followed


def _global_hooks() -> bool:
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def set_recompute(model: nn.Module, recompute: str) -> None:
    """Says what the residual blocks of an adapted model compute again in the backward pass, to save memory.

    Args:
        model: a model from `apply_complora`.
        recompute: "mlp": the result of fc1 in each block [M, 4d], for one more such product; "none": nothing beyond
            LayerNorm and activation outputs, which are never saved.

    Raises:
        ValueError: another value, or no block of the model is fused.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute={recompute!r}, expected one of {', '.join(RECOMPUTE)}")
    blocks = [module for module in model.modules() if isinstance(module, CompLoRABlock)]
    if not blocks:
        raise ValueError(f"recompute={recompute!r}: model has no fused block, expected one: call apply_complora first")
    changes = Changes()
    for block in blocks:
        changes.draft(vars(block))["recompute"] = recompute
    changes.make()
