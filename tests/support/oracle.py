"""What an adapted model should compute: the plain model with `W + s · P_out B A P_in` for weights, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import expected_delta, half_of
from torch import Tensor, nn
from torch.func import functional_call

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers

Features = Callable[[Any, dict[str, Tensor]], Tensor]
Compute = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]  # called (inputs, factors)


class Called(nn.Module):
    """A model whose call gives the features."""

    def __init__(self, model: nn.Module, features: Features) -> None:
        super().__init__()
        self.model, self.features = model, features

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.features(self.model, inputs)


def results(model: nn.Module, inputs: dict[str, Tensor], features: Features) -> dict[str, Tensor]:
    """The features and the gradients of the floating-point inputs and of the factors of an adapted model."""
    return _differentiated(lambda inputs, _: features(model, inputs), inputs, factors_of(model))


def factors_of(model: nn.Module) -> dict[str, Tensor]:
    """The factors of an adapted model, as `path.name.A` and `path.name.B`."""
    return {
        f"{path}.{name}.{letter}": factor
        for path, layer in adapted_layers(model).items()
        for name in layer.weights
        for letter, factor in zip("AB", layer.factors(name), strict=True)
    }


def expected(
    plain: nn.Module,
    adapted: nn.Module,
    config: ck.CompLoRAConfig,  # with subspace_ratio=0.5
    inputs: dict[str, Tensor],
    features: Features,
) -> dict[str, Tensor]:
    """What `results` of the adapted model should be, by the factors that it has."""
    factors = {name: factor.detach().double() for name, factor in factors_of(adapted).items()}
    return _differentiated(updated(plain, config, features), inputs, factors)


def updated(plain: nn.Module, config: ck.CompLoRAConfig, features: Features) -> Compute:
    """The features of the plain model as a function of its inputs and of the factors of an adapted one."""
    called = Called(plain, features)

    def compute(inputs: dict[str, Tensor], factors: dict[str, Tensor]) -> Tensor:
        state = {name: parameter.detach() for name, parameter in called.named_parameters()}
        for key in factors:
            if key.endswith(".A"):
                path, name = key.removesuffix(".A").rsplit(".", 1)
                parameter, part = weight_of(plain.get_submodule(path), name)
                whole = f"model.{path}.{parameter}"
                weights = list(state[whole].chunk(3)) if part is not None else [state[whole]]
                A, B = factors[key], factors[f"{path}.{name}.B"]
                frozen = weights[part or 0]
                weights[part or 0] = frozen + expected_delta(frozen, A, B, config, half_of(frozen))
                state[whole] = torch.cat(weights)
        return functional_call(called, state, (inputs,))

    return compute


def weight_of(module: nn.Module, name: str) -> tuple[str, int | None]:
    """The parameter of a plain module that an adapter belongs to, and which third of its rows."""
    if name in ("", "o"):
        return ("out_proj.weight" if name else "weight"), None
    return ("in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"), "qkv".index(name)


def _differentiated(
    compute: Compute,
    inputs: dict[str, Tensor],
    factors: dict[str, Tensor],
) -> dict[str, Tensor]:
    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_() if tensor.is_floating_point() else tensor

    inputs = {name: leaf(value) for name, value in inputs.items()}
    factors = {name: factor.requires_grad_() for name, factor in factors.items()}
    y = compute(inputs, factors)
    leaves = {name: value for name, value in (inputs | factors).items() if value.requires_grad}
    gradients = torch.autograd.grad(weighted(y).sum(), tuple(leaves.values()))
    return {"y": y.detach()} | dict(zip(leaves, gradients, strict=True))


def weighted(y: Tensor) -> Tensor:
    """Features times weights that leave no direction out."""
    return y * torch.linspace(-1, 2, y.numel(), dtype=torch.float64).sin().view_as(y)
