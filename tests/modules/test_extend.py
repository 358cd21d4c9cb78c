"""What a model's class is after it was adapted: a subclass of the same name, which nobody else has to know of."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from small_clip import adapted
from torch import Tensor, nn

import complora_kernels as ck
from complora_kernels.modules import CompLoRALayer
from complora_kernels.modules.forward_scope import Scoped


class Net(nn.Module):
    """A model of no known library."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Registered(Net):
    """A base that registers its subclasses, and asks each for a keyword."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.known.append(key)


class Own(Registered, key="own"):
    """Somebody's model."""


def trained(model: nn.Module) -> nn.Module:
    """The model with an update that is not zero."""
    model = adapted(model, target_modules=".*", subspace_k=1)
    with torch.no_grad():
        for parameter in ck.adapter_parameters(model):
            parameter.normal_()
    return model


def test_the_class_keeps_its_name():
    model = adapted(Net(), target_modules=".*", subspace_k=1)
    assert isinstance(model, Scoped)
    assert isinstance(model, Net)
    assert (type(model).__name__, type(model).__qualname__, type(model).__module__) == ("Net", "Net", __name__)


def test_a_base_that_registers_its_subclasses_sees_none_of_ours():
    model = adapted(Own(), target_modules=".*", subspace_k=1)
    assert isinstance(model, Scoped)
    assert Registered.known == ["own"]


def test_a_graph_module_keeps_its_class_and_can_be_recompiled():
    plain = Net()
    model = trained(torch.fx.symbolic_trace(plain))
    assert isinstance(model, torch.fx.GraphModule)
    x = torch.randn(3, 4)
    expected = model(x)
    assert not torch.equal(expected, plain(x))
    assert torch.equal(copy.deepcopy(model)(x), expected)
    model.recompile()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("model", [Net, lambda: nn.Sequential(Net(), Net())])
def test_torch_fx_follows_a_model_whose_layers_are_leaves(model):
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, CompLoRALayer) or super().is_leaf_module(m, module_qualified_name)

    model, x = trained(model()), torch.randn(3, 4)
    graph = Tracer().trace(model)
    assert torch.equal(torch.fx.GraphModule(model, graph)(x), model(x))
