"""An adapted model of any library computes what the plain one does with `W + s · P_out B A P_in` for weights."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from blocks import fusing
from clip_models import OF_CLIP
from numerics import assert_as_accurate_as_reference
from oracle import expected, results
from rows import in_float64
from timm_models import OF_TIMM
from tiny_models import config, randomise
from torch_models import OF_TORCH

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers
from complora_kernels.integrations import find
from complora_kernels.modules.block import CompLoRABlock

ROWS = OF_TIMM | OF_CLIP | OF_TORCH
ALL = ("q", "k", "v", "o", "fc1", "fc2")

every_model = pytest.mark.parametrize("name", ROWS)


@every_model
@pytest.mark.parametrize("targets", [("q", "k", "v"), ("v", "o"), ALL], ids="".join)
def test_features_and_gradients(name, targets):
    plain, inputs, features, fused = in_float64(ROWS[name])
    blocks = sum(1 for library in find(plain) for _ in library.residual_blocks(plain))
    options = config(target_modules=targets, sides="both")
    model = ck.apply_complora(copy.deepcopy(plain), options, progress=False)
    torch.testing.assert_close(features(model, inputs), features(plain, inputs))
    assert sum(isinstance(module, CompLoRABlock) for module in model.modules()) == fused
    assert sum(len(layer.weights) for layer in adapted_layers(model).values()) >= len(targets) * blocks
    randomise(model)
    with pytest.MonkeyPatch.context() as patch:
        fusing(patch, True)  # blocks that can be fused are
        ours = results(model, inputs, features)
    oracle = expected(plain, model, options, inputs, features)
    assert ours.keys() == oracle.keys()
    for key, value in oracle.items():
        torch.testing.assert_close(ours[key], value, msg=lambda text, key=key: f"{key}: {text}")


@every_model
def test_files_and_merged_weights_give_the_same_features(name, tmp_path):
    plain, inputs, features, _ = in_float64(ROWS[name])
    model = ck.apply_complora(copy.deepcopy(plain), config(target_modules=ALL), progress=False)
    trained = features(randomise(model), inputs)
    ck.save_adapter(model, tmp_path)
    loaded = ck.load_adapter(copy.deepcopy(plain), tmp_path, progress=False)
    torch.testing.assert_close(features(loaded, inputs), trained)
    ck.merge_adapter(model)
    torch.testing.assert_close(features(model, inputs), trained)
    ck.unmerge_adapter(model)
    assert all(torch.equal(model.get_parameter(key), value) for key, value in plain.named_parameters())


@every_model
def test_fused_blocks_are_as_accurate_as_their_own_pass(name):
    """Blocks that are not fused are the same twice."""
    exact, inputs, features, _ = in_float64(ROWS[name])
    randomise(ck.apply_complora(exact, config(target_modules=ALL), progress=False))
    model = copy.deepcopy(exact).float()
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
    y = {}
    for fused, dtype in itertools.product((True, False), (torch.float32, torch.bfloat16)):
        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            fusing(patch, fused)
            y[fused, dtype] = features(model, inputs)
    rounded = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    for dtype in (torch.float32, torch.bfloat16):
        assert_as_accurate_as_reference(y[True, dtype], y[False, dtype], features(exact, rounded), name, dtype)
