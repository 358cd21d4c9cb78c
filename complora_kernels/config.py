"""`CompLoRAConfig`: what is adapted, how strongly, and which subspace of each weight is protected."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from complora_kernels.common.low_rank import Norm
from complora_kernels.common.schema import check_type, is_int, is_number
from complora_kernels.subspace import SOURCES, Source, SubspaceSource, check_subspace_size

Sides = Literal["output", "input", "both", "none"]
BoundReference = Literal["weight", "next", "gap"]

ATTENTION_TARGETS = ("q", "k", "v", "o")
MLP_TARGETS = ("fc1", "fc2")
TARGETS = ATTENTION_TARGETS + MLP_TARGETS
PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}  # adapters of an attention in names
ALL_LINEAR = "all-linear"
TOWERS = ("image", "text")
DEFAULT_RATIO = 0.5

Layers = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class CompLoRAConfig:
    """How `apply_complora` adapts a model; fields are named as in PEFT's `LoraConfig` where it has them.

    An adapted layer computes `y = x W^T + b + scaling · (drop(x) Ã^T) B̃^T` with `Ã = A P_in` and `B̃ = P_out B`,
    where `P_out = I - U_k U_k^T` and `P_in = I - V_k V_k^T` remove the top-k singular directions of `W`
    (Comp-LoRA, arXiv 2501.15040). The paper's own `k`, rank and layers are not known to us: choose them for your task.

    Args:
        r: rank of the update, at least 1.
        lora_alpha: `scaling = lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`.
        lora_dropout: probability in [0, 1) with which an element of the adapter's input is dropped in training.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        sides: "output" projects B (the default formula of the package), "input" projects A, "both" projects the two
            as the paper's figure does, "none" is plain LoRA.
        subspace_k: number of protected directions, 0 <= k <= min(out, in).
        subspace_energy: share in (0, 1]; k is the smallest number of directions that holds this share of Σσ² (with
            `subspace_source="activations"`, of the trace of the matrix whose eigenvectors they are).
        subspace_ratio: share in [0, 1]; k = round(ratio · min(out, in)).
            At most one of the three sizes is given, none of them with `sides="none"`; without one the ratio is 0.5.
        subspace_source: "weight" protects the principal directions of the weight, "random" as many random ones:
            the control that tells whether the singular vectors matter. "ends" protects the directions of the largest
            and of the smallest singular values in turns, and leaves the middle of the spectrum. "activations" protects
            the principal directions of the weight's inputs X [M, in] and products Y = X W^T [M, out] on calibration
            batches: V_k are the top-k eigenvectors of X^T X, U_k those of Y^T Y. Not used with `sides="none"`.
        subspace_seed: chooses the random directions of `subspace_source="random"`.
        update_bound: c > 0 bounds each update, `ΔW' = ΔW · min(1, c · reference / |ΔW|)`, in training too; None does
            not. What is merged, saved as an adapter and exported is bounded already, and costs no more to run. An
            update that is loaded stays as it is: where it is above its limit, its norm is the limit.
        update_bound_norm: "frobenius", or "spectral", the largest singular value of ΔW, which takes a decomposition
            [r, r] of each update in each forward pass, and with it no step can be a CUDA graph.
        update_bound_relative_to: "weight": the reference is |W| in the same norm. "next": σ_{k+1}, the largest singular
            value of W that is not protected, where k is that of the widest projected side (with "ends", of its upper
            end). "gap": σ_k - σ_{k+1}. With `sides="both"`, W + ΔW keeps U_k, V_k and their σ; they are its top k as
            long as its other singular values stay below σ_k. These are at most σ_{k+1} + |ΔW|, so a gap with c < 1
            guarantees it whatever is learned, in either norm; "next" does so where (1 + c) σ_{k+1} < σ_k.
            `subspace_report` says which holds.
        target_modules: any of q k v o fc1 fc2 in the residual blocks of the towers; or names of modules, or their
            endings, as in PEFT's lists (`["q_proj", "v_proj"]`); or "all-linear"; or one regular expression that must
            match a whole module name. All but the first select `nn.Linear` modules of any model, and where a module
            holds q, k and v in one weight, an adapter for each.
        exclude_modules: modules that are not adapted though they are selected: names or their endings, or one regular
            expression that must match a whole module name.
        rank_pattern: another r for some weights, by the names of their modules or the endings of these. q, k, v and o
            of an attention that is one module are called `q_proj`, `k_proj`, `v_proj` and `out_proj` in it.
        alpha_pattern: another lora_alpha, in the same way.
        towers: "image", "text" or both; a model with one tower needs no other value. Read with q k v o fc1 fc2 alone.
        layers: indices of the residual blocks to adapt, the same in each tower or, in a dictionary, for each tower;
            None adapts all. Read with q k v o fc1 fc2 alone.
        modules_to_save: names of modules, or their endings, that are trained as a whole beside the factors, such as a
            new "head", and are saved, loaded and exported with them. They are trained in place: `disable_adapter`,
            `unmerge_adapter` and `unload` leave them as they are, and a model that has them has one adapter.

    Raises:
        ValueError: a field is out of its range; the message names the field, its value and what was expected.
    """

    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    sides: Sides = "output"
    subspace_k: int | None = None
    subspace_energy: float | None = None
    subspace_ratio: float | None = None
    subspace_source: SubspaceSource = "weight"
    subspace_seed: int = 0
    update_bound: float | None = None
    update_bound_norm: Norm = "frobenius"
    update_bound_relative_to: BoundReference = "weight"
    target_modules: tuple[str, ...] | str = ("q", "k", "v")
    exclude_modules: tuple[str, ...] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    towers: tuple[str, ...] = ("image", "text")
    layers: Layers | dict[str, Layers] | None = None
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = {
            "r": (is_int(self.r) and self.r >= 1, "an integer of at least 1"),
            "lora_alpha": (is_number(self.lora_alpha) and self.lora_alpha > 0, "a positive number"),
            "lora_dropout": (is_number(self.lora_dropout) and 0 <= self.lora_dropout < 1, "a probability in [0, 1)"),
            "use_rslora": (isinstance(self.use_rslora, bool), "True or False"),
            "sides": (self.sides in get_args(Sides), f"one of {', '.join(get_args(Sides))}"),
            "subspace_source": (self.subspace_source in tuple(SOURCES), f"one of {', '.join(SOURCES)}"),
            "subspace_seed": (is_int(self.subspace_seed), "an integer"),
            "update_bound": (
                self.update_bound is None or (is_number(self.update_bound) and self.update_bound > 0),
                "None or a number above 0",
            ),
            "update_bound_norm": (self.update_bound_norm in get_args(Norm), f"one of {', '.join(get_args(Norm))}"),
            "update_bound_relative_to": (
                self.update_bound_relative_to in get_args(BoundReference),
                f"one of {', '.join(get_args(BoundReference))}",
            ),
        }
        for name, (valid, expected) in checks.items():
            _require(valid, name, getattr(self, name), expected)
        self._check_subspace_size()
        self._check_selection()
        if self.update_bound is not None and self.sides == "none":
            reference = self.update_bound_relative_to
            _require(reference != "gap", "update_bound_relative_to", reference, "another one with sides='none'")

    def _check_subspace_size(self) -> None:
        given = {name: value for name, value in self.subspace_size.items() if value is not None}
        if self.sides == "none":
            _require(not given, "sides", "none", f"no subspace size, because plain LoRA protects nothing; got {given}")
            return
        if not given:
            object.__setattr__(self, "subspace_ratio", DEFAULT_RATIO)
        _require(len(given) <= 1, "subspace_k, subspace_energy, subspace_ratio", given, "at most one of the three")
        check_subspace_size(**self.subspace_size, prefix="subspace_")

    def _check_selection(self) -> None:
        words = self.selects_in_blocks
        if isinstance(self.target_modules, str):
            _check_pattern("target_modules", self.target_modules)
        elif words:
            object.__setattr__(self, "target_modules", _names("target_modules", self.target_modules, TARGETS))
        else:
            object.__setattr__(self, "target_modules", _module_names("target_modules", self.target_modules))
        if isinstance(self.exclude_modules, str):
            _check_pattern("exclude_modules", self.exclude_modules)
        elif self.exclude_modules is not None:
            object.__setattr__(self, "exclude_modules", _module_names("exclude_modules", self.exclude_modules))
        for name, valid, expected in (
            ("rank_pattern", lambda r: is_int(r) and r >= 1, "integers of at least 1 by names of modules"),
            ("alpha_pattern", lambda alpha: is_number(alpha) and alpha > 0, "positive numbers by names of modules"),
        ):
            pattern: Any = getattr(self, name)
            fits = isinstance(pattern, dict) and all(isinstance(key, str) and valid(pattern[key]) for key in pattern)
            _require(fits, name, pattern, expected)
            object.__setattr__(self, name, dict(pattern))
        object.__setattr__(self, "towers", _names("towers", self.towers, TOWERS))
        names = _tuple(self.modules_to_save)
        valid = all(isinstance(name, str) and name for name in names)
        _require(valid, "modules_to_save", self.modules_to_save, "ends of module names")
        object.__setattr__(self, "modules_to_save", names)
        if self.layers is not None:
            _require(words, "layers", self.layers, f"None unless target_modules are some of {', '.join(TARGETS)}")
            object.__setattr__(self, "layers", self._sorted_layers())

    def _sorted_layers(self) -> Layers | dict[str, Layers]:
        if not isinstance(self.layers, dict):
            return _indices("layers", self.layers)
        _names("layers", self.layers, self.towers)
        return {tower: _indices(f"layers[{tower!r}]", self.layers[tower]) for tower in self.layers}

    @property
    def selects_in_blocks(self) -> bool:
        """Whether `target_modules` are some of q k v o fc1 fc2, rather than names of modules."""
        return not isinstance(self.target_modules, str) and set(_tuple(self.target_modules)) <= set(TARGETS)

    def layers_of(self, tower: str) -> Layers | None:
        """The indices of the residual blocks to adapt in a tower; None: all of them."""
        return self.layers.get(tower, ()) if isinstance(self.layers, dict) else self.layers

    def rank_of(self, weight: str) -> int:
        """The rank of an adapted weight, by the name that files give it."""
        return _by_name(self.rank_pattern, weight, self.r)

    def alpha_of(self, weight: str) -> float:
        """The lora_alpha of an adapted weight, by the name that files give it."""
        return _by_name(self.alpha_pattern, weight, self.lora_alpha)

    def scaling_of(self, weight: str) -> float:
        """The scaling of an adapted weight, by the name that files give it: alpha / r, or alpha / sqrt(r)."""
        r = self.rank_of(weight)
        return self.alpha_of(weight) / (math.sqrt(r) if self.use_rslora else r)

    @property
    def subspace_size(self) -> dict[str, Any]:
        """The three sizes under the names that `principal_basis` takes: `k`, `energy`, `ratio`."""
        return {"k": self.subspace_k, "energy": self.subspace_energy, "ratio": self.subspace_ratio}

    @property
    def source(self) -> Source:
        """The source of the protected directions. Plain LoRA, which protects none, needs no data whatever is named."""
        return SOURCES["weight" if self.sides == "none" else self.subspace_source]

    @property
    def protects_activations(self) -> bool:
        """Whether calibration batches are needed: `subspace_source="activations"` with a projected side."""
        return self.source.needs_data

    @property
    def scaling(self) -> float:
        """`lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them (tuples become lists)."""
        fields = dataclasses.asdict(self)
        return {name: _as_json(value) for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> CompLoRAConfig:
        """The inverse of `to_dict`; an unknown field, or one of another type, is an error that names it.

        Regular expressions are not compiled: one that comes from a file may take hours.
        """
        hints = get_type_hints(cls)
        unknown = sorted(set(fields) - hints.keys())
        _require(not unknown, "CompLoRAConfig fields", unknown, "fields that this version knows")
        for name, value in fields.items():
            check_type(value, hints[name], name)
        values: dict[str, Any] = {name: _from_json(value) for name, value in fields.items()}
        patterns = {n: values[n] for n in ("target_modules", "exclude_modules") if isinstance(values.get(n), str)}
        uncompiled: dict[str, Any] = dict.fromkeys(patterns, "")
        config = cls(**values | uncompiled)
        for name, pattern in patterns.items():
            object.__setattr__(config, name, pattern)
        return config


def module_name_fits(name: str, path: str) -> bool:
    """Whether a module's path is `name` or ends in it, whole parts at a time."""
    return path == name or path.endswith(f".{name}")


def _by_name(pattern: dict[str, Any], weight: str, default: Any) -> Any:
    """The value of the first name that fits a weight's; q, k, v and o of an attention have its name, too."""
    module, _, projection = weight.rpartition(".")
    for path in (weight, module) if projection in PROJECTIONS.values() else (weight,):
        for name, value in pattern.items():
            if module_name_fits(name, path):
                return value
    return default


def _check_pattern(field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{field}={pattern!r} is not a regular expression: {error}") from None


def _module_names(field: str, values: Any) -> tuple[str, ...]:
    values = _tuple(values)
    valid = bool(values) and all(isinstance(value, str) and value for value in values)
    _require(valid, field, values, "names of modules, or their endings")
    return tuple(dict.fromkeys(values))


def _indices(field: str, values: Any) -> Layers:
    layers = _tuple(values)
    valid = bool(layers) and all(is_int(layer) and layer >= 0 for layer in layers)
    _require(valid, field, values, "None or non-negative block indices")
    return tuple(sorted(set(layers)))


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(part) for key, part in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _from_json(part) for key, part in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _names(field: str, values: Any, known: tuple[str, ...]) -> tuple[str, ...]:
    values = _tuple(values)
    unknown = [value for value in values if value not in known]
    _require(bool(values) and not unknown, field, unknown or values, f"a selection of {', '.join(known)}")
    return tuple(name for name in known if name in values)


def _tuple(values: Any) -> tuple[Any, ...]:
    """The values as a tuple; one that stands alone becomes a tuple of one."""
    return tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else (values,)


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r}, expected {expected}")
