"""How much of a small update arrives in a bfloat16 output?

The share is `<y - x W^T, x ΔW^T> / |x ΔW^T|²` in float64 over all outputs: 1 where the update is realised without bias,
0 where it is lost in the rounding of y. A plan that rounds the base product first loses what is below half a unit in
the last place of y.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from benchmarks.machine import on_gpu
from benchmarks.results import Row
from complora_kernels.backends import plans
from complora_kernels.functional import complora_linear
from complora_kernels.subspace import principal_basis

DEVICE, DTYPE = torch.device("cuda" if on_gpu() else "cpu"), torch.bfloat16
M, WIDTH, RANK, K = 4096, 768, 16, 384  # 3.1 million outputs: the share is known to about a hundredth
OURS = "complora_linear"


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2])
def test_share_of_a_small_update(comparison, size):
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False).to(DEVICE, DTYPE)
    basis = principal_basis(linear.weight, k=K)  # [out, k]
    A, B = torch.randn(RANK, WIDTH, device=DEVICE), torch.randn(WIDTH, RANK, device=DEVICE)
    B -= basis @ (basis.mT @ B)
    B *= size * linear.weight.float().norm() / (B @ A).norm()
    x = torch.randn(M, WIDTH, device=DEVICE).to(DTYPE)
    base = x.double() @ linear.weight.double().mT  # [M, out]
    update = (x.double() @ A.double().mT) @ B.double().mT

    def ours(plan: str | None = None) -> Tensor:
        precision = "fast" if plan == "addmm" else "exact"
        if plan is None:
            return complora_linear(x, linear.weight, None, A, B, output_basis=basis)
        with plans.override(plans.Plan(plan)):
            return complora_linear(x, linear.weight, None, A, B, output_basis=basis, precision=precision)

    baselines: dict[str, tuple[Callable[[], Callable[[], Tensor]], str]] = {
        OURS: (lambda: ours, ""),
        "addmm": (lambda: partial(ours, "addmm"), 'ours with precision="fast": rounds twice'),
        "PEFT lora.Linear": (lambda: by_peft(x, linear, A, B), "rounds the base product, the update and their sum"),
    }
    shape = f"{WIDTH}->{WIDTH} M={M} r={RANK} bfloat16 |ΔW|/|W|={size:g}"
    for name, (make, remark) in baselines.items():
        run = comparison.attempt(shape, name, make)
        if run is not None:
            realised = run().double() - base
            share = float((realised * update).sum() / update.square().sum())
            comparison.record(Row(comparison.benchmark, shape, name, remark, rounds=1, share=share))
            assert name != OURS or abs(share - 1) < 0.05


def by_peft(x: Tensor, linear: nn.Linear, A: Tensor, B: Tensor) -> Callable[[], Tensor]:
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["base"])
    model = peft.get_peft_model(nn.ModuleDict({"base": linear}), config, autocast_adapter_dtype=False)
    layer = model.get_submodule("base_model.model.base")
    assert isinstance(layer, peft.tuners.lora.Linear)
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = (nn.Parameter(t.to(DTYPE)) for t in (A, B))
    return lambda: layer(x).detach()
