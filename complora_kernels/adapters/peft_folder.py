"""A folder that PEFT wrote, read without PEFT: a LoRA update for each weight, and modules that were trained whole.

The files may come from anywhere: what a folder declares is compared with the model before a tensor takes memory, and no
regular expression of it is compiled (`peft_patterns`).
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from complora_kernels.adapters.configuration import CONFIG_BYTES, Shapes, parse_object, peft_key, peft_name
from complora_kernels.adapters.files import CONFIG_FILE, WEIGHTS_FILE, read_tensors, require_file
from complora_kernels.adapters.peft_patterns import check_patterns, value_for
from complora_kernels.adapters.whole_modules import whole_modules, whole_tensors
from complora_kernels.common.files import reading
from complora_kernels.common.schema import check_type
from complora_kernels.common.wrappers import named_modules
from complora_kernels.config import PROJECTIONS
from complora_kernels.integrations import Target, describe
from complora_kernels.integrations.names import own_name
from complora_kernels.integrations.selection import packed_linears

PREFIX = peft_name("")
OUT_PROJ = ".base_layer.out_proj"  # PEFT's own adapter of the output projection, in that of an nn.MultiheadAttention
INPUTS = ("q", "k", "v")
# PEFT up to 0.21 adds the update of an nn.MultiheadAttention's output projection twice, in training too.
TIMES_OUT_PROJ = 2.0
INITIALISATIONS = ("gaussian", "eva", "orthogonal")  # those that leave the base weights as they are
# Fields that say nothing about the update: how it was initialised, or what the names of the tensors say anyway.
UNUSED = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}


class PeftFields(TypedDict):
    """The fields of PEFT's `LoraConfig` that an import reads."""

    peft_type: str
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    rank_pattern: dict[str, int] | None
    alpha_pattern: dict[str, float] | None
    target_parameters: list[str] | None
    modules_to_save: list[str] | None
    init_lora_weights: bool | str


DEFAULTS: dict[str, Any] = {
    "lora_dropout": 0.0,
    "use_rslora": False,
    "rank_pattern": None,
    "alpha_pattern": None,
    "target_parameters": None,
    "modules_to_save": None,
    "init_lora_weights": True,
}


class Place(NamedTuple):
    """A weight [out, in] of a plain model: that of a linear layer, or one of q, k, v, o in packed attention."""

    path: str
    name: str  # "" in a linear layer
    shape: tuple[int, int]


class Update(NamedTuple):
    """The update `lora_alpha / r · B A` of one weight, or `lora_alpha / sqrt(r) · B A` with rsLoRA."""

    weight: str  # its name, as files have it
    path: str  # of its layer
    name: str  # of its adapter: "" in a linear layer, q, k, v or o in attention
    A: Tensor  # [r, in]
    B: Tensor  # [out, r]
    lora_alpha: float

    @property
    def r(self) -> int:
        """The rank."""
        return len(self.A)


class PeftFolder(NamedTuple):
    """What `read_peft` has read and checked."""

    fields: PeftFields
    updates: list[Update]
    modules_to_save: tuple[str, ...]  # those of the fields that end the name of a module of the model
    whole: dict[str, Tensor]  # the parameters and buffers of these modules, by their names in the model


class _Module(NamedTuple):
    """A module with factors, by its name in the plain model: an `nn.Linear`, or one with one A for q, k and v."""

    name: str
    matched: str  # what `rank_pattern` and `alpha_pattern` are matched with
    weights: tuple[str, ...]  # the weights that it updates, above each other, by the names that files use
    times: float = 1.0  # how often PEFT adds its update


def read_peft(directory: str | os.PathLike[str], model: nn.Module) -> PeftFolder:
    """The LoRA adapter in `directory`, for the weights of the plain `model`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        OSError: a file cannot be read.
        ValueError: a file is damaged or contradicts itself or the model, or is of a method that is no plain LoRA of
            linear layers and attention; the message has the file's path and names the field, module or tensor.
    """
    config_path, weights_path = (Path(directory) / name for name in (CONFIG_FILE, WEIGHTS_FILE))
    for path in (config_path, weights_path):
        require_file(path, "the two files of PEFT's save_pretrained (adapter_model.bin, a pickle, is not read)")
    with reading(config_path, "a LoRA configuration of PEFT"), config_path.open("rb") as file:
        fields = _checked_fields(parse_object(file.read(CONFIG_BYTES + 1)))
    with reading(weights_path, "LoRA factors of the configuration beside it, for this model"):
        packed, modules = packed_linears(model), list[_Module]()
        places = weight_places(model, packed)
        paths = [path for path, _ in named_modules(model) if path]
        ends = tuple(end for end in fields["modules_to_save"] or () if any(path.endswith(end) for path in paths))
        whole = whole_tensors(whole_modules(model, ends, ()))

        def declared(_: dict[str, str], names: set[str]) -> Shapes:
            modules.extend(_modules(names, fields["target_parameters"] or (), places, packed))
            shapes = _factor_shapes(model, modules, places, fields)
            return shapes | {peft_name(name): tuple(tensor.shape) for name, tensor in whole.items()}

        _, tensors = read_tensors(weights_path, declared)
        updates = list(_updates(modules, tensors, places, packed, fields))
    return PeftFolder(fields, updates, ends, {name: tensors[peft_name(name)] for name in whole})


