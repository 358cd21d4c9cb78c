"""Attention with adapters on q, k, v and o: one product for q, k, v, torch's fused attention, unchanged names."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from complora_kernels import functional
from complora_kernels.common.tensor_facts import TensorFacts
from complora_kernels.common.tracing import has_values
from complora_kernels.config import ATTENTION_TARGETS, CompLoRAConfig
from complora_kernels.modules.layer import CompLoRALayer, Factors, WeightRows, clone_as, require_plain
from complora_kernels.modules.tower import folded_factors


class CompLoRAAttentionLayer(CompLoRALayer):
    """The projections of both attention modules; `in_proj_weight` [3d, d] and `out_proj` stay what they were."""

    in_proj_weight: nn.Parameter  # [3d, d]
    in_proj_bias: nn.Parameter | None  # [3d]
    out_proj: nn.Linear
    num_heads: int
    lora_A: Factors  # each [r, d]
    lora_B: Factors  # each [d, r]

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The raw factors `A` [r, d] and `B` [d, r] of q, k, v or o."""
        return getattr(self.lora_A, name), getattr(self.lora_B, name)  # get_parameter refuses functional_call's tensors

    def _adapt(self, config: CompLoRAConfig, path: str) -> None:
        d = self.in_proj_weight.shape[1]
        rows = {
            "q": WeightRows("in_proj_weight", 0, d),
            "k": WeightRows("in_proj_weight", d, 2 * d),
            "v": WeightRows("in_proj_weight", 2 * d, 3 * d),
            "o": WeightRows("out_proj.weight", 0, d),
        }
        targets = () if isinstance(config.target_modules, str) else config.target_modules
        names = [name for name in ATTENTION_TARGETS if name in targets]
        if not names:
            raise ValueError(
                f"target_modules={config.target_modules!r} selects nothing in {path or 'the attention'}, "
                f"expected some of {', '.join(ATTENTION_TARGETS)}"
            )
        require_plain(self, path or "attention", self.in_proj_weight, self.out_proj.weight)
        self._init_adapter(config, {name: rows[name] for name in names}, path)
        factors = {name: self._new_factors(name) for name in names}
        self.lora_A = Factors({name: A for name, (A, _) in factors.items()}).train(self.training)
        self.lora_B = Factors({name: B for name, (_, B) in factors.items()}).train(self.training)

    def _project_qkv(
        self,
        query: Tensor,  # [..., L, d]
        key: Tensor,  # [..., S, d]
        value: Tensor,  # [..., S, d]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The three input projections: one product for self-attention, one for each distinct input otherwise."""
        if query is key and key is value:
            q, k, v = self._project_in(query, ("q", "k", "v")).chunk(3, dim=-1)
            return q, k, v
        q = self._project_in(query, ("q",))
        if key is value:
            k, v = self._project_in(key, ("k", "v")).chunk(2, dim=-1)
            return q, k, v
        return q, self._project_in(key, ("k",)), self._project_in(value, ("v",))

    def _project_in(
        self,
        x: Tensor,  # [..., d]
        names: tuple[str, ...],  # neighbours in in_proj_weight
    ) -> Tensor:  # [..., len(names) · d]
        d = self.in_proj_weight.shape[1]
        first = ATTENTION_TARGETS.index(names[0])
        block = slice(first * d, (first + len(names)) * d)
        bias = None if self.in_proj_bias is None else self.in_proj_bias[block]
        adapted = tuple(name for name in names if name in self.weights)
        rows = [(self.weights[name].start - block.start, self.weights[name].stop - block.start) for name in adapted]
        return self._packed_linear(x, self.in_proj_weight[block], bias, adapted, rows)

    def _project_out(
        self,
        x: Tensor,  # [..., d]
    ) -> Tensor:  # [..., d]
        if "o" not in self.weights:
            return self.out_proj(x)
        return self._packed_linear(
            x, self.out_proj.weight, self.out_proj.bias, ("o",), [(0, self.out_proj.out_features)]
        )

    def _packed_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, ...], rows: list[tuple[int, int]]
    ) -> Tensor:
        if not names or not self.active:
            return F.linear(x, weight, bias)
        dtype = functional.compute_dtype(x)
        self._require_frozen(weight, bias)
        folded_As, scaled_Bs = folded_factors(self, names, dtype)
        return functional.packed_lora_linear(
            x, weight, bias, folded_As, scaled_Bs, rows, dropout_p=self.config.lora_dropout, training=self.training
        )

    def extra_repr(self) -> str:
        adapters = ", ".join(self.weights)
        return f"{super().extra_repr()} r={self.config.r}, sides={self.config.sides}, adapters={adapters}"


