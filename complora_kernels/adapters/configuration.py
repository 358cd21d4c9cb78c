"""The configuration of a saved adapter: its fields for PEFT, its entry "complora", and the checks of one that was read.

A configuration may come from anywhere: types are checked before values are used, and the shapes that it declares are
known before a tensor takes memory.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, TypedDict

from complora_kernels.common import base_weights
from complora_kernels.common.files import reading
from complora_kernels.common.schema import check_type
from complora_kernels.config import CompLoRAConfig
from complora_kernels.subspace import known_k

FORMAT_VERSION = 1
CONFIG_BYTES = 16 * 2**20  # the largest configuration that is read: an adapted weight takes about 500 bytes
ENERGY_ROUNDING = 1e-9  # absolute error allowed in a share of energies, which were summed in float64

Shapes = dict[str, tuple[int, ...]]  # by the name of a tensor


class SavedBasis(TypedDict):
    """The description of a saved basis."""

    kind: Literal["principal", "complement"]
    k: int
    energy: float


class SavedAdapter(TypedDict):
    """The entry "complora" of the configuration."""

    format_version: int
    package_version: str
    config: dict[str, Any]  # `CompLoRAConfig.to_dict`
    activations: dict[str, str]  # class of the MLP activation by tower
    base_weights: dict[str, base_weights.Description]
    digest: str


class SavedBases(TypedDict):
    """The further keys of the entry where bases cannot be computed from the base weights."""

    bases: dict[str, SavedBasis]
    bases_digest: str


class SavedModules(TypedDict):
    """The further key of the entry where whole modules are saved."""

    modules_to_save: dict[str, list[int]]  # the shape of each of their tensors, by its name in the model


def peft_fields(config: CompLoRAConfig, modules: Iterable[str], **changes: Any) -> dict[str, Any]:
    """The fields of PEFT's `LoraConfig` for an adapter on exactly the named modules."""
    modules = list(modules)
    fields = {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": module_pattern(modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": list(config.modules_to_save) or None,
        "rank_pattern": _pattern(modules, config.rank_of, config.r),
        "alpha_pattern": _pattern(modules, config.alpha_of, config.lora_alpha),
    }
    return fields | changes


def _pattern(modules: list[str], value_of: Callable[[str], Any], default: Any) -> dict[str, Any]:
    """The values other than the default, by regular expressions for the modules that have them."""
    values = {module: value_of(module) for module in modules}
    others = sorted({value for value in values.values() if value != default})
    return {module_pattern(module for module in modules if values[module] == value): value for value in others}


