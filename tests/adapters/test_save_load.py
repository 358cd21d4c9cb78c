"""Saving and loading adapters: round trips, the saved form, and refusals."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import re

import pytest
import safetensors.torch
import tiny_models
import torch
from failures import Unchanged, contents, failing
from small_clip import adapted, assert_close, config, features, saved, small_clip, small_clip_4, updates
from torch import nn

import complora_kernels as ck
from complora_kernels import subspace
from complora_kernels.adapters import files as adapter_files
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_adapter

# Folding a folded factor again, and the scaling, round float32 (6e-8) in a few short products.
ROUNDING = 2e-6

SELECTIONS = {
    "qkv": {},
    "all": {"target_modules": ("q", "k", "v", "o", "fc1", "fc2")},
    "text, one layer": {"target_modules": ("v", "fc2"), "towers": ("text",), "layers": (1,)},
    "regex": {"target_modules": r"visual\..*\.c_proj"},
}


def assert_refused(directory, match, model=None, error: type[BaseException] = ValueError):
    model = small_clip() if model is None else model
    with Unchanged(model), pytest.raises(error, match=match):
        ck.load_adapter(model, directory, progress=False)


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("sides", ["output", "input", "both", "none"])
def test_round_trip(tmp_path, sides, selection):
    model = saved(tmp_path / "adapter", sides=sides, **selection)
    plain = small_clip()
    loaded = ck.load_adapter(plain, tmp_path / "adapter", progress=False)
    assert loaded is plain
    assert updates(loaded).keys() == updates(model).keys()
    for name, update in updates(model).items():
        assert_close(updates(loaded)[name], update, ROUNDING)
    assert_close(features(loaded), features(model), ROUNDING)
    assert all(p.requires_grad == ("lora_" in name) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("layout", tiny_models.LAYOUTS)
def test_round_trip_in_every_layout(tmp_path, layout):
    plain = tiny_models.LAYOUTS[layout]()
    model = ck.apply_complora(copy.deepcopy(plain), tiny_models.config(target_modules=("q", "v", "o", "fc1")))
    ck.save_adapter(tiny_models.randomise(model), tmp_path)
    loaded = ck.load_adapter(plain, tmp_path, progress=False)
    batch = tiny_models.batch()
    assert_close(tiny_models.features(loaded, *batch), tiny_models.features(model, *batch), ROUNDING)


@pytest.mark.parametrize(("source", "target"), [(small_clip, small_clip_4), (small_clip_4, small_clip)])
def test_both_generations_of_open_clip_read_each_others_adapters(tmp_path, source, target):
    expected = updates(saved(tmp_path, source(), target_modules=("q", "k", "v", "o", "fc1")))
    loaded = updates(ck.load_adapter(target(), tmp_path, progress=False))
    assert loaded.keys() == expected.keys()
    for name, update in expected.items():
        assert_close(loaded[name], update, ROUNDING)


@pytest.mark.parametrize("k", [0, 5, 20, 31])
def test_round_trip_for_every_size_of_the_subspace(tmp_path, k):
    model = saved(tmp_path, subspace_k=k)
    loaded = ck.load_adapter(small_clip(), tmp_path, progress=False)
    assert_close(features(loaded), features(model), ROUNDING)


def test_round_trip_with_a_random_subspace(tmp_path):
    model = saved(tmp_path, subspace_source="random", subspace_seed=3)
    assert_close(features(ck.load_adapter(small_clip(), tmp_path, progress=False)), features(model), ROUNDING)


def test_the_saved_factors_are_folded_and_unscaled(tmp_path):
    model = saved(tmp_path, lora_alpha=7.0)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    path = "visual.transformer.resblocks.1.attn"
    attention = model.get_submodule(path)
    U, _, Vh = torch.linalg.svd(attention.in_proj_weight[32:64].double())  # the rows of k
    P_out, P_in = (torch.eye(32, dtype=torch.float64) - basis @ basis.T for basis in (U[:, :20], Vh[:20].T))
    A, B = (tensors[f"base_model.model.{path}.k_proj.lora_{factor}.weight"] for factor in "AB")
    assert_close(A.double(), attention.lora_A.k.double() @ P_in, ROUNDING)
    assert_close(B.double(), P_out @ attention.lora_B.k.double(), ROUNDING)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert len(tensors) == 2 * 3 * 4  # A and B of q, k, v in four blocks


def test_the_loaded_raw_factors_are_the_saved_ones(tmp_path):
    saved(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    loaded = ck.load_adapter(small_clip(), tmp_path, progress=False)
    for path, layer in adapted_layers(loaded).items():
        for name in layer.weights:
            for factor, parameter in zip("AB", layer.factors(name), strict=True):
                assert torch.equal(parameter, tensors[f"base_model.model.{path}.{name}_proj.lora_{factor}.weight"])


def test_the_configuration_file_has_the_fields_of_peft(tmp_path):
    saved(tmp_path, use_rslora=True, lora_dropout=0.1, target_modules=("fc1",), towers=("text",))
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert fields["peft_type"] == "LORA"
    assert (fields["r"], fields["lora_alpha"], fields["lora_dropout"], fields["use_rslora"]) == (2, 3.0, 0.1, True)
    assert (fields["bias"], fields["task_type"]) == ("none", None)
    assert (fields["fan_in_fan_out"], fields["inference_mode"]) == (False, True)
    names = [f"{tower}transformer.resblocks.0.mlp.c_fc" for tower in ("", "visual.")]
    assert [bool(re.fullmatch(fields["target_modules"], name)) for name in names] == [True, False]
    own = fields["complora"]
    assert ck.CompLoRAConfig.from_dict(own["config"]).towers == ("text",)
    assert (own["format_version"], own["package_version"]) == (1, ck.__version__)
    assert own["base_weights"].keys() == {f"transformer.resblocks.{i}.mlp.c_fc" for i in (0, 1)}


def test_load_into_an_adapted_model_replaces_its_adapter(tmp_path):
    model = saved(tmp_path)
    other = adapted(small_clip(), seed=9)
    assert ck.load_adapter(other, tmp_path) is other
    assert_close(features(other), features(model), ROUNDING)


SIDES: tuple[subspace.Side, ...] = ("output", "input")


@pytest.mark.parametrize("k", [6, 20], ids=["principal", "complement"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_load_into_a_half_precision_copy_gives_the_update_back(tmp_path, dtype, k):
    expected = updates(saved(tmp_path, subspace_k=k))
    loaded = ck.load_adapter(small_clip().to(dtype), tmp_path, progress=False)
    for name, update in updates(loaded).items():
        assert update.dtype == torch.float32
        assert_close(update, expected[name], ROUNDING)


@pytest.mark.parametrize("k", [6, 20], ids=["principal", "complement"])
def test_bases_of_a_half_precision_copy_are_turned_a_little(tmp_path, k):
    saved(tmp_path, subspace_k=k)
    loaded = ck.load_adapter(small_clip().bfloat16(), tmp_path, progress=False)
    for layer in adapted_layers(loaded).values():
        for name, side in itertools.product(layer.weights, SIDES):
            A, B = layer.factors(name)
            factor = B.mT if side == "output" else A  # [r, d]
            basis = layer.basis(name, side)
            recomputed = subspace.projection_basis(layer.base_weight(name), layer.config, side)
            assert basis is not None
            subspace.check_orthonormal(basis.matrix, side)
            assert basis[1:] == recomputed[1:]
            kept = [factor @ matrix @ matrix.T for matrix in (basis.matrix, recomputed.matrix)]  # the part inside
            lost, otherwise_lost = kept if basis.kind == "principal" else [factor - part for part in kept]
            assert lost.norm() < ROUNDING * factor.norm()
            assert otherwise_lost.norm() > 10 * ROUNDING * factor.norm()
            turned = basis.matrix @ basis.matrix.T - recomputed.matrix @ recomputed.matrix.T
            assert turned.norm() < 0.2  # rounding had turned it as far; two random ones are about 4 apart


@pytest.mark.parametrize("k", [6, 20])
def test_training_after_load_stays_in_the_complement(tmp_path, k):
    saved(tmp_path, subspace_k=k)
    model = ck.load_adapter(small_clip().bfloat16(), tmp_path, progress=False).train()
    before = updates(model)
    optimizer = torch.optim.AdamW(ck.adapter_parameters(model), lr=1e-2)
    images, texts = torch.randn(3, 3, 16, 16).bfloat16(), torch.randint(1, 20, (3, 6))
    for _ in range(3):
        loss = (model.encode_image(images) * model.encode_text(texts)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ck.check_gradients(model)
    for row, (name, update) in zip(ck.subspace_report(model), updates(model).items(), strict=True):
        assert (update - before[name]).norm() > 1e-3 * update.norm()
        assert row.share < 1e-10  # |inside|² / |ΔW|²: (a few 1e-7 of float32)²


def test_a_merged_model_saves_its_factors(tmp_path):
    model = saved(tmp_path / "unmerged")
    ck.merge_adapter(model)
    ck.save_adapter(model, tmp_path / "merged")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "unmerged" / name).read_bytes()
    assert_refused(tmp_path / "merged", "merged, expected an unmerged adapter", model, RuntimeError)


def test_no_pickle_is_used(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle was used")

    model = adapted(small_clip())
    plain = small_clip()
    for name in ("Pickler", "Unpickler", "dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch, "save", refuse)
    ck.save_adapter(model, tmp_path)
    ck.load_adapter(plain, tmp_path, progress=False)


def test_saving_needs_an_adapter_and_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no Comp-LoRA adapter"):
        ck.save_adapter(small_clip(), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_broken_update_is_not_saved(tmp_path, value, factor):
    model = saved(tmp_path / "old")
    before = contents(tmp_path)
    broken = model.get_submodule("transformer.resblocks.1.attn").get_parameter(f"{factor}.v")
    with torch.no_grad():
        broken[0, 0] = value
    for directory in ("new", "old"):
        with pytest.raises(ValueError, match=r"transformer\.resblocks\.1\.attn\.v_proj holds NaN or infinite"):
            ck.save_adapter(model, tmp_path / directory)
    assert contents(tmp_path) == before


def test_layers_of_different_configurations_are_not_saved(tmp_path):
    model = nn.Sequential(*(ck.CompLoRALinear.from_linear(nn.Linear(8, 8), config(subspace_k=1, r=r)) for r in (1, 2)))
    with pytest.raises(ValueError, match=r"0 and 1 differ in configuration \(r=1 and 2\)"):
        ck.save_adapter(model, tmp_path)


# ---- refusals, which leave the model as it was


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_missing_file(tmp_path, name):
    saved(tmp_path)
    (tmp_path / name).unlink()
    assert_refused(tmp_path, f"{name} is missing", error=FileNotFoundError)


def test_missing_folder(tmp_path):
    assert_refused(tmp_path / "nowhere", "adapter_config.json is missing", error=FileNotFoundError)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_file(tmp_path, name, share):
    saved(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(share * len(content))])
    assert_refused(tmp_path, f"{name}: expected .* as save_adapter wrote it")


def test_an_error_of_the_disk_is_not_taken_for_damage(tmp_path, monkeypatch):
    saved(tmp_path)
    failing(monkeypatch, adapter_files, "safe_open", {0}, OSError(5, "Input/output error"))
    assert_refused(tmp_path, f"Input/output error: .*{WEIGHTS_FILE}", error=OSError)


def test_every_flipped_bit_is_found(tmp_path):
    saved(tmp_path, target_modules=("fc1",), layers=(0,), towers=("text",), r=1)
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    for position in [*torch.randperm(len(content))[:800].tolist(), len(content) - 1]:
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        (tmp_path / WEIGHTS_FILE).write_bytes(flipped)
        with pytest.raises(ValueError, match=WEIGHTS_FILE):
            read_adapter(tmp_path)
    assert_refused(tmp_path, WEIGHTS_FILE)


def test_a_weights_file_of_another_program(tmp_path):
    saved(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / WEIGHTS_FILE)
    safetensors.torch.save_file(tensors, tmp_path / WEIGHTS_FILE, metadata={"format": "pt"})
    assert_refused(tmp_path, "no adapter_config in its metadata")


def test_a_changed_configuration_file(tmp_path):
    saved(tmp_path)
    fields = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields | {"lora_alpha": 30.0}))
    assert_refused(tmp_path, "differs in lora_alpha from the configuration that the weights were saved with")
    edited = fields["complora"] | {"config": fields["complora"]["config"] | {"subspace_k": 4}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields | {"complora": edited}))
    assert_refused(tmp_path, "differs in complora from")
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields | {"r": 2.0}))
    assert_refused(tmp_path, "differs in r from")
    (tmp_path / CONFIG_FILE).write_text(json.dumps(fields | {"base_model_name_or_path": "ViT-B-16"}))
    ck.load_adapter(small_clip(), tmp_path, progress=False)


def test_an_adapter_of_a_newer_version(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("complora_kernels.adapters.save_load.FORMAT_VERSION", 2)
        saved(tmp_path)
    assert_refused(tmp_path, "format_version=2, expected at most 1: it was written by the newer complora_kernels")


def test_another_activation(tmp_path):
    saved(tmp_path)
    other = small_clip(quick_gelu=True)
    other.load_state_dict(small_clip().state_dict())
    assert_refused(tmp_path, r"trained with MLP activations .*'GELU'.* got .*'QuickGELU'", other)


def test_other_base_weights(tmp_path):
    saved(tmp_path)
    first = "visual.transformer.resblocks.0.attn.q_proj"
    assert_refused(tmp_path, f"other base weights: {first} is about", small_clip(seed=1))
    fine_tuned = small_clip()
    with torch.no_grad():
        weight = fine_tuned.get_parameter("transformer.resblocks.1.attn.in_proj_weight")
        weight[:32] += 0.1 * torch.randn(32, 32) * weight.std()
    assert_refused(tmp_path, r"other base weights: transformer\.resblocks\.1\.attn\.q_proj is about", fine_tuned)
    with torch.no_grad():
        weight[:32] = small_clip().transformer.resblocks[1].attn.in_proj_weight[:32] * 1.1
    assert_refused(tmp_path, "other base weights: transformer.resblocks.1.attn.q_proj", fine_tuned)
    assert_refused(tmp_path, "other base weights", adapted(small_clip(seed=1)))


def test_another_width(tmp_path):
    saved(tmp_path)
    assert_refused(
        tmp_path, r"q_proj has factors A and B of shapes \(2, 32\) and \(32, 2\), expected", small_clip(width=48)
    )


def test_another_depth(tmp_path):
    saved(tmp_path)
    assert_refused(
        tmp_path, "missing base_model.model.transformer.resblocks.2.attn.k_proj.lora_A.weight", small_clip(layers=3)
    )
    assert_refused(
        tmp_path, "missing nothing, unexpected base_model.model.transformer.resblocks.1", small_clip(layers=1)
    )


def test_a_model_without_such_layers(tmp_path):
    saved(tmp_path)
    message = r"attn\.q_proj and 11 more, as open_clip names them, .* it is a Sequential without residual blocks"
    assert_refused(tmp_path, message, nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 3}, r"r=3 and 2 \(model, file\)"),
        ({"layers": (0,)}, r"layers=\[0\] and None"),
        ({"target_modules": ("q",)}, r"target_modules=\['q'\] and \['q', 'k', 'v'\]"),
        ({"lora_alpha": 4.0, "sides": "output"}, r"lora_alpha=4.0 and 3.0, sides='output' and 'both'"),
    ],
    ids=["rank", "layers", "targets", "scaling and sides"],
)
def test_another_configuration_than_that_of_the_model(tmp_path, options, message):
    saved(tmp_path)
    assert_refused(tmp_path, message, adapted(small_clip(), **options))


@pytest.mark.parametrize("error", [MemoryError("out of memory"), KeyboardInterrupt("stop")])
def test_a_failure_while_adapting_leaves_the_model_plain(tmp_path, monkeypatch, error):
    saved(tmp_path)
    failing(monkeypatch, nn.init, "kaiming_uniform_", {17}, error)  # of 12 weights, each of which is checked before
    assert_refused(tmp_path, str(error), error=type(error))


def test_a_failure_while_turning_bases_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    saved(tmp_path)
    failing(monkeypatch, subspace, "align_basis", {3}, MemoryError("out of memory"))
    assert_refused(tmp_path, "out of memory", adapted(small_clip(), seed=4), MemoryError)


def test_bases_that_could_not_be_computed_are_computed_later(tmp_path, monkeypatch):
    expected = features(saved(tmp_path))
    model = ck.load_adapter(small_clip(), tmp_path, progress=False)
    failing(monkeypatch, subspace, "align_basis", {3}, MemoryError("out of memory"))
    with pytest.raises(MemoryError):
        ck.subspace_report(model)
    assert_close(features(model), expected, ROUNDING)
    assert all(row.share < 1e-10 for row in ck.subspace_report(model))
