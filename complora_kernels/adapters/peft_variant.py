"""Comp-LoRA as a variant of PEFT's LoRA, for models of `get_peft_model`. Imports PEFT, when `peft_config` is called."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn
from torch.nn import functional as F

from complora_kernels import functional, subspace
from complora_kernels.config import CompLoRAConfig
from complora_kernels.modules.layer import require_plain
from complora_kernels.modules.protected import PROJECTED_SIDES

__all__ = ["ComplementLinear", "ComplementLoraConfig", "Linear", "LoraLayer"]

if not isinstance(getattr(Linear, "lora_variants", None), property):
    raise ImportError("the installed peft has no lora_variants, expected peft>=0.21")


@dataclass
class ComplementLoraConfig(LoraConfig):
    """PEFT's `LoraConfig` of a Comp-LoRA. It is saved without `complora`: saved factors are an ordinary LoRA."""

    complora: CompLoRAConfig | None = field(
        default=None, metadata={"is_lora_variant": True, "help": "the sides and subspaces that an update leaves alone"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._register_custom_module({nn.Linear: ComplementLinear})

    def to_dict(self) -> dict[str, Any]:
        """The fields that PEFT knows."""
        return {name: value for name, value in super().to_dict().items() if name != "complora"}


class ComplementLinear(Linear):
    """PEFT's LoRA layer, whose adapters may be Comp-LoRA: `y = x W^T + b + s · (drop(x) Ã^T) B̃^T` with folded factors.

    `lora_A` and `lora_B` are raw; a state dict has the folded factors, the same function, from which training goes on
    as from the raw ones.
    """

    complora_bases: dict[str, dict[subspace.Side, subspace.Basis]]  # by adapter

    @property
    def lora_variants(self) -> dict[Any, Any]:
        """PEFT's variants of a linear layer, and Comp-LoRA."""
        return super().lora_variants | {("complora",): ComplementVariant}

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant | None:
        """The variant that a configuration asks for; one of PEFT's own asks for no Comp-LoRA."""
        if not isinstance(config, ComplementLoraConfig):
            config = copy.copy(config)
            config.__class__ = ComplementLoraConfig
        return super().resolve_lora_variant(config=config, **kwargs)

    def fold(self, adapter: str, scaling: float) -> tuple[Tensor, Tensor]:
        """`Ã` [r, in] and `scaling · B̃` [out, r], differentiable, in the dtype of the factors."""
        factors: list[Any] = [self.lora_A[adapter].weight, self.lora_B[adapter].weight]
        A, B = factors  # [r, in], [out, r]
        bases = self.complora_bases[adapter]
        for side, basis in bases.items():
            if basis.matrix.device != B.device:
                bases[side] = basis._replace(matrix=basis.matrix.to(B.device))
        on_output, on_input = bases.get("output"), bases.get("input")
        (folded_A,), (scaled_B,) = functional.fold_factors(
            [A],
            [B],
            [on_output and on_output.matrix],
            [on_input and on_input.matrix],
            output_basis_kinds=on_output.kind if on_output else "principal",
            input_basis_kinds=on_input.kind if on_input else "principal",
            scaling=scaling,
        )
        return folded_A, scaled_B

    def get_delta_weight(self, adapter: str) -> Tensor:  # [out, in]
        """`ΔW` of an adapter: `s · B̃ Ã` of a Comp-LoRA."""
        if adapter not in getattr(self, "complora_bases", {}):
            return super().get_delta_weight(adapter)
        folded_A, scaled_B = self.fold(adapter, self.scaling[adapter])
        with torch.autocast(scaled_B.device.type, enabled=False):
            return scaled_B @ folded_A


class ComplementVariant(LoraVariant):
    """How a `ComplementLinear`, the `module`, initialises, computes and merges an adapter that is a Comp-LoRA."""

    @staticmethod
    def init(
        module: Any, adapter_name: str, config: ComplementLoraConfig | None = None, target_name: str = "", **_: Any
    ) -> None:
        assert config is not None
        assert config.complora is not None
        weight, settings = module.get_base_layer().weight, config.complora
        require_plain(module.get_base_layer(), target_name or "the base layer", weight)
        subspace.check_weight(weight, target_name)
        if not hasattr(module, "complora_bases"):
            module.complora_bases = {}
            module.other_param_names = (*module.other_param_names, "complora_bases")  # what delete_adapter deletes
            module.register_state_dict_post_hook(_fold_in_state)
        module.complora_bases[adapter_name] = {
            side: subspace.projection_basis(weight, settings, side, target_name)
            for side in PROJECTED_SIDES[settings.sides]
        }

    @staticmethod
    def forward(
        module: Any,
        active_adapter: str,
        x: Tensor,  # [..., in]
        result: Tensor,  # [..., out]
        **_: Any,
    ) -> Tensor:  # [..., out]
        folded_A, scaled_B = module.fold(active_adapter, module.scaling[active_adapter])
        return result + F.linear(F.linear(module.lora_dropout[active_adapter](x), folded_A), scaled_B)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight + module.get_delta_weight(active_adapter).detach()).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter).detach()

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return (orig_weight - module.get_delta_weight(active_adapter)).detach().to(orig_weight.dtype)


@torch.no_grad()
def _fold_in_state(module: ComplementLinear, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Puts the folded factors, without the scaling, in the place of the raw ones: what other programs read as LoRA."""
    for adapter in module.complora_bases:
        if module.lora_B[adapter].weight.is_meta:  # nothing is loaded yet
            continue
        for name, factor in zip(("lora_A", "lora_B"), module.fold(adapter, 1.0), strict=True):
            if f"{prefix}{name}.{adapter}.weight" in state_dict:
                state_dict[f"{prefix}{name}.{adapter}.weight"] = factor