def _checked_fields(config: dict[str, Any]) -> PeftFields:
    """The fields that are read, once no other one says that the adapter is more than LoRA's `B A`."""
    if "complora" in config:
        raise ValueError("it was written by save_adapter, expected a folder of PEFT: call load_adapter")
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"peft_type={config.get('peft_type')!r:.100}, expected 'LORA': other methods cannot be imported"
        )
    for name, value in config.items():
        if name not in PeftFields.__annotations__.keys() | UNUSED and value not in (None, False, "none", [], {}):
            raise ValueError(f"{name}={value!r:.100} cannot be imported, expected LoRA's B A alone, without {name}")
    fields: Any = DEFAULTS | config
    check_type(fields, PeftFields, "it")
    initialised = fields["init_lora_weights"]
    if isinstance(initialised, str) and initialised not in INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights={initialised!r:.100}, expected true, false or one of {', '.join(INITIALISATIONS)}: the "
            "others change the base weights (PEFT saves such an adapter as LoRA, by its "
            "path_initial_model_for_weight_conversion)"
        )
    if fields["r"] < 1 or any(rank < 1 for rank in (fields["rank_pattern"] or {}).values()):
        raise ValueError(f"r={fields['r']}, rank_pattern={fields['rank_pattern']!r:.100}, expected ranks of at least 1")
    for name in ("rank_pattern", "alpha_pattern"):
        check_patterns(name, fields[name] or {})
    return fields


