"""Threads: what holds on one alone, what the threads of its backward passes see, and what all of them share."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from small_clip import adapted, config, features, small_clip
from torch import Tensor, nn

import complora_kernels as ck
from complora_kernels import backends, subspace
from complora_kernels.common.tensor_facts import TensorFacts
from complora_kernels.common.thread_stack import ThreadStack
from complora_kernels.modules import extend
from complora_kernels.modules.block import CompLoRABlock

WAIT = 60  # seconds: a guard against hanging


@pytest.fixture
def switching() -> Iterator[None]:
    """Threads take turns after microseconds instead of milliseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], Any], threads: int = 6) -> list[Any]:
    """The results of `work(i)` in several threads that begin together."""
    ready = threading.Barrier(threads)

    def begin(i: int) -> Any:
        ready.wait(WAIT)
        return work(i)

    with ThreadPoolExecutor(threads) as pool:
        return [future.result(WAIT) for future in [pool.submit(begin, i) for i in range(threads)]]


def linears(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


def adapted_linears() -> Any:
    return adapted(linears(), target_modules=r"\d", subspace_k=2)


# ---- disabled on one thread


def test_an_adapter_is_disabled_on_its_own_thread_alone():
    model, x = adapted_linears(), torch.randn(3, 6)
    enabled = model(x)
    entered, left = threading.Event(), threading.Event()

    def other() -> Tensor:
        with ck.disable_adapter(model):
            entered.set()
            assert left.wait(WAIT)
            return model(x)

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(other)
        assert entered.wait(WAIT)
        assert torch.equal(model(x), enabled)
        with ck.disable_adapter(model):
            disabled = model(x)
        assert torch.equal(model(x), enabled)
        left.set()
        assert torch.equal(future.result(WAIT), disabled)
        assert not torch.equal(disabled, enabled)
        assert torch.equal(thread.submit(model, x).result(WAIT), enabled)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_contexts_are_left_in_any_order_and_on_any_thread(order):
    model, x = adapted_linears(), torch.randn(3, 6)
    enabled = model(x)

    def disabled() -> Iterator[None]:
        with ck.disable_adapter(model):
            yield

    generators = [disabled() for _ in order]
    for generator in generators:
        next(generator)
    for left, i in enumerate(order):
        assert not torch.equal(model(x), enabled), left
        if left == 1:
            with ThreadPoolExecutor(1) as thread:
                thread.submit(generators[i].close).result(WAIT)
        else:
            generators[i].close()
    assert torch.equal(model(x), enabled)


def test_another_model_and_a_copy_stay_enabled():
    model, other, x = adapted_linears(), adapted_linears(), torch.randn(3, 6)
    enabled, others = model(x), other(x)
    with ck.disable_adapter(model):
        assert torch.equal(other(x), others)
        twin = copy.deepcopy(model)
    assert torch.equal(twin(x), enabled)


def test_a_replica_for_another_thread_is_disabled_as_the_layer_is():
    """Replicas for one forward pass, as `nn.DataParallel` makes them."""
    model, x = adapted_linears(), torch.randn(3, 6)
    layer, results = model[0], {}
    results["enabled"] = layer(x)
    with ck.disable_adapter(model), ThreadPoolExecutor(1) as thread:
        results["disabled"] = layer(x)
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer._parameters.items():  # they get copies, which are no parameters
            setattr(replica, name, parameter)
        assert torch.equal(thread.submit(replica, x).result(WAIT), results["disabled"])
    assert torch.equal(layer(x), results["enabled"])
    assert not torch.equal(results["enabled"], results["disabled"])


class Reentrant(torch.autograd.Function):
    """Calls backward within its backward pass, `depth` times; torch moves deep ones to another thread."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, see: Callable[[], None]) -> Tensor:
        ctx.depth, ctx.see = depth, see
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.see()
        if ctx.depth:
            with torch.enable_grad():
                x = torch.ones((), requires_grad=True)
                Reentrant.apply(x, ctx.depth - 1, ctx.see).backward()
        return grads[0], None, None


def test_the_threads_of_a_backward_pass_see_what_holds_where_it_was_called():
    stack: ThreadStack[str] = ThreadStack("test")
    seen = set()

    def see() -> None:
        seen.add((threading.get_ident(), tuple(stack.values())))

    x = torch.ones((), requires_grad=True)
    with stack.holding("here"):
        Reentrant.apply(x, 80, see).backward()
    assert {values for _, values in seen} == {("here",)}
    assert len(seen) > 1  # threads
    seen.clear()
    Reentrant.apply(x, 80, see).backward()
    assert {values for _, values in seen} == {()}


def test_compiled_code_knows_the_thread_that_runs_it():
    model, x = adapted_linears(), torch.randn(3, 6)
    compiled = torch.compile(model[0], backend="eager", fullgraph=True)
    enabled, result = model[0](x), {}
    torch.testing.assert_close(compiled(x), enabled)
    with ck.disable_adapter(model), ThreadPoolExecutor(1) as thread:
        result["disabled"] = compiled(x)
        torch.testing.assert_close(result["disabled"], model[0](x))
        torch.testing.assert_close(thread.submit(compiled, x).result(WAIT), enabled)
    torch.testing.assert_close(compiled(x), enabled)
    assert not torch.allclose(result["disabled"], enabled)


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_function_switches_the_adapter_off_and_on(fullgraph):
    model = adapted(nn.Sequential(nn.Linear(6, 6)), target_modules="0", subspace_k=2)
    x = torch.randn(3, 6)
    with ck.disable_adapter(model):  # a process may have done so before
        frozen = model(x)

    @torch.compile(backend="eager", fullgraph=fullgraph)
    def compiled(x: Tensor) -> tuple[Tensor, Tensor]:
        with ck.disable_adapter(model):
            outputs = model(x)
        return outputs, model(x)

    for _ in range(2):
        torch.testing.assert_close(compiled(x), (frozen, model(x)))
    with ck.disable_adapter(model):
        torch.testing.assert_close(compiled(x), (frozen, frozen))
        assert torch.equal(model(x), frozen)


# ---- shared by all threads


def test_threads_adapt_load_and_run_their_models(tmp_path, switching, monkeypatch):
    monkeypatch.setattr(subspace, "CACHE_BYTES", 20_000)  # a few weights: they push each other out
    plain = small_clip(layers=1)  # copied by each thread: all of them draw from one generator
    saved = adapted(copy.deepcopy(plain))
    ck.save_adapter(saved, tmp_path)
    expected = features(saved)

    def work(i: int) -> None:
        for seed in range(3):
            model = nn.Sequential(*(nn.Linear(9 + i, 9 + i) for _ in range(4)))
            ck.apply_complora(model, config(subspace_k=3 + seed, target_modules=r"\d"), progress=False)
            if seed == i:
                subspace.clear_cache()
        loaded = ck.load_adapter(copy.deepcopy(plain), tmp_path, progress=False)
        torch.testing.assert_close(features(loaded), expected)

    in_threads(work)


def test_the_cache_of_decompositions_survives_threads_that_use_it_at_once(switching, monkeypatch):
    monkeypatch.setattr(subspace, "CACHE_BYTES", 3_000)
    weights = [torch.randn(8, 8) for _ in range(30)]
    expected = [subspace.principal_basis(weight, k=3) for weight in weights]

    def work(i: int) -> bool:
        order = torch.randperm(30, generator=torch.Generator().manual_seed(i)).tolist() * 5
        return all(torch.equal(subspace.principal_basis(weights[n], k=3), expected[n]) for n in order)

    assert all(in_threads(work))


def test_threads_get_one_class_for_an_extension(switching):
    for _ in range(20):
        plain = type("ResidualAttentionBlock", (nn.Module,), {})
        assert len(set(in_threads(lambda _, plain=plain: extend.extended_class(plain, CompLoRABlock)))) == 1


def test_of_several_threads_one_says_what_is_said_once(switching, monkeypatch, caplog):
    monkeypatch.setattr(backends, "messages_said", {})
    in_threads(lambda _: [backends._say_once(f"message {n}") for n in range(50)])
    assert sorted(caplog.messages) == sorted(f"message {n}" for n in range(50))


def test_a_fact_belongs_to_the_values_that_it_was_computed_from():
    """Another thread writes while a fact is computed."""
    facts: TensorFacts[float] = TensorFacts()
    tensor = torch.ones(2)

    def total(tensor: Tensor) -> float:
        result = float(tensor.sum())
        with ThreadPoolExecutor(1) as thread:
            thread.submit(tensor.add_, 1).result(WAIT)
        return result

    assert facts.compute(tensor, total) == 2
    assert facts.get(tensor) is None
