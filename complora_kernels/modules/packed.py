"""Layers with several adapters on one packed weight, and `CompLoRAPackedLinear`, the plainest of them."""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from complora_kernels import functional
from complora_kernels.common.parameters import parameter_of
from complora_kernels.config import CompLoRAConfig
from complora_kernels.modules.float32_state import Factors
from complora_kernels.modules.forward_scope import factors_in_scope
from complora_kernels.modules.layer import CompLoRALayer, FactorPairs, clone_as, require_plain
from complora_kernels.modules.protected import WeightRows


class PackedLayer(CompLoRALayer):
    """A layer whose adapters have names: `lora_A.q` [r, in] and `lora_B.q` [out, r] for q."""

    lora_A: Factors
    lora_B: Factors

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The raw factors `A` [r, in] and `B` [out, r] of one adapter."""
        # `get_parameter` refuses the tensors of functional_call
        return parameter_of(self.lora_A, name), parameter_of(self.lora_B, name)

    def _adapt(
        self, config: CompLoRAConfig, names: Collection[str] | None, rows: dict[str, WeightRows], path: str
    ) -> None:
        """Adds those adapters of `rows` that are among `names`, or among `config.target_modules`."""
        label = path or type(self).__name__
        given = config.target_modules if names is None else names
        chosen = {} if isinstance(given, str) else {name: rows[name] for name in rows if name in given}
        if not chosen:
            raise ValueError(
                f"target_modules={config.target_modules!r} selects nothing in {label}, "
                f"expected some of {', '.join(rows)}"
            )
        parameters = dict.fromkeys(parameter for parameter, *_ in rows.values())
        require_plain(self, label, *(operator.attrgetter(parameter)(self) for parameter in parameters))
        self._init_adapter(config, chosen, path)
        self.hold_factors(self, {name: self._new_factors(name) for name in chosen})

    @staticmethod
    def hold_factors(holder: Any, factors: FactorPairs) -> None:
        holder.lora_A = Factors({name: A for name, (A, _) in factors.items()}).train(holder.training)
        holder.lora_B = Factors({name: B for name, (_, B) in factors.items()}).train(holder.training)

    def _packed_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, ...], rows: list[tuple[int, int]]
    ) -> Tensor:
        if not names or not self.active:
            return F.linear(x, weight, bias)
        dtype = functional.compute_dtype(x)
        self._require_frozen(weight, bias)
        folded_As, scaled_Bs = factors_in_scope(self, names, dtype)
        dropout = {"dropout_p": self.config.lora_dropout, "training": self.training}
        columns = self.columns_of(x, len(names))
        return functional.packed_lora_linear(x, weight, bias, folded_As, scaled_Bs, rows, **dropout, columns=columns)

    def extra_repr(self) -> str:
        adapters = ", ".join(self.weights)
        return f"{super().extra_repr()} r={self.config.r}, sides={self.config.sides}, adapters={adapters}"


def packed_rows(parameter: str, d: int) -> dict[str, WeightRows]:
    """Where the weights of q, k and v, of d rows each, lie above each other in a parameter."""
    return {name: WeightRows(parameter, i * d, (i + 1) * d) for i, name in enumerate(("q", "k", "v"))}


class CompLoRAPackedLinear(PackedLayer, nn.Linear):
    """A `nn.Linear` whose output is q, k and v side by side, each [..., out / 3], with an adapter on any of them.

    Same call, same parameters, same results before training. Each of q, k and v has its own [out / 3, in] weight,
    subspace and dropout mask; the three are computed in one product. Make it with `from_linear`. A fused residual block
    (`CompLoRABlock`) reads its weight and factors and does not call its `forward`. See also the base class.
    """

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, config: CompLoRAConfig, *, names: Collection[str] | None = None, path: str = ""
    ) -> CompLoRAPackedLinear:
        """Adapts `linear`: the result shares its parameters and hooks; `linear` stays as it was.

        Args:
            linear: a plain floating-point `nn.Linear`, frozen before use as for `CompLoRALinear.from_linear`.
            config: rank, scaling, dropout and subspace.
            names: the adapters, among q, k and v; None takes `config.target_modules`.
            path: the name of the module in its model, for messages and for random subspaces.

        Raises:
            ValueError: as `CompLoRALinear.from_linear`, for a number of outputs that 3 does not divide, and where no
                target is among q, k and v.
            TypeError: not a plain `nn.Linear`.
        """
        label = path or "linear"
        if type(linear) is not nn.Linear:
            raise TypeError(f"{label} is a {type(linear).__name__}, expected a plain nn.Linear")
        if linear.out_features % 3:
            raise ValueError(f"{label} has out_features={linear.out_features}, expected those of q, k and v: 3 · d")
        layer = clone_as(linear, cls)
        layer._adapt(config, names, packed_rows("weight", linear.out_features // 3), path)
        return layer

    def forward(
        self,
        input: Tensor,  # [..., in]
    ) -> Tensor:  # [..., out]
        layer = self.running
        rows = [(start, stop) for _, start, stop in layer.weights.values()]
        return layer._packed_linear(input, self.weight, self.bias, tuple(layer.weights), rows)
