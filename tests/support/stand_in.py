"""A CLIP as open_clip 4 builds it, which is not on the package index: its names, shapes and calls, plainly computed."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Attention(nn.Module):
    """Called `attn(x, k_x=None, v_x=None, attn_mask=None)`; a mask is added, or False leaves a pair out."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        kdim: int | None = None,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scaled_cosine: bool = False,
        scale_heads: bool = False,
        inner_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.in_proj_weight = nn.Parameter(torch.randn(3 * dim, dim) * dim**-0.5) if kdim in (None, dim) else None
        self.in_proj_bias = nn.Parameter(torch.randn(3 * dim)) if qkv_bias else None
        self.ln_q = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.ln_k = nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity()
        self.logit_scale = nn.Parameter(torch.ones(num_heads, 1, 1)) if scaled_cosine else None
        self.head_scale = nn.Parameter(torch.randn(num_heads, 1, 1)) if scale_heads else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.ln_inner = nn.LayerNorm(dim) if inner_norm else nn.Identity()
        self.out_proj = nn.Linear(dim, dim)
        self.out_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,  # [N, L, d]
        k_x: Tensor | None = None,  # [N, S, d]
        v_x: Tensor | None = None,  # [N, S, d]
        attn_mask: Tensor | None = None,  # [L, S] or [N · heads, L, S]
    ) -> Tensor:  # [N, L, d]
        assert self.in_proj_weight is not None
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (x, x if k_x is None else k_x, x if v_x is None else v_x)
        projected = map(F.linear, inputs, self.in_proj_weight.chunk(3), biases)
        q, k, v = (part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for part in projected)
        logits = self.ln_q(q) * self.scale @ self.ln_k(k).mT  # [N, heads, L, S]
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros_like(attn_mask, dtype=x.dtype).masked_fill(~attn_mask, float("-inf"))
            logits = logits + (attn_mask.view(logits.shape) if attn_mask.dim() == 3 else attn_mask)
        mixed = self.attn_drop(logits.softmax(-1)) @ v  # [N, heads, L, d / heads]
        if self.head_scale is not None:
            mixed = mixed * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(mixed.transpose(1, 2).flatten(2))))


class ResidualAttentionBlock(nn.Module):
    def __init__(self, d_model: int, n_head: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(d_model)
        self.attn = Attention(d_model, n_head)
        self.ln_2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(d_model, 4 * d_model), gelu=nn.GELU(), c_proj=nn.Linear(4 * d_model, d_model))
        )

    def forward(
        self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        normed = self.ln_1(q_x)
        mask = None if attn_mask is None else attn_mask.to(q_x.dtype)
        key, value = (normed if part is None else part for part in (k_x, v_x))
        x = q_x + self.attn(normed, k_x=key, v_x=value, attn_mask=mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            if self.grad_checkpointing:
                x = checkpoint(block, x, None, None, attn_mask, use_reentrant=False)
            else:
                x = block(x, attn_mask=attn_mask)
        return x


class VisionTransformer(nn.Module):
    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.transformer = Transformer(width, layers, heads)
        self.ln_post = nn.LayerNorm(width)
        self.pool_type, self.attn_pool, self.output_tokens = "tok", None, False
        self.proj = nn.Parameter(torch.randn(width, output_dim) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, image_size, image_size] to [N, output_dim]
        patches = self.conv1(x).flatten(2).mT  # [N, patches, width]
        tokens = torch.cat([self.class_embedding.expand(len(x), 1, -1), patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(tokens)[:, 0]) @ self.proj


class CLIP(nn.Module):
    """Texts may be shorter than the context, as in open_clip's `CustomTextCLIP`: the mask's corner is used.

    `forward` calls `_encode_text`, not `encode_text`, as open_clip 4 does.
    """

    def __init__(self, embed_dim: int, vision: dict[str, int], text: dict[str, int]) -> None:
        super().__init__()
        width, context = text["width"], text["context_length"]
        self.visual = VisionTransformer(**vision, output_dim=embed_dim)
        self.transformer = Transformer(width, text["layers"], text["heads"])
        self.token_embedding = nn.Embedding(text["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.randn(context, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed_dim) * width**-0.5)
        self.text_pool_type = "argmax"
        self.register_buffer("attn_mask", torch.full((context, context), float("-inf")).triu(1), persistent=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.transformer.set_grad_checkpointing(enable)
        self.transformer.set_grad_checkpointing(enable)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        return self._encode_text(text, normalize)

    def _encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        length = text.shape[1]
        x = self.token_embedding(text) + self.positional_embedding[:length]
        x = self.ln_final(self.transformer(x, attn_mask=self.get_buffer("attn_mask")[:length, :length]))
        features = x[torch.arange(len(x)), text.argmax(-1)] @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.encode_image(image, True), self._encode_text(text, True), self.logit_scale.exp()
