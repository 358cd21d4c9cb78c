"""A loaded adapter is used without decomposing a weight, and trained as if its bases had been there from the start."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batch, clip, config, features, randomise
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.adapters.files import read_adapter, write_adapter
from complora_kernels.adapters.manage import raw_adapter_state

ALL = ("q", "k", "v", "o", "fc1", "fc2")


def plain(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def saved(folder: Path, model: Any = None, **options: Any) -> Any:
    """A model with an adapter in the complement, which is also in the folder."""
    model, targets = (plain(), r"\d") if model is None else (model, ALL)
    options = {"target_modules": targets, "sides": "both"} | options
    model = randomise(ck.apply_complora(model, config(**options), progress=False))
    ck.save_adapter(model, folder)
    return model


def loaded(folder: Path, *, at_once: bool = False) -> Any:
    model = ck.load_adapter(plain(), folder, progress=False)
    if at_once:
        ck.subspace_report(model)
    return model


def has_bases(model: nn.Module) -> list[bool]:
    return [any("_basis" in name for name, _ in layer.named_buffers()) for layer in adapted_layers(model).values()]


def train(model: Any, steps: int = 4) -> list[Tensor]:
    optimizer = torch.optim.AdamW(ck.adapter_parameters(model), lr=1e-2)
    for _ in range(steps):
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [factor.detach().clone() for factor in ck.adapter_parameters(model)]


X = torch.linspace(-1, 1, 30).view(5, 6)


# ---- use


@pytest.mark.parametrize("sides", ["output", "input", "both"])
@pytest.mark.parametrize("source", ["weight", "ends", "random"])
def test_nothing_is_decomposed_to_load_run_merge_and_save(tmp_path, monkeypatch, sides, source):
    model, inputs = saved(tmp_path / "saved", clip(), sides=sides, subspace_source=source), batch()
    expected, plain_state = features(model, *inputs), clip()
    plain_state.load_state_dict({name: p for name, p in model.state_dict().items() if "lora_" not in name})
    with monkeypatch.context() as patch:
        for name in ("svd", "eigh", "qr"):
            patch.setattr(torch.linalg, name, lambda *_, **__: pytest.fail("a matrix was decomposed"))
        other = ck.load_adapter(plain_state, tmp_path / "saved", progress=False)
        with torch.no_grad():
            torch.testing.assert_close(features(other, *inputs), expected)
            other.requires_grad_(False)
        torch.testing.assert_close(features(other, *inputs), expected)  # no factor gets a gradient
        ck.save_adapter(other, tmp_path / "again")
        ck.merge_adapter(other)
        torch.testing.assert_close(features(other, *inputs), expected)
        ck.unmerge_adapter(other)
        ck.merge_and_unload(other)
    torch.testing.assert_close(features(other, *inputs), expected)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("saved", "again")]
    assert files[0] == files[1]


def test_what_asks_for_bases_gets_them(tmp_path):
    saved(tmp_path)
    for ask in (
        ck.subspace_report,
        raw_adapter_state,
        lambda model: model(X),
        lambda model: model[0].basis("", "input"),
    ):
        model = loaded(tmp_path)
        assert has_bases(model) == [False, False]
        ask(model)
        assert any(has_bases(model))
    assert has_bases(ck.apply_complora(plain(), config(target_modules=r"\d"), progress=False)) == [True, True]


# ---- training


@pytest.mark.parametrize("sides", ["output", "input", "both"])
@pytest.mark.parametrize("source", ["weight", "ends", "random"])
def test_training_is_that_of_a_model_whose_bases_were_computed_at_once(tmp_path, sides, source):
    saved(tmp_path, sides=sides, subspace_source=source)
    lazy, eager = loaded(tmp_path), loaded(tmp_path, at_once=True)
    with torch.no_grad():
        lazy(X)
    for factor, expected in zip(train(lazy), train(eager), strict=True):
        assert torch.equal(factor, expected)
    assert all(row.share < 1e-10 for row in ck.subspace_report(lazy))
    assert not [name for name in lazy.state_dict() if "basis" in name]


def test_factors_that_were_written_to_are_projected(tmp_path):
    saved(tmp_path)
    raw = [torch.randn_like(factor) for factor in ck.adapter_parameters(loaded(tmp_path))]
    outputs = []
    for at_once, copied in ((True, False), (False, False), (False, True)):
        model = loaded(tmp_path, at_once=at_once)
        model = copy.deepcopy(model) if copied else model
        with torch.no_grad():
            for factor, values in zip(ck.adapter_parameters(model), raw, strict=True):
                (factor.data if copied else factor).copy_(values)  # a copy of the model never takes them as they are
            outputs.append(model(X))
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])


def test_other_weights_get_bases_of_their_own(tmp_path):
    """Those that were loaded before belong to the old weights."""
    saved(tmp_path)
    lazy, eager = loaded(tmp_path), loaded(tmp_path, at_once=True)
    for model in (lazy, eager):
        model.load_state_dict(plain(5).state_dict())
    with torch.no_grad():
        assert torch.equal(lazy(X), eager(X))


def test_a_merged_model_reports_on_its_original_weights(tmp_path):
    saved(tmp_path)
    model = loaded(tmp_path)
    expected = ck.subspace_report(loaded(tmp_path))
    ck.merge_adapter(model)
    assert ck.subspace_report(model) == expected


def test_bases_are_exact_when_they_are_first_needed_under_autocast(tmp_path):
    saved(tmp_path)
    lazy, eager = loaded(tmp_path), loaded(tmp_path, at_once=True)
    with torch.autocast("cpu", torch.bfloat16):
        lazy(X)
    for layer, expected in zip(adapted_layers(lazy).values(), adapted_layers(eager).values(), strict=True):
        assert torch.equal(layer.get_buffer("output_basis"), expected.get_buffer("output_basis"))


def test_threads_that_start_together_compute_the_same(tmp_path):
    saved(tmp_path)
    model, expected = loaded(tmp_path), loaded(tmp_path, at_once=True)(X)
    start, outputs = threading.Barrier(8), []

    def run() -> None:
        start.wait()
        outputs.append(model(X))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 8
    assert all(torch.equal(output, expected) for output in outputs)
    assert not [name for name in model.state_dict() if "basis" in name]


def test_an_update_that_the_energy_leaves_no_room_for_is_found_when_it_is_trained(tmp_path):
    """Whoever wrote the file; how many directions hold this energy is not known before the weight is decomposed."""
    saved(tmp_path, sides="none")
    written, tensors = read_adapter(tmp_path)
    written["complora"]["config"] |= {"sides": "output", "subspace_energy": 1.0}
    (tmp_path / "false").mkdir()
    write_adapter(tmp_path / "false", written, tensors, {})
    model = loaded(tmp_path / "false")
    with pytest.raises(ValueError, match="2: projecting the output side with k=4 changes the saved factor"):
        model(X)
    written["complora"]["config"] |= {"subspace_energy": None, "subspace_k": 4}
    (tmp_path / "known").mkdir()
    write_adapter(tmp_path / "known", written, tensors, {})
    with pytest.raises(
        ValueError, match="2: the saved factor of the output side has rank 2, expected at most 0 beside"
    ):
        loaded(tmp_path / "known")


# ---- compiled, exported, traced, transformed


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_the_first_call_is_one_compiled_graph(tmp_path, grad_enabled):
    saved(tmp_path)
    model = loaded(tmp_path)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(grad_enabled):
        for rows in (5, 3, 4):
            torch.testing.assert_close(compiled(X[:rows]), loaded(tmp_path)(X[:rows]))
        with torch.no_grad():
            for factor in ck.adapter_parameters(model):
                factor.normal_()
        torch.testing.assert_close(compiled(X), model(X))
    assert has_bases(model) == [True, True]


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_keeps_the_loaded_update(tmp_path, strict):
    saved(tmp_path)
    model = loaded(tmp_path).eval()
    program: Any = torch.export.export(model, (X,), strict=strict).module()
    torch.testing.assert_close(program(X), loaded(tmp_path)(X))
    with pytest.raises(RuntimeError, match=r"0 has no .* basis yet, expected one before the model is exported"):
        torch.export.export(loaded(tmp_path).train(), (X,), strict=False)


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of what becomes a constant
@pytest.mark.parametrize("training", [False, True])
def test_a_traced_model_computes_the_same(tmp_path, training):
    saved(tmp_path)
    model = loaded(tmp_path).train(training)
    traced: Any = torch.jit.trace(model, (X,), check_trace=False)
    torch.testing.assert_close(traced(X[:3]), loaded(tmp_path)(X[:3]))
    assert has_bases(model) == [training, training]
    assert "svd" not in str(traced.inlined_graph)


def test_transforms_differentiate_through_the_projection(tmp_path):
    saved(tmp_path)
    lazy, eager = loaded(tmp_path), loaded(tmp_path, at_once=True)
    found = []
    for model in (lazy, eager):
        factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found.append(grad(lambda f, m=model: functional_call(m, f, (X,)).square().sum())(factors))
    torch.testing.assert_close(found[0], found[1])
    train(lazy)  # no wrapper of the transform is left in the model


def test_fake_tensors_take_no_values(tmp_path):
    saved(tmp_path)
    model = loaded(tmp_path)
    with FakeTensorMode() as mode:
        state: dict[str, Tensor] = {name: mode.from_tensor(parameter) for name, parameter in model.named_parameters()}
        assert functional_call(model, state, (mode.from_tensor(X),)).shape == (5, 4)
    assert has_bases(model) == [False, False]


def test_copies_of_data_parallelism_need_bases(tmp_path):
    saved(tmp_path)
    model = loaded(tmp_path)
    with pytest.raises(RuntimeError, match=r"0 has no bases yet.*subspace_report\(model\) computes them"):
        model[0]._replicate_for_data_parallel()
    ck.subspace_report(model)
    model[0]._replicate_for_data_parallel()
