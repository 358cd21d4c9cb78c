"""The model of a step: what is followed, how long that takes by formula, and how it stands beside what was measured."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import bench_host, comparison, dispatch, roofline, targets
from benchmarks.dispatch import Launch, Memory
from benchmarks.results import Results, Row
from complora_kernels.dropout import philox_seed
from complora_kernels.kernels import launch as launch_settings

ROOT = Path(__file__).parents[2]
GPU: dict[str, Any] = {"gpu": targets.MODELLED_GPU}
MB = 10**6


def follow(run: Any) -> list[Launch]:
    with dispatch.Follower() as follower:
        run()
    return follower.launches


def launch(kernel: str = "k", reads: dict[int, int] | None = None, writes: dict[int, int] | None = None, **given: Any):
    read, written = (tuple(Memory(*pair) for pair in (each or {}).items()) for each in (reads, writes))
    return Launch(kernel, "", given.pop("operations", 0.0), read, written, **given)


# ---- what is followed


def test_products_have_their_operations_and_bytes():
    x, linear = torch.empty(300, 40, requires_grad=True), nn.Linear(40, 70).requires_grad_(False)
    forward, backward = follow(lambda: linear(x).backward(torch.empty(300, 70)))
    assert (forward.kernel, backward.kernel) == ("addmm", "mm")
    assert forward.operations == backward.operations == 2 * 300 * 40 * 70
    assert forward.bytes == 4 * (300 * 40 + 40 * 70 + 70 + 300 * 70)
    assert roofline.sides(forward) == (300, 70, 40)


def test_a_product_in_place_has_its_operations_and_reads_what_it_is_added_to():
    y, x, weight = torch.empty(300, 70), torch.empty(300, 40), torch.empty(70, 40)
    (launch,) = follow(lambda: y.addmm_(x, weight.mT))
    assert launch.operations == 2 * 300 * 40 * 70
    assert launch.bytes == 4 * (300 * 40 + 40 * 70 + 2 * 300 * 70)
    assert roofline.sides(launch) == (300, 70, 40)


def test_views_and_allocations_are_no_launches():
    x = torch.randn(6, 4)
    assert not follow(lambda: (x.view(4, 6), x.mT, x[2:], torch.empty(3), x.detach().unsqueeze(0), x.chunk(2)))
    (copied,) = follow(lambda: x.mT.contiguous())
    assert copied.bytes == 2 * 4 * 24


def test_what_is_asked_for_its_shape_alone_is_not_read():
    x = torch.empty(6, 4)
    zeros, seed = follow(lambda: (torch.zeros_like(x), philox_seed(x)))
    assert (zeros.bytes, seed.bytes) == (4 * 24, 8)


def test_whole_numbers_and_masks_are_computed_and_many_numbers_are_not():
    ids, x, mask, found = torch.tensor([[3, 9, 4]]), torch.ones(dispatch.SMALL + 1), torch.ones(3, 3), []
    follow(lambda: found.extend((ids.argmax(-1), x.add_(1), (x + 1).shape, mask.triu(1))))
    assert found[0].item() == 1
    assert torch.equal(x, torch.ones_like(x))
    assert found[2] == x.shape
    assert torch.equal(found[3], torch.ones(3, 3).triu(1))


def test_attention_is_one_launch_of_two_products_and_five():
    q, k, v = (torch.empty(2, 3, 50, 16, requires_grad=True) for _ in range(3))
    launches = follow(lambda: F.scaled_dot_product_attention(q, k, v).backward(torch.empty(2, 3, 50, 16)))
    forward, backward = [launch for launch in launches if launch.kernel in dispatch.ATTENTION]
    one = 2 * 2 * 3 * 50 * 50 * 16  # a product of queries and keys
    assert (forward.operations, backward.operations) == (2 * one, 5 * one)
    assert roofline.part_of(backward) == "attention"


def test_memory_that_is_repeated_or_stands_for_nothing_counts_once():
    x = torch.empty(5, 7)
    (added,) = follow(lambda: x + x[:1].expand(5, 7))
    assert added.bytes == 4 * 2 * 35  # the row lies where x begins
    follower = dispatch.Follower()
    names = ("x_ptr", "bias_ptr", "M", "N", "K")
    follower.launched("packed_lora_linear_fwd_kernel", names, (3, 1, 1), (x, x, 5, 2, 7))
    (kernel,) = follower.launches
    assert (kernel.bytes, kernel.operations, kernel.triton) == (4 * 35, 2 * 5 * 2 * 7, True)


def test_interpreted_kernels_are_not_dispatched(monkeypatch):
    monkeypatch.setattr(launch_settings, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), dispatch.following():
        pass


def test_calls_of_python_functions_are_counted():
    called = lambda: None
    assert bench_host.python_calls(lambda: (called(), called(), len(()))) == 3


# ---- how long it takes


def test_a_product_takes_whole_waves_of_tiles():
    rate, between = roofline.assumed("products"), roofline.assumed("between")
    K = 4096
    full = launch("mm", operations=2.0 * 1408 * 3072 * K, shapes=((1408, K), (K, 3072), (1408, 3072)))
    assert roofline.seconds(full) == pytest.approx(full.operations / rate + between)  # 11 · 12 tiles of 128 x 256
    more = launch("mm", operations=2.0 * 1409 * 3072 * K, shapes=((1409, K), (K, 3072), (1409, 3072)))
    assert 1.05 < roofline.seconds(more) / roofline.seconds(full) <= 2
    ours = launch(
        "packed_lora_linear_fwd_kernel",
        operations=full.operations,
        grid=(132, 1, 1),
        numbers={"M": 1408, "N": 3072, "K": K, "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64},
    )
    loop = full.operations / (roofline.assumed("ours") * rate)
    assert roofline.seconds(ours) == pytest.approx(loop + roofline.assumed("tile") + between)
    waves = roofline.seconds(replace(ours, grid=(133, 1, 1))) - between
    assert waves == pytest.approx(2 * (roofline.seconds(ours) - between))
    numbers = {**ours.numbers, "BLOCK_K": 256, "dx_programs": 132, "COMPUTE_DA": True, "COMPUTE_DB": True}
    backward = replace(ours, kernel="packed_lora_linear_bwd_kernel", grid=(400, 1, 1), numbers=numbers)
    loop = 2.0 * 132 * 128 * 256 * 3072 / (roofline.assumed("ours") * rate)
    again = 2 * 1408 * (K + 3072) / roofline.assumed("memory")  # x and dY
    assert roofline.seconds(backward) == pytest.approx(loop + roofline.assumed("tile") + again + between)


def test_what_is_no_product_takes_the_time_of_its_bytes():
    copied = launch("copy_", {1: 43 * MB}, {2: 43 * MB})
    assert roofline.seconds(copied) == pytest.approx(86 * MB / 4.3e12 + roofline.assumed("between"))
    skinny = launch("mm", {1: 43 * MB}, {2: 43 * MB}, operations=1e9, shapes=((9, 9), (9, 16), (9000, 16)))
    assert roofline.seconds(skinny) == roofline.seconds(copied)
    assert roofline.part_of(skinny) == "skinny products"


def test_python_takes_its_time_and_a_graph_does_not():
    launches = [launch("add", {1: 8}, {2: 8}, fusible=True)] * 1000
    eager, graphed = (roofline.modelled(launches, graphed=graphed) for graphed in (False, True))
    assert eager.total == eager.host == pytest.approx(1000 * roofline.assumed("host"))
    assert graphed.total == pytest.approx(1000 * roofline.seconds(launches[0]))
    assert graphed.parts.keys() == {"elementwise and norms"}


def test_a_compiler_joins_neighbours_and_keeps_what_others_read():
    launches = [
        launch("mm", {1: 10}, {2: 20}),
        launch("add", {2: 20, 3: 5}, {4: 20}, fusible=True),
        launch("mul", {4: 20}, {5: 20}, fusible=True),
        launch("gelu", {5: 20}, {6: 20}, fusible=True),
        launch("mm", {6: 20}, {7: 30}),
        launch("gelu_backward", {4: 20, 7: 30}, {8: 20}, fusible=True),
    ]
    product, joined, _, last = roofline.compiled(launches)
    assert product == launches[0]
    assert set(joined.reads) == {Memory(2, 20), Memory(3, 5)}
    assert set(joined.writes) == {Memory(4, 20), Memory(6, 20)}  # not 5
    assert set(last.writes) == {Memory(8, 20)}  # the result


# ---- beside what was measured


MODEL = targets.Modelled({"step/PEFT": 2.0, "model/PEFT": 2.0}, {"the step": 0.03})


def measured_on(machine: dict[str, Any]) -> list[Results]:
    rows = [
        Row("step", "the step", "complora_kernels", rounds=3, median_s=0.04),
        Row("step", "another", "complora_kernels", rounds=3, median_s=1.0),
        Row("step", "the step", "PEFT eager", rounds=3, median_s=0.1, target="step/PEFT", figure=2.5),
    ]
    return [Results(machine, rows)]


def test_the_error_of_the_model_is_a_figure_where_its_gpu_was():
    found = targets.known(measured_on(GPU), MODEL)
    assert found["model/step", targets.MODELLED_GPU].value == pytest.approx(0.25)
    assert found["model/PEFT", targets.MODEL].value == 2.0
    assert ("step/PEFT", targets.MODEL) not in found
    assert ("model/step", targets.MODELLED_GPU) not in targets.known(measured_on({"cpu": "a CPU"}), MODEL)


def test_a_modelled_figure_stands_beside_and_is_never_the_measured_one():
    target = comparison.bounds()["step/PEFT"]
    assert targets.beside(target, None, MODEL) == "modelled 2.00"
    assert targets.beside(target, targets.Figure(2.5), MODEL) == "modelled 2.00, 20% off"
    assert targets.beside(comparison.bounds()["model/PEFT"], targets.Figure(2.0), MODEL) == ""
    assert targets.verdict(target, targets.known([], MODEL).get(("step/PEFT", target["machine"]))).startswith("not yet")


def test_what_the_model_misses_has_its_reason():
    figures = targets.modelled().figures
    for target in comparison.bounds().values():
        if target["id"] in figures and target["machine"] == targets.MODELLED_GPU:
            missed = not targets.is_met(target, figures[target["id"]])
            assert missed == ("model_reason" in target), target["id"]
            assert targets.beside(target, None, targets.modelled()).endswith(")") == missed


def test_what_is_kept_is_of_targets():
    model, bounds = targets.modelled(), comparison.bounds()
    assert {name for name, target in bounds.items() if target["machine"] == targets.MODEL} <= model.figures.keys()
    assert model.figures.keys() <= bounds.keys()
    assert targets.modelled(ROOT / "none.json") == ({}, {})


@pytest.mark.long
def test_the_model_gives_what_is_kept():
    """In a process of its own: in this one kernels may be those of Triton's interpreter."""
    variables = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.model", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
