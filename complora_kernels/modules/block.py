"""Residual blocks with fused norms, activations and residuals, made of a model's own blocks by `extend`.

    s = x + 0                  q, k, v = LN1(s) W_qkv^T + …        norm_lora_linear
    o = attention(q, k, v) W_o^T + …                               torch's fused attention, packed_lora_linear
    y = (s + o) + fc2(act(fc1(LN2(s + o))))                        norm_lora_mlp

Layer scale multiplies what is added, o and the result of fc2, by a frozen vector: the second one's rows are scaled.

What the parts of a block are, and whether they are those of a plain pre-norm block, an integration says
(`complora_kernels.integrations`). A block of another kind keeps its own forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from complora_kernels import functional
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.blocks import Norm, norm_lora_linear, norm_lora_mlp
from complora_kernels.common.changes import Changes
from complora_kernels.common.parameters import parameter_of
from complora_kernels.common.tracing import is_checkpointed_selectively, is_followed
from complora_kernels.modules.extend import Extension, has_user_hooks
from complora_kernels.modules.forward_scope import Reading, factors_in_scope, reading_of, take
from complora_kernels.modules.layer import CompLoRALayer
from complora_kernels.modules.linear import CompLoRALinear
from complora_kernels.modules.masks import additive_mask, known_causal
from complora_kernels.modules.peft_linear import AcceleratedLinear, product_of, single_adapter

RECOMPUTE = ("none", "mlp")


class Projection(NamedTuple):
    """A product with the normed input that gives some of q, k and v, in this order."""

    names: str  # "qkv" where they are packed in one weight, else one of them
    layer: nn.Module  # a CompLoRALayer where one of them has an adapter
    weight: Tensor  # [len(names) · d, d]
    bias: Tensor | None  # [len(names) · d]


class AttentionParts(NamedTuple):
    """Self-attention of `heads` heads."""

    projections: tuple[Projection, ...]  # one where q, k and v are packed, else three
    out: nn.Linear
    project_out: Callable[[Tensor], Tensor]  # [..., d] to [..., d]: `out` with its adapter, where it has one
    heads: int
    sequence_first: bool  # x is [L, N, d]
    scale: float | None  # factor of the logits; None: 1 / sqrt(d / heads)
    dropout_p: float  # probability of dropping an attention weight; 0 in evaluation


class BlockParts(NamedTuple):
    """A residual block `s = x + attention(norm1(x))`, `y = s + fc2(act(fc1(norm2(s))))` by its parts."""

    norm1: nn.LayerNorm
    attention: AttentionParts
    norm2: nn.LayerNorm
    fc1: nn.Linear
    activation: str  # one of `blocks.ACTIVATIONS`
    fc2: nn.Linear
    scale: Tensor | None = None  # [d], frozen: what fc2 gives is multiplied by it before it is added


Rotation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of queries and keys, each [N, heads, L, d / heads]


class CompLoRABlock(Extension):
    """A residual block that computes `x + attention(LN1(x))` and `x + mlp(LN2(x))` by fused operations.

    Its own forward pass runs while torch.compile traces (Inductor fuses the same operations), and when a part of it was
    exchanged, hooked or unfrozen. Both give the same result; only the fused one computes a single position where the
    running scope reads no other.

    The integration of a model library derives from it: with `parts`, and with the `forward` of the library's block.
    The fused operations read the weights and factors of the adapted layers in the block, and do not call their
    `forward`.

    Attributes:
        recompute: "none", or "mlp" to compute fc1 again in the backward pass instead of saving its result.
        recorders: the Python module of the forward hooks by which a library records what is asked for. Where the
            block is fused, nothing is.
    """

    recompute: str = "none"
    recorders: str = ""

    def parts(self) -> BlockParts | str:
        """The parts of the block as they are now, or the reason why it cannot be fused."""
        raise NotImplementedError

    def run_fused(
        self,
        x: Tensor,  # [N, L, d], or [L, N, d]
        attn_mask: Tensor | None,  # [L, L] or [N · heads, L, L], added to the logits
        *,
        is_causal: bool = False,
        rotate: Rotation | None = None,
    ) -> Tensor | None:  # shaped as x; [N, 1, d], or [1, N, d], where the first position alone is read
        """The block by fused operations; None where its own forward pass has to run.

        A mask [N, 1 or heads, L, L] is one of torch's `scaled_dot_product_attention`: added, or True where a pair takes
        part. `is_causal` is that of the same function, for blocks that get no mask. `rotate` embeds the positions in
        queries and keys.
        """
        parts = self._fusible_parts(x)
        if parts is None:
            return None
        attention, norm1, dtype = parts.attention, _norm(parts.norm1), functional.compute_dtype(x)
        first = attention.sequence_first
        for_all = is_causal or rotate is not None or (attn_mask is not None and attn_mask.dim() > 2)
        one = None if for_all else reading_of(self, x, sequence_first=first)
        if one is None:
            stream, (q, k, v) = _project(x, norm1, attention, "qkv", dtype)
        else:
            stream, (k, v) = _project(x, norm1, attention, "kv", dtype)
            stream = take(stream, one.positions, sequence_first=first)  # [N, 1, d], or [1, N, d]
            stream, (q,) = _project(stream, norm1, attention, "q", dtype)
        if rotate is not None:
            q, k = rotate(q, k)
        delta = attention.project_out(_attend(attention, q, k, v, attn_mask, is_causal, one))
        fc1, fc2 = _linear(parts.fc1, stream, dtype), _scaled(_linear(parts.fc2, stream, dtype), parts.scale)
        recompute = self.recompute == "mlp"
        y = norm_lora_mlp(stream, delta, _norm(parts.norm2), fc1, fc2, parts.activation, recompute=recompute)
        # A tower that gave positions takes them from y again: every position of y holds the one that was computed.
        return y if one is None or one.positions is None else y.expand(x.shape)

    def _fusible_parts(self, x: Tensor) -> BlockParts | None:
        """The parts, where the fused operations compute what the block's own pass would, and what hooks may see."""
        if not _is_plain(x) or _global_hooks():
            return None
        parts = self.parts()
        if isinstance(parts, str):
            return None
        for module in _below(self):
            if has_user_hooks(module, self.recorders):
                return None
        attention, fc1, fc2 = parts.attention, parts.fc1, parts.fc2
        layers = (*(projection.layer for projection in attention.projections), attention.out, fc1, fc2)
        adapted = [layer for layer in layers if isinstance(layer, CompLoRALayer)]
        if adapted and not any(layer.running.active for layer in adapted):
            return None  # merged or switched off: a plain model
        if not torch.is_grad_enabled():
            return parts
        frozen = [part for projection in attention.projections for part in (projection.weight, projection.bias)]
        for module in (parts.norm1, parts.norm2, fc1, fc2, attention.out):
            frozen += _weight_and_bias(module)
        for parameter in (*frozen, parts.scale):
            if parameter is not None and parameter.requires_grad:
                return None
        return parts


