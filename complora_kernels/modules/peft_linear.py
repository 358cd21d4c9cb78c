"""The forward method that `accelerate_peft` gives PEFT's linear layers, which are known by what they have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from complora_kernels import functional, reference
from complora_kernels.modules.extend import Extension, has_user_hooks


class AcceleratedLinear(Extension):
    """PEFT's `lora.Linear`, computed by `functional.lora_linear` where it is one plain LoRA on a frozen layer."""

    def forward(
        self,
        x: Tensor,  # [..., in]
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:  # [..., out]
        adapter = None if args or any(value is not None for value in kwargs.values()) else _single_adapter(self, x)
        if adapter is None:
            plain: Any = super()
            return plain.forward(x, *args, **kwargs)
        layer: Any = self
        base, dropout, scaling = layer.base_layer, layer.lora_dropout[adapter], layer.scaling[adapter]
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # [r, in], [out, r]
        if adapter in layer.lora_variant:
            (A, B), scaling = layer.fold(adapter, scaling), 1.0
        return functional.lora_linear(
            x,
            base.weight,
            base.bias,
            A,
            B,
            scaling=scaling,
            dropout_p=getattr(dropout, "p", 0.0),
            training=dropout.training,
        )


def _single_adapter(layer: Any, x: Tensor) -> str | None:
    """The one active adapter, where `functional.lora_linear` computes what PEFT does."""
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
    casts = reference.autocasts(x.device.type) and x.is_floating_point() and x.dtype != torch.float64
    return adapter if casts or x.dtype == weight.dtype else None
