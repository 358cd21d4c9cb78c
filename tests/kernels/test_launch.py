"""Launches that are kept: the compiled kernel is the one that Triton picks, and Triton is asked where it must be.

Nothing is compiled: a stand-in for Triton's compiler records what it was asked for, and the launches of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from layers import LEAVES, Layer, assert_accurate, make_layer, results
from torch import Tensor
from triton_device import DEVICE

from benchmarks.aot import ChipDriver
from complora_kernels import reference
from complora_kernels.backends import plans
from complora_kernels.backends.plans import Plan
from complora_kernels.functional import complora_linear
from complora_kernels.kernels import launch


class Launched(NamedTuple):
    """One launch, as the driver would get it."""

    compiled: tuple[Any, ...]  # types, alignments and divisibilities, constants: all that the machine code depends on
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]  # of tensors their addresses


def kernel(first, x_ptr, y_ptr, n, stride, scale, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    pass


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launched]:
    """The launches, which end where the driver would begin; CPU tensors stand for those of a GPU."""
    found: list[Launched] = []

    class Compiled:
        function, packed_metadata = None, ()

        def __init__(self, source: Any, **options: Any) -> None:
            self.key = tuple(map(str, (source.signature, source.attrs, source.constants, options["options"])))

        def launch_metadata(self, *_: Any) -> None:
            return None

        def run(self, x: int, y: int, z: int, *others: Any) -> None:
            arguments = (value.data_ptr() if isinstance(value, Tensor) else value for value in others[6:])
            found.append(Launched(self.key, (x, y, z), tuple(arguments)))

    prepared.cache_clear()  # a kept launch is of one kernel
    monkeypatch.setattr(triton.compiler, "compile", Compiled)
    monkeypatch.setattr(triton.runtime.driver, "_active", ChipDriver(90))
    monkeypatch.setattr(launch, "_UNHOOKED", triton.JITFunction.run)
    return found


def jitted() -> Any:
    """The kernel, compiled as on a GPU wherever the tests run."""
    return triton.JITFunction(kernel)


def at(offset: int, dtype: torch.dtype) -> Tensor:
    """A tensor that many bytes behind an address that is a multiple of 16."""
    memory = torch.empty(64, dtype=torch.uint8)
    start = -memory.data_ptr() % 16 + offset
    return memory[start : start + 16].view(dtype)


def random_launch(choose: random.Random) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    numbers = choose.choice([0, 1, 16, 17, 2**31 - 1, 2**31, 2**40]), choose.choice([1, 16, 17])
    dtypes = (torch.float32, torch.bfloat16)
    tensors = tuple(at(choose.choice([0, 4, 8]), choose.choice(dtypes)) for _ in range(2))
    return (*numbers, choose.choice([0.25, 0.5]), choose.choice([True, False]), 16), tensors


@launch.cached
def prepared(n: int, stride: int, scale: float, flag: bool, block: int) -> launch.Launch:
    constexprs = {"BLOCK": block, "FLAG": flag}
    return launch.Launch((n % 7 + 1, 2), (n, stride, scale), constexprs, before=(n % 3,), num_warps=4, num_stages=2)


def by_triton(function: Any, numbers: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> None:
    n, stride, scale, flag, block = numbers
    options = {"FLAG": flag, "BLOCK": block, "num_warps": 4, "num_stages": 2}
    function[(n % 7 + 1, 2)](n % 3, *tensors, n, stride, scale, **options)


def test_goes_to_the_kernel_that_triton_picks(launched):
    ours, theirs, choose = jitted(), jitted(), random.Random(0)
    cases = [random_launch(choose) for _ in range(300)]  # several of each kept launch, on other tensors
    for _ in range(2):  # the second time all are known
        for numbers, tensors in cases:
            launch.run(ours, prepared(*numbers), tensors)
            by_triton(theirs, numbers, tensors)
            ours_launched, expected = launched[-2:]
            assert ours_launched == expected
    assert len({one.compiled for one in launched}) > 50


def test_a_known_launch_does_not_ask_triton(launched, monkeypatch):
    function, numbers, x = jitted(), (16, 1, 0.5, True, 16), at(0, torch.float32)
    prepare = prepared.__wrapped__(*numbers)
    launch.run(function, prepare, (x, x))
    monkeypatch.setattr(function, "run", lambda *_, **__: pytest.fail("Triton was asked"))
    launch.run(function, prepare, (x, x))
    assert launched[0] == launched[1]
    with pytest.raises(pytest.fail.Exception, match="Triton was asked"):
        launch.run(function, prepare, (x, at(4, torch.float32)))  # of another alignment


def knob(group: str, name: str, value: object) -> Callable[[Any, pytest.MonkeyPatch], None]:
    knobs: Any = triton.knobs  # pyright: ignore[reportAttributeAccessIssue]
    return lambda _, monkeypatch: monkeypatch.setattr(getattr(knobs, group), name, value)


def run_replaced(_function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda *arguments, **options: run(*arguments, **options))


HOOKS: dict[str, Callable[[Any, pytest.MonkeyPatch], None]] = {
    "enter": knob("runtime", "launch_enter_hook", lambda *_: None),
    "exit": knob("runtime", "launch_exit_hook", lambda *_: None),
    "debug": knob("runtime", "debug", True),
    "before": lambda function, _: function.pre_run_hooks.append(lambda *_, **__: None),
    "another run": run_replaced,
}


@pytest.mark.parametrize("hook", HOOKS)
def test_triton_launches_where_somebody_looks_on(hook, launched, monkeypatch):
    function, x = jitted(), at(0, torch.float32)
    prepare = prepared.__wrapped__(16, 1, 0.5, True, 16)
    launch.run(function, prepare, (x, x))
    HOOKS[hook](function, monkeypatch)
    monkeypatch.setattr(function, "pre_run_hooks", [*function.pre_run_hooks, lambda *_, **__: seen.append(hook)])
    seen: list[str] = []
    for _ in range(2):
        launch.run(function, prepare, (x, x))
    assert seen == [hook] * 2
    assert len(launched) == 3


def test_another_version_of_triton_is_asked_each_time(launched, monkeypatch):
    monkeypatch.setattr(launch, "_UNHOOKED", None)
    function, numbers, x = jitted(), (16, 1, 0.5, True, 16), at(0, torch.float32)
    prepare = prepared.__wrapped__(*numbers)
    for _ in range(2):
        launch.run(function, prepare, (x, x))
    assert not prepare.compiled
    assert launched[0] == launched[1]


def test_threads_launch_at_once(launched):
    function, choose = jitted(), random.Random(1)
    cases = [random_launch(choose) for _ in range(200)]
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda case: launch.run(function, prepared(*case[0]), case[1]), cases * 2))
    ours = sorted(launched, key=str)
    launched.clear()
    for numbers, tensors in cases * 2:
        by_triton(function, numbers, tensors)
    assert ours == sorted(launched, key=str)


def test_whole_numbers_as_triton_counts_them():
    for n in range(1, 200):
        assert launch.power_of_two(n, 16, 64) == min(max(triton.next_power_of_2(n), 16), 64)
        assert [launch.cdiv(n, step) for step in (1, 7, 64)] == [triton.cdiv(n, step) for step in (1, 7, 64)]


def on_device(layer: Layer) -> Layer:
    tensors = {name: value.to(DEVICE) for name, value in vars(layer).items() if isinstance(value, Tensor)}
    return replace(layer, **tensors)


@pytest.mark.parametrize("plan", [Plan("fused", "inside"), Plan("concat"), Plan("merge"), Plan("addmm")], ids=str)
def test_what_is_kept_belongs_to_the_problem_at_hand(plan):
    """Steps of many problems in turns: a ragged last batch, another rank, dtype or weight, frozen factors."""
    base = on_device(make_layer(batch=(40,), r=8, dtype=torch.bfloat16, k_in=None))
    changes: list[dict[str, Any]] = [
        {},
        {"x": base.x[:33], "dY": base.dY[:33]},
        {"lora_A": base.lora_A[:3].contiguous(), "lora_B": base.lora_B[:, :3].contiguous()},
        {"weight": base.weight.clone().neg_()},
        {"weight": base.weight.mT.contiguous().mT},
        {"bias": None},
        {name: getattr(base, name).float() for name in ("x", "weight", "bias", "dY")},
    ]
    layers = [replace(base, **change) for change in changes]
    wanted = [LEAVES, ("x",), ("x", "lora_A"), ("x", "lora_B")]
    with plans.override(plan):
        for number, layer in enumerate(layers * 2):
            leaves = wanted[number % len(wanted)]
            if layer.x.dtype == torch.bfloat16 and plan.name == "addmm":
                continue  # rounds twice
            ours = results(complora_linear, layer, leaves, backend="triton")
            same = results(reference.complora_linear, layer, leaves)
            wide = {name: value.double() for name, value in vars(layer).items() if isinstance(value, Tensor)}
            exact = results(reference.complora_linear, replace(layer, **wide), leaves)
            assert_accurate([ours], [same], [exact])
