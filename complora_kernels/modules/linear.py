"""`CompLoRALinear`: `nn.Linear` with a low-rank update in the complement of its principal subspace."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from complora_kernels import functional
from complora_kernels.common.parameters import parameter_of
from complora_kernels.config import CompLoRAConfig
from complora_kernels.modules.extend import class_name
from complora_kernels.modules.forward_scope import factors_in_scope
from complora_kernels.modules.layer import CompLoRALayer, FactorPairs, clone_as, require_plain
from complora_kernels.modules.protected import WeightRows


class CompLoRALinear(CompLoRALayer, nn.Linear):
    """`y = x W^T + b + scaling · (drop(x) (A P_in)^T) (P_out B)^T` (Comp-LoRA, arXiv 2501.15040).

    A `nn.Linear` with the same `weight` and `bias`, the parameters `lora_A` [r, in] and `lora_B` [out, r] (float32 or
    wider), and bases that are computed from the weight, or by `protect_activations` from its inputs, and are not in the
    state dict. Make it with `from_linear`. A fused residual block (`CompLoRABlock`) reads its weight and factors and
    does not call its `forward`. See also the base class.
    """

    lora_A: nn.Parameter  # [r, in]
    lora_B: nn.Parameter  # [out, r]

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: CompLoRAConfig, *, path: str = "") -> CompLoRALinear:
        """Adapts `linear`: the result shares its parameters and hooks; `linear` stays as it was.

        Args:
            linear: a plain floating-point `nn.Linear`. Freeze it before use (`apply_complora` does): the weight and the
                bias get no gradient, and one that asks for it is an error in the forward pass.
            config: rank, scaling, dropout and subspace; its selection of modules is not looked at.
            path: the name of the module in its model, for messages and for random subspaces.

        Raises:
            ValueError: a quantised or pruned base, NaN in the weight, k above min(out, in).
            TypeError: not a plain `nn.Linear`: subclasses may compute something else.
        """
        if type(linear) not in (nn.Linear, NonDynamicallyQuantizableLinear):
            raise TypeError(
                f"{path or 'linear'} is a {class_name(linear)}, expected a plain nn.Linear: other classes, quantised "
                "ones among them, may compute something else"
            )
        require_plain(linear, path or "linear", linear.weight)
        layer = clone_as(linear, cls)
        layer._init_adapter(config, {"": WeightRows("weight", 0, linear.out_features)}, path)
        cls.hold_factors(layer, {"": layer._new_factors("")})
        return layer

    @staticmethod
    def hold_factors(holder: Any, factors: FactorPairs) -> None:
        holder.lora_A, holder.lora_B = factors[""]

    def factors(self, name: str = "") -> tuple[nn.Parameter, nn.Parameter]:
        """The raw factors `A` [r, in] and `B` [out, r]."""
        return parameter_of(self, "lora_A"), parameter_of(self, "lora_B")

    def forward(
        self,
        input: Tensor,  # [..., in]
    ) -> Tensor:  # [..., out]
        weight, bias, layer = self.weight, self.bias, self.running
        if not layer.active:
            return F.linear(input, weight, bias)
        dtype = functional.compute_dtype(input)
        self._require_frozen(weight, bias)
        (folded_A,), (scaled_B,) = factors_in_scope(layer, ("",), dtype)
        dropout = {"dropout_p": layer.config.lora_dropout, "training": self.training}
        columns = layer.columns_of(input, 1)
        return functional.lora_linear(input, weight, bias, folded_A, scaled_B, **dropout, columns=columns)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.config.r}, sides={self.config.sides}"