class CompLoRAMultiheadAttention(CompLoRAAttentionLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with adapters `lora_A.q`, `lora_B.q`, … on any of q, k, v and o.

    Same call, same parameters, same results before training. Each of q, k, v has its own [d, d] weight, subspace and
    dropout mask; the three are computed in one product. Make it with `from_attention`. See also the base class.
    """

    @classmethod
    def from_attention(
        cls, attention: nn.MultiheadAttention, config: CompLoRAConfig, *, path: str = ""
    ) -> CompLoRAMultiheadAttention:
        """Adapts `attention`: the result shares its parameters, submodules and hooks; `attention` stays as it was.

        Args:
            attention: with `kdim == vdim == embed_dim` and without `bias_k`, `add_zero_attn`.
            config: `target_modules` chooses among q, k, v, o.
            path: the name of the module in its model, for messages and for random subspaces.

        Raises:
            ValueError: `kdim` or `vdim` differ from `embed_dim`, `bias_k` or `add_zero_attn` is in use, a quantised or
                pruned base, NaN in a weight, k above d, or no target among q, k, v, o.
            TypeError: not a plain `nn.MultiheadAttention`.
        """
        label = path or "attention"
        if type(attention) is not nn.MultiheadAttention:
            raise TypeError(f"{label} is a {type(attention).__name__}, expected a plain nn.MultiheadAttention")
        if not attention._qkv_same_embed_dim:
            raise ValueError(
                f"{label} has kdim={attention.kdim}, vdim={attention.vdim}, expected embed_dim={attention.embed_dim}"
            )
        if attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError(f"{label} uses bias_k/bias_v or add_zero_attn, expected neither")
        layer = clone_as(attention, cls)
        layer._adapt(config, path)
        layer._qkv_same_embed_dim = False  # else nn.TransformerEncoderLayer reads the weights past this module
        return layer

    def forward(
        self,
        query: Tensor,  # [N, L, d] if batch_first, else [L, N, d]; or [L, d]
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,  # [N, S] or [S]; True, or -inf, leaves a key out
        need_weights: bool = True,
        attn_mask: Tensor | None = None,  # [L, S] or [N · heads, L, S]; True, or -inf, leaves a pair out
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        mixed, weights = self.mix(query, key, value, *masks)
        return self._project_out(mixed), weights

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The mixed heads, as query, which o projects, and the attention's weights: `forward` but for `o`."""
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask=None with is_causal=True, expected a mask: is_causal is a hint about it")
        unbatched = query.dim() == 2
        q, k, v = self._project_qkv(query, key, value)  # as query, key, value
        q, k, v = (self._heads(projected, unbatched) for projected in (q, k, v))  # [N, heads, L or S, d / heads]
        causal = (
            attn_mask is not None and key_padding_mask is None and known_causal(attn_mask, q.shape[-2], k.shape[-2])
        )
        bias = None if causal else additive_mask(attn_mask, key_padding_mask, q, k)
        dropout_p = self.dropout if self.training else 0.0
        if need_weights:
            bias = additive_mask(attn_mask, None, q, k) if causal else bias
            mixed, weights = _attention_with_weights(q, k, v, bias, dropout_p)
            weights = weights.mean(1) if average_attn_weights else weights  # [N, L, S] or [N, heads, L, S]
            weights = weights.squeeze(0) if unbatched else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, is_causal=causal)
            weights = None
        mixed = mixed.transpose(1, 2).flatten(2)  # [N, L, d]
        mixed = mixed.squeeze(0) if unbatched else mixed if self.batch_first else mixed.transpose(0, 1)
        return mixed, weights

    def _heads(self, x: Tensor, unbatched: bool) -> Tensor:
        """[N, L, d], [L, N, d] or [L, d] to [N, heads, L, d / heads]."""
        x = x.unsqueeze(0) if unbatched else x if self.batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


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
    def from_attention(cls, attention: nn.Module, config: CompLoRAConfig, *, path: str = "") -> CompLoRAAttention:
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
        layer._adapt(config, path)
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
        return self.out_drop(self._project_out(self.ln_inner(mixed.transpose(1, 2).flatten(2))))


