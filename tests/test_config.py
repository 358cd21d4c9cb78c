"""`CompLoRAConfig`: what its fields mean, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from complora_kernels.config import CompLoRAConfig


def make(**fields: Any) -> CompLoRAConfig:
    """A configuration with a subspace size, unless the fields say otherwise."""
    sized = any(name in fields for name in ("subspace_k", "subspace_energy", "subspace_ratio"))
    return CompLoRAConfig(**({} if sized or fields.get("sides") == "none" else {"subspace_k": 4}), **fields)


def test_defaults():
    config = CompLoRAConfig(subspace_k=384)
    assert config.to_dict() == {
        "r": 8,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "sides": "output",
        "subspace_k": 384,
        "subspace_energy": None,
        "subspace_ratio": None,
        "subspace_source": "weight",
        "subspace_seed": 0,
        "update_bound": None,
        "update_bound_norm": "frobenius",
        "update_bound_relative_to": "weight",
        "target_modules": ["q", "k", "v"],
        "exclude_modules": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "towers": ["image", "text"],
        "layers": None,
        "modules_to_save": [],
    }


def test_scaling():
    assert make(r=4, lora_alpha=2.0).scaling == 0.5
    assert make(r=4, lora_alpha=2.0, use_rslora=True).scaling == 1.0
    assert make(r=2, lora_alpha=1.0, use_rslora=True).scaling == pytest.approx(0.7071067811865476)  # CLIP-LoRA's


@pytest.mark.parametrize(
    ("name", "value"), [("k", 0), ("k", 384), ("energy", 0.9), ("energy", 1), ("ratio", 0.0), ("ratio", 1.0)]
)
def test_subspace_size_is_what_principal_basis_takes(name, value):
    others = dict.fromkeys(("k", "energy", "ratio"))
    assert make(**{f"subspace_{name}": value}).subspace_size == {**others, name: value}


def test_plain_lora_has_no_subspace_size():
    assert make(sides="none").subspace_size == {"k": None, "energy": None, "ratio": None}


def test_selections_are_tuples_in_a_fixed_order():
    config = make(target_modules=["fc1", "v", "q", "q"], towers=["text", "image"], layers=[3, 1, 3])
    assert config.target_modules == ("q", "v", "fc1")
    assert config.towers == ("image", "text")
    assert config.layers == (1, 3)
    assert config == make(target_modules=("q", "v", "fc1"), layers=(1, 3))
    assert make(towers="text", layers=2) == make(towers=("text",), layers=(2,))


def test_half_of_each_weight_is_protected_by_default():
    assert CompLoRAConfig() == CompLoRAConfig(subspace_ratio=0.5)


def test_names_of_modules_stay_as_they_are():
    config = make(target_modules=["v_proj", "q_proj", "v_proj"], exclude_modules="visual")
    assert config.target_modules == ("v_proj", "q_proj")
    assert config.exclude_modules == "visual"
    assert not config.selects_in_blocks
    assert make(exclude_modules=["a.b"]).exclude_modules == ("a.b",)


def test_patterns_name_weights_or_their_endings():
    config = make(
        r=8, lora_alpha=16, rank_pattern={"attn.q_proj": 2, "mlp": 3, "attn": 4}, alpha_pattern={"q_proj": 5.0}
    )
    ranks = {"a.attn.q_proj": 2, "a.attn.v_proj": 4, "attn": 4, "mlp": 3, "a.mlp.fc1": 8, "a.xattn": 8, "a.qattn.q": 8}
    assert {weight: config.rank_of(weight) for weight in ranks} == ranks
    assert config.scaling_of("a.attn.q_proj") == 5.0 / 2
    assert config.scaling_of("a.attn.k_proj") == 16 / 4
    assert config.scaling_of("elsewhere") == config.scaling == 2.0
    assert make(use_rslora=True, lora_alpha=6, rank_pattern={"x": 9}).scaling_of("x") == 2.0


def test_layers_of_each_tower():
    config = make(layers={"text": [3, 1, 3]})
    assert config.layers == {"text": (1, 3)}
    assert (config.layers_of("text"), config.layers_of("image")) == ((1, 3), ())
    assert (make(layers=2).layers_of("text"), make().layers_of("text")) == ((2,), None)


def test_a_regular_expression_selects_modules_by_name():
    assert make(target_modules=r".*\.(c_fc|c_proj)").target_modules == r".*\.(c_fc|c_proj)"


@pytest.mark.parametrize(
    "config",
    [
        make(),
        make(sides="none", r=1, layers=(0, 11)),
        make(layers={"image": (1, 2)}, rank_pattern={"attn": 2}, alpha_pattern={"attn": 1.5}),
        make(target_modules=("q_proj",), exclude_modules="a|b"),
        make(target_modules="all-linear", exclude_modules=("head",)),
        make(subspace_energy=0.5, subspace_source="random", subspace_seed=7, target_modules="a|b", towers=("text",)),
        make(subspace_ratio=0.5, subspace_source="activations", sides="both"),
        make(update_bound=0.5, update_bound_norm="spectral", update_bound_relative_to="gap", sides="both"),
    ],
)
def test_dictionary_round_trip_through_json(config):
    assert CompLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_data_is_needed_for_activations_where_a_side_is_projected():
    for source in ("weight", "ends", "random", "activations"):
        for sides in ("output", "input", "both", "none"):
            found = make(subspace_source=source, sides=sides).source
            assert found.needs_data == (source == "activations" and sides != "none")
            assert found.recomputable == (not found.needs_data)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().r = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0, expected an integer of at least 1"),
        ({"r": -2}, "r=-2, expected"),
        ({"r": 2.0}, "r=2.0, expected an integer"),
        ({"r": True}, "r=True, expected an integer"),
        ({"lora_alpha": 0}, "lora_alpha=0, expected a positive number"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf, expected"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan, expected"),
        ({"lora_alpha": "8"}, "lora_alpha='8', expected a positive number"),
        ({"lora_dropout": 1}, "lora_dropout=1, expected a probability in [0, 1)"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1, expected"),
        ({"lora_dropout": float("nan")}, "lora_dropout=nan, expected"),
        ({"lora_dropout": None}, "lora_dropout=None, expected"),
        ({"sides": "left"}, "sides='left', expected one of output, input, both, none"),
        ({"sides": None}, "sides=None, expected one of"),
        ({"subspace_source": "data"}, "subspace_source='data', expected one of weight, ends, random, activations"),
        ({"subspace_seed": 0.5}, "subspace_seed=0.5, expected an integer"),
        ({"update_bound": 0}, "update_bound=0, expected None or a number above 0"),
        ({"update_bound": -0.1}, "update_bound=-0.1, expected None or a number above 0"),
        ({"update_bound": float("nan")}, "update_bound=nan, expected None or a number above 0"),
        ({"update_bound": float("inf")}, "update_bound=inf, expected None or a number above 0"),
        ({"update_bound": "1"}, "update_bound='1', expected None or a number above 0"),
        ({"update_bound_norm": "nuclear"}, "update_bound_norm='nuclear', expected one of frobenius, spectral"),
        ({"update_bound_relative_to": "last"}, "update_bound_relative_to='last', expected one of weight, next, gap"),
        (
            {"update_bound": 1, "update_bound_relative_to": "gap", "sides": "none"},
            "update_bound_relative_to='gap', expected another one with sides='none'",
        ),
        ({"subspace_k": 4, "subspace_energy": 0.5}, "{'k': 4, 'energy': 0.5}, expected at most one of the three"),
        ({"subspace_k": 4, "subspace_ratio": 0.5}, "{'k': 4, 'ratio': 0.5}, expected at most one of the three"),
        ({"sides": "none", "subspace_k": 4}, "sides='none', expected no subspace size"),
        ({"subspace_k": -1}, "subspace_k=-1, expected an integer of at least 0"),
        ({"subspace_k": 2.5}, "subspace_k=2.5, expected an integer"),
        ({"subspace_energy": 0.0}, "subspace_energy=0.0, expected a share in (0, 1]"),
        ({"subspace_energy": 1.1}, "subspace_energy=1.1, expected a share in (0, 1]"),
        ({"subspace_energy": "all"}, "subspace_energy='all', expected a share"),
        ({"subspace_ratio": -0.1}, "subspace_ratio=-0.1, expected a share in [0, 1]"),
        ({"subspace_ratio": 1.1}, "subspace_ratio=1.1, expected a share in [0, 1]"),
        ({"subspace_ratio": [0.5]}, "subspace_ratio=[0.5], expected a share"),
        ({"target_modules": ()}, "target_modules=(), expected a selection of q, k, v, o, fc1, fc2"),
        ({"target_modules": None}, "target_modules=(None,), expected names of modules, or their endings"),
        ({"target_modules": ("q_proj", "")}, "target_modules=('q_proj', ''), expected names of modules"),
        ({"exclude_modules": ()}, "exclude_modules=(), expected names of modules, or their endings"),
        ({"exclude_modules": "(q"}, "exclude_modules='(q' is not a regular expression: missing )"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern={'q_proj': 0}, expected integers of at least 1"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern=['q_proj'], expected integers of at least 1 by names of modules"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern={'q_proj': -1}, expected positive numbers by names"),
        ({"alpha_pattern": {1: 2.0}}, "alpha_pattern={1: 2.0}, expected positive numbers by names of modules"),
        ({"target_modules": "(q"}, "target_modules='(q' is not a regular expression: missing )"),
        ({"target_modules": "q", "layers": (1,)}, "layers=(1,), expected None unless target_modules are some of q, k"),
        ({"towers": ("audio",)}, "towers=['audio'], expected a selection of image, text"),
        ({"towers": ()}, "towers=(), expected a selection of image, text"),
        ({"layers": ()}, "layers=(), expected None or non-negative block indices"),
        ({"layers": (0, -1)}, "layers=(0, -1), expected None or non-negative block indices"),
        ({"layers": {"audio": (1,)}}, "layers=['audio'], expected a selection of image, text"),
        ({"layers": {"text": (1,)}, "towers": "image"}, "layers=['text'], expected a selection of image"),
        ({"layers": {}}, "layers=(), expected a selection of image, text"),
        ({"layers": {"text": (-1,)}}, "layers['text']=(-1,), expected None or non-negative block indices"),
        ({"layers": (1.5,)}, "layers=(1.5,), expected None or non-negative block indices"),
        ({"modules_to_save": ("head", "")}, "modules_to_save=('head', ''), expected ends of module names"),
        ({"modules_to_save": 3}, "modules_to_save=3, expected ends of module names"),
        ({"layers": "all"}, "layers='all', expected None or non-negative block indices"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**fields)


def test_from_dict_names_unknown_fields():
    with pytest.raises(ValueError, match=r"CompLoRAConfig fields=\['rank'\], expected fields that this version knows"):
        CompLoRAConfig.from_dict({"rank": 4, "subspace_k": 2})