def most_frequent(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most frequent value; and, where there are others, all by name, a name before those that it may end in."""
    (value, count), *_ = Counter(values.values()).most_common(1)
    names = sorted(values, key=len, reverse=True) if count < len(values) else []
    return value, {name: values[name] for name in names}


def module_pattern(modules: Iterable[str]) -> str:
    """A regular expression for these modules alone: PEFT reads a list as endings, and a name can end another's."""
    return "|".join(re.escape(module) for module in modules)


def peft_key(module: str, factor: str) -> str:
    """The name under which PEFT stores `lora_A` or `lora_B` of a module."""
    return peft_name(".".join(part for part in (module, factor, "weight") if part))


def peft_name(tensor: str) -> str:
    """The name under which PEFT stores a tensor of a whole module."""
    return f"base_model.model.{tensor}"


def parse_config(text: bytes, path: Path) -> dict[str, Any]:
    """The configuration in `text`, which was read from `path`: JSON with a digest, otherwise unchecked.

    Raises:
        ValueError: the text is something else.
    """
    with reading(path, "JSON as save_adapter wrote it"):
        config = parse_object(text)
        check_type(config.get("complora"), dict[str, Any], "complora")
        check_type(config["complora"].get("digest"), str, "complora.digest")
    return config


def parse_object(text: bytes) -> dict[str, Any]:
    """The JSON object in `text`; raises an error of any kind where there is something else, or too much of it."""
    if len(text) > CONFIG_BYTES:
        raise ValueError(f"more than {CONFIG_BYTES} bytes")
    config = json.loads(text, parse_constant=_refuse_constant)
    check_type(config, dict[str, Any], "it")
    return config


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def check_config(config: dict[str, Any]) -> Shapes:
    """The shapes of the factors that a parsed configuration declares, by their names in the weights file.

    Raises:
        ValueError: it is of a newer version, a part is missing or of another type, or two parts contradict each other.
    """
    saved = config["complora"]
    _check_version(saved)
    check_type(saved, SavedAdapter, "complora")
    own = CompLoRAConfig.from_dict(saved["config"])
    shapes: Shapes = {}
    for path, described in saved["base_weights"].items():
        if len(described["shape"]) != 2:
            raise ValueError(f"complora.base_weights.{path}.shape={described['shape']}, expected [out, in]")
        out_features, in_features = described["shape"]
        shapes[peft_key(path, "lora_A")] = (own.rank_of(path), in_features)
        shapes[peft_key(path, "lora_B")] = (out_features, own.rank_of(path))
    if own.modules_to_save:
        check_type(saved, SavedModules, "complora")
        shapes |= {peft_name(name): tuple(shape) for name, shape in saved["modules_to_save"].items()}
    if not own.source.recomputable:
        check_type(saved, SavedBases, "complora")
        if not re.fullmatch("[0-9a-f]{64}", saved["bases_digest"]):  # it becomes a part of a file's name
            raise ValueError(f"complora.bases_digest={saved['bases_digest']!r:.100}, expected 64 hexadecimal digits")
        basis_shapes(saved)
    _check_peft_fields(config, own)
    return shapes


def _check_version(saved: dict[str, Any]) -> None:
    version: Any = saved.get("format_version")
    check_type(version, int, "complora.format_version")
    if version < 1:
        raise ValueError(f"format_version={version}, expected at least 1")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version={version}, expected at most {FORMAT_VERSION}: it was written by the newer "
            f"complora_kernels {saved.get('package_version')}"
        )


def basis_shapes(saved: dict[str, Any]) -> Shapes:
    """The shapes of the bases that the entry "complora" declares, by their names in the file of the bases.

    Raises:
        ValueError: a basis is of no adapted weight, or contradicts the configuration.
    """
    size = CompLoRAConfig.from_dict(saved["config"]).subspace_size
    shapes: Shapes = {}
    for key, basis in saved["bases"].items():
        path, _, side = key.removesuffix("_basis").rpartition(".")
        if side not in ("output", "input") or path not in saved["base_weights"]:
            raise ValueError(f"complora.bases has {key}, expected output_basis or input_basis of an adapted weight")
        shape, k = saved["base_weights"][path]["shape"], basis["k"]
        d = shape[side == "input"]
        if not 0 <= k <= d:
            raise ValueError(f"complora.bases.{key}.k={k}, expected at least 0 and at most {d}")
        declared = known_k(shape, size["k"], size["ratio"])
        if declared is not None and k != declared:
            raise ValueError(f"complora.bases.{key}.k={k}, expected {declared} as in complora.config")
        energy, least = basis["energy"], (size["energy"] or 0) if k else 0
        if not least - ENERGY_ROUNDING <= energy <= 1 + ENERGY_ROUNDING:
            raise ValueError(f"complora.bases.{key}.energy={energy}, expected a share in [{least}, 1]")
        shapes[key] = (d, k if basis["kind"] == "principal" else d - k)
    return shapes


def _check_peft_fields(config: dict[str, Any], own: CompLoRAConfig) -> None:
    """Raises ValueError where the fields that PEFT reads contradict those that this package reads."""
    expected = peft_fields(own, config["complora"]["base_weights"])
    del expected["rank_pattern"]  # names attention alone, see `save_adapter`
    for name, value in expected.items():
        if name in config and not same_json(config[name], value):
            raise ValueError(f"{name}={config[name]!r:.100} contradicts complora, expected {value!r:.100}")


def same_json(value: Any, other: Any) -> bool:
    """Whether two values have the same JSON: in Python 2 == 2.0 and 1 == True, which JSON writes differently."""
    return json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)