_CAUSAL: TensorFacts[Any] = TensorFacts()
_SEEN_ONCE = "seen once"


def recognise_causal_mask(mask: Tensor) -> bool:
    """Reads whether a square mask [L, L] is causal and remembers it until the tensor is written to."""
    return _CAUSAL.compute(mask, _read_causal)


def has_been_read(mask: Tensor) -> bool:
    """Whether it is known of this tensor, as it is now, that it is causal or that it is not."""
    return isinstance(_CAUSAL.get(mask), bool)


def known_causal(mask: Tensor, L: int, S: int) -> bool:
    """Whether `mask` is known to be the causal mask of L queries and S keys.

    Models keep one mask and pass it, or its leading [L, L] corner, at every call. The kept tensor is known from
    `recognise_causal_mask`; moved to another device it is a new tensor, and is read once when it comes by a second
    time. Tensors that are made anew for every call are never read on a device: they take the general path. So do
    learned ones, whose gradient would be lost.
    """
    if torch.compiler.is_compiling() or mask.requires_grad or L != S or mask.shape != (L, S):
        return False
    kept = mask if mask._base is None else mask._base
    is_corner = kept.dim() == 2 and mask.stride() == kept.stride() and mask.storage_offset() == kept.storage_offset()
    if not is_corner or kept.shape[0] != kept.shape[1] or kept.is_inference():  # a write to the last would go unseen
        return False
    known = _CAUSAL.get(kept)
    if known is None and not has_values(kept):
        return False
    if known is None and kept.device.type != "cpu":
        _CAUSAL.set(kept, _SEEN_ONCE)
        return False
    return known if isinstance(known, bool) else recognise_causal_mask(kept)


def _read_causal(mask: Tensor) -> bool:
    """-inf (or True) above the diagonal, 0 (or False) elsewhere."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return False
    future = torch.ones_like(mask, dtype=torch.bool).triu(1)
    expected = future if mask.dtype == torch.bool else torch.zeros_like(mask).masked_fill_(future, float("-inf"))
    return torch.equal(mask, expected)


def additive_mask(
    attn_mask: Tensor | None,  # [L, S] or [N · heads, L, S]
    key_padding_mask: Tensor | None,  # [N, S] or [S]
    q: Tensor,  # [N, heads, L, d / heads]
    k: Tensor,  # [N, heads, S, d / heads]
) -> Tensor | None:  # broadcasts to [N, heads, L, S]
    """Both masks of `nn.MultiheadAttention` as one that is added to the logits."""
    N, heads, L, S = *q.shape[:3], k.shape[2]
    bias = None
    if attn_mask is not None:
        if attn_mask.shape not in ((L, S), (N * heads, L, S)):
            raise ValueError(
                f"attn_mask has shape {tuple(attn_mask.shape)}, expected ({L}, {S}) or ({N * heads}, {L}, {S})"
            )
        bias = _additive(attn_mask, q.dtype)
        bias = bias.view(N, heads, L, S) if bias.dim() == 3 else bias
    if key_padding_mask is not None:
        padding = torch.atleast_2d(key_padding_mask)
        if padding.shape != (N, S):
            raise ValueError(f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, expected ({N}, {S})")
        padding = _additive(padding, q.dtype).view(N, 1, 1, S)
        bias = padding if bias is None else bias + padding
    return bias


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
    if not mask.is_floating_point():
        raise ValueError(f"mask has dtype {mask.dtype}, expected torch.bool or a floating-point dtype")
    return mask.to(dtype)


def _attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """`softmax(q k^T / sqrt(d / heads) + bias) v` and the softmax itself [N, heads, L, S]."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    weights = F.dropout((logits if bias is None else logits + bias).softmax(-1), dropout_p)
    return weights @ v, weights
