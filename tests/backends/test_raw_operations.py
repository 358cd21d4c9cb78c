"""The registered operations, called with anything: a result is right, or there is an error; none leaves its memory."""

from __future__ import annotations

import pytest
import torch
from mutations import REFUSALS, arguments, check_refused_or_right
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from triton_device import DEVICE

from complora_kernels.backends import build

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, with which Triton's interpreter computes
]

EXTENSION = ("project_complement", "fold_factors", "packed_lora_linear_factor_grads", "drop")
TRITON = ("fold_factors", "packed_lora_linear_fwd", "packed_lora_linear_bwd")


@pytest.mark.parametrize("name", EXTENSION)
def test_of_the_extension(name):
    assert build.failure("cpu") is None, build.failure("cpu")
    check_refused_or_right(getattr(torch.ops.complora, name), name, torch.device("cpu"), 300)


@pytest.mark.parametrize("name", TRITON)
def test_of_triton(name):
    check_refused_or_right(getattr(torch.ops.complora_triton, name), f"triton.{name}", DEVICE, 60)


@pytest.mark.parametrize("name", [*EXTENSION, *(f"triton.{name}" for name in TRITON)])
def test_a_tensor_without_values_beside_others(name):
    """The fake, which knows shapes alone, would hand out memory that nobody has written to."""
    device = DEVICE if name.startswith("triton.") else torch.device("cpu")
    operations = torch.ops.complora_triton if name.startswith("triton.") else torch.ops.complora
    leaves, structure = tree_flatten(arguments(name, device))
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            given = tree_unflatten([*leaves[:i], leaf.to("meta"), *leaves[i + 1 :]], structure)
            with pytest.raises(REFUSALS, match=r"a tensor is on (meta|cpu|cuda:0), expected"):
                getattr(operations, name.removeprefix("triton."))(*given)
