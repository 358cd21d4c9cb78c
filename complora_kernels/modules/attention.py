"""Attention with adapters on q, k, v and o: one product for q, k, v, torch's fused attention, unchanged names."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from complora_kernels.common.changes import Changes, joined
from complora_kernels.config import ATTENTION_TARGETS, CompLoRAConfig
from complora_kernels.modules.layer import clone_as
from complora_kernels.modules.masks import additive_mask, known_causal
from complora_kernels.modules.packed import PackedLayer, packed_rows
from complora_kernels.modules.protected import WeightRows


class CompLoRAAttentionLayer(PackedLayer):
    """Attention whose weights of q, k and v are packed; `in_proj_weight` [3d, d] and `out_proj` stay as they were."""

    in_proj_weight: nn.Parameter  # [3d, d]
    in_proj_bias: nn.Parameter | None  # [3d]
    out_proj: nn.Linear
    num_heads: int

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
        d, layer = self.in_proj_weight.shape[1], self.running
        first = ATTENTION_TARGETS.index(names[0])
        block = slice(first * d, (first + len(names)) * d)
        bias = None if self.in_proj_bias is None else self.in_proj_bias[block]
        adapted = tuple(name for name in names if name in layer.weights)
        rows = [(layer.weights[name].start - block.start, layer.weights[name].stop - block.start) for name in adapted]
        return layer._packed_linear(x, self.in_proj_weight[block], bias, adapted, rows)

    def project_out(
        self,
        x: Tensor,  # [..., d]
    ) -> Tensor:  # [..., d]
        layer = self.running
        if "o" not in layer.weights:
            return self.out_proj(x)
        return layer._packed_linear(
            x, self.out_proj.weight, self.out_proj.bias, ("o",), [(0, self.out_proj.out_features)]
        )


def projection_rows(attention: Any) -> dict[str, WeightRows]:
    """Where the weights of q, k, v, o lie in an attention with `in_proj_weight` [3d, d] and `out_proj`."""
    d = attention.out_proj.in_features
    return packed_rows("in_proj_weight", d) | {"o": WeightRows("out_proj.weight", 0, d)}


class CompLoRAMultiheadAttention(CompLoRAAttentionLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with adapters `lora_A.q`, `lora_B.q`, … on any of q, k, v and o.

    Same call, same parameters, same results before training. Each of q, k, v has its own [d, d] weight, subspace and
    dropout mask; the three are computed in one product. Make it with `from_attention`. A fused residual block
    (`CompLoRABlock`) reads its weights and factors and does not call its `forward`. See also the base class.
    """

    @classmethod
    def from_attention(
        cls,
        attention: nn.MultiheadAttention,
        config: CompLoRAConfig,
        *,
        names: Collection[str] | None = None,
        path: str = "",
    ) -> CompLoRAMultiheadAttention:
        """Adapts `attention`: the result shares its parameters, submodules and hooks; `attention` stays as it was.

        Args:
            attention: with `kdim == vdim == embed_dim` and without `bias_k`, `add_zero_attn`.
            config: rank, scaling, dropout and subspace.
            names: the adapters, among q, k, v and o; None takes `config.target_modules`.
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
        layer._adapt(config, names, projection_rows(attention), path)
        layer._qkv_same_embed_dim = False  # else nn.TransformerEncoderLayer reads the weights past this module
        return layer

    def unload(self, changes: Changes | None = None) -> None:
        with joined(changes) as pending:
            super().unload(pending)
            pending.draft(vars(self))["_qkv_same_embed_dim"] = True

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
        return self.project_out(mixed), weights

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
        """`forward` without the output projection: its input, shaped as query, and the attention's weights."""
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask=None with is_causal=True, expected a mask: is_causal is a hint about it")
        unbatched = query.dim() == 2
        if unbatched and self.running is not self:
            raise ValueError(f"query {tuple(query.shape)}, expected a batch [N, L, d] or [L, N, d] of several adapters")
        q, k, v = self._project_qkv(query, key, value)  # shaped as query, key, value
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


def _attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """`softmax(q k^T / sqrt(d / heads) + bias) v` and the softmax itself [N, heads, L, S]."""
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    weights = F.dropout((logits if bias is None else logits + bias).softmax(-1), dropout_p)
    return weights @ v, weights
