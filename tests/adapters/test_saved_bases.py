"""Bases that cannot be computed again: in state dicts, which hold their fingerprints, in files and in raw states."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import safetensors.torch
import torch
from calibrated import ALL, adapt, adapted_weights, assert_same_adapter, bases_of, batches, saved, small
from failures import Unchanged, contents
from tiny_models import LAYOUTS, batch, clip, clip_4, config, features, randomise
from torch import nn

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.adapters.files import BASES_FILES, CONFIG_FILE, WEIGHTS_FILE
from complora_kernels.adapters.manage import load_raw_adapter_state, raw_adapter_state
from complora_kernels.functional import project_complement

every_layout = pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)


# ---- other base weights


@every_layout
def test_other_base_weights_are_refused_and_the_bases_stay(make):
    plain, other = make(), make()
    model = adapt(copy.deepcopy(plain))
    bases = {name: buffer for name, buffer in model.named_buffers() if "basis" in name}
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(plain.state_dict())
    model.load_state_dict(state)
    model.load_state_dict({name: value.bfloat16() for name, value in state.items()})  # a rounded copy
    model.half().load_state_dict(copy.deepcopy(plain).half().state_dict())
    text = "text.transformer" if hasattr(model, "text") else "transformer"
    for name in (f"{text}.resblocks.1.attn.q", "visual.transformer.resblocks.0.attn.o", f"{text}.resblocks.0.mlp.c_fc"):
        with pytest.raises(RuntimeError, match=f"{name}.*: the state dict has other base weights, expected those"):
            copy.deepcopy(model).load_state_dict(other.state_dict())
    now = dict(model.named_buffers())
    assert all(now[name] is basis for name, basis in bases.items())


def test_weights_that_are_not_adapted_may_change():
    plain, other = clip(), clip()
    model = adapt(copy.deepcopy(plain), target_modules=("fc1",), towers="text")
    state = other.state_dict() | {name: value for name, value in plain.state_dict().items() if ".c_fc." in name}
    model.load_state_dict(state)
    model.load_state_dict({}, strict=False)
    wrong = "transformer.resblocks.0.mlp.c_fc.weight"
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state | {wrong: torch.zeros(3, 3)})


# ---- state dicts, which hold no bases


@pytest.mark.parametrize(("make", "sides"), [(clip, "both"), (clip_4, "output")])
def test_a_state_dict_of_a_model_calibrated_on_other_batches_is_refused(make, sides):
    plain = make()
    model, other = (
        adapt(copy.deepcopy(plain), batches(seed=seed, dtype=torch.float32), sides=sides) for seed in (3, 9)
    )
    state, before = copy.deepcopy(randomise(model).state_dict()), copy.deepcopy(other.state_dict())
    state["logit_scale"] += 1
    with pytest.raises(RuntimeError) as refused:
        other.load_state_dict(state)
    for name in ("visual.transformer.resblocks.0.attn.q (output)", "visual.transformer.resblocks.1.mlp.c_fc (output)"):
        assert f"{name}" in str(refused.value)
    assert ("attn.o (input)" in str(refused.value)) == (sides == "both")
    assert "calibrated on other batches, and does not hold its bases. Expected a model calibrated on" in str(
        refused.value
    )
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    prefix = "visual.transformer.resblocks.0.attn."
    attention = other.get_submodule(prefix.rstrip("."))
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    with pytest.raises(RuntimeError, match="calibrated on other batches"):
        attention.load_state_dict(part)  # without the model's own hook
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    same = adapt(copy.deepcopy(plain), batches(seed=3, dtype=torch.float32), sides=sides)
    same.load_state_dict(state)
    inputs = batch()
    assert torch.equal(features(same, *inputs), features(model, *inputs))
    with pytest.raises(RuntimeError, match="_fingerprint"):  # both of whose sides are other than ours
        adapt(copy.deepcopy(plain), batches(seed=3, dtype=torch.float32), sides="input").load_state_dict(state)


def test_state_dicts_that_are_right_load_as_ever(tmp_path):
    plain = clip()
    model, again = (adapt(copy.deepcopy(plain)) for _ in range(2))
    state = copy.deepcopy(randomise(model).state_dict())
    own = {name for name in state if "fingerprint" in name}
    assert len(own) == len([name for name, _ in model.named_buffers() if "_basis" in name])
    again.load_state_dict(
        {name: value for name, value in state.items() if name not in own}
    )  # an older version wrote no fingerprints
    again.load_state_dict(plain.state_dict())
    again.load_state_dict({name: value.bfloat16() for name, value in state.items()})
    again.load_state_dict(state)
    copy.deepcopy(model).double().load_state_dict(state)
    copy.deepcopy(model).half().load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"size mismatch for .*output_fingerprint_q"):
        again.load_state_dict({name: value[:3] if name in own else value for name, value in state.items()})
    torch.save(state, tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    safetensors.torch.save_model(model, str(tmp_path / "state.safetensors"))
    safetensors.torch.load_model(again, tmp_path / "state.safetensors")
    missing, unexpected = plain.load_state_dict(state, strict=False)
    assert missing == []
    assert {name for name in unexpected if "lora_" not in name} == own
    other = ck.apply_complora(copy.deepcopy(plain), config(target_modules=ALL))
    assert not any("fingerprint" in name for name in other.state_dict())


def test_a_state_dict_follows_the_bases_that_a_model_is_given(tmp_path):
    model = saved(tmp_path, small())
    state = copy.deepcopy(model.state_dict())
    for give in (
        lambda other: ck.load_adapter(other, tmp_path, progress=False),
        lambda other: load_raw_adapter_state(other, raw_adapter_state(model)),
    ):
        other = adapt(small(), batches(seed=9, dtype=torch.float32))
        with pytest.raises(RuntimeError, match="calibrated on other batches"):
            other.load_state_dict(state)
        give(other)
        other.load_state_dict(state)
        model.load_state_dict(other.state_dict())


# ---- files


@pytest.mark.parametrize("sides", ["output", "input", "both"])
@pytest.mark.parametrize("size", [{"subspace_k": 5}, {"subspace_ratio": 0.75}, {"subspace_energy": 0.6}], ids=str)
def test_round_trip(tmp_path, sides, size):
    model = saved(tmp_path, small(), sides=sides, **size)
    assert len(list(tmp_path.iterdir())) == 3
    plain = small()
    assert ck.load_adapter(plain, tmp_path, progress=False) is plain
    assert_same_adapter(plain, model)
    inputs = batch()
    torch.testing.assert_close(features(plain, *inputs), features(model, *inputs))
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["complora"]["config"]["subspace_source"] == "activations"
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in tensors)  # stock PEFT expects no others


@pytest.mark.parametrize("make", [clip, clip_4])
def test_round_trip_of_either_attention(tmp_path, make):
    plain = make()
    model = saved(tmp_path, copy.deepcopy(plain))
    assert_same_adapter(ck.load_adapter(plain, tmp_path, progress=False), model)


def test_load_into_a_model_that_was_calibrated_on_other_batches(tmp_path):
    model = saved(tmp_path, small())
    other = adapt(small(), batches(seed=9, dtype=torch.float32))
    assert not torch.equal(*(next(iter(bases_of(each).values())) for each in (model, other)))
    assert_same_adapter(ck.load_adapter(other, tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_load_into_a_copy_of_another_dtype(tmp_path, dtype):
    model = saved(tmp_path, small())
    loaded: Any = ck.load_adapter(small().to(dtype), tmp_path, progress=False)
    basis = next(iter(bases_of(loaded).values()))
    assert basis.dtype == torch.promote_types(dtype, torch.float32)
    assert_same_adapter(loaded.float(), model)


def test_other_base_weights_than_those_of_the_file(tmp_path):
    saved(tmp_path, small())
    model = small(seed=1)
    with Unchanged(model), pytest.raises(ValueError, match="trained on other base weights"):
        ck.load_adapter(model, tmp_path)


def test_a_missing_file_of_bases_is_named(tmp_path):
    saved(tmp_path, small())
    (path,) = tmp_path.glob(BASES_FILES)
    path.unlink()
    for model in (small(), adapt(small())):
        with Unchanged(model), pytest.raises(FileNotFoundError, match=rf"{path.name} is missing, expected the bases"):
            ck.load_adapter(model, tmp_path)


def test_a_damaged_file_of_bases(tmp_path):
    saved(tmp_path, small())
    (path,) = tmp_path.glob(BASES_FILES)
    content, model = path.read_bytes(), small()
    for changed in (content[:-7], content[:-1] + bytes([content[-1] ^ 1]), b""):
        path.write_bytes(changed)
        with (
            Unchanged(model),
            pytest.raises(ValueError, match=rf"{path.name}(: expected a whole file| does not match its digest)"),
        ):
            ck.load_adapter(model, tmp_path)


def test_bases_of_another_size_are_refused(tmp_path):
    model = saved(tmp_path / "whole", small())
    first = next(iter(adapted_layers(model).values()))
    basis = first.basis("q", "output")
    assert basis is not None
    first.set_basis("q", "output", basis._replace(k=basis.k + 1))
    ck.save_adapter(model, tmp_path / "size")
    plain = small()
    with (
        Unchanged(plain),
        pytest.raises(ValueError, match=r"attn\.q_proj\.output_basis\.k=17, expected 16"),
    ):
        ck.load_adapter(plain, tmp_path / "size")


def test_a_model_without_bases_is_not_saved(tmp_path):
    linear = ck.CompLoRALinear.from_linear(nn.Linear(6, 4), config(subspace_source="activations"), path="0")
    with pytest.raises(RuntimeError, match="0 has no output basis yet"):
        ck.save_adapter(nn.Sequential(linear), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_peft_gets_the_same_folded_factors(tmp_path):
    """Two plain adapters of the same factors export alike, whatever projected them."""
    model = randomise(adapt(small(), target_modules=("q", "v", "fc1")))
    ck.export_peft(model, tmp_path / "activations")
    updates = [layer.get_delta_weight(name) for _, layer, name in adapted_weights(model)]
    plain = ck.apply_complora(small(), config(sides="none", target_modules=("q", "v", "fc1")))
    with torch.no_grad():
        for (_, layer, name), (_, other, _) in zip(adapted_weights(model), adapted_weights(plain), strict=True):
            (A, B), (plain_A, plain_B) = layer.factors(name), other.factors(name)
            on_input, on_output = layer.basis(name, "input"), layer.basis(name, "output")
            plain_A.copy_(project_complement(A, on_input.matrix, basis_kind=on_input.kind))
            plain_B.copy_(project_complement(B.mT, on_output.matrix, basis_kind=on_output.kind).mT)
    ck.export_peft(plain, tmp_path / "none")
    exported = [safetensors.torch.load_file(tmp_path / name / WEIGHTS_FILE) for name in ("activations", "none")]
    torch.testing.assert_close(*exported)
    assert contents(tmp_path / "activations").keys() == {CONFIG_FILE, WEIGHTS_FILE}
    assert all(update.norm() > 0 for update in updates)


# ---- going on with a run


def test_the_raw_state_brings_its_bases_into_a_model_calibrated_on_other_batches():
    model = randomise(adapt(small()))
    state = {name: value.clone() for name, value in raw_adapter_state(model).items()}
    other = adapt(small(), batches(seed=9, dtype=torch.float32))
    load_raw_adapter_state(other, state)
    inputs = batch()
    assert torch.equal(features(other, *inputs), features(model, *inputs))
    assert all(torch.equal(bases_of(other)[name], basis) for name, basis in bases_of(model).items())


def test_copies_keep_their_bases():
    model = randomise(adapt(small()))
    twin = copy.deepcopy(model)
    assert_same_adapter(twin, model)
    inputs = batch()
    assert torch.equal(features(twin, *inputs), features(model, *inputs))