def weight_places(model: nn.Module, packed_linears: Mapping[str, Target]) -> dict[str, Place]:
    """The weights of `model` that a LoRA may update, by the names that files use (see `factors`)."""
    places: dict[str, Place] = {}
    for path, module in named_modules(model):
        packed, out_proj = getattr(module, "in_proj_weight", None), getattr(module, "out_proj", None)
        if isinstance(packed, Tensor) and isinstance(out_proj, nn.Linear):
            shape = (packed.shape[0] // len(INPUTS), packed.shape[1])
            for name, projection in PROJECTIONS.items():
                outer = (out_proj.out_features, out_proj.in_features)
                places[f"{path}.{projection}" if path else projection] = Place(
                    path, name, shape if name != "o" else outer
                )
        elif path in packed_linears:
            for name, (_, start, stop) in packed_linears[path].weights.items():
                width = module.get_parameter("weight").shape[1]
                places[f"{path}.{PROJECTIONS[name]}"] = Place(path, name, (stop - start, width))
        elif isinstance(module, nn.Linear):
            places.setdefault(path, Place(path, "", (module.out_features, module.in_features)))
    return places


def _modules(
    names: Iterable[str], parameters: Collection[str], known: Collection[str], packed_linears: Collection[str]
) -> list[_Module]:
    """The modules that have factors among these names of tensors, with the names that the model has for their weights.

    Raises:
        ValueError: two of them update one weight.
    """
    ends = (".lora_A.weight", ".lora_B.weight")
    adapted = {name[len(PREFIX) : -len(ends[0])] for name in names if name.startswith(PREFIX) and name.endswith(ends)}
    modules: dict[str, _Module] = {}
    for name in sorted(adapted):
        attention = name.removesuffix(OUT_PROJ)
        packed = _is_named(f"{name}.in_proj_weight", parameters)
        if attention != name:
            module = _Module(name, attention, (f"{attention}.out_proj",), TIMES_OUT_PROJ)
        elif packed or name + OUT_PROJ in adapted or name in packed_linears:
            weights = tuple(f"{name}.{PROJECTIONS[part]}" for part in INPUTS)
            module = _Module(name, f"{name}.in_proj_weight" if packed else name, weights)
        else:
            weight = f"{name}.weight"
            module = _Module(name, weight if _is_named(weight, parameters) else name, (name,))
        module = module._replace(weights=tuple(own_name(weight, known) for weight in module.weights))
        for weight in module.weights:
            if weight in modules:
                raise ValueError(f"{modules[weight].name} and {name} both update {weight}, expected one of them")
            modules[weight] = module
    return list(dict.fromkeys(modules.values()))


def _is_named(parameter: str, names: Iterable[str]) -> bool:
    """Whether PEFT's `target_parameters` name this parameter or its end behind a dot."""
    return any(f".{parameter}".endswith(f".{name}") for name in names)


def _factor_shapes(
    model: nn.Module, modules: Iterable[_Module], places: dict[str, Place], fields: PeftFields
) -> Shapes:
    """The shapes of the factors, by their names in the weights file.

    Raises:
        ValueError: the model has no such weight.
    """
    shapes: Shapes = {}
    for module in modules:
        for weight in module.weights:
            if weight not in places:
                raise ValueError(
                    f"the model has no nn.Linear and no packed attention for {weight}, expected one: it is "
                    f"{describe(model)}"
                )
        r = value_for(fields["rank_pattern"] or {}, module.matched, fields["r"])
        shapes[peft_key(module.name, "lora_A")] = (r, places[module.weights[0]].shape[1])
        shapes[peft_key(module.name, "lora_B")] = (sum(places[weight].shape[0] for weight in module.weights), r)
    return shapes


def _updates(
    modules: Iterable[_Module],
    tensors: dict[str, Tensor],
    places: dict[str, Place],
    packed_linears: Collection[str],
    fields: PeftFields,
) -> Iterator[Update]:
    """The update of each weight."""
    zero = {name for name, _, weights, _ in modules if not any(factor.any() for factor in _pair(tensors, name))}
    for name, matched, weights, times in modules:
        A, B = _pair(tensors, name)
        alpha = float(value_for(fields["alpha_pattern"] or {}, matched, fields["lora_alpha"]))
        # PEFT initialises A with other values than zero: the adapter of an output projection that is zero is a filler.
        if name.endswith(OUT_PROJ) and name in zero:
            continue
        parts: list[tuple[Tensor, Tensor] | None] = [(A, times * B)]
        if len(weights) > 1:
            exported = bool(B.any()) if name in packed_linears else name + OUT_PROJ in zero
            parts, n = _parted(A, B, exported=exported)
            alpha = _unscaled(alpha, n, fields["use_rslora"])
        for weight, part in zip(weights, parts, strict=True):
            if part is not None:
                yield Update(weight, *places[weight][:2], *part, alpha)


def _pair(tensors: dict[str, Tensor], module: str) -> tuple[Tensor, Tensor]:
    return tensors[peft_key(module, "lora_A")], tensors[peft_key(module, "lora_B")]


def _parted(
    A: Tensor,  # [R, d]
    B: Tensor,  # [3d, R]
    *,
    exported: bool,
) -> tuple[list[tuple[Tensor, Tensor] | None], int]:
    """The factors of q, k and v, None for one that is not adapted, and the n by which `export_peft` multiplied r.

    `export_peft` stacks the A of n weights and writes their B as blocks on a diagonal, which are found again. What PEFT
    trained has one A for all three.
    """
    parts = B.chunk(len(INPUTS))  # each [d, R]
    for n in (3, 2, 1) if exported else ():
        r, rest = divmod(len(A), n)
        for chosen in itertools.combinations(range(len(INPUTS)), n) if rest == 0 else ():
            blocks = {i: slice(place * r, (place + 1) * r) for place, i in enumerate(chosen)}
            if not any(_outside(part, blocks.get(i)).any() for i, part in enumerate(parts)):
                return [(A[blocks[i]], part[:, blocks[i]]) if i in blocks else None for i, part in enumerate(parts)], n
    return [(A, part) for part in parts], 1


def _outside(part: Tensor, block: slice | None) -> Tensor:
    """The columns of [d, R] that are not in a block."""
    return part if block is None else torch.cat([part[:, : block.start], part[:, block.stop :]], dim=1)


def _unscaled(alpha: float, n: int, use_rslora: bool) -> float:
    """The `lora_alpha` of a weight, of which `export_peft` made n · lora_alpha, or √n · lora_alpha with rsLoRA."""
    factor = math.sqrt(n) if use_rslora else n
    rounded = round(alpha / factor, 12)
    return rounded if rounded * factor == alpha else alpha / factor
