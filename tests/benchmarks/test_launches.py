"""What a step launches, counted by the real dispatch without a GPU: a launch more or less is a change to be seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
# Of a step of ViT-B/16's image tower, torch's operations included. A block has 19: 8 products (q, k and v are one), 2
# attentions, 2 LayerNorms and their gradients, an activation and its gradient, 3 of g and the gradients of B̃. The
# other 17 are what is before and after the blocks, the last block's one position, and two folds.
LIMIT = 250
# Of a block within the tower. `python -m benchmarks.launches` prints them, and those of the tower.
FORWARD = {
    "aten addmm": 3,
    "aten scaled_dot_product_flash_attention_for_cpu": 1,
    "triton activation_fwd": 1,
    "triton norm_fwd": 2,
    "triton packed_lora_linear_fwd": 1,
}
BACKWARD = {
    "aten mm": 3,
    "aten scaled_dot_product_flash_attention_for_cpu_backward": 1,
    "triton activation_bwd": 1,
    "triton norm_bwd_da": 2,
    "triton packed_lora_linear_bwd": 1,
    "triton packed_lora_linear_db": 3,
}
BLOCKS = {
    "ours": {"forward": FORWARD, "backward": BACKWARD},
    "ours, dropout": {"forward": {**FORWARD, "aten philox_seed": 4}, "backward": BACKWARD},
}
# Forward and backward pass of the tower of twelve blocks, of which the last computes one position.
TOWERS = {"ours": (106, 139), "ours, dropout": (155, 139), "frozen model": (175, 220)}


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    """In a process of its own: in this one kernels may be those of Triton's interpreter."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.launches", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compared(found: dict[str, int], expected: dict[str, int]) -> str:
    """A table, kernel by kernel."""
    lines = [f"{'kernel':<60} launches expected"]
    for kernel in sorted({*found, *expected}):
        numbers = found.get(kernel, 0), expected.get(kernel, 0)
        lines.append(f"{kernel:<60} {numbers[0]:8} {numbers[1]:8} {'' if numbers[0] == numbers[1] else '<-'}")
    return "\n".join(lines)


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("model", BLOCKS)
def test_the_launches_of_a_block(counts, model, phase):
    found, expected = counts[model]["block"][phase], BLOCKS[model][phase]
    assert found == expected, f"{model}, {phase}\n{compared(found, expected)}"


@pytest.mark.parametrize("model", TOWERS)
def test_the_launches_of_a_tower(counts, model):
    phases = counts[model]["tower"]
    found = tuple(sum(phases[phase].values()) for phase in ("forward", "backward"))
    assert found == TOWERS[model], f"{model}: {json.dumps(phases, indent=1)}"


def test_a_step_launches_little(counts):
    assert sum(sum(kernels.values()) for kernels in counts["ours"]["tower"].values()) <= LIMIT