def _project(
    x: Tensor,  # [N, L, d], or [L, N, d]
    norm: Norm,
    attention: AttentionParts,
    wanted: str,  # "qkv", "kv" or "q"
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:  # shaped as x; each [N, heads, L, d / heads]
    """The stream, whose values are those of x, and the heads of some of q, k and v."""
    order = (1, 2, 0, 3) if attention.sequence_first else (0, 2, 1, 3)
    chosen = [(own, [name for name in own.names if name in wanted]) for own in attention.projections]
    chosen = [(projection, names) for projection, names in chosen if names]
    products = (_product(*each, x, dtype) for each in chosen)
    heads = [(len(names), attention.heads) for _, names in chosen]
    stream, *parts = norm_lora_linear(x, None, norm, *products, heads=heads)
    return stream, [part.permute(order) for part in parts]


def _attend(
    attention: AttentionParts,
    q: Tensor,  # [N, heads, L, d / heads]
    k: Tensor,  # [N, heads, S, d / heads]
    v: Tensor,  # [N, heads, S, d / heads]
    attn_mask: Tensor | None,
    causal: bool,
    one: Reading | None,  # L is 1: the position's row of the mask is added
) -> Tensor:  # [N, L, d], or [L, N, d]
    """Attention by torch's fused kernels, causal where the mask is known to be."""
    bias = None
    if attn_mask is not None:
        if attn_mask.dim() == 4:
            bias = _rounded(attn_mask, q.dtype)
        elif one is not None:
            attn_mask = attn_mask.to(q.device, q.dtype)
            rows = attn_mask[:1] if one.positions is None else attn_mask[one.positions]  # [N, S]
            bias = rows[:, None, None]  # [N, 1, 1, S]
        elif not (causal := known_causal(attn_mask, q.shape[-2], k.shape[-2])):
            bias = additive_mask(attn_mask.to(q.device), None, q, k)
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=attention.dropout_p, is_causal=causal, scale=attention.scale
    )  # [N, heads, L, d / heads]
    return mixed.permute((2, 0, 1, 3) if attention.sequence_first else (0, 2, 1, 3)).flatten(2)


