"""The forward method that `accelerate_peft` gives PEFT's linear layers, which are known by what they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from complora_kernels import functional, reference
from complora_kernels.adapted_linear import AdaptedLinear
from complora_kernels.modules.extend import Extension, has_user_hooks


class AcceleratedLinear(Extension):
    """PEFT's `lora.Linear`, computed by `functional.lora_linear` where it is one plain LoRA on a frozen layer.

    A fused residual block (`CompLoRABlock`) reads its weight and factors by `product_of`, and does not call its
    `forward`.
    """

    def forward(
        self,
        x: Tensor,  # [..., in]
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # [..., out]
        is_plain_call = not args and all(value is None for value in kwargs.values())
        adapter = single_adapter(self) if is_plain_call and takes(self, x) else None
        if adapter is None:
            plain: Any = super()
            return plain.forward(x, *args, **kwargs)
        linear = product_of(self, adapter)
        (A,), (B,) = linear.As, linear.Bs
        return functional.lora_linear(x, linear.weight, linear.bias, A, B, dropout_p=linear.dropout_p)


def single_adapter(layer: Any) -> str | None:
    """The one active adapter of a layer that computes `functional.lora_linear` with it, else None."""
    if layer.disable_adapters or layer.merged or layer.fan_in_fan_out:
        return None
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1:
        return None
    (adapter,) = active
    base, A, B, dropout = (
        layer.base_layer,
        *(part[adapter] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout)),
    )
    if adapter in layer.lora_variant and adapter not in getattr(layer, "complora_bases", ()):
        return None
    if type(base) not in (nn.Linear, NonDynamicallyQuantizableLinear) or {type(A), type(B)} != {nn.Linear}:
        return None
    if B.bias is not None or type(dropout) not in (nn.Identity, nn.Dropout):
        return None
    if any(has_user_hooks(part) for part in (base, A, B, dropout)):
        return None
    weight, bias = base.weight, base.bias
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    return adapter


def takes(layer: Any, x: Tensor) -> bool:
    """Whether the product takes x [..., in] as PEFT does: in the dtype of the weight, or under autocast."""
    casts = reference.autocasts(x.device.type) and x.is_floating_point() and x.dtype != torch.float64
    return casts or x.dtype == layer.base_layer.weight.dtype


def product_of(layer: Any, adapter: str) -> AdaptedLinear:
    """The product of a layer with one adapter: `y = x W^T + b + s · (drop(x) A^T) B^T`, s as a part of B."""
    base, dropout, scaling = layer.base_layer, layer.lora_dropout[adapter], layer.scaling[adapter]
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # [r, in], [out, r]
    if adapter in layer.lora_variant:
        A, B = layer.fold(adapter, scaling)
    elif scaling != 1.0:
        B = scaling * B
    dropout_p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return AdaptedLinear(base.weight, base.bias, [A], [B], [(0, base.out_features)], dropout_p)
