"""Facts about tensors hold for one version of one tensor, and no longer than it lives."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor

from complora_kernels.common.tensor_facts import TensorFacts


def test_a_fact_holds_for_one_version():
    facts: TensorFacts[float] = TensorFacts()

    def total(tensor: Tensor) -> float:
        return float(tensor.sum())

    tensor = torch.ones(3)
    assert facts.get(tensor) is None
    assert facts.compute(tensor, total) == 3
    assert facts.get(tensor) == 3
    tensor.add_(1)
    assert facts.get(tensor) is None
    assert facts.compute(tensor, total) == 6
    assert facts.get(tensor) == 6


def test_false_is_a_fact_and_equal_tensors_are_different_ones():
    facts: TensorFacts[bool] = TensorFacts()
    tensor = torch.ones(3)
    assert facts.set(tensor, False) is False
    assert facts.get(tensor) is False
    assert facts.get(torch.ones(3)) is None


def test_inference_tensors_which_have_no_version():
    facts: TensorFacts[int] = TensorFacts()
    with torch.inference_mode():
        tensor = torch.ones(3)
        assert facts.set(tensor, 5) == 5
    assert facts.get(tensor) == 5


def test_a_fact_is_forgotten_with_its_tensor():
    facts: TensorFacts[Tensor] = TensorFacts()
    tensor = torch.ones(3)
    fact = weakref.ref(facts.set(tensor, torch.zeros(1)))
    gc.collect()
    assert fact() is not None
    del tensor
    gc.collect()
    assert fact() is None