def _rounded(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in the dtype of the logits. Its lowest number takes the place of lower ones: no row becomes all -inf."""
    if mask.dtype in (torch.bool, dtype):
        return mask
    return mask.clamp_min(torch.finfo(dtype).min).to(dtype)


def _norm(norm: nn.LayerNorm) -> Norm:
    return Norm(*_weight_and_bias(norm), norm.eps)


def _weight_and_bias(module: nn.Module) -> tuple[Any, Any]:
    return parameter_of(module, "weight"), parameter_of(module, "bias")


def _product(projection: Projection, names: list[str], x: Tensor, dtype: torch.dtype) -> AdaptedLinear:
    """The product of neighbouring rows of a projection with x."""
    layer, weight, bias, start = projection.layer, projection.weight, projection.bias, 0
    if isinstance(layer, (CompLoRALinear, AcceleratedLinear)):
        return _linear(layer, x, dtype)
    layer = layer.running if isinstance(layer, CompLoRALayer) else layer
    if len(names) < len(projection.names):
        d = len(weight) // len(projection.names)
        start = projection.names.index(names[0]) * d
        own = slice(start, start + len(names) * d)
        weight, bias = weight[own], None if bias is None else bias[own]
    adapted = layer.weights if isinstance(layer, CompLoRALayer) else {}
    rows = {name: (adapted[name].start - start, adapted[name].stop - start) for name in names if name in adapted}
    return _adapted(layer, weight, bias, rows, x, dtype)


def _linear(linear: Any, x: Tensor, dtype: torch.dtype) -> AdaptedLinear:
    """The product of a linear layer, a plain one, an adapted one, or one of PEFT, with rows such as those of x."""
    if isinstance(linear, AcceleratedLinear):
        adapter = single_adapter(linear)
        assert adapter is not None, "the parts of the block say that it has one"
        return product_of(linear, adapter)
    rows = {"": (0, linear.out_features)} if isinstance(linear, CompLoRALinear) else {}
    layer = linear.running if rows else linear
    return _adapted(layer, *_weight_and_bias(linear), rows, x, dtype)


def _scaled(linear: AdaptedLinear, scale: Tensor | None) -> AdaptedLinear:
    """The product whose result is `scale ∘ y`: that of the scaled weight, bias and factors."""
    if scale is None:
        return linear
    bias = None if linear.bias is None else scale * linear.bias
    Bs = [(scale[:, None] * B).to(B.dtype) for B in linear.Bs]
    return linear._replace(weight=scale[:, None] * linear.weight, bias=bias, Bs=Bs)


def _adapted(
    layer: nn.Module,
    weight: Tensor,
    bias: Tensor | None,
    rows: dict[str, tuple[int, int]],
    x: Tensor,
    dtype: torch.dtype,
) -> AdaptedLinear:
    if not isinstance(layer, CompLoRALayer) or not rows or not layer.active:
        return AdaptedLinear(weight, bias)
    dropout_p = layer.config.lora_dropout if layer.training else 0.0
    As, Bs = factors_in_scope(layer, tuple(rows), dtype)
    columns = layer.columns_of(x, len(rows))
    return AdaptedLinear(weight, bias, As, Bs, list(rows.values()), dropout_p, columns=columns)


def _below(module: nn.Module) -> list[nn.Module]:
    """The modules below one; `modules()` asks each for names."""
    found = [child for child in module._modules.values() if child is not None]
    for parent in found:
        found += [child for child in parent._modules.values() if child is not None]
    return found


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
    """Chooses what the residual blocks of an adapted model compute again in the backward pass, to save memory.

    Args:
        model: a model from `apply_complora` or `accelerate_peft`.
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
