"""Ranks that differ between weights, and EVA's first factors, against the SVD of the inputs in float64."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from calibrated import batches, run
from failures import Unchanged
from tiny_models import batch, clip, clip_4, config, features, randomise
from torch import Tensor

import complora_kernels as ck
from complora_kernels.adapters.build import adapted_layers

PARTS = ("attn", "mlp.c_fc", "mlp.c_proj")
BLOCKS = [f"{tower}transformer.resblocks.{i}" for tower in ("visual.", "") for i in range(2)]
PATHS = [f"{block}.{part}" for block in BLOCKS for part in PARTS]


def inputs_of(model: Any, calls: Any) -> dict[str, Tensor]:
    """What each module of PATHS was given, stacked, float64 [M, in]."""
    rows: dict[str, list[Tensor]] = {path: [] for path in PATHS}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: rows[path].append((args[0] if args else kwargs["query"]).flatten(0, -2)),
            with_kwargs=True,
        )
        for path in PATHS
    ]
    with torch.no_grad():
        calls(model)
    for hook in hooks:
        hook.remove()
    return {path: torch.cat(of) for path, of in rows.items()}


def weights_of(model: Any) -> dict[str, tuple[str, Any, str]]:
    layers = adapted_layers(model)
    return {layer.weight_name(name): (path, layer, name) for path, layer in layers.items() for name in layer.weights}


OPTIONS: dict[str, Any] = {"sides": "none", "target_modules": ("q", "v", "fc1", "fc2")}


def test_eva_starts_along_the_principal_directions_of_the_inputs():
    model = clip().double()
    calibrate = run(batches())
    inputs, plain = inputs_of(model, calibrate), copy.deepcopy(model)
    ck.apply_eva(model, config(r=3, **OPTIONS), calibrate, progress=False)
    for path, layer, name in weights_of(model).values():
        A, B = layer.factors(name)
        _, values, directions = torch.linalg.svd(inputs[path], full_matrices=False)
        assert B.count_nonzero() == 0
        gaps = (values[: len(A)] - values[1 : len(A) + 1]) / values[0]  # how well each direction is determined
        for row, direction, gap in zip(A, directions, gaps, strict=False):
            assert abs(row @ direction) > 1 - 1e-10 / gap**2
        torch.testing.assert_close(A @ A.T, torch.eye(len(A)).double(), rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(
            features(model, *batches()[0]), features(plain, *batches()[0]), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("rho", [1.0, 1.5, 2.0])
def test_eva_gives_the_ranks_to_the_directions_that_explain_most(rho):
    model, r = clip().double(), 4
    inputs = inputs_of(model, run(batches()))
    ck.apply_eva(model, config(r=r, **OPTIONS), run(batches()), rho=rho, progress=False)
    weights = weights_of(model)
    shares = []
    for weight, (path, _, _) in weights.items():
        squares = torch.linalg.svdvals(inputs[path]) ** 2
        shares += [(share, weight) for share in (squares / squares.sum())[1 : int(rho * r)].tolist()]
    chosen = [weight for _, weight in sorted(shares, reverse=True)[: (r - 1) * len(weights)]]
    ranks = {weight: len(layer.factors(name)[0]) for weight, (_, layer, name) in weights.items()}
    assert ranks == {weight: 1 + chosen.count(weight) for weight in weights}
    assert sum(ranks.values()) == r * len(weights)
    assert (len(set(ranks.values())) > 1) == (rho > 1)
    assert {layer.scaling_of(name) for _, layer, name in weights.values()} == {3.0 / r}


def test_eva_with_a_projection_and_its_files(tmp_path):
    model, other = clip_4().double(), clip_4().double()
    other.load_state_dict(model.state_dict())
    adapter = config(sides="both", use_rslora=True, target_modules=("q", "k", "v", "fc1"))
    randomise(ck.apply_eva(model, adapter, run(batches()), progress=False))
    ck.save_adapter(model, tmp_path)
    ck.load_adapter(other, tmp_path)
    torch.testing.assert_close(features(other, *batches()[0]), features(model, *batches()[0]))
    assert all(row.share < 1e-6 for row in ck.subspace_report(model))


@pytest.mark.parametrize(
    ("options", "rho", "message"),
    [
        ({}, 0.5, "rho=0.5, expected at least 1"),
        ({}, float("nan"), "rho=nan, expected at least 1"),
        ({"rank_pattern": {"c_fc": 3}}, 2.0, "rank_pattern={'c_fc': 3}, expected none: the ranks are computed"),
        ({"alpha_pattern": {"c_fc": 3}}, 2.0, "alpha_pattern={'c_fc': 3}, expected none: the ranks are computed"),
        ({"sides": "both", "subspace_source": "activations"}, 2.0, "subspace_source='activations', expected another"),
    ],
)
def test_eva_refuses(options, rho, message):
    model = clip()
    with Unchanged(model), pytest.raises(ValueError, match=re.escape(message)):
        ck.apply_eva(model, config(**{**OPTIONS, **options}), run(batches(dtype=torch.float32)), rho=rho)


def test_eva_that_fails_leaves_the_model_as_it_was():
    model = clip()
    images, _ = batch()
    with Unchanged(model), pytest.raises(ValueError, match="gave no activations to transformer"):
        ck.apply_eva(model, config(**OPTIONS), lambda model: model.encode_image(images), progress=False)
    with Unchanged(model), pytest.raises(KeyboardInterrupt):
        ck.apply_eva(model, config(**OPTIONS), lambda model: (_ for _ in ()).throw(KeyboardInterrupt), progress=False)
    ck.apply_complora(model, config(**OPTIONS), progress=False)
    with pytest.raises(ValueError, match="model has an adapter already"):
        ck.apply_eva(model, config(**OPTIONS), run(batches()))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_ranks_rise_from_block_to_block(use_rslora):
    model = clip()
    rising = ck.rising_ranks(model, config(r=4, use_rslora=use_rslora, **OPTIONS), 2, 7)
    ck.apply_complora(model, rising, progress=False)
    scaling = 3.0 / (2.0 if use_rslora else 4)
    for path, layer, name in weights_of(model).values():
        assert len(layer.factors(name)[0]) == (7 if "resblocks.1." in path else 2)
        assert layer.scaling_of(name) == pytest.approx(scaling)


def test_ranks_of_towers_of_other_depths():
    model: Any = clip()
    del model.transformer.resblocks[1]
    rising = ck.rising_ranks(model, config(towers=("image", "text"), **OPTIONS), 2, 7)
    ck.apply_complora(model, rising, progress=False)
    ranks = {path: len(layer.factors(name)[0]) for path, layer, name in weights_of(model).values()}
    assert {ranks[path] for path in ranks if path.startswith("visual.transformer.resblocks.0.")} == {2}
    assert {ranks[path] for path in ranks if path.startswith("visual.transformer.resblocks.1.")} == {7}
    assert {ranks[path] for path in ranks if path.startswith("transformer.")} == {7}


def test_rising_ranks_refuse():
    with pytest.raises(ValueError, match="first=0, expected at least 1"):
        ck.rising_ranks(clip(), config(), 0, 3)
    with pytest.raises(ValueError, match=r"rank_pattern=.* expected none"):
        ck.rising_ranks(clip(), config(rank_pattern={"attn": 3}), 1, 3)
    model: Any = clip()
    model.head = torch.nn.Linear(16, 4)
    with pytest.raises(ValueError, match="head is in no residual block"):
        ck.rising_ranks(model, config(target_modules=["head"]), 1, 3)
