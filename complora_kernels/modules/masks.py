"""Attention masks: which of them are known to be causal, and those of `nn.MultiheadAttention` as one that is added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from complora_kernels.common.tensor_facts import TensorFacts
from complora_kernels.common.tracing import has_values

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
