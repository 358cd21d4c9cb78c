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
        "target_modules": ["q", "k", "v"],
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


def test_a_regular_expression_selects_modules_by_name():
    assert make(target_modules=r".*\.(c_fc|c_proj)").target_modules == r".*\.(c_fc|c_proj)"


@pytest.mark.parametrize(
    "config",
    [
        make(),
        make(sides="none", r=1, layers=(0, 11)),
        make(subspace_energy=0.5, subspace_source="random", subspace_seed=7, target_modules="a|b", towers=("text",)),
        make(subspace_ratio=0.5, subspace_source="activations", sides="both"),
    ],
)
def test_dictionary_round_trip_through_json(config):
    assert CompLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_data_is_needed_for_activations_where_a_side_is_projected():
    for source in ("weight", "random", "activations"):
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
        ({"subspace_source": "data"}, "subspace_source='data', expected one of weight, random, activations"),
        ({"subspace_seed": 0.5}, "subspace_seed=0.5, expected an integer"),
        ({"subspace_k": None}, "subspace_k, subspace_energy, subspace_ratio=None, expected exactly one of the three"),
        ({"subspace_k": 4, "subspace_energy": 0.5}, "{'k': 4, 'energy': 0.5}, expected exactly one of the three"),
        ({"subspace_k": 4, "subspace_ratio": 0.5}, "{'k': 4, 'ratio': 0.5}, expected exactly one of the three"),
        ({"sides": "none", "subspace_k": 4}, "sides='none', expected no subspace size"),
        ({"subspace_k": -1}, "subspace_k=-1, expected an integer of at least 0"),
        ({"subspace_k": 2.5}, "subspace_k=2.5, expected an integer"),
        ({"subspace_energy": 0.0}, "subspace_energy=0.0, expected a share in (0, 1]"),
        ({"subspace_energy": 1.1}, "subspace_energy=1.1, expected a share in (0, 1]"),
        ({"subspace_energy": "all"}, "subspace_energy='all', expected a share"),
        ({"subspace_ratio": -0.1}, "subspace_ratio=-0.1, expected a share in [0, 1]"),
        ({"subspace_ratio": 1.1}, "subspace_ratio=1.1, expected a share in [0, 1]"),
        ({"subspace_ratio": [0.5]}, "subspace_ratio=[0.5], expected a share"),
        ({"target_modules": ("q", "w")}, "target_modules=['w'], expected a selection of q, k, v, o, fc1, fc2"),
        ({"target_modules": ()}, "target_modules=(), expected a selection of q, k, v, o, fc1, fc2"),
        ({"target_modules": None}, "target_modules=[None], expected a selection"),
        ({"target_modules": "(q"}, "target_modules='(q' is not a regular expression: missing )"),
        ({"target_modules": "q", "layers": (1,)}, "layers=(1,), expected None when target_modules is a regular"),
        ({"towers": ("audio",)}, "towers=['audio'], expected a selection of image, text"),
        ({"towers": ()}, "towers=(), expected a selection of image, text"),
        ({"layers": ()}, "layers=(), expected None or non-negative block indices"),
        ({"layers": (0, -1)}, "layers=(0, -1), expected None or non-negative block indices"),
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
