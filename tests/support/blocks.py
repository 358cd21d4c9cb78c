"""Plain residual blocks, where an image tower would have them, and what is compared of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip.transformer
import pytest
import stand_in
import torch
from open_clip.transformer import LayerNorm
from torch import Tensor, nn

from complora_kernels.modules.block import CompLoRABlock

N, L, D, HEADS = 16, 7, 32, 2

ALL = ("q", "k", "v", "o", "fc1", "fc2")


class Blocks(nn.Module):
    """Residual blocks where an image tower would have them."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.visual = nn.ModuleList(blocks)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        for block in self.visual:
            x = block(x, attn_mask=attn_mask)
        return x


def plain_block(
    layout: str = "batch first", activation: Callable[[], nn.Module] = nn.GELU, norm: Any = LayerNorm
) -> Any:
    """A block with weights of the size that trained ones have."""
    if layout == "open_clip 4":
        block = stand_in.ResidualAttentionBlock(D, HEADS)
        block.ln_1, block.ln_2, block.mlp.gelu = norm(D), norm(D), activation()
    else:
        block = open_clip.transformer.ResidualAttentionBlock(
            D, HEADS, act_layer=activation, norm_layer=norm, batch_first=layout == "batch first"
        )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=D**-0.5 if parameter.dim() == 2 else 0.5)
    return block


def fusing(patch: pytest.MonkeyPatch, fused: bool) -> None:
    """Lets blocks compute by fused operations, which must be possible, or by their own forward pass."""
    original = CompLoRABlock.run_fused

    def run_fused(block: CompLoRABlock, x: Tensor, attn_mask: Tensor | None, **options: Any) -> Tensor | None:
        y = original(block, x, attn_mask, **options) if fused else None
        assert not fused or y is not None
        return y

    patch.setattr(CompLoRABlock, "run_fused", run_fused)


def results(
    model: Any,
    x: Tensor,
    mask: Tensor | None,
    *,
    fused: bool,
    backend: str = "torch",
    autocast: torch.dtype | None = None,
    input_grad: bool = True,
) -> dict[str, Tensor]:
    """The output and every gradient. Equal seeds give equal masks, also in another dtype or on the reference."""
    x = x.clone().requires_grad_(input_grad)
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPLORA_BACKEND", backend)
        fusing(patch, fused)
        torch.manual_seed(0)
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            y = model(x, mask)
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=torch.float64).sin().view_as(y).to(y.dtype))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert None not in gradients.values()
    return {"y": y.detach()} | ({"dx": x.grad} if input_grad else {}) | gradients  # pyright: ignore[reportReturnType]


def stacked(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of all factors as one vector."""
    factors = [gradient.flatten() for name, gradient in results.items() if "lora" in name]
    return {name: value for name, value in results.items() if "lora" not in name} | {"factors": torch.cat(factors)}


def random_input(layout: str = "batch first", dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (L, N, D) if layout == "sequence first" else (N, L, D)
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
